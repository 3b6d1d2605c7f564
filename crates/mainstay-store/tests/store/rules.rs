//! Fencing, sessions, damage, bounds and the local directory.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::support::{Disks, Dying, REPLICA, apply, capture, meta, one_disk, options, read, spec, write};
use bytes::Bytes;
use futures::TryStreamExt as _;
use mainstay_block::frame::{Effort, FrameBuilder};
use mainstay_store::{
    FrameUse, PointMeta, Received, ScrubOptions, Session, SessionSpec, Store, StoreError, StoreOptions,
    local_storage,
};
use object_store::ObjectStore as _;
use object_store::memory::InMemory;
use uuid::Uuid;

#[tokio::test]
async fn old_generations_are_fenced() {
    let storage = Arc::new(InMemory::new());
    let store = Store::open(storage.clone(), options(0));
    let mut disks = one_disk();
    let frames = apply(&mut disks, &write(0, 1));
    let first = capture(&store, spec(1, None, &disks, false), &frames).await.unwrap();
    let open = store.begin(spec(2, Some(first), &disks, false)).await.unwrap();
    open.append(1, frames[0].clone(), FrameUse::Changed).await.unwrap();
    assert_eq!(store.raise_generation(REPLICA, 3).await.unwrap(), 3);
    assert_eq!(store.raise_generation(REPLICA, 2).await.unwrap(), 3);
    let refused = open.commit(meta(1)).await;
    assert!(matches!(refused, Err(StoreError::Fenced { given: 1, current: 3 })), "{refused:?}");
    let reopened = Store::open(storage, options(1));
    let refused = reopened.begin(spec(3, Some(first), &disks, false)).await;
    assert!(matches!(refused, Err(StoreError::Fenced { .. })));
    assert!(matches!(reopened.set_head(REPLICA, first, 2).await, Err(StoreError::Fenced { .. })));
    let newer = SessionSpec { generation: 4, ..spec(4, Some(first), &disks, false) };
    capture(&reopened, newer, &frames).await.unwrap();
    assert_eq!(reopened.replica(REPLICA).await.unwrap().generation, 4);
}

#[tokio::test]
async fn lineage_is_enforced() {
    let store = Store::open(Arc::new(InMemory::new()), options(0));
    let mut disks = one_disk();
    let frames = apply(&mut disks, &write(0, 1));
    let first = capture(&store, spec(1, None, &disks, false), &frames).await.unwrap();
    let second = capture(&store, spec(2, Some(first), &disks, false), &frames).await.unwrap();
    for parent in [None, Some(first)] {
        let refused = store.begin(spec(3, parent, &disks, false)).await;
        assert!(matches!(refused, Err(StoreError::NotHead { head }) if head == Some(second)));
    }
    store.set_head(REPLICA, first, 2).await.unwrap();
    let points = store.points(REPLICA).await.unwrap();
    assert_eq!(points.iter().map(|point| point.in_lineage).collect::<Vec<_>>(), [true, false]);
    // A head that left the catalogue still is what the next capture is relative to.
    store.delete_points(REPLICA, &[first, second]).await.unwrap();
    assert!(store.points(REPLICA).await.unwrap().is_empty());
    let spec = SessionSpec { generation: 2, ..spec(4, Some(first), &disks, false) };
    let third = capture(&store, spec, &[]).await.unwrap();
    assert!(read(&store, third).await.unwrap() == disks);
}

#[tokio::test]
async fn sessions_are_numbered_resumable_and_idempotent() {
    let store = Store::open(Arc::new(InMemory::new()), options(0));
    let mut disks = one_disk();
    let frames: Vec<Bytes> = (0..8).flat_map(|at| apply(&mut disks, &write(at * 5, at as u8 + 1))).collect();
    let session = store.begin(spec(1, None, &disks, false)).await.unwrap();
    for (sequence, frame) in (1..).zip(&frames[..5]) {
        session.append(sequence, frame.clone(), FrameUse::Changed).await.unwrap();
    }
    session.append(2, frames[7].clone(), FrameUse::Changed).await.unwrap();
    let gap = session.append(7, frames[6].clone(), FrameUse::Changed).await;
    assert!(matches!(gap, Err(StoreError::OutOfOrder { given: 7, expected: 6 })));
    let mut bad = frames[5].to_vec();
    bad[40] ^= 1;
    let bad = session.append(6, Bytes::from(bad), FrameUse::Changed).await;
    assert!(matches!(bad, Err(StoreError::Frame(_))));
    session.flush().await.unwrap();
    assert_eq!(session.wait_durable(5).await.unwrap(), 5);

    let again = store.begin(spec(1, None, &disks, false)).await.unwrap();
    assert_eq!((again.received(), again.durable()), (5, 5));
    for (sequence, frame) in (6..).zip(&frames[5..]) {
        again.append(sequence, frame.clone(), FrameUse::Changed).await.unwrap();
    }
    let point = again.commit(meta(7)).await.unwrap();
    assert_eq!(session.commit(meta(7)).await.unwrap(), point);
    assert!(
        matches!(store.begin(spec(1, None, &disks, false)).await, Err(StoreError::Committed(p)) if p == point)
    );
    assert!(read(&store, point).await.unwrap() == disks);
    assert_eq!(&store.definition(REPLICA, point).await.unwrap()[..], b"definition 2");

    let mut outside = FrameBuilder::new();
    outside.push_zero(0, 98, 1).unwrap();
    let older = store.begin(spec(2, Some(point), &disks, false)).await.unwrap();
    assert!(matches!(
        older.append(1, outside.finish(Effort::Small).unwrap(), FrameUse::Changed).await,
        Err(StoreError::Invalid(_))
    ));
    let newer = store.begin(spec(3, Some(point), &disks, false)).await.unwrap();
    assert!(matches!(
        older.append(1, frames[0].clone(), FrameUse::Changed).await,
        Err(StoreError::NoSession(_))
    ));
    newer.abort();
    assert!(store.attach(newer.spec().session).is_none());
}

/// Opening and deleting cost the same after 10 and after 150 captures.
#[tokio::test]
async fn costs_do_not_grow_with_the_number_of_points() {
    let storage = Arc::new(InMemory::new());
    let store = Store::open(storage.clone(), options(0));
    let mut disks = one_disk();
    let mut points = Vec::new();
    for at in 0..150u64 {
        let frames = apply(&mut disks, &write(at % 90, at as u8));
        let parent = points.last().copied();
        points.push(capture(&store, spec(at.into(), parent, &disks, false), &frames).await.unwrap());
    }
    let mut costs = Vec::new();
    for point in [points[10], points[149]] {
        let counting = Dying::new(&storage, i64::MAX, false);
        let fresh = Store::open(counting.clone(), options(5));
        fresh.open_point(REPLICA, point).await.unwrap();
        let opened = counting.gets.load(Ordering::SeqCst);
        fresh.delete_points(REPLICA, &[point]).await.unwrap();
        let deleted =
            counting.gets.load(Ordering::SeqCst) - opened + counting.mutations.load(Ordering::SeqCst);
        costs.push((opened, deleted));
    }
    // A listing, a manifest, and at most twice `path_maps_max` footers plus the capture's own.
    assert!(costs.iter().all(|(opened, deleted)| *opened <= 11 && *deleted == 1), "{costs:?}");
}

#[tokio::test]
async fn a_reader_keeps_what_it_reads_and_a_pin_survives_restarts() {
    let storage = Arc::new(InMemory::new());
    let store = Store::open(storage.clone(), options(0));
    let mut disks = one_disk();
    let mut points = Vec::new();
    for at in 0..10u64 {
        let frames = apply(&mut disks, &write(at, at as u8));
        let parent = points.last().map(|(point, _)| *point);
        let point = capture(&store, spec(at.into(), parent, &disks, false), &frames).await.unwrap();
        points.push((point, disks.clone()));
    }
    let reader = store.open_point(REPLICA, points[4].0).await.unwrap();
    store.pin(REPLICA, points[6].0, Uuid::from_u128(1)).await.unwrap();
    let all: Vec<Uuid> = points.iter().map(|(point, _)| *point).collect();
    store.delete_points(REPLICA, &all).await.unwrap();
    for clock in 0..5 {
        store.maintain(REPLICA, clock).await.unwrap();
    }
    let found = reader.disk(0).unwrap().read_range(0, 400_000).await.unwrap();
    assert!(found == points[4].1[0].1);
    assert!(matches!(store.open_point(REPLICA, points[4].0).await, Err(StoreError::NoPoint(_))));
    let store = Store::open(storage, options(1));
    for clock in 0..5 {
        store.maintain(REPLICA, clock).await.unwrap();
    }
    assert!(read(&store, points[6].0).await.unwrap() == points[6].1);
    assert!(!store.point(REPLICA, points[6].0).await.unwrap().listed);
    store.unpin(REPLICA, Uuid::from_u128(1)).await.unwrap();
    assert!(matches!(store.point(REPLICA, points[6].0).await, Err(StoreError::NoPoint(_))));
}

/// 48 points with 1 % random churn each stay within 1.15 of the unique compressed change.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn space_stays_near_what_changed() {
    let storage = Arc::new(InMemory::new());
    let store = Store::open(storage.clone(), StoreOptions::default());
    let blocks = 16_384u64;
    let disks = vec![(0, vec![0u8; (blocks * 4096) as usize])];
    let mut state = 7u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 16
    };
    let (mut parent, mut unique) = (None, 0u64);
    for at in 0..48u128 {
        let mut changed: Vec<u64> = (0..blocks / 100).map(|_| random() % blocks).collect();
        changed.sort_unstable();
        changed.dedup();
        unique += changed.len() as u64 * 4096;
        let mut frames = Vec::new();
        for part in changed.chunks(64) {
            let mut builder = FrameBuilder::new();
            for block in part {
                let data: Vec<u8> = (0..512).flat_map(|_| random().to_le_bytes()).collect();
                builder.push_data(0, *block, &data).unwrap();
            }
            frames.push(builder.finish(Effort::Small).unwrap());
        }
        // 6 bytes in 8 are random: what zstd makes of that is the anchor, taken from the frames themselves.
        parent = Some(capture(&store, spec(at, parent, &disks, false), &frames).await.unwrap());
    }
    for clock in 0..3 {
        store.maintain(REPLICA, clock).await.unwrap();
    }
    let objects: Vec<_> = storage.list(None).try_collect().await.unwrap();
    let live: u64 = objects
        .iter()
        .filter(|object| !object.location.as_ref().contains("/manifest/"))
        .map(|o| o.size)
        .sum();
    let stored = store.replica(REPLICA).await.unwrap().stored_bytes;
    assert!(live as f64 <= unique as f64 * 1.15, "{live} bytes for {unique}");
    assert!(stored as f64 <= unique as f64 * 1.15, "{stored} bytes for {unique}");
}

#[tokio::test]
async fn a_local_directory_survives_reopening_and_loses_its_staging_files() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let store = Store::open(local_storage(&root).unwrap(), StoreOptions::default());
    let mut disks = one_disk();
    let frames = apply(&mut disks, &write(1, 2));
    let point = capture(&store, spec(1, None, &disks, false), &frames).await.unwrap();
    let stale = root.join("v1").join(REPLICA.to_string()).join("segment").join("x#1");
    std::fs::write(&stale, b"half").unwrap();
    let store = Store::open(local_storage(&root).unwrap(), StoreOptions::default());
    assert!(!stale.exists());
    assert_eq!(store.replicas().await.unwrap(), [REPLICA]);
    assert!(read(&store, point).await.unwrap() == disks);
    store.maintain(REPLICA, 0).await.unwrap();
    let meta = PointMeta { definition: None, ..meta(5) };
    let session = store.begin(spec(2, Some(point), &disks, false)).await.unwrap();
    let second = session.commit(meta).await.unwrap();
    assert!(read(&store, second).await.unwrap() == disks);
    assert!(store.definition(REPLICA, second).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_document_is_whole_its_own_and_where_it_belongs_or_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(local_storage(dir.path()).unwrap(), StoreOptions::default());
    assert_eq!(store.document("items/a").await.unwrap(), None);
    for (name, text) in [("items/a", "first"), ("items/a", "second"), ("items/b", "other"), ("top", "else")] {
        store.put_document(name, text.as_bytes()).await.unwrap();
    }
    assert_eq!(store.document("items/a").await.unwrap().unwrap(), "second");
    let mut names = store.documents("items").await.unwrap();
    names.sort();
    assert_eq!(names, ["items/a", "items/b"]);
    // No replica is made of them.
    assert!(store.replicas().await.unwrap().is_empty());

    let path = |name: &str| dir.path().join("v1/catalogue").join(name);
    let sound = std::fs::read(path("items/a")).unwrap();
    for at in 0..sound.len() {
        let mut flipped = sound.clone();
        flipped[at] ^= 4;
        std::fs::write(path("items/a"), &flipped).unwrap();
        assert_eq!(store.document("items/a").await.unwrap().unwrap(), "second", "{at}");
        flipped[(at + sound.len() / 2) % sound.len()] ^= 4;
        std::fs::write(path("items/a"), flipped).unwrap();
        assert!(matches!(store.document("items/a").await, Err(StoreError::Damaged { .. })), "{at}");
    }
    std::fs::copy(path("items/b"), path("items/a")).unwrap();
    assert!(matches!(store.document("items/a").await, Err(StoreError::Damaged { .. })));
    for name in ["", "/", "items/", "../a", "items/..", "a.b", "a b"] {
        assert!(matches!(store.put_document(name, b"x").await, Err(StoreError::Invalid(_))), "{name}");
    }
    store.remove_document("items/b").await.unwrap();
    store.remove_document("items/b").await.unwrap();
    assert_eq!(store.document("items/b").await.unwrap(), None);
}

/// Receives a frame as a connection does: into the session's room, if it has any.
async fn receive(session: &Session, sequence: u64, frame: &Bytes) -> Result<bool, StoreError> {
    let Some(mut room) = session.room(frame.len()) else {
        return session.append(sequence, frame.clone(), FrameUse::Changed).await.map(|()| false);
    };
    room.extend_from_slice(frame);
    let rest = room.split_off(frame.len());
    session.append(sequence, Received::InPlace { frame: room, rest }, FrameUse::Changed).await.map(|()| true)
}

#[tokio::test]
async fn frames_received_in_place_are_what_the_point_holds() {
    let directory = tempfile::tempdir().unwrap();
    let options = StoreOptions { segment_bytes: 5 << 20, uploads_in_flight: 2, ..options(0) };
    let store = Store::open(local_storage(directory.path()).unwrap(), options);
    let mut noise = 1u64;
    let mut next = || {
        noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (noise >> 56) as u8
    };
    let disks: Disks = vec![(0, (0..30 << 20).map(|_| next()).collect())];
    let mut frames: Vec<Bytes> = Vec::new();
    for (block, data) in (0..).step_by(64).zip(disks[0].1.chunks(64 * 4096)) {
        let mut frame = FrameBuilder::new();
        frame.push_data(0, block, data).unwrap();
        frames.push(frame.finish(Effort::None).unwrap());
    }
    let session = store.begin(spec(1, None, &disks, false)).await.unwrap();
    let mut in_place = 0;
    for (sequence, frame) in (1..).zip(&frames) {
        match sequence {
            // A frame that came before, and one that is damaged: their room is lost, and nothing else.
            20 => assert!(receive(&session, 3, &frames[2]).await.is_ok()),
            50 => {
                let mut bad = frame.to_vec();
                bad[4000] ^= 1;
                assert!(matches!(receive(&session, sequence, &bad.into()).await, Err(StoreError::Frame(_))));
            }
            // A connection that broke while it received into the room, and the next one's frames.
            80 => drop(session.room(frame.len())),
            // Nothing is there that could be written.
            90 => session.flush().await.unwrap(),
            _ => {}
        }
        in_place += usize::from(receive(&session, sequence, frame).await.unwrap());
    }
    assert!((frames.len() / 2..frames.len()).contains(&in_place), "{in_place} of {}", frames.len());
    let point = session.commit(meta(1)).await.unwrap();
    assert!(session.room(frames[0].len()).is_none());
    assert!(read(&store, point).await.unwrap() == disks);
    let scrubbed = store.scrub(REPLICA, ScrubOptions::default()).await.unwrap();
    assert!(scrubbed.damage.is_empty(), "{scrubbed:?}");
}
