//! Which blocks differ between two points, as far as the layers tell.

use std::collections::BTreeMap;
use std::ops::Range;

use mainstay_block::blocks_of;
use uuid::Uuid;

use crate::manifest::Manifest;
use crate::reader::refs;
use crate::{Store, StoreError};

/// The blocks of one disk that may differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskDiff {
    /// Index of the disk.
    pub disk: u16,
    /// Size of the disk at the later point in bytes.
    pub bytes: u64,
    /// Block ranges, sorted, disjoint, within the later point's size.
    pub ranges: Vec<Range<u64>>,
}

impl Store {
    /// The blocks of `to`'s disks that may differ from `from`'s; without `from`, those that may not be zeros.
    /// Never too few: a block written with what it held before is included. The two points need not be in one
    /// lineage. Reads map metadata only.
    ///
    /// # Errors
    /// [`StoreError::NoPoint`], [`StoreError::Damaged`].
    pub async fn diff(
        &self,
        replica: Uuid,
        from: Option<Uuid>,
        to: Uuid,
    ) -> Result<Vec<DiskDiff>, StoreError> {
        // Holding the newer point open keeps its maps; the older's are opened below, from the same manifest or a newer.
        let _open = self.open_point(replica, to).await?;
        let shared = &self.shared;
        let manifest = shared.manifest(replica).await?;
        let later = manifest.point(to).ok_or(StoreError::NoPoint(to))?;
        let earlier = match from {
            Some(from) => Some(manifest.point(from).ok_or(StoreError::NoPoint(from))?),
            None => None,
        };
        let stop = earlier.and_then(|earlier| common_ancestor(&manifest, earlier.layer, later.layer));
        let mut path = manifest.path(later.layer, stop);
        if let Some(earlier) = earlier {
            path.extend(manifest.path(earlier.layer, stop));
        }
        let mut changed: BTreeMap<u16, Vec<Range<u64>>> = BTreeMap::new();
        for map in shared.open_maps(replica, refs(&path)).await? {
            for (index, chunk) in map.footer.chunks.iter().enumerate() {
                let entries = map.chunk(&shared.storage, &shared.chunks, index).await?;
                let ranges = changed.entry(chunk.disk).or_default();
                for entry in entries.iter() {
                    match ranges.last_mut() {
                        Some(last) if last.end == entry.start => last.end = entry.end(),
                        _ => ranges.push(entry.start..entry.end()),
                    }
                }
            }
        }
        let mut diffs = Vec::new();
        for disk in &later.disks {
            let blocks = blocks_of(disk.bytes);
            let mut ranges = changed.remove(&disk.index).unwrap_or_default();
            let before = earlier.and_then(|earlier| earlier.disks.iter().find(|old| old.index == disk.index));
            if let Some(before) = before.filter(|before| before.bytes < disk.bytes) {
                // The block with the old end was padded with zeros, which is what it then still holds.
                ranges.push(before.bytes / mainstay_block::BLOCK_BYTES..blocks);
            }
            let ranges = join(ranges, blocks);
            diffs.push(DiskDiff { disk: disk.index, bytes: disk.bytes, ranges });
        }
        Ok(diffs)
    }
}

/// The newest layer that both descend from.
fn common_ancestor(manifest: &Manifest, a: Uuid, b: Uuid) -> Option<Uuid> {
    let of_a = manifest.ancestry(a);
    manifest.ancestry(b).into_iter().find(|layer| of_a.contains(layer))
}

/// Sorts, joins and clips.
pub(crate) fn join(mut ranges: Vec<Range<u64>>, end: u64) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        let range = range.start.min(end)..range.end.min(end);
        match joined.last_mut() {
            _ if range.is_empty() => {}
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}
