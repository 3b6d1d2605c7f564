//! Putting hash tables right after a crash.

use std::sync::Arc;

use mainstay_block::blocks_of;
use mainstay_block::hash_table::HashTable;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::connect::{Backoff, unless_cancelled};
use crate::message::{Hello, Purpose, Welcome};
use crate::wire::{Kind, Message, Traffic, VERSION, split};
use crate::{Connect, RemoteDisk, ReplicationError};

/// Hashes staged at once: 32 MiB of disk content per 64 KiB of table.
const HASHES_AT_ONCE: u64 = 1 << 17;

/// The recovery point a session became, or `None`, which is final: the server then ends it if it is still open.
///
/// # Errors
/// [`ReplicationError::Refused`], [`ReplicationError::Cancelled`].
pub async fn session_outcome(
    connect: &dyn Connect,
    replica: Uuid,
    session: Uuid,
    cancel: &CancellationToken,
) -> Result<Option<Uuid>, ReplicationError> {
    let mut backoff = Backoff::new();
    loop {
        match unless_cancelled(cancel, ask(connect, replica, session)).await {
            Err(error) if error.is_transient() => backoff.pause(cancel).await?,
            done => return done,
        }
    }
}

async fn ask(connect: &dyn Connect, replica: Uuid, session: Uuid) -> Result<Option<Uuid>, ReplicationError> {
    let (mut receiver, transmitter) = split(connect.connect().await?, &Arc::new(Traffic::default()));
    let purpose = Purpose::Outcome { session };
    let hello = Hello { version_min: VERSION, version_max: VERSION, replica, purpose };
    transmitter.send(&Message::control(Kind::Hello, 0, &hello)?).await?;
    match receiver.expect(Kind::Welcome).await?.body()? {
        Welcome::Committed { point } => Ok(Some(point)),
        Welcome::NotCommitted => Ok(None),
        _ => Err(ReplicationError::Protocol("unexpected welcome")),
    }
}

/// Decides every pending session of the tables, after a crash or an unclear end, before the next session. All tables
/// of a replica belong in one call.
///
/// # Errors
/// Those of [`session_outcome`], and [`ReplicationError::Table`].
pub async fn settle(
    connect: &dyn Connect,
    replica: Uuid,
    tables: &[Arc<HashTable>],
    cancel: &CancellationToken,
) -> Result<(), ReplicationError> {
    for table in tables {
        let Some(session) = table.pending() else { continue };
        let outcome = session_outcome(connect, replica, session, cancel).await?;
        let table = Arc::clone(table);
        let task = mainstay_block::elsewhere::spawn_blocking(move || match outcome {
            Some(point) => table.commit(session, point),
            None => table.abandon(session),
        });
        task.await.map_err(|error| ReplicationError::internal(&error))??;
    }
    Ok(())
}

/// Fills a table from a mounted recovery point's hashes: for an agent that lost its own. The table must have been
/// created for a disk at least as large, as [`Fill::Zeros`](mainstay_block::hash_table::Fill::Zeros) or unknown.
///
/// # Errors
/// Those of [`RemoteDisk::hashes`], and [`ReplicationError::Table`].
pub async fn rebuild_table(
    disk: &RemoteDisk,
    disk_bytes: u64,
    table: &Arc<HashTable>,
    session: Uuid,
    point: Uuid,
) -> Result<(), ReplicationError> {
    let end = blocks_of(disk_bytes);
    let mut at = 0;
    while at < end {
        let count = HASHES_AT_ONCE.min(end - at);
        let hashes = disk.hashes(table.key(), at, count).await?;
        let (target, first) = (Arc::clone(table), at);
        let task = mainstay_block::elsewhere::spawn_blocking(move || target.stage(session, first, &hashes));
        task.await.map_err(|error| ReplicationError::internal(&error))??;
        at += count;
    }
    let table = Arc::clone(table);
    let task = mainstay_block::elsewhere::spawn_blocking(move || {
        table.prepare(session)?;
        table.commit(session, point)
    });
    Ok(task.await.map_err(|error| ReplicationError::internal(&error))??)
}
