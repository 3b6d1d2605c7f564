//! Items as last read. The reconcilers look at all items several times a second, and hardly ever has one changed: what has
//! not is neither fetched nor decoded again.

use std::{collections::HashMap, sync::Arc};

use sqlx::Row as _;
use tokio::sync::Mutex;

use super::{Db, DbError, ItemRecord, Transaction, items::read};

/// So many changed items are read one by one; more, with all others.
const SINGLE_READS_MAX: usize = 64;

/// The items, and how to tell whether they still are as they were.
#[derive(Default)]
pub(super) struct ItemCache {
    known: Mutex<Option<Known>>,
}

struct Known {
    /// The count of writes before the items were read.
    writes: i64,
    /// In the order of the listing.
    items: Vec<Arc<ItemRecord>>,
}

/// Counts a transaction that wrote items, within it: whoever sees its writes sees the count, whichever process wrote.
pub(super) async fn count_write(transaction: &mut Transaction) -> Result<(), DbError> {
    sqlx::query("UPDATE counters SET value = value + 1 WHERE name = 'item-writes'")
        .execute(&mut *transaction.inner)
        .await?;
    Ok(())
}

impl Db {
    /// All items, by fabric and name.
    pub async fn items(&self) -> Result<Vec<Arc<ItemRecord>>, DbError> {
        let mut known = self.item_cache.known.lock().await;
        // Before reading: what is written meanwhile is read next time.
        let row = sqlx::query("SELECT value FROM counters WHERE name = 'item-writes'")
            .fetch_one(&self.pool)
            .await?;
        let writes: i64 = row.try_get("value")?;
        if let Some(current) = known.as_ref().filter(|known| known.writes == writes) {
            return Ok(current.items.clone());
        }
        let before = known.take().map(|known| known.items).unwrap_or_default();
        let items = self.items_since(before).await?;
        *known = Some(Known { writes, items: items.clone() });
        Ok(items)
    }

    /// All items, with those taken from `before` that have not changed.
    async fn items_since(&self, before: Vec<Arc<ItemRecord>>) -> Result<Vec<Arc<ItemRecord>>, DbError> {
        if before.is_empty() {
            return self.read_items().await;
        }
        let before: HashMap<String, Arc<ItemRecord>> =
            before.into_iter().map(|item| (item.id.to_string(), item)).collect();
        let rows =
            sqlx::query("SELECT id, version FROM items ORDER BY fabric, name").fetch_all(&self.pool).await?;
        let mut found = Vec::with_capacity(rows.len());
        for row in &rows {
            let (id, version): (&str, i64) = (row.try_get("id")?, row.try_get("version")?);
            found.push((id, before.get(id).filter(|item| item.version == version).cloned()));
        }
        if found.iter().filter(|(_, item)| item.is_none()).count() > SINGLE_READS_MAX {
            return self.read_items().await;
        }
        let mut items = Vec::with_capacity(found.len());
        for (id, item) in found {
            match item {
                Some(item) => items.push(item),
                None => {
                    let row = sqlx::query("SELECT id, version, document FROM items WHERE id = $1")
                        .bind(id)
                        .fetch_optional(&self.pool)
                        .await?;
                    // Removed since: then it is no item any more.
                    if let Some(row) = row {
                        items.push(Arc::new(read(&row)?));
                    }
                }
            }
        }
        Ok(items)
    }

    async fn read_items(&self) -> Result<Vec<Arc<ItemRecord>>, DbError> {
        let rows = sqlx::query("SELECT id, version, document FROM items ORDER BY fabric, name")
            .fetch_all(&self.pool)
            .await?;
        rows.iter().map(|row| read(row).map(Arc::new)).collect()
    }
}

#[cfg(test)]
mod tests {
    use mainstay_model::{Generation, ItemId, ItemState, Phase, ProviderId, TestFailoverState, VmId};
    use uuid::Uuid;

    use super::*;
    use crate::db::{ReplicationRecord, TargetRecord};

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
    async fn listed(db: &Db) -> Vec<Arc<ItemRecord>> {
        let items = db.items().await.unwrap();
        assert_eq!(items, db.read_items().await.unwrap());
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
        // More than are read one by one.
        insert(&db, 10..200).await;
        assert_eq!(listed(&db).await.len(), 194);
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
