//! The network between agents and server: streams in memory that break when a side is cut off or dies.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures::future::BoxFuture;
use mainstay_control::Control;
use mainstay_model::{ItemId, ProviderId};
use mainstay_provider::{RemoteSite, Site};
use mainstay_replication::{Access, serve_connection};
use tokio::{io::DuplexStream, runtime::Handle, sync::watch};
use tokio_util::sync::CancellationToken;

/// Bytes in flight on a stream.
const STREAM_BYTES: usize = 64 << 10;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    Control,
    Data,
}

/// The network.
pub(super) struct Network {
    state: Mutex<State>,
    /// Counts changes, for those who wait for a way to the server.
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    server: Option<(Handle, Arc<Control>)>,
    cables: HashMap<ProviderId, CancellationToken>,
    cut: HashSet<ProviderId>,
}

impl Network {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), changed: watch::Sender::new(0) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_change(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(super) fn set_server(&self, server: Option<(Handle, Arc<Control>)>) {
        self.lock().server = server;
        self.note_change();
    }

    pub(super) fn cut(&self, host: ProviderId) {
        let mut state = self.lock();
        state.cut.insert(host);
        if let Some(cable) = state.cables.remove(&host) {
            cable.cancel();
        }
    }

    pub(super) fn mend(&self, host: ProviderId) {
        self.lock().cut.remove(&host);
        self.note_change();
    }

    /// Breaks the host's streams; new ones can be made at once.
    pub(super) fn hiccup(&self, host: ProviderId) {
        self.cut(host);
        self.mend(host);
    }

    /// A host dials the server.
    pub(super) fn dial(&self, host: ProviderId, protocol: Protocol) -> io::Result<DuplexStream> {
        let mut state = self.lock();
        if state.cut.contains(&host) {
            return Err(io::Error::new(io::ErrorKind::NetworkUnreachable, "the network is cut"));
        }
        let Some((handle, control)) = state.server.clone() else {
            return Err(io::Error::new(io::ErrorKind::ConnectionRefused, "the server is down"));
        };
        let cable = state.cables.entry(host).or_default().clone();
        let (near, far) = tokio::io::duplex(STREAM_BYTES);
        handle.spawn(async move {
            tokio::select! {
                () = cable.cancelled() => {}
                () = serve(far, host, protocol, control) => {}
            }
        });
        Ok(near)
    }
}

/// What the server does with a connection, as `mainstay-server` does behind TLS.
async fn serve(stream: DuplexStream, host: ProviderId, protocol: Protocol, control: Arc<Control>) {
    match protocol {
        Protocol::Control => {
            let (site, run) = RemoteSite::connect(stream);
            let connected = Connected::new(control, host, site);
            if let Err(error) = run.await {
                tracing::debug!(%host, %error, "a control connection ended");
            }
            drop(connected);
        }
        Protocol::Data => {
            let authorize = |access: Access| {
                let control = control.clone();
                Box::pin(async move { control.may_touch(host, ItemId(access.replica)).await })
                    as BoxFuture<'_, bool>
            };
            if let Err(error) = serve_connection(Box::new(stream), &control.store, &authorize).await {
                tracing::debug!(%host, %error, "a data connection ended early");
            }
        }
    }
}

/// An agent in the directory, for as long as its connection lives.
struct Connected {
    control: Arc<Control>,
    host: ProviderId,
    site: Arc<dyn Site>,
}

impl Connected {
    fn new(control: Arc<Control>, host: ProviderId, site: Arc<dyn Site>) -> Self {
        control.sites.insert(host, site.clone());
        control.changed.notify_waiters();
        Self { control, host, site }
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.control.sites.remove(self.host, &self.site);
        self.control.changed.notify_waiters();
    }
}
