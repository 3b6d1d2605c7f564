//! The server's side of a fetch: streaming the difference to a point as frames.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};
use mainstay_block::frame::{Effort, FrameBuilder};
use mainstay_block::{BLOCK_BYTES, BlockDevice as _, ExtentKind, blocks_of, is_zero};
use mainstay_store::{PointReader, Store, StoreError};
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::ReplicationError;
use crate::message::{FetchRequest, Welcome};
use crate::wire::{Kind, Message, Receiver, Transmitter, VERSION};

/// Pieces read and compressed ahead of the connection: 8 MiB of memory, and enough to keep a disk busy.
const PIECES_IN_FLIGHT: usize = 8;
/// Blocks per piece: up to 16 frames.
const PIECE_BLOCKS: u64 = 256;
/// Zero blocks per piece.
const ZERO_BLOCKS: u64 = 1 << 30;
/// Most extra ranges of one request.
const RANGES_MAX: usize = 1 << 20;

#[derive(Clone, Debug)]
struct Piece {
    disk: u16,
    range: Range<u64>,
    zero: bool,
}

pub(crate) async fn serve(
    mut receiver: Receiver,
    transmitter: &Transmitter,
    store: &Store,
    replica: Uuid,
    request: FetchRequest,
) -> Result<(), ReplicationError> {
    let reader = store.open_point(replica, request.to).await?;
    let ranges = ranges(store, replica, &reader, &request).await?;
    let bytes: u64 = ranges.values().flatten().map(|range| (range.end - range.start) * BLOCK_BYTES).sum();
    let welcome = Welcome::Point { version: VERSION, disks: reader.info().disks.clone(), bytes };
    transmitter.send(&Message::control(Kind::Welcome, 0, &welcome)?).await?;
    let (sink, source) = mpsc::channel(64);
    let (planned, sent) =
        futures::join!(plan(&reader, ranges, sink).boxed(), transmit(&reader, transmitter, source).boxed());
    sent?;
    planned?;
    // The client confirms, so that the stream is not closed with data in flight.
    receiver.expect(Kind::Done).await.map(|_| ())
}

/// Hands out the pieces, range by range, so that a large difference needs no large list.
async fn plan(
    reader: &PointReader,
    ranges: BTreeMap<u16, Vec<Range<u64>>>,
    sink: mpsc::Sender<Result<Piece, ReplicationError>>,
) -> Result<(), ReplicationError> {
    for (disk, ranges) in ranges {
        for range in ranges {
            let found = match pieces(reader, disk, range).await {
                Ok(pieces) => pieces.into_iter().map(Ok).collect(),
                Err(error) => vec![Err(error)],
            };
            for piece in found {
                if sink.send(piece).await.is_err() {
                    return Ok(());
                }
            }
        }
    }
    Ok(())
}

/// Sends the frames of all pieces in order, then how many they were.
async fn transmit(
    reader: &PointReader,
    transmitter: &Transmitter,
    source: mpsc::Receiver<Result<Piece, ReplicationError>>,
) -> Result<(), ReplicationError> {
    let pieces = stream::unfold(source, |mut source| async move {
        let piece: Option<Result<Piece, ReplicationError>> = source.recv().await;
        piece.map(|piece| (piece, source))
    });
    let frames = pieces.map(|piece| async move { encode(reader, piece?).await }.boxed());
    let mut frames = Box::pin(frames.buffered(PIECES_IN_FLIGHT));
    let mut number = 0;
    while let Some(encoded) = frames.try_next().await? {
        for frame in encoded {
            number += 1;
            transmitter.send(&Message::new(Kind::Frame, number, frame)).await?;
        }
    }
    transmitter.send(&Message::new(Kind::Done, number, Bytes::new())).await
}

/// What is asked for, per disk, sorted, disjoint, from the resume position on.
async fn ranges(
    store: &Store,
    replica: Uuid,
    reader: &PointReader,
    request: &FetchRequest,
) -> Result<BTreeMap<u16, Vec<Range<u64>>>, ReplicationError> {
    if request.extra.len() > RANGES_MAX {
        return Err(StoreError::Invalid("too many ranges").into());
    }
    let mut wanted: BTreeMap<u16, Vec<Range<u64>>> = BTreeMap::new();
    if request.difference {
        for diff in store.diff(replica, request.from, request.to).await? {
            wanted.insert(diff.disk, diff.ranges);
        }
    }
    for extra in &request.extra {
        wanted.entry(extra.disk).or_default().push(extra.first..extra.end);
    }
    let mut out = BTreeMap::new();
    for disk in &reader.info().disks {
        let (resume_disk, resume_block) = request.resume;
        let from = match disk.index.cmp(&resume_disk) {
            std::cmp::Ordering::Less => continue,
            std::cmp::Ordering::Equal => resume_block,
            std::cmp::Ordering::Greater => 0,
        };
        let end = blocks_of(disk.bytes);
        let mut ranges = wanted.remove(&disk.index).unwrap_or_default();
        ranges.sort_unstable_by_key(|range| range.start);
        let mut joined: Vec<Range<u64>> = Vec::new();
        for range in ranges {
            let range = range.start.max(from)..range.end.min(end);
            match joined.last_mut() {
                _ if range.is_empty() => {}
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => joined.push(range),
            }
        }
        out.insert(disk.index, joined);
    }
    Ok(out)
}

async fn pieces(reader: &PointReader, disk: u16, range: Range<u64>) -> Result<Vec<Piece>, ReplicationError> {
    let device = reader.disk(disk)?;
    let (from, to) = (range.start * BLOCK_BYTES, (range.end * BLOCK_BYTES).min(device.size()));
    let extents = device.extents(from, to - from).await;
    let extents = extents.map_err(|_| StoreError::Invalid("extents unreadable"))?;
    let mut pieces = Vec::new();
    for extent in extents {
        // A recovery point's extents end at block boundaries, or at the end of the disk.
        let end = blocks_of(extent.offset + extent.length);
        let zero = extent.kind == ExtentKind::Zero;
        let step = if zero { ZERO_BLOCKS } else { PIECE_BLOCKS };
        let mut at = extent.offset / BLOCK_BYTES;
        while at < end {
            let to = end.min(at + step);
            pieces.push(Piece { disk, range: at..to, zero });
            at = to;
        }
    }
    Ok(pieces)
}

/// Reads one piece and makes frames of it.
async fn encode(reader: &PointReader, piece: Piece) -> Result<Vec<Bytes>, ReplicationError> {
    let Piece { disk, range, zero } = piece;
    if zero {
        let mut frame = FrameBuilder::new();
        frame.push_zero(disk, range.start, (range.end - range.start) as u32)?;
        return Ok(vec![frame.finish(Effort::Small)?]);
    }
    let device = reader.disk(disk)?;
    let from = range.start * BLOCK_BYTES;
    let data = device.read_range(from, (range.end * BLOCK_BYTES).min(device.size()) - from).await?;
    let task = mainstay_block::elsewhere::spawn_blocking(move || {
        let mut frames = Vec::new();
        let mut frame = FrameBuilder::new();
        for (block, content) in (range.start..).zip(data.chunks(BLOCK_BYTES as usize)) {
            if frame.room() == 0 {
                frames.push(std::mem::take(&mut frame).finish(Effort::Small)?);
            }
            if is_zero(content) {
                frame.push_zero(disk, block, 1)?;
            } else {
                frame.push_data(disk, block, content)?;
            }
        }
        if !frame.is_empty() {
            frames.push(frame.finish(Effort::Small)?);
        }
        Ok::<_, ReplicationError>(frames)
    });
    task.await.map_err(|error| ReplicationError::internal(&error))?
}
