//! The home side of a failback: the difference is staged over the old disks, proved, and only then merged.

use std::{ops::Range, sync::Arc};

use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use mainstay_block::{
    BLOCK_BYTES, BlockDevice, BlockError, BlockHasher, ExtentKind, HashKey,
    hash_table::{Fill, HashTable, Verdict},
};
use mainstay_model::{CaptureId, ItemId, PointId, VmId};
use mainstay_provider::{
    CaptureLimits, CaptureRequest, CapturedDisk, Changed, CommitHome, ErrorKind, HomePrepared, PowerState,
    PrepareHome, SiteError, StageHome, Staged, StagingDisk, StagingSpec, Verified, VerifyHome,
};
use mainstay_replication::{FetchJob, FetchTarget, Mount, MountOptions, fetch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{Inner, Work, check_generation, data_error, tables::table_error};
use crate::records::{Base, ItemFile, StagingFile};

/// Bytes read and hashed at once: enough to keep a disk busy, little enough to report progress.
const PIECE_BYTES: u64 = 1 << 20;
/// Pieces in flight.
const PIECES_IN_FLIGHT: usize = 8;

fn block_error(key: &str) -> impl Fn(BlockError) -> SiteError + '_ {
    move |error| SiteError::new(ErrorKind::Failed, format!("disk '{key}': {error}"))
}

fn spec(record: &ItemFile, staging: &StagingFile) -> StagingSpec {
    let disk = |(key, size_bytes): &(String, u64)| StagingDisk { key: key.clone(), size_bytes: *size_bytes };
    StagingSpec { vm: record.vm, item: record.item, disks: staging.disks.iter().map(disk).collect() }
}

impl Inner {
    pub(super) async fn prepare_home(&self, order: PrepareHome) -> Result<HomePrepared, SiteError> {
        let present = self.records.item(order.item)?.filter(|present| present.vm == order.vm);
        if let Some(present) = &present {
            check_generation(present, order.generation)?;
        }
        let was_created = match self.hypervisor.power(order.vm).await {
            Ok(PowerState::Off) => false,
            Ok(power) => {
                return Err(SiteError::new(
                    ErrorKind::Refused,
                    format!("the home VM {} is {power:?}; it must be off during a failback", order.vm),
                )
                .with_remedy(
                    "Shut it down at home: what it writes now would be lost. Then start the failback again.",
                ));
            }
            Err(error) if error.kind == ErrorKind::NotFound => {
                let Some(definition) = &order.create_from else { return Err(error) };
                let disk = |(key, size_bytes): &(String, u64)| StagingDisk {
                    key: key.clone(),
                    size_bytes: *size_bytes,
                };
                let disks = order.disks.iter().map(disk).collect();
                let spec = StagingSpec { vm: order.vm, item: order.item, disks };
                self.hypervisor.create_home_vm(order.vm, definition, &spec).await?;
                true
            }
            Err(error) => return Err(error),
        };
        // Prepared before, by a job that was interrupted: what was staged still counts.
        let staging =
            present.as_ref().and_then(|present| present.staging.clone()).unwrap_or_else(|| StagingFile {
                disks: order.disks.clone(),
                is_blank: was_created || present.as_ref().is_none_or(|present| present.base.is_none()),
                touched: vec![Vec::new(); order.disks.len()],
                ..StagingFile::default()
            });
        let is_blank = staging.is_blank;
        let record = ItemFile {
            item: order.item,
            vm: order.vm,
            disks: order.disks.iter().map(|(key, _)| key.clone()).collect(),
            generation: order.generation,
            base: present.as_ref().and_then(|present| present.base.clone()),
            pending_tracker: present.as_ref().and_then(|present| present.pending_tracker.clone()),
            autostart_before: present.as_ref().and_then(|present| present.autostart_before),
            staging: Some(staging),
        };
        self.records.put_item(&record)?;
        self.hold_staging(&record).await?;
        let host = self.hypervisor.host().await?;
        let prevention = host.capabilities.iter().find(|capability| capability.name == "StartPrevention");
        let is_start_prevented = prevention.is_none_or(|capability| capability.is_available);
        Ok(HomePrepared { was_created: is_blank, is_start_prevented })
    }

    /// Opens an item's staging area and keeps it open.
    pub(super) async fn hold_staging(&self, record: &ItemFile) -> Result<(), SiteError> {
        let Some(staging) = &record.staging else { return Ok(()) };
        let mut stagings = self.stagings.lock().await;
        if !stagings.contains_key(&record.item) {
            stagings.insert(record.item, self.hypervisor.open_staging(&spec(record, staging)).await?);
        }
        Ok(())
    }

    /// The open staging area's devices; an error if somebody changed the home disk beneath.
    async fn staging_devices(&self, record: &ItemFile) -> Result<Vec<Arc<dyn BlockDevice>>, SiteError> {
        self.hold_staging(record).await?;
        let stagings = self.stagings.lock().await;
        let staging = stagings
            .get(&record.item)
            .ok_or_else(|| SiteError::new(ErrorKind::Failed, "the staging area is not open"))?;
        if staging.is_base_changed().await? {
            return Err(SiteError::new(
                ErrorKind::Refused,
                format!("the home disks of VM {} were changed while the failback was staged over them", record.vm),
            )
            .with_remedy(
                "Somebody started the home VM or wrote to its disks. Cancel the failback and start it again; the VM at the recovery site is not affected.",
            ));
        }
        Ok(staging.devices().to_vec())
    }

    pub(super) async fn stage_home(&self, order: &StageHome, work: &Work) -> Result<Staged, SiteError> {
        let mut record = self.record(order.item)?;
        let Some(mut staging) = record.staging.clone() else {
            return Err(SiteError::new(
                ErrorKind::Failed,
                format!("item {} has no staging area", order.item),
            ));
        };
        if staging.at == Some(order.to) {
            return Ok(Staged { bytes_changed: 0, bytes_moved: 0, bytes_hashed: 0 });
        }
        let devices = self.staging_devices(&record).await?;
        let sizes: Vec<_> = staging.disks.iter().map(|(_, size)| *size).collect();
        let is_full = order.full || staging.is_blank;
        let (tables, extras, from, bytes_hashed) = if is_full {
            let tables = self.created_tables(&record, &sizes, Fill::Unknown)?;
            let extras = sizes.iter().map(|size| vec![0..size.div_ceil(BLOCK_BYTES)]).collect();
            (tables, extras, None, 0)
        } else if let Some(at) = staging.at {
            let (tables, _) = self.tables_at(&record, &sizes, Some(at), work).await?;
            (tables, vec![Vec::new(); sizes.len()], Some(at), 0)
        } else {
            self.local_differences(&record, &sizes, work).await?
        };
        let names: Vec<_> = staging.disks.iter().map(|(key, _)| key.clone()).collect();
        let touched: Vec<_> = devices.into_iter().map(|device| Arc::new(Touched::new(device))).collect();
        let targets = touched
            .iter()
            .zip(&tables)
            .zip(extras)
            .enumerate()
            .map(|(index, ((device, table), extra))| FetchTarget {
                index: u16::try_from(index).unwrap_or(u16::MAX),
                device: device.clone(),
                extra,
                table: Some(table.clone()),
            })
            .collect();
        work.report("Fetching what changed at the recovery site", 0, 0, 0);
        let job = FetchJob {
            replica: order.item.0,
            to: order.to.0,
            from: from.map(|point| point.0),
            difference: !is_full,
            session: Uuid::new_v4(),
            targets,
        };
        let report = fetch(&*self.server, &job, &work.cancel).await.map_err(|error| data_error(&error))?;
        tracing::info!(item = %order.item, ?names, bytes = report.data_bytes, "changes were staged at home");
        for (all, new) in staging.touched.iter_mut().zip(&touched) {
            all.extend(new.ranges());
            merge(all);
        }
        staging.at = Some(order.to);
        staging.is_blank = false;
        record.staging = Some(staging);
        self.records.put_item(&record)?;
        Ok(Staged {
            bytes_changed: report.data_bytes + report.zero_bytes,
            bytes_moved: report.traffic.sent() + report.traffic.received(),
            bytes_hashed,
        })
    }

    /// What differs between the home disks and the point that their hash tables describe: what the tracker says, or
    /// everything, compared by hash. Answers tables, differing block ranges per disk, the point, bytes hashed.
    #[expect(
        clippy::type_complexity,
        reason = "the four parts of one answer, taken apart at its only caller"
    )]
    async fn local_differences(
        &self,
        record: &ItemFile,
        sizes: &[u64],
        work: &Work,
    ) -> Result<(Vec<Arc<HashTable>>, Vec<Vec<Range<u64>>>, Option<PointId>, u64), SiteError> {
        let base = record.base.as_ref().ok_or_else(|| {
            SiteError::new(ErrorKind::Failed, "what the home disks were replicated as is not known")
        })?;
        let (tables, are_known) = self.tables_at(record, sizes, Some(base.point), work).await?;
        let request = CaptureRequest {
            capture: CaptureId(Uuid::now_v7()),
            disks: record.disks.clone(),
            since: base.tracker.clone().filter(|_| are_known),
            freeze_timeout: None,
            limits: CaptureLimits { scratch_bytes_max: u64::MAX, age_max: std::time::Duration::MAX },
        };
        let capture = self.hypervisor.begin_capture(record.vm, request).await?;
        let compared = async {
            let mut differences = Vec::new();
            let mut bytes_hashed = 0;
            for (disk, table) in capture.disks().iter().zip(&tables) {
                let (ranges, bytes) = compare(disk, table, work).await?;
                differences.push(ranges);
                bytes_hashed += bytes;
            }
            Ok::<_, SiteError>((differences, bytes_hashed))
        };
        let compared = tokio::select! {
            () = work.cancel.cancelled() => Err(SiteError::new(ErrorKind::Cancelled, "cancelled while comparing")),
            compared = compared => compared,
        };
        capture.close().await?;
        let (differences, bytes_hashed) = compared?;
        Ok((tables, differences, Some(base.point), bytes_hashed))
    }

    pub(super) async fn verify_home(&self, order: &VerifyHome, work: &Work) -> Result<Verified, SiteError> {
        let record = self.record(order.item)?;
        let Some(staging) = record.staging.as_ref() else {
            // Merged already by an interrupted job: it was proved before it was merged.
            return Ok(Verified { bytes_compared: 0, bytes_different: 0 });
        };
        if staging.at != Some(order.to) {
            return Err(SiteError::new(
                ErrorKind::Failed,
                format!("the staging area is not at point {}", order.to),
            ));
        }
        let devices = self.staging_devices(&record).await?;
        let stop = work.cancel.child_token();
        let _stop_on_drop = stop.clone().drop_guard();
        let mount = Mount::open(
            self.server.clone(),
            order.item.0,
            order.to.0,
            &MountOptions::default(),
            CancellationToken::clone(&stop),
        )
        .await
        .map_err(|error| data_error(&error))?;
        // A key that neither side knew before: agreement cannot be an accident of how the data got here.
        let key = HashKey(rand::random());
        let hasher = BlockHasher::new(key);
        let total: u64 =
            staging.touched.iter().flatten().map(|(first, end)| (end - first) * BLOCK_BYTES).sum();
        let mut verified = Verified { bytes_compared: 0, bytes_different: 0 };
        for (index, ((device, touched), (name, _))) in
            devices.iter().zip(&staging.touched).zip(&staging.disks).enumerate()
        {
            let remote = u16::try_from(index).ok().and_then(|index| mount.disk(index)).ok_or_else(|| {
                SiteError::new(
                    ErrorKind::NotFound,
                    format!("recovery point {} has no disk '{name}'", order.to),
                )
            })?;
            let pieces: Vec<_> = touched.iter().flat_map(|(first, end)| pieces(*first, *end)).collect();
            let mut compared = stream::iter(pieces)
                .map(|piece| {
                    let (device, remote) = (device.clone(), remote.clone());
                    async move {
                        let offset = piece.start * BLOCK_BYTES;
                        let length = ((piece.end - piece.start) * BLOCK_BYTES).min(device.size() - offset);
                        let data = device.read(offset, length).await.map_err(block_error(name))?;
                        let theirs = remote
                            .hashes(key, piece.start, piece.end - piece.start)
                            .await
                            .map_err(|error| data_error(&error))?;
                        let ours = tokio::task::spawn_blocking(move || hasher.hash_all(&data))
                            .await
                            .map_err(|error| SiteError::new(ErrorKind::Failed, error.to_string()))?;
                        let different =
                            ours.iter().zip(&theirs).filter(|(ours, theirs)| ours != theirs).count()
                                + ours.len().abs_diff(theirs.len());
                        Ok::<_, SiteError>((length, different as u64 * BLOCK_BYTES))
                    }
                })
                .buffer_unordered(PIECES_IN_FLIGHT);
            while let Some((bytes, different)) = compared.try_next().await? {
                verified.bytes_compared += bytes;
                verified.bytes_different += different;
                work.report("Proving that home equals the recovery VM", verified.bytes_compared, total, 0);
            }
        }
        Ok(verified)
    }

    pub(super) async fn commit_home(&self, order: &CommitHome) -> Result<(), SiteError> {
        let mut record = self.record(order.item)?;
        if record.staging.as_ref().is_some_and(|staging| staging.at != Some(order.to)) {
            return Err(SiteError::new(
                ErrorKind::Failed,
                format!("the staging area is not at point {}", order.to),
            ));
        }
        if record.staging.is_none() && record.base.as_ref().map(|base| base.point) == Some(order.to) {
            return Ok(());
        }
        self.close_staging(order.item).await?;
        self.hypervisor.commit_staging(order.vm).await?;
        // Old trackers tell from a point that is history.
        self.hypervisor.remove_trackers(order.vm).await?;
        record.base = Some(Base { point: order.to, tracker: None });
        record.pending_tracker = None;
        record.staging = None;
        Ok(self.records.put_item(&record)?)
    }

    pub(super) async fn discard_home(&self, item: ItemId, vm: VmId) -> Result<(), SiteError> {
        let Some(mut record) = self.records.item(item)? else { return Ok(()) };
        let Some(staging) = record.staging.clone() else { return Ok(()) };
        self.close_staging(item).await?;
        match self.hypervisor.discard_staging(vm).await {
            Err(error) if error.kind == ErrorKind::NotFound => {}
            result => result?,
        }
        // The tables may describe what was staged; the disks are what they were. No tracker tells the one from the other,
        // so the next failback compares.
        record.base = match (staging.at, record.base) {
            (Some(at), Some(_)) => {
                Some(Base { point: at, tracker: Some(mainstay_provider::TrackerId("none".to_owned())) })
            }
            (None, base) => base,
            (Some(_), None) => None,
        };
        record.staging = None;
        Ok(self.records.put_item(&record)?)
    }

    async fn close_staging(&self, item: ItemId) -> Result<(), SiteError> {
        match self.stagings.lock().await.remove(&item) {
            Some(staging) => staging.close().await,
            None => Ok(()),
        }
    }
}

/// Compares a disk's possibly changed ranges with its table.
async fn compare(
    disk: &CapturedDisk,
    table: &Arc<HashTable>,
    work: &Work,
) -> Result<(Vec<Range<u64>>, u64), SiteError> {
    let size = disk.device.size();
    let ranges = match &disk.changed {
        Changed::Since(ranges) => ranges.clone(),
        Changed::Unknown { reason } => {
            tracing::info!(disk = disk.key, reason, "the home disk is compared by hashes");
            std::iter::once(0..size).filter(|range| !range.is_empty()).collect()
        }
    };
    let total: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    let mut differing: Vec<(u64, u64)> = Vec::new();
    let mut done = 0;
    for range in ranges {
        let first = range.start / BLOCK_BYTES;
        let end = range.end.min(size).div_ceil(BLOCK_BYTES);
        let mut found = stream::iter(pieces(first, end))
            .map(|piece| compare_piece(disk, table.clone(), piece))
            .buffer_unordered(PIECES_IN_FLIGHT);
        while let Some((blocks, ranges)) = found.try_next().await? {
            differing.extend(ranges);
            done += blocks * BLOCK_BYTES;
            work.report("Comparing the home disks", done, total, 0);
        }
    }
    merge(&mut differing);
    Ok((differing.into_iter().map(|(first, end)| first..end).collect(), done))
}

async fn compare_piece(
    disk: &CapturedDisk,
    table: Arc<HashTable>,
    piece: Range<u64>,
) -> Result<(u64, Vec<(u64, u64)>), SiteError> {
    let offset = piece.start * BLOCK_BYTES;
    let length = ((piece.end - piece.start) * BLOCK_BYTES).min(disk.device.size() - offset);
    let extents = disk.device.extents(offset, length).await.map_err(block_error(&disk.key))?;
    let blocks = piece.end - piece.start;
    if extents.iter().all(|extent| extent.kind == ExtentKind::Zero) {
        let found = table.not_zero(piece.start, blocks).map_err(|error| table_error(&error))?;
        return Ok((blocks, found.into_iter().map(|(first, count)| (first, first + count)).collect()));
    }
    let data = disk.device.read(offset, length).await.map_err(block_error(&disk.key))?;
    let compared = tokio::task::spawn_blocking(move || {
        table.compare(piece.start, &data).map(|verdicts| (piece, verdicts))
    })
    .await
    .map_err(|error| SiteError::new(ErrorKind::Failed, error.to_string()))?;
    let (piece, verdicts) = compared.map_err(|error| table_error(&error))?;
    let differing = verdicts
        .iter()
        .enumerate()
        .filter(|(_, verdict)| !matches!(verdict, Verdict::Same))
        .map(|(index, _)| (piece.start + index as u64, piece.start + index as u64 + 1))
        .collect();
    Ok((blocks, differing))
}

/// Cuts a block range into pieces.
fn pieces(first: u64, end: u64) -> impl Iterator<Item = Range<u64>> {
    let step = PIECE_BYTES / BLOCK_BYTES;
    (first..end).step_by(step as usize).map(move |start| start..(start + step).min(end))
}

/// Sorts ranges and joins those that touch.
fn merge(ranges: &mut Vec<(u64, u64)>) {
    ranges.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (first, end) in ranges.drain(..) {
        match merged.last_mut() {
            Some(last) if first <= last.1 => last.1 = last.1.max(end),
            _ => merged.push((first, end)),
        }
    }
    *ranges = merged;
}

/// A device that remembers which blocks were written, for the proof.
struct Touched {
    device: Arc<dyn BlockDevice>,
    ranges: std::sync::Mutex<Vec<(u64, u64)>>,
}

impl Touched {
    fn new(device: Arc<dyn BlockDevice>) -> Self {
        Self { device, ranges: std::sync::Mutex::default() }
    }

    fn note(&self, offset: u64, length: u64) {
        super::lock(&self.ranges).push((offset / BLOCK_BYTES, (offset + length).div_ceil(BLOCK_BYTES)));
    }

    fn ranges(&self) -> Vec<(u64, u64)> {
        super::lock(&self.ranges).clone()
    }
}

#[async_trait::async_trait]
impl BlockDevice for Touched {
    fn size(&self) -> u64 {
        self.device.size()
    }

    async fn read(&self, offset: u64, length: u64) -> Result<bytes::Bytes, BlockError> {
        self.device.read(offset, length).await
    }

    async fn write(&self, offset: u64, data: bytes::Bytes) -> Result<(), BlockError> {
        self.note(offset, data.len() as u64);
        self.device.write(offset, data).await
    }

    async fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.note(offset, length);
        self.device.write_zeroes(offset, length).await
    }

    async fn flush(&self) -> Result<(), BlockError> {
        self.device.flush().await
    }

    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<mainstay_block::Extent>, BlockError> {
        self.device.extents(offset, length).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_joined_where_they_touch() {
        let mut ranges = vec![(5, 7), (0, 2), (2, 3), (6, 9)];
        merge(&mut ranges);
        assert_eq!(ranges, [(0, 3), (5, 9)]);
    }

    #[test]
    fn pieces_cover_the_range_exactly() {
        let all: Vec<_> = pieces(3, 600).collect();
        assert_eq!(all.first(), Some(&(3..259)));
        assert_eq!(all.last().map(|piece| piece.end), Some(600));
        assert!(all.windows(2).all(|pair| pair[0].end == pair[1].start));
    }
}
