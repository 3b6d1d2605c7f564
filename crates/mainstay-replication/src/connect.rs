//! Getting a connection, again and again.

use std::future::Future;
use std::io;
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use crate::ReplicationError;

/// Any byte stream in both directions.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A stream of any type.
pub type BoxStream = Box<dyn Stream>;

/// Makes connections to the server. Called again whenever one breaks; may fail, which is retried.
#[async_trait]
pub trait Connect: Send + Sync {
    /// One new connection, authenticated and encrypted as the caller sees fit.
    async fn connect(&self) -> io::Result<BoxStream>;
}

#[async_trait]
impl<F, R> Connect for F
where
    F: Fn() -> R + Send + Sync,
    R: Future<Output = io::Result<BoxStream>> + Send,
{
    async fn connect(&self) -> io::Result<BoxStream> {
        self().await
    }
}

/// Pauses between attempts: 0.1 s, doubling to 5 s; starts anew after a success.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

const FIRST: Duration = Duration::from_millis(100);
const LAST: Duration = Duration::from_secs(5);

impl Backoff {
    pub(crate) fn new() -> Self {
        Self { next: FIRST }
    }

    pub(crate) fn reset(&mut self) {
        self.next = FIRST;
    }

    pub(crate) async fn pause(&mut self, cancel: &CancellationToken) -> Result<(), ReplicationError> {
        let pause = self.next;
        self.next = (pause * 2).min(LAST);
        tokio::select! {
            () = cancel.cancelled() => Err(ReplicationError::Cancelled),
            () = tokio::time::sleep(pause) => Ok(()),
        }
    }
}

/// Runs something that can be cancelled from outside.
pub(crate) async fn unless_cancelled<T>(
    cancel: &CancellationToken,
    work: impl Future<Output = Result<T, ReplicationError>>,
) -> Result<T, ReplicationError> {
    tokio::select! {
        biased;
        () = cancel.cancelled() => Err(ReplicationError::Cancelled),
        done = work => done,
    }
}
