//! Captures and their transfer: a cycle of replication.
//!
//! A capture that is open costs the guest something, so it is not held open for hours. What does not fit into one goes in
//! *slices*: each takes a capture of its own, sends for a minute, and commits what it has as a partial state, which is
//! never shown as a recovery point. What changed meanwhile is looked at again by the next slice; the slice that comes to
//! the end is the recovery point. A broken transfer thereby also costs a minute of work at most.

use std::{ops::Range, sync::Arc, time::Duration};

use mainstay_block::{BLOCK_BYTES, hash_table::HashTable};
use mainstay_model::{CaptureId, PointId, SessionId};
use mainstay_provider::{
    Capture, CaptureLimits, CaptureRequest, Changed, Consistency, Disk, DiskProgress, ErrorKind, Replicate,
    Replicated, SiteError,
};
use mainstay_replication::{BeforePartial, SendDisk, SendJob, SendOptions, SendProgress, replicate};
use mainstay_store::PointMeta;
use tokio::sync::watch;
use uuid::Uuid;

use super::{Inner, Work, check_generation, data_error};
use crate::records::{Base, ItemFile, Pending};

/// How long the guest may stay frozen: longer, and applications time out.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(5);
/// Scratch space of a capture over all disks; beyond it the capture ends and the cycle is tried again.
const SCRATCH_BYTES_MAX: u64 = 16 << 30;
/// A guest that writes faster than slices carry gets longer ones, up to this.
const SLICE_TIME_MAX: Duration = Duration::from_secs(4 * 3600);
/// What was read when a slice's time is up must still arrive: a slow link may need this many times the slice for it.
const DRAIN_FACTOR: u32 = 4;
/// Least age at which a capture is given up; see [`DRAIN_FACTOR`].
const CAPTURE_AGE_MIN: Duration = Duration::from_secs(30 * 60);

/// How long slices are. Pure, so that it can be tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pace {
    /// As configured.
    least: Duration,
    slice_time: Duration,
    /// Bytes that the last slice looked at.
    examined_bytes: u64,
}

impl Pace {
    fn new(least: Duration) -> Self {
        Self { least, slice_time: least, examined_bytes: 0 }
    }

    /// The next slice, when `changed_bytes` of what had been looked at changed during the last one. Slices that mostly
    /// chase the guest double their time until they come to the end.
    fn next(self, examined_bytes: u64, changed_bytes: u64) -> Self {
        let is_chasing = changed_bytes > examined_bytes / 2;
        let slice_time = if is_chasing { (self.slice_time * 2).min(SLICE_TIME_MAX) } else { self.least };
        Self { slice_time, examined_bytes, ..self }
    }

    fn capture_age_max(self) -> Duration {
        (self.slice_time * DRAIN_FACTOR).max(CAPTURE_AGE_MIN)
    }
}

/// What came of the slices so far.
#[derive(Default)]
struct Sum {
    /// Of each disk: what earlier slices looked at, out of what there was to be looked at when last told.
    disks: Vec<DiskProgress>,
    bytes_changed: u64,
    bytes_moved: u64,
    resynchronized: Option<String>,
}

/// What a cycle has done with each disk: in earlier slices, and in the one that is under way.
fn disks_done(keys: &[String], earlier: &[DiskProgress], now: &SendProgress) -> Vec<DiskProgress> {
    let disk = |(index, (key, now)): (usize, (&String, &mainstay_replication::DiskProgress))| {
        let before = earlier.get(index).map_or(0, |disk| disk.bytes_done);
        DiskProgress {
            key: key.clone(),
            bytes_done: before + now.examined_bytes,
            bytes_total: before + now.total_bytes,
        }
    };
    keys.iter().zip(&now.disks).enumerate().map(disk).collect()
}

/// What a slice is to do.
struct Slice {
    session: SessionId,
    parent: Option<PointId>,
    /// Compare every block whatever the tracker says.
    compare_all: bool,
    /// Blocks per disk to send whatever the tables say.
    resend: Vec<Vec<Range<u64>>>,
    is_first: bool,
    pace: Pace,
}

/// What a slice did.
struct Sliced {
    point: PointId,
    /// Byte ranges per disk that were not looked at.
    left: Vec<Vec<(u64, u64)>>,
    taken_at_ms: i64,
    consistency: Consistency,
    note: String,
    bytes_examined: u64,
    /// Of the bytes to be looked at: those that the tracker had added to what was left.
    bytes_dirtied: u64,
}

impl Inner {
    /// One cycle: capture, compare, ship, commit, in as many slices as it takes. Whatever ends it early, the guest is
    /// unburdened before this returns.
    pub(super) async fn replicate(&self, order: &Replicate, work: &Work) -> Result<Replicated, SiteError> {
        let mut record = self.record(order.item)?;
        check_generation(&record, order.generation)?;
        if record.generation != order.generation {
            record.generation = order.generation;
            self.records.put_item(&record)?;
        }
        let mut sum = Sum::default();
        let mut slice = Slice {
            session: order.session,
            parent: order.parent,
            compare_all: order.compare_all,
            resend: order
                .resend
                .iter()
                .map(|disk| disk.iter().map(|(first, end)| *first..*end).collect())
                .collect(),
            is_first: true,
            pace: Pace::new(self.options.capture_time_max),
        };
        loop {
            let sliced = self.replicate_slice(order, &mut record, &slice, &mut sum, work).await?;
            if sliced.left.iter().all(Vec::is_empty) {
                return Ok(Replicated {
                    point: sliced.point,
                    taken_at_ms: sliced.taken_at_ms,
                    consistency: sliced.consistency,
                    note: sliced.note,
                    bytes_changed: sum.bytes_changed,
                    bytes_moved: sum.bytes_moved,
                    // Everything is new in an initial replication.
                    resynchronized: sum.resynchronized.filter(|_| order.parent.is_some()),
                });
            }
            tracing::info!(item = %order.item, bytes = sliced.bytes_examined, "a slice is in the store; going on");
            slice = Slice {
                session: SessionId(Uuid::now_v7()),
                parent: Some(sliced.point),
                compare_all: false,
                resend: still_to_send(&slice.resend, &sliced.left),
                is_first: false,
                pace: slice.pace.next(sliced.bytes_examined, sliced.bytes_dirtied),
            };
        }
    }

    async fn replicate_slice(
        &self,
        order: &Replicate,
        record: &mut ItemFile,
        slice: &Slice,
        sum: &mut Sum,
        work: &Work,
    ) -> Result<Sliced, SiteError> {
        let sizes = self.disk_sizes(record).await?;
        let tables = self.tables_at(record, &sizes, slice.parent, work).await;
        let (tables, are_known) = tables.map_err(|error| match error.kind {
            // It was the head when this began. A transfer that was broken off has become the head since, and this one has expired.
            ErrorKind::NotFound => SiteError::new(ErrorKind::Unavailable, error.message),
            _ => error,
        })?;
        self.settle_base(record, slice.parent)?;

        let base = record
            .base
            .as_ref()
            .filter(|base| Some(base.point) == slice.parent && are_known && !slice.compare_all);
        let since = base.and_then(|base| base.tracker.clone());
        let left = base.map(|base| base.left.clone()).unwrap_or_default();
        // A freeze is for the recovery point: asked for where this slice may become one.
        let left_bytes: u64 = left.iter().flatten().map(|(start, end)| end - start).sum();
        let may_be_last = slice.is_first || left_bytes <= slice.pace.examined_bytes;
        work.report_disks("Taking a capture", sum.disks.clone(), sum.bytes_moved);
        let request = CaptureRequest {
            capture: CaptureId(Uuid::now_v7()),
            disks: record.disks.clone(),
            since: since.clone(),
            freeze_timeout: (order.application_consistent && may_be_last).then_some(FREEZE_TIMEOUT),
            limits: CaptureLimits {
                scratch_bytes_max: SCRATCH_BYTES_MAX,
                age_max: slice.pace.capture_age_max(),
            },
        };
        let definition = self.hypervisor.definition(record.vm).await?;
        let capture = self.hypervisor.begin_capture(record.vm, request).await?;
        let unknown = capture.disks().iter().find_map(|disk| match &disk.changed {
            Changed::Unknown { reason } => Some(reason.clone()),
            Changed::Since(_) => None,
        });
        let ranges: Vec<_> = capture
            .disks()
            .iter()
            .enumerate()
            .map(|(index, disk)| {
                let left = left.get(index).map(Vec::as_slice).unwrap_or_default();
                let resend = slice.resend.get(index).map(Vec::as_slice).unwrap_or_default();
                ranges(&disk.changed, left, resend, disk.device.size())
            })
            .collect();
        let total: u64 = ranges.iter().flatten().map(|range| range.end - range.start).sum();
        let result =
            self.ship(order, record, &*capture, slice, tables, ranges, definition.0, sum, work).await;
        let (taken_at_ms, consistency) = (capture.taken_at_ms(), capture.consistency());
        let (note, tracker) = (capture.note().to_owned(), capture.tracker().clone());
        // Closed whatever the outcome; a failure to close is worse than a failure to ship, because the guest pays for it.
        let closed = capture.close().await;
        let (point, left) = result?;
        closed?;

        let left_now: u64 = left.iter().flatten().map(|(start, end)| end - start).sum();
        record.base = Some(Base { point, tracker: Some(tracker.clone()), left: left.clone() });
        record.pending = None;
        self.records.put_settled_item(record)?;
        // Old trackers cost memory, not correctness; the next cycle tries again.
        if let Err(error) = self.hypervisor.confirm_tracker(record.vm, &tracker).await {
            tracing::warn!(item = %record.item, %error, "old trackers could not be removed");
        }
        let reason = match (slice.compare_all, &since) {
            (true, _) => Some("it was asked for".to_owned()),
            (false, None) => Some("the changes since the last recovery point were not known".to_owned()),
            (false, Some(_)) => unknown,
        };
        sum.resynchronized = sum.resynchronized.take().or(reason);
        Ok(Sliced {
            point,
            left,
            taken_at_ms,
            consistency,
            note,
            bytes_examined: total.saturating_sub(left_now),
            bytes_dirtied: total.saturating_sub(left_bytes),
        })
    }

    /// Sizes of the item's disks, read from the VM: a disk may have grown since the last capture.
    async fn disk_sizes(&self, record: &ItemFile) -> Result<Vec<u64>, SiteError> {
        let disks = self.hypervisor.disks(record.vm).await?;
        let size = |key: &String| match disks.iter().find(|disk| disk.key == *key) {
            Some(disk) => known_size(disk),
            None => Err(SiteError::new(ErrorKind::NotFound, format!("the VM no longer has disk '{key}'"))
                .with_remedy(
                    "Attach the disk again, or disable replication and enable it without the disk.",
                )),
        };
        record.disks.iter().map(size).collect()
    }

    /// After a crash in the middle of a transfer: the server says that it became the parent, so its tracker counts.
    fn settle_base(&self, record: &mut ItemFile, parent: Option<PointId>) -> Result<(), SiteError> {
        let Some(Pending { tracker, left }) = record.pending.take() else { return Ok(()) };
        if let Some(parent) = parent
            && record.base.as_ref().map(|base| base.point) != Some(parent)
        {
            record.base = Some(Base { point: parent, tracker: Some(tracker), left });
        }
        Ok(self.records.put_item(record)?)
    }

    /// Sends a capture; answers the point and what was left out of it.
    #[expect(clippy::too_many_arguments, reason = "the parts of one slice, all of different kinds")]
    async fn ship(
        &self,
        order: &Replicate,
        record: &mut ItemFile,
        capture: &dyn Capture,
        slice: &Slice,
        tables: Vec<Arc<HashTable>>,
        ranges: Vec<Vec<Range<u64>>>,
        definition: Vec<u8>,
        sum: &mut Sum,
        work: &Work,
    ) -> Result<(PointId, Vec<Vec<(u64, u64)>>), SiteError> {
        record.pending = Some(Pending { tracker: capture.tracker().clone(), left: Vec::new() });
        self.records.put_item(record)?;
        let disks = capture
            .disks()
            .iter()
            .zip(tables)
            .zip(ranges)
            .enumerate()
            .map(|(index, ((disk, table), ranges))| SendDisk {
                index: u16::try_from(index).unwrap_or(u16::MAX),
                key: disk.key.clone(),
                device: disk.device.clone(),
                ranges,
                resend: slice.resend.get(index).cloned().unwrap_or_default(),
                table,
            })
            .collect();
        let job = SendJob {
            replica: order.item.0,
            session: slice.session.0,
            generation: order.generation.0,
            parent: slice.parent.map(|point| point.0),
            // The server knows what it has when it says that nothing of it can be built on.
            fork: slice.parent.is_none(),
            disks,
            meta: PointMeta {
                time_ms: capture.taken_at_ms().unsigned_abs(),
                consistency: match capture.consistency() {
                    Consistency::Crash => mainstay_store::Consistency::Crash,
                    Consistency::Application => mainstay_store::Consistency::App,
                },
                definition: Some(definition.into()),
            },
            before_partial: Some(self.remember_left(record)),
        };
        let options = SendOptions {
            bytes_per_second: order.bytes_per_second_max,
            time_max: Some(slice.pace.slice_time),
            ..SendOptions::default()
        };
        let (sending, mut sent) = watch::channel(SendProgress::default());
        let transfer = replicate(&*self.server, &job, &options, &sending, &work.cancel);
        tokio::pin!(transfer);
        let outcome = loop {
            tokio::select! {
                biased;
                outcome = &mut transfer => break outcome,
                Ok(()) = sent.changed() => {
                    let progress = sent.borrow_and_update().clone();
                    let disks = disks_done(&record.disks, &sum.disks, &progress);
                    work.report_disks("Replicating changes", disks, sum.bytes_moved + progress.frame_bytes);
                }
            }
        };
        let outcome = outcome.map_err(|error| data_error(&error))?;
        sum.disks = disks_done(&record.disks, &sum.disks, &sent.borrow());
        for disk in &sent.borrow().disks {
            sum.bytes_changed += disk.changed_bytes + disk.zeroed_bytes;
        }
        sum.bytes_moved += outcome.traffic.sent() + outcome.traffic.received();
        let left =
            outcome.left.iter().map(|left| left.iter().map(|range| (range.start, range.end)).collect());
        Ok((PointId(outcome.point), left.collect()))
    }

    /// Writes down what a partial state leaves out, before the server is asked for it.
    fn remember_left(&self, record: &ItemFile) -> BeforePartial {
        let (records, record) = (self.records.clone(), record.clone());
        Arc::new(move |left| {
            let mut record = record.clone();
            if let Some(pending) = &mut record.pending {
                let disk =
                    |left: &Vec<Range<u64>>| left.iter().map(|range| (range.start, range.end)).collect();
                pending.left = left.iter().map(disk).collect();
            }
            records.put_item(&record)
        })
    }
}

/// The byte ranges to look at: what the tracker says, what was left and what is sent again, or everything. They may overlap.
fn ranges(changed: &Changed, left: &[(u64, u64)], resend: &[Range<u64>], size: u64) -> Vec<Range<u64>> {
    let everything = || std::iter::once(0..size).filter(|range| !range.is_empty()).collect();
    let resend = resend.iter().map(|blocks| blocks.start * BLOCK_BYTES..(blocks.end * BLOCK_BYTES).min(size));
    match changed {
        Changed::Since(ranges) => {
            let left = left.iter().map(|(start, end)| *start..*end);
            ranges.iter().cloned().chain(left).chain(resend.filter(|range| !range.is_empty())).collect()
        }
        Changed::Unknown { .. } => everything(),
    }
}

/// Of the blocks to send again, those in the byte ranges that were left.
fn still_to_send(resend: &[Vec<Range<u64>>], left: &[Vec<(u64, u64)>]) -> Vec<Vec<Range<u64>>> {
    let disk = |(resend, left): (&Vec<Range<u64>>, &Vec<(u64, u64)>)| {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for blocks in resend {
            for (start, end) in left {
                let (first, end) = (start / BLOCK_BYTES, end.div_ceil(BLOCK_BYTES));
                let both = blocks.start.max(first)..blocks.end.min(end);
                if !both.is_empty() {
                    ranges.push(both);
                }
            }
        }
        ranges.sort_unstable_by_key(|range| range.start);
        ranges
    };
    resend.iter().zip(left).map(disk).collect()
}

/// The size of a VM's disk. One that is not told is not taken for none: tables and staging areas would be made for it.
pub(super) fn known_size(disk: &Disk) -> Result<u64, SiteError> {
    if disk.size_bytes > 0 {
        return Ok(disk.size_bytes);
    }
    Err(SiteError::new(
        ErrorKind::Unavailable,
        format!("the size of the VM's disk '{}' is not known at the moment", disk.key),
    )
    .with_remedy(format!("If this stays, look whether {} is there and whole.", disk.path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_grow_only_while_they_chase_the_guest() {
        const LEAST: Duration = Duration::from_secs(60);
        let pace = Pace::new(LEAST);
        assert_eq!(pace.next(1000, 100).slice_time, LEAST);
        let chasing = pace.next(1000, 900).next(1000, 900);
        assert_eq!(chasing.slice_time, LEAST * 4);
        assert_eq!(chasing.next(1000, 100).slice_time, LEAST);
        let longest = (0..20).fold(pace, |pace, _| pace.next(1000, 900));
        assert_eq!(longest.slice_time, SLICE_TIME_MAX);
        assert!(longest.capture_age_max() > SLICE_TIME_MAX);
    }

    #[test]
    fn progress_goes_on_from_slice_to_slice_for_each_disk() {
        let keys = ["vda".to_owned(), "vdb".to_owned()];
        let sent = |disks: &[(u64, u64)]| SendProgress {
            disks: disks
                .iter()
                .map(|(examined_bytes, total_bytes)| mainstay_replication::DiskProgress {
                    examined_bytes: *examined_bytes,
                    total_bytes: *total_bytes,
                    ..mainstay_replication::DiskProgress::default()
                })
                .collect(),
            ..SendProgress::default()
        };
        let told = |disks: &[DiskProgress]| -> Vec<(String, u64, u64)> {
            disks.iter().map(|disk| (disk.key.clone(), disk.bytes_done, disk.bytes_total)).collect()
        };
        let first = disks_done(&keys, &[], &sent(&[(60, 100), (0, 10)]));
        assert_eq!(told(&first), [("vda".to_owned(), 60, 100), ("vdb".to_owned(), 0, 10)]);
        // Of what was left, and 5 bytes that changed meanwhile.
        let second = disks_done(&keys, &first, &sent(&[(45, 45), (3, 10)]));
        assert_eq!(told(&second), [("vda".to_owned(), 105, 105), ("vdb".to_owned(), 3, 10)]);
    }

    #[test]
    fn what_was_left_is_looked_at_together_with_what_changed() {
        let since = Changed::Since(std::iter::once(0..10).collect());
        assert_eq!(ranges(&since, &[(20, 30)], &[], 100), [0..10, 20..30]);
        let unknown = Changed::Unknown { reason: String::new() };
        assert_eq!(ranges(&unknown, &[(20, 30)], &[], 100), std::iter::once(0..100).collect::<Vec<_>>());
        assert!(ranges(&unknown, &[], &[], 0).is_empty());
    }

    #[test]
    fn what_is_sent_again_is_looked_at_until_it_was() {
        let since = Changed::Since(std::iter::once(0..10).collect());
        // The last block is a piece, and the disk has become smaller than what was asked for.
        let resend = [2..3, 4..9];
        assert_eq!(ranges(&since, &[], &resend, 20_000), [0..10, 8192..12288, 16384..20_000]);
        let all = vec![vec![2..3, 4..9], vec![0..4]];
        assert_eq!(still_to_send(&all, &[vec![], vec![]]), [vec![], vec![]]);
        let left = [vec![(20_480, 32_768)], vec![(0, 4096), (8192, 12_288)]];
        assert_eq!(still_to_send(&all, &left), [std::iter::once(5..8).collect(), vec![0..1, 2..3]]);
    }
}
