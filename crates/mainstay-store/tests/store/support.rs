//! Shared by the store's tests: an object store that can be made to fail, and captures with their oracle.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use mainstay_block::BLOCK_BYTES;
use mainstay_block::frame::{Effort, FrameBuilder};
use mainstay_store::{
    Consistency, DiskSpec, FrameUse, PointMeta, SessionSpec, Store, StoreError, StoreOptions,
};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use uuid::Uuid;

pub(crate) const REPLICA: Uuid = Uuid::from_u128(0xabc);

/// Object storage that dies at the n-th mutation, before or after it takes effect, and stays dead.
#[derive(Debug)]
pub(crate) struct Dying {
    pub(crate) inner: Arc<InMemory>,
    /// Mutations left.
    left: AtomicI64,
    /// Whether the last one takes effect although it is answered with an error.
    effect: bool,
    pub(crate) mutations: AtomicU64,
    pub(crate) gets: AtomicU64,
}

impl Dying {
    pub(crate) fn new(inner: &Arc<InMemory>, after: i64, effect: bool) -> Arc<Self> {
        Arc::new(Self {
            inner: Arc::clone(inner),
            left: AtomicI64::new(after),
            effect,
            mutations: AtomicU64::new(0),
            gets: AtomicU64::new(0),
        })
    }

    fn error() -> object_store::Error {
        object_store::Error::Generic { store: "dying", source: "injected".into() }
    }

    /// `Ok(true)`: go on; `Ok(false)`: do it, then fail.
    fn spend(&self) -> Result<bool> {
        self.mutations.fetch_add(1, Ordering::SeqCst);
        match self.left.fetch_sub(1, Ordering::SeqCst) {
            1.. => Ok(true),
            0 if self.effect => Ok(false),
            _ => Err(Self::error()),
        }
    }

    fn alive(&self) -> Result<()> {
        self.gets.fetch_add(1, Ordering::SeqCst);
        if self.left.load(Ordering::SeqCst) >= 0 { Ok(()) } else { Err(Self::error()) }
    }
}

impl fmt::Display for Dying {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("dying")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Dying {
    async fn put_opts(&self, at: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let go_on = self.spend()?;
        let done = self.inner.put_opts(at, payload, options).await?;
        if go_on { Ok(done) } else { Err(Self::error()) }
    }

    async fn put_multipart_opts(
        &self,
        _at: &Path,
        _options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        Err(Self::error())
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        self.alive()?;
        self.inner.get_opts(at, options).await
    }

    fn delete_stream(&self, at: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        match self.spend() {
            Ok(true) => self.inner.delete_stream(at),
            Ok(false) => {
                let done = self.inner.delete_stream(at);
                done.map(|done| done.and_then(|_| Err(Self::error()))).boxed()
            }
            Err(error) => futures::stream::iter([Err(error)]).boxed(),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.alive() {
            Ok(()) => self.inner.list(prefix),
            Err(error) => futures::stream::iter([Err(error)]).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.alive()?;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, _from: &Path, _to: &Path, _options: CopyOptions) -> Result<()> {
        Err(Self::error())
    }
}

/// Small limits, so that few blocks exercise everything; ids count up from `first_id`.
pub(crate) fn options(first_id: u64) -> StoreOptions {
    let next = AtomicU64::new(1);
    StoreOptions {
        segment_bytes: 20_000,
        uploads_in_flight: 2,
        upload_attempts: 1,
        upload_retry: Duration::ZERO,
        path_maps_max: 4,
        frame_cache_bytes: 100_000,
        chunk_cache_bytes: 100_000,
        garbage_age_ms: 0,
        manifest_age: Duration::ZERO,
        compact_small_segments: 3,
        new_id: Arc::new(move || Uuid::from_u64_pair(first_id + 1, next.fetch_add(1, Ordering::SeqCst))),
        ..StoreOptions::default()
    }
}

pub(crate) type Disks = Vec<(u16, Vec<u8>)>;

/// One write of a capture.
#[derive(Clone, Debug)]
pub(crate) struct Write {
    pub(crate) disk: u16,
    pub(crate) block: u64,
    pub(crate) count: u64,
    /// `None`: zeros.
    pub(crate) seed: Option<u8>,
}

pub(crate) fn specs(disks: &Disks) -> Vec<DiskSpec> {
    let spec = |(index, bytes): &(u16, Vec<u8>)| DiskSpec {
        index: *index,
        bytes: bytes.len() as u64,
        key: format!("vd{index}"),
    };
    disks.iter().map(spec).collect()
}

/// Applies writes to the oracle and returns the frames a sender would make of them, one frame per few
/// writes. Writes outside a disk are ignored.
pub(crate) fn apply(disks: &mut Disks, writes: &[Write]) -> Vec<Bytes> {
    let mut frames = Vec::new();
    let mut builder = FrameBuilder::new();
    for write in writes {
        let Some((_, bytes)) = disks.iter_mut().find(|(index, _)| *index == write.disk) else { continue };
        let from = (write.block * BLOCK_BYTES) as usize;
        let to = ((write.block + write.count) * BLOCK_BYTES).min(bytes.len() as u64) as usize;
        if from >= to {
            continue;
        }
        let part = &mut bytes[from..to];
        for (at, byte) in part.iter_mut().enumerate() {
            *byte = write.seed.map_or(0, |seed| {
                (at as u8).wrapping_mul(31).wrapping_add(seed).wrapping_add((at / 4096) as u8)
            });
        }
        let blocks = (to - from).div_ceil(BLOCK_BYTES as usize);
        if !builder.accepts(write.disk, write.block) || builder.room() < blocks {
            frames.push(std::mem::take(&mut builder).finish(Effort::Small).unwrap());
        }
        match write.seed {
            Some(_) => builder.push_data(write.disk, write.block, part).unwrap(),
            None => builder.push_zero(write.disk, write.block, blocks as u32).unwrap(),
        }
    }
    if !builder.is_empty() {
        frames.push(builder.finish(Effort::Small).unwrap());
    }
    frames
}

pub(crate) fn meta(time_ms: u64) -> PointMeta {
    PointMeta {
        time_ms,
        consistency: Consistency::Crash,
        definition: Some(Bytes::from(format!("definition {}", time_ms / 3))),
    }
}

pub(crate) fn spec(session: u128, parent: Option<Uuid>, disks: &Disks, fork: bool) -> SessionSpec {
    SessionSpec {
        session: Uuid::from_u128(session),
        replica: REPLICA,
        generation: 1,
        parent,
        disks: specs(disks),
        fork,
    }
}

/// A whole capture.
pub(crate) async fn capture(store: &Store, spec: SessionSpec, frames: &[Bytes]) -> Result<Uuid, StoreError> {
    let time = spec.session.as_u128() as u64;
    let session = store.begin(spec).await?;
    for (sequence, frame) in (1..).zip(frames) {
        session.append(sequence, frame.clone(), FrameUse::Changed).await?;
    }
    session.commit(meta(time)).await
}

/// Reads all disks of a point.
pub(crate) async fn read(store: &Store, point: Uuid) -> Result<Disks, StoreError> {
    let reader = store.open_point(REPLICA, point).await?;
    let mut disks = Disks::new();
    for disk in reader.info().disks.clone() {
        let data = reader.disk(disk.index)?.read_range(0, disk.bytes).await?;
        disks.push((disk.index, data.to_vec()));
    }
    Ok(disks)
}

pub(crate) fn one_disk() -> Disks {
    vec![(0, vec![0; 400_000])]
}

pub(crate) fn write(block: u64, seed: u8) -> [Write; 1] {
    [Write { disk: 0, block, count: 2, seed: Some(seed) }]
}
