//! The network between a site and the server: a TCP relay, so that it can be cut.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use tokio::net::{TcpListener, TcpStream};

/// Connections relayed at once: an agent has a handful.
const CONNECTIONS_MAX: usize = 256;

/// Read at once in each direction: a frame, so that the relay is not what a transfer's speed is measured by.
const BUFFER_BYTES: usize = 256 << 10;

/// Relays connections until the process ends. Killing it is cutting the network.
pub async fn relay(listen: SocketAddr, to: SocketAddr) -> Result<()> {
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
            let _ = tokio::io::copy_bidirectional_with_sizes(&mut near, &mut far, BUFFER_BYTES, BUFFER_BYTES)
                .await;
        });
    }
}
