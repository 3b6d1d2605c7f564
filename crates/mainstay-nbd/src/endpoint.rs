//! Where a server listens.

use std::fmt;
use std::path::PathBuf;

use tokio::io::{AsyncRead, AsyncWrite, BufReader};
use tokio::net::{TcpStream, UnixStream};

use crate::error::NbdError;

/// An address of an NBD server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A socket in the file system. Linux allows 107 bytes of path.
    Unix(PathBuf),
    /// `host:port`.
    Tcp(String),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(formatter, "unix:{}", path.display()),
            Self::Tcp(address) => write!(formatter, "tcp:{address}"),
        }
    }
}

pub(crate) type Source = BufReader<Box<dyn AsyncRead + Send + Unpin>>;
pub(crate) type Sink = Box<dyn AsyncWrite + Send + Unpin>;

/// Large enough for many headers in one system call; payloads go around it.
const READ_BUFFER_BYTES: usize = 32 * 1024;

pub(crate) fn split_unix(stream: UnixStream) -> (Source, Sink) {
    let (read, write) = stream.into_split();
    (BufReader::with_capacity(READ_BUFFER_BYTES, Box::new(read)), Box::new(write))
}

pub(crate) fn split_tcp(stream: TcpStream) -> (Source, Sink) {
    let (read, write) = stream.into_split();
    (BufReader::with_capacity(READ_BUFFER_BYTES, Box::new(read)), Box::new(write))
}

impl Endpoint {
    pub(crate) async fn connect(&self) -> Result<(Source, Sink), NbdError> {
        let failed = |source| NbdError::Connect { endpoint: self.to_string(), source };
        match self {
            Self::Unix(path) => Ok(split_unix(UnixStream::connect(path).await.map_err(failed)?)),
            Self::Tcp(address) => {
                let stream = TcpStream::connect(address).await.map_err(failed)?;
                // Requests are small and answers are waited for: Nagle's algorithm only adds delay.
                stream.set_nodelay(true).map_err(failed)?;
                Ok(split_tcp(stream))
            }
        }
    }
}
