//! Whether anything was written since, without asking the database.
//!
//! A question to the database goes to another thread and back, which costs more than what most requests need it for. In its
//! WAL mode SQLite tells all processes of every commit through the head of the WAL index, a small file beside the database:
//! its counter, frame number, checksums and salts change with each (sqlite.org/walformat.html, "WAL-Index Header"). As long
//! as the head is the same, nothing was committed, by whomever.

use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

/// Bytes of the head; its second copy, for readers that must not see half of a change, follows it. Whoever only compares sees
/// that half of it has changed.
const HEAD_BYTES: usize = 48;

/// A state of the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark([u8; HEAD_BYTES]);

/// Where a database's marks are read.
#[derive(Clone, Debug)]
pub(super) struct MarkFile(PathBuf);

impl MarkFile {
    pub(super) fn of(database: &Path) -> Self {
        let mut path = database.as_os_str().to_owned();
        path.push("-shm");
        Self(path.into())
    }

    /// The present mark; `None` when it cannot be told, as while no connection is open. The file is opened anew each time,
    /// because it goes with the last connection, and another one comes with the next.
    pub(super) fn read(&self) -> Option<Mark> {
        let mut head = [0; HEAD_BYTES];
        File::open(&self.0).ok()?.read_exact_at(&mut head, 0).ok()?;
        Some(Mark(head))
    }
}

#[cfg(test)]
mod tests {
    use sqlx::{Connection as _, SqliteConnection, sqlite::SqliteConnectOptions, sqlite::SqliteJournalMode};

    use super::*;

    #[tokio::test]
    async fn every_commit_of_anybody_changes_it_and_nothing_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let file = MarkFile::of(&path);
        assert_eq!(file.read(), None);
        let options = || {
            SqliteConnectOptions::new()
                .filename(&path)
                .create_if_missing(true)
                .journal_mode(SqliteJournalMode::Wal)
        };
        let mut one = SqliteConnection::connect_with(&options()).await.unwrap();
        let mut other = SqliteConnection::connect_with(&options()).await.unwrap();
        sqlx::query("CREATE TABLE t (x)").execute(&mut one).await.unwrap();
        let mut seen = vec![file.read().unwrap()];
        for round in 0..200 {
            let writer = if round % 2 == 0 { &mut one } else { &mut other };
            // The same size each time, and now and then the log begins anew.
            sqlx::query("DELETE FROM t").execute(&mut *writer).await.unwrap();
            if round % 20 == 0 {
                sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").execute(&mut *writer).await.unwrap();
            }
            sqlx::query("INSERT INTO t VALUES (1)").execute(&mut *writer).await.unwrap();
            let mark = file.read().unwrap();
            assert!(!seen.contains(&mark), "round {round}");
            sqlx::query("SELECT * FROM t").fetch_all(&mut *writer).await.unwrap();
            sqlx::query("BEGIN IMMEDIATE").execute(&mut *writer).await.unwrap();
            sqlx::query("INSERT INTO t VALUES (2)").execute(&mut *writer).await.unwrap();
            sqlx::query("ROLLBACK").execute(&mut *writer).await.unwrap();
            assert_eq!(file.read(), Some(mark), "round {round}");
            seen.push(mark);
        }
        one.close().await.unwrap();
        other.close().await.unwrap();
        assert_eq!(file.read(), None);
    }
}
