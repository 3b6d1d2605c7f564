//! Items as last read. The reconcilers look at all items several times a second, and hardly ever has one changed: what has
//! not is neither fetched nor decoded again.
//!
//! Transactions that write items are numbered, in the database, within the transaction; an item keeps the number of its last
//! one. Whoever sees the writes sees the number, whichever process wrote, and what is new is what has a higher one than those
//! seen before. Removals, which are rare, are counted besides, and have everything read again.

use std::sync::Arc;

use tokio::sync::Mutex;

use super::{
    Db, DbError, ItemRecord, Transaction,
    counters::{Counts, count},
    items::read,
};

/// All items, by fabric and name (without regard to case).
pub type Items = Arc<Vec<Arc<ItemRecord>>>;

/// The items, and how to tell whether they still are as they were.
#[derive(Default)]
pub(super) struct ItemCache {
    known: Mutex<Option<Known>>,
}

struct Known {
    /// As they were before the items were read.
    counts: Counts,
    items: Items,
}

/// An item's place in the list.
pub fn item_place(item: &ItemRecord) -> (String, String) {
    (item.fabric.to_lowercase(), item.name.to_lowercase())
}

impl Transaction {
    /// The number of this transaction among those that write items.
    pub(super) async fn item_write(&mut self) -> Result<i64, DbError> {
        if let Some(number) = self.item_write {
            return Ok(number);
        }
        let number: i64 = count(self, "item-writes").await?;
        self.item_write = Some(number);
        Ok(number)
    }

    pub(super) async fn count_item_removal(&mut self) -> Result<(), DbError> {
        self.item_write().await?;
        count(self, "item-removals").await.map(|_| ())
    }
}

impl Db {
    /// All items.
    pub async fn items(&self) -> Result<Items, DbError> {
        let mut known = self.item_cache.known.lock().await;
        // Before reading: what is written meanwhile is read next time.
        let counts = self.counts().await?;
        let (counts, items) = match known.take() {
            // Another request may have brought it further than this one asks for.
            Some(current) if current.counts.item_writes >= counts.item_writes => {
                (current.counts, current.items)
            }
            Some(current) if current.counts.item_removals == counts.item_removals => {
                (counts, self.changed_since(current.items, current.counts.item_writes).await?)
            }
            _ => (counts, Arc::new(self.read_items().await?)),
        };
        *known = Some(Known { counts, items: items.clone() });
        Ok(items)
    }

    /// Reads an item by its fabric and name, without regard to case.
    pub async fn item_named(&self, fabric: &str, name: &str) -> Result<Option<Arc<ItemRecord>>, DbError> {
        let items = self.items().await?;
        let place = (fabric.to_lowercase(), name.to_lowercase());
        let found = items.binary_search_by_key(&place, |item| item_place(item));
        Ok(found.ok().map(|index| items[index].clone()))
    }

    /// The items with what was written after a number.
    async fn changed_since(&self, mut items: Items, writes: i64) -> Result<Items, DbError> {
        let rows = sqlx::query("SELECT id, version, document FROM items WHERE written > $1")
            .bind(writes)
            .fetch_all(&self.connections)
            .await?;
        let list = Arc::make_mut(&mut items);
        for row in &rows {
            let item = Arc::new(read(row)?);
            match list.binary_search_by_key(&item_place(&item), |item| item_place(item)) {
                Ok(index) => list[index] = item,
                Err(index) => list.insert(index, item),
            }
        }
        Ok(items)
    }

    async fn read_items(&self) -> Result<Vec<Arc<ItemRecord>>, DbError> {
        let rows = sqlx::query("SELECT id, version, document FROM items ORDER BY fabric, name")
            .fetch_all(&self.connections)
            .await?;
        rows.iter().map(|row| read(row).map(Arc::new)).collect()
    }
}

#[cfg(test)]
mod tests {
    use mainstay_model::{Generation, ItemId, ItemState, Phase, ProviderId, TestFailoverState, VmId};
    use uuid::Uuid;

    use super::*;
    use crate::db::{ReplicationRecord, ScrubRecord, TargetRecord};

    fn item(number: u128) -> ItemRecord {
        ItemRecord {
            resolved_errors: Vec::new(),
            id: ItemId(Uuid::from_u128(number)),
            name: format!("Item-{number:03}"),
            vm_name: "vm".to_owned(),
            fabric: "Home".to_owned(),
            primary_provider: ProviderId(Uuid::from_u128(1)),
            recovery_fabric: "recovery".to_owned(),
            recovery_provider: ProviderId(Uuid::from_u128(2)),
            vm: VmId(Uuid::from_u128(number)),
            autostart: false,
            former_home: None,
            given_up: Vec::new(),
            policy: "policy".to_owned(),
            state: ItemState {
                phase: Phase::Protected,
                test_failover: TestFailoverState::None,
                running: None,
                generation: Generation(1),
            },
            disks: Vec::new(),
            target: TargetRecord::default(),
            recovery_vm: None,
            test_vm: None,
            failover: None,
            stand_downs: Vec::new(),
            old_copy: None,
            not_started: None,
            scrub: ScrubRecord::default(),
            replication: ReplicationRecord::default(),
            created_ms: 0,
            last_failover_ms: None,
            last_test_failover_ms: None,
            version: 0,
        }
    }

    async fn write(db: &Db, number: u128, name: &str) {
        let mut transaction = db.begin().await.unwrap();
        let mut present = transaction.item(ItemId(Uuid::from_u128(number))).await.unwrap().unwrap();
        present.vm_name = name.to_owned();
        transaction.update_item(&present).await.unwrap();
        transaction.commit().await.unwrap();
    }

    async fn insert(db: &Db, numbers: std::ops::Range<u128>) {
        let mut transaction = db.begin().await.unwrap();
        for number in numbers {
            transaction.insert_item(&item(number)).await.unwrap();
        }
        transaction.commit().await.unwrap();
    }

    /// What the listing says, and whether it is what the database holds.
    async fn listed(db: &Db) -> Items {
        let items = db.items().await.unwrap();
        assert_eq!(*items, db.read_items().await.unwrap());
        items
    }

    #[tokio::test]
    async fn every_change_is_seen_and_nothing_else_is_read_again() {
        let db = Db::in_memory().await.unwrap();
        assert!(listed(&db).await.is_empty());
        insert(&db, 0..5).await;
        let first = listed(&db).await;
        assert_eq!(first.len(), 5);
        write(&db, 3, "renamed").await;
        let second = listed(&db).await;
        assert_eq!(second[3].vm_name, "renamed");
        assert!((0..5).all(|index| Arc::ptr_eq(&first[index], &second[index]) == (index != 3)));
        let mut transaction = db.begin().await.unwrap();
        transaction.remove_item(ItemId(Uuid::from_u128(0))).await.unwrap();
        transaction.commit().await.unwrap();
        assert_eq!(listed(&db).await.len(), 4);
        // At the end, at the beginning, in the middle; and one that comes again.
        insert(&db, 10..200).await;
        insert(&db, 0..1).await;
        insert(&db, 7..8).await;
        assert_eq!(listed(&db).await.len(), 196);
    }

    #[tokio::test]
    async fn what_another_process_wrote_is_seen_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mainstay.db");
        let (db, other) = (Db::open(&path).await.unwrap(), Db::open(&path).await.unwrap());
        assert!(listed(&db).await.is_empty());
        insert(&other, 0..2).await;
        assert_eq!(listed(&db).await.len(), 2);
        write(&other, 1, "renamed").await;
        assert_eq!(listed(&db).await[1].vm_name, "renamed");
    }

    #[tokio::test]
    async fn what_was_not_committed_is_not_seen() {
        let db = Db::in_memory().await.unwrap();
        insert(&db, 0..1).await;
        listed(&db).await;
        let mut transaction = db.begin().await.unwrap();
        transaction.insert_item(&item(1)).await.unwrap();
        drop(transaction);
        assert_eq!(listed(&db).await.len(), 1);
    }

    #[tokio::test]
    async fn an_item_is_found_by_its_name_without_regard_to_case() {
        let db = Db::in_memory().await.unwrap();
        insert(&db, 0..2).await;
        let found = db.item_named("HOME", "item-001").await.unwrap();
        assert_eq!(found.map(|item| item.id), Some(ItemId(Uuid::from_u128(1))));
        assert_eq!(db.item_named("recovery", "item-001").await.unwrap(), None);
    }
}
