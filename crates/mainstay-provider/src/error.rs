//! One error type for everything that happens at a site: it crosses the wire and reaches people.

use serde::{Deserialize, Serialize};

/// What the caller can do about an error. The control plane retries, gives up or asks a person by
/// this alone; it never parses messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorKind {
    /// The VM, disk, image or point does not exist.
    NotFound,
    /// Somebody else holds what is needed (a foreign backup job, an image lock); try again later.
    Busy,
    /// The connection or a daemon is away; try again.
    Unavailable,
    /// The request cannot be carried out as it stands; a person must change it or the VM.
    Refused,
    /// A newer generation exists: this writer or VM is no longer the active one.
    Fenced,
    /// No space where the bytes should go.
    NoSpace,
    /// It took longer than it was allowed to.
    TimedOut,
    /// The operation was cancelled on request.
    Cancelled,
    /// Anything else the hypervisor or the operating system said no to.
    Failed,
}

/// An error with what happened, to what, and what to do next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct SiteError {
    /// What the caller can do about it.
    pub kind: ErrorKind,
    /// What happened, to what: one sentence, with the source's own words.
    pub message: String,
    /// What to do next, for a person; empty if there is nothing to add.
    pub remedy: String,
}

impl SiteError {
    /// An error without a remedy.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), remedy: String::new() }
    }

    /// The same error with what to do next.
    #[must_use]
    pub fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = remedy.into();
        self
    }

    /// Whether the same request may succeed later without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        matches!(
            self.kind,
            ErrorKind::Busy | ErrorKind::Unavailable | ErrorKind::NoSpace | ErrorKind::TimedOut
        )
    }
}

impl From<std::io::Error> for SiteError {
    fn from(error: std::io::Error) -> Self {
        let kind = match error.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            _ => ErrorKind::Failed,
        };
        Self::new(kind, error.to_string())
    }
}
