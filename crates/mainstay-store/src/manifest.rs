//! The manifest: everything that is true of one replica, in one immutable object per version
//! (`docs/formats/manifest.md`).
//!
//! Version N+1 is written with put-if-absent over version N: the only commit point there is. A recovery
//! point exists when a manifest names it. Layers form a tree: each holds what one capture changed relative to
//! its parent, and perhaps a *jump*, a flattened map of everything since an older ancestor (or since nothing), which
//! bounds how many maps a read has to look at.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::envelope::Envelope;
use crate::map_file::MapRef;
use crate::storage::Copies;

/// A manifest of 100,000 recovery points is below 64 MiB.
pub(crate) const ENVELOPE: Envelope = Envelope { magic: b"MSMANIF1", bytes_max: 64 << 20 };
/// Sessions whose outcome is remembered after their recovery point is gone.
const RECENT_SESSIONS: usize = 64;

/// A disk of a recovery point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// Index in the replica; stays the disk's for the replica's life.
    pub index: u16,
    /// Size in bytes.
    pub bytes: u64,
    /// The caller's name for the disk; opaque.
    pub key: String,
}

/// How much a recovery point's content can be trusted by the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Consistency {
    /// As after a power failure.
    Crash,
    /// The guest's applications and file systems were quiesced.
    App,
    /// Not at all: blocks are of different moments. Never in the catalogue; it only keeps what was transferred, for the
    /// next point to build on.
    Partial,
}

/// What one capture cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointCounters {
    /// Bytes of disk content that came as data.
    pub data_bytes: u64,
    /// Bytes of disk content that came as zeros.
    pub zero_bytes: u64,
    /// Bytes of the segments written for them.
    pub stored_bytes: u64,
    /// Bytes of the layer's map.
    pub map_bytes: u64,
}

/// The opaque description that came with a recovery point, as its own object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DefinitionRef {
    pub(crate) id: Uuid,
    pub(crate) bytes: u32,
    pub(crate) sum: [u8; 32],
}

impl DefinitionRef {
    pub(crate) fn verify(&self, bytes: &[u8]) -> Result<(), &'static str> {
        if *blake3::hash(bytes).as_bytes() == self.sum { Ok(()) } else { Err("checksum") }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Jump {
    pub(crate) map: MapRef,
    /// The map holds what changed after this layer; `None`: everything.
    pub(crate) ancestor: Option<Uuid>,
}

/// Maps to look at, newest first, each with the layer it leads to.
pub(crate) type Path = Vec<(MapRef, Option<Uuid>)>;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Layer {
    pub(crate) id: Uuid,
    pub(crate) parent: Option<Uuid>,
    pub(crate) delta: MapRef,
    pub(crate) jump: Option<Jump>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Point {
    pub(crate) id: Uuid,
    pub(crate) session: Uuid,
    pub(crate) parent: Option<Uuid>,
    pub(crate) layer: Uuid,
    pub(crate) generation: u64,
    pub(crate) sequence: u64,
    pub(crate) time_ms: u64,
    pub(crate) consistency: Consistency,
    pub(crate) disks: Vec<DiskSpec>,
    pub(crate) definition: Option<DefinitionRef>,
    pub(crate) counters: PointCounters,
    /// In the catalogue; otherwise kept only as head of the lineage or because it is pinned.
    pub(crate) listed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pin {
    pub(crate) id: Uuid,
    pub(crate) point: Uuid,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) replica: Uuid,
    pub(crate) version: u64,
    /// Unique per written version: tells a writer whether a put whose answer was lost was its own.
    pub(crate) edit: Uuid,
    pub(crate) deleted: bool,
    pub(crate) generation: u64,
    pub(crate) next_sequence: u64,
    pub(crate) head: Option<Uuid>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) points: Vec<Point>,
    pub(crate) pins: Vec<Pin>,
    pub(crate) recent: Vec<(Uuid, Uuid)>,
}

impl Manifest {
    pub(crate) fn new(replica: Uuid) -> Self {
        Self {
            replica,
            version: 0,
            edit: Uuid::nil(),
            deleted: false,
            generation: 0,
            next_sequence: 1,
            head: None,
            layers: Vec::new(),
            points: Vec::new(),
            pins: Vec::new(),
            recent: Vec::new(),
        }
    }

    pub(crate) fn encode(&self) -> Result<Vec<u8>, &'static str> {
        let plain = postcard::to_stdvec(self).map_err(|_| "manifest does not encode")?;
        ENVELOPE.seal(&[], &plain)
    }

    /// Answers also whether one of its copies is damaged.
    pub(crate) fn decode(object: &Copies, replica: Uuid, version: u64) -> Result<(Self, bool), &'static str> {
        let opened = ENVELOPE.read(&[], object)?;
        let manifest: Self = postcard::from_bytes(&opened.document).map_err(|_| "encoding")?;
        if manifest.replica != replica || manifest.version != version {
            return Err("another manifest's bytes");
        }
        manifest.check()?;
        Ok((manifest, opened.is_damaged))
    }

    /// What must hold of every manifest, before it is written and after it is read.
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        let mut seen = HashSet::new();
        for layer in &self.layers {
            // Parents come first, so the tree has no cycle.
            let known = |id: Option<Uuid>| id.is_none_or(|id| seen.contains(&id));
            if !known(layer.parent) || !known(layer.jump.as_ref().and_then(|jump| jump.ancestor)) {
                return Err("a layer names one that is not there");
            }
            seen.insert(layer.id);
        }
        if self.points.iter().any(|point| !seen.contains(&point.layer)) {
            return Err("a point names a layer that is not there");
        }
        let points: HashSet<Uuid> = self.points.iter().map(|point| point.id).collect();
        if self.head.is_some_and(|head| !points.contains(&head)) {
            return Err("the head is not there");
        }
        if self.pins.iter().any(|pin| !points.contains(&pin.point)) {
            return Err("a pinned point is not there");
        }
        Ok(())
    }

    pub(crate) fn point(&self, id: Uuid) -> Option<&Point> {
        self.points.iter().find(|point| point.id == id)
    }

    pub(crate) fn layer(&self, id: Uuid) -> Option<&Layer> {
        self.layers.iter().find(|layer| layer.id == id)
    }

    pub(crate) fn layer_mut(&mut self, id: Uuid) -> Option<&mut Layer> {
        self.layers.iter_mut().find(|layer| layer.id == id)
    }

    /// The point a session became, also when it has been deleted since.
    pub(crate) fn committed(&self, session: Uuid) -> Option<Uuid> {
        self.recent
            .iter()
            .rev()
            .find(|(of, _)| *of == session)
            .map(|(_, point)| *point)
            .or_else(|| self.points.iter().find(|point| point.session == session).map(|point| point.id))
    }

    pub(crate) fn remember(&mut self, session: Uuid, point: Uuid) {
        self.recent.push((session, point));
        let excess = self.recent.len().saturating_sub(RECENT_SESSIONS);
        self.recent.drain(..excess);
    }

    /// The layer itself and its ancestors, newest first.
    pub(crate) fn ancestry(&self, layer: Uuid) -> Vec<Uuid> {
        let parents: HashMap<Uuid, Option<Uuid>> =
            self.layers.iter().map(|layer| (layer.id, layer.parent)).collect();
        std::iter::successors(Some(layer), |id| parents.get(id).copied().flatten()).collect()
    }

    /// The maps to look at from a layer down to `stop` (excluded; `None` for all), newest first, with the
    /// layer each leads to. Jumps are taken unless they lead past `stop`.
    pub(crate) fn path(&self, layer: Uuid, stop: Option<Uuid>) -> Path {
        let layers: HashMap<Uuid, &Layer> = self.layers.iter().map(|layer| (layer.id, layer)).collect();
        let below: HashSet<Uuid> = match stop {
            Some(stop) => self.ancestry(stop).into_iter().skip(1).collect(),
            None => HashSet::new(),
        };
        let mut path = Vec::new();
        let mut at = Some(layer);
        while let Some(layer) = at.filter(|at| Some(*at) != stop).and_then(|at| layers.get(&at)) {
            let jump = layer.jump.as_ref().filter(|jump| match jump.ancestor {
                Some(ancestor) => !below.contains(&ancestor),
                None => stop.is_none(),
            });
            match jump {
                Some(jump) => {
                    path.push((jump.map.clone(), jump.ancestor));
                    at = jump.ancestor;
                }
                None => {
                    path.push((layer.delta.clone(), layer.parent));
                    at = layer.parent;
                }
            }
        }
        path
    }

    /// Drops points that nothing keeps, then layers that no point needs, then jumps that lead nowhere.
    pub(crate) fn prune(&mut self) {
        let pinned: HashSet<Uuid> = self.pins.iter().map(|pin| pin.point).collect();
        let head = self.head;
        self.points.retain(|point| point.listed || Some(point.id) == head || pinned.contains(&point.id));
        let parents: HashMap<Uuid, Option<Uuid>> =
            self.layers.iter().map(|layer| (layer.id, layer.parent)).collect();
        let mut needed = HashSet::new();
        for point in &self.points {
            let mut at = Some(point.layer);
            while let Some(layer) = at.filter(|layer| needed.insert(*layer)) {
                at = parents.get(&layer).copied().flatten();
            }
        }
        self.layers.retain(|layer| needed.contains(&layer.id));
        for layer in &mut self.layers {
            let useless = layer.jump.as_ref().is_some_and(|jump| {
                jump.ancestor == layer.parent || jump.ancestor.is_some_and(|to| !needed.contains(&to))
            });
            if useless {
                layer.jump = None;
            }
        }
    }

    /// All map objects.
    pub(crate) fn maps(&self) -> impl Iterator<Item = &MapRef> {
        let jumps = self.layers.iter().filter_map(|layer| layer.jump.as_ref().map(|jump| &jump.map));
        self.layers.iter().map(|layer| &layer.delta).chain(jumps)
    }
}
