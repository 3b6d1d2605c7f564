//! Whether anything was written since, by whomever: transactions that write items or resources count themselves in the
//! database, so that whoever sees what they wrote sees the count.
//!
//! A question to the database goes to another thread and back, which is most of what a request costs. A request therefore
//! asks once ([`asking_once`]), and again only after a commit of its own process: what it reads is then as new as its
//! beginning, or newer.

use std::{
    cell::Cell,
    sync::atomic::{AtomicU64, Ordering},
};

use sqlx::Row as _;

use super::{Db, DbError, Transaction};

/// The counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) item_writes: i64,
    pub(super) item_removals: i64,
    pub(super) resource_writes: i64,
}

/// Tells databases of this process apart, and counts what this process has committed to each.
#[derive(Debug)]
pub(super) struct Commits {
    id: u64,
    count: AtomicU64,
}

impl Default for Commits {
    fn default() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { id: NEXT.fetch_add(1, Ordering::Relaxed), count: AtomicU64::new(0) }
    }
}

impl Commits {
    pub(super) fn add(&self) {
        self.count.fetch_add(1, Ordering::Release);
    }

    fn now(&self) -> (u64, u64) {
        (self.id, self.count.load(Ordering::Acquire))
    }
}

/// What was answered, of which database and after which of its commits.
type Answer = ((u64, u64), Counts);

tokio::task_local! {
    static ANSWER: Cell<Option<Answer>>;
}

/// Carries a request out that may ask a database once for what has changed.
pub async fn asking_once<F: Future>(request: F) -> F::Output {
    ANSWER.scope(Cell::new(None), request).await
}

impl Db {
    /// The counts, as new as the request at least.
    pub(super) async fn counts(&self) -> Result<Counts, DbError> {
        // Before asking: a commit meanwhile has the next one ask again.
        let now = self.commits.now();
        let known = ANSWER.try_with(Cell::get).ok().flatten();
        if let Some((_, counts)) = known.filter(|(at, _)| *at == now) {
            return Ok(counts);
        }
        let row = sqlx::query(
            "SELECT (SELECT value FROM counters WHERE name = 'item-writes') AS item_writes,
                    (SELECT value FROM counters WHERE name = 'item-removals') AS item_removals,
                    (SELECT value FROM counters WHERE name = 'resource-writes') AS resource_writes",
        )
        .fetch_one(&self.connections)
        .await?;
        let counts = Counts {
            item_writes: row.try_get("item_writes")?,
            item_removals: row.try_get("item_removals")?,
            resource_writes: row.try_get("resource_writes")?,
        };
        // Outside of a request every question is asked.
        let _ = ANSWER.try_with(|answer| answer.set(Some((now, counts))));
        Ok(counts)
    }
}

/// Counts this transaction, within it; answers its number.
pub(super) async fn count(transaction: &mut Transaction, name: &str) -> Result<i64, DbError> {
    let row = sqlx::query("UPDATE counters SET value = value + 1 WHERE name = $1 RETURNING value")
        .bind(name)
        .fetch_one(&mut transaction.inner)
        .await?;
    Ok(row.try_get("value")?)
}

/// Brings a count up to at least this.
pub(super) async fn raise(transaction: &mut Transaction, name: &str, value: i64) -> Result<(), DbError> {
    sqlx::query("UPDATE counters SET value = $1 WHERE name = $2 AND value < $1")
        .bind(value)
        .bind(name)
        .execute(&mut transaction.inner)
        .await?;
    Ok(())
}

impl Db {
    /// How often items were written.
    pub async fn item_writes(&self) -> Result<i64, DbError> {
        Ok(self.counts().await?.item_writes)
    }

    /// How often resources were written.
    pub async fn resource_writes(&self) -> Result<i64, DbError> {
        Ok(self.counts().await?.resource_writes)
    }

    /// The database now has what so many writes of items have brought.
    pub async fn note_item_writes(&self, writes: i64) -> Result<(), DbError> {
        let mut transaction = self.begin().await?;
        raise(&mut transaction, "item-writes", writes).await?;
        transaction.commit().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn write(db: &Db) -> i64 {
        let mut transaction = db.begin().await.unwrap();
        let number = transaction.item_write().await.unwrap();
        transaction.commit().await.unwrap();
        number
    }

    #[tokio::test]
    async fn a_request_asks_once_and_again_after_a_commit_of_its_own_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mainstay.db");
        let (db, other) = (Db::open(&path).await.unwrap(), Db::open(&path).await.unwrap());
        let seen = async || db.counts().await.unwrap().item_writes;
        asking_once(async {
            assert_eq!(seen().await, 0);
            // What others write during a request need not be seen in it; other databases are asked for themselves.
            write(&other).await;
            assert_eq!((seen().await, other.counts().await.unwrap().item_writes), (0, 1));
        })
        .await;
        asking_once(async {
            assert_eq!(seen().await, 1);
            assert_eq!(write(&db).await, 2);
            assert_eq!(seen().await, 2);
        })
        .await;
        write(&other).await;
        assert_eq!(seen().await, 3);
    }
}
