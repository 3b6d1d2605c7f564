//! Short ways to say what went wrong.

use mainstay_provider::{ErrorKind, SiteError};

pub(crate) fn failed(message: impl Into<String>) -> SiteError {
    SiteError::new(ErrorKind::Failed, message)
}

pub(crate) fn refused(message: impl Into<String>, remedy: &str) -> SiteError {
    SiteError::new(ErrorKind::Refused, message).with_remedy(remedy)
}

pub(crate) fn busy(message: impl Into<String>, remedy: &str) -> SiteError {
    SiteError::new(ErrorKind::Busy, message).with_remedy(remedy)
}

pub(crate) fn not_found(message: impl Into<String>) -> SiteError {
    SiteError::new(ErrorKind::NotFound, message)
}

/// Says what was being done when an error came up.
pub(crate) trait While<T> {
    /// Puts `doing` before the message.
    fn doing(self, doing: &str) -> Result<T, SiteError>;
}

impl<T, E: Into<SiteError>> While<T> for Result<T, E> {
    fn doing(self, doing: &str) -> Result<T, SiteError> {
        self.map_err(|error| {
            let mut error: SiteError = error.into();
            error.message = format!("{doing}: {}", error.message);
            error
        })
    }
}
