//! A recovery point's disks as local block devices, over a connection that may break.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};
use mainstay_block::{
    BLOCK_BYTES, BlockDevice, BlockError, BlockHash, Extent, ExtentKind, HashKey, blocks_of, check_range,
};
use mainstay_store::DiskSpec;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::connect::{Backoff, unless_cancelled};
use crate::message::{ExtentList, Hello, Purpose, Query, Refusal, Welcome};
use crate::serve::FLAG_REFUSED;
use crate::wire::{
    ANSWER_BYTES_MAX, FLAG_ZERO, Kind, Message, Receiver, Traffic, Transmitter, VERSION, split,
};
use crate::{Connect, RefusalKind, ReplicationError};

/// Bytes per read query; aligned pieces of this size that are zeros cost 20 bytes.
const READ_PIECE_BYTES: u64 = 256 << 10;
/// Pieces of one read in flight.
const PIECES_IN_FLIGHT: usize = 16;
/// Hashes per query.
const HASHES_PER_QUERY: u64 = (ANSWER_BYTES_MAX / 8) as u64;

/// How to mount.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Queries in flight over all disks; more wait. Must not exceed what the server answers at once by much.
    pub queries_in_flight: usize,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self { queries_in_flight: 64 }
    }
}

/// A mounted recovery point. Reconnects by itself; meanwhile requests wait. Ends when it and all its disks are
/// dropped, or when the token given to [`Mount::open`] is cancelled: then all requests fail.
#[derive(Clone)]
pub struct Mount {
    disks: Arc<Vec<DiskSpec>>,
    queries: mpsc::Sender<Pending>,
    traffic: Arc<Traffic>,
}

/// One disk of a mounted recovery point, read-only.
#[derive(Clone)]
pub struct RemoteDisk {
    mount: Mount,
    index: u16,
    bytes: u64,
}

struct Pending {
    query: Query,
    reply: oneshot::Sender<Result<Message, ReplicationError>>,
}

impl Mount {
    /// Connects, retrying until it works, is refused or cancelled.
    ///
    /// # Errors
    /// [`ReplicationError::Refused`], [`ReplicationError::Cancelled`].
    pub async fn open(
        connect: Arc<dyn Connect>,
        replica: Uuid,
        point: Uuid,
        options: &MountOptions,
        cancel: CancellationToken,
    ) -> Result<Self, ReplicationError> {
        let (queries, source) = mpsc::channel(options.queries_in_flight.max(1));
        let traffic = Arc::new(Traffic::default());
        let purpose = Purpose::Mount { point };
        let hello = Hello { version_min: VERSION, version_max: VERSION, replica, purpose };
        let (ready, opened) = oneshot::channel();
        let driver = Driver {
            connect,
            hello,
            traffic: Arc::clone(&traffic),
            queries: source,
            in_flight: options.queries_in_flight.max(1),
            waiting: BTreeMap::new(),
            next_tag: 0,
            ready: Some(ready),
        };
        tokio::spawn(driver.run(cancel));
        let disks = opened.await.map_err(|error| ReplicationError::internal(&error))??;
        Ok(Self { disks: Arc::new(disks), queries, traffic })
    }

    /// The disks of the recovery point.
    pub fn disks(&self) -> &[DiskSpec] {
        &self.disks
    }

    /// One disk as a device.
    pub fn disk(&self, index: u16) -> Option<RemoteDisk> {
        let disk = self.disks.iter().find(|disk| disk.index == index)?;
        Some(RemoteDisk { mount: self.clone(), index, bytes: disk.bytes })
    }

    /// What went over all connections of this mount.
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    async fn ask(&self, query: Query) -> Result<Message, ReplicationError> {
        let (reply, answer) = oneshot::channel();
        let gone = |_| ReplicationError::Cancelled;
        self.queries.send(Pending { query, reply }).await.map_err(|_| ReplicationError::Cancelled)?;
        answer.await.map_err(gone)?
    }
}

/// Owns the connection and everything that waits for it.
struct Driver {
    connect: Arc<dyn Connect>,
    hello: Hello,
    traffic: Arc<Traffic>,
    queries: mpsc::Receiver<Pending>,
    in_flight: usize,
    waiting: BTreeMap<u64, Pending>,
    next_tag: u64,
    ready: Option<oneshot::Sender<Result<Vec<DiskSpec>, ReplicationError>>>,
}

impl Driver {
    async fn run(mut self, cancel: CancellationToken) {
        let mut backoff = Backoff::new();
        let error = loop {
            match unless_cancelled(&cancel, self.connection(&mut backoff)).await {
                Ok(()) => return,
                Err(error) if error.is_transient() => {
                    tracing::debug!(%error, waiting = self.waiting.len(), "mount lost its connection");
                    if let Err(error) = backoff.pause(&cancel).await {
                        break error;
                    }
                }
                Err(error) => break error,
            }
        };
        // Queries that are dropped fail as cancelled; whoever still waits to open learns the reason.
        let ready = self.ready.take();
        if ready.is_none() {
            match error {
                // Whoever had it let go of it.
                ReplicationError::Cancelled => tracing::debug!("mount ended"),
                ref error => tracing::warn!(%error, "mount ended"),
            }
        }
        if let Some(Err(_)) = ready.map(|ready| ready.send(Err(error))) {
            tracing::debug!("nobody waits for the mount any more");
        }
    }

    /// One connection; returns normally when nobody uses the mount any more.
    async fn connection(&mut self, backoff: &mut Backoff) -> Result<(), ReplicationError> {
        let (mut receiver, transmitter) = split(self.connect.connect().await?, &self.traffic);
        transmitter.send(&Message::control(Kind::Hello, 0, &self.hello)?).await?;
        let Welcome::Point { disks, .. } = receiver.expect(Kind::Welcome).await?.body()? else {
            return Err(ReplicationError::Protocol("unexpected welcome"));
        };
        backoff.reset();
        if let Some(ready) = self.ready.take()
            && ready.send(Ok(disks)).is_err()
        {
            return Ok(());
        }
        self.converse(receiver, &transmitter).await
    }

    async fn converse(
        &mut self,
        receiver: Receiver,
        transmitter: &Transmitter,
    ) -> Result<(), ReplicationError> {
        let incoming = stream::unfold(receiver, |mut receiver| async move {
            let message = receiver.receive().await;
            Some((message, receiver))
        });
        let mut incoming = Box::pin(incoming);
        let mut ping = Box::pin(transmitter.ping_forever());
        for (tag, pending) in &self.waiting {
            transmitter.send(&Message::control(Kind::Query, *tag, &pending.query)?).await?;
        }
        loop {
            tokio::select! {
                message = incoming.next() => {
                    let message = message.ok_or(ReplicationError::Protocol("stream ended"))??;
                    let pending = self.waiting.remove(&message.tag).filter(|_| message.kind == Kind::Answer);
                    let pending = pending.ok_or(ReplicationError::Protocol("an answer nobody asked for"))?;
                    let answer = if message.flags & FLAG_REFUSED == 0 {
                        Ok(message)
                    } else {
                        let refusal: Refusal = message.body()?;
                        if refusal.kind == RefusalKind::Unavailable {
                            // The server's storage hiccups: ask again, after a pause, on a new connection.
                            self.waiting.insert(message.tag, pending);
                            return Err(ReplicationError::from_refusal(refusal.kind, refusal.message));
                        }
                        Err(ReplicationError::from_refusal(refusal.kind, refusal.message))
                    };
                    if pending.reply.send(answer).is_err() {
                        tracing::trace!("nobody waits for this answer any more");
                    }
                }
                error = &mut ping => return Err(error),
                pending = self.queries.recv(), if self.waiting.len() < self.in_flight => {
                    let Some(pending) = pending else {
                        return transmitter.send(&Message::new(Kind::Done, 0, Bytes::new())).await;
                    };
                    self.next_tag += 1;
                    let message = Message::control(Kind::Query, self.next_tag, &pending.query)?;
                    self.waiting.insert(self.next_tag, pending);
                    transmitter.send(&message).await?;
                }
            }
        }
    }
}

fn as_block_error(error: ReplicationError) -> BlockError {
    BlockError::Io(std::io::Error::other(error))
}

impl RemoteDisk {
    /// Keyed hashes of `count` blocks from `first` on, computed by the server.
    ///
    /// # Errors
    /// [`ReplicationError::Refused`], [`ReplicationError::Cancelled`].
    pub async fn hashes(
        &self,
        key: HashKey,
        first: u64,
        count: u64,
    ) -> Result<Vec<BlockHash>, ReplicationError> {
        let end = first.checked_add(count).filter(|end| *end <= blocks_of(self.bytes));
        let end = end.ok_or(ReplicationError::Protocol("hashes of blocks outside the disk"))?;
        let firsts = (first..end).step_by(HASHES_PER_QUERY as usize);
        let queries = firsts.map(|first| {
            async move {
                let count = HASHES_PER_QUERY.min(end - first) as u32;
                let query = Query::Hashes { disk: self.index, key: key.0, first, count };
                let answer = self.mount.ask(query).await?;
                if answer.payload.len() != count as usize * 8 {
                    return Err(ReplicationError::Protocol("wrong number of hashes"));
                }
                let word =
                    |bytes: &[u8]| bytes.iter().rev().fold(0, |sum, byte| (sum << 8) | u64::from(*byte));
                Ok(answer.payload.chunks_exact(8).map(|hash| BlockHash(word(hash))).collect::<Vec<_>>())
            }
            .boxed()
        });
        let parts: Vec<_> = stream::iter(queries).buffered(4).try_collect().await?;
        Ok(parts.concat())
    }

    async fn read_piece(&self, offset: u64, length: u64) -> Result<Option<Bytes>, BlockError> {
        let query = Query::Read { disk: self.index, offset, length: length as u32 };
        let answer = self.mount.ask(query).await.map_err(as_block_error)?;
        if answer.flags & FLAG_ZERO != 0 {
            return Ok(None);
        }
        if answer.payload.len() as u64 != length {
            return Err(as_block_error(ReplicationError::Protocol("a read of another length")));
        }
        Ok(Some(answer.payload))
    }
}

#[async_trait]
impl BlockDevice for RemoteDisk {
    fn size(&self) -> u64 {
        self.bytes
    }

    async fn read(&self, offset: u64, length: u64) -> Result<Bytes, BlockError> {
        check_range(offset, length, self.bytes)?;
        let end = offset + length;
        let mut pieces = Vec::new();
        let mut at = offset;
        while at < end {
            let to = end.min((at / READ_PIECE_BYTES + 1) * READ_PIECE_BYTES);
            pieces.push((at, to - at));
            at = to;
        }
        if let [(at, length)] = pieces[..] {
            let piece = self.read_piece(at, length).await?;
            return Ok(piece.unwrap_or_else(|| BytesMut::zeroed(length as usize).freeze()));
        }
        let mut out = BytesMut::zeroed(length as usize);
        let reads = pieces.into_iter().map(|(at, length)| {
            async move { self.read_piece(at, length).await.map(|piece| (at, piece)) }.boxed()
        });
        let mut reads = stream::iter(reads).buffer_unordered(PIECES_IN_FLIGHT);
        while let Some((at, piece)) = reads.try_next().await? {
            if let Some(piece) = piece {
                let from = (at - offset) as usize;
                out[from..from + piece.len()].copy_from_slice(&piece);
            }
        }
        Ok(out.freeze())
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
        let end = offset + length;
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = offset;
        while at < end {
            let query = Query::Extents { disk: self.index, offset: at, length: end - at };
            let answer = self.mount.ask(query).await.map_err(as_block_error)?;
            let list: ExtentList = answer.body().map_err(as_block_error)?;
            let before = at;
            for (length, data) in list.0 {
                let kind = if data { ExtentKind::Data } else { ExtentKind::Zero };
                match extents.last_mut() {
                    Some(last) if last.kind == kind => last.length += length,
                    _ => extents.push(Extent { offset: at, length, kind }),
                }
                at = at.checked_add(length).filter(|at| *at <= end).ok_or_else(|| {
                    as_block_error(ReplicationError::Protocol("extents beyond what was asked"))
                })?;
            }
            if at == before {
                return Err(as_block_error(ReplicationError::Protocol("no extents")));
            }
        }
        Ok(extents)
    }
}

const _: () =
    assert!(READ_PIECE_BYTES <= ANSWER_BYTES_MAX as u64 && READ_PIECE_BYTES.is_multiple_of(BLOCK_BYTES));
