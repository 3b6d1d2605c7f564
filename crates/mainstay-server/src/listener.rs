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

/// A handshake that takes longer is somebody holding a place.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// Pause after a failed accept (out of file descriptors), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A connection after its handshake. Buffered underneath: the TLS library reads in pieces of 4 KiB, each a system call.
pub(crate) type Secured = TlsStream<BufReader<TcpStream>>;
const READ_BUFFER_BYTES: usize = 32 << 10;

/// Hands every connection to `serve` until `stop`, at most `connections_max` of them at once; returns when all have
/// ended. `serve` ends its connection when it sees `stop`, or is dropped if it was still in the handshake.
pub(crate) async fn listen<F: Future<Output = ()> + Send + 'static>(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    connections_max: usize,
    stop: CancellationToken,
    serve: impl Fn(Secured) -> F + Clone + Send + 'static,
) {
    let acceptor = TlsAcceptor::from(tls);
    let places = Arc::new(Semaphore::new(connections_max));
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
                shaken = shake_hands(stream, acceptor) => shaken,
            };
            if let Some(stream) = shaken {
                serve(stream).await;
            }
        });
    }
    tasks.close();
    tasks.wait().await;
}

async fn shake_hands(stream: TcpStream, acceptor: TlsAcceptor) -> Option<Secured> {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    match timeout(HANDSHAKE_MAX, acceptor.accept(BufReader::with_capacity(READ_BUFFER_BYTES, stream))).await {
        Ok(Ok(stream)) => Some(stream),
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
