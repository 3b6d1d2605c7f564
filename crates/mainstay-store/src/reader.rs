//! Reading a recovery point.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};
use mainstay_block::frame::{FRAME_BYTES_MAX, Frame, RunKind};
use mainstay_block::{
    BLOCK_BYTES, BlockDevice, BlockError, BlockHash, BlockHasher, Extent, ExtentKind, HashKey, blocks_of,
    check_range,
};
use uuid::Uuid;

use crate::extent_map::{Entry, Location, gaps, push_joined};
use crate::map_file::MapRef;
use crate::map_reader::MapReader;
use crate::store::Shared;
use crate::{PointInfo, Store, StoreError, keys};

/// Frames one read fetches at the same time.
const FRAMES_IN_FLIGHT: usize = 8;
/// Footers fetched at the same time when a point is opened.
const FOOTERS_IN_FLIGHT: usize = 16;
/// Longest read answered at once; longer ones are refused, so that a peer cannot make us allocate.
const READ_BYTES_MAX: u64 = 64 << 20;
/// Blocks whose hashes are computed from one read: 4 MiB.
const HASH_BLOCKS: u64 = 1024;

/// The maps of an opened point. While it lives, maintenance keeps what they name.
pub(crate) struct Snapshot {
    pub(crate) replica: Uuid,
    /// Newest first.
    pub(crate) maps: Vec<MapReader>,
}

/// An opened recovery point. Holds its data for as long as it lives, in this process; use
/// [`Store::pin`] for what must survive a restart.
#[derive(Clone)]
pub struct PointReader {
    shared: Arc<Shared>,
    snapshot: Arc<Snapshot>,
    info: Arc<PointInfo>,
}

/// One disk of an opened recovery point: a read-only block device.
#[derive(Clone)]
pub struct PointDisk {
    reader: PointReader,
    index: u16,
    bytes: u64,
}

impl Store {
    /// Opens a point for reading, also one that left the catalogue but is kept. Fetches at most as many map
    /// footers as a read has maps to look at, whatever the number of points and the size of the disks.
    ///
    /// # Errors
    /// [`StoreError::NoPoint`], [`StoreError::Damaged`].
    pub async fn open_point(&self, replica: Uuid, point: Uuid) -> Result<PointReader, StoreError> {
        let info = self.point(replica, point).await?;
        // A point's maps can be replaced while they are opened; what was replaced may then already be
        // collected, but the newest manifest names what is not.
        loop {
            let before = self.shared.manifest(replica).await?;
            let layer = before.point(point).ok_or(StoreError::NoPoint(point))?.layer;
            let path = before.path(layer, None);
            let maps = self.shared.open_maps(replica, refs(&path)).await;
            let snapshot = match maps {
                Ok(maps) => Arc::new(Snapshot { replica, maps }),
                Err(StoreError::Damaged { .. })
                    if self.shared.manifest(replica).await?.version != before.version =>
                {
                    continue;
                }
                Err(error) => return Err(error),
            };
            self.shared.register(&snapshot);
            let after = self.shared.manifest(replica).await?;
            if after.point(point).is_some_and(|point| after.path(point.layer, None) == path) {
                return Ok(PointReader { shared: Arc::clone(&self.shared), snapshot, info: Arc::new(info) });
            }
        }
    }

    /// Keyed hashes of `count` blocks of a disk of a point, computed from the stored data: for an agent
    /// that lost its table, and for proving equality.
    ///
    /// # Errors
    /// [`StoreError::NoPoint`], [`StoreError::NoDisk`], [`StoreError::Invalid`] outside the disk, [`StoreError::Damaged`].
    pub async fn block_hashes(
        &self,
        replica: Uuid,
        point: Uuid,
        disk: u16,
        key: HashKey,
        first: u64,
        count: u64,
    ) -> Result<Vec<BlockHash>, StoreError> {
        let reader = self.open_point(replica, point).await?;
        reader.disk(disk)?.block_hashes(key, first, count).await
    }
}

/// The maps of a path.
pub(crate) fn refs(path: &[(MapRef, Option<Uuid>)]) -> Vec<MapRef> {
    path.iter().map(|(map, _)| map.clone()).collect()
}

impl Shared {
    pub(crate) async fn open_maps(
        &self,
        replica: Uuid,
        maps: Vec<MapRef>,
    ) -> Result<Vec<MapReader>, StoreError> {
        // Boxed here and in other streams of ours, or the compiler cannot see that the whole is `Send`.
        let maps = stream::iter(maps).map(|map| async move { self.open_map(replica, &map).await }.boxed());
        maps.buffered(FOOTERS_IN_FLIGHT).try_collect().await
    }

    /// The verified, expanded frame at a location.
    pub(crate) async fn frame(&self, replica: Uuid, at: &Location) -> Result<Arc<Frame>, StoreError> {
        let load = || async {
            let key = keys::segment(replica, at.segment);
            if at.length as usize > FRAME_BYTES_MAX {
                return Err(StoreError::damaged(&key, "frame length"));
            }
            let bytes = self.storage.get_range(&key, u64::from(at.offset), u64::from(at.length)).await?;
            let decoded = mainstay_block::elsewhere::spawn_blocking(move || Frame::decode(&bytes)).await;
            let decoded = decoded.map_err(StoreError::internal)?;
            decoded.map_err(|error| {
                StoreError::damaged(&key, format!("frame at {} of {} bytes: {error}", at.offset, at.length))
            })
        };
        let weight = |frame: &Frame| frame.payload.len() + frame.runs.len() * 24 + 128;
        self.frames.get(&(at.segment, at.offset), weight, load).await
    }

    /// The bytes of an entry with data. Checks that the frame holds these very blocks, so that a wrong map
    /// is noticed rather than read through.
    pub(crate) async fn entry_data(
        &self,
        replica: Uuid,
        disk: u16,
        entry: &Entry,
        at: &Location,
    ) -> Result<Bytes, StoreError> {
        let frame = self.frame(replica, at).await?;
        let (mut index, wanted) = (0, u64::from(at.index));
        for run in frame.runs.iter().filter(|run| run.kind == RunKind::Data) {
            let count = u64::from(run.count);
            if wanted < index + count {
                let block = run.block + (wanted - index);
                if run.disk == disk && block == entry.start && wanted + entry.count <= index + count {
                    let from = (wanted * BLOCK_BYTES) as usize;
                    return Ok(frame.payload.slice(from..from + (entry.count * BLOCK_BYTES) as usize));
                }
                break;
            }
            index += count;
        }
        let key = keys::segment(replica, at.segment);
        Err(StoreError::damaged(&key, format!("the frame at {} holds other blocks", at.offset)))
    }
}

impl Snapshot {
    /// Where the blocks `from..to` of a disk are; what is not covered is zeros.
    pub(crate) async fn resolve(
        &self,
        shared: &Shared,
        disk: u16,
        from: u64,
        to: u64,
    ) -> Result<Vec<Entry>, StoreError> {
        let mut found: Vec<Entry> = Vec::new();
        let mut open = vec![(from, to)];
        for map in &self.maps {
            if open.is_empty() {
                break;
            }
            let mut left = Vec::new();
            for (from, to) in open {
                let entries = map.range(&shared.storage, &shared.chunks, disk, from, to).await?;
                left.extend(gaps(&entries, from, to));
                found.extend(entries);
            }
            open = left;
        }
        found.sort_unstable_by_key(|entry| entry.start);
        let mut joined = Vec::with_capacity(found.len());
        found.into_iter().for_each(|entry| push_joined(&mut joined, entry));
        Ok(joined)
    }
}

impl PointReader {
    /// The point.
    pub fn info(&self) -> &PointInfo {
        &self.info
    }

    /// One of its disks.
    ///
    /// # Errors
    /// [`StoreError::NoDisk`].
    pub fn disk(&self, index: u16) -> Result<PointDisk, StoreError> {
        let disk =
            self.info.disks.iter().find(|disk| disk.index == index).ok_or(StoreError::NoDisk(index))?;
        Ok(PointDisk { reader: self.clone(), index, bytes: disk.bytes })
    }

    /// How many maps a read has to look at, at most.
    pub fn maps(&self) -> usize {
        self.snapshot.maps.len()
    }
}

impl PointDisk {
    /// Reads a range.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] outside the disk or above 64 MiB; [`StoreError::Damaged`], never wrong bytes.
    pub async fn read_range(&self, offset: u64, length: u64) -> Result<Bytes, StoreError> {
        if check_range(offset, length, self.bytes).is_err() || length > READ_BYTES_MAX {
            return Err(StoreError::Invalid("read outside the disk, or too long"));
        }
        if length == 0 {
            return Ok(Bytes::new());
        }
        let (first, end) = (offset / BLOCK_BYTES, blocks_of(offset + length));
        let (shared, snapshot) = (&self.reader.shared, &self.reader.snapshot);
        let entries = snapshot.resolve(shared, self.index, first, end).await?;
        let data = entries.into_iter().filter_map(|entry| entry.place.map(|place| (entry, place)));
        let parts = stream::iter(data).map(|(entry, place)| {
            async move {
                let data = shared.entry_data(snapshot.replica, self.index, &entry, &place).await?;
                Ok::<_, StoreError>((entry.start, data))
            }
            .boxed()
        });
        let mut parts = parts.buffered(FRAMES_IN_FLIGHT);
        let base = first * BLOCK_BYTES;
        let mut out: Option<BytesMut> = None;
        while let Some((block, data)) = parts.try_next().await? {
            let from = (block * BLOCK_BYTES - base) as usize;
            if out.is_none() && from == 0 && data.len() as u64 >= offset - base + length {
                // One frame holds it all: no copy.
                let at = (offset - base) as usize;
                return Ok(data.slice(at..at + length as usize));
            }
            let out = out.get_or_insert_with(|| BytesMut::zeroed(((end - first) * BLOCK_BYTES) as usize));
            out[from..from + data.len()].copy_from_slice(&data);
        }
        let at = (offset - base) as usize;
        let out = out.unwrap_or_else(|| BytesMut::zeroed(((end - first) * BLOCK_BYTES) as usize));
        Ok(out.freeze().slice(at..at + length as usize))
    }

    /// Keyed hashes of `count` blocks from `first` on; [`BlockHash::UNKNOWN`], which equals no content's, for those whose
    /// stored data is damaged.
    ///
    /// # Errors
    /// As [`Self::read_range`], except for damage.
    pub async fn block_hashes(
        &self,
        key: HashKey,
        first: u64,
        count: u64,
    ) -> Result<Vec<BlockHash>, StoreError> {
        let end = first.checked_add(count).filter(|end| *end <= blocks_of(self.bytes));
        let end = end.ok_or(StoreError::Invalid("blocks outside the disk"))?;
        let hasher = BlockHasher::new(key);
        let mut hashes = Vec::new();
        let mut at = first;
        while at < end {
            let to = (at + HASH_BLOCKS).min(end);
            match self.some_hashes(&hasher, at, to).await {
                Err(StoreError::Damaged { .. }) => {
                    for block in at..to {
                        match self.some_hashes(&hasher, block, block + 1).await {
                            Err(StoreError::Damaged { .. }) => hashes.push(BlockHash::UNKNOWN),
                            one => hashes.extend(one?),
                        }
                    }
                }
                all => hashes.extend(all?),
            }
            at = to;
        }
        Ok(hashes)
    }

    async fn some_hashes(
        &self,
        hasher: &BlockHasher,
        from: u64,
        to: u64,
    ) -> Result<Vec<BlockHash>, StoreError> {
        let entries = self.reader.snapshot.resolve(&self.reader.shared, self.index, from, to).await?;
        if entries.iter().all(|entry| entry.place.is_none()) {
            return Ok(vec![BlockHash::ZERO; (to - from) as usize]);
        }
        let start = from * BLOCK_BYTES;
        let data = self.read_range(start, (to * BLOCK_BYTES).min(self.bytes) - start).await?;
        let hasher = *hasher;
        let hashes = mainstay_block::elsewhere::spawn_blocking(move || hasher.hash_all(&data)).await;
        hashes.map_err(StoreError::internal)
    }
}

#[async_trait]
impl BlockDevice for PointDisk {
    fn size(&self) -> u64 {
        self.bytes
    }

    async fn read(&self, offset: u64, length: u64) -> Result<Bytes, BlockError> {
        check_range(offset, length, self.bytes)?;
        Ok(self.read_range(offset, length).await?)
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), BlockError> {
        check_range(offset, data.len() as u64, self.bytes)?;
        Err(BlockError::ReadOnly)
    }

    async fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        check_range(offset, length, self.bytes)?;
        Err(BlockError::ReadOnly)
    }

    async fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>, BlockError> {
        check_range(offset, length, self.bytes)?;
        if length == 0 {
            return Ok(Vec::new());
        }
        let end = offset + length;
        let (shared, snapshot) = (&self.reader.shared, &self.reader.snapshot);
        let entries = snapshot.resolve(shared, self.index, offset / BLOCK_BYTES, blocks_of(end)).await?;
        let mut extents: Vec<Extent> = Vec::new();
        let mut push = |from: u64, to: u64, kind| {
            let (from, to) = (from.max(offset), to.min(end));
            match extents.last_mut() {
                _ if from >= to => {}
                Some(last) if last.kind == kind => last.length += to - from,
                _ => extents.push(Extent { offset: from, length: to - from, kind }),
            }
        };
        let mut at = offset;
        for entry in entries.iter().filter(|entry| entry.place.is_some()) {
            push(at, entry.start * BLOCK_BYTES, ExtentKind::Zero);
            at = entry.end() * BLOCK_BYTES;
            push(entry.start * BLOCK_BYTES, at, ExtentKind::Data);
        }
        push(at, end, ExtentKind::Zero);
        Ok(extents)
    }
}
