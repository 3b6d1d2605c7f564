//! From changed ranges to frames: read, compare, build, compress.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};
use mainstay_block::frame::{Effort, FRAME_BLOCKS_MAX, FrameBuilder, FrameError, FrameParts};
use mainstay_block::hash_table::Verdict;
use mainstay_block::{BLOCK_BYTES, BlockHash, ExtentKind, blocks_of, is_zero};
use tokio::sync::{mpsc, watch};
use tokio::time::{Duration, Instant};

use crate::effort::{Cost, Made, Pace};
use crate::throttle::Throttle;
use crate::{ReplicationError, SendDisk, SendJob, SendOptions, SendProgress};

/// Bytes whose extents are asked for at once.
const EXTENT_WINDOW_BYTES: u64 = 1 << 30;
/// Bytes of a full frame.
const FRAME_BYTES: usize = FRAME_BLOCKS_MAX * BLOCK_BYTES as usize;
/// Blocks per read: four frames' worth. Each read wakes a few threads, here and in the device's process, which costs as much
/// as copying 100 KiB.
const READ_BLOCKS: u64 = 4 * FRAME_BLOCKS_MAX as u64;
/// Ranges up to so many blocks (64 KiB) are read without asking first what is in them. Zeros are seen when they are read, and QEMU
/// answers both kinds of request in the thread in which it serves the guest's disks: asking costs the guest as much as reading.
const UNASKED_BLOCKS_MAX: u64 = 16;
/// Blocks of zeros compared with the table at once (1 GiB of disk, 2 MiB of table).
const ZERO_BLOCKS: u64 = 1 << 18;
/// Frames that a thread compresses one after the other when so many are there.
const FRAMES_BATCHED: usize = 4;
/// Batches being compressed, or compressed and not yet taken, at once: enough that the cores have work while one is
/// waited for in order, few enough that what was just read is still in the processors' caches.
const BATCHES_COMPRESSING: usize = 2;

/// A frame on its way.
#[derive(Clone)]
pub(crate) struct Sent {
    pub(crate) frame: FrameParts,
    /// The replica is known to hold what is in it, and asked for it again.
    pub(crate) is_resent: bool,
}

/// What is handed to the link.
pub(crate) enum Output {
    Frame(Sent),
    /// All of it was handed over. A channel that closes without this means failure.
    End {
        /// Byte ranges per disk that were not looked at because the time was up.
        left: Vec<Vec<Range<u64>>>,
    },
}

/// A range of blocks of one disk to look at.
#[derive(Clone, Copy, Debug)]
struct Piece {
    disk: usize,
    first: u64,
    end: u64,
    zero: bool,
}

/// What must be sent of a piece, in order.
enum Change {
    /// Whole frames of blocks one after the other, made where they were compared: another thread would have to fetch them
    /// from memory again.
    Frames {
        first: u64,
        hashes: Vec<BlockHash>,
        frames: Vec<(FrameParts, Made)>,
    },
    /// Blocks one after the other, the last perhaps partial.
    Data {
        disk: usize,
        first: u64,
        hashes: Vec<BlockHash>,
        content: Bytes,
    },
    Zeros {
        disk: usize,
        first: u64,
        count: u64,
    },
    /// Blocks that did not change and were asked for all the same; without content: zeros.
    Resent {
        disk: usize,
        first: u64,
        count: u64,
        content: Option<Bytes>,
    },
}

/// What goes on to be compressed.
enum Built {
    Frame(FrameBuilder),
    Resent(FrameBuilder),
    /// Nothing more is to be done.
    Made(Vec<(FrameParts, Made)>),
}

/// How hard the next frame is compressed.
struct Compression<'a> {
    pace: Mutex<Pace>,
    is_limited: bool,
    output: &'a mpsc::Sender<Output>,
}

impl Compression<'_> {
    fn lock(&self) -> std::sync::MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn effort(&self) -> Effort {
        self.lock().effort(self.is_limited, self.output.capacity() == 0)
    }
}

/// Encodes a frame. CPU-bound.
fn finish(frame: FrameBuilder, effort: Effort) -> Result<(FrameParts, Made), ReplicationError> {
    // Together: blocks where they were read would keep all that was read with them, changed or not, for as long as the frame is
    // not durable.
    encode(frame, effort, |frame| frame.finish(effort).map(FrameParts::from))
}

fn encode(
    frame: FrameBuilder,
    effort: Effort,
    work: impl FnOnce(FrameBuilder) -> Result<FrameParts, FrameError>,
) -> Result<(FrameParts, Made), ReplicationError> {
    let plain_bytes = frame.payload_bytes() as u64;
    let (frame, cost) = Cost::of(|| work(frame));
    let frame = frame?;
    let made = Made { effort, plain_bytes, frame_bytes: frame.len() as u64, cost };
    Ok((frame, made))
}

/// Runs to the end of all ranges or of the time, or until `output` is closed.
pub(crate) async fn scan(
    job: &SendJob,
    options: &SendOptions,
    progress: &watch::Sender<SendProgress>,
    output: mpsc::Sender<Output>,
) -> Result<(), ReplicationError> {
    let (piece_sink, piece_source) = mpsc::channel(64);
    let (frame_sink, frame_source) = mpsc::channel(FRAMES_BATCHED);
    let plan = plan(job, options.time_max, piece_sink);
    let is_limited = options.bytes_per_second.is_some();
    let compression = Compression { pace: Mutex::default(), is_limited, output: &output };
    let build = build(job, options, progress, &compression, piece_source, frame_sink);
    let compress = compress(options, progress, &compression, frame_source);
    let (left, (), ()) = tokio::try_join!(plan, build, compress)?;
    // A link that closes its end has failed and tells why itself.
    let _closed = output.send(Output::End { left }).await;
    Ok(())
}

/// Splits ranges into pieces by what the devices know of themselves, until the time is up; answers what is left then.
async fn plan(
    job: &SendJob,
    time_max: Option<Duration>,
    pieces: mpsc::Sender<Piece>,
) -> Result<Vec<Vec<Range<u64>>>, ReplicationError> {
    let deadline = time_max.map(|time_max| Instant::now() + time_max);
    let is_time_up = || deadline.is_some_and(|deadline| Instant::now() >= deadline);
    let mut left = vec![Vec::new(); job.disks.len()];
    // However little time there is, something is done in it.
    let mut is_begun = false;
    for (index, disk) in job.disks.iter().enumerate() {
        let bytes = |blocks: Range<u64>| {
            blocks.start * BLOCK_BYTES..(blocks.end * BLOCK_BYTES).min(disk.device.size())
        };
        'ranges: for range in block_ranges(disk) {
            let mut at = range.start;
            while at < range.end {
                if is_begun && is_time_up() {
                    left[index].push(bytes(at..range.end));
                    continue 'ranges;
                }
                let end = range.end.min(at + EXTENT_WINDOW_BYTES / BLOCK_BYTES);
                for piece in pieces_of(disk, index, at..end).await? {
                    if is_begun && is_time_up() {
                        left[index].push(bytes(piece.first..range.end));
                        continue 'ranges;
                    }
                    if pieces.send(piece).await.is_err() {
                        // Whoever closed it has failed, and tells why.
                        return Ok(left);
                    }
                    is_begun = true;
                }
                at = end;
            }
        }
    }
    Ok(left)
}

/// Splits a range of blocks.
async fn pieces_of(
    disk: &SendDisk,
    index: usize,
    blocks: Range<u64>,
) -> Result<Vec<Piece>, ReplicationError> {
    if blocks.end - blocks.start <= UNASKED_BLOCKS_MAX {
        return Ok(vec![Piece { disk: index, first: blocks.start, end: blocks.end, zero: false }]);
    }
    let mut pieces = Vec::new();
    for (first, end, zero) in extents(disk, blocks.start, blocks.end).await? {
        let step = if zero { ZERO_BLOCKS } else { READ_BLOCKS };
        let mut from = first;
        while from < end {
            // Reads end at multiples of their size, so that they do not straddle the device's clusters.
            let to = end.min((from / step + 1) * step);
            pieces.push(Piece { disk: index, first: from, end: to, zero });
            from = to;
        }
    }
    Ok(pieces)
}

/// The disk's byte ranges as sorted, disjoint block ranges within the disk.
fn block_ranges(disk: &SendDisk) -> Vec<Range<u64>> {
    let blocks = blocks_of(disk.device.size());
    let outward = |range: &Range<u64>| {
        (range.start / BLOCK_BYTES).min(blocks)..range.end.div_ceil(BLOCK_BYTES).min(blocks)
    };
    let mut ranges: Vec<Range<u64>> =
        disk.ranges.iter().map(outward).filter(|range| !range.is_empty()).collect();
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// Block ranges `(first, end, zero)`; a block that is only partly a hole counts as data.
async fn extents(disk: &SendDisk, first: u64, end: u64) -> Result<Vec<(u64, u64, bool)>, ReplicationError> {
    let from = first * BLOCK_BYTES;
    let to = (end * BLOCK_BYTES).min(disk.device.size());
    let device = |source| ReplicationError::Device { disk: disk.index, source };
    let extents = disk.device.extents(from, to - from).await.map_err(device)?;
    let mut out: Vec<(u64, u64, bool)> = Vec::new();
    let mut at = first;
    let data = extents.iter().filter(|extent| extent.kind == ExtentKind::Data);
    for extent in data {
        let start = (extent.offset / BLOCK_BYTES).clamp(at, end);
        let stop = (extent.offset + extent.length).div_ceil(BLOCK_BYTES).clamp(start, end);
        if start > at {
            out.push((at, start, true));
        }
        match out.last_mut() {
            Some(last) if !last.2 && last.1 == start => last.1 = stop,
            _ if stop > start => out.push((start, stop, false)),
            _ => {}
        }
        at = stop;
    }
    if at < end {
        out.push((at, end, true));
    }
    Ok(out)
}

/// Reads and compares several pieces at once, and builds frames of what changed, in order.
async fn build(
    job: &SendJob,
    options: &SendOptions,
    progress: &watch::Sender<SendProgress>,
    compression: &Compression<'_>,
    pieces: mpsc::Receiver<Piece>,
    frames: mpsc::Sender<Built>,
) -> Result<(), ReplicationError> {
    let pieces = stream::unfold(pieces, |mut pieces| async move {
        let piece: Option<Piece> = pieces.recv().await;
        piece.map(|piece| (piece, pieces))
    });
    let examined = pieces.map(|piece| {
        async move { Ok::<_, ReplicationError>((piece, examine(job, piece, compression).await?)) }.boxed()
    });
    let mut examined = Box::pin(examined.buffered(options.reads_in_flight.max(1)));
    let mut changed_frame = Filling::new(Built::Frame, &frames);
    let mut resent_frame = Filling::new(Built::Resent, &frames);
    while let Some((piece, changes)) = examined.try_next().await? {
        let (mut changed, mut zeroed) = (0, 0);
        for change in changes {
            match change {
                Change::Frames { first, hashes, frames: made } => {
                    if !changed_frame.hand_over().await {
                        return Ok(());
                    }
                    job.disks[piece.disk].table.stage(job.session, first, &hashes)?;
                    changed += hashes.len() as u64 * BLOCK_BYTES;
                    if frames.send(Built::Made(made)).await.is_err() {
                        return Ok(());
                    }
                }
                Change::Data { disk, first, hashes, content } => {
                    let target = &job.disks[disk];
                    if !changed_frame.push(target.index, first, content).await? {
                        return Ok(());
                    }
                    target.table.stage(job.session, first, &hashes)?;
                    changed += hashes.len() as u64 * BLOCK_BYTES;
                }
                Change::Zeros { disk, first, count } => {
                    let target = &job.disks[disk];
                    if !changed_frame.push_zero(target.index, first, count as u32).await? {
                        return Ok(());
                    }
                    target.table.stage_zeros(job.session, first, count)?;
                    zeroed += count * BLOCK_BYTES;
                }
                // The tables say so already.
                Change::Resent { disk, first, count, content } => {
                    let index = job.disks[disk].index;
                    let is_taken = match content {
                        Some(content) => resent_frame.push(index, first, content).await?,
                        None => resent_frame.push_zero(index, first, count as u32).await?,
                    };
                    if !is_taken {
                        return Ok(());
                    }
                }
            }
        }
        progress.send_modify(|progress| {
            let disk = &mut progress.disks[piece.disk];
            disk.changed_bytes += changed;
            disk.zeroed_bytes += zeroed;
            disk.examined_bytes += (piece.end - piece.first) * BLOCK_BYTES;
        });
    }
    // The receiving side closes only when it failed, and tells why itself.
    let _closed = changed_frame.hand_over().await && resent_frame.hand_over().await;
    Ok(())
}

/// A frame being filled, handed over when it is full. Its methods answer false when the receiving side has closed, which it
/// does only when it failed.
struct Filling<'a> {
    frame: FrameBuilder,
    built: fn(FrameBuilder) -> Built,
    frames: &'a mpsc::Sender<Built>,
}

impl<'a> Filling<'a> {
    fn new(built: fn(FrameBuilder) -> Built, frames: &'a mpsc::Sender<Built>) -> Self {
        Self { frame: FrameBuilder::new(), built, frames }
    }

    async fn push(&mut self, disk: u16, first: u64, mut content: Bytes) -> Result<bool, ReplicationError> {
        let mut at = first;
        while !content.is_empty() {
            if !self.make_room().await {
                return Ok(false);
            }
            let length = content.len().min(self.frame.room() * BLOCK_BYTES as usize);
            self.frame.push_bytes(disk, at, content.split_to(length))?;
            at += (length as u64).div_ceil(BLOCK_BYTES);
        }
        Ok(true)
    }

    async fn push_zero(&mut self, disk: u16, first: u64, count: u32) -> Result<bool, ReplicationError> {
        let has_room = self.make_room().await;
        if has_room {
            self.frame.push_zero(disk, first, count)?;
        }
        Ok(has_room)
    }

    async fn make_room(&mut self) -> bool {
        self.frame.room() > 0 || self.hand_over().await
    }

    /// Hands over what there is.
    async fn hand_over(&mut self) -> bool {
        self.frame.is_empty() || self.frames.send((self.built)(std::mem::take(&mut self.frame))).await.is_ok()
    }
}

/// Encodes a piece of which every block is sent, in whole frames.
fn whole(
    disk: u16,
    first: u64,
    data: &Bytes,
    effort: Effort,
) -> Result<Vec<(FrameParts, Made)>, ReplicationError> {
    let frames = (0..data.len()).step_by(FRAME_BYTES).map(|at| {
        let mut frame = FrameBuilder::new();
        frame.push_bytes(disk, first + at as u64 / BLOCK_BYTES, data.slice(at..at + FRAME_BYTES))?;
        encode(frame, effort, |frame| frame.finish_in_parts(effort))
    });
    frames.collect()
}

async fn examine(
    job: &SendJob,
    piece: Piece,
    compression: &Compression<'_>,
) -> Result<Vec<Change>, ReplicationError> {
    let disk = &job.disks[piece.disk];
    let table = Arc::clone(&disk.table);
    let index = piece.disk;
    let again = clipped(&disk.resend, piece.first..piece.end);
    let task = if piece.zero {
        mainstay_block::elsewhere::spawn_blocking(move || {
            let runs = table.not_zero(piece.first, piece.end - piece.first)?;
            let same = |range: Range<u64>| without(range, &runs);
            let resent = again.into_iter().flat_map(same).map(|range| Change::Resent {
                disk: index,
                first: range.start,
                count: range.end - range.start,
                content: None,
            });
            let mut changes: Vec<Change> = resent.collect();
            changes.extend(runs.iter().map(|(first, count)| Change::Zeros {
                disk: index,
                first: *first,
                count: *count,
            }));
            Ok::<_, ReplicationError>(changes)
        })
    } else {
        let from = piece.first * BLOCK_BYTES;
        let to = (piece.end * BLOCK_BYTES).min(disk.device.size());
        let device = |source| ReplicationError::Device { disk: disk.index, source };
        let data = disk.device.read(from, to - from).await.map_err(device)?;
        let (effort, target) = (compression.effort(), disk.index);
        mainstay_block::elsewhere::spawn_blocking(move || {
            let verdicts = table.compare(piece.first, &data)?;
            let hash = |verdict: &Verdict| match verdict {
                Verdict::Data(hash) => Some(*hash),
                Verdict::Same | Verdict::Zero => None,
            };
            if data.len().is_multiple_of(FRAME_BYTES)
                && let Some(hashes) = verdicts.iter().map(hash).collect()
            {
                let frames = whole(target, piece.first, &data, effort)?;
                return Ok(vec![Change::Frames { first: piece.first, hashes, frames }]);
            }
            Ok(changes(piece, &data, verdicts, &again))
        })
    };
    task.await.map_err(|error| ReplicationError::internal(&error))?
}

/// Runs of what is to be sent of a piece that was read.
fn changes(piece: Piece, data: &Bytes, verdicts: Vec<Verdict>, again: &[Range<u64>]) -> Vec<Change> {
    let disk = piece.disk;
    let mut changes: Vec<Change> = Vec::new();
    let offset = |block: u64| (block - piece.first) as usize * BLOCK_BYTES as usize;
    for (block, verdict) in (piece.first..).zip(verdicts) {
        let (at, end) = (offset(block), data.len().min(offset(block + 1)));
        match (verdict, changes.last_mut()) {
            (Verdict::Same, last) if again.iter().any(|range| range.contains(&block)) => {
                let is_zero = is_zero(&data[at..end]);
                match last {
                    Some(Change::Resent { first, count, content, .. })
                        if *first + *count == block && content.is_none() == is_zero =>
                    {
                        *count += 1;
                        if let Some(content) = content {
                            *content = data.slice(offset(*first)..end);
                        }
                    }
                    _ => {
                        let content = (!is_zero).then(|| data.slice(at..end));
                        changes.push(Change::Resent { disk, first: block, count: 1, content });
                    }
                }
            }
            (Verdict::Same, _) => {}
            (Verdict::Data(hash), Some(Change::Data { first, hashes, content, .. }))
                if *first + hashes.len() as u64 == block =>
            {
                hashes.push(hash);
                *content = data.slice(offset(*first)..end);
            }
            (Verdict::Data(hash), _) => {
                let content = data.slice(at..end);
                changes.push(Change::Data { disk, first: block, hashes: vec![hash], content });
            }
            (Verdict::Zero, Some(Change::Zeros { first, count, .. })) if *first + *count == block => {
                *count += 1;
            }
            (Verdict::Zero, _) => changes.push(Change::Zeros { disk, first: block, count: 1 }),
        }
    }
    changes
}

/// The parts of sorted, disjoint ranges within another.
fn clipped(ranges: &[Range<u64>], within: Range<u64>) -> Vec<Range<u64>> {
    let first = ranges.partition_point(|range| range.end <= within.start);
    let touching = ranges[first..].iter().take_while(|range| range.start < within.end);
    touching.map(|range| range.start.max(within.start)..range.end.min(within.end)).collect()
}

/// What sorted runs `(first, count)` leave of a range.
fn without(range: Range<u64>, runs: &[(u64, u64)]) -> Vec<Range<u64>> {
    let (mut left, mut at) = (Vec::new(), range.start);
    for (first, count) in runs {
        let (start, end) = ((*first).max(at), (first + count).min(range.end));
        if start < end {
            if at < start {
                left.push(at..start);
            }
            at = end;
        }
    }
    if at < range.end {
        left.push(at..range.end);
    }
    left
}

/// Compresses frames on blocking threads and hands them over in order, at the allowed rate.
async fn compress(
    options: &SendOptions,
    progress: &watch::Sender<SendProgress>,
    compression: &Compression<'_>,
    frames: mpsc::Receiver<Built>,
) -> Result<(), ReplicationError> {
    let mut throttle = Throttle::new(options.bytes_per_second);
    let frames = stream::unfold(frames, |mut frames| async move {
        let frame: Option<Built> = frames.recv().await;
        frame.map(|frame| (frame, frames))
    });
    let encoded = frames.ready_chunks(FRAMES_BATCHED).map(|batch| {
        let effort = compression.effort();
        let is_made = batch.iter().all(|built| matches!(built, Built::Made(_)));
        let finish_all = move || {
            let mut all = Vec::new();
            for built in batch {
                match built {
                    Built::Frame(frame) => all.push((finish(frame, effort)?, false)),
                    Built::Resent(frame) => all.push((finish(frame, effort)?, true)),
                    Built::Made(made) => all.extend(made.into_iter().map(|made| (made, false))),
                }
            }
            Ok::<_, ReplicationError>(all)
        };
        async move {
            if is_made {
                return finish_all();
            }
            let task = mainstay_block::elsewhere::spawn_blocking(finish_all).await;
            task.map_err(|error| ReplicationError::internal(&error))?
        }
        .boxed()
    });
    let mut encoded = Box::pin(encoded.buffered(BATCHES_COMPRESSING));
    while let Some(batch) = encoded.try_next().await? {
        for ((frame, made), is_resent) in batch {
            let bytes = made.frame_bytes;
            throttle.spend(bytes).await;
            compression.lock().record(made);
            if compression.output.send(Output::Frame(Sent { frame, is_resent })).await.is_err() {
                return Ok(());
            }
            progress.send_modify(|progress| {
                progress.frames += 1;
                progress.frame_bytes += bytes;
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn runs() -> impl Strategy<Value = Vec<(u64, u64)>> {
        proptest::collection::vec((1u64..6, 1u64..6), 0..6).prop_map(|steps| {
            let mut at = 0;
            let place = |(gap, count)| {
                let first = at + gap;
                at = first + count;
                (first, count)
            };
            steps.into_iter().map(place).collect()
        })
    }

    fn blocks(ranges: &[Range<u64>]) -> Vec<u64> {
        ranges.iter().cloned().flatten().collect()
    }

    proptest! {
        #[test]
        fn ranges_are_cut_as_sets_are(runs in runs(), from in 0u64..40, length in 0u64..40) {
            let range = from..from + length;
            let inside = |block: &u64| runs.iter().any(|(first, count)| (*first..first + count).contains(block));
            let expected: Vec<u64> = range.clone().filter(|block| !inside(block)).collect();
            prop_assert_eq!(blocks(&without(range.clone(), &runs)), expected);
            let ranges: Vec<_> = runs.iter().map(|(first, count)| *first..first + count).collect();
            let expected: Vec<u64> = range.clone().filter(inside).collect();
            prop_assert_eq!(blocks(&clipped(&ranges, range)), expected);
        }
    }
}
