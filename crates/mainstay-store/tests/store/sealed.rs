//! Encryption at rest: what lies in storage says nothing, and keys can be replaced.

use std::sync::Arc;

use futures::TryStreamExt as _;
use mainstay_store::{ScrubOptions, Store, StoreError, StoreOptions, Unlocked, VaultKey};
use object_store::{ObjectStore as _, ObjectStoreExt as _, memory::InMemory};
use uuid::Uuid;

use crate::support::*;

const MAGIC: &[u8] = b"MSSEALD1";

async fn stored(storage: &InMemory) -> Vec<(String, Vec<u8>)> {
    let listed: Vec<_> = storage.list(None).try_collect().await.unwrap();
    let mut found = Vec::new();
    for object in listed {
        let bytes = storage.get(&object.location).await.unwrap().bytes().await.unwrap();
        found.push((object.location.to_string(), bytes.to_vec()));
    }
    found
}

fn is_keyring(key: &str) -> bool {
    key.ends_with("/keyring")
}

/// The data keys that objects are sealed with; `None` for those that are not.
async fn keys_in_use(storage: &InMemory) -> Vec<Option<Vec<u8>>> {
    let old_manifest = |key: &str| key.contains("/manifest/");
    let objects = stored(storage).await;
    let newest = objects.iter().map(|(key, _)| key).filter(|key| old_manifest(key)).max().cloned();
    let counted = objects
        .iter()
        .filter(|(key, _)| !is_keyring(key) && (!old_manifest(key) || Some(key) == newest.as_ref()));
    let key = |bytes: &[u8]| bytes.starts_with(MAGIC).then(|| bytes[16..32].to_vec());
    let mut keys: Vec<_> = counted.map(|(_, bytes)| key(bytes)).collect();
    keys.sort_unstable();
    keys.dedup();
    keys
}

async fn fill(store: &Store, from: u64, parent: Option<(Uuid, Disks)>) -> (Uuid, Disks) {
    let (mut point, mut disks) = match parent {
        Some((point, disks)) => (Some(point), disks),
        None => (None, one_disk()),
    };
    for at in from..from + 6 {
        let frames = apply(&mut disks, &write(at * 3 % 90, at as u8 + 1));
        point = Some(capture(store, spec(at.into(), point, &disks, false), &frames).await.unwrap());
    }
    store.put_document("items/a", b"what the vault knows of it").await.unwrap();
    (point.unwrap(), disks)
}

async fn opened(storage: &Arc<InMemory>, key: &VaultKey, former: &[VaultKey], how: Unlocked) -> Store {
    // Ids of its own, as every process makes them.
    let options = StoreOptions { new_id: Arc::new(Uuid::new_v4), ..options(7) };
    let store = Store::open(storage.clone(), options);
    assert_eq!(store.unlock(Some(key), former).await.unwrap(), how);
    store
}

async fn seal_all_again(store: &Store) {
    assert_eq!(store.scrub(REPLICA, ScrubOptions::default()).await.unwrap().damage, vec![]);
    assert_eq!(store.scrub_documents().await.unwrap(), 0);
}

#[tokio::test]
async fn nothing_that_is_stored_can_be_read_without_the_key() {
    let storage = Arc::new(InMemory::new());
    let key = VaultKey::generate().unwrap();
    let store = opened(&storage, &key, &[], Unlocked::Begun).await;
    let (point, disks) = fill(&store, 0, None).await;
    for (name, bytes) in stored(&storage).await {
        assert!(is_keyring(&name) || bytes.starts_with(MAGIC), "{name}");
        for words in [&b"definition"[..], b"what the vault", b"vd0", &disks[0].1[..64]] {
            let is_zero = words.iter().all(|byte| *byte == 0);
            assert!(is_zero || !bytes.windows(words.len()).any(|found| found == words), "{name}");
        }
        let secret = key.to_text();
        assert!(!String::from_utf8_lossy(&bytes).contains(secret.trim()), "{name}");
    }
    let store = opened(&storage, &key, &[], Unlocked::Same).await;
    assert!(read(&store, point).await.unwrap() == disks);
    for wrong in [None, Some(&VaultKey::generate().unwrap())] {
        let store = Store::open(storage.clone(), options(7));
        let refused = store.unlock(wrong, &[]).await;
        assert!(matches!(refused, Err(StoreError::Locked { by }) if by == key.fingerprint()));
    }
}

#[tokio::test]
async fn a_store_is_encrypted_later_and_its_key_is_replaced() {
    let storage = Arc::new(InMemory::new());
    let store = Store::open(storage.clone(), options(0));
    assert_eq!(store.unlock(None, &[]).await.unwrap(), Unlocked::Plain);
    let before = fill(&store, 0, None).await;
    assert_eq!(keys_in_use(&storage).await, [None]);

    let first = VaultKey::generate().unwrap();
    let store = opened(&storage, &first, &[], Unlocked::Begun).await;
    let now = fill(&store, 10, Some(before.clone())).await;
    assert_eq!(keys_in_use(&storage).await.len(), 2);
    seal_all_again(&store).await;
    let old = keys_in_use(&storage).await;
    assert!(old.len() == 1 && old[0].is_some());

    let second = VaultKey::generate().unwrap();
    let store = opened(&storage, &second, std::slice::from_ref(&first), Unlocked::Rotated).await;
    assert!(read(&store, now.0).await.unwrap() == now.1, "what the former key sealed is read");
    let last = fill(&store, 20, Some(now.clone())).await;
    seal_all_again(&store).await;
    let new = keys_in_use(&storage).await;
    assert!(new.len() == 1 && new != old, "nothing is sealed with the old data key any more");
    for (point, disks) in [&before, &now, &last] {
        assert!(read(&store, *point).await.unwrap() == *disks);
    }
    assert_eq!(store.document("items/a").await.unwrap().unwrap(), "what the vault knows of it");

    let store = Store::open(storage.clone(), options(7));
    assert!(matches!(store.unlock(Some(&first), &[]).await, Err(StoreError::Locked { .. })));
    let store = opened(&storage, &second, &[first], Unlocked::Same).await;
    assert!(read(&store, last.0).await.unwrap() == last.1);
}
