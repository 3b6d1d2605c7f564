//! Flipped, truncated and lost objects: reads are right or refused, a scrub finds every flip, mends what it can, and what the
//! source sends again heals the rest.

use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt as _;
use mainstay_block::{
    BLOCK_BYTES, BlockHash, HashKey,
    frame::{Effort, FrameBuilder},
};
use mainstay_store::{BlockRange, FrameUse, ScrubOptions, ScrubReport, Session, Store, StoreError, VaultKey};
use object_store::{ObjectStore, ObjectStoreExt as _, PutPayload, memory::InMemory, path::Path};
use uuid::Uuid;

use crate::support::*;

struct World {
    storage: Arc<InMemory>,
    points: Vec<(Uuid, Disks)>,
    /// What it is encrypted with.
    key: Option<VaultKey>,
}

/// One that is encrypted, and one that is not.
async fn worlds() -> [World; 2] {
    [World::new(None).await, World::new(Some(VaultKey::generate().unwrap())).await]
}

impl World {
    /// Four points, each with another write.
    async fn new(key: Option<VaultKey>) -> Self {
        let storage = Arc::new(InMemory::new());
        let store = Store::open(storage.clone(), options(0));
        store.unlock(key.as_ref(), &[]).await.unwrap();
        let (mut disks, mut points) = (one_disk(), Vec::new());
        for at in 0..4u64 {
            let frames = apply(&mut disks, &write(at * 3, at as u8 + 1));
            let parent = points.last().map(|(point, _): &(Uuid, Disks)| *point);
            let point = capture(&store, spec(at.into(), parent, &disks, false), &frames).await.unwrap();
            points.push((point, disks.clone()));
        }
        Self { storage, points, key }
    }

    async fn open(&self) -> Store {
        let store = Store::open(self.storage.clone(), options(9));
        store.unlock(self.key.as_ref(), &[]).await.unwrap();
        store
    }

    async fn objects(&self, folder: &str) -> Vec<(Path, Bytes)> {
        let listed: Vec<_> = self.storage.list(None).try_collect().await.unwrap();
        let mut found = Vec::new();
        for object in listed.into_iter().filter(|object| object.location.as_ref().contains(folder)) {
            let bytes = self.storage.get(&object.location).await.unwrap().bytes().await.unwrap();
            found.push((object.location, bytes));
        }
        found
    }

    async fn put(&self, key: &Path, bytes: impl Into<Bytes>) {
        self.storage.put(key, PutPayload::from(bytes.into())).await.unwrap();
    }

    /// Puts everything back to what it was.
    async fn restore(&self, all: &[(Path, Bytes)]) {
        for (key, _) in self.objects("").await {
            self.storage.delete(&key).await.unwrap();
        }
        for (key, bytes) in all {
            self.put(key, bytes.clone()).await;
        }
    }

    /// The points that cannot be read. None is ever read wrong.
    async fn unreadable(&self, store: &Store, label: &str) -> Vec<Uuid> {
        let mut found = Vec::new();
        for (point, disks) in &self.points {
            match read(store, *point).await {
                Ok(read) => assert!(read == *disks, "{label}: wrong bytes returned"),
                Err(StoreError::Damaged { .. }) => found.push(*point),
                Err(error) => panic!("{label}: {error}"),
            }
        }
        found
    }
}

async fn scrub(store: &Store) -> ScrubReport {
    store.scrub(REPLICA, ScrubOptions::default()).await.unwrap()
}

fn named(report: &ScrubReport) -> Vec<Uuid> {
    let mut named: Vec<Uuid> = report.damage.iter().flat_map(|damage| damage.points.clone()).collect();
    named.sort_unstable();
    named.dedup();
    named
}

#[tokio::test]
async fn one_flip_in_what_describes_data_costs_nothing_and_is_mended() {
    for world in worlds().await {
        for folder in ["/map/", "/definition/", "/manifest/"] {
            let objects = world.objects(folder).await;
            assert!(!objects.is_empty(), "{folder}");
            // Older versions of the manifest are kept for writers that are late; nobody reads what is in them.
            let newest = objects.iter().map(|(key, _)| key.clone()).max();
            for (key, sound) in objects {
                for at in (0..sound.len()).step_by(1 + sound.len() / 61) {
                    let label = format!("{key} at {at}");
                    let mut bad = sound.to_vec();
                    bad[at] ^= 0x20;
                    world.put(&key, bad).await;
                    assert_eq!(
                        world.unreadable(&world.open().await, &label).await,
                        Vec::<Uuid>::new(),
                        "{label}"
                    );
                    if folder != "/manifest/" || newest.as_ref() == Some(&key) {
                        let report = scrub(&world.open().await).await;
                        assert_eq!(report.damage.len(), 1, "{label}: {report:?}");
                        assert!(report.damage[0].is_mended && report.damage[0].points.is_empty(), "{label}");
                        let now = world.storage.get(&key).await.unwrap().bytes().await.unwrap();
                        assert!(world.key.is_some() || now == sound, "{label}: not mended");
                        assert_eq!(scrub(&world.open().await).await.damage, [], "{label}");
                    }
                    world.put(&key, sound.clone()).await;
                }
            }
        }
    }
}

#[tokio::test]
async fn damage_to_segments_and_to_both_copies_is_found_and_never_returned() {
    for world in worlds().await {
        let all = world.objects("").await;
        for folder in ["/segment/", "/map/", "/definition/"] {
            for (key, sound) in world.objects(folder).await {
                let half = sound.len() / 2;
                let flips: Vec<Vec<usize>> = match folder {
                    "/segment/" => {
                        (0..sound.len()).step_by(1 + sound.len() / 97).map(|at| vec![at]).collect()
                    }
                    _ => (0..half).step_by(1 + half / 23).map(|at| vec![at, at + half]).collect(),
                };
                let flipped = flips.into_iter().map(|places| {
                    let mut bad = sound.to_vec();
                    places.iter().for_each(|at| bad[*at] ^= 0x20);
                    (format!("{key} at {places:?}"), Some(bad))
                });
                let cut =
                    [0, 1, half / 2].map(|length| (format!("{key} cut"), Some(sound[..length].to_vec())));
                for (label, bad) in flipped.chain(cut).chain([(format!("{key} lost"), None)]) {
                    match bad {
                        Some(bad) => world.put(&key, bad).await,
                        None => world.storage.delete(&key).await.unwrap(),
                    }
                    let mut wrong = world.unreadable(&world.open().await, &label).await;
                    wrong.sort_unstable();
                    let store = world.open().await;
                    let report = scrub(&store).await;
                    assert!(!report.damage.is_empty(), "{label}: not found");
                    let named = named(&report);
                    if folder == "/definition/" {
                        assert!(!named.is_empty() && wrong.is_empty(), "{label}");
                    } else {
                        assert_eq!(named, wrong, "{label}: {report:?}");
                    }
                    // What was mended stays so.
                    let again = scrub(&world.open().await).await;
                    assert!(again.damage.iter().all(|damage| !damage.is_mended), "{label}");
                    assert_eq!(self::named(&again), named, "{label}");
                    // A segment may have been rewritten.
                    world.restore(&all).await;
                }
            }
        }
    }
}

/// Sends blocks of a disk again, as a cycle does that was asked to.
async fn resend(session: &Session, disks: &Disks, ranges: &[BlockRange], used: FrameUse) {
    let mut frame = FrameBuilder::new();
    for range in ranges {
        let (_, bytes) = disks.iter().find(|(index, _)| *index == range.disk).unwrap();
        for block in range.first..range.end {
            let from = (block * BLOCK_BYTES) as usize;
            let to = bytes.len().min(from + BLOCK_BYTES as usize);
            if bytes[from..to].iter().all(|byte| *byte == 0) {
                frame.push_zero(range.disk, block, 1).unwrap();
            } else {
                frame.push_bytes(range.disk, block, Bytes::copy_from_slice(&bytes[from..to])).unwrap();
            }
        }
    }
    session.append(1, frame.finish(Effort::Small).unwrap(), used).await.unwrap();
}

#[tokio::test]
async fn what_is_sent_again_heals_the_head_and_the_points_before_it() {
    let [plain, sealed] = worlds().await;
    for (used, world) in [(FrameUse::Resent, plain), (FrameUse::Changed, sealed)] {
        for (key, sound) in world.objects("/segment/").await {
            let mut bad = sound.to_vec();
            bad[sound.len() / 3] ^= 1;
            world.put(&key, bad).await;
        }
        let store = world.open().await;
        let broken = world.unreadable(&store, "before").await;
        assert_eq!(broken.len(), 4);
        let report = scrub(&store).await;
        assert!(!report.resend.is_empty());
        // An agent that lost its table learns which blocks it must send.
        let (head, disks) = world.points[3].clone();
        let blocks = disks[0].1.len() as u64 / BLOCK_BYTES;
        let hashes = store.block_hashes(REPLICA, head, 0, HashKey([7; 32]), 0, blocks).await.unwrap();
        for (block, hash) in hashes.iter().enumerate() {
            let inside = |range: &BlockRange| (range.first..range.end).contains(&(block as u64));
            assert_eq!(*hash == BlockHash::UNKNOWN, report.resend.iter().any(inside), "block {block}");
        }
        let session = store.begin(spec(77, Some(head), &disks, false)).await.unwrap();
        resend(&session, &disks, &report.resend, used).await;
        let point = session.commit(meta(77)).await.unwrap();
        let store = world.open().await;
        assert!(read(&store, point).await.unwrap() == disks, "the new point");
        let left = world.unreadable(&store, "after").await;
        let report = scrub(&store).await;
        assert_eq!(report.resend, []);
        match used {
            // What each write replaced was in no frame that the head still reads.
            FrameUse::Resent => assert!(!left.contains(&head), "the head is healed"),
            FrameUse::Changed => assert_eq!(left, broken, "nothing is known of the old content"),
        }
        let mut expected = left.clone();
        expected.sort_unstable();
        assert_eq!(named(&report), expected);
    }
}

#[tokio::test]
async fn maintenance_goes_on_beside_damage() {
    for world in worlds().await {
        let (key, sound) = world.objects("/segment/").await.swap_remove(0);
        let mut bad = sound.to_vec();
        bad[sound.len() / 3] ^= 1;
        world.put(&key, bad).await;
        let store = world.open().await;
        let broken = world.unreadable(&store, "before").await;
        let gone: Vec<Uuid> = world.points[..2].iter().map(|(point, _)| *point).collect();
        store.delete_points(REPLICA, &gone).await.unwrap();
        let mut quiet = 0;
        for pass in 0..20 {
            let report = store.maintain(REPLICA, pass).await.unwrap();
            quiet = if report.segments_compacted + report.layers_merged == 0 { quiet + 1 } else { 0 };
        }
        assert!(quiet > 3, "what cannot be moved is not tried for ever");
        let store = world.open().await;
        for (point, disks) in &world.points[2..] {
            match read(&store, *point).await {
                Ok(found) => assert!(found == *disks),
                Err(error) => {
                    assert!(matches!(error, StoreError::Damaged { .. }) && broken.contains(point), "{error}");
                }
            }
        }
    }
}

#[tokio::test]
async fn a_jump_that_is_lost_is_made_anew() {
    let storage = Arc::new(InMemory::new());
    let store = Store::open(storage.clone(), options(0));
    let (mut disks, mut points) = (one_disk(), Vec::new());
    for at in 0..30u64 {
        let frames = apply(&mut disks, &write(at % 60, at as u8 + 1));
        let parent = points.last().map(|(point, _): &(Uuid, Disks)| *point);
        let point = capture(&store, spec(at.into(), parent, &disks, false), &frames).await.unwrap();
        points.push((point, disks.clone()));
    }
    let world = World { storage, points, key: None };
    let mut jumps = 0;
    for (key, sound) in world.objects("/map/").await {
        world.storage.delete(&key).await.unwrap();
        let store = world.open().await;
        let report = scrub(&store).await;
        if report.damage.iter().all(|damage| damage.is_mended) {
            jumps += 1;
            assert_eq!(world.unreadable(&world.open().await, key.as_ref()).await, Vec::<Uuid>::new());
        }
        world.put(&key, sound).await;
    }
    assert!(jumps > 0);
}
