//! Reading what the server answers, and giving it to whoever waits for it.

use std::io;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncReadExt as _;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::Shared;
use crate::endpoint::Source;
use crate::error::NbdError;
use crate::wire::{
    CHUNK_BLOCK_STATUS, CHUNK_DONE, CHUNK_ERROR_BIT, CHUNK_NONE, CHUNK_OFFSET_DATA, CHUNK_OFFSET_HOLE,
    OPTION_BYTES_MAX, SIMPLE_REPLY_MAGIC, STATUS_BYTES_MAX, STRUCTURED_REPLY_MAGIC,
};

/// The answer to a request.
#[derive(Debug)]
pub(crate) enum Reply {
    Done,
    Data(Bytes),
    /// Per context its number and its descriptors (length, flags).
    Status(Vec<(u32, Vec<(u32, u32)>)>),
}

/// What a request waits for, and what has come of it.
pub(crate) enum Wanted {
    Nothing,
    /// The buffer has room for all and grows as answers come; it is not cleared first, as mostly they come in order.
    Data {
        buffer: BytesMut,
        received: u64,
    },
    Status(Vec<(u32, Vec<(u32, u32)>)>),
}

impl Wanted {
    pub(crate) fn read(length: u64) -> Self {
        Self::Data { buffer: BytesMut::with_capacity(length as usize), received: 0 }
    }
}

/// A request in flight.
pub(crate) struct Pending {
    pub(crate) offset: u64,
    pub(crate) length: u32,
    pub(crate) wanted: Wanted,
    pub(crate) error: Option<io::Error>,
    pub(crate) sender: oneshot::Sender<Result<Reply, NbdError>>,
    pub(crate) permit: OwnedSemaphorePermit,
}

impl Pending {
    /// Answers the caller. A caller that has gone away is no error.
    fn finish(self) {
        let Self { wanted, error, sender, permit, length, .. } = self;
        drop(permit);
        let result = match (error, wanted) {
            (Some(error), _) => Err(NbdError::Remote(error)),
            (None, Wanted::Nothing) => Ok(Reply::Done),
            (None, Wanted::Status(contexts)) => Ok(Reply::Status(contexts)),
            (None, Wanted::Data { buffer, received })
                if received == u64::from(length) && buffer.len() == length as usize =>
            {
                Ok(Reply::Data(buffer.freeze()))
            }
            (None, Wanted::Data { .. }) => Err(NbdError::protocol("a read was answered in part")),
        };
        let _ = sender.send(result);
    }
}

/// Reads until the connection ends, then fails what is left.
pub(crate) async fn read(mut source: Source, structured: bool, shared: Arc<Shared>) {
    loop {
        if let Err(error) = read_one(&mut source, structured, &shared).await {
            let reason = match &error {
                NbdError::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    "the server hung up".to_owned()
                }
                error => error.to_string(),
            };
            shared.close(&reason);
            return;
        }
    }
}

/// Reads a simple reply or one chunk of a structured one.
async fn read_one(source: &mut Source, structured: bool, shared: &Shared) -> Result<(), NbdError> {
    match source.read_u32().await? {
        SIMPLE_REPLY_MAGIC => {
            let error = source.read_u32().await?;
            let cookie = source.read_u64().await?;
            let mut pending = take(shared, cookie)?;
            if error != 0 {
                pending.error = Some(remote_error(error));
            } else if let Wanted::Data { buffer, received } = &mut pending.wanted {
                if structured {
                    return Err(NbdError::protocol("a read was answered with a simple reply"));
                }
                read_into(source, buffer, pending.length as usize).await?;
                *received = u64::from(pending.length);
            }
            pending.finish();
            Ok(())
        }
        STRUCTURED_REPLY_MAGIC if structured => {
            let flags = source.read_u16().await?;
            let kind = source.read_u16().await?;
            let cookie = source.read_u64().await?;
            let length = source.read_u32().await?;
            // Taken out while the chunk is read, so that no lock is held across the network.
            let mut pending = take(shared, cookie)?;
            read_chunk(source, kind, length, &mut pending).await?;
            if flags & CHUNK_DONE != 0 {
                pending.finish();
            } else {
                shared.lock().pending.insert(cookie, pending);
            }
            Ok(())
        }
        magic => Err(NbdError::protocol(format!("a reply began with {magic:#x}"))),
    }
}

fn take(shared: &Shared, cookie: u64) -> Result<Pending, NbdError> {
    let pending = shared.lock().pending.remove(&cookie);
    pending.ok_or_else(|| NbdError::protocol("an answer to a request that was never made"))
}

async fn read_chunk(
    source: &mut Source,
    kind: u16,
    length: u32,
    pending: &mut Pending,
) -> Result<(), NbdError> {
    match kind {
        CHUNK_NONE if length == 0 => Ok(()),
        CHUNK_OFFSET_DATA if length > 8 => {
            let offset = source.read_u64().await?;
            let (buffer, begin, end) = place(pending, offset, u64::from(length - 8))?;
            if begin == buffer.len() {
                return read_into(source, buffer, end - begin).await;
            }
            buffer.resize(buffer.len().max(end), 0);
            source.read_exact(&mut buffer[begin..end]).await?;
            Ok(())
        }
        CHUNK_OFFSET_HOLE if length == 12 => {
            let offset = source.read_u64().await?;
            let hole_bytes = source.read_u32().await?;
            let (buffer, begin, end) = place(pending, offset, u64::from(hole_bytes))?;
            buffer.resize(buffer.len().max(end), 0);
            buffer[begin..end].fill(0);
            Ok(())
        }
        CHUNK_BLOCK_STATUS
            if length >= 12 && (length - 4).is_multiple_of(8) && length <= STATUS_BYTES_MAX =>
        {
            let Wanted::Status(contexts) = &mut pending.wanted else {
                return Err(NbdError::protocol("a block status that nobody asked for"));
            };
            let id = source.read_u32().await?;
            let mut bytes = vec![0; length as usize - 4];
            source.read_exact(&mut bytes).await?;
            let (pairs, _) = bytes.as_chunks::<8>();
            let descriptor = |pair: &[u8; 8]| {
                let number = u64::from_be_bytes(*pair);
                ((number >> 32) as u32, number as u32)
            };
            contexts.push((id, pairs.iter().map(descriptor).collect()));
            Ok(())
        }
        kind if kind & CHUNK_ERROR_BIT != 0 && (6..=OPTION_BYTES_MAX).contains(&length) => {
            let error = source.read_u32().await?;
            // The message and the offset add nothing to what the caller knows.
            let mut rest = vec![0; length as usize - 4];
            source.read_exact(&mut rest).await?;
            pending.error.get_or_insert(remote_error(error));
            Ok(())
        }
        kind => Err(NbdError::protocol(format!("a chunk of kind {kind:#x} with {length} bytes"))),
    }
}

/// Appends exactly so many bytes to a buffer that has room for them.
async fn read_into(source: &mut Source, buffer: &mut BytesMut, length: usize) -> Result<(), NbdError> {
    let mut source = source.take(length as u64);
    while source.limit() > 0 {
        if source.read_buf(buffer).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
    }
    Ok(())
}

/// The buffer, and where in it a chunk belongs.
fn place(pending: &mut Pending, offset: u64, length: u64) -> Result<(&mut BytesMut, usize, usize), NbdError> {
    let wrong = || NbdError::protocol("data outside of what was asked for");
    let Wanted::Data { buffer, received } = &mut pending.wanted else { return Err(wrong()) };
    let begin = offset.checked_sub(pending.offset).ok_or_else(wrong)?;
    let end = begin.checked_add(length).filter(|end| *end <= u64::from(pending.length)).ok_or_else(wrong)?;
    *received += length;
    Ok((buffer, begin as usize, end as usize))
}

/// The protocol's error numbers are Linux's.
fn remote_error(error: u32) -> io::Error {
    io::Error::from_raw_os_error(i32::try_from(error).unwrap_or(5))
}
