//! Connections to a database: several that read, and one that writes.
//!
//! SQLite lets one write at a time in any case. Those who write meet at the one connection, in the order in which they came,
//! instead of in SQLite's busy handler, which sleeps and lets chance decide; that remains for other processes. A connection
//! has a thread of its own, so that asking it costs a way there and back: there is nothing else to it here, where a pool also asks
//! each connection whether it lives before it gives it out and after it took it back.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, PoisonError},
};

use futures::{
    StreamExt as _, TryStreamExt as _,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use mainstay_block::elsewhere::answer;
use sqlx::{
    Connection as _, Either, Error, Execute, Executor, SqlSafeStr as _, SqlStr, Sqlite, SqliteConnection,
    sqlite::{
        SqliteConnectOptions, SqliteQueryResult, SqliteRow, SqliteStatement, SqliteTransactionManager,
        SqliteTypeInfo,
    },
};
use sqlx_core::transaction::TransactionManager as _;
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};

/// Connections that read at once: more than there are processors to answer.
const READERS_MAX: u32 = 8;

/// The one that writes; `None` once it is closed.
type Writer = Arc<tokio::sync::Mutex<Option<SqliteConnection>>>;

/// All connections of a process to a database.
#[derive(Clone)]
pub(super) struct Connections {
    /// How further readers are opened. Without it there are none, and the writer reads as well: a database in memory is one of its
    /// connection alone.
    options: Option<Arc<SqliteConnectOptions>>,
    /// Those that nobody reads from at the moment.
    idle: Arc<Mutex<Vec<SqliteConnection>>>,
    /// A permit for each that may read.
    readers: Arc<Semaphore>,
    writer: Writer,
}

impl std::fmt::Debug for Connections {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Connections")
    }
}

impl Connections {
    /// Opens a database; `options` say where.
    pub(super) async fn open(options: SqliteConnectOptions, is_file: bool) -> Result<Self, Error> {
        let writer = answer(SqliteConnection::connect_with(&options)).await?;
        Ok(Self {
            options: is_file.then(|| Arc::new(options)),
            idle: Arc::default(),
            readers: Arc::new(Semaphore::new(READERS_MAX as usize)),
            writer: Arc::new(tokio::sync::Mutex::new(Some(writer))),
        })
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<SqliteConnection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn writer(&self) -> Result<Writing, Error> {
        let connection = self.writer.clone().lock_owned().await;
        if connection.is_none() {
            return Err(Error::PoolClosed);
        }
        Ok(Writing { connection, is_open: false })
    }

    async fn reader(&self) -> Result<Reading, Error> {
        let Some(options) = &self.options else { return Ok(Reading::Writer(self.writer().await?)) };
        let permit = self.readers.clone().acquire_owned().await.map_err(|_| Error::PoolClosed)?;
        let idle = self.idle().pop();
        let connection = match idle {
            Some(connection) => connection,
            None => answer(SqliteConnection::connect_with(options)).await?,
        };
        Ok(Reading::Own { connection: Some(connection), home: self.clone(), _permit: permit })
    }

    /// Begins a transaction, as soon as those before it are over.
    pub(super) async fn begin(&self) -> Result<Writing, Error> {
        let mut writing = self.writer().await?;
        // Before it is asked for: whoever goes away meanwhile leaves none open.
        writing.is_open = true;
        let begun = begin_in(&mut writing).await;
        if let (Err(Error::WorkerCrashed), Some(options)) = (&begun, &self.options) {
            // Its thread has died, and with it whatever transaction was open.
            *writing = answer(SqliteConnection::connect_with(options)).await?;
            begin_in(&mut writing).await?;
            return Ok(writing);
        }
        begun.map(|()| writing)
    }

    /// Waits for those that are in use, and closes all.
    pub(super) async fn close(&self) {
        // An error says that they are closed.
        let unused = self.readers.acquire_many(READERS_MAX).await;
        self.readers.close();
        drop(unused);
        let idle = std::mem::take(&mut *self.idle());
        let writer = self.writer.lock().await.take();
        for connection in idle.into_iter().chain(writer) {
            if let Err(error) = answer(connection.close()).await {
                tracing::debug!(%error, "a connection to the database was not closed in order");
            }
        }
    }
}

async fn begin_in(connection: &mut SqliteConnection) -> Result<(), Error> {
    // IMMEDIATE: a transaction that reads and then writes must not find out in the middle that another process wrote.
    let begin = Some("BEGIN IMMEDIATE".into_sql_str());
    answer(SqliteTransactionManager::begin(connection, begin)).await
}

/// A connection that somebody reads from.
enum Reading {
    Own { connection: Option<SqliteConnection>, home: Connections, _permit: OwnedSemaphorePermit },
    Writer(Writing),
}

impl Reading {
    /// A connection whose thread has died is not given out again.
    fn note<T>(&mut self, result: Result<T, Error>) -> Result<T, Error> {
        if let (Err(Error::WorkerCrashed), Self::Own { connection, .. }) = (&result, self) {
            connection.take();
        }
        result
    }
}

impl Deref for Reading {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        match self {
            Self::Own { connection, .. } => connection.as_ref().expect("it is given back at the end"),
            Self::Writer(writing) => writing,
        }
    }
}

impl DerefMut for Reading {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        match self {
            Self::Own { connection, .. } => connection.as_mut().expect("it is given back at the end"),
            Self::Writer(writing) => writing,
        }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        if let Self::Own { connection, home, .. } = self
            && let Some(connection) = connection.take()
            && !home.readers.is_closed()
        {
            home.idle().push(connection);
        }
    }
}

/// The connection that writes, in a transaction. Dropped without [`Writing::commit`] that is rolled back.
pub(super) struct Writing {
    connection: OwnedMutexGuard<Option<SqliteConnection>>,
    is_open: bool,
}

impl std::fmt::Debug for Writing {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Writing")
    }
}

impl Deref for Writing {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        self.connection.as_ref().expect("it was there when this was made")
    }
}

impl DerefMut for Writing {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        self.connection.as_mut().expect("it was there when this was made")
    }
}

impl Writing {
    /// Makes what was written durable.
    pub(super) async fn commit(mut self) -> Result<(), Error> {
        answer(SqliteTransactionManager::commit(&mut self)).await?;
        self.is_open = false;
        Ok(())
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        if self.is_open {
            // Carried out before whatever the connection is asked next, and nothing if there is no transaction.
            SqliteTransactionManager::start_rollback(self);
        }
    }
}

type Step = Either<SqliteQueryResult, SqliteRow>;

async fn steps<'q>(
    connection: &mut SqliteConnection,
    query: impl Execute<'q, Sqlite> + 'q,
) -> Result<Vec<Step>, Error> {
    answer(connection.fetch_many(query).try_collect()).await
}

fn streamed<'e>(
    steps: impl Future<Output = Result<Vec<Step>, Error>> + Send + 'e,
) -> BoxStream<'e, Result<Step, Error>> {
    stream::once(steps).map_ok(|steps| stream::iter(steps.into_iter().map(Ok))).try_flatten().boxed()
}

impl<'c> Executor<'c> for &'c Connections {
    type Database = Sqlite;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Result<Step, Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Sqlite>,
    {
        streamed(async move {
            let mut reading = self.reader().await?;
            let found = steps(&mut reading, query).await;
            reading.note(found)
        })
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<SqliteRow>, Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Sqlite>,
    {
        Box::pin(async move {
            let mut reading = self.reader().await?;
            let found = answer(reading.fetch_optional(query)).await;
            reading.note(found)
        })
    }

    fn prepare_with<'e>(
        self,
        _: SqlStr,
        _: &'e [SqliteTypeInfo],
    ) -> BoxFuture<'e, Result<SqliteStatement, Error>>
    where
        'c: 'e,
    {
        not_here()
    }
}

impl<'c> Executor<'c> for &'c mut Writing {
    type Database = Sqlite;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Result<Step, Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Sqlite>,
    {
        streamed(steps(self, query))
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<SqliteRow>, Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Sqlite>,
    {
        Box::pin(answer((**self).fetch_optional(query)))
    }

    fn prepare_with<'e>(
        self,
        _: SqlStr,
        _: &'e [SqliteTypeInfo],
    ) -> BoxFuture<'e, Result<SqliteStatement, Error>>
    where
        'c: 'e,
    {
        not_here()
    }
}

/// A statement is bound to its connection, and which one the next question goes to is open.
fn not_here<'e>() -> BoxFuture<'e, Result<SqliteStatement, Error>> {
    let error = Error::Configuration("statements are prepared by asking".into());
    Box::pin(std::future::ready(Err(error)))
}

#[cfg(test)]
mod tests {
    use crate::db::Db;

    #[tokio::test]
    async fn transactions_wait_for_each_other_and_what_goes_away_leaves_none_open() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(&dir.path().join("db")).await.unwrap();
        let mut tasks = Vec::new();
        for _ in 0..16 {
            let db = db.clone();
            tasks.push(tokio::spawn(async move { db.note_item_writes(1).await.unwrap() }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        // Every one of them goes away at another point.
        for polls in 0..20 {
            let write = db.note_item_writes(100 + polls);
            let mut write = Box::pin(write);
            for _ in 0..polls {
                if futures::poll!(&mut write).is_ready() {
                    break;
                }
                tokio::task::yield_now().await;
            }
        }
        db.note_item_writes(1000).await.unwrap();
        assert_eq!(db.item_writes().await.unwrap(), 1000);
    }

    #[tokio::test]
    async fn a_closed_database_answers_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let db = Db::open(&path).await.unwrap();
        assert_eq!(db.item_writes().await.unwrap(), 0);
        db.close().await;
        db.item_writes().await.unwrap_err();
        assert!(db.begin().await.is_err());
        // A log is left only by those that are not closed.
        assert!(!dir.path().join("db-wal").exists());
        db.close().await;
    }
}
