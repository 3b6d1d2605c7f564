//! Random histories of a replica, compared with plain byte vectors.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::support::{Disks, REPLICA, Write, apply, capture, options, read, spec};
use mainstay_block::{BLOCK_BYTES, BlockDevice as _, BlockHasher, ExtentKind, HashKey, is_zero};
use mainstay_store::{FrameUse, ScrubOptions, Store, StoreError};
use object_store::memory::InMemory;
use proptest::prelude::*;
use uuid::Uuid;

#[derive(Clone, Debug)]
enum Step {
    Capture(Vec<Write>),
    /// Sizes of the disks in bytes, 0 for none, then a capture.
    Resize([usize; 2], Vec<Write>),
    /// A new lineage from nothing.
    Restart(Vec<Write>),
    Delete(Vec<usize>),
    SetHead(usize),
    Pin(usize, u8),
    Unpin(u8),
    Maintain,
    Reopen,
    /// A session that is never committed.
    Abandoned(Vec<Write>),
}

fn writes() -> impl Strategy<Value = Vec<Write>> {
    let write = (0u16..2, 0u64..90, 1u64..12, proptest::option::weighted(0.75, any::<u8>()))
        .prop_map(|(disk, block, count, seed)| Write { disk, block, count, seed });
    proptest::collection::vec(write, 0..8).prop_map(|mut writes| {
        writes.sort_by_key(|write| (write.disk, write.block / 30));
        writes
    })
}

fn step() -> impl Strategy<Value = Step> {
    let size = || prop_oneof![Just(0usize), 4096usize..400_000];
    prop_oneof![
        12 => writes().prop_map(Step::Capture),
        1 => (4096usize..400_000, size(), writes())
            .prop_map(|(a, b, writes)| Step::Resize([a, b], writes)),
        1 => writes().prop_map(Step::Restart),
        5 => proptest::collection::vec(0usize..40, 1..4).prop_map(Step::Delete),
        1 => (0usize..40).prop_map(Step::SetHead),
        1 => (0usize..40, 0u8..3).prop_map(|(point, pin)| Step::Pin(point, pin)),
        1 => (0u8..3).prop_map(Step::Unpin),
        4 => Just(Step::Maintain),
        2 => Just(Step::Reopen),
        1 => writes().prop_map(Step::Abandoned),
    ]
}

struct World {
    storage: Arc<InMemory>,
    store: Store,
    opened: u64,
    /// Points in the catalogue, in order, with what they hold.
    points: Vec<(Uuid, Disks)>,
    /// Contents of points that left the catalogue but are pinned.
    pins: BTreeMap<u8, (Uuid, Disks)>,
    head: Option<(Uuid, Disks)>,
    sessions: u128,
    clock: u64,
}

impl World {
    fn new() -> Self {
        let storage = Arc::new(InMemory::new());
        let store = Store::open(storage.clone(), options(0));
        let (points, pins) = (Vec::new(), BTreeMap::new());
        Self { storage, store, opened: 0, points, pins, head: None, sessions: 0, clock: 0 }
    }

    fn pick(&self, at: usize) -> Option<(Uuid, Disks)> {
        let count = self.points.len();
        (count > 0).then(|| self.points[at % count].clone())
    }

    async fn capture(&mut self, mut disks: Disks, writes: &[Write], fork: bool) {
        let frames = apply(&mut disks, writes);
        self.sessions += 1;
        let parent = if fork { None } else { self.head.as_ref().map(|(head, _)| *head) };
        let spec = spec(self.sessions, parent, &disks, fork);
        let point = capture(&self.store, spec, &frames).await.unwrap();
        self.points.push((point, disks.clone()));
        self.head = Some((point, disks));
    }

    async fn step(&mut self, step: &Step) {
        let disks = match &self.head {
            Some((_, disks)) => disks.clone(),
            None => vec![(0, vec![0; 300_000]), (1, vec![0; 123_456])],
        };
        match step {
            Step::Capture(writes) => self.capture(disks, writes, false).await,
            Step::Resize(sizes, writes) => {
                let mut resized = Disks::new();
                for (index, size) in (0u16..).zip(sizes).filter(|(_, size)| **size > 0) {
                    let old = disks.iter().find(|(of, _)| *of == index).map(|(_, bytes)| bytes.clone());
                    let mut bytes = old.unwrap_or_default();
                    // Only whole blocks survive a shrink that is grown again; the sender sends the cut one.
                    bytes.resize(*size, 0);
                    resized.push((index, bytes));
                }
                let cut: Vec<Write> = resized
                    .iter()
                    .map(|(disk, bytes)| (*disk, bytes.len() as u64 / BLOCK_BYTES, bytes.clone()))
                    .filter(|(_, block, bytes)| bytes.len() as u64 > block * BLOCK_BYTES)
                    .map(|(disk, block, _)| Write { disk, block, count: 1, seed: Some(1) })
                    .collect();
                let writes: Vec<Write> = cut.into_iter().chain(writes.iter().cloned()).collect();
                self.capture(resized, &writes, false).await;
            }
            Step::Restart(writes) => {
                let blank = disks.iter().map(|(index, bytes)| (*index, vec![0; bytes.len()])).collect();
                self.capture(blank, writes, true).await;
            }
            Step::Delete(which) => {
                let ids: Vec<Uuid> = which.iter().filter_map(|at| self.pick(*at)).map(|(id, _)| id).collect();
                if !ids.is_empty() {
                    self.store.delete_points(REPLICA, &ids).await.unwrap();
                    self.points.retain(|(id, _)| !ids.contains(id));
                }
            }
            Step::SetHead(at) => {
                if let Some((id, disks)) = self.pick(*at) {
                    self.store.set_head(REPLICA, id, 1).await.unwrap();
                    self.head = Some((id, disks));
                }
            }
            Step::Pin(at, pin) => {
                if let Some((id, disks)) = self.pick(*at).filter(|_| !self.pins.contains_key(pin)) {
                    self.store.pin(REPLICA, id, Uuid::from_u128((*pin).into())).await.unwrap();
                    self.pins.insert(*pin, (id, disks));
                }
            }
            Step::Unpin(pin) => {
                if self.pins.remove(pin).is_some() {
                    self.store.unpin(REPLICA, Uuid::from_u128((*pin).into())).await.unwrap();
                }
            }
            Step::Maintain => {
                if self.head.is_some() {
                    self.clock += 1;
                    self.store.maintain(REPLICA, self.clock).await.unwrap();
                    let lengths = self.lengths().await;
                    assert!(lengths.iter().all(|length| *length <= 4), "paths {lengths:?}");
                }
            }
            Step::Reopen => {
                self.opened += 1;
                self.store = Store::open(self.storage.clone(), options(self.opened));
            }
            Step::Abandoned(writes) => {
                let mut lost = disks.clone();
                let frames = apply(&mut lost, writes);
                self.sessions += 1;
                let parent = self.head.as_ref().map(|(head, _)| *head);
                let session = self.store.begin(spec(self.sessions, parent, &disks, false)).await.unwrap();
                for (sequence, frame) in (1..).zip(frames) {
                    session.append(sequence, frame, FrameUse::Changed).await.unwrap();
                }
                session.flush().await.unwrap();
            }
        }
    }

    async fn lengths(&self) -> Vec<usize> {
        let mut lengths = Vec::new();
        for (point, _) in &self.points {
            lengths.push(self.store.open_point(REPLICA, *point).await.unwrap().maps());
        }
        lengths
    }

    async fn verify(&self) {
        if self.head.is_none() {
            return;
        }
        let listed: Vec<Uuid> =
            self.store.points(REPLICA).await.unwrap().iter().map(|point| point.id).collect();
        let expected: Vec<Uuid> = self.points.iter().map(|(id, _)| *id).collect();
        assert_eq!(listed, expected);
        let kept = self.pins.values().chain(&self.points).chain(&self.head);
        for (point, disks) in kept {
            let found = read(&self.store, *point).await.unwrap();
            assert!(found == *disks, "point {point} reads differently");
        }
        assert!(self.lengths().await.iter().all(|length| *length <= 9));
        self.verify_metadata().await;
        let scrub = self.store.scrub(REPLICA, ScrubOptions::default()).await.unwrap();
        assert_eq!(scrub.damage, vec![]);
    }

    /// Extents, hashes and differences of the head against the oldest point.
    async fn verify_metadata(&self) {
        let Some((head, disks)) = &self.head else { return };
        let reader = self.store.open_point(REPLICA, *head).await.unwrap();
        let key = HashKey([3; 32]);
        for (index, bytes) in disks {
            let disk = reader.disk(*index).unwrap();
            let mut at = 0;
            for extent in disk.extents(0, bytes.len() as u64).await.unwrap() {
                assert_eq!(extent.offset, at);
                at += extent.length;
                if extent.kind == ExtentKind::Zero {
                    assert!(is_zero(&bytes[extent.offset as usize..at as usize]));
                }
            }
            assert_eq!(at, bytes.len() as u64);
            let blocks = mainstay_block::blocks_of(at);
            let hashes = disk.block_hashes(key, 0, blocks).await.unwrap();
            assert_eq!(hashes, BlockHasher::new(key).hash_all(bytes));
        }
        let oldest = self.points.first().cloned();
        for (from, before) in
            [(None, Disks::new())].into_iter().chain(oldest.map(|(id, disks)| (Some(id), disks)))
        {
            let diff = self.store.diff(REPLICA, from, *head).await.unwrap();
            for (index, bytes) in disks {
                let of_disk = diff.iter().find(|diff| diff.disk == *index).unwrap();
                let old = before.iter().find(|(of, _)| of == index).map(|(_, bytes)| bytes.as_slice());
                for (block, now) in (0u64..).zip(bytes.chunks(4096)) {
                    let from = block as usize * 4096;
                    let old = old.and_then(|old| old.get(from..(from + now.len()).min(old.len())));
                    let old = old.unwrap_or_default();
                    let same = now[..old.len()] == *old && is_zero(&now[old.len()..]);
                    let named = of_disk.ranges.iter().any(|range| range.contains(&block));
                    assert!(same || named, "disk {index} block {block} differs but is not named");
                }
            }
        }
    }
}

/// `PROPTEST_CASES` for a long run.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(120)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 300, ..ProptestConfig::default() })]

    #[test]
    fn histories_equal_the_oracle(steps in proptest::collection::vec(step(), 1..45)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
        runtime.block_on(async {
            let mut world = World::new();
            for (at, step) in steps.iter().enumerate() {
                world.step(step).await;
                if at % 8 == 7 {
                    world.verify().await;
                }
            }
            world.verify().await;
            if world.head.is_none() {
                return;
            }
            // Whatever happened, three passes leave nothing that is not needed.
            world.step(&Step::Reopen).await;
            for _ in 0..4 {
                world.step(&Step::Maintain).await;
            }
            let clean = world.store.maintain(REPLICA, 1_000_000).await.unwrap();
            assert_eq!((clean.garbage_found, clean.objects_deleted), (0, 0));
            world.verify().await;
        });
    }
}

#[tokio::test]
async fn deleting_the_replica_leaves_only_the_tombstone() {
    let mut world = World::new();
    for seed in 0..5 {
        let writes = [Write { disk: 0, block: seed, count: 3, seed: Some(seed as u8) }];
        world.step(&Step::Capture(writes.to_vec())).await;
    }
    world.store.delete_replica(REPLICA).await.unwrap();
    assert!(matches!(world.store.points(REPLICA).await, Err(StoreError::Deleted(_))));
    for clock in 0..3 {
        world.store.maintain(REPLICA, clock).await.unwrap();
    }
    let disks = vec![(0, vec![0; 8192])];
    let late = capture(&world.store, spec(999, None, &disks, true), &[]).await;
    assert!(matches!(late, Err(StoreError::Deleted(_))), "{late:?}");
    let left: Vec<_> = {
        use futures::TryStreamExt as _;
        use object_store::ObjectStore as _;
        world.storage.list(None).map_ok(|object| object.location.to_string()).try_collect().await.unwrap()
    };
    assert!(left.iter().all(|key| key.contains("/manifest/")), "{left:?}");
}
