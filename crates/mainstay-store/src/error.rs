//! Why the store refused.

use std::sync::Arc;

use mainstay_block::frame::FrameError;
use uuid::Uuid;

/// Why an operation of the store failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// The object storage failed. A commit that ended so may have happened: ask again with the same session.
    #[error("object storage failed at {key}")]
    Storage {
        /// The object.
        key: String,
        /// What happened.
        #[source]
        source: Arc<object_store::Error>,
    },
    /// The site has no space left; nothing acknowledged is affected.
    #[error("the store has no space left")]
    Full,
    /// Stored bytes are not what was written. Nothing of them is returned.
    #[error("object {key} is damaged: {what}")]
    Damaged {
        /// The object.
        key: String,
        /// What does not fit.
        what: String,
    },
    /// The store is encrypted, and its vault key was not given.
    #[error("the store is locked with the vault key {by}, which was not given")]
    Locked {
        /// The key's fingerprint.
        by: String,
    },
    /// The replica does not exist.
    #[error("no replica {0}")]
    NoReplica(Uuid),
    /// The replica was deleted; its id cannot be used again.
    #[error("replica {0} was deleted")]
    Deleted(Uuid),
    /// The replica has no such recovery point (any more).
    #[error("no recovery point {0}")]
    NoPoint(Uuid),
    /// The recovery point has no such disk.
    #[error("the recovery point has no disk {0}")]
    NoDisk(u16),
    /// A newer generation exists: whoever wrote this is no longer the active side.
    #[error("generation {given} is fenced off by generation {current}")]
    Fenced {
        /// The writer's generation.
        given: u64,
        /// The replica's generation.
        current: u64,
    },
    /// The session's parent is not the head of the lineage.
    #[error("the parent of the session is not the head of the lineage")]
    NotHead {
        /// The head.
        head: Option<Uuid>,
    },
    /// This server does not know the session: it restarted, or the session was aborted. Transfer again.
    #[error("session {0} is not known here")]
    NoSession(Uuid),
    /// The session was committed as this point already.
    #[error("the session was committed as {0}")]
    Committed(Uuid),
    /// A frame that does not follow the ones before.
    #[error("frame {given} arrived where {expected} was due")]
    OutOfOrder {
        /// Its sequence number.
        given: u64,
        /// The one due.
        expected: u64,
    },
    /// The frame is damaged or malformed.
    #[error("refused a frame")]
    Frame(#[from] FrameError),
    /// The request contradicts itself or exceeds a limit.
    #[error("invalid request: {0}")]
    Invalid(&'static str),
    /// The medium refuses: it is mounted read-only, or the server may not touch it. Somebody must do something.
    #[error("the store refuses access: {reason} ({key})")]
    NoAccess {
        /// What was to be read or written.
        key: String,
        /// In the operating system's words.
        reason: String,
    },
    /// Other writers changed the manifest again and again.
    #[error("the manifest is too busy")]
    Busy,
    /// A task of ours ended unexpectedly.
    #[error("internal task failed: {0}")]
    Internal(String),
}

impl StoreError {
    pub(crate) fn storage(key: &impl ToString, source: object_store::Error) -> Self {
        use std::io::ErrorKind;
        match io_cause(&source) {
            Some(io) if matches!(io.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => Self::Full,
            Some(io) if matches!(io.kind(), ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied) => {
                Self::NoAccess { key: key.to_string(), reason: io.to_string() }
            }
            _ => Self::Storage { key: key.to_string(), source: Arc::new(source) },
        }
    }

    pub(crate) fn damaged(key: &impl ToString, what: impl Into<String>) -> Self {
        Self::Damaged { key: key.to_string(), what: what.into() }
    }

    #[expect(clippy::needless_pass_by_value, reason = "the shape that map_err wants")]
    pub(crate) fn internal(what: impl ToString) -> Self {
        Self::Internal(what.to_string())
    }

    /// Whether the same request may succeed later without anybody doing anything.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Storage { .. } | Self::Busy)
    }
}

impl From<StoreError> for mainstay_block::BlockError {
    fn from(error: StoreError) -> Self {
        Self::Io(std::io::Error::other(error))
    }
}

/// What the operating system has said, if that is where the error comes from.
fn io_cause(error: &object_store::Error) -> Option<&std::io::Error> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return Some(io);
        }
        cause = error.source();
    }
    None
}
