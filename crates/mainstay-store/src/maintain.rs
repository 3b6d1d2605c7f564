//! Background work: merging layers, bounding reads, giving space back.
//!
//! All of it works on immutable objects and ends in one edit of the manifest, which checks that what the work was
//! based on is still so; if not, the work is garbage and a later pass does it again. A crash leaves garbage too.
//! Order within a pass: merge, compact, flatten, collect.

mod collect;
pub(crate) mod compact;
mod flatten;
mod merge;

pub(crate) use collect::Candidates;
use uuid::Uuid;

use crate::{Store, StoreError};

/// What a pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MaintainReport {
    /// Layers of deleted points merged into their descendants.
    pub layers_merged: usize,
    /// Segments rewritten without their dead blocks.
    pub segments_compacted: usize,
    /// Bytes of segments read and written for that.
    pub compacted_bytes: u64,
    /// Flattened maps written.
    pub maps_flattened: usize,
    /// Unreferenced objects found now, to be deleted in a later pass.
    pub garbage_found: usize,
    /// Objects deleted.
    pub objects_deleted: usize,
    /// Their bytes.
    pub bytes_deleted: u64,
    /// Work was left for the next pass because a limit was reached.
    pub more: bool,
}

impl Store {
    /// One bounded pass over a replica. `now_ms` is the time in milliseconds since 1970 UTC; it only decides
    /// how old garbage is. Passes over one replica must not overlap, across servers either; overlap with
    /// everything else is safe.
    ///
    /// # Errors
    /// [`StoreError::NoReplica`], [`StoreError::Storage`], [`StoreError::Damaged`]. Whatever was done before stays done.
    pub async fn maintain(&self, replica: Uuid, now_ms: u64) -> Result<MaintainReport, StoreError> {
        let mut report = MaintainReport::default();
        let tidied = match self.shared.manifest(replica).await {
            Err(StoreError::Deleted(_)) => Ok(()),
            Err(error) => return Err(error),
            Ok(_) => self.tidy(replica, &mut report).await,
        };
        // Also when the rest failed for want of space: collecting is what makes some.
        self.collect(replica, now_ms, &mut report).await?;
        tidied.map(|()| report)
    }

    async fn tidy(&self, replica: Uuid, report: &mut MaintainReport) -> Result<(), StoreError> {
        self.merge(replica, report).await?;
        self.compact(replica, report).await?;
        self.flatten(replica, report).await
    }
}
