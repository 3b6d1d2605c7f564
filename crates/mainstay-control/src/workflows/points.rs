//! Choosing a recovery point, and what the store says about an item's points.

use mainstay_model::{Health, ItemId, PointId, VmId};
use mainstay_provider::VmDefinition;
use mainstay_store::{Consistency, PointInfo, StoreError};
use serde::{Deserialize, Serialize};

use crate::{
    Control, ControlError,
    db::{ItemRecord, JobError},
};

/// Which recovery point is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PointChoice {
    /// The newest state that can be had; a last delta is shipped first where that is possible.
    Latest,
    /// The newest point that is there now.
    LatestProcessed,
    /// The newest application-consistent point.
    LatestAppConsistent,
    /// This one.
    Point(PointId),
}

/// Picks a point among those that an item shows, in any order.
pub fn pick_point(points: &[PointInfo], choice: PointChoice) -> Option<&PointInfo> {
    match choice {
        PointChoice::Latest | PointChoice::LatestProcessed => {
            points.iter().max_by_key(|point| point.sequence)
        }
        PointChoice::LatestAppConsistent => points
            .iter()
            .filter(|point| point.consistency == Consistency::App)
            .max_by_key(|point| point.sequence),
        PointChoice::Point(id) => points.iter().find(|point| PointId(point.id) == id),
    }
}

/// The moment that a point shows, milliseconds since the Unix epoch.
pub(crate) fn point_time_ms(point: &PointInfo) -> i64 {
    i64::try_from(point.time_ms).unwrap_or(i64::MAX)
}

impl Control {
    /// The recovery points that an item shows, oldest first.
    pub async fn recovery_points(&self, item: &ItemRecord) -> Result<Vec<PointInfo>, ControlError> {
        if !super::shows_points(item.state.phase) {
            return Ok(Vec::new());
        }
        match self.store.points(item.id.0).await {
            // Nothing has been committed yet.
            Err(StoreError::NoReplica(_)) => Ok(Vec::new()),
            points => Ok(points?),
        }
    }

    /// The point that the next delta builds on.
    pub async fn head(&self, item: ItemId) -> Result<Option<PointId>, ControlError> {
        match self.store.head(item.0).await {
            Err(StoreError::NoReplica(_)) => Ok(None),
            head => Ok(head?.map(PointId)),
        }
    }

    /// What the next capture is relative to: the head, or nothing if that is beyond use.
    pub(crate) async fn parent_of_next(&self, item: &ItemRecord) -> Result<Option<PointId>, ControlError> {
        if item.scrub.is_head_lost { Ok(None) } else { self.head(item.id).await }
    }

    /// Keeps a point's data for as long as `holder` (a VM that reads it, or builds on it) needs it. What the holder
    /// held before, it lets go of.
    pub(crate) async fn hold_point(
        &self,
        item: ItemId,
        point: PointId,
        holder: VmId,
    ) -> Result<(), ControlError> {
        Ok(self.store.move_pin(item.0, point.0, holder.0).await?)
    }

    /// The VM needs no point any more.
    pub(crate) async fn release_point(&self, item: ItemId, holder: VmId) -> Result<(), ControlError> {
        match self.store.unpin(item.0, holder.0).await {
            Err(StoreError::NoReplica(_) | StoreError::Deleted(_)) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Deletes everything that the store has of an item, also if that is nothing.
    pub(super) async fn delete_replica(&self, item: ItemId) -> Result<(), ControlError> {
        match self.store.delete_replica(item.0).await {
            Err(StoreError::NoReplica(_)) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Whether the store still has a point.
    pub(super) async fn has_point(&self, item: ItemId, point: PointId) -> Result<bool, ControlError> {
        match self.store.point(item.0, point.0).await {
            Err(StoreError::NoPoint(_)) => Ok(false),
            found => Ok(found.map(|_| true)?),
        }
    }

    /// Picks a recovery point or says why there is none.
    pub(super) async fn choose_point(
        &self,
        item: &ItemRecord,
        choice: PointChoice,
    ) -> Result<PointInfo, JobError> {
        let all = self.recovery_points(item).await?;
        let is_damaged = |point: &PointInfo| item.scrub.damaged_points.contains(&PointId(point.id));
        // Who names a damaged point knows what it is; nobody gets one by accident.
        let is_named = matches!(choice, PointChoice::Point(_));
        let points: Vec<_> = all.iter().filter(|point| is_named || !is_damaged(point)).cloned().collect();
        let (chosen, otherwise) = (pick_point(&points, choice), pick_point(&all, choice));
        if let (None, Some(damaged)) = (chosen, otherwise) {
            return Err(JobError::new(
                "RecoveryPointsDamaged",
                format!("all recovery points of '{}' have blocks that the store cannot read", item.vm_name),
                format!(
                    "If the source runs, wait for the next cycle, which sends them again. Else choose a damaged point by \
                     its name, for instance {}: the VM gets read errors at these blocks, and nothing wrong.",
                    damaged.id
                ),
            ));
        }
        if let Some(chosen) = chosen {
            let text = if is_damaged(chosen) {
                Some(format!(
                    "the recovery point {} of '{}' was chosen although it has blocks that cannot be read",
                    chosen.id, item.vm_name
                ))
            } else {
                otherwise.filter(|newer| newer.id != chosen.id).map(|newer| {
                    format!(
                        "the recovery point {} of '{}' was passed over because it has blocks that cannot be read; {}, \
                         {} s older, was taken",
                        newer.id,
                        item.vm_name,
                        chosen.id,
                        (point_time_ms(newer) - point_time_ms(chosen)) / 1000
                    )
                })
            };
            if let Some(text) = text {
                let event = self.item_event(item, "RecoveryPointDamaged", Health::Warning, text);
                self.record_event(event).await.map_err(ControlError::from)?;
            }
        }
        chosen.cloned().ok_or_else(|| match choice {
            PointChoice::Point(id) => JobError::new(
                "RecoveryPointNotFound",
                format!("recovery point {id} of '{}' does not exist (any more)", item.vm_name),
                "List the recovery points and choose one of them.",
            ),
            PointChoice::LatestAppConsistent => JobError::new(
                "NoAppConsistentRecoveryPoint",
                format!("'{}' has no application-consistent recovery point", item.vm_name),
                "Choose the latest processed point, or a policy that makes application-consistent ones.",
            ),
            _ => JobError::new(
                "NoRecoveryPoint",
                format!("'{}' has no recovery point yet", item.vm_name),
                "Wait until initial replication is complete.",
            ),
        })
    }

    /// What a recovery VM is made from: the definition and the disks (key, size) in the order of the store.
    pub(super) async fn point_contents(
        &self,
        item: ItemId,
        point: PointId,
    ) -> Result<(VmDefinition, Vec<(String, u64)>), JobError> {
        let info = self.store.point(item.0, point.0).await.map_err(ControlError::from)?;
        let definition = self.store.definition(item.0, point.0).await.map_err(ControlError::from)?;
        let disks = info.disks.iter().map(|disk| (disk.key.clone(), disk.bytes)).collect();
        Ok((VmDefinition(definition.to_vec()), disks))
    }
}
