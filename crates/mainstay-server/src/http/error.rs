//! Errors as the service answers them: code, message, causes and what to do.

use axum::response::{IntoResponse, Response};
use hyper::{
    Method, StatusCode,
    header::{self, HeaderName, HeaderValue},
};
use mainstay_api::arm;
use mainstay_control::ControlError;
use mainstay_provider::ErrorKind;

/// Characters of a message at most.
const MESSAGE_MAX: usize = 1000;

/// An error answer.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    code: String,
    message: String,
    remedy: String,
    allowed: Option<Vec<String>>,
    /// What the answer says besides its body. Boxed: errors are returned everywhere and rarely have one.
    header: Option<Box<(HeaderName, HeaderValue)>>,
}

impl ApiError {
    pub(super) fn new(
        status: StatusCode,
        code: &str,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            status,
            code: code.to_owned(),
            message: message.into(),
            remedy: remedy.into(),
            allowed: None,
            header: None,
        }
    }

    pub(super) fn bad_request(code: &str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message, remedy)
    }

    pub(super) fn unauthenticated() -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "AuthenticationFailed",
            "a valid bearer token is needed",
            "Check the token; `mainstay server init` printed the first one.",
        )
    }

    /// An address has tried too often; it may again in so many seconds.
    pub(super) fn too_many_failures(seconds: i64) -> Self {
        let mut error = Self::new(
            StatusCode::TOO_MANY_REQUESTS,
            "TooManyRequests",
            "too many sign-ins from this address have failed, and this one did too",
            format!("Check the token or key, and try again in {seconds} s."),
        );
        error.header = Some(Box::new((header::RETRY_AFTER, seconds.into())));
        error
    }

    pub(super) fn no_such_path() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "ResourceNotFound",
            "there is nothing at this path",
            "Check the path and the method.",
        )
    }

    pub(super) fn method_not_allowed(allowed: &[&Method]) -> Self {
        let allowed: Vec<&str> = allowed.iter().map(|method| method.as_str()).collect();
        let allowed = allowed.join(", ");
        let mut error = Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "MethodNotAllowed",
            "there is something at this path, but not with this method",
            format!("Use {allowed}."),
        );
        error.header = HeaderValue::try_from(allowed).ok().map(|allowed| Box::new((header::ALLOW, allowed)));
        error
    }

    pub(super) fn invalid_page() -> Self {
        Self::bad_request(
            "InvalidSkipToken",
            "the skip token is not one that this server gave",
            "Begin the listing anew, or use nextLink as it was answered.",
        )
    }

    #[cfg(test)]
    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    #[cfg(test)]
    pub(super) fn message(&self) -> &str {
        &self.message
    }

    pub(super) fn is_not_found(&self) -> bool {
        self.status == StatusCode::NOT_FOUND
    }

    pub(super) fn is_unauthenticated(&self) -> bool {
        self.status == StatusCode::UNAUTHORIZED
    }

    pub(super) fn internal(message: String) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError", message, "See the server's log.")
    }
}

impl From<ControlError> for ApiError {
    fn from(error: ControlError) -> Self {
        let message = error.to_string();
        match error {
            ControlError::NotFound { .. } => {
                Self::new(StatusCode::NOT_FOUND, "ResourceNotFound", message, "List what there is.")
            }
            ControlError::Invalid { code, remedy, .. } => Self::bad_request(code, message, remedy),
            ControlError::NotAllowed { allowed, .. } => {
                let allowed: Vec<_> = allowed.iter().map(|operation| format!("{operation:?}")).collect();
                let remedy = if allowed.is_empty() {
                    "Nothing can be begun now: wait for the job that is under way, or cancel it.".to_owned()
                } else {
                    format!("Allowed now: {}.", allowed.join(", "))
                };
                Self {
                    allowed: Some(allowed),
                    ..Self::new(StatusCode::CONFLICT, "OperationNotAllowed", message, remedy)
                }
            }
            ControlError::Conflict(_) => {
                Self::new(StatusCode::CONFLICT, "Conflict", message, "Look again, then try again.")
            }
            ControlError::Site(error) => {
                let status = match error.kind {
                    ErrorKind::NotFound => StatusCode::NOT_FOUND,
                    ErrorKind::Refused => StatusCode::BAD_REQUEST,
                    ErrorKind::Busy | ErrorKind::Fenced => StatusCode::CONFLICT,
                    _ => StatusCode::SERVICE_UNAVAILABLE,
                };
                Self::new(status, "SiteError", message, error.remedy)
            }
            ControlError::Db(_) | ControlError::Store(_) => {
                tracing::error!(error = &error as &dyn std::error::Error, "a request failed");
                Self::internal(message)
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(mut self) -> Response {
        // Names that do not exist are repeated, however long they are.
        self.message = super::body::cut(&self.message, MESSAGE_MAX);
        let body = arm::ErrorBody {
            error: arm::Error {
                code: self.code.clone(),
                message: self.message.clone(),
                details: vec![arm::ErrorDetail {
                    code: self.code,
                    message: self.message,
                    possible_causes: String::new(),
                    recommended_action: self.remedy,
                    allowed_operations: self.allowed,
                }],
            },
        };
        let body = serde_json::to_vec(&body).unwrap_or_default();
        let mut response = (self.status, [(header::CONTENT_TYPE, "application/json")], body).into_response();
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some((name, value)) = self.header.map(|header| *header) {
            response.headers_mut().insert(name, value);
        }
        response
    }
}
