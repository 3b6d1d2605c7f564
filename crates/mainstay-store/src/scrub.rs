//! Verifying everything that is stored.

use std::collections::{BTreeSet, HashSet};

use uuid::Uuid;

use crate::manifest::Manifest;
use crate::reader::{Snapshot, refs};
use crate::{Store, StoreError, keys, segment};

/// One damaged object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Its key in object storage.
    pub key: String,
    /// What is wrong.
    pub what: String,
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
}

impl Store {
    /// Reads and verifies every object the manifest refers to, one at a time. Costs as much as reading
    /// all of the replica.
    ///
    /// # Errors
    /// [`StoreError::Storage`] when storage cannot be reached; damage is not an error but the answer.
    pub async fn scrub(&self, replica: Uuid) -> Result<ScrubReport, StoreError> {
        let shared = &self.shared;
        // Read past the cache: the manifest itself is part of what is verified.
        self.refresh(replica);
        let manifest = shared.manifest(replica).await?;
        let mut report = ScrubReport::default();
        for point in &manifest.points {
            let Some(definition) = &point.definition else { continue };
            let read = shared.definition(replica, definition).await;
            report.note(u64::from(definition.bytes), read.map(|_| ()), &[point.id])?;
        }
        for layer in &manifest.layers {
            if let Some(jump) = &layer.jump {
                let read = self.scrub_map(replica, &jump.map).await;
                report.note(jump.map.bytes, read, &descendants(&manifest, layer.id))?;
            }
            let read = self.scrub_map(replica, &layer.delta).await;
            let sound = read.is_ok();
            report.note(layer.delta.bytes, read, &descendants(&manifest, layer.id))?;
            if sound {
                self.scrub_segments(replica, &manifest, layer.id, &mut report).await?;
            }
        }
        Ok(report)
    }

    async fn scrub_map(&self, replica: Uuid, map: &crate::map_file::MapRef) -> Result<(), StoreError> {
        let shared = &self.shared;
        let map = shared.open_map(replica, map).await?;
        // A cache of its own, so that what is verified comes from storage.
        let fresh = crate::map_reader::ChunkCache::new(0);
        for index in 0..map.footer.chunks.len() {
            map.chunk(&shared.storage, &fresh, index).await?;
        }
        Ok(())
    }

    async fn scrub_segments(
        &self,
        replica: Uuid,
        manifest: &Manifest,
        layer: Uuid,
        report: &mut ScrubReport,
    ) -> Result<(), StoreError> {
        let shared = &self.shared;
        let Some(delta) = manifest.layer(layer).map(|layer| &layer.delta) else { return Ok(()) };
        let map = shared.open_map(replica, delta).await?;
        for used in &map.footer.segments {
            let key = keys::segment(replica, used.id);
            report.objects += 1;
            report.bytes += u64::from(used.bytes);
            let (what, frames) = match shared.storage.get(&key).await? {
                None => ("the object is missing".to_owned(), None),
                Some(bytes) => {
                    let id = used.id;
                    let found =
                        tokio::task::spawn_blocking(move || segment::verify(&bytes, replica, id)).await;
                    match found.map_err(StoreError::internal)? {
                        Ok(frames) if frames.is_empty() => continue,
                        Ok(frames) => (format!("{} damaged frames", frames.len()), Some(frames)),
                        Err(what) => (what.to_owned(), None),
                    }
                }
            };
            let bad: Option<HashSet<u32>> =
                frames.map(|frames| frames.into_iter().map(|(offset, _)| offset).collect());
            let points = self.points_reading(manifest, layer, &map, used.id, bad.as_ref()).await?;
            report.damage.push(Damage { key: key.to_string(), what, points });
        }
        Ok(())
    }

    /// The points that see any block of the damaged frames (`None`: of the whole segment).
    async fn points_reading(
        &self,
        manifest: &Manifest,
        layer: Uuid,
        map: &crate::map_reader::MapReader,
        segment: Uuid,
        frames: Option<&HashSet<u32>>,
    ) -> Result<Vec<Uuid>, StoreError> {
        let shared = &self.shared;
        let replica = manifest.replica;
        let mut suspects = Vec::new();
        for (index, chunk) in map.footer.chunks.iter().enumerate() {
            for entry in map.chunk(&shared.storage, &shared.chunks, index).await?.iter() {
                let hit = entry.place.is_some_and(|place| {
                    place.segment == segment && frames.is_none_or(|frames| frames.contains(&place.offset))
                });
                if hit {
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
                let hit = |place: crate::extent_map::Location| {
                    place.segment == segment && frames.is_none_or(|frames| frames.contains(&place.offset))
                };
                if seen.map_or(true, |seen| seen.iter().any(|entry| entry.place.is_some_and(hit))) {
                    affected.insert(point);
                    break;
                }
            }
        }
        Ok(affected.into_iter().collect())
    }
}

impl ScrubReport {
    fn note(&mut self, bytes: u64, read: Result<(), StoreError>, points: &[Uuid]) -> Result<(), StoreError> {
        self.objects += 1;
        self.bytes += bytes;
        match read {
            Ok(()) => Ok(()),
            Err(StoreError::Damaged { key, what }) => {
                self.damage.push(Damage { key, what, points: points.to_vec() });
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

/// The points whose layer is this one or descends from it.
fn descendants(manifest: &Manifest, layer: Uuid) -> Vec<Uuid> {
    let points = manifest.points.iter();
    points.filter(|point| manifest.ancestry(point.layer).contains(&layer)).map(|point| point.id).collect()
}
