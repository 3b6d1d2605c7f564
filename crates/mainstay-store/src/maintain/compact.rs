//! Rewriting segments that are mostly dead, and joining small ones.
//!
//! A segment is named by the delta map of exactly one layer (sessions and compaction write for one layer, merging
//! moves all of a layer's segments along), so what is alive in it stands in that map's footer.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use mainstay_block::BLOCK_BYTES;
use mainstay_block::frame::{Effort, FRAME_BLOCKS_MAX, FrameBuilder, inspect};
use uuid::Uuid;

use crate::extent_map::{Entry, Location, overlay};
use crate::manifest::{Layer, Manifest};
use crate::map_file::{MapRef, MapWriter, SegmentInfo, SegmentUse};
use crate::map_reader::{MapReader, segment_infos};
use crate::segment::{SegmentBuilder, length};
use crate::storage::Hold;
use crate::store::lock;
use crate::{MaintainReport, Store, StoreError, keys};

/// Segments smaller than `segment_bytes` over this are small.
const SMALL_FRACTION: usize = 16;

impl Store {
    pub(super) async fn compact(&self, replica: Uuid, report: &mut MaintainReport) -> Result<(), StoreError> {
        let manifest = self.shared.manifest(replica).await?;
        let mut budget = self.shared.options.compact_bytes_per_pass;
        for layer in &manifest.layers {
            let map = self.shared.open_map(replica, &layer.delta).await?;
            let victims = self.victims(&map, &mut budget, report);
            if victims.is_empty() {
                continue;
            }
            let bytes = self.compact_layer(replica, layer, &map, &victims).await?;
            if let Some(bytes) = bytes {
                report.segments_compacted += victims.len();
                report.compacted_bytes += bytes;
            }
        }
        Ok(())
    }

    fn victims(&self, map: &MapReader, budget: &mut u64, report: &mut MaintainReport) -> HashSet<Uuid> {
        let options = &self.shared.options;
        let small = |segment: &SegmentUse| (segment.bytes as usize) < options.segment_bytes / SMALL_FRACTION;
        let smalls = map.footer.segments.iter().filter(|segment| small(segment)).count();
        let many_small = smalls >= options.compact_small_segments.max(2);
        let mut victims = HashSet::new();
        // What is left of a damaged one cannot be moved, however often it is tried.
        let damaged = lock(&self.shared.damaged).clone();
        for segment in map.footer.segments.iter().filter(|segment| !damaged.contains(&segment.id)) {
            let share = f64::from(segment.live) / f64::from(segment.blocks.max(1));
            if share >= options.compact_live_share && !(many_small && small(segment)) {
                continue;
            }
            let bytes = u64::from(segment.bytes);
            if bytes > *budget {
                report.more = true;
                continue;
            }
            *budget -= bytes;
            victims.insert(segment.id);
        }
        victims
    }

    /// Returns the bytes moved, or nothing when the layer changed meanwhile. What is damaged stays where it is, so that
    /// nothing loses sight of it.
    pub(crate) async fn compact_layer(
        &self,
        replica: Uuid,
        layer: &Layer,
        map: &MapReader,
        victims: &HashSet<Uuid>,
    ) -> Result<Option<u64>, StoreError> {
        let shared = &self.shared;
        let mut rewrite = Rewrite::new(self, replica);
        for (index, chunk) in map.footer.chunks.iter().enumerate() {
            for entry in map.chunk(&shared.storage, &shared.chunks, index).await?.iter() {
                let Some(place) = entry.place.filter(|place| victims.contains(&place.segment)) else {
                    continue;
                };
                match shared.entry_data(replica, chunk.disk, entry, &place).await {
                    Ok(data) => rewrite.push(chunk.disk, entry.start, &data).await?,
                    Err(error @ StoreError::Damaged { .. }) => {
                        tracing::warn!(%replica, segment = %place.segment, %error, "left out of a rewriting");
                        lock(&shared.damaged).insert(place.segment);
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        let moved = rewrite.finish().await?;
        let (delta, _hold) = self.write_moved(replica, map, &moved).await?;
        let apply = |manifest: &mut Manifest| Ok(replace_delta(manifest, layer.id, &layer.delta, &delta));
        Ok(self.shared.edit(replica, apply).await?.then_some(moved.bytes))
    }

    /// Writes a layer's map with some of its blocks at new places.
    pub(crate) async fn write_moved(
        &self,
        replica: Uuid,
        map: &MapReader,
        moved: &Moved,
    ) -> Result<(MapRef, Hold), StoreError> {
        let shared = &self.shared;
        let mut known = segment_infos(std::slice::from_ref(map));
        known.extend(moved.segments.iter().map(|(id, info)| (*id, *info)));
        let id = shared.new_id();
        let mut writer = MapWriter::new(replica, id, known);
        for (index, chunk) in map.footer.chunks.iter().enumerate() {
            let entries = map.chunk(&shared.storage, &shared.chunks, index).await?;
            let moved = moved.entries.get(&chunk.disk).map_or(&[][..], Vec::as_slice);
            let first = moved.partition_point(|entry| entry.end() <= chunk.first);
            let last = moved.partition_point(|entry| entry.start < chunk.end);
            let inside: Vec<Entry> =
                moved[first..last].iter().map(|entry| entry.clip(chunk.first, chunk.end)).collect();
            for entry in overlay(&inside, &entries) {
                writer.push(chunk.disk, entry).map_err(StoreError::internal)?;
            }
        }
        shared.write_map(replica, id, writer).await
    }
}

/// Puts a layer's rewritten map in place of the one that it was made from, if that is still the layer's.
pub(crate) fn replace_delta(manifest: &mut Manifest, layer: Uuid, from: &MapRef, to: &MapRef) -> bool {
    match manifest.layer_mut(layer) {
        Some(now) if now.delta == *from => now.delta = to.clone(),
        _ => return false,
    }
    drop_jumps_over(manifest, layer);
    true
}

/// Jumps that span a layer name the segments it had; flattening makes new ones.
fn drop_jumps_over(manifest: &mut Manifest, compacted: Uuid) {
    let spanning: HashSet<Uuid> = manifest
        .layers
        .iter()
        .filter(|layer| {
            let Some(jump) = &layer.jump else { return false };
            let ancestry = manifest.ancestry(layer.id);
            ancestry.into_iter().take_while(|at| Some(*at) != jump.ancestor).any(|at| at == compacted)
        })
        .map(|layer| layer.id)
        .collect();
    for layer in manifest.layers.iter_mut().filter(|layer| spanning.contains(&layer.id)) {
        layer.jump = None;
    }
}

/// Packs blocks into new frames and segments.
pub(crate) struct Rewrite<'a> {
    store: &'a Store,
    replica: Uuid,
    frame: FrameBuilder,
    segment: Option<SegmentBuilder>,
    moved: Moved,
}

/// Blocks at new places, by disk and in order, in segments that are kept from being collected while this lives.
#[derive(Default)]
pub(crate) struct Moved {
    entries: HashMap<u16, Vec<Entry>>,
    segments: HashMap<Uuid, SegmentInfo>,
    holds: Vec<Hold>,
    bytes: u64,
}

impl<'a> Rewrite<'a> {
    pub(crate) fn new(store: &'a Store, replica: Uuid) -> Self {
        Self { store, replica, frame: FrameBuilder::new(), segment: None, moved: Moved::default() }
    }

    /// Adds blocks, in order of disk and block.
    pub(crate) async fn push(&mut self, disk: u16, first: u64, data: &Bytes) -> Result<(), StoreError> {
        let mut at = 0;
        while at < data.len() {
            let room = self.frame.room();
            if room == 0 {
                self.close_frame().await?;
                continue;
            }
            let end = data.len().min(at + room.min(FRAME_BLOCKS_MAX) * BLOCK_BYTES as usize);
            let block = first + at as u64 / BLOCK_BYTES;
            self.frame.push_bytes(disk, block, data.slice(at..end))?;
            at = end;
        }
        Ok(())
    }

    async fn close_frame(&mut self) -> Result<(), StoreError> {
        let frame = std::mem::take(&mut self.frame);
        if frame.is_empty() {
            return Ok(());
        }
        let bytes = mainstay_block::elsewhere::spawn_blocking(move || frame.finish(Effort::Small)).await;
        let bytes = bytes.map_err(StoreError::internal)??;
        let runs = inspect(&bytes)?;
        let shared = &self.store.shared;
        let segment = self.segment.get_or_insert_with(|| {
            let id = shared.new_id();
            self.moved.holds.push(shared.storage.hold(&keys::segment(self.replica, id)));
            SegmentBuilder::new(self.replica, id, Uuid::nil())
        });
        let (offset, length) = segment.push(bytes, runs.iter().map(|run| run.count).sum());
        let mut index = 0;
        for run in runs {
            let place = Location { segment: segment.id, offset, length, index };
            index += run.count as u16;
            let entry = Entry { start: run.block, count: u64::from(run.count), place: Some(place) };
            self.moved.entries.entry(run.disk).or_default().push(entry);
        }
        if segment.len() >= shared.options.segment_bytes {
            self.close_segment().await?;
        }
        Ok(())
    }

    async fn close_segment(&mut self) -> Result<(), StoreError> {
        let Some(segment) = self.segment.take() else { return Ok(()) };
        let (id, blocks) = (segment.id, segment.blocks);
        let bytes = segment.finish();
        self.moved.bytes += length(&bytes);
        self.moved.segments.insert(id, SegmentInfo { blocks, bytes: length(&bytes) as u32 });
        self.store.shared.storage.put(&keys::segment(self.replica, id), bytes).await
    }

    pub(crate) async fn finish(mut self) -> Result<Moved, StoreError> {
        self.close_frame().await?;
        self.close_segment().await?;
        Ok(self.moved)
    }
}
