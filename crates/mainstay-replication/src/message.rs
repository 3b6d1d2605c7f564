//! Control messages, encoded in postcard. A change here is a new protocol version.

use mainstay_store::{BlockRange, Consistency, DiskSpec};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::RefusalKind;

/// The first message of every connection, from the client.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) version_min: u16,
    pub(crate) version_max: u16,
    pub(crate) replica: Uuid,
    pub(crate) purpose: Purpose,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Purpose {
    Replicate { session: Uuid, generation: u64, parent: Option<Uuid>, disks: Vec<DiskSpec>, fork: bool },
    Mount { point: Uuid },
    Fetch(FetchRequest),
    Outcome { session: Uuid },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct FetchRequest {
    pub(crate) to: Uuid,
    pub(crate) from: Option<Uuid>,
    /// Whether to send what differs between `from` (or nothing) and `to`; else only `extra`.
    pub(crate) difference: bool,
    pub(crate) extra: Vec<BlockRange>,
    /// Go on at this disk and block.
    pub(crate) resume: (u16, u64),
}

/// The server's answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Welcome {
    /// Replicate: frames the server has, and how many of them are durable.
    Session { version: u16, received: u64, durable: u64 },
    /// Replicate, Outcome: the session is a recovery point already.
    Committed { point: Uuid },
    /// Outcome: it is not, and never will be.
    NotCommitted,
    /// Mount, Fetch: the disks of the point; Fetch: bytes to come before compression.
    Point { version: u16, disks: Vec<DiskSpec>, bytes: u64 },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct CommitRequest {
    /// Frames the session has: the commit is refused when the server has another number.
    pub(crate) frames: u64,
    pub(crate) time_ms: u64,
    pub(crate) consistency: Consistency,
    pub(crate) definition: Option<Vec<u8>>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Query {
    Read { disk: u16, offset: u64, length: u32 },
    Extents { disk: u16, offset: u64, length: u64 },
    Hashes { disk: u16, key: [u8; 32], first: u64, count: u32 },
}

/// `(length, is data)` of adjoining extents.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ExtentList(pub(crate) Vec<(u64, bool)>);

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Refusal {
    pub(crate) kind: RefusalKind,
    pub(crate) message: String,
}
