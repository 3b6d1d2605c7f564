//! The store itself: catalogue operations of a replica.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytes::Bytes;
use mainstay_block::frame::Frame;
use object_store::ObjectStore;
use uuid::Uuid;

use crate::cache::ByteCache;
use crate::maintain::Candidates;
use crate::manifest::{DefinitionRef, Manifest, Pin, Point};
use crate::map_reader::ChunkCache;
use crate::reader::Snapshot;
use crate::replica::Replica;
use crate::session::{Session, SessionInner, SessionSpec};
use crate::storage::Storage;
use crate::{Consistency, DiskSpec, PointCounters, StoreError, StoreOptions, keys};

/// Decoded frames by segment and offset.
pub(crate) type FrameCache = ByteCache<(Uuid, u32), Frame>;

/// A recovery point as the catalogue shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PointInfo {
    /// Its id.
    pub id: Uuid,
    /// The session that made it.
    pub session: Uuid,
    /// The point its capture was relative to.
    pub parent: Option<Uuid>,
    /// Generation of the writer.
    pub generation: u64,
    /// Position among all points the replica ever had; grows by one.
    pub sequence: u64,
    /// When it was captured, milliseconds since 1970 UTC, as told at commit.
    pub time_ms: u64,
    /// How consistent it is.
    pub consistency: Consistency,
    /// Its disks.
    pub disks: Vec<DiskSpec>,
    /// Bytes of its definition; 0 when it has none.
    pub definition_bytes: u32,
    /// What its capture cost.
    pub counters: PointCounters,
    /// Whether the head of the lineage descends from it.
    pub in_lineage: bool,
    /// In the catalogue: false only for a deleted point that is pinned or the head.
    pub listed: bool,
    /// How many pins keep it.
    pub pins: usize,
}

/// A replica as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaInfo {
    /// Writers with a lower generation are refused.
    pub generation: u64,
    /// The point that the next capture is relative to.
    pub head: Option<Uuid>,
    /// Bytes of all segments and maps the manifest refers to.
    pub stored_bytes: u64,
    /// Recovery points in the catalogue.
    pub points: usize,
    /// Layers, also those of deleted points that await merging.
    pub layers: usize,
}

/// The store over one object storage. Cheap to clone; all clones share caches and sessions.
#[derive(Clone)]
pub struct Store {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) storage: Storage,
    pub(crate) options: StoreOptions,
    pub(crate) chunks: ChunkCache,
    pub(crate) frames: FrameCache,
    replicas: Mutex<HashMap<Uuid, Arc<Replica>>>,
    sessions: Mutex<HashMap<Uuid, Arc<SessionInner>>>,
    snapshots: Mutex<Vec<Weak<Snapshot>>>,
    pub(crate) candidates: Mutex<HashMap<Uuid, Candidates>>,
    /// Segments that a rewriting met damaged frames in.
    pub(crate) damaged: Mutex<HashSet<Uuid>>,
}

impl Shared {
    pub(crate) fn replica(&self, id: Uuid) -> Arc<Replica> {
        let mut replicas = lock(&self.replicas);
        Arc::clone(replicas.entry(id).or_insert_with(|| Arc::new(Replica::new(id))))
    }

    /// The manifest of a replica that exists.
    pub(crate) async fn manifest(&self, replica: Uuid) -> Result<Arc<Manifest>, StoreError> {
        let manifest = self.replica(replica).load(&self.storage).await?;
        match (manifest.version, manifest.deleted) {
            (0, _) => Err(StoreError::NoReplica(replica)),
            (_, true) => Err(StoreError::Deleted(replica)),
            (_, false) => Ok(manifest),
        }
    }

    /// Edits the manifest of a replica that was not deleted.
    pub(crate) async fn edit<T>(
        &self,
        replica: Uuid,
        mut change: impl FnMut(&mut Manifest) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let target = self.replica(replica);
        let change = |manifest: &mut Manifest| {
            if manifest.deleted {
                return Err(StoreError::Deleted(replica));
            }
            change(manifest)
        };
        target.edit(&self.storage, &*self.options.new_id, change).await
    }

    pub(crate) fn new_id(&self) -> Uuid {
        (self.options.new_id)()
    }

    pub(crate) fn forget_session(&self, session: Uuid) {
        lock(&self.sessions).remove(&session);
    }

    pub(crate) fn register(&self, snapshot: &Arc<Snapshot>) {
        let mut snapshots = lock(&self.snapshots);
        snapshots.retain(|snapshot| snapshot.strong_count() > 0);
        snapshots.push(Arc::downgrade(snapshot));
    }

    pub(crate) fn open_snapshots(&self, replica: Uuid) -> Vec<Arc<Snapshot>> {
        let snapshots = lock(&self.snapshots);
        snapshots.iter().filter_map(Weak::upgrade).filter(|open| open.replica == replica).collect()
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// A store over `storage`; nothing is read yet. For a local directory use
    /// [`local_storage`](crate::local_storage), which syncs what it acknowledges.
    pub fn open(storage: Arc<dyn ObjectStore>, options: StoreOptions) -> Self {
        let shared = Shared {
            storage: Storage::new(storage),
            chunks: ChunkCache::new(options.chunk_cache_bytes),
            frames: FrameCache::new(options.frame_cache_bytes),
            options,
            replicas: Mutex::default(),
            sessions: Mutex::default(),
            snapshots: Mutex::default(),
            candidates: Mutex::default(),
            damaged: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// The replicas there are, also deleted ones whose objects are not all gone.
    ///
    /// # Errors
    /// [`StoreError::Storage`].
    pub async fn replicas(&self) -> Result<Vec<Uuid>, StoreError> {
        let folders = self.shared.storage.folders(&object_store::path::Path::from(keys::ROOT)).await?;
        Ok(folders.iter().filter_map(|folder| folder.filename()?.parse().ok()).collect())
    }

    /// Starts a session, creating the replica with the first one. The same session id again answers the same
    /// session: that is how a sender re-attaches after a broken connection. Another session of the replica that
    /// is still open ends: its sender is gone, or does not know yet that it was replaced.
    ///
    /// # Errors
    /// [`StoreError::Fenced`], [`StoreError::NotHead`], [`StoreError::Committed`] when the session has its point
    /// already, [`StoreError::Invalid`].
    pub async fn begin(&self, spec: SessionSpec) -> Result<Session, StoreError> {
        spec.validate()?;
        let shared = &self.shared;
        let attached = self.attach(spec.session);
        if let Some(dead) = attached.as_ref().filter(|attached| attached.is_dead()) {
            // A segment could not be written; the sender begins again and finds nothing received.
            dead.abort();
        }
        if let Some(Session { inner }) = attached.filter(|attached| !attached.is_dead()) {
            if inner.spec != spec {
                return Err(StoreError::Invalid("the session exists with another specification"));
            }
            let manifest = shared.replica(spec.replica).load(&shared.storage).await?;
            spec.check_fence(&manifest)?;
            return Ok(Session { inner });
        }
        let manifest = shared.replica(spec.replica).load(&shared.storage).await?;
        if manifest.deleted {
            return Err(StoreError::Deleted(spec.replica));
        }
        if let Some(point) = manifest.committed(spec.session) {
            return Err(StoreError::Committed(point));
        }
        spec.check_fence(&manifest)?;
        spec.check_parent(&manifest)?;
        let mut sessions = lock(&shared.sessions);
        sessions.retain(|id, other| {
            let replaced = *id != spec.session && other.spec.replica == spec.replica;
            if replaced {
                other.close();
            }
            !replaced
        });
        let inner = sessions
            .entry(spec.session)
            .or_insert_with_key(|_| Arc::new(SessionInner::new(Arc::clone(shared), spec.clone(), &manifest)));
        Ok(Session { inner: Arc::clone(inner) })
    }

    /// The session, if this process has it.
    pub fn attach(&self, session: Uuid) -> Option<Session> {
        lock(&self.shared.sessions).get(&session).map(|inner| Session { inner: Arc::clone(inner) })
    }

    /// The point a session was committed as: what an agent asks after a crash. `None` is final: a session that
    /// is still open here ends.
    ///
    /// # Errors
    /// [`StoreError::NoReplica`].
    pub async fn committed(&self, replica: Uuid, session: Uuid) -> Result<Option<Uuid>, StoreError> {
        if let Some(open) = self.attach(session)
            && let Some(point) = open.conclude().await
        {
            return Ok(Some(point));
        }
        Ok(self.shared.manifest(replica).await?.committed(session))
    }

    /// The replica as a whole. Reads the footers of its maps.
    ///
    /// # Errors
    /// [`StoreError::NoReplica`], [`StoreError::Deleted`].
    pub async fn replica(&self, replica: Uuid) -> Result<ReplicaInfo, StoreError> {
        let manifest = self.shared.manifest(replica).await?;
        let mut stored = manifest.maps().map(|map| map.bytes).sum::<u64>();
        for layer in &manifest.layers {
            let map = self.shared.open_map(replica, &layer.delta).await?;
            stored += map.footer.segments.iter().map(|segment| u64::from(segment.bytes)).sum::<u64>();
        }
        Ok(ReplicaInfo {
            generation: manifest.generation,
            head: manifest.head,
            stored_bytes: stored,
            points: manifest.points.iter().filter(|point| point.listed).count(),
            layers: manifest.layers.len(),
        })
    }

    /// The point that the next capture is relative to.
    ///
    /// # Errors
    /// [`StoreError::NoReplica`], [`StoreError::Deleted`].
    pub async fn head(&self, replica: Uuid) -> Result<Option<Uuid>, StoreError> {
        Ok(self.shared.manifest(replica).await?.head)
    }

    /// The catalogue, oldest first.
    ///
    /// # Errors
    /// [`StoreError::NoReplica`], [`StoreError::Deleted`].
    pub async fn points(&self, replica: Uuid) -> Result<Vec<PointInfo>, StoreError> {
        let manifest = self.shared.manifest(replica).await?;
        let lineage = lineage(&manifest);
        let listed = manifest.points.iter().filter(|point| point.listed);
        Ok(listed.map(|point| info(&manifest, point, &lineage)).collect())
    }

    /// One point, also one that left the catalogue but is still kept.
    ///
    /// # Errors
    /// [`StoreError::NoPoint`].
    pub async fn point(&self, replica: Uuid, point: Uuid) -> Result<PointInfo, StoreError> {
        let manifest = self.shared.manifest(replica).await?;
        let found = manifest.point(point).ok_or(StoreError::NoPoint(point))?;
        Ok(info(&manifest, found, &lineage(&manifest)))
    }

    /// The definition that came with a point; empty when there was none.
    ///
    /// # Errors
    /// [`StoreError::NoPoint`], [`StoreError::Damaged`].
    pub async fn definition(&self, replica: Uuid, point: Uuid) -> Result<Bytes, StoreError> {
        let manifest = self.shared.manifest(replica).await?;
        let found = manifest.point(point).ok_or(StoreError::NoPoint(point))?;
        match &found.definition {
            None => Ok(Bytes::new()),
            Some(definition) => self.shared.definition(replica, definition).await,
        }
    }

    /// Refuses every writer with a generation below `generation` from now on. Never lowers it.
    ///
    /// # Errors
    /// [`StoreError::Storage`]; the outcome is then unknown, and repeating it is safe.
    pub async fn raise_generation(&self, replica: Uuid, generation: u64) -> Result<u64, StoreError> {
        let raise = |manifest: &mut Manifest| {
            manifest.generation = manifest.generation.max(generation);
            Ok(manifest.generation)
        };
        self.shared.edit(replica, raise).await
    }

    /// Makes `point` the head: what the next capture is relative to. Points that do not lead to it leave
    /// the lineage, but stay in the catalogue until they are deleted. The generation is raised as by
    /// [`Self::raise_generation`].
    ///
    /// # Errors
    /// [`StoreError::NoPoint`], [`StoreError::Fenced`].
    pub async fn set_head(&self, replica: Uuid, point: Uuid, generation: u64) -> Result<(), StoreError> {
        let set = |manifest: &mut Manifest| {
            if generation < manifest.generation {
                return Err(StoreError::Fenced { given: generation, current: manifest.generation });
            }
            manifest.point(point).ok_or(StoreError::NoPoint(point))?;
            manifest.generation = generation;
            manifest.head = Some(point);
            Ok(())
        };
        self.shared.edit(replica, set).await
    }

    /// Proves that storage takes writes for a replica, by one: for those who must know before they begin something that they
    /// could neither finish nor undo without.
    ///
    /// # Errors
    /// [`StoreError::Full`], [`StoreError::NoAccess`], [`StoreError::Storage`].
    pub async fn check_writable(&self, replica: Uuid) -> Result<(), StoreError> {
        let (storage, key) = (&self.shared.storage, keys::probe(replica));
        storage.put(&key, vec![Bytes::from_static(b"probe")]).await?;
        storage.delete(&key).await
    }

    /// Takes points out of the catalogue; unknown ids are ignored. Data that only they need is freed by
    /// maintenance. The head and pinned points keep their data.
    ///
    /// # Errors
    /// [`StoreError::NoReplica`], [`StoreError::Storage`].
    pub async fn delete_points(&self, replica: Uuid, points: &[Uuid]) -> Result<(), StoreError> {
        self.shared.manifest(replica).await?;
        let delete = |manifest: &mut Manifest| {
            for point in manifest.points.iter_mut().filter(|point| points.contains(&point.id)) {
                point.listed = false;
            }
            Ok(())
        };
        self.shared.edit(replica, delete).await
    }

    /// Keeps the data of a point readable, whatever happens to the catalogue, until `pin` is taken away. The
    /// same pin again does nothing.
    ///
    /// # Errors
    /// [`StoreError::NoPoint`]; [`StoreError::Invalid`] when the pin holds another point.
    pub async fn pin(&self, replica: Uuid, point: Uuid, pin: Uuid) -> Result<(), StoreError> {
        self.shared.manifest(replica).await?;
        let add = |manifest: &mut Manifest| {
            if let Some(there) = manifest.pins.iter().find(|there| there.id == pin) {
                let same = there.point == point;
                return if same { Ok(()) } else { Err(StoreError::Invalid("the pin holds another point")) };
            }
            manifest.point(point).ok_or(StoreError::NoPoint(point))?;
            manifest.pins.push(Pin { id: pin, point });
            Ok(())
        };
        self.shared.edit(replica, add).await
    }

    /// Moves a pin to another point, or makes it there: at no moment does it keep neither.
    ///
    /// # Errors
    /// [`StoreError::NoPoint`].
    pub async fn move_pin(&self, replica: Uuid, point: Uuid, pin: Uuid) -> Result<(), StoreError> {
        self.shared.manifest(replica).await?;
        let set = |manifest: &mut Manifest| {
            manifest.point(point).ok_or(StoreError::NoPoint(point))?;
            manifest.pins.retain(|there| there.id != pin);
            manifest.pins.push(Pin { id: pin, point });
            Ok(())
        };
        self.shared.edit(replica, set).await
    }

    /// Takes a pin away; an unknown one is ignored.
    ///
    /// # Errors
    /// [`StoreError::NoReplica`], [`StoreError::Storage`].
    pub async fn unpin(&self, replica: Uuid, pin: Uuid) -> Result<(), StoreError> {
        self.shared.manifest(replica).await?;
        let remove = |manifest: &mut Manifest| {
            manifest.pins.retain(|there| there.id != pin);
            Ok(())
        };
        self.shared.edit(replica, remove).await
    }

    /// Deletes everything of a replica: at once from the catalogue, its objects in later maintenance passes.
    /// A small tombstone remains, so that no late writer can bring the id back to life.
    ///
    /// # Errors
    /// [`StoreError::NoReplica`], [`StoreError::Storage`].
    pub async fn delete_replica(&self, replica: Uuid) -> Result<(), StoreError> {
        match self.shared.manifest(replica).await {
            Err(StoreError::Deleted(_)) => return Ok(()),
            found => found?,
        };
        let delete = |manifest: &mut Manifest| {
            let (version, generation) = (manifest.version, manifest.generation);
            *manifest = Manifest { version, generation, deleted: true, ..Manifest::new(replica) };
            Ok(())
        };
        self.shared.edit(replica, delete).await?;
        lock(&self.shared.sessions).retain(|_, session| session.spec.replica != replica);
        Ok(())
    }

    /// Reads the replica's manifest anew at its next use: after another server changed it.
    pub fn refresh(&self, replica: Uuid) {
        self.shared.replica(replica).forget();
    }
}

impl Shared {
    pub(crate) async fn definition(
        &self,
        replica: Uuid,
        definition: &DefinitionRef,
    ) -> Result<Bytes, StoreError> {
        let key = keys::definition(replica, definition.id);
        let length = u64::from(definition.bytes);
        let decode = |bytes: &[u8]| definition.verify(bytes).map(|()| Bytes::copy_from_slice(bytes));
        self.storage.get_part(&key, 0..length, decode).await
    }
}

/// The layers that lead to the head.
fn lineage(manifest: &Manifest) -> Vec<Uuid> {
    let head = manifest.head.and_then(|head| manifest.point(head));
    head.map(|head| manifest.ancestry(head.layer)).unwrap_or_default()
}

fn info(manifest: &Manifest, point: &Point, lineage: &[Uuid]) -> PointInfo {
    PointInfo {
        id: point.id,
        session: point.session,
        parent: point.parent,
        generation: point.generation,
        sequence: point.sequence,
        time_ms: point.time_ms,
        consistency: point.consistency,
        disks: point.disks.clone(),
        definition_bytes: point.definition.as_ref().map_or(0, |definition| definition.bytes),
        counters: point.counters,
        in_lineage: lineage.contains(&point.layer),
        listed: point.listed,
        pins: manifest.pins.iter().filter(|pin| pin.point == point.id).count(),
    }
}
