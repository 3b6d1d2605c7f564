//! Turning a capture into a recovery point: the agent's side.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use mainstay_block::BlockDevice;
use mainstay_block::hash_table::HashTable;
use mainstay_store::{DiskSpec, PointMeta};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::connect::unless_cancelled;
use crate::link::Link;
use crate::message::{CommitRequest, Hello, Purpose};
use crate::scan::{Output, scan};
use crate::wire::{Traffic, VERSION};
use crate::{Connect, RefusalKind, ReplicationError};

/// How often a session that the server lost is transferred from its beginning before giving up: a server that
/// restarts more often than that during one capture has another problem.
const RESTARTS_MAX: u32 = 5;

/// One disk of a capture.
#[derive(Clone)]
pub struct SendDisk {
    /// Index in the replica.
    pub index: u16,
    /// The caller's name for it.
    pub key: String,
    /// The captured content; must not change until the session ended.
    pub device: Arc<dyn BlockDevice>,
    /// Byte ranges to look at; all others are known to be unchanged.
    pub ranges: Vec<Range<u64>>,
    /// Block ranges, sorted and disjoint, to send whatever the table says, because the store cannot read them any more.
    /// Looked at only where they are in `ranges` too.
    pub resend: Vec<Range<u64>>,
    /// What the replica holds; must describe the session's parent and have nothing pending.
    pub table: Arc<HashTable>,
}

/// One capture to be sent.
#[derive(Clone)]
pub struct SendJob {
    /// The replica.
    pub replica: Uuid,
    /// New for every capture; never reused, also not after a crash.
    pub session: Uuid,
    /// This side's generation.
    pub generation: u64,
    /// The recovery point that the hash tables describe.
    pub parent: Option<Uuid>,
    /// See [`mainstay_store::SessionSpec::fork`].
    pub fork: bool,
    /// The disks.
    pub disks: Vec<SendDisk>,
    /// Time, consistency and definition of the recovery point.
    pub meta: PointMeta,
    /// Told what is left before a partial state is asked for: from then on the hash tables may describe a state in which
    /// only this is known to be missing. An error ends the session.
    pub before_partial: Option<BeforePartial>,
}

/// Remembers, durably, what a partial state leaves out: byte ranges per disk.
pub type BeforePartial = Arc<dyn Fn(&[Vec<Range<u64>>]) -> std::io::Result<()> + Send + Sync>;

/// How to send.
#[derive(Clone, Debug)]
pub struct SendOptions {
    /// Reads of 1 MiB on the devices at the same time, over all disks.
    pub reads_in_flight: usize,
    /// Bytes of frames sent but not yet durable; bounds memory. 48 MiB fill 1 Gbit/s at 150 ms twice over, also
    /// while a segment is being written.
    pub window_bytes: usize,
    /// Limit on the frames' bytes per second.
    pub bytes_per_second: Option<u64>,
    /// Look at nothing further after this time and commit what there is as a partial state: a capture must not be held
    /// open for hours. `None` = go to the end. Of each transfer; one that starts over has the time anew.
    pub time_max: Option<Duration>,
}

impl Default for SendOptions {
    fn default() -> Self {
        Self { reads_in_flight: 4, window_bytes: 48 << 20, bytes_per_second: None, time_max: None }
    }
}

/// Progress of one disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskProgress {
    /// Index in the replica.
    pub disk: u16,
    /// Bytes in the ranges to look at (overlaps counted once each).
    pub total_bytes: u64,
    /// Bytes looked at.
    pub examined_bytes: u64,
    /// Bytes found to differ from the replica.
    pub changed_bytes: u64,
    /// Bytes that became zeros.
    pub zeroed_bytes: u64,
}

/// Progress of a session. Starts over when the transfer does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SendProgress {
    /// Per disk, in the job's order.
    pub disks: Vec<DiskProgress>,
    /// Frames handed to the connection.
    pub frames: u64,
    /// Their bytes.
    pub frame_bytes: u64,
}

/// A recovery point was made, or a partial state on the way to one.
#[derive(Clone, Debug)]
pub struct SendOutcome {
    /// Its id.
    pub point: Uuid,
    /// Byte ranges per disk that were not looked at because the time was up. If there are any, the point is a partial
    /// state: durable, described by the hash tables, the head to build on, and not in the catalogue.
    pub left: Vec<Vec<Range<u64>>>,
    /// Frames written to a connection again because it broke before the server had them.
    pub frames_resent: u64,
    /// Transfers from the beginning because the server lost the session.
    pub restarts: u32,
    /// What went over all connections.
    pub traffic: Arc<Traffic>,
}

impl SendJob {
    pub(crate) fn hello(&self) -> Hello {
        let spec = |disk: &SendDisk| DiskSpec {
            index: disk.index,
            bytes: disk.device.size(),
            key: disk.key.clone(),
        };
        Hello {
            version_min: VERSION,
            version_max: VERSION,
            replica: self.replica,
            purpose: Purpose::Replicate {
                session: self.session,
                generation: self.generation,
                parent: self.parent,
                disks: self.disks.iter().map(spec).collect(),
                fork: self.fork,
            },
        }
    }

    pub(crate) fn commit_request(&self) -> CommitRequest {
        CommitRequest {
            frames: 0,
            time_ms: self.meta.time_ms,
            consistency: self.meta.consistency,
            definition: self.meta.definition.as_ref().map(|definition| definition.to_vec()),
        }
    }

    fn progress(&self) -> SendProgress {
        let disk = |disk: &SendDisk| DiskProgress {
            disk: disk.index,
            total_bytes: disk.ranges.iter().map(|range| range.end.saturating_sub(range.start)).sum(),
            ..DiskProgress::default()
        };
        SendProgress { disks: self.disks.iter().map(disk).collect(), ..SendProgress::default() }
    }

    async fn on_tables(
        &self,
        work: impl Fn(&HashTable) -> Result<(), mainstay_block::hash_table::HashTableError> + Send + 'static,
    ) -> Result<(), ReplicationError> {
        let tables: Vec<_> = self.disks.iter().map(|disk| Arc::clone(&disk.table)).collect();
        let task = mainstay_block::elsewhere::spawn_blocking(move || {
            tables.iter().try_for_each(|table| work(table))
        });
        Ok(task.await.map_err(|error| ReplicationError::internal(&error))??)
    }
}

/// The scan of a job at work. Ends when it is dropped.
struct Scanning {
    task: JoinHandle<Result<(), ReplicationError>>,
}

impl Scanning {
    fn start(
        job: &SendJob,
        options: &SendOptions,
        progress: &watch::Sender<SendProgress>,
        sink: mpsc::Sender<Output>,
    ) -> Self {
        let (job, options, progress) = (job.clone(), options.clone(), progress.clone());
        Self { task: tokio::spawn(async move { scan(&job, &options, &progress, sink).await }) }
    }

    /// Answers when it fails, and never when it does not.
    async fn failure(&mut self) -> ReplicationError {
        match (&mut self.task).await {
            Ok(Ok(())) => std::future::pending().await,
            Ok(Err(error)) => error,
            Err(error) => ReplicationError::internal(&error),
        }
    }

    async fn stop(mut self) {
        if !self.task.is_finished() {
            self.task.abort();
            // How it ended is of no interest any more, only that it has.
            let _ = (&mut self.task).await;
        }
    }
}

impl Drop for Scanning {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Sends what changed and makes it a recovery point; the hash tables then describe it.
///
/// Broken connections are retried until `cancel`; the session goes on where the server is. If the server lost the
/// session everything is sent again, which is valid because the capture is still open.
///
/// # Errors
/// [`ReplicationError::Fenced`], [`ReplicationError::StoreFull`] and other refusals: no recovery point was made and nothing is
/// pending. After [`ReplicationError::Cancelled`] or an error of a local disk the point may exist when the commit was
/// already asked for; the tables are then pending, and [`settle`](crate::settle) decides before the next session.
pub async fn replicate(
    connect: &dyn Connect,
    job: &SendJob,
    options: &SendOptions,
    progress: &watch::Sender<SendProgress>,
    cancel: &CancellationToken,
) -> Result<SendOutcome, ReplicationError> {
    let traffic = Arc::new(Traffic::default());
    let mut frames_resent = 0;
    for restarts in 0..=RESTARTS_MAX {
        progress.send_replace(job.progress());
        let mut link = Link::new(connect, job, options.window_bytes, &traffic);
        let (sink, source) = mpsc::channel(4);
        // A task of its own: reading and comparing go on while a frame is encrypted and sent.
        let mut scanning = Scanning::start(job, options, progress, sink);
        let done = unless_cancelled(cancel, async {
            tokio::select! {
                point = link.run(source, cancel) => point,
                error = scanning.failure() => Err(error),
            }
        })
        .await;
        // It stages hashes: only when it is over can they be committed or abandoned.
        scanning.stop().await;
        frames_resent += link.resent;
        let session = job.session;
        let error = match done {
            Ok(point) => {
                job.on_tables(move |table| table.commit(session, point)).await?;
                return Ok(SendOutcome { point, left: link.left, frames_resent, restarts, traffic });
            }
            Err(error) => error,
        };
        // A refusal is the server's word that there is no point; else, once asked, only it knows.
        let refused = matches!(
            error,
            ReplicationError::Fenced { .. } | ReplicationError::StoreFull | ReplicationError::Refused { .. }
        );
        if refused || !link.commit_sent {
            job.on_tables(move |table| table.abandon(session)).await?;
        }
        match error {
            ReplicationError::Refused { kind: RefusalKind::SessionLost, message } => {
                tracing::warn!(%session, restarts, message, "the server lost the session, sending all of it again");
            }
            error => return Err(error),
        }
    }
    Err(ReplicationError::SessionLost(RESTARTS_MAX))
}
