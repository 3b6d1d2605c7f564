//! The server's side of every session.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _, stream};
use mainstay_block::{BlockDevice as _, ExtentKind, HashKey, is_zero};
use mainstay_store::{FrameUse, PointMeta, PointReader, Received, Session, SessionSpec, Store, StoreError};
use uuid::Uuid;

use crate::connect::BoxStream;
use crate::message::{CommitRequest, ExtentList, Hello, Purpose, Query, Refusal, Welcome};
use crate::wire::{
    ANSWER_BYTES_MAX, FLAG_RESENT, FLAG_ZERO, Incoming, Kind, Message, Receiver, SILENCE_MAX, Traffic,
    Transmitter, VERSION, split,
};
use crate::{RefusalKind, ReplicationError, serve_fetch};

/// Queries of one mount answered at the same time: enough to cover 150 ms at 256 KiB each on 1 Gbit/s.
const QUERIES_IN_FLIGHT: usize = 96;
/// Most extents in one answer; the client asks for the rest.
const EXTENTS_MAX: usize = 32_768;
/// A refusal that the peer does not take within this time is dropped with the connection.
const REFUSAL_TIME: Duration = Duration::from_secs(5);
/// The answer is a refusal of this query only.
pub(crate) const FLAG_REFUSED: u8 = 2;

/// What a peer wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionKind {
    /// Make a recovery point.
    Replicate {
        /// In this generation of the item. It is the peer's word: who counts must compare it with what he knows.
        generation: u64,
    },
    /// Read a recovery point.
    Mount,
    /// Receive differences.
    Fetch,
    /// Ask what became of a session.
    Outcome,
}

/// What a peer asks to be allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The replica.
    pub replica: Uuid,
    /// To do what with it.
    pub kind: SessionKind,
}

/// Decides whether a peer, which the caller has authenticated, may do what it asks for, or why not.
pub type Authorize<'a> = dyn Fn(Access) -> BoxFuture<'a, Result<(), RefusalKind>> + Send + Sync + 'a;

/// A connection that ended well.
#[derive(Clone, Debug)]
pub struct ServeReport {
    /// What it was for.
    pub access: Access,
    /// The recovery point it made.
    pub committed: Option<Uuid>,
    /// What went over it.
    pub traffic: Arc<Traffic>,
}

/// Serves one connection to its end. Sessions survive the end of their connection; memory per connection is bounded.
///
/// # Errors
/// Why the connection ended early; the peer has been told if it could be reached.
pub async fn serve_connection(
    stream: BoxStream,
    store: &Store,
    authorize: &Authorize<'_>,
) -> Result<ServeReport, ReplicationError> {
    let traffic = Arc::new(Traffic::default());
    let (receiver, transmitter) = split(stream, &traffic);
    match serve(receiver, &transmitter, store, authorize).boxed().await {
        Ok((access, committed)) => Ok(ServeReport { access, committed, traffic }),
        Err(error) => {
            if !matches!(error, ReplicationError::Connection(_)) {
                let (kind, message) = error.refusal();
                let told = tokio::time::timeout(REFUSAL_TIME, transmitter.refuse(kind, message)).await;
                if !matches!(told, Ok(Ok(()))) {
                    tracing::debug!("the peer could not be told why its connection ends");
                }
            }
            Err(error)
        }
    }
}

async fn serve(
    mut receiver: Receiver,
    transmitter: &Transmitter,
    store: &Store,
    authorize: &Authorize<'_>,
) -> Result<(Access, Option<Uuid>), ReplicationError> {
    // In all: pings would put off the end of each message for ever.
    let hello = tokio::time::timeout(SILENCE_MAX, receiver.expect(Kind::Hello)).await;
    let hello: Hello = hello.map_err(|_| ReplicationError::Protocol("no hello"))??.body()?;
    let refused = |kind, message: &str| ReplicationError::Refused { kind, message: message.to_owned() };
    if hello.version_min > VERSION || hello.version_max < VERSION {
        return Err(refused(RefusalKind::Version, "this server speaks version 1"));
    }
    let kind = match &hello.purpose {
        Purpose::Replicate { generation, .. } => SessionKind::Replicate { generation: *generation },
        Purpose::Mount { .. } => SessionKind::Mount,
        Purpose::Fetch(_) => SessionKind::Fetch,
        Purpose::Outcome { .. } => SessionKind::Outcome,
    };
    let replica = hello.replica;
    let access = Access { replica, kind };
    if let Err(kind) = authorize(access).await {
        return Err(refused(kind, "not allowed for this replica"));
    }
    let committed = match hello.purpose {
        Purpose::Replicate { session, generation, parent, disks, fork } => {
            let spec = SessionSpec { session, replica, generation, parent, disks, fork };
            replicate(receiver, transmitter, store, spec).boxed().await?
        }
        Purpose::Mount { point } => {
            let reader = store.open_point(replica, point).await?;
            mount(receiver, transmitter, &reader).boxed().await?;
            None
        }
        Purpose::Fetch(request) => {
            tokio::select! {
                done = serve_fetch::serve(receiver, transmitter, store, replica, request).boxed() => done?,
                error = transmitter.ping_forever() => return Err(error),
            }
            None
        }
        Purpose::Outcome { session } => {
            let point = match store.committed(replica, session).await {
                Err(StoreError::NoReplica(_) | StoreError::Deleted(_)) => None,
                found => found?,
            };
            let answer = point.map_or(Welcome::NotCommitted, |point| Welcome::Committed { point });
            transmitter.send(&Message::control(Kind::Welcome, 0, &answer)?).await?;
            None
        }
    };
    Ok((access, committed))
}

async fn replicate(
    receiver: Receiver,
    transmitter: &Transmitter,
    store: &Store,
    spec: SessionSpec,
) -> Result<Option<Uuid>, ReplicationError> {
    let session = match store.begin(spec).await {
        Err(StoreError::Committed(point)) => {
            let answer = Message::control(Kind::Welcome, 0, &Welcome::Committed { point })?;
            transmitter.send(&answer).await?;
            return Ok(Some(point));
        }
        begun => begun?,
    };
    let durable = session.durable();
    let welcome = Welcome::Session { version: VERSION, received: session.received(), durable };
    transmitter.send(&Message::control(Kind::Welcome, 0, &welcome)?).await?;
    let done = tokio::select! {
        done = take_frames(receiver, transmitter, &session) => done,
        error = acknowledge(transmitter, &session, durable) => Err(error),
        error = transmitter.ping_forever() => Err(error),
    };
    match &done {
        // A refused session is over; one whose connection broke goes on, as does one that may be asked again.
        Err(error) if !error.is_transient() && error.refusal().0 != RefusalKind::Unavailable => {
            session.abort();
        }
        _ => {}
    }
    done
}

async fn take_frames(
    mut receiver: Receiver,
    transmitter: &Transmitter,
    session: &Session,
) -> Result<Option<Uuid>, ReplicationError> {
    loop {
        let used = |flags| if flags & FLAG_RESENT != 0 { FrameUse::Resent } else { FrameUse::Changed };
        let message = match receiver.receive_into(|bytes| session.room(bytes)).await? {
            Incoming::Frame { flags, number, frame, rest } => {
                session.append(number, Received::InPlace { frame, rest }, used(flags)).await?;
                continue;
            }
            Incoming::Message(message) => message,
        };
        match message.kind {
            Kind::Frame => session.append(message.tag, message.payload, used(message.flags)).await?,
            Kind::Flush => session.flush().await?,
            Kind::Commit => {
                let request: CommitRequest = message.body()?;
                if request.frames != session.received() {
                    return Err(ReplicationError::Protocol("commit of another number of frames"));
                }
                let meta = PointMeta {
                    time_ms: request.time_ms,
                    consistency: request.consistency,
                    definition: request.definition.map(Bytes::from),
                };
                let point = session.commit(meta).await?;
                transmitter.send(&Message::control(Kind::Committed, 0, &point)?).await?;
                return Ok(Some(point));
            }
            _ => return Err(ReplicationError::Protocol("unexpected message")),
        }
    }
}

async fn acknowledge(transmitter: &Transmitter, session: &Session, mut durable: u64) -> ReplicationError {
    loop {
        durable = match session.wait_durable(durable + 1).await {
            Ok(durable) => durable,
            Err(error) => return error.into(),
        };
        if let Err(error) = transmitter.send(&Message::new(Kind::Ack, durable, Bytes::new())).await {
            return error;
        }
    }
}

async fn mount(
    receiver: Receiver,
    transmitter: &Transmitter,
    reader: &PointReader,
) -> Result<(), ReplicationError> {
    let welcome = Welcome::Point { version: VERSION, disks: reader.info().disks.clone(), bytes: 0 };
    transmitter.send(&Message::control(Kind::Welcome, 0, &welcome)?).await?;
    let incoming = stream::unfold(receiver, |mut receiver| async move {
        let message = receiver.receive().await;
        Some((message, receiver))
    });
    let mut incoming = Box::pin(incoming);
    let mut answers = FuturesUnordered::new();
    let mut ping = Box::pin(transmitter.ping_forever());
    loop {
        tokio::select! {
            message = incoming.next(), if answers.len() < QUERIES_IN_FLIGHT => {
                let message = message.ok_or(ReplicationError::Protocol("stream ended"))??;
                match message.kind {
                    Kind::Done => return Ok(()),
                    Kind::Query => {
                        let query: Query = message.body()?;
                        answers.push(answer(transmitter, reader, message.tag, query).boxed());
                    }
                    _ => return Err(ReplicationError::Protocol("unexpected message")),
                }
            }
            Some(sent) = answers.next() => sent?,
            error = &mut ping => return Err(error),
        }
    }
}

/// Answers one query; a refusal concerns only this query.
async fn answer(
    transmitter: &Transmitter,
    reader: &PointReader,
    tag: u64,
    query: Query,
) -> Result<(), ReplicationError> {
    let message = match answer_query(reader, query).await {
        Ok(payload) if matches!(query, Query::Read { .. }) && is_zero(&payload) => {
            Message { flags: FLAG_ZERO, ..Message::new(Kind::Answer, tag, Bytes::new()) }
        }
        Ok(payload) => Message::new(Kind::Answer, tag, payload),
        Err(error) => {
            let (kind, message) = error.refusal();
            let refusal = Message::control(Kind::Answer, tag, &Refusal { kind, message })?;
            Message { flags: FLAG_REFUSED, ..refusal }
        }
    };
    transmitter.send(&message).await
}

async fn answer_query(reader: &PointReader, query: Query) -> Result<Bytes, ReplicationError> {
    let invalid = |what: &'static str| ReplicationError::from(StoreError::Invalid(what));
    match query {
        Query::Read { disk, offset, length } => {
            if length > ANSWER_BYTES_MAX {
                return Err(invalid("read too long"));
            }
            Ok(reader.disk(disk)?.read_range(offset, u64::from(length)).await?)
        }
        Query::Extents { disk, offset, length } => {
            let extents = reader.disk(disk)?.extents(offset, length).await;
            let extents = extents.map_err(|_| invalid("extents outside the disk, or unreadable"))?;
            let listed = extents.iter().take(EXTENTS_MAX);
            let list = listed.map(|extent| (extent.length, extent.kind == ExtentKind::Data)).collect();
            let bytes = postcard::to_stdvec(&ExtentList(list));
            Ok(bytes.map_err(|_| invalid("unencodable"))?.into())
        }
        Query::Hashes { disk, key, first, count } => {
            if count > ANSWER_BYTES_MAX / 8 {
                return Err(invalid("too many hashes"));
            }
            let hashes = reader.disk(disk)?.block_hashes(HashKey(key), first, u64::from(count)).await?;
            Ok(hashes.iter().flat_map(|hash| hash.0.to_le_bytes()).collect::<Vec<u8>>().into())
        }
    }
}
