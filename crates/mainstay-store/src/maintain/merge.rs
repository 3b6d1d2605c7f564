//! Merging the layers of deleted points into their descendants.

use std::collections::{HashMap, HashSet};

use uuid::Uuid;

use crate::manifest::{Layer, Manifest};
use crate::map_file::{MapRef, MapWriter};
use crate::map_reader::{flatten, segment_infos};
use crate::{MaintainReport, Store, StoreError};

/// Most layers merged into one at a time: bounds open maps.
const CHAIN_MAX: usize = 64;
/// The base of a lineage is rewritten only when what is merged into it is at least this fraction of it: else every
/// expired point would rewrite the map of the whole disk.
const BASE_FRACTION: u64 = 16;
/// A base with fewer entries is always cheap enough.
const BASE_ENTRIES_CHEAP: u64 = 1 << 16;

/// Layers to be merged: all but the last have no point and one child, which is the next.
struct Chain {
    /// Oldest first, at least two.
    layers: Vec<Layer>,
}

impl Store {
    pub(super) async fn merge(&self, replica: Uuid, report: &mut MaintainReport) -> Result<(), StoreError> {
        let mut budget = self.shared.options.merge_entries_per_pass;
        let mut failed_once = HashSet::new();
        loop {
            let manifest = self.shared.manifest(replica).await?;
            let chain =
                chains(&manifest).into_iter().find(|chain| !failed_once.contains(&chain.layers[0].id));
            let Some(chain) = chain else { return Ok(()) };
            let entries: u64 = chain.layers.iter().map(|layer| layer.delta.entries).sum();
            if entries > budget && budget < self.shared.options.merge_entries_per_pass {
                report.more = true;
                return Ok(());
            }
            budget = budget.saturating_sub(entries);
            let merged = self.merge_chain(replica, &chain).await?;
            if merged {
                report.layers_merged += chain.layers.len() - 1;
            } else {
                failed_once.insert(chain.layers[0].id);
            }
        }
    }

    async fn merge_chain(&self, replica: Uuid, chain: &Chain) -> Result<bool, StoreError> {
        let shared = &self.shared;
        let (Some(oldest), Some(newest)) = (chain.layers.first(), chain.layers.last()) else {
            return Ok(false);
        };
        let deltas: Vec<_> = chain.layers.iter().rev().map(|layer| layer.delta.clone()).collect();
        let maps = shared.open_maps(replica, deltas).await?;
        let id = shared.new_id();
        let writer = MapWriter::new(replica, id, segment_infos(&maps));
        let keep_zeros = oldest.parent.is_some();
        let writer = flatten(&shared.storage, &shared.chunks, &maps, keep_zeros, writer).await?;
        let (delta, _hold) = shared.write_map(replica, id, writer).await?;
        let apply = |manifest: &mut Manifest| Ok(replace(manifest, chain, newest.id, &delta));
        shared.edit(replica, apply).await
    }
}

/// Puts the merged map in place of the chain if the chain is still what it was.
fn replace(manifest: &mut Manifest, chain: &Chain, newest: Uuid, delta: &MapRef) -> bool {
    let inner: HashSet<Uuid> =
        chain.layers.iter().map(|layer| layer.id).filter(|layer| *layer != newest).collect();
    let unchanged = chain.layers.iter().all(|layer| {
        manifest.layer(layer.id).is_some_and(|now| now.delta == layer.delta && now.parent == layer.parent)
    });
    let needed = manifest.points.iter().any(|point| inner.contains(&point.layer));
    let forked = manifest.layers.iter().any(|layer| {
        let child = layer.parent.is_some_and(|parent| inner.contains(&parent));
        child && !chain.layers.iter().any(|of_chain| of_chain.id == layer.id)
    });
    let Some(oldest) = chain.layers.first().filter(|_| unchanged && !needed && !forked) else { return false };
    let parent = oldest.parent;
    if let Some(layer) = manifest.layer_mut(newest) {
        layer.delta = delta.clone();
        layer.parent = parent;
    }
    manifest.layers.retain(|layer| !inner.contains(&layer.id));
    // Jumps that led to a merged layer lead nowhere now; pruning drops them.
    true
}

/// Every maximal run of layers that can become one, cut to [`CHAIN_MAX`].
fn chains(manifest: &Manifest) -> Vec<Chain> {
    let with_point: HashSet<Uuid> = manifest.points.iter().map(|point| point.layer).collect();
    let mut children: HashMap<Uuid, usize> = HashMap::new();
    for parent in manifest.layers.iter().filter_map(|layer| layer.parent) {
        *children.entry(parent).or_default() += 1;
    }
    let layers: HashMap<Uuid, &Layer> = manifest.layers.iter().map(|layer| (layer.id, layer)).collect();
    let mergeable = |id: Uuid| !with_point.contains(&id) && children.get(&id) == Some(&1);
    let mut found = Vec::new();
    // The last of a chain is a layer that cannot be merged itself but whose parent can.
    for last in manifest.layers.iter().filter(|layer| !mergeable(layer.id)) {
        let mut chain = vec![last.clone()];
        let mut at = last.parent;
        while let Some(layer) = at.filter(|at| mergeable(*at)).and_then(|at| layers.get(&at)) {
            chain.push((*layer).clone());
            at = layer.parent;
        }
        if chain.last().is_some_and(|oldest| oldest.parent.is_none()) && !base_is_worth_it(&chain) {
            chain.pop();
        }
        chain.reverse();
        if chain.len() > CHAIN_MAX {
            // Merge the older part into its newest layer first.
            chain.truncate(CHAIN_MAX);
        }
        if chain.len() >= 2 {
            found.push(Chain { layers: chain });
        }
    }
    found
}

fn base_is_worth_it(newest_first: &[Layer]) -> bool {
    let Some((base, above)) = newest_first.split_last() else { return false };
    let entries: u64 = above.iter().map(|layer| layer.delta.entries.max(layer.delta.blocks / 64)).sum();
    base.delta.entries <= BASE_ENTRIES_CHEAP || entries * BASE_FRACTION >= base.delta.entries
}
