//! A session: the frames of one capture on their way to becoming a recovery point.
//!
//! Frames are numbered from 1. They are collected into segments, which are written in the background; a frame is
//! *durable* once its segment and all before it are. Nothing of a session is visible before its commit, and a
//! session lives only in the memory of its server: after a restart the sender transfers again.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use mainstay_block::frame::{self, RunKind};
use mainstay_block::{BLOCK_BYTES, blocks_of};
use tokio::sync::{Semaphore, watch};
use uuid::Uuid;

use crate::extent_map::{Entry, ExtentMap, Location};
use crate::maintain::compact::replace_delta;
use crate::manifest::{DefinitionRef, Jump, Layer, Manifest, Path, Point};
use crate::map_file::{MapRef, MapWriter, SegmentInfo};
use crate::map_reader::{MapReader, flatten, segment_infos};
use crate::segment::{HEADER_BYTES, SEGMENT_BYTES_MAX, SegmentBuilder, length, room_of};
use crate::storage::Hold;
use crate::store::{Shared, lock};
use crate::{Consistency, DiskSpec, PointCounters, Store, StoreError, keys};

/// Largest definition of a VM: libvirt XML, UEFI variables and vTPM state together are a few hundred KiB.
const DEFINITION_BYTES_MAX: usize = 16 << 20;
/// Most disks of a replica: no hypervisor we drive attaches more to one VM.
const DISKS_MAX: usize = 256;

/// What a session is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionSpec {
    /// Chosen by the sender; makes begin and commit idempotent.
    pub session: Uuid,
    /// The replica.
    pub replica: Uuid,
    /// The writer's generation.
    pub generation: u64,
    /// The point the capture is relative to; `None`: relative to nothing, all blocks not sent are zeros.
    pub parent: Option<Uuid>,
    /// The disks at the moment of capture. A disk of the parent that is missing here, or the end of one that
    /// shrank, becomes zeros.
    pub disks: Vec<DiskSpec>,
    /// Allow a parent that is not the head (or none although there is a head): the new point then
    /// becomes the head of a new lineage.
    pub fork: bool,
}

/// What a commit adds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PointMeta {
    /// When the capture was taken, milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// How consistent it is.
    pub consistency: Consistency,
    /// Opaque description of the VM.
    pub definition: Option<Bytes>,
}

impl SessionSpec {
    pub(crate) fn validate(&self) -> Result<(), StoreError> {
        let mut indices: Vec<u16> = self.disks.iter().map(|disk| disk.index).collect();
        indices.sort_unstable();
        indices.dedup();
        if indices.len() != self.disks.len() || indices.is_empty() || indices.len() > DISKS_MAX {
            return Err(StoreError::Invalid("disks must be 1 to 256 with distinct indices"));
        }
        if self.disks.iter().any(|disk| disk.bytes > i64::MAX as u64 || disk.key.len() > 4096) {
            return Err(StoreError::Invalid("a disk is too large or its key too long"));
        }
        Ok(())
    }

    pub(crate) fn check_fence(&self, manifest: &Manifest) -> Result<(), StoreError> {
        if self.generation < manifest.generation {
            return Err(StoreError::Fenced { given: self.generation, current: manifest.generation });
        }
        Ok(())
    }

    pub(crate) fn check_parent(&self, manifest: &Manifest) -> Result<(), StoreError> {
        if let Some(parent) = self.parent {
            manifest.point(parent).ok_or(StoreError::NoPoint(parent))?;
        }
        if self.parent != manifest.head && !self.fork {
            return Err(StoreError::NotHead { head: manifest.head });
        }
        Ok(())
    }
}

/// What a frame is sent for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameUse {
    /// Its blocks differ from the parent's, as far as the sender knows.
    Changed,
    /// Its blocks are the parent's, sent again because the store asked for them.
    Resent,
}

/// A frame that has been received.
#[derive(Debug)]
pub enum Received {
    /// Anywhere.
    Elsewhere(Bytes),
    /// In the room that [`Session::room`] gave for it.
    InPlace {
        /// The frame, at the beginning of the room.
        frame: BytesMut,
        /// The room after it.
        rest: BytesMut,
    },
}

impl From<Bytes> for Received {
    fn from(bytes: Bytes) -> Self {
        Self::Elsewhere(bytes)
    }
}

impl Received {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Elsewhere(bytes) => bytes,
            Self::InPlace { frame, .. } => frame,
        }
    }
}

/// A handle to a session; clones and re-attached handles are the same session.
#[derive(Clone)]
pub struct Session {
    pub(crate) inner: Arc<SessionInner>,
}

pub(crate) struct SessionInner {
    pub(crate) spec: SessionSpec,
    shared: Arc<Shared>,
    parent_disks: Vec<DiskSpec>,
    sizes: HashMap<u16, u64>,
    state: Mutex<State>,
    /// One append at a time, so that segments are handed over in order.
    appending: tokio::sync::Mutex<()>,
    committing: tokio::sync::Mutex<Option<Uuid>>,
    uploads: Arc<Semaphore>,
    progress: watch::Sender<Progress>,
}

#[derive(Default)]
struct State {
    map: ExtentMap,
    /// Of the map, the data that came again.
    resent: ExtentMap,
    builder: Option<SegmentBuilder>,
    /// Rooms of segments that have been written: what the kernel gives anew it clears, page by page.
    spare: Vec<BytesMut>,
    received: u64,
    segments: HashMap<Uuid, SegmentInfo>,
    holds: Vec<Hold>,
    /// Segments being uploaded, by the last frame they hold; true once written.
    sealed: BTreeMap<u64, bool>,
    counters: PointCounters,
    closed: bool,
}

#[derive(Clone, Debug, Default)]
struct Progress {
    durable: u64,
    failed: Option<StoreError>,
}

impl SessionInner {
    pub(crate) fn new(shared: Arc<Shared>, spec: SessionSpec, manifest: &Manifest) -> Self {
        let parent = spec.parent.and_then(|parent| manifest.point(parent));
        Self {
            sizes: spec.disks.iter().map(|disk| (disk.index, disk.bytes)).collect(),
            parent_disks: parent.map(|parent| parent.disks.clone()).unwrap_or_default(),
            uploads: Arc::new(Semaphore::new(shared.options.uploads_in_flight.max(1))),
            spec,
            shared,
            state: Mutex::default(),
            appending: tokio::sync::Mutex::default(),
            committing: tokio::sync::Mutex::default(),
            progress: watch::Sender::new(Progress::default()),
        }
    }
}

impl Session {
    /// What it was begun with.
    pub fn spec(&self) -> &SessionSpec {
        &self.inner.spec
    }

    /// The number of frames received, durable or not: a sender that reconnects goes on after it.
    pub fn received(&self) -> u64 {
        lock(&self.inner.state).received
    }

    /// The number of frames that are durable.
    pub fn durable(&self) -> u64 {
        self.inner.progress.borrow().durable
    }

    /// Room for the next frame where it is to lie until its segment is written, if it has so many bytes: it is not copied
    /// then. Without room it is received elsewhere.
    pub fn room(&self, bytes: usize) -> Option<BytesMut> {
        let inner = &self.inner;
        let mut state = lock(&inner.state);
        if state.closed {
            return None;
        }
        let mut builder = state.builder.take().unwrap_or_else(|| self.new_segment(&mut state));
        let spare = |bytes| state.spare.pop().unwrap_or_else(|| BytesMut::with_capacity(bytes));
        let room = builder.take_room(bytes, spare, inner.segment_bytes());
        state.builder = Some(builder);
        room
    }

    /// Takes frame number `sequence`. Verifies its checksum and returns once it is buffered, which waits while
    /// too many segments are being written. A frame that was received before is ignored.
    ///
    /// # Errors
    /// [`StoreError::Frame`], [`StoreError::OutOfOrder`], [`StoreError::Invalid`] for blocks outside the disks, or
    /// why an earlier segment could not be written; the session is then lost.
    pub async fn append(
        &self,
        sequence: u64,
        received: impl Into<Received>,
        used: FrameUse,
    ) -> Result<(), StoreError> {
        let received = received.into();
        let inner = &self.inner;
        let _guard = inner.appending.lock().await;
        self.check_alive()?;
        let expected = self.received() + 1;
        if sequence < expected {
            return Ok(());
        }
        if sequence > expected {
            return Err(StoreError::OutOfOrder { given: sequence, expected });
        }
        let runs = frame::inspect(received.bytes())?;
        for run in &runs {
            let blocks = inner.sizes.get(&run.disk).map(|bytes| blocks_of(*bytes));
            if blocks.is_none_or(|blocks| run.block + u64::from(run.count) > blocks) {
                return Err(StoreError::Invalid("a frame names blocks outside its disk"));
            }
        }
        let full = {
            let mut state = lock(&inner.state);
            let builder = state.builder.take();
            let mut builder = builder.unwrap_or_else(|| self.new_segment(&mut state));
            let blocks: u32 = runs.iter().filter(|run| run.kind == RunKind::Data).map(|run| run.count).sum();
            let (offset, length) = match received {
                Received::Elsewhere(bytes) => builder.push(bytes, blocks),
                Received::InPlace { frame, rest } => builder.push_received(frame, rest, blocks),
            };
            let mut index = 0u16;
            for run in runs {
                let place = (run.kind == RunKind::Data).then_some(Location {
                    segment: builder.id,
                    offset,
                    length,
                    index,
                });
                let bytes = u64::from(run.count) * BLOCK_BYTES;
                if place.is_some() {
                    index += run.count as u16;
                    state.counters.data_bytes += bytes;
                } else {
                    state.counters.zero_bytes += bytes;
                }
                let entry = Entry { start: run.block, count: u64::from(run.count), place };
                state.map.insert(run.disk, entry);
                match used {
                    FrameUse::Resent => state.resent.insert(run.disk, entry),
                    FrameUse::Changed if state.resent.is_empty() => {}
                    FrameUse::Changed => state.resent.insert(run.disk, Entry { place: None, ..entry }),
                }
            }
            state.received = sequence;
            if state.map.len() > inner.shared.options.session_entries_max {
                return Err(StoreError::Invalid("the session has too many extents"));
            }
            let full = builder.len() >= inner.segment_bytes();
            state.builder = Some(builder);
            full
        };
        if full { self.seal().await } else { Ok(()) }
    }

    /// Hands the frames received so far over to storage without waiting for a full segment; [`Self::wait_durable`]
    /// tells when they are durable.
    ///
    /// # Errors
    /// Why an earlier segment could not be written.
    pub async fn flush(&self) -> Result<(), StoreError> {
        let _guard = self.inner.appending.lock().await;
        self.check_alive()?;
        self.seal().await
    }

    /// Waits until `sequence` frames are durable and returns how many are.
    ///
    /// # Errors
    /// Why a segment could not be written.
    pub async fn wait_durable(&self, sequence: u64) -> Result<u64, StoreError> {
        let mut progress = self.inner.progress.subscribe();
        let seen = progress.wait_for(|seen| seen.durable >= sequence || seen.failed.is_some()).await;
        let seen = seen.map_err(StoreError::internal)?.clone();
        match seen.failed {
            Some(error) if seen.durable < sequence => Err(error),
            _ => Ok(seen.durable),
        }
    }

    /// Ends the session without a recovery point; its segments are garbage.
    pub fn abort(&self) {
        self.inner.close();
        self.inner.shared.forget_session(self.inner.spec.session);
    }

    fn check_alive(&self) -> Result<(), StoreError> {
        if let Some(error) = self.inner.progress.borrow().failed.clone() {
            return Err(error);
        }
        if lock(&self.inner.state).closed {
            return Err(StoreError::NoSession(self.inner.spec.session));
        }
        Ok(())
    }

    fn new_segment(&self, state: &mut State) -> SegmentBuilder {
        let inner = &self.inner;
        let id = inner.shared.new_id();
        state.holds.push(inner.shared.storage.hold(&keys::segment(inner.spec.replica, id)));
        SegmentBuilder::new(inner.spec.replica, id, inner.spec.session)
    }

    /// Closes the current segment and starts writing it. The permit is taken first, so that cancelling the
    /// caller loses nothing.
    async fn seal(&self) -> Result<(), StoreError> {
        let inner = &self.inner;
        let permit = Arc::clone(&inner.uploads).acquire_owned().await.map_err(StoreError::internal)?;
        let (builder, last) = {
            let mut state = lock(&inner.state);
            let taken = state.builder.take_if(|builder| !builder.is_empty());
            let Some(builder) = taken else { return Ok(()) };
            let last = state.received;
            state.sealed.insert(last, false);
            (builder, last)
        };
        let (id, blocks) = (builder.id, builder.blocks);
        let bytes = builder.finish();
        {
            let mut state = lock(&inner.state);
            state.segments.insert(id, SegmentInfo { blocks, bytes: length(&bytes) as u32 });
            state.counters.stored_bytes += length(&bytes);
        }
        let owner = Arc::clone(inner);
        tokio::spawn(async move {
            let _permit = permit;
            let written = owner.upload(id, bytes.clone()).await;
            owner.note(last, written, bytes);
        });
        Ok(())
    }

    /// Makes the recovery point and returns its id. The same session again, also after a restart of the
    /// server, answers the same point. After [`StoreError::Storage`] or [`StoreError::Busy`] call it again; other
    /// errors are final.
    ///
    /// # Errors
    /// [`StoreError::Fenced`], [`StoreError::NotHead`], [`StoreError::Full`] and those of writing segments.
    pub async fn commit(&self, meta: PointMeta) -> Result<Uuid, StoreError> {
        if meta.definition.as_ref().is_some_and(|definition| definition.len() > DEFINITION_BYTES_MAX) {
            return Err(StoreError::Invalid("the definition is too large"));
        }
        // In a task of its own: a caller that goes away must not leave a manifest behind that lands later
        // than somebody was told that there is none.
        let session = self.clone();
        let task = tokio::spawn(async move { session.commit_once(&meta).await });
        task.await.map_err(StoreError::internal)?
    }

    async fn commit_once(&self, meta: &PointMeta) -> Result<Uuid, StoreError> {
        let inner = &self.inner;
        let mut committed = inner.committing.lock().await;
        if let Some(point) = *committed {
            return Ok(point);
        }
        self.flush().await?;
        self.wait_durable(self.received()).await?;
        let point = inner.commit(meta).await?;
        *committed = Some(point);
        lock(&inner.state).closed = true;
        inner.shared.forget_session(inner.spec.session);
        Ok(point)
    }

    /// Waits for a commit that is under way and returns its point; without one, ends the session, which then
    /// can never become a point.
    pub async fn conclude(&self) -> Option<Uuid> {
        let committed = self.inner.committing.lock().await;
        if committed.is_none() {
            self.abort();
        }
        *committed
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.inner.progress.borrow().failed.is_some()
    }
}

impl SessionInner {
    /// Refuses everything from now on.
    pub(crate) fn close(&self) {
        lock(&self.state).closed = true;
        let error = StoreError::NoSession(self.spec.session);
        self.progress.send_modify(|seen| seen.failed = Some(error));
    }

    async fn upload(&self, id: Uuid, bytes: Vec<Bytes>) -> Result<(), StoreError> {
        let options = &self.shared.options;
        if !(options.has_room)(length(&bytes)) {
            return Err(StoreError::Full);
        }
        let key = keys::segment(self.spec.replica, id);
        let mut pause = options.upload_retry;
        for attempt in 1.. {
            match self.shared.storage.put(&key, bytes.clone()).await {
                Err(error) if error.is_transient() && attempt < options.upload_attempts => {
                    tracing::debug!(%key, attempt, %error, "segment will be written again");
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                done => return done,
            }
        }
        Ok(())
    }

    fn segment_bytes(&self) -> usize {
        self.shared.options.segment_bytes.min(SEGMENT_BYTES_MAX)
    }

    fn note(&self, last: u64, written: Result<(), StoreError>, segment: Vec<Bytes>) {
        let mut state = lock(&self.state);
        if !state.closed && state.spare.len() < self.shared.options.uploads_in_flight {
            state.spare.extend(room_of(segment));
        }
        if let Err(error) = written {
            self.progress.send_modify(|seen| seen.failed = Some(error));
            return;
        }
        state.sealed.insert(last, true);
        let mut durable = None;
        while let Some(first) = state.sealed.first_entry().filter(|first| *first.get()) {
            durable = Some(*first.key());
            first.remove();
        }
        if let Some(durable) = durable {
            self.progress.send_modify(|seen| seen.durable = durable);
        }
    }

    /// Writes layer and definition, then the manifest.
    async fn commit(&self, meta: &PointMeta) -> Result<Uuid, StoreError> {
        let shared = &self.shared;
        let replica = self.spec.replica;
        let manifest = shared.replica(replica).load(&shared.storage).await?;
        if manifest.deleted {
            return Err(StoreError::Deleted(replica));
        }
        if manifest.committed(self.spec.session).is_none() {
            // Fail early, before writing; the edit below decides.
            self.spec.check_fence(&manifest)?;
            self.spec.check_parent(&manifest)?;
        }
        let (delta, _delta_hold) = self.write_delta().await?;
        let (definition, _definition_hold) = self.write_definition(&manifest, meta).await?;
        let parent_layer =
            self.spec.parent.and_then(|parent| manifest.point(parent)).map(|parent| parent.layer);
        let resent = lock(&self.state).resent.clone();
        let repairs = match parent_layer.filter(|_| !resent.is_empty()) {
            Some(parent) => {
                let store = Store { shared: Arc::clone(shared) };
                store.write_repairs(&manifest, parent, &resent).await?
            }
            None => Vec::new(),
        };
        let layer = shared.new_id();
        let (jump, _jump_hold) = match (&delta, parent_layer) {
            (Some(delta), Some(parent)) => self.write_jump(&manifest, delta, parent).await?,
            _ => (None, None),
        };
        let id = shared.new_id();
        let mut counters = lock(&self.state).counters;
        counters.map_bytes = delta.as_ref().map_or(0, |delta| delta.bytes);
        let commit = |manifest: &mut Manifest| {
            if let Some(point) = manifest.committed(self.spec.session) {
                return Ok(point);
            }
            self.spec.check_fence(manifest)?;
            self.spec.check_parent(manifest)?;
            for repair in &repairs {
                // Not if maintenance rewrote the layer meanwhile: then its damage is found again.
                replace_delta(manifest, repair.layer, &repair.from, &repair.to);
            }
            let parent_layer =
                self.spec.parent.and_then(|parent| manifest.point(parent)).map(|parent| parent.layer);
            let layer = match (&delta, parent_layer) {
                // Nothing changed: the point shares its parent's layer.
                (None, Some(parent)) => parent,
                (None, None) => return Err(StoreError::Invalid("a first layer cannot be absent")),
                (Some(delta), parent) => {
                    // Maintenance may have rewritten the maps that the jump was made from; it would then
                    // name segments that are about to be collected.
                    let made_from = jump.as_ref().map(|(_, path)| path);
                    let fresh = made_from == parent.map(|parent| manifest.path(parent, None)).as_ref();
                    let jump = jump.clone().filter(|_| fresh).map(|(jump, _)| jump);
                    manifest.layers.push(Layer { id: layer, parent, delta: delta.clone(), jump });
                    layer
                }
            };
            manifest.points.push(Point {
                id,
                session: self.spec.session,
                parent: self.spec.parent,
                layer,
                generation: self.spec.generation,
                sequence: manifest.next_sequence,
                time_ms: meta.time_ms,
                consistency: meta.consistency,
                disks: self.spec.disks.clone(),
                definition: definition.clone(),
                counters,
                listed: meta.consistency != Consistency::Partial,
            });
            manifest.next_sequence += 1;
            manifest.generation = self.spec.generation;
            manifest.head = Some(id);
            manifest.remember(self.spec.session, id);
            Ok(id)
        };
        shared.edit(replica, commit).await
    }

    /// The layer's map; `None` when nothing changed since the parent.
    async fn write_delta(&self) -> Result<(Option<MapRef>, Option<Hold>), StoreError> {
        let (writer, id) = {
            let mut state = lock(&self.state);
            // What the parent has beyond the disks of this capture must read as zeros, also when a disk grows
            // again later.
            for disk in &self.parent_disks {
                let now = self.sizes.get(&disk.index).map_or(0, |bytes| blocks_of(*bytes));
                let before = blocks_of(disk.bytes);
                if now < before {
                    let tail = Entry { start: now, count: before - now, place: None };
                    state.map.insert(disk.index, tail);
                }
            }
            if state.map.is_empty() && self.spec.parent.is_some() {
                return Ok((None, None));
            }
            let id = self.shared.new_id();
            let mut writer = MapWriter::new(self.spec.replica, id, state.segments.clone());
            for (disk, entry) in state.map.iter() {
                if self.spec.parent.is_some() || entry.place.is_some() {
                    writer.push(disk, entry).map_err(StoreError::internal)?;
                }
            }
            (writer, id)
        };
        let (reference, hold) = self.shared.write_map(self.spec.replica, id, writer).await?;
        Ok((Some(reference), Some(hold)))
    }

    async fn write_definition(
        &self,
        manifest: &Manifest,
        meta: &PointMeta,
    ) -> Result<(Option<DefinitionRef>, Option<Hold>), StoreError> {
        let Some(definition) = meta.definition.as_ref().filter(|definition| !definition.is_empty()) else {
            return Ok((None, None));
        };
        let sum = *blake3::hash(definition).as_bytes();
        // The parent is kept at least until this commit, so its object can be shared.
        let parent = self.spec.parent.and_then(|parent| manifest.point(parent));
        if let Some(same) = parent.and_then(|parent| parent.definition.as_ref()).filter(|d| d.sum == sum) {
            return Ok((Some(same.clone()), None));
        }
        let id = self.shared.new_id();
        let key = keys::definition(self.spec.replica, id);
        let hold = self.shared.storage.hold(&key);
        self.shared.storage.put_twice(&key, definition.clone()).await?;
        Ok((Some(DefinitionRef { id, bytes: definition.len() as u32, sum }), Some(hold)))
    }

    /// Keeps the number of maps a read has to look at bounded even when maintenance does not run.
    async fn write_jump(
        &self,
        manifest: &Manifest,
        delta: &MapRef,
        parent: Uuid,
    ) -> Result<(Option<(Jump, Path)>, Option<Hold>), StoreError> {
        let limit = self.shared.options.path_maps_max.max(2);
        let below = manifest.path(parent, None);
        if below.len() < limit * 2 {
            return Ok((None, None));
        }
        let mut path = below.clone();
        path.insert(0, (delta.clone(), Some(parent)));
        let (jump, hold) = self.shared.write_jump(self.spec.replica, &path, limit).await?;
        Ok((Some((jump, below)), Some(hold)))
    }
}

impl Shared {
    pub(crate) async fn open_map(&self, replica: Uuid, map: &MapRef) -> Result<MapReader, StoreError> {
        MapReader::open(&self.storage, replica, map).await
    }

    pub(crate) async fn write_map(
        &self,
        replica: Uuid,
        id: Uuid,
        writer: MapWriter,
    ) -> Result<(MapRef, Hold), StoreError> {
        let (bytes, reference, _) = writer.finish().map_err(StoreError::internal)?;
        let key = keys::map(replica, id);
        let hold = self.storage.hold(&key);
        self.storage.put_twice(&key, bytes).await?;
        Ok((reference, hold))
    }

    /// Flattens the newest part of a path. How much: at least half of the maps, and then every further one
    /// that is not larger than all before it together, so that each entry is rewritten only as often as the
    /// logarithm of the number of captures, and small captures do not rewrite a large base each time.
    pub(crate) async fn write_jump(
        &self,
        replica: Uuid,
        path: &[(MapRef, Option<Uuid>)],
        limit: usize,
    ) -> Result<(Jump, Hold), StoreError> {
        let least = (path.len() + 1).saturating_sub(limit / 2).max(2);
        let (mut take, mut bytes) = (0, 0);
        for (map, _) in path {
            if take >= least && map.bytes > bytes {
                break;
            }
            bytes += map.bytes;
            take += 1;
        }
        let mut maps = Vec::with_capacity(take);
        for (map, _) in &path[..take] {
            maps.push(self.open_map(replica, map).await?);
        }
        let ancestor = path[take - 1].1;
        let id = self.new_id();
        let writer = MapWriter::new(replica, id, segment_infos(&maps));
        let writer = flatten(&self.storage, &self.chunks, &maps, ancestor.is_some(), writer).await?;
        let (map, hold) = self.write_map(replica, id, writer).await?;
        Ok((Jump { map, ancestor }, hold))
    }
}

const _: () = assert!(HEADER_BYTES < SEGMENT_BYTES_MAX);
