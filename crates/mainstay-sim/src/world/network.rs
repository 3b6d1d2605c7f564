//! The network between agents and server: connections that break when a side is cut off or dies.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures::future::BoxFuture;
use mainstay_control::Control;
use mainstay_model::ProviderId;
use mainstay_provider::{RemoteSite, Site};
use mainstay_replication::{Access, RefusalKind, serve_connection};
use tokio::{io::DuplexStream, runtime::Handle, sync::watch};
use tokio_util::sync::CancellationToken;

use super::wire::{Direction, Weather, Wires, connect};

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
    seed: u64,
}

#[derive(Default)]
struct State {
    server: Option<(Handle, Arc<Control>)>,
    cables: HashMap<ProviderId, CancellationToken>,
    wires: HashMap<ProviderId, Arc<Wires>>,
    cut: HashSet<ProviderId>,
}

impl Network {
    pub(super) fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), changed: watch::Sender::new(0), seed })
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

    /// Ends cuts and bad weather.
    pub(super) fn mend(&self, host: ProviderId) {
        self.lock().cut.remove(&host);
        self.wires(host).change(|weather| *weather = Weather::default());
        self.note_change();
    }

    fn wires(&self, host: ProviderId) -> Arc<Wires> {
        let mut state = self.lock();
        // Different for each host, the same in each run.
        let seed = self.seed.wrapping_add(state.wires.len() as u64);
        state.wires.entry(host).or_insert_with(|| Arc::new(Wires::new(seed))).clone()
    }

    /// From now on nothing arrives in a direction, until [`Self::mend`]. New connections cannot be made.
    pub(super) fn stall(&self, host: ProviderId, direction: Direction) {
        self.wires(host).change(|weather| weather.stalls = Some(direction));
    }

    /// From now on everything is late, until [`Self::mend`].
    pub(super) fn slow_down(&self, host: ProviderId) {
        self.wires(host).change(|weather| weather.is_slow = true);
    }

    /// The next bytes in a direction arrive in part, and their connection breaks.
    pub(super) fn break_off(&self, host: ProviderId, direction: Direction) {
        self.wires(host).change(|weather| weather.breaks = Some(direction));
    }

    /// Breaks the host's streams; new ones can be made at once.
    pub(super) fn hiccup(&self, host: ProviderId) {
        self.cut(host);
        self.lock().cut.remove(&host);
        self.note_change();
    }

    /// A host dials the server.
    pub(super) fn dial(&self, host: ProviderId, protocol: Protocol) -> io::Result<DuplexStream> {
        let wires = self.wires(host);
        let mut state = self.lock();
        // A handshake needs both directions.
        if state.cut.contains(&host) || wires.weather().stalls.is_some() {
            return Err(io::Error::new(io::ErrorKind::NetworkUnreachable, "the network is cut"));
        }
        let Some((handle, control)) = state.server.clone() else {
            return Err(io::Error::new(io::ErrorKind::ConnectionRefused, "the server is down"));
        };
        let cable = state.cables.entry(host).or_default().clone();
        let (near, far, carry) = connect(wires);
        handle.spawn(async move {
            let serve = async {
                tokio::join!(carry, serve(far, host, protocol, control));
            };
            tokio::select! {
                () = cable.cancelled() => {}
                () = serve => {}
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
                Box::pin(async move { control.authorize(host, access).await })
                    as BoxFuture<'_, Result<(), RefusalKind>>
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
