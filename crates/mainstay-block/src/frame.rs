//! The frame codec: up to 64 changed blocks of one disk set, the unit of wire and segment.
//!
//! The sending agent encodes a frame once; it crosses the wire and rests in a segment verbatim, so the
//! server never compresses. Byte layout (little-endian; `docs/formats/frame.md` is the specification):
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic `MSFR` |
//! | 4 | 1 | version, 3 |
//! | 5 | 1 | codec of the payload: 0 raw, 1 zstd, 2 LZ4 |
//! | 6 | 2 | number of runs, 1..=1024 |
//! | 8 | 4 | bytes of the run table |
//! | 12 | 4 | bytes of the payload as stored |
//! | 16 | 2 | data blocks, 0..=64; the plain payload has 4096 bytes for each |
//! | 18 | 2 | reserved, 0 |
//! | 20 | 16 | XXH3-128 over bytes 0..20, run table and stored payload (version 2: HighwayHash-128, 1: BLAKE3) |
//! | 36 | … | run table, then payload |
//!
//! The run table has three varints per run: `count * 2 + kind` (kind 0 data, 1 zero); the disk index minus
//! that of the run before; the first block, as the distance from the end of the run before when it is on the
//! same disk. Runs are sorted by disk and block and do not overlap, by construction.
//!
//! 64 blocks (256 KiB): one random 4 KiB read from a cold frame costs 0.3 ms to fetch, verify and expand,
//! zstd gains almost nothing above that window, and headers are under 0.1 % of a full frame.

use std::cell::RefCell;

use bytes::Bytes;
use highway::{HighwayHash as _, HighwayHasher};
use twox_hash::XxHash3_128;

use crate::{BLOCK_BYTES, BLOCK_LENGTH, varint};

/// Most data blocks in a frame; see the module documentation for why.
pub const FRAME_BLOCKS_MAX: usize = 64;
/// Most runs in a frame: 64 data runs and many more zero runs, which carry no payload.
pub const FRAME_RUNS_MAX: usize = 1024;
/// Bytes before the run table.
pub const FRAME_HEADER_BYTES: usize = 36;
/// No frame is longer: header, 1024 runs of three varints (5 + 3 + 10 bytes), 64 raw blocks.
pub const FRAME_BYTES_MAX: usize = FRAME_HEADER_BYTES + FRAME_RUNS_MAX * 18 + FRAME_BLOCKS_MAX * BLOCK_LENGTH;

const MAGIC: &[u8; 4] = b"MSFR";
/// What is written. A checksum must be cheap: every byte is verified at both ends of the wire, and again by each scrub. XXH3
/// does 38 GB/s where HighwayHash (version 2) does 12; BLAKE3 (version 1) was an eighth of all work in a first transfer. Both
/// are still read. Against those who can write into the store none helps, having no secret.
const VERSION: u8 = 3;
const VERSION_HIGHWAY: u8 = 2;
const VERSION_BLAKE3: u8 = 1;
/// Key of version 2's checksum: the first 256 bits of the fraction of pi.
const CHECKSUM_KEY: highway::Key = highway::Key([
    0x243f_6a88_85a3_08d3,
    0x1319_8a2e_0370_7344,
    0xa409_3822_299f_31d0,
    0x082e_fa98_ec4e_6c89,
]);
const CODEC_RAW: u8 = 0;
const CODEC_ZSTD: u8 = 1;
const CODEC_LZ4: u8 = 2;
pub(crate) const CHECKSUM_AT: usize = 20;
/// The first block number that would not be addressable in bytes.
const BLOCK_LIMIT: u64 = u64::MAX / BLOCK_BYTES;
/// Level 1: 230 to 500 MB/s per core, by content and processor; levels above cost more CPU than the link they save.
const ZSTD_LEVEL: i32 = 1;

/// How hard to compress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Effort {
    /// As small as zstd makes it: what the store keeps and a slow link carries.
    #[default]
    Small,
    /// With LZ4, which takes about half the time and leaves about half as much again: where the link waits for the processor.
    Fast,
    /// Not at all: where compression was seen to gain little and the processors are wanted.
    None,
}

/// What a run of blocks holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RunKind {
    /// Bytes, carried in the payload.
    Data,
    /// Zeros, carried by nothing.
    Zero,
}

/// Contiguous blocks of one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameRun {
    /// Index of the disk in its replica.
    pub disk: u16,
    /// First block.
    pub block: u64,
    /// Number of blocks, never zero; at most [`FRAME_BLOCKS_MAX`] for data.
    pub count: u32,
    /// What they hold.
    pub kind: RunKind,
}

/// Why bytes are not a frame, or a frame cannot be built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Fewer or more bytes than the header announces.
    #[error("a frame of {found} bytes where {expected} were announced")]
    Length {
        /// Bytes there are.
        found: usize,
        /// Bytes there should be.
        expected: usize,
    },
    /// Not our magic, or a version or codec of the future.
    #[error("not a frame this version can read")]
    Unknown,
    /// A field contradicts another or exceeds its limit.
    #[error("malformed frame: {0}")]
    Malformed(&'static str),
    /// The checksum does not match: damage on the way or at rest.
    #[error("frame checksum mismatch")]
    Checksum,
    /// The payload does not decompress to its announced length.
    #[error("frame payload does not decompress")]
    Payload,
}

/// An encoded frame: its bytes are those of `head` and then those of `blocks`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameParts {
    /// Header and run table, and the payload unless `blocks` is that.
    pub head: Bytes,
    /// Blocks that are stored as they are, where they were read: a first transfer consists of them, and spares a copy of each.
    pub blocks: Bytes,
}

impl FrameParts {
    /// Bytes of the frame.
    #[expect(clippy::len_without_is_empty, reason = "no frame is empty")]
    pub fn len(&self) -> usize {
        self.head.len() + self.blocks.len()
    }
}

impl From<Bytes> for FrameParts {
    fn from(head: Bytes) -> Self {
        Self { head, blocks: Bytes::new() }
    }
}

/// Collects runs, in order of disk and block, into one frame.
#[derive(Debug, Default)]
pub struct FrameBuilder {
    runs: Vec<FrameRun>,
    payload: Payload,
}

/// The blocks of all data runs.
#[derive(Debug)]
enum Payload {
    Copied(Vec<u8>),
    /// A frame full of contiguous blocks, as most of a first transfer is, stays where it was read.
    Whole(Bytes),
}

impl Default for Payload {
    fn default() -> Self {
        Self::Copied(Vec::new())
    }
}

impl std::ops::Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Copied(bytes) => bytes,
            Self::Whole(bytes) => bytes,
        }
    }
}

impl FrameBuilder {
    /// An empty frame.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many data blocks still fit; 0 also when the run table is full.
    pub fn room(&self) -> usize {
        if self.runs.len() >= FRAME_RUNS_MAX {
            return 0;
        }
        FRAME_BLOCKS_MAX - self.payload.len() / BLOCK_LENGTH
    }

    /// Bytes of the data blocks, before compression.
    pub fn payload_bytes(&self) -> usize {
        self.payload.len()
    }

    /// Whether nothing was pushed yet.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Whether a run at this place keeps the order.
    pub fn accepts(&self, disk: u16, block: u64) -> bool {
        is_after(&self.runs, disk, block)
    }

    /// Adds whole blocks; a partial last block (the end of a disk) is padded with zeros. Joins the run
    /// before when it continues it.
    ///
    /// # Errors
    /// [`FrameError::Malformed`] when there is no room or the order is broken.
    pub fn push_data(&mut self, disk: u16, block: u64, data: &[u8]) -> Result<(), FrameError> {
        let count = data.len().div_ceil(BLOCK_LENGTH);
        if count == 0 || count > self.room() {
            return Err(FrameError::Malformed("no room for the blocks"));
        }
        // Room means that no whole frame is kept, so there is only what was copied.
        let Payload::Copied(payload) = &mut self.payload else {
            return Err(FrameError::Malformed("no room for the blocks"));
        };
        push_run(&mut self.runs, FrameRun { disk, block, count: count as u32, kind: RunKind::Data })?;
        payload.extend_from_slice(data);
        payload.resize(payload.len().next_multiple_of(BLOCK_LENGTH), 0);
        Ok(())
    }

    /// As [`Self::push_data`], without a copy where the blocks fill the frame.
    ///
    /// # Errors
    /// As [`Self::push_data`].
    pub fn push_bytes(&mut self, disk: u16, block: u64, data: Bytes) -> Result<(), FrameError> {
        if data.len() < FRAME_BLOCKS_MAX * BLOCK_LENGTH || !self.payload.is_empty() {
            return self.push_data(disk, block, &data);
        }
        if data.len() > FRAME_BLOCKS_MAX * BLOCK_LENGTH || self.room() == 0 {
            return Err(FrameError::Malformed("no room for the blocks"));
        }
        let count = FRAME_BLOCKS_MAX as u32;
        push_run(&mut self.runs, FrameRun { disk, block, count, kind: RunKind::Data })?;
        self.payload = Payload::Whole(data);
        Ok(())
    }

    /// Adds blocks that hold zeros.
    ///
    /// # Errors
    /// [`FrameError::Malformed`] when the run table is full or the order is broken.
    pub fn push_zero(&mut self, disk: u16, block: u64, count: u32) -> Result<(), FrameError> {
        if count == 0 || self.runs.len() >= FRAME_RUNS_MAX {
            return Err(FrameError::Malformed("no room for the run"));
        }
        push_run(&mut self.runs, FrameRun { disk, block, count, kind: RunKind::Zero })
    }

    /// Compresses where that gains at least a sixteenth, checksums, and returns the bytes. CPU-bound:
    /// call it on a blocking thread.
    ///
    /// # Errors
    /// [`FrameError::Malformed`] when nothing was pushed.
    pub fn finish(self, effort: Effort) -> Result<Bytes, FrameError> {
        let FrameParts { head, blocks } = self.finish_in_parts(effort)?;
        Ok(if blocks.is_empty() { head } else { [head, blocks].concat().into() })
    }

    /// As [`Self::finish`], without a copy of blocks that fill the frame and are not compressed.
    ///
    /// # Errors
    /// As [`Self::finish`].
    pub fn finish_in_parts(self, effort: Effort) -> Result<FrameParts, FrameError> {
        if self.runs.is_empty() {
            return Err(FrameError::Malformed("no runs"));
        }
        let mut runs = Vec::with_capacity(self.runs.len() * 4);
        let (mut disk, mut end) = (0, 0);
        for run in &self.runs {
            if run.disk != disk {
                end = 0;
            }
            varint::put(&mut runs, u64::from(run.count) * 2 + u64::from(run.kind == RunKind::Zero));
            varint::put(&mut runs, u64::from(run.disk - disk));
            varint::put(&mut runs, run.block - end);
            disk = run.disk;
            end = run.block + u64::from(run.count);
        }
        let (mut head, blocks) = PACKER.with_borrow_mut(|packer| {
            let packed = packer.pack(&self.payload, effort);
            let packed = packed.filter(|packed| packed.len() <= self.payload.len() - self.payload.len() / 16);
            let codec = match (&packed, effort) {
                (None, _) | (_, Effort::None) => CODEC_RAW,
                (Some(_), Effort::Small) => CODEC_ZSTD,
                (Some(_), Effort::Fast) => CODEC_LZ4,
            };
            let (stored, blocks) = match (packed, &self.payload) {
                (Some(packed), _) => (packed, Bytes::new()),
                (None, Payload::Whole(blocks)) => (&[][..], blocks.clone()),
                (None, Payload::Copied(payload)) => (&payload[..], Bytes::new()),
            };
            let mut head = Vec::with_capacity(FRAME_HEADER_BYTES + runs.len() + stored.len());
            head.extend_from_slice(MAGIC);
            head.extend_from_slice(&[VERSION, codec]);
            head.extend_from_slice(&(self.runs.len() as u16).to_le_bytes());
            head.extend_from_slice(&(runs.len() as u32).to_le_bytes());
            head.extend_from_slice(&((stored.len() + blocks.len()) as u32).to_le_bytes());
            head.extend_from_slice(&((self.payload.len() / BLOCK_LENGTH) as u16).to_le_bytes());
            head.extend_from_slice(&[0; 2]);
            head.extend_from_slice(&[0; 16]);
            head.extend_from_slice(&runs);
            head.extend_from_slice(stored);
            (head, blocks)
        });
        let sum = checksum_of(VERSION, &[&head[..CHECKSUM_AT], &head[FRAME_HEADER_BYTES..], &blocks]);
        head[CHECKSUM_AT..FRAME_HEADER_BYTES].copy_from_slice(&sum);
        Ok(FrameParts { head: head.into(), blocks })
    }
}

/// Whether a run at this place keeps the order.
fn is_after(runs: &[FrameRun], disk: u16, block: u64) -> bool {
    runs.last().is_none_or(|last| (disk, block) >= (last.disk, last.block + u64::from(last.count)))
}

fn push_run(runs: &mut Vec<FrameRun>, run: FrameRun) -> Result<(), FrameError> {
    if !is_after(runs, run.disk, run.block) {
        return Err(FrameError::Malformed("runs out of order"));
    }
    if run.block.checked_add(u64::from(run.count)).is_none_or(|end| end > BLOCK_LIMIT) {
        return Err(FrameError::Malformed("block out of range"));
    }
    if let Some(last) = runs.last_mut()
        && (last.disk, last.kind) == (run.disk, run.kind)
        && last.block + u64::from(last.count) == run.block
        && let Some(count) = last.count.checked_add(run.count)
    {
        last.count = count;
    } else {
        runs.push(run);
    }
    Ok(())
}

/// What a thread needs to compress. Made anew for each frame it would cost more than a small frame itself: a megabyte
/// that the kernel hands out, clears and takes back.
#[derive(Default)]
struct Packer {
    zstd: Option<zstd::bulk::Compressor<'static>>,
    lz4: lz4_flex::block::CompressTable,
    packed: Vec<u8>,
}

thread_local! {
    static PACKER: RefCell<Packer> = RefCell::default();
}

impl Packer {
    /// Nothing when there is nothing to compress, or the compressor fails: raw is always possible.
    fn pack(&mut self, payload: &[u8], effort: Effort) -> Option<&[u8]> {
        if payload.is_empty() {
            return None;
        }
        let room = lz4_flex::block::get_maximum_output_size(payload.len())
            .max(zstd::zstd_safe::compress_bound(payload.len()));
        if self.packed.len() < room {
            self.packed.resize(room, 0);
        }
        let length = match effort {
            Effort::None => return None,
            Effort::Small => {
                if self.zstd.is_none() {
                    self.zstd = zstd::bulk::Compressor::new(ZSTD_LEVEL).ok();
                }
                self.zstd.as_mut()?.compress_to_buffer(payload, self.packed.as_mut_slice()).ok()?
            }
            Effort::Fast => {
                lz4_flex::block::compress_into_with_table(payload, &mut self.packed, &mut self.lz4).ok()?
            }
        };
        self.packed.get(..length)
    }
}

/// The checksum of a frame of the version that it says it has.
pub(crate) fn checksum(frame: &[u8]) -> [u8; 16] {
    checksum_of(frame[4], &[&frame[..CHECKSUM_AT], &frame[FRAME_HEADER_BYTES..]])
}

/// The checksum over what lies one after the other.
fn checksum_of(version: u8, parts: &[&[u8]]) -> [u8; 16] {
    let mut sum = [0; 16];
    match version {
        VERSION_BLAKE3 => {
            let mut hasher = blake3::Hasher::new();
            for part in parts {
                hasher.update(part);
            }
            sum.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        }
        VERSION_HIGHWAY => {
            let mut hasher = HighwayHasher::new(CHECKSUM_KEY);
            for part in parts {
                hasher.append(part);
            }
            let [low, high] = hasher.finalize128();
            sum[..8].copy_from_slice(&low.to_le_bytes());
            sum[8..].copy_from_slice(&high.to_le_bytes());
        }
        _ => {
            let mut hasher = XxHash3_128::new();
            for part in parts {
                hasher.write(part);
            }
            sum = hasher.finish_128().to_le_bytes();
        }
    }
    sum
}

/// What a frame's header says; only lengths are checked.
#[derive(Clone, Copy, Debug)]
struct Header {
    codec: u8,
    runs: usize,
    runs_bytes: usize,
    stored_bytes: usize,
    blocks: usize,
}

impl Header {
    fn parse(bytes: &[u8]) -> Result<Self, FrameError> {
        let short = FrameError::Length { found: bytes.len(), expected: FRAME_HEADER_BYTES };
        let header = bytes.get(..FRAME_HEADER_BYTES).ok_or(short)?;
        if &header[..4] != MAGIC || !(VERSION_BLAKE3..=VERSION).contains(&header[4]) || header[5] > CODEC_LZ4
        {
            return Err(FrameError::Unknown);
        }
        let short_at = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
        let word_at = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]) as usize
        };
        let parsed = Self {
            codec: header[5],
            runs: short_at(6),
            runs_bytes: word_at(8),
            stored_bytes: word_at(12),
            blocks: short_at(16),
        };
        if short_at(18) != 0 {
            return Err(FrameError::Unknown);
        }
        if parsed.runs == 0 || parsed.runs > FRAME_RUNS_MAX || parsed.runs_bytes > FRAME_RUNS_MAX * 18 {
            return Err(FrameError::Malformed("run table too large"));
        }
        let plain = parsed.blocks * BLOCK_LENGTH;
        if parsed.blocks > FRAME_BLOCKS_MAX
            || parsed.stored_bytes > plain
            || (parsed.codec == CODEC_RAW && parsed.stored_bytes != plain)
        {
            return Err(FrameError::Malformed("payload length"));
        }
        Ok(parsed)
    }

    fn length(&self) -> usize {
        FRAME_HEADER_BYTES + self.runs_bytes + self.stored_bytes
    }
}

/// Length of the frame whose first bytes these are ([`FRAME_HEADER_BYTES`] suffice).
///
/// # Errors
/// [`FrameError`] when they do not start a frame.
pub fn frame_length(prefix: &[u8]) -> Result<usize, FrameError> {
    Ok(Header::parse(prefix)?.length())
}

/// Verifies checksum and run table of exactly one frame and returns its runs, without decompressing.
///
/// # Errors
/// [`FrameError`] for anything but an undamaged frame.
pub fn inspect(bytes: &[u8]) -> Result<Vec<FrameRun>, FrameError> {
    let header = Header::parse(bytes)?;
    if bytes.len() != header.length() {
        return Err(FrameError::Length { found: bytes.len(), expected: header.length() });
    }
    if checksum(bytes) != bytes[CHECKSUM_AT..FRAME_HEADER_BYTES] {
        return Err(FrameError::Checksum);
    }
    parse_runs(&header, &bytes[FRAME_HEADER_BYTES..FRAME_HEADER_BYTES + header.runs_bytes])
}

fn parse_runs(header: &Header, mut table: &[u8]) -> Result<Vec<FrameRun>, FrameError> {
    let bad = |_| FrameError::Malformed("run table");
    let mut runs = Vec::with_capacity(header.runs);
    let (mut disk, mut end, mut blocks) = (0u16, 0u64, 0u64);
    for _ in 0..header.runs {
        let count_kind = varint::take(&mut table).map_err(bad)?;
        let disk_step = varint::take(&mut table).map_err(bad)?;
        let gap = varint::take(&mut table).map_err(bad)?;
        if disk_step > 0 {
            disk = u16::try_from(u64::from(disk) + disk_step.min(1 << 20))
                .map_err(|_| FrameError::Malformed("disk index"))?;
            end = 0;
        }
        let kind = if count_kind & 1 == 1 { RunKind::Zero } else { RunKind::Data };
        let count = u32::try_from(count_kind >> 1).map_err(|_| FrameError::Malformed("run length"))?;
        let block = end.checked_add(gap).filter(|block| *block < BLOCK_LIMIT);
        let block = block.ok_or(FrameError::Malformed("block out of range"))?;
        end = block + u64::from(count);
        if count == 0 || end > BLOCK_LIMIT {
            return Err(FrameError::Malformed("run length"));
        }
        if kind == RunKind::Data {
            blocks += u64::from(count);
            let joins = |last: &FrameRun| last.kind == kind && disk_step == 0 && gap == 0;
            if runs.last().is_some_and(joins) {
                return Err(FrameError::Malformed("data runs not joined"));
            }
        }
        runs.push(FrameRun { disk, block, count, kind });
    }
    if !table.is_empty() || blocks != header.blocks as u64 {
        return Err(FrameError::Malformed("run table"));
    }
    Ok(runs)
}

/// A decoded frame.
#[derive(Clone, Debug)]
pub struct Frame {
    /// The runs, sorted by disk and block, not overlapping.
    pub runs: Vec<FrameRun>,
    /// The blocks of all data runs one after the other.
    pub payload: Bytes,
}

impl Frame {
    /// Verifies and expands one frame; raw payloads are not copied. CPU-bound: call it on a blocking thread.
    ///
    /// # Errors
    /// [`FrameError`] for anything but an undamaged frame. Never panics, never allocates more than the limits.
    pub fn decode(bytes: &Bytes) -> Result<Self, FrameError> {
        let runs = inspect(bytes)?;
        let header = Header::parse(bytes)?;
        let stored = bytes.slice(FRAME_HEADER_BYTES + header.runs_bytes..);
        let plain = header.blocks * BLOCK_LENGTH;
        let payload = match header.codec {
            CODEC_RAW => stored,
            CODEC_LZ4 => {
                Bytes::from(lz4_flex::block::decompress(&stored, plain).map_err(|_| FrameError::Payload)?)
            }
            _ => Bytes::from(zstd::bulk::decompress(&stored, plain).map_err(|_| FrameError::Payload)?),
        };
        if payload.len() != plain {
            return Err(FrameError::Payload);
        }
        Ok(Self { runs, payload })
    }

    /// Each run with its part of the payload (empty for zero runs).
    pub fn parts(&self) -> impl Iterator<Item = (FrameRun, Bytes)> + '_ {
        let mut at = 0;
        self.runs.iter().map(move |run| {
            let length = if run.kind == RunKind::Data { run.count as usize * BLOCK_LENGTH } else { 0 };
            let part = self.payload.slice(at..at + length);
            at += length;
            (*run, part)
        })
    }
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
