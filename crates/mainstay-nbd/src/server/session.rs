//! Serving requests on one connection, many at once.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use mainstay_block::{BlockDevice, BlockError, ExtentKind};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufWriter};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use super::handshake::{ALLOCATION_ID, Agreed};
use crate::endpoint::{Sink, Source};
use crate::error::NbdError;
use crate::wire::{
    CHUNK_BLOCK_STATUS, CHUNK_DONE, CHUNK_ERROR, CHUNK_NONE, CHUNK_OFFSET_DATA, CHUNK_OFFSET_HOLE,
    CMD_BLOCK_STATUS, CMD_DISC, CMD_FLAG_FUA, CMD_FLAG_REQ_ONE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE,
    CMD_WRITE_ZEROES, PAYLOAD_BYTES_MAX, Request, SIMPLE_REPLY_MAGIC, STATE_HOLE, STATE_ZERO, encode_chunk,
};

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

/// Requests at once on one connection.
const REQUESTS_MAX: usize = 64;
/// Payload held in memory for one connection: two of the largest requests, hundreds of ordinary ones.
const PAYLOAD_BUDGET_BYTES: usize = 2 * PAYLOAD_BYTES_MAX as usize;
/// Extents in one block status; a client asks again for the rest.
const DESCRIPTORS_MAX: usize = 16 * 1024;

/// An answer on its way out: its head, its payload, and the budget that both use up.
struct Answer {
    head: Vec<u8>,
    payload: Bytes,
    _budget: Option<OwnedSemaphorePermit>,
}

/// Serves until the client says goodbye or breaks the protocol.
pub(crate) async fn serve(mut source: Source, sink: Sink, agreed: Agreed) -> Result<(), NbdError> {
    let (answers, queue) = mpsc::channel(REQUESTS_MAX);
    // Everything that belongs to the connection ends with this set.
    let mut tasks = JoinSet::new();
    tasks.spawn(write_answers(sink, queue));
    let result = read_requests(&mut source, Arc::new(agreed), &answers, &mut tasks).await;
    // Requests that were read are carried out and answered, also when the client hung up after them.
    drop(answers);
    while tasks.join_next().await.is_some() {}
    result
}

async fn read_requests(
    source: &mut Source,
    agreed: Arc<Agreed>,
    answers: &mpsc::Sender<Answer>,
    tasks: &mut JoinSet<()>,
) -> Result<(), NbdError> {
    let requests = Arc::new(Semaphore::new(REQUESTS_MAX));
    let budget = Arc::new(Semaphore::new(PAYLOAD_BUDGET_BYTES));
    while let Some(request) = Request::read(source).await? {
        if request.command == CMD_DISC {
            return Ok(());
        }
        let carries_payload = matches!(request.command, CMD_READ | CMD_WRITE);
        if carries_payload && request.length > PAYLOAD_BYTES_MAX && request.command == CMD_WRITE {
            return Err(NbdError::protocol(format!("a write of {} bytes", request.length)));
        }
        let budget = if carries_payload && request.length <= PAYLOAD_BYTES_MAX {
            Arc::clone(&budget).acquire_many_owned(request.length).await.ok()
        } else {
            None
        };
        let payload = if request.command == CMD_WRITE {
            let mut payload = BytesMut::zeroed(request.length as usize);
            source.read_exact(&mut payload).await?;
            payload.freeze()
        } else {
            Bytes::new()
        };
        let Ok(permit) = Arc::clone(&requests).acquire_owned().await else { return Ok(()) };
        let (agreed, answers) = (Arc::clone(&agreed), answers.clone());
        tasks.spawn(async move {
            let result = carry_out(&agreed, &request, payload).await;
            let answer = encode(&agreed, &request, result, budget);
            // When the writer is gone, so is the client.
            let _ = answers.send(answer).await;
            drop(permit);
        });
        // Finished tasks are collected as we go, or their results would pile up.
        while tasks.try_join_next().is_some() {}
    }
    Ok(())
}

enum Outcome {
    Done,
    Data(Bytes),
    Status(Vec<(u32, u32)>),
}

async fn carry_out(agreed: &Agreed, request: &Request, payload: Bytes) -> Result<Outcome, u32> {
    let device = agreed.export.device.as_ref();
    let (offset, length) = (request.offset, u64::from(request.length));
    let writes = matches!(request.command, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES);
    if writes && agreed.export.read_only {
        return Err(EPERM);
    }
    let result = match request.command {
        CMD_READ if request.length > PAYLOAD_BYTES_MAX => return Err(EINVAL),
        CMD_READ => {
            return device.read(offset, length).await.map(Outcome::Data).map_err(|e| errno(&e, false));
        }
        CMD_BLOCK_STATUS if agreed.allocation && length > 0 => {
            return block_status(device, request).await.map_err(|error| errno(&error, false));
        }
        CMD_WRITE => device.write(offset, payload).await,
        // A trimmed range may read as anything, zeros included, and our devices give space back for zeros.
        CMD_TRIM | CMD_WRITE_ZEROES => device.write_zeroes(offset, length).await,
        CMD_FLUSH => device.flush().await,
        _ => return Err(EINVAL),
    };
    result.map_err(|error| errno(&error, writes))?;
    if writes && request.flags & CMD_FLAG_FUA != 0 {
        device.flush().await.map_err(|error| errno(&error, true))?;
    }
    Ok(Outcome::Done)
}

async fn block_status(device: &dyn BlockDevice, request: &Request) -> Result<Outcome, BlockError> {
    let extents = device.extents(request.offset, u64::from(request.length)).await?;
    let most = if request.flags & CMD_FLAG_REQ_ONE != 0 { 1 } else { DESCRIPTORS_MAX };
    let descriptor = |extent: &mainstay_block::Extent| {
        let flags = if extent.kind == ExtentKind::Zero { STATE_HOLE | STATE_ZERO } else { 0 };
        // The range asked for has 32 bits, and so has every part of it.
        (u32::try_from(extent.length).unwrap_or(request.length), flags)
    };
    Ok(Outcome::Status(extents.iter().take(most).map(descriptor).collect()))
}

fn errno(error: &BlockError, writing: bool) -> u32 {
    match error {
        BlockError::OutOfRange { .. } if writing => ENOSPC,
        BlockError::OutOfRange { .. } => EINVAL,
        BlockError::ReadOnly => EPERM,
        BlockError::Io(error) if error.kind() == std::io::ErrorKind::StorageFull => ENOSPC,
        BlockError::Io(error) => {
            tracing::warn!(%error, "a device behind an NBD export failed");
            EIO
        }
    }
}

fn encode(
    agreed: &Agreed,
    request: &Request,
    result: Result<Outcome, u32>,
    budget: Option<OwnedSemaphorePermit>,
) -> Answer {
    let mut payload = Bytes::new();
    let head = if agreed.structured {
        let done = |kind, length| encode_chunk(CHUNK_DONE, kind, request.cookie, length).to_vec();
        match result {
            Ok(Outcome::Data(data)) if data.is_empty() => done(CHUNK_NONE, 0),
            Ok(Outcome::Data(data)) if data.iter().all(|byte| *byte == 0) => {
                let mut head = done(CHUNK_OFFSET_HOLE, 12);
                head.extend_from_slice(&request.offset.to_be_bytes());
                head.extend_from_slice(&(data.len() as u32).to_be_bytes());
                head
            }
            Ok(Outcome::Data(data)) => {
                let mut head = done(CHUNK_OFFSET_DATA, data.len() as u32 + 8);
                head.extend_from_slice(&request.offset.to_be_bytes());
                payload = data;
                head
            }
            Ok(Outcome::Status(descriptors)) => {
                let mut head = done(CHUNK_BLOCK_STATUS, 4 + 8 * descriptors.len() as u32);
                head.extend_from_slice(&ALLOCATION_ID.to_be_bytes());
                for (length, flags) in descriptors {
                    head.extend_from_slice(&length.to_be_bytes());
                    head.extend_from_slice(&flags.to_be_bytes());
                }
                head
            }
            Ok(Outcome::Done) => done(CHUNK_NONE, 0),
            Err(error) => {
                let mut head = done(CHUNK_ERROR, 6);
                head.extend_from_slice(&error.to_be_bytes());
                head.extend_from_slice(&0_u16.to_be_bytes());
                head
            }
        }
    } else {
        let error = result.as_ref().err().copied().unwrap_or(0);
        let mut head = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        head.extend_from_slice(&error.to_be_bytes());
        head.extend_from_slice(&request.cookie.to_be_bytes());
        if let Ok(Outcome::Data(data)) = result {
            payload = data;
        }
        head
    };
    Answer { head, payload, _budget: budget }
}

/// Writes answers in the order in which they are ready; small ones share a system call.
async fn write_answers(sink: Sink, mut queue: mpsc::Receiver<Answer>) {
    let mut sink = BufWriter::with_capacity(64 * 1024, sink);
    while let Some(answer) = queue.recv().await {
        let written = async {
            sink.write_all(&answer.head).await?;
            sink.write_all(&answer.payload).await?;
            if queue.is_empty() { sink.flush().await } else { Ok(()) }
        };
        if written.await.is_err() {
            return;
        }
    }
}
