//! What the control plane answers when it cannot do what was asked.

use mainstay_model::{InvalidPolicy, Operation, Refusal};
use mainstay_provider::SiteError;
use mainstay_store::StoreError;

use crate::db::DbError;

/// Why a request was not carried out. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The resource does not exist.
    #[error("the {kind} '{name}' does not exist")]
    NotFound {
        /// What kind of resource.
        kind: &'static str,
        /// Its name as asked for.
        name: String,
    },
    /// The request itself is wrong.
    #[error("{message}")]
    Invalid {
        /// Stable name of the mistake.
        code: &'static str,
        /// What is wrong with what.
        message: String,
        /// How to put it right.
        remedy: String,
    },
    /// The state does not allow it.
    #[error("{reason}")]
    NotAllowed {
        /// Why not.
        reason: String,
        /// What is allowed now.
        allowed: Vec<Operation>,
    },
    /// Something else depends on it or has its name.
    #[error("{0}")]
    Conflict(String),
    /// The database failed.
    #[error(transparent)]
    Db(DbError),
    /// The replica store failed.
    #[error("the replica store failed: {0}")]
    Store(#[from] StoreError),
    /// A site refused or is not there.
    #[error(transparent)]
    Site(#[from] SiteError),
}

impl ControlError {
    /// An error for a resource that does not exist.
    pub fn not_found(kind: &'static str, name: impl Into<String>) -> Self {
        Self::NotFound { kind, name: name.into() }
    }

    /// An error for a wrong request.
    pub fn invalid(code: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Invalid { code, message: message.into(), remedy: remedy.into() }
    }
}

impl From<DbError> for ControlError {
    fn from(error: DbError) -> Self {
        match error {
            DbError::Conflict { .. } => Self::Conflict(error.to_string()),
            error => Self::Db(error),
        }
    }
}

impl From<Refusal> for ControlError {
    fn from(refusal: Refusal) -> Self {
        Self::NotAllowed { reason: refusal.reason, allowed: refusal.allowed }
    }
}

impl From<InvalidPolicy> for ControlError {
    fn from(error: InvalidPolicy) -> Self {
        Self::invalid("InvalidPolicy", error.to_string(), "Correct the value and try again.")
    }
}
