//! Bounding how many maps a read has to look at.

use uuid::Uuid;

use crate::manifest::Manifest;
use crate::{MaintainReport, Store, StoreError};

impl Store {
    pub(super) async fn flatten(&self, replica: Uuid, report: &mut MaintainReport) -> Result<(), StoreError> {
        let shared = &self.shared;
        let limit = shared.options.path_maps_max.max(2);
        let mut budget = shared.options.merge_entries_per_pass;
        let mut skipped = std::collections::HashSet::new();
        loop {
            let manifest = shared.manifest(replica).await?;
            // The tree is stored parents first, so what is flattened first helps those above it.
            let long = manifest
                .layers
                .iter()
                .find(|layer| !skipped.contains(&layer.id) && manifest.path(layer.id, None).len() > limit);
            let Some(layer) = long.map(|layer| layer.id) else { return Ok(()) };
            let path = manifest.path(layer, None);
            let entries: u64 = path.iter().map(|(map, _)| map.entries).sum();
            if entries > budget && budget < shared.options.merge_entries_per_pass {
                report.more = true;
                return Ok(());
            }
            budget = budget.saturating_sub(entries);
            let (jump, _hold) = shared.write_jump(replica, &path, limit).await?;
            let apply = |manifest: &mut Manifest| {
                if manifest.layer(layer).is_none() || manifest.path(layer, None) != path {
                    return Ok(false);
                }
                if let Some(layer) = manifest.layer_mut(layer) {
                    layer.jump = Some(jump.clone());
                }
                Ok(true)
            };
            if shared.edit(replica, apply).await? {
                report.maps_flattened += 1;
            } else {
                skipped.insert(layer);
            }
        }
    }
}
