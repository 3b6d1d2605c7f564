//! A typed client of the published API.

use std::time::Duration;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::arm;

/// Where a server is and how to be let in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// `https://HOST:PORT`.
    pub url: String,
    /// The CA's certificate, PEM; `None` = the system's roots are of no use, so requests fail.
    pub authority_pem: String,
    /// The bearer token; empty for the one request that needs none.
    pub token: String,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server did not answer.
    #[error("the server at {url} does not answer: {reason}")]
    Unreachable {
        /// Where it was looked for.
        url: String,
        /// Why, down to the first cause.
        reason: String,
    },
    /// The server said no.
    #[error("{}", .error.message)]
    Refused {
        /// HTTP status.
        status: u16,
        /// The error as answered.
        error: Box<arm::Error>,
    },
    /// The answer is not what this version expects.
    #[error("the server's answer to {path} cannot be read: {reason}")]
    Unreadable {
        /// What was asked for.
        path: String,
        /// Why.
        reason: String,
    },
    /// The connection's settings are wrong.
    #[error("{0}")]
    Settings(String),
}

impl ClientError {
    /// The HTTP status of a refusal.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }
}

/// A client of one server.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    url: String,
    token: String,
}

/// How long a single request may take; long work is a job and answers at once.
const REQUEST_MAX: Duration = Duration::from_secs(60);

/// How long a download may take.
const DOWNLOAD_MAX: Duration = Duration::from_secs(3600);

/// Percent-encodes a segment of a path, or a value of a query.
pub fn encode_segment(segment: &str) -> String {
    let mut text = String::new();
    for byte in segment.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                text.push(char::from(byte));
            }
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

impl Client {
    /// A client for a connection. Nothing is sent yet.
    pub fn new(connection: &Connection) -> Result<Self, ClientError> {
        let settings = |error: reqwest::Error| ClientError::Settings(causes(&error));
        // The process-wide provider may have been set by somebody else already, to the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let authority =
            reqwest::Certificate::from_pem(connection.authority_pem.as_bytes()).map_err(settings)?;
        let http = reqwest::Client::builder()
            .tls_certs_only([authority])
            .https_only(true)
            .timeout(REQUEST_MAX)
            .connect_timeout(Duration::from_secs(10))
            .build()
            .map_err(settings)?;
        Ok(Self {
            http,
            url: connection.url.trim_end_matches('/').to_owned(),
            token: connection.token.clone(),
        })
    }

    /// Reads a path.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let (_, body) = self.send(reqwest::Method::GET, path, None::<&()>).await?;
        read(path, &body)
    }

    /// Reads a listing, all pages of it.
    pub async fn list<T: DeserializeOwned>(&self, path: &str) -> Result<Vec<T>, ClientError> {
        self.list_first(path, usize::MAX).await
    }

    /// Reads the beginning of a listing, as many pages as `count` needs.
    pub async fn list_first<T: DeserializeOwned>(
        &self,
        path: &str,
        count: usize,
    ) -> Result<Vec<T>, ClientError> {
        let mut page: arm::List<T> = self.get(path).await?;
        let mut found = page.value;
        while let Some(next) = page.next_link.filter(|_| found.len() < count) {
            // The server names itself as we do; whatever name it knows, the token goes where it was meant to go.
            let next = next.split_once("://").map_or(next.as_str(), |(_, rest)| rest);
            let at = next.find('/').unwrap_or(next.len());
            page = self.get(&next[at..]).await?;
            found.append(&mut page.value);
        }
        found.truncate(count);
        Ok(found)
    }

    /// Downloads what a link of this server offers, piece by piece. The link carries its own secret; the token stays here.
    pub async fn download(
        &self,
        link: &str,
        mut take: impl FnMut(&[u8]) -> std::io::Result<()>,
    ) -> Result<(), ClientError> {
        let unreachable = |error: reqwest::Error| ClientError::Unreachable {
            url: self.url.clone(),
            reason: causes(&error.without_url()),
        };
        // As with pages: the server's name is ours, whatever it calls itself.
        let path = link.split_once("://").map_or(link, |(_, rest)| rest);
        let path = &path[path.find('/').unwrap_or(path.len())..];
        let request = self.http.get(format!("{}{path}", self.url)).timeout(DOWNLOAD_MAX);
        let mut response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        if !status.is_success() {
            let body = response.bytes().await.map_err(unreachable)?;
            return Err(refusal(status, &body));
        }
        while let Some(piece) = response.chunk().await.map_err(unreachable)? {
            take(&piece)
                .map_err(|error| ClientError::Settings(format!("the download cannot be written: {error}")))?;
        }
        Ok(())
    }

    /// Sends a body and reads the answer.
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let (_, body) = self.send(reqwest::Method::POST, path, Some(body)).await?;
        read(path, &body)
    }

    /// Removes what is at a path.
    pub async fn delete(&self, path: &str) -> Result<(), ClientError> {
        self.send(reqwest::Method::DELETE, path, None::<&()>).await.map(|_| ())
    }

    /// Begins a long-running operation and answers the job's name; `None` when it was done at once.
    pub async fn begin(
        &self,
        method: reqwest::Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Option<String>, ClientError> {
        let (operation, _) = self.send(method, path, body).await?;
        Ok(operation.and_then(|url| {
            let without_query = url.split('?').next().unwrap_or_default();
            without_query.rsplit('/').next().map(str::to_owned)
        }))
    }

    async fn send(
        &self,
        method: reqwest::Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<(Option<String>, Vec<u8>), ClientError> {
        let mut url = format!("{}{path}", self.url);
        if !path.contains("api-version=") {
            let separator = if path.contains('?') { '&' } else { '?' };
            url.push_str(&format!("{separator}api-version={}", arm::API_VERSION));
        }
        let mut request = self.http.request(method, url);
        if !self.token.is_empty() {
            request = request.bearer_auth(&self.token);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let unreachable = |error: reqwest::Error| ClientError::Unreachable {
            url: self.url.clone(),
            reason: causes(&error),
        };
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        let operation = response
            .headers()
            .get("azure-asyncoperation")
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned);
        let body = response.bytes().await.map_err(unreachable)?.to_vec();
        if status.is_success() {
            return Ok((operation, body));
        }
        Err(refusal(status, &body))
    }
}

fn refusal(status: reqwest::StatusCode, body: &[u8]) -> ClientError {
    let error = match serde_json::from_slice::<arm::ErrorBody>(body) {
        Ok(body) => body.error,
        Err(_) => arm::Error {
            code: status.as_str().to_owned(),
            message: format!("{status}: {}", String::from_utf8_lossy(body)),
            details: Vec::new(),
        },
    };
    ClientError::Refused { status: status.as_u16(), error: Box::new(error) }
}

fn read<T: DeserializeOwned>(path: &str, body: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(body)
        .map_err(|error| ClientError::Unreadable { path: path.to_owned(), reason: error.to_string() })
}

/// An error with all its causes, in one line.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

impl crate::v1::Vault {
    /// The path under which the vault's resources are.
    pub fn path(&self) -> String {
        format!(
            "/subscriptions/{}/resourceGroups/{}/providers/{}/vaults/{}",
            encode_segment(&self.subscription),
            encode_segment(&self.resource_group),
            arm::NAMESPACE,
            encode_segment(&self.name)
        )
    }
}
