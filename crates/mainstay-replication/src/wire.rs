//! Framing: a fixed header, then a raw payload (`docs/formats/wire.md`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use mainstay_block::frame::{FRAME_BYTES_MAX, FrameParts};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::sync::Mutex;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::connect::BoxStream;
use crate::message::Refusal;
use crate::{RefusalKind, ReplicationError};

/// The protocol version this code speaks; there is no older one.
pub(crate) const VERSION: u16 = 1;
const MAGIC: [u8; 4] = *b"MSDP";
const HEADER_BYTES: usize = 20;
/// Control messages: a definition of 16 MiB and its frame of postcard, or a hello with 100,000 ranges.
const CONTROL_BYTES_MAX: u32 = (16 << 20) + 4096;
/// A peer that says nothing for this long is gone: both sides send a ping every [`PING_EVERY`].
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(30);
/// See [`SILENCE_MAX`].
pub(crate) const PING_EVERY: Duration = Duration::from_secs(5);
/// A peer that does not take a message for this long is given up on, whatever it says meanwhile. Long, because one whose disk is
/// slow or full stops reading for a while.
const STALL_MAX: Duration = Duration::from_secs(600);
/// Longest read or range of hashes in one query, bytes of answer.
pub(crate) const ANSWER_BYTES_MAX: u32 = 1 << 20;

/// The header on the wire.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Header {
    magic: [u8; 4],
    kind: u8,
    flags: u8,
    reserved: [u8; 2],
    tag: U64,
    length: U32,
}

const _: () = assert!(size_of::<Header>() == HEADER_BYTES);

/// Message kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Hello = 1,
    Welcome = 2,
    Refusal = 3,
    Ping = 4,
    Frame = 5,
    Ack = 6,
    Flush = 7,
    Commit = 8,
    Committed = 9,
    Query = 10,
    Answer = 11,
    Done = 12,
}

impl Kind {
    fn parse(value: u8) -> Option<Self> {
        use Kind::{
            Ack, Answer, Commit, Committed, Done, Flush, Frame, Hello, Ping, Query, Refusal, Welcome,
        };
        let all = [Hello, Welcome, Refusal, Ping, Frame, Ack, Flush, Commit, Committed, Query, Answer, Done];
        all.into_iter().find(|kind| *kind as u8 == value)
    }

    fn limit(self) -> u32 {
        match self {
            Self::Frame => FRAME_BYTES_MAX as u32,
            Self::Answer => ANSWER_BYTES_MAX,
            Self::Ping | Self::Ack | Self::Flush | Self::Done => 0,
            Self::Query | Self::Committed => 4096,
            Self::Hello | Self::Welcome | Self::Commit | Self::Refusal => CONTROL_BYTES_MAX,
        }
    }
}

/// The answer is all zeros and carries no payload.
pub(crate) const FLAG_ZERO: u8 = 1;
/// A frame's blocks are the parent's, sent again because the store lost them.
pub(crate) const FLAG_RESENT: u8 = 4;

/// One message.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) kind: Kind,
    pub(crate) flags: u8,
    /// Sequence number of a frame, number of durable frames, or the query answered.
    pub(crate) tag: u64,
    pub(crate) payload: Bytes,
}

impl Message {
    pub(crate) fn new(kind: Kind, tag: u64, payload: Bytes) -> Self {
        Self { kind, flags: 0, tag, payload }
    }

    pub(crate) fn control(kind: Kind, tag: u64, body: &impl Serialize) -> Result<Self, ReplicationError> {
        let payload = postcard::to_stdvec(body).map_err(|_| ReplicationError::Protocol("unencodable"))?;
        Ok(Self::new(kind, tag, payload.into()))
    }

    pub(crate) fn body<T: DeserializeOwned>(&self) -> Result<T, ReplicationError> {
        postcard::from_bytes(&self.payload).map_err(|_| ReplicationError::Protocol("undecodable body"))
    }
}

/// Bytes that really went over a session's connections, all of them, seen from this side.
#[derive(Debug, Default)]
pub struct Traffic {
    sent: AtomicU64,
    received: AtomicU64,
    connections: AtomicU64,
}

impl Traffic {
    /// Bytes written.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Bytes read.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Connections made or accepted.
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }
}

/// Splits a stream into the two ends of a connection.
pub(crate) fn split(stream: BoxStream, traffic: &Arc<Traffic>) -> (Receiver, Transmitter) {
    traffic.connections.fetch_add(1, Ordering::Relaxed);
    let (read, write) = tokio::io::split(stream);
    let receiver = Receiver { read, traffic: Arc::clone(traffic) };
    let transmitter = Transmitter { write: Arc::new(Mutex::new(write)), traffic: Arc::clone(traffic) };
    (receiver, transmitter)
}

/// The reading end. Not cancel-safe: a dropped `receive` may have taken half a message.
pub(crate) struct Receiver {
    read: ReadHalf<BoxStream>,
    traffic: Arc<Traffic>,
}

impl Receiver {
    /// The next message that is not a ping; a refusal becomes the error it stands for.
    pub(crate) async fn receive(&mut self) -> Result<Message, ReplicationError> {
        match self.receive_into(|_| None).await? {
            Incoming::Message(message) => Ok(message),
            Incoming::Frame { .. } => Err(ReplicationError::Protocol("a frame in no room")),
        }
    }

    /// As [`Self::receive`]; the bytes of a frame are put where `room`, asked for so many, says.
    pub(crate) async fn receive_into(
        &mut self,
        room: impl Fn(usize) -> Option<BytesMut>,
    ) -> Result<Incoming, ReplicationError> {
        loop {
            let next = tokio::time::timeout(SILENCE_MAX, read_incoming(&mut self.read, &room)).await;
            let incoming = next.map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))??;
            let length = match &incoming {
                Incoming::Message(message) => message.payload.len(),
                Incoming::Frame { frame, .. } => frame.len(),
            };
            self.traffic.received.fetch_add((HEADER_BYTES + length) as u64, Ordering::Relaxed);
            match incoming {
                Incoming::Message(Message { kind: Kind::Ping, .. }) => {}
                Incoming::Message(message) if message.kind == Kind::Refusal => {
                    let refusal: Refusal = message.body()?;
                    return Err(ReplicationError::from_refusal(refusal.kind, refusal.message));
                }
                incoming => return Ok(incoming),
            }
        }
    }

    /// The next message, which must be of this kind.
    pub(crate) async fn expect(&mut self, kind: Kind) -> Result<Message, ReplicationError> {
        let message = self.receive().await?;
        if message.kind == kind { Ok(message) } else { Err(ReplicationError::Protocol("unexpected message")) }
    }
}

/// What was received.
pub(crate) enum Incoming {
    Message(Message),
    /// A frame, where there was room for it.
    Frame {
        flags: u8,
        number: u64,
        frame: BytesMut,
        /// The room after it.
        rest: BytesMut,
    },
}

pub(crate) async fn read_incoming(
    read: &mut (impl AsyncRead + Unpin),
    room: &impl Fn(usize) -> Option<BytesMut>,
) -> Result<Incoming, ReplicationError> {
    let mut bytes = [0u8; HEADER_BYTES];
    read.read_exact(&mut bytes).await?;
    let header: Header = zerocopy::transmute!(bytes);
    let kind = Kind::parse(header.kind).filter(|_| header.magic == MAGIC && header.reserved == [0; 2]);
    let kind = kind.ok_or(ReplicationError::Protocol("not a message of this protocol"))?;
    let length = header.length.get();
    if length > kind.limit() {
        return Err(ReplicationError::Protocol("message too long"));
    }
    let (flags, tag, length) = (header.flags, header.tag.get(), length as usize);
    if kind == Kind::Frame
        && let Some(mut space) = room(length)
    {
        read_payload(read, &mut space, length).await?;
        let rest = space.split_off(length);
        return Ok(Incoming::Frame { flags, number: tag, frame: space, rest });
    }
    // Room for a frame at once; beyond it grows with what really arrives, so that a header alone cannot make us
    // allocate much.
    let mut payload = BytesMut::with_capacity(length.min(FRAME_BYTES_MAX));
    read_payload(read, &mut payload, length).await?;
    Ok(Incoming::Message(Message { kind, flags, tag, payload: payload.freeze() }))
}

/// Appends exactly so many bytes.
async fn read_payload(
    read: &mut (impl AsyncRead + Unpin),
    payload: &mut BytesMut,
    length: usize,
) -> Result<(), ReplicationError> {
    let mut read = read.take(length as u64);
    while read.limit() > 0 {
        if read.read_buf(payload).await? == 0 {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        }
    }
    Ok(())
}

/// The writing end; clones share it. Dropping a `send` half-way breaks the connection for all, so callers give
/// up the whole connection then.
#[derive(Clone)]
pub(crate) struct Transmitter {
    write: Arc<Mutex<WriteHalf<BoxStream>>>,
    traffic: Arc<Traffic>,
}

impl Transmitter {
    pub(crate) async fn send(&self, message: &Message) -> Result<(), ReplicationError> {
        self.write(message.kind, message.flags, message.tag, [&message.payload, &[]]).await
    }

    pub(crate) async fn send_frame(
        &self,
        flags: u8,
        number: u64,
        frame: &FrameParts,
    ) -> Result<(), ReplicationError> {
        self.write(Kind::Frame, flags, number, [&frame.head, &frame.blocks]).await
    }

    /// Writes a message whose payload lies in two places.
    async fn write(
        &self,
        kind: Kind,
        flags: u8,
        tag: u64,
        payload: [&[u8]; 2],
    ) -> Result<(), ReplicationError> {
        let length = payload[0].len() + payload[1].len();
        if length > kind.limit() as usize {
            return Err(ReplicationError::Protocol("message too long to send"));
        }
        let header = Header {
            magic: MAGIC,
            kind: kind as u8,
            flags,
            reserved: [0; 2],
            tag: U64::new(tag),
            length: U32::new(length as u32),
        };
        let mut write = self.write.lock().await;
        // All in one write: with TLS each write is a record and a system call.
        let mut parts = Buf::chain(Buf::chain(header.as_bytes(), payload[0]), payload[1]);
        let written = async {
            write.write_all_buf(&mut parts).await?;
            write.flush().await
        };
        let stalled = |_| std::io::Error::from(std::io::ErrorKind::TimedOut);
        tokio::time::timeout(STALL_MAX, written).await.map_err(stalled)??;
        self.traffic.sent.fetch_add((HEADER_BYTES + length) as u64, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) async fn refuse(&self, kind: RefusalKind, message: String) -> Result<(), ReplicationError> {
        self.send(&Message::control(Kind::Refusal, 0, &Refusal { kind, message })?).await
    }

    /// Says that we are alive until dropped or broken.
    pub(crate) async fn ping_forever(&self) -> ReplicationError {
        loop {
            tokio::time::sleep(PING_EVERY).await;
            if let Err(error) = self.send(&Message::new(Kind::Ping, 0, Bytes::new())).await {
                return error;
            }
        }
    }
}
