//! Captures, mounts and fetches with connections that break anywhere.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mainstay_block::hash_table::{Fill, HashTable};
use mainstay_block::{
    BlockDevice, BlockError, BlockHash, ExtentKind, FaultPlan, FaultyDevice, HashKey, MemoryDevice, is_zero,
};
use mainstay_replication::{
    FetchJob, FetchTarget, Mount, MountOptions, RefusalKind, ReplicationError, SendOptions, SendProgress,
    fetch, rebuild_table, replicate, session_outcome, settle,
};
use proptest::prelude::*;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::bench::{Bench, Dial, REPLICA, Source, noise, read_point};

/// A runtime whose clock jumps over pauses, so that back-off costs no time.
fn paused<T>(work: impl Future<Output = T>) -> T {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(work)
}

#[derive(Clone, Debug)]
struct Round {
    /// Disk, offset, length, seed (0: zeros).
    writes: Vec<(usize, u64, usize, u64)>,
    budgets: Vec<usize>,
    restart_in: Option<usize>,
}

fn round() -> impl Strategy<Value = Round> {
    let write = (0usize..2, 0u64..900_000, 1usize..90_000, 0u64..4);
    (
        proptest::collection::vec(write, 0..6),
        proptest::collection::vec(20usize..300_000, 0..5),
        proptest::option::weighted(0.3, 1usize..4),
    )
        .prop_map(|(writes, budgets, restart_in)| Round { writes, budgets, restart_in })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, max_shrink_iters: 100, ..ProptestConfig::default() })]

    #[test]
    fn every_point_equals_the_disks_of_its_moment(rounds in proptest::collection::vec(round(), 1..4)) {
        paused(async {
            let bench = Bench::new();
            let mut source = Source::new(&[1_000_000, 777_777]);
            let mut points: Vec<(Uuid, Vec<Vec<u8>>)> = Vec::new();
            for round in &rounds {
                for (disk, offset, length, seed) in &round.writes {
                    let data = if *seed == 0 { vec![0; *length] } else { noise(*seed, *length) };
                    source.write(*disk, *offset, data).await;
                }
                *bench.budgets.lock().unwrap() = round.budgets.clone().into();
                *bench.restart_in.lock().unwrap() = round.restart_in;
                let options = SendOptions { window_bytes: 100_000, ..SendOptions::default() };
                let (outcome, progress) = source.send(&bench, &options).await.unwrap();
                // The pipe holds less than a frame: at most the one in it and the one being written are sent again.
                let connections = outcome.traffic.connections();
                assert!(outcome.frames_resent <= 2 * connections, "{outcome:?}");
                assert!(progress.disks.iter().all(|disk| disk.examined_bytes >= 777_777));
                points.push((outcome.point, source.contents()));
                *bench.budgets.lock().unwrap() = round.budgets.clone().into();
                assert!(read_point(&bench, outcome.point).await == source.contents());
            }
            for (point, contents) in &points {
                assert!(read_point(&bench, *point).await == *contents);
            }
            bench.budgets.lock().unwrap().clear();
            // Nothing changed: nothing is sent.
            let (outcome, progress) = source.send(&bench, &SendOptions::default()).await.unwrap();
            assert_eq!((progress.frames, outcome.traffic.sent() < 1000), (0, true));
            fetch_between(&bench, &points, rounds[0].budgets.clone()).await;
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 30, max_shrink_iters: 100, ..ProptestConfig::default() })]

    /// Each slice has time for one piece; between slices the guest writes where it likes, the connection breaks and the
    /// server restarts. What comes out at the end is the disks of the last slice's moment; until then there is no point.
    #[test]
    fn slices_make_a_point_of_the_last_moment(rounds in proptest::collection::vec(round(), 1..6)) {
        paused(async {
            let bench = Bench::new();
            let mut source = Source::new(&[5_000_000, 3_777_777]);
            source.write(0, 0, noise(9, 5_000_000)).await;
            source.write(1, 0, noise(8, 3_777_777)).await;
            let mut left: Vec<Vec<std::ops::Range<u64>>> =
                source.disks.iter().map(|(device, _)| std::iter::once(0..device.size()).collect()).collect();
            let mut rounds = rounds.iter();
            let slices = SendOptions { time_max: Some(Duration::ZERO), ..SendOptions::default() };
            let mut count = 0;
            while left.iter().any(|left| !left.is_empty()) {
                if let Some(round) = rounds.next() {
                    for (disk, offset, length, seed) in &round.writes {
                        source.write(*disk, *offset, noise(*seed, *length)).await;
                        let size = source.disks[*disk].0.size();
                        left[*disk].push(*offset..(offset + *length as u64).min(size));
                    }
                    *bench.budgets.lock().unwrap() = round.budgets.clone().into();
                    *bench.restart_in.lock().unwrap() = round.restart_in;
                }
                let mut job = source.job();
                for (disk, ranges) in job.disks.iter_mut().zip(&left) {
                    disk.ranges.clone_from(ranges);
                }
                let outcome = source.send_job(&bench, &job, &slices).await.unwrap();
                left = outcome.left;
                count += 1;
                let is_whole = left.iter().all(Vec::is_empty);
                let listed = bench.store().points(REPLICA).await.unwrap();
                prop_assert_eq!(listed.len(), usize::from(is_whole));
            }
            prop_assert!(count >= 7, "{} slices of 1 MiB cannot hold 8.8 MB", count);
            prop_assert!(read_point(&bench, source.parent.unwrap()).await == source.contents());
            Ok(())
        })?;
    }
}

/// Brings disks that hold the first point to the last one.
async fn fetch_between(bench: &Arc<Bench>, points: &[(Uuid, Vec<Vec<u8>>)], budgets: Vec<usize>) {
    let (Some((from, before)), Some((to, after))) = (points.first(), points.last()) else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut targets = Vec::new();
    let mut devices = Vec::new();
    for (index, content) in before.iter().enumerate() {
        let device = Arc::new(MemoryDevice::new(content.len() as u64));
        device.write(0, content.clone().into()).await.unwrap();
        // Somebody wrote here since; the caller knows where.
        device.write(8192, vec![9; 4096].into()).await.unwrap();
        let path = dir.path().join(format!("{index}"));
        let table = HashTable::create(&path, content.len() as u64, HashKey([5; 32]), Fill::Unknown).unwrap();
        let table = Some(Arc::new(table));
        targets.push(FetchTarget {
            index: index as u16,
            device: device.clone(),
            extra: std::iter::once(2..3).collect(),
            table,
        });
        devices.push(device);
    }
    *bench.budgets.lock().unwrap() = budgets.into();
    let session = Uuid::from_u128(77);
    let job = FetchJob { replica: REPLICA, to: *to, from: Some(*from), difference: true, session, targets };
    fetch(&Dial(bench.clone()), &job, &CancellationToken::new()).await.unwrap();
    for ((device, content), target) in devices.iter().zip(after).zip(&job.targets) {
        assert!(device.snapshot() == *content);
        let table = target.table.as_ref().unwrap();
        assert_eq!(table.point(), Some(*to));
        assert!(table.hashes(2, 1).unwrap()[0].is_known());
    }
}

#[test]
fn refusals_are_typed_and_leave_nothing_pending() {
    paused(async {
        let bench = Bench::new();
        let mut source = Source::new(&[500_000]);
        source.write(0, 0, noise(1, 300_000)).await;
        let (first, _) = source.send(&bench, &SendOptions::default()).await.unwrap();
        source.write(0, 100_000, noise(2, 300_000)).await;

        *bench.allowed.lock().unwrap() = false;
        let refused = source.send(&bench, &SendOptions::default()).await.unwrap_err();
        assert!(
            matches!(&refused, ReplicationError::Refused { kind: RefusalKind::NotAuthorized, .. }),
            "{refused}"
        );
        *bench.allowed.lock().unwrap() = true;
        bench.store().raise_generation(REPLICA, 4).await.unwrap();
        let refused = source.send(&bench, &SendOptions::default()).await.unwrap_err();
        assert!(matches!(refused, ReplicationError::Fenced { current: 4 }), "{refused}");
        assert_eq!(source.disks[0].1.pending(), None);

        let mut job = source.job();
        job.generation = 4;
        job.parent = None;
        let progress = watch::Sender::default();
        let cancel = CancellationToken::new();
        let dial = Dial(bench.clone());
        let refused = replicate(&dial, &job, &SendOptions::default(), &progress, &cancel).await.unwrap_err();
        let head = Some(first.point);
        assert!(
            matches!(&refused, ReplicationError::Refused { kind: RefusalKind::NotHead { head: found }, .. } if *found == head),
            "{refused}"
        );
        job.parent = head;
        replicate(&dial, &job, &SendOptions::default(), &progress, &cancel).await.unwrap();
    });
}

#[test]
fn cancelling_leaves_everything_usable() {
    paused(async {
        let bench = Bench::new();
        let mut source = Source::new(&[2_000_000]);
        source.write(0, 0, noise(1, 2_000_000)).await;
        let job = source.job();
        let progress = watch::Sender::<SendProgress>::default();
        let cancel = CancellationToken::new();
        let mut seen = progress.subscribe();
        let stop = async {
            seen.wait_for(|progress| progress.frames > 2).await.unwrap();
            cancel.cancel();
        };
        let options = SendOptions::default();
        let dial = Dial(bench.clone());
        let (ended, ()) = tokio::join!(replicate(&dial, &job, &options, &progress, &cancel), stop);
        assert!(matches!(ended, Err(ReplicationError::Cancelled)));
        assert_eq!(source.disks[0].1.pending(), None);
        source.send(&bench, &options).await.unwrap();
        assert!(read_point(&bench, source.parent.unwrap()).await == source.contents());
    });
}

/// The agent died after it asked for the commit, once before and once after the server did it.
#[test]
fn settling_decides_pending_tables() {
    paused(async {
        let bench = Bench::new();
        let mut source = Source::new(&[500_000]);
        source.write(0, 0, noise(1, 300_000)).await;
        source.send(&bench, &SendOptions::default()).await.unwrap();
        let table = source.disks[0].1.clone();
        let dial = Dial(bench.clone());
        let cancel = CancellationToken::new();
        let committed = Uuid::from_u128(1);
        for (session, expected) in [(committed, source.parent), (Uuid::from_u128(50), None)] {
            assert_eq!(session_outcome(&dial, REPLICA, session, &cancel).await.unwrap(), expected);
            table.stage(session, 90, &[BlockHash(4711)]).unwrap();
            table.prepare(session).unwrap();
            settle(&dial, REPLICA, std::slice::from_ref(&table), &cancel).await.unwrap();
            assert_eq!(table.pending(), None);
        }
        assert_eq!(table.hashes(90, 1).unwrap(), [BlockHash(4711)]);
        let unknown = session_outcome(&dial, Uuid::from_u128(9), committed, &cancel).await.unwrap();
        assert_eq!(unknown, None);
    });
}

#[test]
fn a_lost_table_is_rebuilt_and_mounts_know_holes() {
    paused(async {
        let bench = Bench::new();
        let mut source = Source::new(&[3_000_001]);
        source.write(0, 5000, noise(1, 900_000)).await;
        let (outcome, _) = source.send(&bench, &SendOptions::default()).await.unwrap();
        let cancel = CancellationToken::new();
        let dial = Arc::new(Dial(bench.clone()));
        *bench.budgets.lock().unwrap() = [30, 3000, 3100].into();
        let options = MountOptions::default();
        let mount = Mount::open(dial, REPLICA, outcome.point, &options, cancel.clone()).await.unwrap();
        let disk = mount.disk(0).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table");
        let table = HashTable::create(&path, 3_000_001, HashKey([8; 32]), Fill::Unknown).unwrap();
        let table = Arc::new(table);
        let session = Uuid::from_u128(5);
        rebuild_table(&disk, disk.size(), &table, session, outcome.point).await.unwrap();
        source.disks[0].1 = table;
        let (_, progress) = source.send(&bench, &SendOptions::default()).await.unwrap();
        assert_eq!(progress.frames, 0);

        let content = &source.contents()[0];
        let mut zeros = 0;
        for extent in disk.extents(0, disk.size()).await.unwrap() {
            if extent.kind == ExtentKind::Zero {
                zeros += extent.length;
                assert!(is_zero(&content[extent.offset as usize..(extent.offset + extent.length) as usize]));
            }
        }
        assert!(zeros > 2_000_000);
        let before = mount.traffic().received();
        assert!(is_zero(&disk.read(1_500_000, 1_400_000).await.unwrap()));
        assert!(mount.traffic().received() - before < 1000);
        assert!(disk.read(3_000_000, 2).await.is_err());
        cancel.cancel();
        assert!(disk.read(0, 1).await.is_err());
    });
}

/// Also when the link sees first that nothing more comes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_cannot_be_read_is_named_as_the_reason() {
    for _ in 0..200 {
        let bench = Bench::new();
        let mut source = Source::new(&[1_000_000]);
        let mut job = source.job();
        job.disks[0].device = Arc::new(FaultyDevice::new(MemoryDevice::new(1_000_000), FaultPlan::after(0)));
        let error = source.send_job(&bench, &job, &SendOptions::default()).await.unwrap_err();
        let ReplicationError::Device { source: BlockError::Io(cause), .. } = &error else {
            panic!("{error}")
        };
        assert_eq!(cause.to_string(), "injected fault");
    }
}

/// A guest waits for each question to its disk. One request for each range is enough; zeros are seen all the same.
#[test]
fn blocks_written_here_and_there_are_read_without_being_asked_about() {
    const STEP: u64 = 40_960;
    const RANGES: u64 = 24;
    paused(async {
        let bench = Bench::new();
        let mut source = Source::new(&[1_000_000]);
        for at in 0..RANGES {
            source.write(0, at * STEP, noise(at + 1, 8192)).await;
        }
        source.send(&bench, &SendOptions::default()).await.unwrap();

        for at in 0..RANGES {
            let now = if at % 3 == 0 { vec![0; 4096] } else { noise(at + 100, 4096) };
            source.write(0, at * STEP, now).await;
        }
        let mut job = source.job();
        let content = MemoryDevice::new(1_000_000);
        content.write(0, Bytes::from(source.contents().remove(0))).await.unwrap();
        job.disks[0].device = Arc::new(FaultyDevice::new(content, FaultPlan::after(RANGES as u32)));
        job.disks[0].ranges = (0..RANGES).map(|at| at * STEP..at * STEP + 4096).collect();
        let outcome = source.send_job(&bench, &job, &SendOptions::default()).await.unwrap();
        assert_eq!(read_point(&bench, outcome.point).await, source.contents());
    });
}
