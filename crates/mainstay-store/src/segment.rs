//! Segments: immutable objects of frames, verbatim (`docs/formats/segment.md`).
//!
//! Header (64 bytes): magic `MSSEGMT1`, version u32, reserved u32, replica id, segment id, session id. Then the
//! frames. Then per frame its offset u32, length u32; then the trailer (32 bytes): number of frames u32, number of
//! data blocks u32, first 16 bytes of the BLAKE3 over header, index and the two numbers, magic again.

use bytes::Bytes;
use mainstay_block::frame;
use uuid::Uuid;

const MAGIC: &[u8; 8] = b"MSSEGMT1";
pub(crate) const HEADER_BYTES: usize = 64;
pub(crate) const TRAILER_BYTES: usize = 32;
/// No segment is longer: offsets are u32, and one segment is held in memory while it is written.
pub(crate) const SEGMENT_BYTES_MAX: usize = 128 << 20;

/// Collects frames, without copying them.
#[derive(Debug)]
pub(crate) struct SegmentBuilder {
    pub(crate) id: Uuid,
    /// Header, then frames.
    parts: Vec<Bytes>,
    length: usize,
    frames: Vec<(u32, u32)>,
    pub(crate) blocks: u32,
}

impl SegmentBuilder {
    pub(crate) fn new(replica: Uuid, id: Uuid, session: Uuid) -> Self {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&1u32.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        for id in [replica, id, session] {
            bytes.extend_from_slice(id.as_bytes());
        }
        Self { id, length: bytes.len(), parts: vec![bytes.into()], frames: Vec::new(), blocks: 0 }
    }

    /// Appends a verified frame with this many data blocks; returns its offset and length.
    pub(crate) fn push(&mut self, frame: Bytes, blocks: u32) -> (u32, u32) {
        let place = (self.length as u32, frame.len() as u32);
        self.length += frame.len();
        self.parts.push(frame);
        self.frames.push(place);
        self.blocks += blocks;
        place
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }

    pub(crate) fn finish(mut self) -> Vec<Bytes> {
        let mut tail = Vec::with_capacity(self.frames.len() * 8 + TRAILER_BYTES);
        for (offset, length) in &self.frames {
            tail.extend_from_slice(&offset.to_le_bytes());
            tail.extend_from_slice(&length.to_le_bytes());
        }
        tail.extend_from_slice(&(self.frames.len() as u32).to_le_bytes());
        tail.extend_from_slice(&self.blocks.to_le_bytes());
        let sum = checksum(&self.parts[0], &tail);
        tail.extend_from_slice(&sum);
        tail.extend_from_slice(MAGIC);
        self.parts.push(tail.into());
        self.parts
    }
}

/// Bytes of a segment's parts.
pub(crate) fn length(parts: &[Bytes]) -> u64 {
    parts.iter().map(|part| part.len() as u64).sum()
}

pub(crate) fn checksum(header: &[u8], index: &[u8]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(header);
    hasher.update(index);
    let mut sum = [0; 16];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    sum
}

pub(crate) fn word(bytes: &[u8], at: usize) -> usize {
    bytes[at..at + 4].iter().rev().fold(0, |sum, byte| (sum << 8) | usize::from(*byte))
}

/// Verifies a whole segment. Returns the frames `(offset, length)` that are damaged; an error when its
/// frame or index is, so that no frame can be trusted to be found.
pub(crate) fn verify(bytes: &Bytes, replica: Uuid, id: Uuid) -> Result<Vec<(u32, u32)>, &'static str> {
    if bytes.len() < HEADER_BYTES + TRAILER_BYTES {
        return Err("too short");
    }
    let trailer = bytes.len() - TRAILER_BYTES;
    if &bytes[..8] != MAGIC || &bytes[trailer + 24..] != MAGIC || word(bytes, 8) != 1 {
        return Err("magic or version");
    }
    if &bytes[16..32] != replica.as_bytes() || &bytes[32..48] != id.as_bytes() {
        return Err("another segment's bytes");
    }
    let frames = word(bytes, trailer);
    let index_at = frames.checked_mul(8).and_then(|index| trailer.checked_sub(index));
    let index_at = index_at.filter(|at| *at >= HEADER_BYTES).ok_or("index length")?;
    if checksum(&bytes[..HEADER_BYTES], &bytes[index_at..trailer + 8]) != bytes[trailer + 8..trailer + 24] {
        return Err("index checksum");
    }
    let mut damaged = Vec::new();
    for place in bytes[index_at..trailer].chunks_exact(8) {
        let place = (word(place, 0) as u32, word(place, 4) as u32);
        if !is_sound(&bytes[..index_at], place) {
            damaged.push(place);
        }
    }
    Ok(damaged)
}

/// Whether the frame at `(offset, length)` is whole.
pub(crate) fn is_sound(bytes: &[u8], (offset, length): (u32, u32)) -> bool {
    let (from, length) = (offset as usize, length as usize);
    let frame = from.checked_add(length).and_then(|end| bytes.get(from..end));
    frame.is_some_and(|frame| frame::inspect(frame).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_byte_is_found() {
        let ids = [1, 2, 3].map(Uuid::from_u128);
        let mut builder = SegmentBuilder::new(ids[0], ids[1], ids[2]);
        for at in 0..3u8 {
            let mut frame = frame::FrameBuilder::new();
            frame.push_data(0, u64::from(at), &[at + 1; 40]).unwrap();
            builder.push(frame.finish(frame::Effort::Small).unwrap(), 1);
        }
        let bytes = Bytes::from(builder.finish().concat());
        assert_eq!(verify(&bytes, ids[0], ids[1]), Ok(vec![]));
        assert!(verify(&bytes, ids[1], ids[1]).is_err());
        // Bytes 12..16 are reserved but checked as well.
        for at in 0..bytes.len() {
            let mut bad = bytes.to_vec();
            bad[at] ^= 4;
            let found = verify(&Bytes::from(bad), ids[0], ids[1]);
            assert!(found.is_err() || found.is_ok_and(|damaged| damaged.len() == 1), "{at}");
        }
    }
}
