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

/// Something that the item's state does not allow, found before anything was sent.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub(crate) struct RefusedError {
    pub(crate) reason: String,
    /// What the item allows now.
    pub(crate) allowed: Vec<String>,
}

/// Tells what went wrong, and the code for it.
pub(crate) fn report(error: &anyhow::Error) -> Exit {
    output::error(&format!("{error:#}"));
    if let Some(RefusedError { allowed, .. }) = error.downcast_ref()
        && !allowed.is_empty()
    {
        output::hint(&format!("Allowed now: {}.", allowed.join(", ")));
    }
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
    if error.is::<NotFoundError>() || error.is::<mainstay_lab::NotThere>() {
        return Exit::NotFound;
    }
    if error.is::<RefusedError>() {
        return Exit::Refused;
    }
    match error.downcast_ref::<ClientError>().and_then(ClientError::status) {
        Some(400 | 413 | 422) => Exit::Usage,
        Some(401 | 403) => Exit::Access,
        Some(404) => Exit::NotFound,
        Some(409) => Exit::Refused,
        _ => Exit::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistakes_that_are_found_before_anything_is_sent_have_their_codes() {
        let text = || "no".to_owned();
        assert_eq!(code(&UsageError(text()).into()), Exit::Usage);
        assert_eq!(code(&NotFoundError(text()).into()), Exit::NotFound);
        let refused = RefusedError { reason: text(), allowed: vec!["Commit".to_owned()] };
        assert_eq!(code(&refused.into()), Exit::Refused);
        assert_eq!(code(&anyhow::anyhow!("no")), Exit::Failed);
    }
}
