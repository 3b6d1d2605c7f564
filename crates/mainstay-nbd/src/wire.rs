//! Numbers and layouts of the protocol, and the limits we set on them. All integers are big endian.
//!
//! Names follow the protocol's own document (`doc/proto.md` of the NBD project) without the `NBD_` prefix.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::error::NbdError;

pub(crate) const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
pub(crate) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(crate) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(crate) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

pub(crate) const FLAG_FIXED_NEWSTYLE: u16 = 1;
pub(crate) const FLAG_NO_ZEROES: u16 = 2;

pub(crate) const OPT_EXPORT_NAME: u32 = 1;
pub(crate) const OPT_ABORT: u32 = 2;
pub(crate) const OPT_LIST: u32 = 3;
pub(crate) const OPT_INFO: u32 = 6;
pub(crate) const OPT_GO: u32 = 7;
pub(crate) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(crate) const OPT_LIST_META_CONTEXT: u32 = 9;
pub(crate) const OPT_SET_META_CONTEXT: u32 = 10;

pub(crate) const REP_ACK: u32 = 1;
pub(crate) const REP_SERVER: u32 = 2;
pub(crate) const REP_INFO: u32 = 3;
pub(crate) const REP_META_CONTEXT: u32 = 4;
pub(crate) const REP_ERROR_BIT: u32 = 1 << 31;
pub(crate) const REP_ERR_UNSUP: u32 = REP_ERROR_BIT | 1;
pub(crate) const REP_ERR_INVALID: u32 = REP_ERROR_BIT | 3;
pub(crate) const REP_ERR_UNKNOWN: u32 = REP_ERROR_BIT | 6;

pub(crate) const INFO_EXPORT: u16 = 0;
pub(crate) const INFO_BLOCK_SIZE: u16 = 3;

pub(crate) const TRANSMISSION_HAS_FLAGS: u16 = 1;
pub(crate) const TRANSMISSION_READ_ONLY: u16 = 1 << 1;
pub(crate) const TRANSMISSION_SEND_FLUSH: u16 = 1 << 2;
pub(crate) const TRANSMISSION_SEND_FUA: u16 = 1 << 3;
pub(crate) const TRANSMISSION_SEND_TRIM: u16 = 1 << 5;
pub(crate) const TRANSMISSION_SEND_WRITE_ZEROES: u16 = 1 << 6;
pub(crate) const TRANSMISSION_SEND_DF: u16 = 1 << 7;
pub(crate) const TRANSMISSION_CAN_MULTI_CONN: u16 = 1 << 8;

pub(crate) const CMD_READ: u16 = 0;
pub(crate) const CMD_WRITE: u16 = 1;
pub(crate) const CMD_DISC: u16 = 2;
pub(crate) const CMD_FLUSH: u16 = 3;
pub(crate) const CMD_TRIM: u16 = 4;
pub(crate) const CMD_WRITE_ZEROES: u16 = 6;
pub(crate) const CMD_BLOCK_STATUS: u16 = 7;

pub(crate) const CMD_FLAG_FUA: u16 = 1;
pub(crate) const CMD_FLAG_REQ_ONE: u16 = 1 << 3;

pub(crate) const CHUNK_DONE: u16 = 1;
pub(crate) const CHUNK_NONE: u16 = 0;
pub(crate) const CHUNK_OFFSET_DATA: u16 = 1;
pub(crate) const CHUNK_OFFSET_HOLE: u16 = 2;
pub(crate) const CHUNK_BLOCK_STATUS: u16 = 5;
pub(crate) const CHUNK_ERROR_BIT: u16 = 1 << 15;
pub(crate) const CHUNK_ERROR: u16 = CHUNK_ERROR_BIT | 1;

pub(crate) const STATE_HOLE: u32 = 1;
pub(crate) const STATE_ZERO: u32 = 2;

/// The largest payload in one request: what the protocol lets every peer assume.
pub(crate) const PAYLOAD_BYTES_MAX: u32 = 32 * 1024 * 1024;
/// The largest option, or answer to one. Names are at most 4096 bytes; a list of contexts is a few of them.
pub(crate) const OPTION_BYTES_MAX: u32 = 64 * 1024;
/// The longest name, from the protocol's document.
pub(crate) const NAME_BYTES_MAX: usize = 4096;
/// Options that one handshake may use up, and answers to one option.
pub(crate) const OPTIONS_MAX: usize = 1000;
/// The largest chunk that is not data. QEMU answers a block status with at most 1 MiB of descriptors.
pub(crate) const STATUS_BYTES_MAX: u32 = 4 * 1024 * 1024;

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u32,
}

pub(crate) const REQUEST_BYTES: usize = 28;

impl Request {
    pub(crate) fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// Reads the next request; `None` when the peer hung up between two requests.
    pub(crate) async fn read(source: &mut (impl AsyncRead + Unpin)) -> Result<Option<Self>, NbdError> {
        let magic = match source.read_u32().await {
            Ok(magic) => magic,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if magic != REQUEST_MAGIC {
            return Err(NbdError::protocol(format!("a request began with {magic:#x}")));
        }
        Ok(Some(Self {
            flags: source.read_u16().await?,
            command: source.read_u16().await?,
            cookie: source.read_u64().await?,
            offset: source.read_u64().await?,
            length: source.read_u32().await?,
        }))
    }
}

/// The header of one chunk of a structured reply.
pub(crate) fn encode_chunk(flags: u16, kind: u16, cookie: u64, length: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// Takes integers and strings off the front of an option's bytes.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn u16(&mut self) -> Result<u16, NbdError> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, NbdError> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, NbdError> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// A string with its length in front.
    pub(crate) fn string(&mut self) -> Result<String, NbdError> {
        let length = self.u32()? as usize;
        if length > NAME_BYTES_MAX {
            return Err(NbdError::protocol(format!("a name of {length} bytes")));
        }
        let bytes = self.take(length)?;
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    /// Everything that is left, as text.
    pub(crate) fn rest(&mut self) -> String {
        String::from_utf8_lossy(std::mem::take(&mut self.0)).into_owned()
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], NbdError> {
        if self.0.len() < length {
            return Err(NbdError::protocol("an option ends too early"));
        }
        let (head, tail) = self.0.split_at(length);
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], NbdError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }
}

/// Appends a string with its length in front.
pub(crate) fn put_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend_from_slice(&(text.len() as u32).to_be_bytes());
    bytes.extend_from_slice(text.as_bytes());
}
