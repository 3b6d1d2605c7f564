//! Every replica is read through now and then, at a pace that leaves the store to others, and what is damaged is put
//! right: by the store alone where it can, else by the next cycle, which sends again what cannot be read.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use mainstay_model::{Health, ItemId, PointId};
use mainstay_provider::Replicated;
use mainstay_store::{BlockRange, ScrubOptions, ScrubReport, StoreError};
use uuid::Uuid;

use crate::{
    Control, ControlError,
    db::{DamageRecord, ItemRecord, ScrubRecord},
};

/// Damaged objects that are written down one by one.
const DAMAGE_MAX: usize = 100;
/// Ranges of blocks per disk that are asked for again; more are joined over the smallest gaps.
const RANGES_MAX: usize = 1024;

/// How often replicas are read through, and how fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubPace {
    /// Between two scrubs of a replica; `None` = only when somebody asks.
    pub interval: Option<Duration>,
    /// Bytes read per second; `None` = as fast as it goes.
    pub bytes_per_second: Option<u64>,
}

impl Default for ScrubPace {
    fn default() -> Self {
        // A week: bit rot is slow, and the pace of 64 MiB/s reads 38 TiB in that time.
        Self { interval: Some(Duration::from_secs(7 * 24 * 3600)), bytes_per_second: Some(64 << 20) }
    }
}

/// Scrubs under way, and how they are done.
#[derive(Default)]
pub struct Scrubs {
    /// Set once, before the reconcilers run.
    pub pace: OnceLock<ScrubPace>,
    /// Bytes read so far.
    running: Mutex<HashMap<ItemId, u64>>,
}

impl Scrubs {
    /// Bytes read so far by the item's scrub, if there is one.
    pub fn progress(&self, item: ItemId) -> Option<u64> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).get(&item).copied()
    }

    fn set(&self, item: ItemId, bytes: u64) {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).insert(item, bytes);
    }

    fn pace(&self) -> ScrubPace {
        self.pace.get().copied().unwrap_or_default()
    }
}

/// Takes the scrub from the table, however it ends.
struct Running<'a> {
    scrubs: &'a Scrubs,
    item: ItemId,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.scrubs.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.item);
    }
}

/// When the item's replica is to be read through; the smallest first.
fn due_ms(item: &ItemRecord, pace: &ScrubPace) -> Option<i64> {
    let interval = pace.interval.map(|interval| interval.as_millis() as i64);
    let regular = interval.map(|interval| item.scrub.finished_ms.unwrap_or(item.created_ms) + interval);
    [item.scrub.requested_ms, regular].into_iter().flatten().min()
}

impl Control {
    /// Asks for a scrub of an item's replica, before its turn.
    pub async fn request_scrub(&self, item: ItemId) -> Result<ItemRecord, ControlError> {
        let now_ms = self.clock.now_ms();
        self.change_item(item, |item| {
            item.scrub.requested_ms.get_or_insert(now_ms);
            Ok(())
        })
        .await?;
        self.changed.notify_waiters();
        self.item(item).await
    }

    /// One replica at a time: the one that has waited longest.
    pub(super) async fn reconcile_scrub(self: Arc<Self>) -> Result<(), ControlError> {
        let (now_ms, pace) = (self.clock.now_ms(), self.scrubs.pace());
        let items = self.db.items().await?;
        let due = items.iter().filter_map(|item| Some((due_ms(item, &pace)?, item.id)));
        let mut due: Vec<_> = due.filter(|(due_ms, _)| *due_ms <= now_ms).collect();
        due.sort_unstable();
        let mut failed = None;
        for (_, id) in due {
            match self.scrub(id, None).await {
                // What is due is another question now.
                Ok(()) => return Ok(()),
                // One that cannot be read now does not keep the others waiting.
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Recovery points that are gone are not damaged any more.
    pub(super) async fn forget_gone_points(&self, item: &ItemRecord) -> Result<(), ControlError> {
        if item.scrub.damaged_points.is_empty() {
            return Ok(());
        }
        let listed = self.listed_points(item.id).await?;
        self.change_item(item.id, |item| {
            item.scrub.damaged_points.retain(|point| listed.contains(point));
            Ok(())
        })
        .await
    }

    async fn listed_points(&self, id: ItemId) -> Result<HashSet<PointId>, ControlError> {
        match self.store.points(id.0).await {
            Ok(points) => Ok(points.iter().map(|point| PointId(point.id)).collect()),
            Err(StoreError::NoReplica(_) | StoreError::Deleted(_)) => Ok(HashSet::new()),
            Err(error) => Err(error.into()),
        }
    }

    /// What was damaged and has been sent again is looked at without waiting for others' scrubs.
    pub(super) async fn reconcile_scrub_recheck(self: Arc<Self>) -> Result<(), ControlError> {
        for item in self.db.items().await?.iter().filter(|item| item.scrub.is_recheck_due) {
            let damaged = item.scrub.damage.iter().filter_map(|damage| damage.segment).collect();
            self.scrub(item.id, Some(damaged)).await?;
        }
        Ok(())
    }

    async fn scrub(&self, id: ItemId, segments: Option<HashSet<Uuid>>) -> Result<(), ControlError> {
        let (began_ms, is_complete) = (self.clock.now_ms(), segments.is_none());
        if is_complete {
            // Small, and what a rebuild of the vault would need.
            let mended = self.store.scrub_documents().await?;
            metrics::counter!("mainstay_scrub_objects_mended").increment(mended as u64);
        }
        self.scrubs.set(id, 0);
        let _running = Running { scrubs: &self.scrubs, item: id };
        let head = self.head(id).await?;
        let report = match self.read_through(id, segments).await {
            Ok(report) => report,
            // Nothing was replicated yet, or nothing is left.
            Err(StoreError::NoReplica(_) | StoreError::Deleted(_)) => ScrubReport::default(),
            Err(error @ StoreError::Damaged { .. }) => return self.manifest_lost(id, began_ms, error).await,
            Err(error) => return Err(error.into()),
        };
        let mut record = record_of(&report);
        if record.wants_repair()
            && let Some(head) = head
        {
            // What was made meanwhile was built on what cannot be read.
            record.damaged_points.extend(self.points_after(id, head).await?);
        }
        let listed = self.listed_points(id).await?;
        record.damaged_points.retain(|point| listed.contains(point));
        let mended = report.damage.iter().filter(|damage| damage.is_mended).count();
        let (before, item) = self
            .change_item(id, |item| {
                let before = item.scrub.clone();
                record.mended = before.mended + mended as u64;
                let has_request = before.requested_ms.is_some_and(|requested_ms| requested_ms > began_ms);
                record.requested_ms = before.requested_ms.filter(|_| has_request || !is_complete);
                if !is_complete {
                    (record.finished_ms, record.objects, record.bytes) =
                        (before.finished_ms, before.objects, before.bytes);
                } else {
                    record.finished_ms = Some(self.clock.now_ms());
                }
                item.scrub = record;
                Ok((before, item.clone()))
            })
            .await?;
        self.tell_scrub(&before, &item, mended).await
    }

    async fn read_through(
        &self,
        id: ItemId,
        segments: Option<HashSet<Uuid>>,
    ) -> Result<ScrubReport, StoreError> {
        let progress = |bytes| self.scrubs.set(id, bytes);
        let options = ScrubOptions {
            bytes_per_second: self.scrubs.pace().bytes_per_second,
            segments,
            progress: Some(&progress),
        };
        self.store.scrub(id.0, options).await
    }

    async fn points_after(&self, id: ItemId, head: PointId) -> Result<Vec<PointId>, ControlError> {
        let sequence = self.store.point(id.0, head.0).await?.sequence;
        let points = self.store.points(id.0).await?;
        let later = points.iter().filter(|point| point.in_lineage && point.sequence > sequence);
        Ok(later.map(|point| PointId(point.id)).collect())
    }

    /// Nothing of the replica can be used, and nothing of it is thrown away.
    async fn manifest_lost(&self, id: ItemId, began_ms: i64, error: StoreError) -> Result<(), ControlError> {
        let is_new = self
            .change_item(id, |item| {
                let damage = DamageRecord {
                    key: "manifest".to_owned(),
                    what: error.to_string(),
                    segment: None,
                    points: 0,
                };
                let is_new = item.scrub.damage != [damage.clone()];
                item.scrub.damage = vec![damage];
                item.scrub.finished_ms = Some(began_ms);
                item.scrub.requested_ms = None;
                item.scrub.is_recheck_due = false;
                Ok(is_new)
            })
            .await?;
        if is_new {
            let item = self.item(id).await?;
            let text = format!(
                "no recovery point of '{}' can be read: {error}. Restore the object from a backup of the store, or \
                 disable replication and enable it again.",
                item.vm_name
            );
            self.record_event(self.item_event(&item, "ReplicaDamaged", Health::Critical, text)).await?;
        }
        Ok(())
    }

    async fn tell_scrub(
        &self,
        before: &ScrubRecord,
        item: &ItemRecord,
        mended: usize,
    ) -> Result<(), ControlError> {
        let now = &item.scrub;
        tracing::info!(item = %item.id, objects = now.objects, bytes = now.bytes, mended, damaged = now.damage.len(), "a replica was read through");
        metrics::counter!("mainstay_scrub_objects_mended").increment(mended as u64);
        if mended > 0 {
            let text = format!(
                "{mended} damaged objects of the replica of '{}' were put right; no recovery point was concerned. Check \
                 the store's medium.",
                item.vm_name
            );
            self.record_event(self.item_event(item, "ReplicaMended", Health::Warning, text)).await?;
        }
        if now.damaged_points.is_empty() {
            if !before.damaged_points.is_empty() {
                let text = format!("all recovery points of '{}' can be read again", item.vm_name);
                self.record_event(self.item_event(item, "ReplicaRepaired", Health::Normal, text)).await?;
            }
        } else if now.damaged_points != before.damaged_points {
            let next = match now.wants_repair() {
                true => "The next replication cycle sends again what the source still has.",
                false => "The newest recovery point is whole.",
            };
            let text = format!(
                "{} recovery points of '{}' are damaged: {} of the store's objects are not what was written. {next} \
                 Check the store's medium.",
                now.damaged_points.len(),
                item.vm_name,
                now.damage.len()
            );
            self.record_event(self.item_event(item, "ReplicaDamaged", Health::Critical, text)).await?;
        }
        Ok(())
    }
}

/// What a cycle was asked to put right was sent; whether it helped is for the next look to say.
pub(crate) fn note_replicated(item: &mut ItemRecord, asked: &ScrubRecord, replicated: &Replicated) {
    let scrub = &mut item.scrub;
    if asked.wants_repair() && asked.resend == scrub.resend && asked.is_head_lost == scrub.is_head_lost {
        scrub.resend = Vec::new();
        scrub.is_head_lost = false;
        scrub.is_recheck_due = true;
    } else if scrub.wants_repair() {
        // Found while the cycle was under way: it was built on what cannot be read.
        scrub.damaged_points.push(replicated.point);
    }
}

fn record_of(report: &ScrubReport) -> ScrubRecord {
    let left = || report.damage.iter().filter(|damage| !damage.is_mended);
    let mut points: Vec<PointId> = left().flat_map(|damage| &damage.points).map(|id| PointId(*id)).collect();
    points.sort_unstable();
    points.dedup();
    let damage = left().take(DAMAGE_MAX).map(|damage| DamageRecord {
        key: damage.key.clone(),
        what: damage.what.clone(),
        segment: damage.segment,
        points: damage.points.len(),
    });
    ScrubRecord {
        objects: report.objects as u64,
        bytes: report.bytes,
        damage: damage.collect(),
        damaged_points: points,
        resend: by_disk(&report.resend),
        is_head_lost: report.is_head_lost,
        ..ScrubRecord::default()
    }
}

fn by_disk(ranges: &[BlockRange]) -> Vec<Vec<(u64, u64)>> {
    let disks = ranges.iter().map(|range| usize::from(range.disk) + 1).max().unwrap_or_default();
    let mut found = vec![Vec::new(); disks];
    for range in ranges {
        found[usize::from(range.disk)].push((range.first, range.end));
    }
    found.into_iter().map(|ranges| coarser(ranges, RANGES_MAX)).collect()
}

/// Sorted, disjoint ranges, joined over the smallest gaps until there are no more than `most`. Sending what lies in a gap again
/// does no harm.
fn coarser(ranges: Vec<(u64, u64)>, most: usize) -> Vec<(u64, u64)> {
    if ranges.len() <= most {
        return ranges;
    }
    let mut gaps: Vec<(u64, usize)> =
        ranges.windows(2).enumerate().map(|(at, pair)| (pair[1].0 - pair[0].1, at + 1)).collect();
    gaps.sort_unstable();
    let closed: HashSet<usize> = gaps.iter().take(ranges.len() - most.max(1)).map(|(_, at)| *at).collect();
    let mut out: Vec<(u64, u64)> = Vec::with_capacity(most);
    for (at, range) in ranges.into_iter().enumerate() {
        match out.last_mut() {
            Some(last) if closed.contains(&at) => last.1 = range.1,
            _ => out.push(range),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_joined_over_the_smallest_gaps() {
        let ranges = vec![(0, 1), (2, 3), (100, 101), (110, 120)];
        assert_eq!(coarser(ranges.clone(), 4), ranges);
        assert_eq!(coarser(ranges.clone(), 3), [(0, 3), (100, 101), (110, 120)]);
        assert_eq!(coarser(ranges.clone(), 2), [(0, 3), (100, 120)]);
        assert_eq!(coarser(ranges, 1), [(0, 120)]);
    }

    #[test]
    fn ranges_are_asked_for_by_disk() {
        let range = |disk, first, end| BlockRange { disk, first, end };
        assert_eq!(by_disk(&[range(2, 1, 2), range(2, 7, 9)]), [vec![], vec![], vec![(1, 2), (7, 9)]]);
        assert!(by_disk(&[]).is_empty());
    }
}
