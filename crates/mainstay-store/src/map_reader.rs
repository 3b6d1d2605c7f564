//! Reading map objects, and writing new ones from old.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use uuid::Uuid;

use crate::cache::ByteCache;
use crate::extent_map::{Entry, overlay};
use crate::map_file::{
    FOOTER_BYTES_MAX, Footer, MapRef, MapWriter, SegmentInfo, decode_chunk, decode_footer,
};
use crate::storage::Storage;
use crate::{StoreError, keys};

/// Decoded chunks by map and index.
pub(crate) type ChunkCache = ByteCache<(Uuid, usize), Vec<Entry>>;

/// An opened map: its footer.
#[derive(Debug)]
pub(crate) struct MapReader {
    pub(crate) footer: Footer,
}

impl MapReader {
    pub(crate) async fn open(
        storage: &Storage,
        replica: Uuid,
        reference: &MapRef,
    ) -> Result<Self, StoreError> {
        let key = keys::map(replica, reference.id);
        let length = u64::from(reference.footer_bytes);
        let at = reference.bytes.checked_sub(length).filter(|_| length <= FOOTER_BYTES_MAX as u64);
        let at = at.ok_or_else(|| StoreError::damaged(&key, "footer length"))?;
        let decode = |bytes: &[u8]| decode_footer(bytes, reference, replica);
        let footer = storage.get_part(&key, at..reference.bytes, decode).await?;
        Ok(Self { footer })
    }

    /// The chunks of a disk that touch `from..to`.
    fn chunks(&self, disk: u16, from: u64, to: u64) -> std::ops::Range<usize> {
        let chunks = &self.footer.chunks;
        let first = chunks.partition_point(|chunk| (chunk.disk, chunk.end) <= (disk, from));
        let last = chunks.partition_point(|chunk| (chunk.disk, chunk.first) < (disk, to));
        first..last.max(first)
    }

    /// The entries of a disk within `from..to`, clipped to it.
    pub(crate) async fn range(
        &self,
        storage: &Storage,
        cache: &ChunkCache,
        disk: u16,
        from: u64,
        to: u64,
    ) -> Result<Vec<Entry>, StoreError> {
        let mut out = Vec::new();
        for index in self.chunks(disk, from, to) {
            let entries = self.chunk(storage, cache, index).await?;
            let first = entries.partition_point(|entry| entry.end() <= from);
            let inside = entries[first..].iter().take_while(|entry| entry.start < to);
            out.extend(inside.map(|entry| entry.clip(from, to)));
        }
        Ok(out)
    }

    /// All entries of one chunk.
    pub(crate) async fn chunk(
        &self,
        storage: &Storage,
        cache: &ChunkCache,
        index: usize,
    ) -> Result<Arc<Vec<Entry>>, StoreError> {
        let load = || async {
            let chunk = &self.footer.chunks[index];
            let key = keys::map(self.footer.replica, self.footer.map);
            let part = chunk.offset..chunk.offset + u64::from(chunk.bytes);
            let decode = |bytes: &[u8]| decode_chunk(chunk, &self.footer.segments, bytes);
            storage.get_part(&key, part, decode).await
        };
        let weight = |entries: &Vec<Entry>| entries.len() * size_of::<Entry>() + 64;
        cache.get(&(self.footer.map, index), weight, load).await
    }

    pub(crate) fn segments(&self) -> impl Iterator<Item = (Uuid, SegmentInfo)> + '_ {
        self.footer
            .segments
            .iter()
            .map(|segment| (segment.id, SegmentInfo { blocks: segment.blocks, bytes: segment.bytes }))
    }
}

/// Writes what a read through `maps` (newest first) sees as one map. Works chunk by chunk of the largest, so
/// memory does not depend on the size of the disks. At the bottom of a lineage zeros need no entry.
pub(crate) async fn flatten(
    storage: &Storage,
    cache: &ChunkCache,
    maps: &[MapReader],
    keep_zeros: bool,
    mut writer: MapWriter,
) -> Result<MapWriter, StoreError> {
    let disks: BTreeSet<u16> =
        maps.iter().flat_map(|map| map.footer.chunks.iter().map(|chunk| chunk.disk)).collect();
    for disk in disks {
        let of_disk = |map: &MapReader| map.footer.chunks.iter().filter(|chunk| chunk.disk == disk).count();
        let Some(largest) = maps.iter().max_by_key(|map| of_disk(map)) else { continue };
        let mut from = 0;
        let bounds = largest.footer.chunks.iter().filter(|chunk| chunk.disk == disk).map(|chunk| chunk.end);
        for to in bounds.chain([u64::MAX]) {
            let mut seen: Vec<Entry> = Vec::new();
            for map in maps.iter().rev() {
                let newer = map.range(storage, cache, disk, from, to).await?;
                seen = if seen.is_empty() { newer } else { overlay(&newer, &seen) };
            }
            for entry in seen {
                if keep_zeros || entry.place.is_some() {
                    writer.push(disk, entry).map_err(StoreError::internal)?;
                }
            }
            from = to;
        }
    }
    Ok(writer)
}

/// What is known of the segments that any of the maps names.
pub(crate) fn segment_infos(maps: &[MapReader]) -> HashMap<Uuid, SegmentInfo> {
    maps.iter().flat_map(MapReader::segments).collect()
}
