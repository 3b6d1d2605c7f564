//! Segments: immutable objects of frames, verbatim (`docs/formats/segment.md`).
//!
//! Header (64 bytes): magic `MSSEGMT1`, version u32, reserved u32, replica id, segment id, session id. Then the
//! frames. Then per frame its offset u32, length u32; then the trailer (32 bytes): number of frames u32, number of
//! data blocks u32, first 16 bytes of the BLAKE3 over header, index and the two numbers, magic again.

use bytes::{Bytes, BytesMut};
use mainstay_block::frame::{self, FRAME_BYTES_MAX};
use uuid::Uuid;

use crate::direct;

const MAGIC: &[u8; 8] = b"MSSEGMT1";
pub(crate) const HEADER_BYTES: usize = 64;
pub(crate) const TRAILER_BYTES: usize = 32;
/// No segment is longer: offsets are u32, and one segment is held in memory while it is written.
pub(crate) const SEGMENT_BYTES_MAX: usize = 128 << 20;
/// A segment whose first frame is shorter than this is not going to be a long one, and gets no room of its own.
const ROOM_FRAME_BYTES: usize = 64 << 10;

/// Collects frames, without copying them. Those that were received where they are to lie, in the segment's own
/// [room](Self::take_room), one after the other, can then be written from there.
#[derive(Debug)]
pub(crate) struct SegmentBuilder {
    pub(crate) id: Uuid,
    header: [u8; HEADER_BYTES],
    /// Header, then frames, but for what is in `filling`.
    parts: Vec<Bytes>,
    /// What lies in the segment's room so far, without a gap.
    filling: BytesMut,
    /// The rest of the room, unless somebody receives a frame into it.
    room: BytesMut,
    length: usize,
    frames: Vec<(u32, u32)>,
    pub(crate) blocks: u32,
}

impl SegmentBuilder {
    pub(crate) fn new(replica: Uuid, id: Uuid, session: Uuid) -> Self {
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&1u32.to_le_bytes());
        for (at, id) in [16, 32, 48].into_iter().zip([replica, id, session]) {
            header[at..at + 16].copy_from_slice(id.as_bytes());
        }
        Self {
            id,
            header,
            parts: Vec::new(),
            filling: BytesMut::new(),
            room: BytesMut::new(),
            length: HEADER_BYTES,
            frames: Vec::new(),
            blocks: 0,
        }
    }

    /// Room for a frame of so many bytes, if there is any. A segment that is still empty gets it from `space`, which makes
    /// room of so many bytes at least. What is received into it, and the rest, belong to [`Self::push_received`].
    pub(crate) fn take_room(
        &mut self,
        bytes: usize,
        space: impl FnOnce(usize) -> BytesMut,
        segment_bytes: usize,
    ) -> Option<BytesMut> {
        if self.is_empty() && self.filling.is_empty() && bytes >= ROOM_FRAME_BYTES {
            // The frame with which it is full reaches beyond its end.
            let mut space = space(segment_bytes + FRAME_BYTES_MAX + direct::ALIGNMENT);
            space.clear();
            let past = space.as_ptr().align_offset(direct::ALIGNMENT);
            self.filling = space.split_off(past.min(space.capacity()));
            self.filling.extend_from_slice(&self.header);
            self.room = self.filling.split_off(HEADER_BYTES);
        }
        (self.room.capacity() >= bytes).then(|| std::mem::take(&mut self.room))
    }

    /// Appends a verified frame with this many data blocks, received into what [`Self::take_room`] gave; `rest` is what was
    /// not needed. Returns its offset and length.
    pub(crate) fn push_received(&mut self, frame: BytesMut, rest: BytesMut, blocks: u32) -> (u32, u32) {
        if self.filling.as_ptr_range().end == frame.as_ptr() {
            let place = self.note(frame.len(), blocks);
            self.filling.unsplit(frame);
            self.room = rest;
            return place;
        }
        // It was given by a segment that has been closed since.
        self.push(frame.freeze(), blocks)
    }

    /// Appends a verified frame with this many data blocks; returns its offset and length.
    pub(crate) fn push(&mut self, frame: Bytes, blocks: u32) -> (u32, u32) {
        self.end_filling();
        let place = self.note(frame.len(), blocks);
        self.parts.push(frame);
        place
    }

    fn note(&mut self, bytes: usize, blocks: u32) -> (u32, u32) {
        let place = (self.length as u32, bytes as u32);
        self.length += bytes;
        self.frames.push(place);
        self.blocks += blocks;
        place
    }

    /// What follows lies elsewhere.
    fn end_filling(&mut self) {
        if !self.filling.is_empty() {
            self.parts.push(std::mem::take(&mut self.filling).freeze());
            self.room = BytesMut::new();
        } else if self.parts.is_empty() {
            self.parts.push(Bytes::copy_from_slice(&self.header));
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub(crate) fn finish(mut self) -> Vec<Bytes> {
        let mut tail = Vec::with_capacity(self.frames.len() * 8 + TRAILER_BYTES);
        for (offset, length) in &self.frames {
            tail.extend_from_slice(&offset.to_le_bytes());
            tail.extend_from_slice(&length.to_le_bytes());
        }
        tail.extend_from_slice(&(self.frames.len() as u32).to_le_bytes());
        tail.extend_from_slice(&self.blocks.to_le_bytes());
        let sum = checksum(&self.header, &tail);
        tail.extend_from_slice(&sum);
        tail.extend_from_slice(MAGIC);
        self.end_filling();
        self.parts.push(tail.into());
        self.parts
    }
}

/// The room of a segment that has been written, to be used again, unless somebody still has a part of it.
pub(crate) fn room_of(parts: Vec<Bytes>) -> Option<BytesMut> {
    let first = parts.into_iter().next()?;
    (first.len() >= ROOM_FRAME_BYTES).then(|| first.try_into_mut().ok()).flatten()
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
    fn what_was_received_in_place_lies_there_and_its_room_is_used_again() {
        let ids = [1, 2, 3].map(Uuid::from_u128);
        let frame = |seed: u8| {
            let mut frame = frame::FrameBuilder::new();
            frame.push_data(0, u64::from(seed), &vec![seed; 40 * 4096]).unwrap();
            frame.finish(frame::Effort::None).unwrap()
        };
        let mut spare: Option<BytesMut> = None;
        for gap in 0..6 {
            let (mut builder, mut oracle) = (SegmentBuilder::new(ids[0], ids[1], ids[2]), Vec::new());
            let mut plain = SegmentBuilder::new(ids[0], ids[1], ids[2]);
            let known = spare.as_ref().map(|spare| spare.as_ptr());
            for at in 0..5u8 {
                let frame = frame(gap * 8 + at);
                let space = |bytes| spare.take().unwrap_or_else(|| BytesMut::with_capacity(bytes));
                let room = builder.take_room(frame.len(), space, 1 << 20).filter(|_| at != gap);
                oracle.push(plain.push(frame.clone(), 40));
                let place = match room {
                    Some(mut room) => {
                        room.extend_from_slice(&frame);
                        let rest = room.split_off(frame.len());
                        builder.push_received(room, rest, 40)
                    }
                    None => builder.push(frame, 40),
                };
                assert_eq!(place, oracle[usize::from(at)]);
            }
            let parts = builder.finish();
            assert_eq!(parts.concat(), plain.finish().concat());
            assert_eq!(verify(&parts.concat().into(), ids[0], ids[1]), Ok(vec![]));
            if gap == 5 {
                // Header and frames, then the index.
                assert_eq!(parts.len(), 2);
            }
            assert_eq!(parts[0].as_ptr().align_offset(direct::ALIGNMENT), 0);
            assert!(known.is_none_or(|known| known == parts[0].as_ptr()));
            spare = room_of(parts);
            assert_eq!(spare.is_some(), gap > 0);
        }
    }

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
