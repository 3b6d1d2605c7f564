//! Comparing local disks with what their hash tables say, and remembering what was written to them.

use std::{ops::Range, sync::Arc};

use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use mainstay_block::{
    BLOCK_BYTES, BlockDevice, BlockError, ExtentKind,
    hash_table::{HashTable, Verdict},
};
use mainstay_provider::{CapturedDisk, Changed, ErrorKind, SiteError};

use super::{Work, lock, tables::table_error};

/// Bytes read and hashed at once: enough to keep a disk busy, little enough to report progress.
const PIECE_BYTES: u64 = 1 << 20;
/// Pieces in flight.
pub(super) const PIECES_IN_FLIGHT: usize = 8;

pub(super) fn block_error(key: &str) -> impl Fn(BlockError) -> SiteError + '_ {
    move |error| SiteError::new(ErrorKind::Failed, format!("disk '{key}': {error}"))
}

/// Compares a disk's possibly changed ranges with its table.
pub(super) async fn compare(
    disk: &CapturedDisk,
    table: &Arc<HashTable>,
    work: &Work,
) -> Result<(Vec<Range<u64>>, u64), SiteError> {
    let size = disk.device.size();
    let ranges = match &disk.changed {
        Changed::Since(ranges) => ranges.clone(),
        Changed::Unknown { reason } => {
            tracing::info!(disk = disk.key, reason, "the home disk is compared by hashes");
            std::iter::once(0..size).filter(|range| !range.is_empty()).collect()
        }
    };
    let total: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    let mut differing: Vec<(u64, u64)> = Vec::new();
    let mut done = 0;
    for range in ranges {
        let first = range.start / BLOCK_BYTES;
        let end = range.end.min(size).div_ceil(BLOCK_BYTES);
        let mut found = stream::iter(pieces(first, end))
            .map(|piece| compare_piece(disk, table.clone(), piece))
            .buffer_unordered(PIECES_IN_FLIGHT);
        while let Some((blocks, ranges)) = found.try_next().await? {
            differing.extend(ranges);
            done += blocks * BLOCK_BYTES;
            work.report("Comparing the home disks", done, total, 0);
        }
    }
    merge(&mut differing);
    Ok((differing.into_iter().map(|(first, end)| first..end).collect(), done))
}

async fn compare_piece(
    disk: &CapturedDisk,
    table: Arc<HashTable>,
    piece: Range<u64>,
) -> Result<(u64, Vec<(u64, u64)>), SiteError> {
    let offset = piece.start * BLOCK_BYTES;
    let length = ((piece.end - piece.start) * BLOCK_BYTES).min(disk.device.size() - offset);
    let extents = disk.device.extents(offset, length).await.map_err(block_error(&disk.key))?;
    let blocks = piece.end - piece.start;
    if extents.iter().all(|extent| extent.kind == ExtentKind::Zero) {
        let found = table.not_zero(piece.start, blocks).map_err(|error| table_error(&error))?;
        return Ok((blocks, found.into_iter().map(|(first, count)| (first, first + count)).collect()));
    }
    let data = disk.device.read(offset, length).await.map_err(block_error(&disk.key))?;
    let compared = mainstay_block::elsewhere::spawn_blocking(move || {
        table.compare(piece.start, &data).map(|verdicts| (piece, verdicts))
    })
    .await
    .map_err(|error| SiteError::new(ErrorKind::Failed, error.to_string()))?;
    let (piece, verdicts) = compared.map_err(|error| table_error(&error))?;
    let differing = verdicts
        .iter()
        .enumerate()
        .filter(|(_, verdict)| !matches!(verdict, Verdict::Same))
        .map(|(index, _)| (piece.start + index as u64, piece.start + index as u64 + 1))
        .collect();
    Ok((blocks, differing))
}

/// Cuts a block range into pieces.
pub(super) fn pieces(first: u64, end: u64) -> impl Iterator<Item = Range<u64>> {
    let step = PIECE_BYTES / BLOCK_BYTES;
    (first..end).step_by(step as usize).map(move |start| start..(start + step).min(end))
}

/// Sorts ranges and joins those that touch.
pub(super) fn merge(ranges: &mut Vec<(u64, u64)>) {
    ranges.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (first, end) in ranges.drain(..) {
        match merged.last_mut() {
            Some(last) if first <= last.1 => last.1 = last.1.max(end),
            _ => merged.push((first, end)),
        }
    }
    *ranges = merged;
}

/// A device that remembers which blocks were written, for the proof.
pub(super) struct Touched {
    device: Arc<dyn BlockDevice>,
    ranges: std::sync::Mutex<Vec<(u64, u64)>>,
}

impl Touched {
    pub(super) fn new(device: Arc<dyn BlockDevice>) -> Self {
        Self { device, ranges: std::sync::Mutex::default() }
    }

    fn note(&self, offset: u64, length: u64) {
        lock(&self.ranges).push((offset / BLOCK_BYTES, (offset + length).div_ceil(BLOCK_BYTES)));
    }

    pub(super) fn ranges(&self) -> Vec<(u64, u64)> {
        lock(&self.ranges).clone()
    }
}

#[async_trait::async_trait]
impl BlockDevice for Touched {
    fn size(&self) -> u64 {
        self.device.size()
    }

    async fn read(&self, offset: u64, length: u64) -> Result<bytes::Bytes, BlockError> {
        self.device.read(offset, length).await
    }

    async fn write(&self, offset: u64, data: bytes::Bytes) -> Result<(), BlockError> {
        self.note(offset, data.len() as u64);
        self.device.write(offset, data).await
    }

    async fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.note(offset, length);
        self.device.write_zeroes(offset, length).await
    }

    async fn flush(&self) -> Result<(), BlockError> {
        self.device.flush().await
    }

    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<mainstay_block::Extent>, BlockError> {
        self.device.extents(offset, length).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_joined_where_they_touch() {
        let mut ranges = vec![(5, 7), (0, 2), (2, 3), (6, 9)];
        merge(&mut ranges);
        assert_eq!(ranges, [(0, 3), (5, 9)]);
    }

    #[test]
    fn pieces_cover_the_range_exactly() {
        let all: Vec<_> = pieces(3, 600).collect();
        assert_eq!(all.first(), Some(&(3..259)));
        assert_eq!(all.last().map(|piece| piece.end), Some(600));
        assert!(all.windows(2).all(|pair| pair[0].end == pair[1].start));
    }
}
