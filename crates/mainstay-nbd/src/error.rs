//! What goes wrong between two ends of the protocol.

use std::io;

use mainstay_block::BlockError;

/// Why a connection or a request failed.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// There is nobody at the address, or the connection broke while it was being made.
    #[error("cannot connect to {endpoint}")]
    Connect {
        /// Where.
        endpoint: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The peer did not answer in time.
    #[error("{0} did not answer in time")]
    Timeout(String),
    /// The server does not have the export, or not for us.
    #[error("the server refused export '{export}': {reason}")]
    Refused {
        /// The name that was asked for.
        export: String,
        /// What the server said.
        reason: String,
    },
    /// The peer broke the protocol.
    #[error("protocol error: {0}")]
    Protocol(String),
    /// The server answered a request with an error.
    #[error("the server answered {0}")]
    Remote(io::Error),
    /// The connection has ended; requests that were in flight may or may not have been carried out.
    #[error("the connection has ended: {0}")]
    Closed(String),
    /// The context was not asked for when connecting, or the server does not have it.
    #[error("the server has no context '{0}'")]
    NoContext(String),
    /// The local end failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl NbdError {
    pub(crate) fn protocol(text: impl Into<String>) -> Self {
        Self::Protocol(text.into())
    }
}

impl From<NbdError> for BlockError {
    fn from(error: NbdError) -> Self {
        let kind = match &error {
            NbdError::Remote(source) | NbdError::Io(source) | NbdError::Connect { source, .. } => {
                source.kind()
            }
            NbdError::Timeout(_) => io::ErrorKind::TimedOut,
            NbdError::Closed(_) => io::ErrorKind::ConnectionAborted,
            NbdError::Refused { .. } | NbdError::NoContext(_) => io::ErrorKind::NotFound,
            NbdError::Protocol(_) => io::ErrorKind::InvalidData,
        };
        Self::Io(io::Error::new(kind, error))
    }
}
