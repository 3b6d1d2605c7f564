//! The client: one connection to one export, any number of requests at once.

pub(crate) mod handshake;
mod replies;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::future::try_join_all;
use mainstay_block::{BlockDevice, BlockError, Extent, ExtentKind, check_range};
use tokio::io::{AsyncWriteExt as _, BufWriter};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::endpoint::{Endpoint, Sink, Source};
use crate::error::NbdError;
use crate::wire::{
    CMD_BLOCK_STATUS, CMD_DISC, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, Request,
    STATE_ZERO, TRANSMISSION_READ_ONLY, TRANSMISSION_SEND_FLUSH, TRANSMISSION_SEND_TRIM,
    TRANSMISSION_SEND_WRITE_ZEROES,
};
use handshake::Agreed;
pub use handshake::list_exports;
use replies::{Pending, Reply, Wanted};

/// The context that every server with block status has: holes and zeros.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Requests in flight on one connection. More do not make QEMU faster (it works on 16 at once).
const IN_FLIGHT_MAX: usize = 64;
/// Larger requests are cut into pieces of this size, which then run at once.
const PIECE_BYTES: u64 = 4 * 1024 * 1024;
/// A block status or zero request without payload may be larger; a server may take its time for it.
const RANGE_BYTES: u64 = 1024 * 1024 * 1024;

/// What to ask of a server.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// The name of the export.
    pub export: String,
    /// Contexts for [`Client::block_status`]; those that the server does not have are left out.
    pub contexts: Vec<String>,
    /// How long connecting and the handshake may take together.
    pub connect_timeout: Duration,
}

impl ClientOptions {
    /// Asks for an export with its allocation map.
    pub fn new(export: impl Into<String>) -> Self {
        Self {
            export: export.into(),
            contexts: vec![BASE_ALLOCATION.to_owned()],
            connect_timeout: Duration::from_secs(10),
        }
    }

    /// Asks for one more context, such as `qemu:dirty-bitmap:NAME` or `qemu:allocation-depth`.
    #[must_use]
    pub fn with_context(mut self, context: impl Into<String>) -> Self {
        self.contexts.push(context.into());
        self
    }
}

/// A run of bytes to which a context gives one meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// The context's flags: 1 is "dirty" for a QEMU bitmap, the depth for `qemu:allocation-depth`.
    pub flags: u32,
}

/// A connection to an export. Dropping it disconnects.
pub struct Client {
    agreed: Agreed,
    shared: Arc<Shared>,
    outgoing: mpsc::Sender<(Request, Bytes)>,
    permits: Arc<Semaphore>,
}

/// Requests that wait for their answers, and why there will be no more of them.
#[derive(Default)]
struct Waiting {
    pending: HashMap<u64, Pending>,
    next_cookie: u64,
    closed: Option<String>,
}

#[derive(Default)]
struct Shared {
    waiting: Mutex<Waiting>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails everything that waits; the connection is of no more use.
    fn close(&self, reason: &str) {
        let mut waiting = self.lock();
        waiting.closed.get_or_insert_with(|| reason.to_owned());
        // Dropping the senders tells the callers.
        waiting.pending.clear();
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Client").field("size", &self.agreed.size).finish_non_exhaustive()
    }
}

impl Client {
    /// Connects and negotiates.
    pub async fn connect(endpoint: &Endpoint, options: &ClientOptions) -> Result<Self, NbdError> {
        let negotiate = async {
            let (mut source, mut sink) = endpoint.connect().await?;
            let agreed = handshake::negotiate(&mut source, &mut sink, options).await?;
            Ok(Self::start(agreed, source, sink))
        };
        tokio::time::timeout(options.connect_timeout, negotiate)
            .await
            .map_err(|_elapsed| NbdError::Timeout(endpoint.to_string()))?
    }

    pub(crate) fn start(agreed: Agreed, source: Source, sink: Sink) -> Self {
        let shared = Arc::new(Shared::default());
        let (outgoing, queue) = mpsc::channel(IN_FLIGHT_MAX);
        tokio::spawn(write_requests(sink, queue, Arc::clone(&shared)));
        tokio::spawn(replies::read(source, agreed.structured, Arc::clone(&shared)));
        Self { agreed, shared, outgoing, permits: Arc::new(Semaphore::new(IN_FLIGHT_MAX)) }
    }

    /// Whether the server allows no writes.
    pub fn is_read_only(&self) -> bool {
        self.agreed.flags & TRANSMISSION_READ_ONLY != 0
    }

    /// Whether the server gave us a context.
    pub fn has_context(&self, context: &str) -> bool {
        self.agreed.contexts.iter().any(|(name, _)| name == context)
    }

    /// What a context says about a range: sorted, adjoining extents that cover it exactly.
    pub async fn block_status(
        &self,
        context: &str,
        offset: u64,
        length: u64,
    ) -> Result<Vec<StatusExtent>, NbdError> {
        let known = self.agreed.contexts.iter().find(|(name, _)| name == context);
        let id = known.ok_or_else(|| NbdError::NoContext(context.to_owned()))?.1;
        let end = offset.checked_add(length).filter(|end| *end <= self.agreed.size);
        let end = end.ok_or_else(|| NbdError::protocol("the range lies outside the export"))?;
        let mut extents: Vec<StatusExtent> = Vec::new();
        let mut at = offset;
        while at < end {
            let wanted = (end - at).min(RANGE_BYTES);
            let reply =
                self.request(CMD_BLOCK_STATUS, at, wanted, Bytes::new(), Wanted::Status(Vec::new())).await?;
            let Reply::Status(contexts) = reply else { return Err(NbdError::protocol("not a block status")) };
            let descriptors = contexts.into_iter().find(|(found, _)| *found == id);
            let descriptors = descriptors.ok_or_else(|| NbdError::protocol("the context is missing"))?.1;
            let begin = at;
            for (length, flags) in descriptors {
                // The last one may reach beyond what was asked for.
                let length = u64::from(length).min(end - at);
                match extents.last_mut() {
                    Some(last) if last.flags == flags => last.length += length,
                    _ if length > 0 => extents.push(StatusExtent { offset: at, length, flags }),
                    _ => {}
                }
                at += length;
            }
            if at == begin {
                return Err(NbdError::protocol("a block status that describes nothing"));
            }
        }
        Ok(extents)
    }

    /// Tells the server that a range is not needed any more; it may then read as anything.
    pub async fn trim(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.check_write(offset, length)?;
        if self.agreed.flags & TRANSMISSION_SEND_TRIM == 0 {
            return Ok(());
        }
        for (at, piece) in pieces(offset, length, RANGE_BYTES) {
            self.request(CMD_TRIM, at, piece, Bytes::new(), Wanted::Nothing).await?;
        }
        Ok(())
    }

    fn check_write(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        check_range(offset, length, self.agreed.size)?;
        if self.is_read_only() { Err(BlockError::ReadOnly) } else { Ok(()) }
    }

    /// Sends a request and waits for its answer. When the future is dropped the request goes on, and its
    /// place among those in flight stays taken until the server has answered.
    async fn request(
        &self,
        command: u16,
        offset: u64,
        length: u64,
        payload: Bytes,
        wanted: Wanted,
    ) -> Result<Reply, NbdError> {
        let gone =
            || NbdError::Closed(self.shared.lock().closed.clone().unwrap_or_else(|| "hung up".to_owned()));
        let permit = Arc::clone(&self.permits).acquire_owned().await.map_err(|_closed| gone())?;
        let length =
            u32::try_from(length).map_err(|_too_large| NbdError::protocol("the request is too large"))?;
        // The place in the queue comes first: from here to the queue nothing can be interrupted.
        let place = self.outgoing.reserve().await.map_err(|_closed| gone())?;
        let (sender, answer) = oneshot::channel();
        let cookie = {
            let mut waiting = self.shared.lock();
            if let Some(reason) = &waiting.closed {
                return Err(NbdError::Closed(reason.clone()));
            }
            waiting.next_cookie += 1;
            let cookie = waiting.next_cookie;
            waiting.pending.insert(cookie, Pending { offset, length, wanted, error: None, sender, permit });
            cookie
        };
        place.send((Request { flags: 0, command, cookie, offset, length }, payload));
        answer.await.map_err(|_dropped| gone())?
    }
}

async fn write_requests(sink: Sink, mut queue: mpsc::Receiver<(Request, Bytes)>, shared: Arc<Shared>) {
    let mut sink = BufWriter::new(sink);
    let result = async {
        while let Some((request, payload)) = queue.recv().await {
            sink.write_all(&request.encode()).await?;
            sink.write_all(&payload).await?;
            if queue.is_empty() {
                sink.flush().await?;
            }
        }
        let goodbye = Request { flags: 0, command: CMD_DISC, cookie: 0, offset: 0, length: 0 };
        sink.write_all(&goodbye.encode()).await?;
        sink.flush().await?;
        sink.shutdown().await
    };
    if let Err(error) = result.await {
        shared.close(&error.to_string());
    }
}

/// Cuts a range into pieces of at most `piece_bytes`.
fn pieces(offset: u64, length: u64, piece_bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    let count = length.div_ceil(piece_bytes);
    (0..count).map(move |index| {
        let begin = index * piece_bytes;
        (offset + begin, piece_bytes.min(length - begin))
    })
}

#[async_trait]
impl BlockDevice for Client {
    fn size(&self) -> u64 {
        self.agreed.size
    }

    async fn read(&self, offset: u64, length: u64) -> Result<Bytes, BlockError> {
        check_range(offset, length, self.agreed.size)?;
        let read = |(at, piece)| async move {
            match self.request(CMD_READ, at, piece, Bytes::new(), Wanted::read(piece)).await? {
                Reply::Data(data) => Ok(data),
                Reply::Done | Reply::Status(_) => Err(NbdError::protocol("a read was answered without data")),
            }
        };
        if length <= PIECE_BYTES {
            return if length == 0 { Ok(Bytes::new()) } else { Ok(read((offset, length)).await?) };
        }
        let mut whole = BytesMut::with_capacity(length as usize);
        for data in try_join_all(pieces(offset, length, PIECE_BYTES).map(read)).await? {
            whole.extend_from_slice(&data);
        }
        Ok(whole.freeze())
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), BlockError> {
        self.check_write(offset, data.len() as u64)?;
        let write = |(at, piece): (u64, u64)| {
            let begin = (at - offset) as usize;
            let payload = data.slice(begin..begin + piece as usize);
            self.request(CMD_WRITE, at, piece, payload, Wanted::Nothing)
        };
        try_join_all(pieces(offset, data.len() as u64, PIECE_BYTES).map(write)).await?;
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.check_write(offset, length)?;
        if self.agreed.flags & TRANSMISSION_SEND_WRITE_ZEROES == 0 {
            for (at, piece) in pieces(offset, length, PIECE_BYTES) {
                self.write(at, BytesMut::zeroed(piece as usize).freeze()).await?;
            }
            return Ok(());
        }
        for (at, piece) in pieces(offset, length, RANGE_BYTES) {
            self.request(CMD_WRITE_ZEROES, at, piece, Bytes::new(), Wanted::Nothing).await?;
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), BlockError> {
        if self.agreed.flags & TRANSMISSION_SEND_FLUSH != 0 {
            self.request(CMD_FLUSH, 0, 0, Bytes::new(), Wanted::Nothing).await?;
        }
        Ok(())
    }

    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>, BlockError> {
        check_range(offset, length, self.agreed.size)?;
        if length == 0 {
            return Ok(Vec::new());
        }
        if !self.has_context(BASE_ALLOCATION) {
            return Ok(vec![Extent { offset, length, kind: ExtentKind::Data }]);
        }
        let mut extents: Vec<Extent> = Vec::new();
        for status in self.block_status(BASE_ALLOCATION, offset, length).await? {
            let kind = if status.flags & STATE_ZERO != 0 { ExtentKind::Zero } else { ExtentKind::Data };
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.length += status.length,
                _ => extents.push(Extent { offset: status.offset, length: status.length, kind }),
            }
        }
        Ok(extents)
    }
}
