//! Bringing local disks to the state of a recovery point: the agent's side of failback.

use std::ops::Range;
use std::sync::Arc;

use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};
use mainstay_block::frame::{Frame, FrameRun, RunKind};
use mainstay_block::hash_table::HashTable;
use mainstay_block::{BLOCK_BYTES, BlockDevice, BlockHasher};
use mainstay_store::BlockRange;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::connect::{Backoff, unless_cancelled};
use crate::message::{FetchRequest, Hello, Purpose, Welcome};
use crate::wire::{Kind, Message, Traffic, VERSION, split};
use crate::{Connect, ReplicationError};

/// Writes to the targets at the same time.
const WRITES_IN_FLIGHT: usize = 8;

/// A disk to be brought to the point's state.
#[derive(Clone)]
pub struct FetchTarget {
    /// Index in the replica.
    pub index: u16,
    /// Where to write; must be at least as large as the point's disk.
    pub device: Arc<dyn BlockDevice>,
    /// Block ranges to fetch besides the difference, e.g. what changed locally since `from`.
    pub extra: Vec<Range<u64>>,
    /// Learns the hashes of what was written, staged under the job's session and committed as the point.
    pub table: Option<Arc<HashTable>>,
}

/// What to fetch.
#[derive(Clone)]
pub struct FetchJob {
    /// The replica.
    pub replica: Uuid,
    /// The point to reach.
    pub to: Uuid,
    /// The point the targets are at; `None`: they hold zeros.
    pub from: Option<Uuid>,
    /// Fetch the difference between `from` and `to`; else only the targets' extra ranges.
    pub difference: bool,
    /// Names the staged hashes; new for every job.
    pub session: Uuid,
    /// The disks. A disk of the point without a target is an error if anything of it is fetched.
    pub targets: Vec<FetchTarget>,
}

/// What was fetched.
#[derive(Clone, Debug)]
pub struct FetchReport {
    /// Bytes written as data.
    pub data_bytes: u64,
    /// Bytes written as zeros.
    pub zero_bytes: u64,
    /// What went over all connections.
    pub traffic: Arc<Traffic>,
}

/// Fetches and applies; everything is flushed when it returns. Broken connections are retried until `cancel`, going on
/// after what was applied. After an error the targets are between the two states; fetching again repairs that.
///
/// # Errors
/// [`ReplicationError::Refused`], [`ReplicationError::Device`], [`ReplicationError::Table`], [`ReplicationError::Cancelled`].
pub async fn fetch(
    connect: &dyn Connect,
    job: &FetchJob,
    cancel: &CancellationToken,
) -> Result<FetchReport, ReplicationError> {
    let traffic = Arc::new(Traffic::default());
    let report = FetchReport { data_bytes: 0, zero_bytes: 0, traffic };
    let mut fetching = Fetching { job, report, resume: (0, 0) };
    let mut backoff = Backoff::new();
    let done = loop {
        match unless_cancelled(cancel, fetching.connection(connect, &mut backoff)).await {
            Err(error) if error.is_transient() => {
                tracing::debug!(%error, resume = ?fetching.resume, "fetch lost its connection, will go on");
                if let Err(error) = backoff.pause(cancel).await {
                    break Err(error);
                }
            }
            done => break done,
        }
    };
    let done = match done {
        Ok(()) => fetching.finish().await,
        failed => failed,
    };
    if done.is_err() {
        for table in job.targets.iter().filter_map(|target| target.table.as_ref()) {
            table.abandon(job.session)?;
        }
    }
    done.map(|()| fetching.report)
}

struct Fetching<'a> {
    job: &'a FetchJob,
    report: FetchReport,
    /// Everything before this disk and block is applied.
    resume: (u16, u64),
}

impl Fetching<'_> {
    async fn connection(
        &mut self,
        connect: &dyn Connect,
        backoff: &mut Backoff,
    ) -> Result<(), ReplicationError> {
        let (mut receiver, transmitter) = split(connect.connect().await?, &self.report.traffic);
        let extra = self.job.targets.iter().flat_map(|target| {
            let ranges = target.extra.iter().map(|range| (target.index, range.clone()));
            ranges.map(|(disk, range)| BlockRange { disk, first: range.start, end: range.end })
        });
        let request = FetchRequest {
            to: self.job.to,
            from: self.job.from,
            difference: self.job.difference,
            extra: extra.collect(),
            resume: self.resume,
        };
        let purpose = Purpose::Fetch(request);
        let hello = Hello { version_min: VERSION, version_max: VERSION, replica: self.job.replica, purpose };
        transmitter.send(&Message::control(Kind::Hello, 0, &hello)?).await?;
        match receiver.expect(Kind::Welcome).await?.body()? {
            Welcome::Point { .. } => {}
            _ => return Err(ReplicationError::Protocol("unexpected welcome")),
        }
        backoff.reset();
        // Only while we wait for frames do we owe the server a sign of life, and then it is sending.
        let mut due = 1;
        loop {
            let message = receiver.receive().await?;
            match message.kind {
                Kind::Frame if message.tag == due => {
                    due += 1;
                    let task =
                        mainstay_block::elsewhere::spawn_blocking(move || Frame::decode(&message.payload))
                            .await;
                    self.apply(&task.map_err(|error| ReplicationError::internal(&error))??).await?;
                }
                Kind::Done if message.tag + 1 == due => {
                    return transmitter.send(&Message::new(Kind::Done, 0, bytes::Bytes::new())).await;
                }
                _ => return Err(ReplicationError::Protocol("unexpected message")),
            }
        }
    }

    async fn apply(&mut self, frame: &Frame) -> Result<(), ReplicationError> {
        let job = self.job;
        let writes = stream::iter(frame.parts()).map(|(run, data)| write(job, run, data).boxed());
        let written = writes.buffer_unordered(WRITES_IN_FLIGHT).try_collect::<Vec<(u64, bool)>>().await?;
        for (bytes, data) in written {
            *(if data { &mut self.report.data_bytes } else { &mut self.report.zero_bytes }) += bytes;
        }
        if let Some(last) = frame.runs.last() {
            self.resume = (last.disk, last.block + u64::from(last.count));
        }
        Ok(())
    }

    async fn finish(&self) -> Result<(), ReplicationError> {
        for target in &self.job.targets {
            let device = |source| ReplicationError::Device { disk: target.index, source };
            target.device.flush().await.map_err(device)?;
            if let Some(table) = &target.table {
                let (table, session, point) = (Arc::clone(table), self.job.session, self.job.to);
                let task = mainstay_block::elsewhere::spawn_blocking(move || {
                    table.prepare(session)?;
                    table.commit(session, point)
                });
                task.await.map_err(|error| ReplicationError::internal(&error))??;
            }
        }
        Ok(())
    }
}

/// Writes one run; the padding of a partial last block is cut off.
async fn write(job: &FetchJob, run: FrameRun, data: bytes::Bytes) -> Result<(u64, bool), ReplicationError> {
    let target = job.targets.iter().find(|target| target.index == run.disk);
    let target = target.ok_or(ReplicationError::Protocol("data of a disk without a target"))?;
    let device = |source| ReplicationError::Device { disk: target.index, source };
    let offset = run.block * BLOCK_BYTES;
    let length = u64::from(run.count) * BLOCK_BYTES;
    let length = length.min(target.device.size().saturating_sub(offset));
    if run.kind == RunKind::Zero {
        target.device.write_zeroes(offset, length).await.map_err(device)?;
        if let Some(table) = &target.table {
            table.stage_zeros(job.session, run.block, u64::from(run.count))?;
        }
        return Ok((length, false));
    }
    if let Some(table) = &target.table {
        let hasher = BlockHasher::new(table.key());
        let content = data.clone();
        let task = mainstay_block::elsewhere::spawn_blocking(move || hasher.hash_all(&content)).await;
        let hashes = task.map_err(|error| ReplicationError::internal(&error))?;
        table.stage(job.session, run.block, &hashes)?;
    }
    target.device.write(offset, data.slice(..length as usize)).await.map_err(device)?;
    Ok((length, true))
}
