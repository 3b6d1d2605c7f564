//! What fuzzing (`fuzz/`) gives its bytes to. Checksums are made right first, behind which nothing would ever be reached.

use bytes::Bytes;

use crate::{
    BLOCK_LENGTH,
    frame::{CHECKSUM_AT, FRAME_HEADER_BYTES, Frame, FrameBuilder, RunKind, checksum},
};

/// A frame from a peer or a segment.
///
/// # Panics
/// When something is wrong with this crate.
pub fn frame(data: &[u8]) {
    if Frame::decode(&Bytes::copy_from_slice(data)).is_ok() || data.len() < FRAME_HEADER_BYTES {
        return;
    }
    let mut sealed = data.to_vec();
    let sum = checksum(&sealed);
    sealed[CHECKSUM_AT..FRAME_HEADER_BYTES].copy_from_slice(&sum);
    let Ok(frame) = Frame::decode(&sealed.into()) else { return };
    let mut again = FrameBuilder::new();
    for (run, part) in frame.parts() {
        match run.kind {
            RunKind::Data => {
                assert_eq!(part.len(), run.count as usize * BLOCK_LENGTH, "a run has its part");
                again.push_data(run.disk, run.block, &part)
            }
            RunKind::Zero => again.push_zero(run.disk, run.block, run.count),
        }
        .expect("what was decoded can be encoded");
    }
    let again = again.finish(crate::frame::Effort::Fast).expect("a frame has runs");
    assert_eq!(Frame::decode(&again).expect("our own frame").payload, frame.payload);
}
