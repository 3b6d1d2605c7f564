//! Why a session failed.

use mainstay_block::BlockError;
use mainstay_block::frame::FrameError;
use mainstay_block::hash_table::HashTableError;
use mainstay_store::StoreError;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// What kind of refusal a peer sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusalKind {
    /// A newer generation exists: this side is no longer the active one.
    Fenced {
        /// The replica's generation.
        current: u64,
    },
    /// The recovery site has no space.
    StoreFull,
    /// The session's parent is not the head of the lineage.
    NotHead {
        /// The head.
        head: Option<Uuid>,
    },
    /// The peer may not touch this replica.
    NotAuthorized,
    /// Replica or recovery point do not exist.
    NotFound,
    /// Stored data is damaged.
    Damaged,
    /// The server no longer knows the session.
    SessionLost,
    /// No common protocol version.
    Version,
    /// The request is wrong.
    Invalid,
    /// Something passing: try again.
    Unavailable,
    /// The store's medium refuses, until somebody does something about it.
    NoAccess,
}

/// Why a session ended without its result.
#[derive(Debug, thiserror::Error)]
pub enum ReplicationError {
    /// This side's generation is fenced off.
    #[error("fenced off by generation {current}")]
    Fenced {
        /// The replica's generation.
        current: u64,
    },
    /// The recovery site has no space; nothing is lost, the next capture can be tried when there is.
    #[error("the recovery site has no space left")]
    StoreFull,
    /// The server refused for another reason.
    #[error("the server refused: {message}")]
    Refused {
        /// Which.
        kind: RefusalKind,
        /// Its words.
        message: String,
    },
    /// The peer broke the protocol.
    #[error("protocol violation: {0}")]
    Protocol(&'static str),
    /// The connection failed.
    #[error("connection")]
    Connection(#[source] std::io::Error),
    /// The server lost the session again and again.
    #[error("the server lost the session {0} times")]
    SessionLost(u32),
    /// The caller's token was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// A local disk failed.
    #[error("local disk {disk}")]
    Device {
        /// Index of the disk.
        disk: u16,
        /// What happened.
        #[source]
        source: BlockError,
    },
    /// A local hash table failed.
    #[error("hash table")]
    Table(#[from] HashTableError),
    /// A frame is damaged or could not be built.
    #[error("frame")]
    Frame(#[from] FrameError),
    /// The store failed (server side).
    #[error("store")]
    Store(#[from] StoreError),
    /// A task of ours ended unexpectedly.
    #[error("internal task failed: {0}")]
    Internal(String),
}

impl From<std::io::Error> for ReplicationError {
    fn from(error: std::io::Error) -> Self {
        // A peer that was killed sends no farewell, and TLS has words for that which help nobody.
        Self::Connection(match error.kind() {
            kind @ std::io::ErrorKind::UnexpectedEof => {
                std::io::Error::new(kind, "the peer closed the connection")
            }
            _ => error,
        })
    }
}

impl ReplicationError {
    pub(crate) fn internal(error: &impl ToString) -> Self {
        Self::Internal(error.to_string())
    }

    /// Whether a new connection may help.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Connection(_) => true,
            Self::Refused { kind, .. } => *kind == RefusalKind::Unavailable,
            _ => false,
        }
    }

    /// What the peer is told.
    pub(crate) fn refusal(&self) -> (RefusalKind, String) {
        let kind = match self {
            Self::Fenced { current } => RefusalKind::Fenced { current: *current },
            Self::StoreFull => RefusalKind::StoreFull,
            Self::Refused { kind, .. } => kind.clone(),
            Self::Store(error) => match error {
                StoreError::Fenced { current, .. } => RefusalKind::Fenced { current: *current },
                StoreError::Full => RefusalKind::StoreFull,
                StoreError::NotHead { head } => RefusalKind::NotHead { head: *head },
                StoreError::NoReplica(_)
                | StoreError::Deleted(_)
                | StoreError::NoPoint(_)
                | StoreError::NoDisk(_) => RefusalKind::NotFound,
                StoreError::Damaged { .. } => RefusalKind::Damaged,
                StoreError::NoSession(_) | StoreError::Committed(_) => RefusalKind::SessionLost,
                StoreError::NoAccess { .. } => RefusalKind::NoAccess,
                StoreError::Storage { .. }
                | StoreError::Busy
                | StoreError::Locked { .. }
                | StoreError::Internal(_) => RefusalKind::Unavailable,
                StoreError::OutOfOrder { .. } | StoreError::Frame(_) | StoreError::Invalid(_) => {
                    RefusalKind::Invalid
                }
            },
            _ => RefusalKind::Invalid,
        };
        (kind, self.with_causes())
    }

    /// The error with everything that led to it, in one line: the peer sees only this text.
    pub fn with_causes(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(inner) = cause {
            text = format!("{text}: {inner}");
            cause = inner.source();
        }
        text
    }

    pub(crate) fn from_refusal(kind: RefusalKind, message: String) -> Self {
        match kind {
            RefusalKind::Fenced { current } => Self::Fenced { current },
            RefusalKind::StoreFull => Self::StoreFull,
            kind => Self::Refused { kind, message },
        }
    }
}
