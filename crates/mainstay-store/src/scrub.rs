//! Verifying everything that is stored, and mending what can be mended from the store alone.

use std::collections::{BTreeSet, HashSet};
use std::time::Duration;

use bytes::Bytes;
use object_store::path::Path;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use uuid::Uuid;

use crate::manifest::{DefinitionRef, Layer, Manifest};
use crate::map_file::{MapRef, SegmentUse, mend};
use crate::map_reader::{ChunkCache, MapReader};
use crate::reader::{Snapshot, refs};
use crate::{Store, StoreError, keys, segment};

/// Blocks of a disk, `first` to `end` (excluded).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockRange {
    /// The disk's index in the replica.
    pub disk: u16,
    /// First block.
    pub first: u64,
    /// Block after the last.
    pub end: u64,
}

/// How to scrub.
#[derive(Clone, Default)]
pub struct ScrubOptions<'a> {
    /// Limit on the bytes read per second.
    pub bytes_per_second: Option<u64>,
    /// Of the segments only these: whether what was damaged still is. Everything else is read all the same.
    pub segments: Option<HashSet<Uuid>>,
    /// Told the bytes read so far.
    pub progress: Option<&'a (dyn Fn(u64) + Send + Sync)>,
}

/// One damaged object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Its key in object storage.
    pub key: String,
    /// What is wrong.
    pub what: String,
    /// The segment, if it is one.
    pub segment: Option<Uuid>,
    /// It was put right: from its second copy, or because everything in it could be had elsewhere.
    pub is_mended: bool,
    /// The points (also kept ones outside the catalogue) that read damaged or missing bytes because of it.
    pub points: Vec<Uuid>,
}

/// What a scrub found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubReport {
    /// Objects read.
    pub objects: usize,
    /// Their bytes.
    pub bytes: u64,
    /// What is damaged.
    pub damage: Vec<Damage>,
    /// Blocks that the head cannot read, sorted: sent again by a cycle, they heal it, and older points with it.
    pub resend: Vec<BlockRange>,
    /// It is not even known which blocks the head consists of: nothing can be built on it.
    pub is_head_lost: bool,
}

/// A scrub at work.
struct Scrub<'a> {
    store: &'a Store,
    replica: Uuid,
    options: ScrubOptions<'a>,
    started: Instant,
    report: ScrubReport,
}

impl Store {
    /// Reads and verifies every object the manifest refers to, one at a time. Costs as much as reading
    /// all of the replica. What maintenance replaces meanwhile is of no interest any more.
    ///
    /// # Errors
    /// [`StoreError::Storage`] when storage cannot be reached; [`StoreError::Damaged`] when the manifest itself is beyond
    /// mending. Other damage is not an error but the answer.
    pub async fn scrub(&self, replica: Uuid, options: ScrubOptions<'_>) -> Result<ScrubReport, StoreError> {
        let report = ScrubReport::default();
        let mut scrub = Scrub { store: self, replica, options, started: Instant::now(), report };
        scrub.manifest().await?;
        let manifest = self.shared.manifest(replica).await?;
        let mut seen = HashSet::new();
        for definition in manifest.points.iter().filter_map(|point| point.definition.as_ref()) {
            if seen.insert(definition.id) {
                scrub.definition(definition).await?;
            }
        }
        for layer in &manifest.layers {
            scrub.layer(layer.id).await?;
        }
        scrub.report.resend = joined(std::mem::take(&mut scrub.report.resend));
        Ok(scrub.report)
    }
}

impl Scrub<'_> {
    /// Counts an object, and waits if more was read than is allowed.
    async fn account(&mut self, bytes: u64) {
        self.report.objects += 1;
        self.report.bytes += bytes;
        if let Some(progress) = self.options.progress {
            progress(self.report.bytes);
        }
        if let Some(rate) = self.options.bytes_per_second {
            let due = Duration::from_secs_f64(self.report.bytes as f64 / rate.max(1) as f64);
            tokio::time::sleep_until(self.started + due).await;
        }
    }

    fn note(&mut self, key: &Path, what: impl Into<String>, is_mended: bool, points: Vec<Uuid>) {
        let damage = Damage { key: key.to_string(), what: what.into(), segment: None, is_mended, points };
        self.report.damage.push(damage);
    }

    async fn manifest(&mut self) -> Result<(), StoreError> {
        let shared = &self.store.shared;
        // Read past the cache: the manifest itself is part of what is verified.
        self.store.refresh(self.replica);
        let version = shared.manifest(self.replica).await?.version;
        let key = keys::manifest(self.replica, version);
        // Collected meanwhile, if it is not there: a newer one is, which the next scrub reads.
        let Some(object) = shared.storage.get_copies(&key).await? else { return Ok(()) };
        self.account(object.raw.len() as u64).await;
        let (manifest, is_damaged) = Manifest::decode(&object, self.replica, version)
            .map_err(|what| StoreError::damaged(&key, what))?;
        if is_damaged || !object.is_current {
            let copy = manifest.encode().map_err(StoreError::internal)?;
            shared.storage.put_twice(&key, copy.into()).await?;
        }
        if is_damaged {
            self.note(&key, "one of two copies", true, Vec::new());
        }
        Ok(())
    }

    async fn definition(&mut self, definition: &DefinitionRef) -> Result<(), StoreError> {
        let shared = &self.store.shared;
        let key = keys::definition(self.replica, definition.id);
        let object = shared.storage.get_copies(&key).await?;
        self.account(object.as_ref().map_or(0, |object| object.raw.len() as u64)).await;
        let sound = |copy: &&[u8]| definition.verify(copy).is_ok();
        let found = object.as_ref().map(|object| {
            let copies = object.of_length(u64::from(definition.bytes));
            (copies.iter().copied().find(sound), copies.iter().all(sound), object.is_current)
        });
        match found {
            Some((Some(copy), is_sound, is_current)) => {
                if !is_sound || !is_current {
                    shared.storage.put_twice(&key, Bytes::copy_from_slice(copy)).await?;
                }
                if !is_sound {
                    self.note(&key, "one of two copies", true, Vec::new());
                }
            }
            _ => {
                let manifest = shared.manifest(self.replica).await?;
                let users = manifest
                    .points
                    .iter()
                    .filter(|point| point.definition.as_ref().is_some_and(|other| other.id == definition.id));
                let users: Vec<Uuid> = users.map(|point| point.id).collect();
                if !users.is_empty() {
                    let what = if found.is_some() { "checksum" } else { "the object is missing" };
                    self.note(&key, what, false, users);
                }
            }
        }
        Ok(())
    }

    /// The maps of a layer and what they name.
    async fn layer(&mut self, layer: Uuid) -> Result<(), StoreError> {
        let shared = &self.store.shared;
        let mut seen = HashSet::new();
        // Maintenance may replace what is being read; then what it became is read.
        loop {
            let manifest = shared.manifest(self.replica).await?;
            let Some(now) = manifest.layer(layer).cloned() else { return Ok(()) };
            if let Some(jump) = now.jump.as_ref().filter(|jump| !seen.contains(&jump.map.id)) {
                seen.insert(jump.map.id);
                if let Err(what) = self.map(&jump.map).await? {
                    self.drop_jump(layer, &jump.map, what).await?;
                }
            }
            if !seen.insert(now.delta.id) {
                return Ok(());
            }
            if let Err(what) = self.map(&now.delta).await? {
                self.lost_map(&now, what).await?;
            } else {
                self.segments(&now).await?;
            }
        }
    }

    /// Verifies both copies of a map, and mends one by the other; the inner error says what is wrong with both.
    async fn map(&mut self, map: &MapRef) -> Result<Result<(), &'static str>, StoreError> {
        let shared = &self.store.shared;
        let key = keys::map(self.replica, map.id);
        let Some(object) = shared.storage.get_copies(&key).await? else {
            return Ok(Err("the object is missing"));
        };
        self.account(object.raw.len() as u64).await;
        match mend(object.of_length(map.bytes), map, self.replica) {
            Ok((copy, is_sound)) => {
                if !is_sound || !object.is_current {
                    shared.storage.put_twice(&key, copy).await?;
                }
                if !is_sound {
                    self.note(&key, "one of two copies", true, Vec::new());
                }
                Ok(Ok(()))
            }
            Err(what) => Ok(Err(what)),
        }
    }

    /// A jump says nothing that the layers do not say; flattening makes a new one.
    async fn drop_jump(&mut self, layer: Uuid, map: &MapRef, what: &str) -> Result<(), StoreError> {
        let forget = |manifest: &mut Manifest| {
            let layer = manifest.layer_mut(layer);
            let has = layer.filter(|layer| layer.jump.as_ref().is_some_and(|jump| jump.map == *map));
            Ok(has.map(|layer| layer.jump = None).is_some())
        };
        if self.store.shared.edit(self.replica, forget).await? {
            self.note(&keys::map(self.replica, map.id), what, true, Vec::new());
        }
        Ok(())
    }

    async fn lost_map(&mut self, layer: &Layer, what: &str) -> Result<(), StoreError> {
        let shared = &self.store.shared;
        let manifest = shared.manifest(self.replica).await?;
        if manifest.layer(layer.id).is_none_or(|now| now.delta != layer.delta) {
            return Ok(());
        }
        let points = descendants(&manifest, layer.id);
        if manifest.head.is_some_and(|head| points.contains(&head)) {
            match shared.open_map(self.replica, &layer.delta).await {
                Ok(map) => {
                    let fresh = ChunkCache::new(0);
                    for (index, chunk) in map.footer.chunks.iter().enumerate() {
                        let read = map.chunk(&shared.storage, &fresh, index).await;
                        if let Err(StoreError::Damaged { .. }) = read {
                            let range = BlockRange { disk: chunk.disk, first: chunk.first, end: chunk.end };
                            self.report.resend.push(range);
                        }
                    }
                }
                Err(StoreError::Damaged { .. }) => self.report.is_head_lost = true,
                Err(error) => return Err(error),
            }
        }
        self.note(&keys::map(self.replica, layer.delta.id), what, false, points);
        Ok(())
    }

    async fn segments(&mut self, layer: &Layer) -> Result<(), StoreError> {
        let shared = &self.store.shared;
        let map = shared.open_map(self.replica, &layer.delta).await?;
        for used in &map.footer.segments {
            if self.options.segments.as_ref().is_some_and(|only| !only.contains(&used.id)) {
                continue;
            }
            let (what, frames) = match self.segment(&map, used).await? {
                None => continue,
                Some(found) => found,
            };
            let manifest = shared.manifest(self.replica).await?;
            if manifest.layer(layer.id).is_none_or(|now| now.delta != layer.delta) {
                // Rewritten meanwhile: the caller reads what it became.
                return Ok(());
            }
            let is_harmless = frames.as_ref().is_some_and(HashSet::is_empty);
            let points = match is_harmless {
                true => Vec::new(),
                false => self.points_reading(&manifest, layer.id, &map, used.id, frames.as_ref()).await?,
            };
            let is_mended = is_harmless && self.store.rewrite_segment(self.replica, layer, used.id).await?;
            let key = keys::segment(self.replica, used.id).to_string();
            self.report.damage.push(Damage { key, what, segment: Some(used.id), is_mended, points });
            if is_mended {
                return Ok(());
            }
        }
        Ok(())
    }

    /// What is wrong with a segment, and which of the frames that the map names are damaged (`None`: all).
    async fn segment(
        &mut self,
        map: &MapReader,
        used: &SegmentUse,
    ) -> Result<Option<(String, Option<HashSet<u32>>)>, StoreError> {
        let shared = &self.store.shared;
        let object = shared.storage.get(&keys::segment(self.replica, used.id)).await?;
        self.account(object.as_ref().map_or(0, |object| object.stored_bytes)).await;
        let Some(object) = object else { return Ok(Some(("the object is missing".to_owned(), None))) };
        let (object, is_current) = (object.bytes, object.is_current);
        let (replica, id, whole) = (self.replica, used.id, object.clone());
        let found =
            mainstay_block::elsewhere::spawn_blocking(move || segment::verify(&whole, replica, id)).await;
        let what = match found.map_err(StoreError::internal)? {
            Ok(frames) if frames.is_empty() => {
                if !is_current {
                    shared.storage.put(&keys::segment(self.replica, used.id), vec![object]).await?;
                }
                return Ok(None);
            }
            Ok(frames) => {
                let what = format!("{} damaged frames", frames.len());
                return Ok(Some((what, Some(frames.into_iter().map(|(offset, _)| offset).collect()))));
            }
            Err(what) => what.to_owned(),
        };
        // Its own list of frames cannot be believed; the map's can.
        let mut places = BTreeSet::new();
        for index in 0..map.footer.chunks.len() {
            for entry in map.chunk(&shared.storage, &shared.chunks, index).await?.iter() {
                let place = entry.place.filter(|place| place.segment == used.id);
                places.extend(place.map(|place| (place.offset, place.length)));
            }
        }
        let found = mainstay_block::elsewhere::spawn_blocking(move || {
            let bad = places.into_iter().filter(|place| !segment::is_sound(&object, *place));
            bad.map(|(offset, _)| offset).collect()
        });
        Ok(Some((what, Some(found.await.map_err(StoreError::internal)?))))
    }

    /// The points that see any block of the damaged frames (`None`: of the whole segment). What the head sees is noted.
    async fn points_reading(
        &mut self,
        manifest: &Manifest,
        layer: Uuid,
        map: &MapReader,
        segment: Uuid,
        frames: Option<&HashSet<u32>>,
    ) -> Result<Vec<Uuid>, StoreError> {
        let shared = &self.store.shared;
        let replica = manifest.replica;
        let hit = |place: crate::extent_map::Location| {
            place.segment == segment && frames.is_none_or(|frames| frames.contains(&place.offset))
        };
        let mut suspects = Vec::new();
        for (index, chunk) in map.footer.chunks.iter().enumerate() {
            for entry in map.chunk(&shared.storage, &shared.chunks, index).await?.iter() {
                if entry.place.is_some_and(hit) {
                    suspects.push((chunk.disk, *entry));
                }
            }
        }
        let mut affected = BTreeSet::new();
        for point in descendants(manifest, layer) {
            let Some(at) = manifest.point(point) else { continue };
            let path = refs(&manifest.path(at.layer, None));
            // A damaged map on the way is reported by itself; then every suspect counts.
            let Ok(maps) = shared.open_maps(replica, path).await else {
                affected.insert(point);
                continue;
            };
            let snapshot = Snapshot { replica, maps };
            for (disk, entry) in &suspects {
                let seen = snapshot.resolve(shared, *disk, entry.start, entry.end()).await;
                let seen = match seen {
                    Ok(seen) => seen.into_iter().filter(|entry| entry.place.is_some_and(hit)).collect(),
                    Err(_) => vec![*entry],
                };
                if seen.is_empty() {
                    continue;
                }
                affected.insert(point);
                if manifest.head != Some(point) {
                    break;
                }
                self.report.resend.extend(seen.into_iter().map(|entry| BlockRange {
                    disk: *disk,
                    first: entry.start,
                    end: entry.end(),
                }));
            }
        }
        Ok(affected.into_iter().collect())
    }
}

/// The points whose layer is this one or descends from it.
fn descendants(manifest: &Manifest, layer: Uuid) -> Vec<Uuid> {
    let points = manifest.points.iter();
    points.filter(|point| manifest.ancestry(point.layer).contains(&layer)).map(|point| point.id).collect()
}

/// Sorted, and what touches joined.
fn joined(mut ranges: Vec<BlockRange>) -> Vec<BlockRange> {
    ranges.sort_unstable();
    let mut out: Vec<BlockRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match out.last_mut() {
            Some(last) if last.disk == range.disk && range.first <= last.end => {
                last.end = last.end.max(range.end);
            }
            _ => out.push(range),
        }
    }
    out
}
