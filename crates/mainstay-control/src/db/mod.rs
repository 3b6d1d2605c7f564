//! The database: the only module that knows SQL.
//!
//! Records are documents (JSON, one row each) with the few columns that are searched by. Every write of an item is
//! conditional on the version that was read, so that two writers never overwrite each other. Placeholders
//! are `$1`, types are `TEXT` and `BIGINT`: the text is the same for SQLite and PostgreSQL.

mod connections;
mod counters;
mod counts;
mod events;
mod item_cache;
mod items;
mod jobs;
mod query;
mod resources;

use std::{path::Path, sync::Arc, time::Duration};

use sqlx::{
    Connection as _, Row as _, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};

use connections::{Connections, Writing};
use counters::Commits;
pub use counters::asking_once;
use item_cache::ItemCache;
pub use item_cache::{Items, item_place};
use resources::ResourceCache;

pub use events::{ALERTS_FAILED, AuditRecord, EventPlace, EventRecord, OwedAlerts};
pub use items::{
    DamageRecord, DiskRecord, FailoverRecord, ItemRecord, ReplicationRecord, ScrubRecord, StandDownRecord,
    TargetRecord, VmCopy,
};
pub use jobs::{
    ConfigurationJob, JobColumn, JobCondition, JobEntry, JobError, JobPlace, JobRecord, JobState, StepRecord,
};
pub use query::Comparison;
pub use resources::{Resource, ResourceKind, StoredResource};

/// Why the database refused.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// The database itself failed.
    #[error("the database failed")]
    Sql(#[from] sqlx::Error),
    /// A stored document cannot be read by this version.
    #[error("the stored {kind} {key} cannot be read: {source}")]
    Document {
        /// What kind of record.
        kind: &'static str,
        /// Its key.
        key: String,
        /// Why.
        source: serde_json::Error,
    },
    /// Somebody else wrote the record since it was read.
    #[error("the {kind} {key} was changed by somebody else in the same moment; try again")]
    Conflict {
        /// What kind of record.
        kind: &'static str,
        /// Its key.
        key: String,
    },
    /// The database was made by a newer version.
    #[error(
        "the database has schema {found}, this program knows up to {known}: install the newer version again"
    )]
    TooNew {
        /// Version found.
        found: i64,
        /// Newest version this program knows.
        known: i64,
    },
}

/// The control plane's database.
#[derive(Clone)]
pub struct Db {
    connections: Connections,
    commits: Arc<Commits>,
    item_cache: Arc<ItemCache>,
    resource_cache: Arc<ResourceCache>,
}

/// A transaction; dropped without [`Transaction::commit`] it never was.
pub struct Transaction {
    inner: Writing,
    commits: Arc<Commits>,
    /// Its number among those that write items, when it has written one.
    item_write: Option<i64>,
    /// Whether its writing of resources has been counted.
    has_counted_resources: bool,
}

/// Each entry brings the schema from its index to the next version. Entries are never changed once released.
const MIGRATIONS: &[&str] = &["
    CREATE TABLE resources (
        kind TEXT NOT NULL, name TEXT NOT NULL, document TEXT NOT NULL, PRIMARY KEY (kind, name)
    );
    CREATE TABLE items (
        id TEXT PRIMARY KEY, name TEXT NOT NULL, fabric TEXT NOT NULL, vm TEXT NOT NULL,
        version BIGINT NOT NULL, document TEXT NOT NULL
    );
    CREATE UNIQUE INDEX items_name ON items (fabric, name);
    CREATE UNIQUE INDEX items_vm ON items (fabric, vm);
    CREATE TABLE jobs (
        id TEXT PRIMARY KEY, item TEXT NOT NULL, state TEXT NOT NULL, created_ms BIGINT NOT NULL, document TEXT NOT NULL
    );
    CREATE INDEX jobs_state ON jobs (state);
    CREATE INDEX jobs_created ON jobs (created_ms);
    CREATE TABLE events (id TEXT PRIMARY KEY, time_ms BIGINT NOT NULL, item TEXT NOT NULL, document TEXT NOT NULL);
    CREATE INDEX events_time ON events (time_ms);
    CREATE TABLE audit (id TEXT PRIMARY KEY, time_ms BIGINT NOT NULL, document TEXT NOT NULL);
    CREATE INDEX audit_time ON audit (time_ms);
", "
    ALTER TABLE jobs ADD COLUMN kind TEXT NOT NULL DEFAULT 'Item';
    ALTER TABLE jobs ADD COLUMN scenario TEXT NOT NULL DEFAULT '';
    ALTER TABLE jobs ADD COLUMN object TEXT NOT NULL DEFAULT '';
    DROP INDEX jobs_created;
    CREATE INDEX jobs_created ON jobs (created_ms, id);
    DROP INDEX jobs_state;
    CREATE INDEX jobs_state ON jobs (state, created_ms, id);
", "
    ALTER TABLE events ADD COLUMN alert BIGINT NOT NULL DEFAULT 0;
    CREATE INDEX events_alert ON events (alert, time_ms, id);
", "
    CREATE TABLE counters (name TEXT PRIMARY KEY, value BIGINT NOT NULL);
    INSERT INTO counters (name, value) VALUES ('item-writes', 0);
", "
    ALTER TABLE items ADD COLUMN written BIGINT NOT NULL DEFAULT 0;
    CREATE INDEX items_written ON items (written);
    INSERT INTO counters (name, value) VALUES ('item-removals', 0);
    INSERT INTO counters (name, value) VALUES ('resource-writes', 0);
    CREATE INDEX jobs_scenario ON jobs (LOWER(scenario), created_ms, id);
    CREATE INDEX jobs_object ON jobs (LOWER(object), created_ms, id);
"];

impl Db {
    /// Opens (or makes) a database file and brings its schema up to date.
    pub async fn open(path: &Path) -> Result<Self, DbError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            // What was answered to a client survives a power cut.
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(Duration::from_secs(10));
        Self::with(Connections::open(options, true).await?).await
    }

    /// Copies a database file whole, also while another process writes into it. `to` must not be there.
    pub async fn copy(from: &Path, to: &Path) -> Result<(), DbError> {
        let options = SqliteConnectOptions::new().filename(from).busy_timeout(Duration::from_secs(10));
        let mut connection = SqliteConnection::connect_with(&options).await?;
        let copied = sqlx::query("VACUUM INTO $1")
            .bind(to.to_string_lossy().into_owned())
            .execute(&mut connection)
            .await;
        connection.close().await?;
        Ok(copied.map(|_| ())?)
    }

    /// A database in memory, for tests and simulations.
    pub async fn in_memory() -> Result<Self, DbError> {
        let options = SqliteConnectOptions::new().in_memory(true);
        Self::with(Connections::open(options, false).await?).await
    }

    async fn with(connections: Connections) -> Result<Self, DbError> {
        sqlx::query("CREATE TABLE IF NOT EXISTS schema_version (version BIGINT NOT NULL)")
            .execute(&connections)
            .await?;
        let row = sqlx::query("SELECT COALESCE(MAX(version), 0) AS version FROM schema_version")
            .fetch_one(&connections)
            .await?;
        let found: i64 = row.try_get("version")?;
        let known = MIGRATIONS.len() as i64;
        if found > known {
            return Err(DbError::TooNew { found, known });
        }
        for (index, migration) in MIGRATIONS.iter().enumerate().skip(found as usize) {
            let mut writing = connections.begin().await?;
            sqlx::raw_sql(*migration).execute(&mut writing).await?;
            sqlx::query("INSERT INTO schema_version (version) VALUES ($1)")
                .bind(index as i64 + 1)
                .execute(&mut writing)
                .await?;
            writing.commit().await?;
        }
        Ok(Self {
            connections,
            commits: Arc::default(),
            item_cache: Arc::default(),
            resource_cache: Arc::default(),
        })
    }

    /// Begins a transaction.
    pub async fn begin(&self) -> Result<Transaction, DbError> {
        Ok(Transaction {
            inner: self.connections.begin().await?,
            commits: self.commits.clone(),
            item_write: None,
            has_counted_resources: false,
        })
    }

    /// Closes all connections; what was committed is on disk.
    pub async fn close(&self) {
        self.connections.close().await;
    }
}

impl Transaction {
    /// Makes everything that was written in it durable at once.
    pub async fn commit(self) -> Result<(), DbError> {
        let committed = self.inner.commit().await;
        // Also after an error: it may have been committed all the same.
        self.commits.add();
        Ok(committed?)
    }
}

fn encode<T: serde::Serialize>(kind: &'static str, key: &str, document: &T) -> Result<String, DbError> {
    serde_json::to_string(document).map_err(|source| DbError::Document { kind, key: key.to_owned(), source })
}

fn decode<T: serde::de::DeserializeOwned>(
    kind: &'static str,
    key: &str,
    document: &str,
) -> Result<T, DbError> {
    serde_json::from_str(document).map_err(|source| DbError::Document { kind, key: key.to_owned(), source })
}
