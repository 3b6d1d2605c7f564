//! Garbage collection in two passes.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use object_store::path::Path;
use uuid::Uuid;

use crate::manifest::Manifest;
use crate::store::lock;
use crate::{MaintainReport, Store, StoreError, keys};

/// Manifest versions kept regardless of age.
const MANIFESTS_KEPT: usize = 8;

/// Unreferenced objects and when they were found (milliseconds since 1970 UTC). Kept in memory only: after a
/// restart they are found again.
pub(crate) type Candidates = HashMap<Path, u64>;

impl Store {
    /// An object goes only if it was unreferenced in an earlier pass and still is, and nobody in this process
    /// holds it. The order matters: list first, then look at what is held, then read the manifest. An object
    /// that is committed in between was held before, or is in the manifest after.
    pub(super) async fn collect(
        &self,
        replica: Uuid,
        now_ms: u64,
        report: &mut MaintainReport,
    ) -> Result<(), StoreError> {
        let shared = &self.shared;
        let listed = shared.storage.list(&keys::replica(replica)).await?;
        let mut used = shared.storage.held();
        let open = shared.open_snapshots(replica);
        for map in open.iter().flat_map(|snapshot| &snapshot.maps) {
            used.insert(keys::map(replica, map.footer.map));
            used.extend(map.footer.segments.iter().map(|segment| keys::segment(replica, segment.id)));
        }
        let manifest = shared.replica(replica).load(&shared.storage).await?;
        used.extend(self.referenced(replica, &manifest).await?);
        let manifests = keys::manifests(replica);
        let newest = listed
            .iter()
            .filter(|object| object.location.prefix_matches(&manifests))
            .max_by(|a, b| keys::manifest_version(&a.location).cmp(&keys::manifest_version(&b.location)));
        let before = lock(&shared.candidates).remove(&replica).unwrap_or_default();
        let mut candidates = Candidates::new();
        for object in &listed {
            let key = &object.location;
            let garbage = if key.prefix_matches(&manifests) {
                let version = keys::manifest_version(key).unwrap_or(u64::MAX);
                let age = newest.map(|newest| newest.last_modified - object.last_modified);
                let old = age
                    .and_then(|age| age.to_std().ok())
                    .is_some_and(|age| age >= shared.options.manifest_age);
                version.saturating_add(MANIFESTS_KEPT as u64) <= manifest.version && old
            } else {
                !used.contains(key)
            };
            if !garbage {
                continue;
            }
            match before.get(key) {
                Some(found) if now_ms.saturating_sub(*found) >= shared.options.garbage_age_ms => {
                    shared.storage.delete(key).await?;
                    report.objects_deleted += 1;
                    report.bytes_deleted += object.size;
                }
                Some(found) => {
                    candidates.insert(key.clone(), *found);
                }
                None => {
                    report.garbage_found += 1;
                    candidates.insert(key.clone(), now_ms);
                }
            }
        }
        lock(&shared.candidates).insert(replica, candidates);
        Ok(())
    }

    async fn referenced(&self, replica: Uuid, manifest: &Arc<Manifest>) -> Result<HashSet<Path>, StoreError> {
        let mut used: HashSet<Path> = HashSet::new();
        let definitions = manifest.points.iter().filter_map(|point| point.definition.as_ref());
        used.extend(definitions.map(|definition| keys::definition(replica, definition.id)));
        used.extend(manifest.maps().map(|map| keys::map(replica, map.id)));
        for layer in &manifest.layers {
            // Jumps name only segments that the deltas they span name.
            let map = self.shared.open_map(replica, &layer.delta).await?;
            used.extend(map.footer.segments.iter().map(|segment| keys::segment(replica, segment.id)));
        }
        Ok(used)
    }
}
