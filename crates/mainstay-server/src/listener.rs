//! Accepting TLS connections: a bounded number at once, each with a bounded time for its handshake.

use std::{sync::Arc, time::Duration};

use rustls::ServerConfig;
use tokio::{
    io::BufReader,
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// A handshake that takes longer is somebody holding a place; less where requests are given less.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// Pause after a failed accept (out of file descriptors), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A connection after its handshake. Buffered underneath: the TLS library reads in pieces of 4 KiB, each a system call.
pub(crate) type Secured = TlsStream<BufReader<TcpStream>>;

/// What is let in, and how it is served.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// Connections at once.
    pub(crate) connections_max: usize,
    /// Bytes read from a connection, and encrypted for it, at once.
    pub(crate) buffer_bytes: usize,
    /// How long a handshake may take.
    pub(crate) handshake_max: Duration,
}

impl Limits {
    /// The limits where a request may take so long.
    pub(crate) fn new(connections_max: usize, buffer_bytes: usize, request_timeout: Duration) -> Self {
        Self { connections_max, buffer_bytes, handshake_max: HANDSHAKE_MAX.min(request_timeout) }
    }
}

/// Hands every connection to `serve` until `stop`, within the limits; returns when all have
/// ended. `serve` ends its connection when it sees `stop`, or is dropped if it was still in the handshake.
pub(crate) async fn listen<F: Future<Output = ()> + Send + 'static>(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    limits: Limits,
    stop: CancellationToken,
    serve: impl Fn(Secured) -> F + Clone + Send + 'static,
) {
    let acceptor = TlsAcceptor::from(tls);
    let places = Arc::new(Semaphore::new(limits.connections_max));
    let tasks = TaskTracker::new();
    loop {
        let place = tokio::select! {
            () = stop.cancelled() => break,
            place = places.clone().acquire_owned() => place,
        };
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (acceptor, serve, stop) = (acceptor.clone(), serve.clone(), stop.clone());
        tasks.spawn(async move {
            let _place = place;
            let shaken = tokio::select! {
                () = stop.cancelled() => return,
                shaken = shake_hands(stream, acceptor, limits) => shaken,
            };
            if let Some(stream) = shaken {
                serve(stream).await;
            }
        });
    }
    tasks.close();
    tasks.wait().await;
}

async fn shake_hands(stream: TcpStream, acceptor: TlsAcceptor, limits: Limits) -> Option<Secured> {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    let stream = BufReader::with_capacity(limits.buffer_bytes, stream);
    match timeout(limits.handshake_max, acceptor.accept(stream)).await {
        Ok(Ok(mut stream)) => {
            stream.get_mut().1.set_buffer_limit(Some(limits.buffer_bytes));
            Some(stream)
        }
        Ok(Err(error)) => {
            tracing::debug!(%error, "a handshake failed");
            None
        }
        Err(_) => {
            tracing::debug!("a handshake took too long");
            None
        }
    }
}
