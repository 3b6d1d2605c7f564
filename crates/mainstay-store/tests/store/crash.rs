//! The storage dies at every mutation in turn; afterwards nothing acknowledged is missing.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::support::{Disks, Dying, REPLICA, Write, apply, capture, options, read, spec};
use mainstay_store::{FrameUse, ScrubOptions, Store, StoreError};
use object_store::memory::InMemory;
use uuid::Uuid;

/// What the caller was told.
#[derive(Default)]
struct Told {
    committed: Vec<(Uuid, Uuid, Disks)>,
    /// A commit that ended with an error: its point may or may not exist.
    unknown: Option<(Uuid, Disks)>,
    asked_to_delete: Vec<Uuid>,
    failed: bool,
}

fn writes(at: u64) -> Vec<Write> {
    (0..4)
        .map(|part| Write {
            disk: (part % 2) as u16,
            block: (at * 7 + part * 13) % 60,
            count: 1 + (at + part) % 5,
            seed: (!(at + part).is_multiple_of(5)).then_some((at * 16 + part) as u8),
        })
        .map(|write| (write.disk, write))
        .collect::<std::collections::BTreeMap<_, _>>()
        .into_values()
        .collect()
}

/// A fixed history with commits, deletions and maintenance; stops at the first error.
async fn history(store: &Store, told: &mut Told) -> Result<(), StoreError> {
    let mut disks: Disks = vec![(0, vec![0; 260_000]), (1, vec![0; 260_000])];
    let mut parent = None;
    for at in 0..14u64 {
        let mut next = disks.clone();
        let frames = apply(&mut next, &writes(at));
        let spec = spec(u128::from(at) + 1, parent, &next, false);
        let session = spec.session;
        match capture(store, spec, &frames).await {
            Ok(point) => {
                parent = Some(point);
                told.committed.push((session, point, next.clone()));
                disks = next;
            }
            Err(error) => {
                told.unknown = Some((session, next));
                return Err(error);
            }
        }
        if at % 3 == 2 {
            let victim = told.committed[(at / 2) as usize].1;
            told.asked_to_delete.push(victim);
            store.delete_points(REPLICA, &[victim]).await?;
        }
        if at % 4 == 3 {
            store.maintain(REPLICA, at).await?;
        }
    }
    for clock in 100..104 {
        store.maintain(REPLICA, clock).await?;
    }
    Ok(())
}

async fn check(storage: &Arc<InMemory>, told: &Told, label: &str) {
    let store = Store::open(storage.clone(), options(1000));
    let listed: Vec<Uuid> = match store.points(REPLICA).await {
        Ok(points) => points.iter().map(|point| point.id).collect(),
        Err(StoreError::NoReplica(_)) => Vec::new(),
        Err(error) => panic!("{label}: {error}"),
    };
    for (session, point, disks) in &told.committed {
        if told.asked_to_delete.contains(point) {
            continue;
        }
        assert!(listed.contains(point), "{label}: lost {point}");
        assert!(read(&store, *point).await.unwrap() == *disks, "{label}: {point} reads differently");
        assert_eq!(store.committed(REPLICA, *session).await.unwrap(), Some(*point));
    }
    if let Some((session, disks)) = &told.unknown
        && !listed.is_empty()
        && let Some(point) = store.committed(REPLICA, *session).await.unwrap()
    {
        assert!(read(&store, point).await.unwrap() == *disks, "{label}: the unknown point reads differently");
    }
    if listed.is_empty() {
        return;
    }
    assert_eq!(store.scrub(REPLICA, ScrubOptions::default()).await.unwrap().damage, vec![], "{label}");
    // Life goes on, and the garbage of the crash is collected without touching what is needed.
    for clock in 1000..1004 {
        store.maintain(REPLICA, clock).await.unwrap();
    }
    for (_, point, disks) in told.committed.iter().filter(|(_, point, _)| listed.contains(point)) {
        assert!(read(&store, *point).await.unwrap() == *disks, "{label}: {point} after maintenance");
    }
    let last = store.maintain(REPLICA, 2000).await.unwrap();
    assert_eq!((last.garbage_found, last.objects_deleted), (0, 0), "{label}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dies_at_every_mutation() {
    let storage = Arc::new(InMemory::new());
    let counting = Dying::new(&storage, i64::MAX, false);
    let mut told = Told::default();
    history(&Store::open(counting.clone(), options(0)), &mut told).await.unwrap();
    check(&storage, &told, "no fault").await;
    let mutations = counting.mutations.load(Ordering::SeqCst) as i64;
    assert!(mutations > 60, "the history is too small: {mutations}");
    for after in 0..mutations {
        for effect in [false, true] {
            let storage = Arc::new(InMemory::new());
            let dying = Dying::new(&storage, after, effect);
            let mut told = Told::default();
            let ended = history(&Store::open(dying, options(0)), &mut told).await;
            told.failed = ended.is_err();
            check(&storage, &told, &format!("after {after}, effect {effect}")).await;
        }
    }
}

/// A commit whose answer was lost is answered with the same point when it is asked again.
#[tokio::test]
async fn lost_answers_are_found_again() {
    for after in 0..12 {
        let storage = Arc::new(InMemory::new());
        let mut disks: Disks = vec![(0, vec![0; 100_000])];
        let base = Store::open(storage.clone(), options(0));
        let first = capture(&base, spec(1, None, &disks, false), &[]).await.unwrap();
        let frames = apply(&mut disks, &[Write { disk: 0, block: 2, count: 3, seed: Some(9) }]);
        let dying = Dying::new(&storage, after, true);
        let told =
            capture(&Store::open(dying, options(1)), spec(2, Some(first), &disks, false), &frames).await;
        let after_crash = Store::open(storage.clone(), options(2));
        let again = match after_crash.begin(spec(2, Some(first), &disks, false)).await {
            Err(StoreError::Committed(point)) => point,
            Ok(session) => {
                assert!(told.is_err(), "acknowledged and lost");
                session.append(1, frames[0].clone(), FrameUse::Changed).await.unwrap();
                session.commit(crate::support::meta(2)).await.unwrap()
            }
            Err(error) => panic!("{error}"),
        };
        if let Ok(point) = told {
            assert_eq!(point, again);
        }
        assert_eq!(after_crash.points(REPLICA).await.unwrap().len(), 2);
        assert!(read(&after_crash, again).await.unwrap() == disks);
    }
}
