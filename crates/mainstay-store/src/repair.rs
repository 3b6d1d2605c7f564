//! Putting damaged frames right with what the source still has.
//!
//! A cycle sends blocks that the head cannot read again. Of those that the sender found unchanged since it last sent them
//! the content is that of the damaged frame, so it also heals the layer that the frame belongs to, and with it every
//! point that reads it. That the sender knows this is the same knowledge by which it leaves unchanged blocks out.

use std::collections::{HashMap, HashSet};

use mainstay_block::frame;
use uuid::Uuid;

use crate::extent_map::{Entry, ExtentMap, Location, gaps};
use crate::maintain::compact::{Moved, Rewrite};
use crate::manifest::{Layer, Manifest};
use crate::map_file::MapRef;
use crate::map_reader::MapReader;
use crate::storage::Hold;
use crate::{Store, StoreError, keys};

/// A layer whose damaged frames have been replaced.
pub(crate) struct Repair {
    pub(crate) layer: Uuid,
    pub(crate) from: MapRef,
    pub(crate) to: MapRef,
    _holds: (Moved, Hold),
}

impl Store {
    /// Moves everything that is alive out of a segment; false when the layer changed meanwhile.
    pub(crate) async fn rewrite_segment(
        &self,
        replica: Uuid,
        layer: &Layer,
        segment: Uuid,
    ) -> Result<bool, StoreError> {
        let map = self.shared.open_map(replica, &layer.delta).await?;
        let moved = self.compact_layer(replica, layer, &map, &HashSet::from([segment])).await?;
        Ok(moved.is_some())
    }

    /// Writes maps and segments in which the blocks of `resent` replace those that `layer` and its ancestors show at the
    /// same places, wherever their frames are damaged. They count once a manifest names them.
    pub(crate) async fn write_repairs(
        &self,
        manifest: &Manifest,
        layer: Uuid,
        resent: &ExtentMap,
    ) -> Result<Vec<Repair>, StoreError> {
        let replica = manifest.replica;
        let data = resent.iter().filter(|(_, entry)| entry.place.is_some());
        let mut open: Vec<(u16, u64, u64)> =
            data.map(|(disk, entry)| (disk, entry.start, entry.end())).collect();
        let mut sound = HashMap::new();
        let mut repairs = Vec::new();
        for id in manifest.ancestry(layer) {
            let Some(layer) = manifest.layer(id).filter(|_| !open.is_empty()) else { break };
            let map = match self.shared.open_map(replica, &layer.delta).await {
                Ok(map) => map,
                // What lies below cannot be known.
                Err(StoreError::Damaged { .. }) => break,
                Err(error) => return Err(error),
            };
            let mut broken = Vec::new();
            open = self.look_through(replica, &map, open, &mut sound, &mut broken).await?;
            if broken.is_empty() {
                continue;
            }
            let mut rewrite = Rewrite::new(self, replica);
            broken.sort_unstable_by_key(|(disk, entry)| (*disk, entry.start));
            for (disk, entry) in broken {
                for piece in resent.range(disk, entry.start, entry.end()) {
                    let Some(place) = piece.place else { continue };
                    let data = self.shared.entry_data(replica, disk, &piece, &place).await?;
                    rewrite.push(disk, piece.start, &data).await?;
                }
            }
            let moved = rewrite.finish().await?;
            let (to, hold) = self.write_moved(replica, &map, &moved).await?;
            repairs.push(Repair { layer: id, from: layer.delta.clone(), to, _holds: (moved, hold) });
        }
        Ok(repairs)
    }

    /// Collects the entries of `open` that a map places in damaged frames; answers what it says nothing about.
    async fn look_through(
        &self,
        replica: Uuid,
        map: &MapReader,
        open: Vec<(u16, u64, u64)>,
        sound: &mut HashMap<(Uuid, u32), bool>,
        broken: &mut Vec<(u16, Entry)>,
    ) -> Result<Vec<(u16, u64, u64)>, StoreError> {
        let shared = &self.shared;
        let mut left = Vec::new();
        for (disk, from, to) in open {
            let entries = match map.range(&shared.storage, &shared.chunks, disk, from, to).await {
                Ok(entries) => entries,
                Err(StoreError::Damaged { .. }) => continue,
                Err(error) => return Err(error),
            };
            left.extend(gaps(&entries, from, to).into_iter().map(|(from, to)| (disk, from, to)));
            for entry in entries {
                let Some(place) = entry.place else { continue };
                let key = (place.segment, place.offset);
                let is_sound = match sound.get(&key) {
                    Some(known) => *known,
                    None => {
                        let found = self.is_sound(replica, &place).await?;
                        sound.insert(key, found);
                        found
                    }
                };
                if !is_sound {
                    broken.push((disk, entry));
                }
            }
        }
        Ok(left)
    }

    /// Whether a frame can be read from storage, whatever a cache still has of it.
    async fn is_sound(&self, replica: Uuid, at: &Location) -> Result<bool, StoreError> {
        let key = keys::segment(replica, at.segment);
        let read = self.shared.storage.get_range(&key, u64::from(at.offset), u64::from(at.length)).await;
        match read {
            Ok(bytes) => Ok(frame::inspect(&bytes).is_ok()),
            Err(StoreError::Damaged { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}
