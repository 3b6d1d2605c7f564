//! Exit codes: a contract with scripts.

use std::process::ExitCode;

use mainstay_api::ClientError;

use crate::output;

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Everything asked for is done.
    Done = 0,
    /// The job failed, or anything else did.
    Failed = 1,
    /// The request was wrong.
    Usage = 2,
    /// The item's state does not allow it.
    Refused = 3,
    /// It does not exist.
    NotFound = 4,
    /// The token is missing, wrong or not allowed to.
    Access = 5,
    /// The job waits for a person.
    Waiting = 6,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// A mistake in the request, found before anything was sent.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) String);

/// Something that was named and is not there.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct NotFoundError(pub(crate) String);

/// Tells what went wrong, and the code for it.
pub(crate) fn report(error: &anyhow::Error) -> Exit {
    output::error(&format!("{error:#}"));
    if let Some(ClientError::Refused { error, .. }) = error.downcast_ref() {
        for detail in &error.details {
            if !detail.recommended_action.is_empty() {
                output::hint(&detail.recommended_action);
            }
        }
    }
    code(error)
}

fn code(error: &anyhow::Error) -> Exit {
    if error.is::<UsageError>() {
        return Exit::Usage;
    }
    if error.is::<NotFoundError>() {
        return Exit::NotFound;
    }
    match error.downcast_ref::<ClientError>().and_then(ClientError::status) {
        Some(400 | 413 | 422) => Exit::Usage,
        Some(401 | 403) => Exit::Access,
        Some(404) => Exit::NotFound,
        Some(409) => Exit::Refused,
        _ => Exit::Failed,
    }
}
