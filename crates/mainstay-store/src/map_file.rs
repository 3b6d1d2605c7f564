//! Map objects: the sorted extent map of a layer, or of several flattened (`docs/formats/layer.md`).
//!
//! Chunks of up to 4096 entries of one disk, each compressed and checksummed by itself, then a footer that
//! lists them and the segments. A reader fetches the footer (its place and checksum are in the manifest) and
//! then only the chunks it needs, so opening does not depend on the size of the disk.

use std::collections::HashMap;

use bytes::Bytes;
use mainstay_block::varint;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::extent_map::{Entry, Location};

pub(crate) const MAGIC: &[u8; 8] = b"MSLAYER1";
/// Entries per chunk: about 20 KiB for random single blocks, one object-storage request's worth.
const CHUNK_ENTRIES: usize = 4096;
/// A chunk expands to at most this; 4096 entries of six varints are far below.
const CHUNK_BYTES_MAX: usize = 1 << 20;
/// Footer of the largest map we allow: 64 Mi entries and as many segments as that can name.
pub(crate) const FOOTER_BYTES_MAX: usize = 64 << 20;
pub(crate) const TRAILER_BYTES: usize = 28;
/// Level 3: maps are small and kept long.
const ZSTD_LEVEL: i32 = 3;

/// A map object as the manifest names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MapRef {
    pub(crate) id: Uuid,
    pub(crate) bytes: u64,
    /// Bytes of the footer with its trailer, at the end of the object.
    pub(crate) footer_bytes: u32,
    /// First 16 bytes of the BLAKE3 of the footer.
    pub(crate) footer_sum: [u8; 16],
    pub(crate) entries: u64,
    /// Blocks with data.
    pub(crate) blocks: u64,
}

/// A segment as a map uses it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SegmentUse {
    pub(crate) id: Uuid,
    /// Data blocks in the segment.
    pub(crate) blocks: u32,
    /// Bytes of the object.
    pub(crate) bytes: u32,
    /// Data blocks of it that this map uses.
    pub(crate) live: u32,
}

/// One chunk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ChunkRef {
    pub(crate) disk: u16,
    pub(crate) first: u64,
    pub(crate) end: u64,
    pub(crate) offset: u64,
    pub(crate) bytes: u32,
    pub(crate) plain: u32,
    pub(crate) entries: u32,
    pub(crate) sum: [u8; 8],
}

/// The footer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Footer {
    pub(crate) replica: Uuid,
    pub(crate) map: Uuid,
    pub(crate) segments: Vec<SegmentUse>,
    /// Sorted by disk and block.
    pub(crate) chunks: Vec<ChunkRef>,
}

/// What is known of a segment when a map is written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SegmentInfo {
    pub(crate) blocks: u32,
    pub(crate) bytes: u32,
}

/// Writes a map from sorted entries.
pub(crate) struct MapWriter {
    footer: Footer,
    known: HashMap<Uuid, SegmentInfo>,
    index: HashMap<Uuid, u32>,
    body: Vec<u8>,
    disk: u16,
    pending: Vec<Entry>,
    entries: u64,
    blocks: u64,
}

impl MapWriter {
    /// `known` must tell about every segment that will be named.
    pub(crate) fn new(replica: Uuid, map: Uuid, known: HashMap<Uuid, SegmentInfo>) -> Self {
        Self {
            footer: Footer { replica, map, segments: Vec::new(), chunks: Vec::new() },
            known,
            index: HashMap::new(),
            body: Vec::new(),
            disk: 0,
            pending: Vec::new(),
            entries: 0,
            blocks: 0,
        }
    }

    pub(crate) fn push(&mut self, disk: u16, entry: Entry) -> Result<(), &'static str> {
        if disk != self.disk || self.pending.len() == CHUNK_ENTRIES {
            self.flush()?;
            self.disk = disk;
        }
        if let Some(place) = entry.place {
            let next = self.footer.segments.len() as u32;
            let index = *self.index.entry(place.segment).or_insert(next);
            if index == next {
                let info = self.known.get(&place.segment).ok_or("entry names an unknown segment")?;
                self.footer.segments.push(SegmentUse {
                    id: place.segment,
                    blocks: info.blocks,
                    bytes: info.bytes,
                    live: 0,
                });
            }
            self.footer.segments[index as usize].live += entry.count as u32;
            self.blocks += entry.count;
        }
        self.entries += 1;
        self.pending.push(entry);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), &'static str> {
        let (Some(first), Some(last)) = (self.pending.first(), self.pending.last()) else {
            return Ok(());
        };
        let (first, end) = (first.start, last.end());
        let plain = encode_entries(&self.pending, &self.index);
        let packed = zstd::bulk::compress(&plain, ZSTD_LEVEL).map_err(|_| "compression failed")?;
        self.footer.chunks.push(ChunkRef {
            disk: self.disk,
            first,
            end,
            offset: self.body.len() as u64,
            bytes: packed.len() as u32,
            plain: plain.len() as u32,
            entries: self.pending.len() as u32,
            sum: short_sum(&packed),
        });
        self.body.extend_from_slice(&packed);
        self.pending.clear();
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Result<(Bytes, MapRef, Footer), &'static str> {
        self.flush()?;
        let mut footer = postcard::to_stdvec(&self.footer).map_err(|_| "footer does not encode")?;
        if footer.len() + TRAILER_BYTES > FOOTER_BYTES_MAX {
            return Err("map too large");
        }
        let sum = long_sum(&footer);
        let length = footer.len() as u32;
        footer.extend_from_slice(&length.to_le_bytes());
        footer.extend_from_slice(&sum);
        footer.extend_from_slice(MAGIC);
        let reference = MapRef {
            id: self.footer.map,
            bytes: (self.body.len() + footer.len()) as u64,
            footer_bytes: footer.len() as u32,
            footer_sum: sum,
            entries: self.entries,
            blocks: self.blocks,
        };
        self.body.extend_from_slice(&footer);
        Ok((Bytes::from(self.body), reference, self.footer))
    }
}

pub(crate) fn short_sum(bytes: &[u8]) -> [u8; 8] {
    let mut sum = [0; 8];
    sum.copy_from_slice(&blake3::hash(bytes).as_bytes()[..8]);
    sum
}

pub(crate) fn long_sum(bytes: &[u8]) -> [u8; 16] {
    let mut sum = [0; 16];
    sum.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    sum
}

/// Per entry: gap to the entry before; `count * 2 + zero`; for data also the segment's index and the
/// frame's offset as differences to the entry before, the frame's length when it is another frame, and the
/// block's index in the frame minus what continuing would give.
fn encode_entries(entries: &[Entry], index: &HashMap<Uuid, u32>) -> Vec<u8> {
    let mut out = Vec::with_capacity(entries.len() * 8);
    let (mut end, mut state) = (0, Predicted::default());
    for entry in entries {
        varint::put(&mut out, entry.start - end);
        varint::put(&mut out, entry.count * 2 + u64::from(entry.place.is_none()));
        end = entry.end();
        if let Some(place) = entry.place {
            let segment = i64::from(index[&place.segment]);
            varint::put(&mut out, varint::zigzag(segment - state.segment));
            if segment != state.segment {
                state = Predicted { segment, ..Predicted::default() };
            }
            let same = place.offset == state.offset as u32;
            varint::put(&mut out, varint::zigzag(i64::from(place.offset) - state.offset));
            if !same {
                varint::put(&mut out, u64::from(place.length));
                state.length = place.length;
                state.offset = i64::from(place.offset);
                state.index = 0;
            }
            varint::put(&mut out, varint::zigzag(i64::from(place.index) - state.index));
            state.index = i64::from(place.index) + entry.count as i64;
        }
    }
    out
}

#[derive(Default)]
struct Predicted {
    segment: i64,
    offset: i64,
    length: u32,
    index: i64,
}

/// Verifies and expands one chunk.
pub(crate) fn decode_chunk(
    chunk: &ChunkRef,
    segments: &[SegmentUse],
    bytes: &[u8],
) -> Result<Vec<Entry>, &'static str> {
    if bytes.len() != chunk.bytes as usize || short_sum(bytes) != chunk.sum {
        return Err("chunk checksum");
    }
    if chunk.plain as usize > CHUNK_BYTES_MAX || chunk.entries as usize > CHUNK_ENTRIES {
        return Err("chunk too large");
    }
    let plain = zstd::bulk::decompress(bytes, chunk.plain as usize).map_err(|_| "chunk compression")?;
    let mut input = plain.as_slice();
    let mut next = || varint::take(&mut input).map_err(|_| "chunk entries");
    let mut entries = Vec::with_capacity(chunk.entries as usize);
    let (mut end, mut state) = (0u64, Predicted::default());
    for _ in 0..chunk.entries {
        let start = end.checked_add(next()?).ok_or("chunk entries")?;
        let count_zero = next()?;
        let count = count_zero >> 1;
        end = start.checked_add(count).ok_or("chunk entries")?;
        let mut place = None;
        if count_zero & 1 == 0 {
            let segment = state.segment.checked_add(varint::unzigzag(next()?)).ok_or("chunk entries")?;
            if segment != state.segment {
                state = Predicted { segment, ..Predicted::default() };
            }
            let step = varint::unzigzag(next()?);
            if step != 0 {
                state.offset = state.offset.checked_add(step).ok_or("chunk entries")?;
                state.length = u32::try_from(next()?).map_err(|_| "chunk entries")?;
                state.index = 0;
            }
            let index = state.index.checked_add(varint::unzigzag(next()?)).ok_or("chunk entries")?;
            let id = usize::try_from(segment).ok().and_then(|at| segments.get(at)).ok_or("chunk segment")?.id;
            place = Some(Location {
                segment: id,
                offset: u32::try_from(state.offset).map_err(|_| "chunk entries")?,
                length: state.length,
                index: u16::try_from(index).map_err(|_| "chunk entries")?,
            });
            state.index = i64::from(count as u32) + index;
        }
        if count == 0 || end > chunk.end || start < chunk.first {
            return Err("chunk entries");
        }
        entries.push(Entry { start, count, place });
    }
    if input.is_empty() { Ok(entries) } else { Err("chunk entries") }
}

/// A sound copy of a map, made from what is sound in either copy; answers also whether both are sound already.
pub(crate) fn mend(
    copies: [&[u8]; 2],
    reference: &MapRef,
    replica: Uuid,
) -> Result<(Bytes, bool), &'static str> {
    let copy_bytes = usize::try_from(reference.bytes).map_err(|_| "length")?;
    let footer_at = copy_bytes.checked_sub(reference.footer_bytes as usize).ok_or("footer length")?;
    let footers = copies.map(|copy| {
        let bytes = copy.get(footer_at..copy_bytes)?;
        Some((decode_footer(bytes, reference, replica).ok()?, bytes))
    });
    let Some((footer, footer_bytes)) = footers.iter().flatten().next() else {
        return Err("both copies of the footer");
    };
    let mut is_sound =
        footers.iter().all(Option::is_some) && copies.iter().all(|copy| copy.len() == copy_bytes);
    let mut mended = Vec::with_capacity(copy_bytes);
    for chunk in &footer.chunks {
        let part = usize::try_from(chunk.offset).map_err(|_| "chunk offset")?;
        let part = part..part.checked_add(chunk.bytes as usize).ok_or("chunk offset")?;
        let sound = copies.map(|copy| {
            let bytes = copy.get(part.clone())?;
            decode_chunk(chunk, &footer.segments, bytes).ok().map(|_| bytes)
        });
        is_sound &= sound.iter().all(Option::is_some);
        mended.extend_from_slice(sound.iter().flatten().next().ok_or("both copies of a chunk")?);
    }
    mended.extend_from_slice(footer_bytes);
    if mended.len() != copy_bytes {
        return Err("chunks that do not follow one another");
    }
    Ok((Bytes::from(mended), is_sound))
}

/// Verifies and decodes a footer with its trailer.
pub(crate) fn decode_footer(bytes: &[u8], reference: &MapRef, replica: Uuid) -> Result<Footer, &'static str> {
    let body = bytes.len().checked_sub(TRAILER_BYTES).ok_or("footer length")?;
    let (footer, trailer) = bytes.split_at(body);
    if &trailer[20..] != MAGIC || trailer[..4] != (body as u32).to_le_bytes() {
        return Err("footer magic");
    }
    if long_sum(footer) != reference.footer_sum || trailer[4..20] != reference.footer_sum {
        return Err("footer checksum");
    }
    let decoded: Footer = postcard::from_bytes(footer).map_err(|_| "footer encoding")?;
    if decoded.replica != replica || decoded.map != reference.id {
        return Err("another map's footer");
    }
    Ok(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_single_blocks_cost_few_bytes_and_survive() {
        let (replica, map) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let segments = [Uuid::from_u128(3), Uuid::from_u128(4)];
        let known = segments.map(|id| (id, SegmentInfo { blocks: 9, bytes: 9 })).into();
        let mut writer = MapWriter::new(replica, map, known);
        let mut pushed: Vec<(u16, Entry)> = Vec::new();
        let mut block = 0;
        for at in 0..10_000u32 {
            let disk = (at / 6000) as u16;
            if at == 6000 {
                block = 0;
            }
            block += 1 + u64::from(at.wrapping_mul(2_654_435_761) >> 24);
            let frame = at / 64;
            let place = (at % 50 != 0).then_some(Location {
                segment: segments[(at / 5000) as usize],
                offset: 64 + frame * 262_300,
                length: 262_300,
                index: (at % 64) as u16,
            });
            let entry = Entry { start: block, count: 1, place };
            writer.push(disk, entry).unwrap();
            pushed.push((disk, entry));
        }
        let (bytes, reference, _) = writer.finish().unwrap();
        assert!(bytes.len() < 30_000, "{}", bytes.len());
        let footer_at = bytes.len() - reference.footer_bytes as usize;
        let footer = decode_footer(&bytes[footer_at..], &reference, replica).unwrap();
        assert_eq!(footer.segments.iter().map(|segment| segment.live).sum::<u32>(), 9800);
        let mut read = Vec::new();
        for chunk in &footer.chunks {
            let at = chunk.offset as usize;
            let chunk_bytes = &bytes[at..at + chunk.bytes as usize];
            let entries = decode_chunk(chunk, &footer.segments, chunk_bytes).unwrap();
            read.extend(entries.into_iter().map(|entry| (chunk.disk, entry)));
        }
        assert_eq!(read, pushed);
        for at in footer_at..bytes.len() {
            let mut bad = bytes[footer_at..].to_vec();
            bad[at - footer_at] ^= 1;
            assert!(decode_footer(&bad, &reference, replica).is_err());
        }
    }
}
