//! The server: block devices by name, for anyone who can open the socket.

pub(crate) mod handshake;
pub(crate) mod session;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use mainstay_block::BlockDevice;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::endpoint::{Sink, Source, split_tcp, split_unix};

/// Connections at once; QEMU opens one per disk, tools up to sixteen.
const CONNECTIONS_MAX: usize = 256;
/// How long a client may take for the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// One device under one name.
#[derive(Clone)]
pub struct Export {
    device: Arc<dyn BlockDevice>,
    read_only: bool,
    removed: CancellationToken,
}

impl fmt::Debug for Export {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = formatter.debug_struct("Export");
        debug.field("size", &self.device.size()).field("read_only", &self.read_only).finish_non_exhaustive()
    }
}

/// The exports of a server, shared with it: they may come and go while it runs.
#[derive(Clone, Debug, Default)]
pub struct Exports {
    by_name: Arc<RwLock<BTreeMap<String, Export>>>,
}

impl Exports {
    /// No exports yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Shows a device under a name. A device that had the name is removed as by [`Exports::remove`].
    pub fn insert(&self, name: impl Into<String>, device: Arc<dyn BlockDevice>, read_only: bool) {
        let export = Export { device, read_only, removed: CancellationToken::new() };
        let mut by_name = self.by_name.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = by_name.insert(name.into(), export) {
            old.removed.cancel();
        }
    }

    /// Takes a device away and ends its connections. Answers whether there was one.
    pub fn remove(&self, name: &str) -> bool {
        let removed = self.by_name.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        if let Some(export) = &removed {
            export.removed.cancel();
        }
        removed.is_some()
    }

    /// All names.
    pub fn names(&self) -> Vec<String> {
        self.by_name.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    pub(crate) fn get(&self, name: &str) -> Option<Export> {
        self.by_name.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }
}

/// A running server. Dropping it ends the listening and all connections.
#[derive(Debug)]
pub struct Server {
    stop: CancellationToken,
    tasks: TaskTracker,
    unix_path: Option<PathBuf>,
    tcp_address: Option<SocketAddr>,
}

impl Server {
    /// Listens on a socket in the file system. A socket that a dead server left there is replaced.
    pub fn bind_unix(path: &Path, exports: Exports) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        let mut server = Self::new();
        server.unix_path = Some(path.to_owned());
        let stop = server.stop.clone();
        let tasks = server.tasks.clone();
        server.tasks.spawn(async move {
            let accept = || async { listener.accept().await.map(|(stream, _)| split_unix(stream)) };
            accept_all(accept, exports, stop, tasks).await;
        });
        Ok(server)
    }

    /// The same, with permissions on the socket (`0o666` lets QEMU's account in, if the directory does too).
    pub fn bind_unix_with_mode(path: &Path, exports: Exports, mode: u32) -> io::Result<Self> {
        let server = Self::bind_unix(path, exports)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        Ok(server)
    }

    /// Listens on a TCP address.
    pub async fn bind_tcp(address: &str, exports: Exports) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let mut server = Self::new();
        server.tcp_address = Some(listener.local_addr()?);
        let stop = server.stop.clone();
        let tasks = server.tasks.clone();
        server.tasks.spawn(async move {
            let accept = || async {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(split_tcp(stream))
            };
            accept_all(accept, exports, stop, tasks).await;
        });
        Ok(server)
    }

    fn new() -> Self {
        Self { stop: CancellationToken::new(), tasks: TaskTracker::new(), unix_path: None, tcp_address: None }
    }

    /// The TCP address, with the port that the system chose.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.tcp_address
    }

    /// Stops listening, ends all connections and waits until the last of them let go of its device.
    pub async fn shutdown(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(path) = &self.unix_path {
            // What stays behind is replaced by the next server.
            let _ = std::fs::remove_file(path);
        }
    }
}

async fn accept_all<F>(accept: impl Fn() -> F, exports: Exports, stop: CancellationToken, tasks: TaskTracker)
where
    F: Future<Output = io::Result<(Source, Sink)>>,
{
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = accept() => accepted,
        };
        let (source, sink) = match accepted {
            Ok(streams) => streams,
            Err(error) => {
                // Out of descriptors, usually: others will close. Going on at once would only spin.
                tracing::warn!(%error, "cannot accept an NBD connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (exports, stop) = (exports.clone(), stop.clone());
        tasks.spawn(async move {
            let serve = serve(source, sink, &exports);
            let result = tokio::select! {
                () = stop.cancelled() => Ok(()),
                result = serve => result,
            };
            if let Err(error) = result {
                tracing::debug!(%error, "an NBD connection ended");
            }
            drop(permit);
        });
    }
}

async fn serve(mut source: Source, mut sink: Sink, exports: &Exports) -> Result<(), crate::error::NbdError> {
    let handshake = handshake::negotiate(&mut source, &mut sink, exports);
    let negotiated = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake)
        .await
        .map_err(|_elapsed| crate::error::NbdError::Timeout("the client".to_owned()))??;
    let Some(agreed) = negotiated else { return Ok(()) };
    let removed = agreed.export.removed.clone();
    tokio::select! {
        () = removed.cancelled() => Ok(()),
        result = session::serve(source, sink, agreed) => result,
    }
}
