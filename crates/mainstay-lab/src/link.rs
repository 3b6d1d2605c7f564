//! The network between a site and the server: a TCP relay, so that it can be cut and made slow.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// Connections relayed at once: an agent has a handful.
const CONNECTIONS_MAX: usize = 256;
/// Pieces that a slow network carries in a second.
const PIECES_PER_SECOND: u64 = 20;

/// Read at once in each direction: a frame, so that the relay is not what a transfer's speed is measured by.
const BUFFER_BYTES: usize = 256 << 10;

/// Relays connections until the process ends. Killing it is cutting the network. `bytes_per_second` limits each
/// direction of each connection.
pub async fn relay(listen: SocketAddr, to: SocketAddr, bytes_per_second: Option<u64>) -> Result<()> {
    let listener = TcpListener::bind(listen).await.with_context(|| format!("listen on {listen}"))?;
    let places = std::sync::Arc::new(tokio::sync::Semaphore::new(CONNECTIONS_MAX));
    loop {
        let place = places.clone().acquire_owned().await?;
        let (mut near, _) = listener.accept().await?;
        tokio::spawn(async move {
            let _place = place;
            let Ok(mut far) = TcpStream::connect(to).await else { return };
            if near.set_nodelay(true).is_err() || far.set_nodelay(true).is_err() {
                return;
            }
            // However a connection ends, both its ends see it end.
            let Some(limit) = bytes_per_second else {
                let _ =
                    tokio::io::copy_bidirectional_with_sizes(&mut near, &mut far, BUFFER_BYTES, BUFFER_BYTES)
                        .await;
                return;
            };
            let ((near_read, near_write), (far_read, far_write)) = (near.split(), far.split());
            let _ = tokio::try_join!(carry(near_read, far_write, limit), carry(far_read, near_write, limit));
        });
    }
}

/// Copies one direction at a limited speed.
async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    bytes_per_second: u64,
) -> std::io::Result<()> {
    let piece = usize::try_from(bytes_per_second / PIECES_PER_SECOND).unwrap_or(usize::MAX).clamp(1, 1 << 20);
    let mut buffer = vec![0; piece];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..length]).await?;
        let nanoseconds = length as u64 * 1_000_000_000 / bytes_per_second.max(1);
        tokio::time::sleep(Duration::from_nanos(nanoseconds)).await;
    }
}
