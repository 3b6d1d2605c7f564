//! The home side of a failback: the difference is staged over the old disks, proved, and only then merged.

use std::{ops::Range, sync::Arc};

use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use mainstay_block::{
    BLOCK_BYTES, BlockDevice, BlockHasher, HashKey, blocks_of,
    hash_table::{Fill, HashTable},
};
use mainstay_model::{CaptureId, ItemId, PointId, VmId};
use mainstay_provider::{
    CaptureLimits, CaptureRequest, CapturedDisk, Changed, CommitHome, ErrorKind, HomePrepared, PowerState,
    PrepareHome, SiteError, StageHome, Staged, StagingDisk, StagingSpec, Verified, VerifyHome,
};
use mainstay_replication::{FetchJob, FetchReport, FetchTarget, Mount, MountOptions, fetch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    Inner, Work, check_generation,
    compare::{PIECES_IN_FLIGHT, Touched, block_error, compare, merge, pieces},
    data_error, tail,
    transfer::known_size,
};
use crate::records::{Base, ItemFile, StagingFile};

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
        let staged = present.as_ref().and_then(|present| present.staging.clone()).filter(|_| !was_created);
        let staging = match staged {
            Some(staged) => staged,
            None => StagingFile {
                disks: if was_created { order.disks.clone() } else { self.home_sizes(&order).await? },
                is_blank: was_created || present.as_ref().is_none_or(|present| present.base.is_none()),
                touched: vec![Vec::new(); order.disks.len()],
                ..StagingFile::default()
            },
        };
        let is_blank = staging.is_blank;
        let record = ItemFile {
            item: order.item,
            vm: order.vm,
            disks: order.disks.iter().map(|(key, _)| key.clone()).collect(),
            generation: order.generation,
            base: present.as_ref().and_then(|present| present.base.clone()),
            pending: present.as_ref().and_then(|present| present.pending.clone()),
            autostart_before: present.as_ref().and_then(|present| present.autostart_before),
            is_waiting: false,
            staging: Some(staging),
        };
        self.records.put_item(&record)?;
        self.hold_staging(&record).await?;
        let host = self.hypervisor.host().await?;
        let prevention = host.capabilities.iter().find(|capability| capability.name == "StartPrevention");
        let is_start_prevented = prevention.is_none_or(|capability| capability.is_available);
        Ok(HomePrepared { was_created: is_blank, is_start_prevented })
    }

    /// The disks to stage: as large as at home, where they may have grown since the recovery point, or larger.
    async fn home_sizes(&self, order: &PrepareHome) -> Result<Vec<(String, u64)>, SiteError> {
        let disks = self.hypervisor.disks(order.vm).await?;
        let size = |(key, point_bytes): &(String, u64)| {
            let disk = disks.iter().find(|disk| disk.key == *key);
            let size_bytes = disk.map(known_size).transpose()?;
            Ok((key.clone(), size_bytes.unwrap_or(0).max(*point_bytes)))
        };
        order.disks.iter().map(size).collect()
    }

    /// Opens an item's staging area and keeps it open.
    pub(super) async fn hold_staging(&self, record: &ItemFile) -> Result<(), SiteError> {
        let Some(staging) = &record.staging else { return Ok(()) };
        let mut stagings = self.stagings.lock().await;
        if let std::collections::hash_map::Entry::Vacant(e) = stagings.entry(record.item) {
            e.insert(self.hypervisor.open_staging(&spec(record, staging)).await?);
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
        self.grow_staging(&mut record, &mut staging, &order.disks).await?;
        let devices = self.staging_devices(&record).await?;
        let touched: Vec<_> = devices.into_iter().map(|device| Arc::new(Touched::new(device))).collect();
        let fetched = self.fetch_differences(order, &record, &staging, &touched, work).await;
        let (report, bytes_hashed) = match fetched {
            // What home equals is not in the store any more, or never was: its content still tells what differs.
            Err(error) if error.kind == ErrorKind::NotFound => {
                tracing::warn!(item = %order.item, %error, "home is compared with the recovery point by hashes");
                self.fetch_compared(order, &record, &staging, &touched, work).await?
            }
            fetched => fetched?,
        };
        tracing::info!(item = %order.item, bytes = report.data_bytes, "changes were staged at home");
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

    /// Makes the staging area as large as the disks have become at the recovery site since it was begun.
    async fn grow_staging(
        &self,
        record: &mut ItemFile,
        staging: &mut StagingFile,
        disks: &[(String, u64)],
    ) -> Result<(), SiteError> {
        let mut has_grown = false;
        for (key, size_bytes) in &mut staging.disks {
            let now = disks.iter().find(|(other, _)| other == key).map_or(*size_bytes, |(_, size)| *size);
            has_grown |= now > *size_bytes;
            *size_bytes = now.max(*size_bytes);
        }
        if !has_grown {
            return Ok(());
        }
        // Written down first: whoever opens it next opens it at this size.
        record.staging = Some(staging.clone());
        self.records.put_item(record)?;
        self.close_staging(record.item).await
    }

    /// Fetches what differs between the point that home equals and the one to reach.
    async fn fetch_differences(
        &self,
        order: &StageHome,
        record: &ItemFile,
        staging: &StagingFile,
        touched: &[Arc<Touched>],
        work: &Work,
    ) -> Result<(FetchReport, u64), SiteError> {
        let sizes: Vec<_> = staging.disks.iter().map(|(_, size)| *size).collect();
        let is_full = order.full || staging.is_blank;
        let (tables, extras, from, bytes_hashed) = if is_full {
            let tables = self.created_tables(record, &sizes, Fill::Unknown)?;
            let extras =
                sizes.iter().map(|size| std::iter::once(0..size.div_ceil(BLOCK_BYTES)).collect()).collect();
            (tables, extras, None, 0)
        } else if let Some(at) = staging.at {
            let (tables, _) = self.tables_at(record, &sizes, Some(at), work).await?;
            (tables, vec![Vec::new(); sizes.len()], Some(at), 0)
        } else {
            self.local_differences(record, &sizes, work).await?
        };
        let report = self.fetch_home(order, from, touched, &tables, extras, work).await?;
        Ok((report, bytes_hashed))
    }

    /// Fetches the blocks in which home and the point to reach differ by their hashes.
    async fn fetch_compared(
        &self,
        order: &StageHome,
        record: &ItemFile,
        staging: &StagingFile,
        touched: &[Arc<Touched>],
        work: &Work,
    ) -> Result<(FetchReport, u64), SiteError> {
        let sizes: Vec<_> = staging.disks.iter().map(|(_, size)| *size).collect();
        let tables = self.rebuilt_tables(record, &sizes, order.to.0, work).await?;
        let (mut extras, mut bytes_hashed) = (Vec::new(), 0);
        for ((device, table), (key, _)) in touched.iter().zip(&tables).zip(&staging.disks) {
            let reason = "home equals no recovery point of the store".to_owned();
            let changed = Changed::Unknown { reason };
            let disk = CapturedDisk { key: key.clone(), device: device.clone(), changed };
            let compared = tokio::select! {
                () = work.cancel.cancelled() => {
                    return Err(SiteError::new(ErrorKind::Cancelled, "cancelled while comparing"));
                }
                compared = compare(&disk, table, work) => compared,
            };
            let (ranges, bytes) = compared?;
            extras.push(ranges);
            bytes_hashed += bytes;
        }
        let report = self.fetch_home(order, None, touched, &tables, extras, work).await?;
        Ok((report, bytes_hashed))
    }

    async fn fetch_home(
        &self,
        order: &StageHome,
        from: Option<PointId>,
        touched: &[Arc<Touched>],
        tables: &[Arc<HashTable>],
        extras: Vec<Vec<Range<u64>>>,
        work: &Work,
    ) -> Result<FetchReport, SiteError> {
        work.report("Fetching what changed at the recovery site", 0, 0, 0);
        let session = Uuid::new_v4();
        for ((device, table), (key, point_bytes)) in touched.iter().zip(tables).zip(&order.disks) {
            tail::clear(key, &**device, table, session, *point_bytes).await?;
        }
        let targets = touched
            .iter()
            .zip(tables)
            .zip(extras)
            .enumerate()
            .map(|(index, ((device, table), extra))| FetchTarget {
                index: u16::try_from(index).unwrap_or(u16::MAX),
                device: device.clone(),
                extra,
                table: Some(table.clone()),
            })
            .collect();
        let job = FetchJob {
            replica: order.item.0,
            to: order.to.0,
            from: from.map(|point| point.0),
            difference: from.is_some(),
            session,
            targets,
        };
        fetch(&*self.server, &job, &work.cancel).await.map_err(|error| data_error(&error))
    }

    /// What differs between the home disks and the point that their hash tables describe: what the tracker says, or
    /// everything, compared by hash. Answers tables, differing block ranges per disk, the point, bytes hashed.
    async fn local_differences(
        &self,
        record: &ItemFile,
        sizes: &[u64],
        work: &Work,
    ) -> Result<(Vec<Arc<HashTable>>, Vec<Vec<Range<u64>>>, Option<PointId>, u64), SiteError> {
        let base = record.base.as_ref().ok_or_else(|| {
            SiteError::new(ErrorKind::Failed, "what the home disks were replicated as is not known")
        })?;
        // The last transfer may have become a point without this host having heard of it: its tables then describe that.
        let described = self.described_point(record, sizes, work).await?;
        let point = described.unwrap_or(base.point);
        let (tables, are_known) = self.tables_at(record, sizes, Some(point), work).await?;
        let request = CaptureRequest {
            capture: CaptureId(Uuid::now_v7()),
            disks: record.disks.clone(),
            since: base.tracker.clone().filter(|_| are_known && point == base.point && base.is_whole()),
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
        Ok((tables, differences, Some(point), bytes_hashed))
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
            // A home disk that is larger than the point's is zeros behind it.
            let theirs_end = blocks_of(remote.size());
            for (first, end) in touched.iter().filter(|(_, end)| *end > theirs_end) {
                let first = theirs_end.max(*first);
                let different = tail::blocks_not_zero(name, &**device, first, *end).await?;
                verified.bytes_compared += (end - first) * BLOCK_BYTES;
                verified.bytes_different += different * BLOCK_BYTES;
            }
            let pieces = touched.iter().flat_map(|(first, end)| pieces(*first, theirs_end.min(*end)));
            let pieces: Vec<_> = pieces.collect();
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
                        let ours = mainstay_block::elsewhere::spawn_blocking(move || hasher.hash_all(&data))
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
        // Orders of before, which may still be on their way, are overtaken by what home is about to become.
        record.generation = record.generation.max(order.generation);
        self.records.put_item(&record)?;
        self.close_staging(order.item).await?;
        self.hypervisor.commit_staging(order.vm).await?;
        self.hypervisor.restore_state(order.vm, &order.definition).await?;
        // Old trackers tell from a point that is history.
        self.hypervisor.remove_trackers(order.vm).await?;
        record.base = Some(Base::new(order.to, None));
        record.pending = None;
        record.staging = None;
        Ok(self.records.put_item(&record)?)
    }

    pub(super) async fn discard_home(&self, item: ItemId, vm: VmId) -> Result<(), SiteError> {
        self.close_staging(item).await?;
        let is_merged = match self.hypervisor.discard_staging(vm).await {
            Err(error) if error.kind == ErrorKind::NotFound => false,
            result => result?,
        };
        // Also one that was made before there was a record of it.
        self.hypervisor.remove_home_vm(vm).await?;
        let Some(mut record) = self.records.item(item)? else { return Ok(()) };
        let Some(staging) = record.staging.clone() else { return Ok(()) };
        if record.base.is_none() && !is_merged {
            // This host was to become the home and has not.
            return Ok(self.records.remove_item(item)?);
        }
        // The tables may describe what was staged; the disks are what they were. No tracker tells the one from the other,
        // so the next failback compares.
        record.base = match (staging.at, record.base) {
            (Some(at), _) if is_merged => {
                self.hypervisor.remove_trackers(vm).await?;
                record.pending = None;
                Some(Base::new(at, None))
            }
            (Some(at), Some(_)) => Some(Base::new(at, Some(mainstay_provider::TrackerId("none".to_owned())))),
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
