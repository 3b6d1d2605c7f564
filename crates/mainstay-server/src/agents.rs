//! The agents' endpoint: one port, mutual TLS, control and data told apart by ALPN.

use std::{collections::HashSet, sync::Arc, time::Duration};

use mainstay_control::Control;
use mainstay_model::{Health, ProviderId};
use mainstay_provider::{RemoteSite, Site};
use mainstay_replication::{Access, serve_connection};
use rustls::ServerConfig;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use crate::authority::{CONTROL_PROTOCOL, DATA_PROTOCOL, certificate_provider};

/// Connections of agents at once: each agent has one for control and a few for data.
const CONNECTIONS_MAX: usize = 4096;
/// A handshake that takes longer is somebody holding a place.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// Pause after a failed accept (out of file descriptors), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves agents until `stop`.
pub(crate) async fn serve(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    control: Arc<Control>,
    stop: CancellationToken,
) {
    let acceptor = TlsAcceptor::from(tls);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
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
                tracing::warn!(%error, "cannot accept an agent's connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (acceptor, control, stop) = (acceptor.clone(), control.clone(), stop.clone());
        tasks.spawn(async move {
            let _place = place;
            tokio::select! {
                () = stop.cancelled() => {}
                () = serve_peer(stream, acceptor, control) => {}
            }
        });
    }
    tasks.close();
    tasks.wait().await;
}

async fn serve_peer(stream: TcpStream, acceptor: TlsAcceptor, control: Arc<Control>) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    let stream = match timeout(HANDSHAKE_MAX, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%error, "a handshake failed"),
        Err(_) => return tracing::debug!("a handshake took too long"),
    };
    let Some(provider) = peer(&stream) else {
        return tracing::warn!("a certificate of ours does not name a host");
    };
    // The certificate may outlive the registration.
    let name = match control.provider(provider).await {
        Ok(record) => record.name,
        Err(error) => {
            return tracing::warn!(%provider, %error, "a host that is not registered was turned away");
        }
    };
    match stream.get_ref().1.alpn_protocol() {
        Some(protocol) if protocol == CONTROL_PROTOCOL => {
            serve_control(stream, provider, name, control).await;
        }
        Some(protocol) if protocol == DATA_PROTOCOL => serve_data(stream, provider, control).await,
        _ => {
            tracing::warn!(%provider, "an agent speaks no protocol that this server knows; update the older one");
        }
    }
}

fn peer(stream: &TlsStream<TcpStream>) -> Option<ProviderId> {
    certificate_provider(stream.get_ref().1.peer_certificates()?.first()?)
}

async fn serve_control(
    stream: TlsStream<TcpStream>,
    provider: ProviderId,
    name: String,
    control: Arc<Control>,
) {
    let (site, run) = RemoteSite::connect(stream);
    let site: Arc<dyn Site> = site;
    control.sites.insert(provider, site.clone());
    tell(
        &control,
        &name,
        "AgentConnected",
        Health::Normal,
        format!("the agent of host '{name}' is connected"),
    )
    .await;
    let refreshing = {
        let control = control.clone();
        // In the connection's own time: the refresh needs the connection to run.
        async move {
            if let Err(error) = control.refresh_provider(provider).await {
                tracing::debug!(%provider, %error, "a host could not be read after it connected");
            }
            control.changed.notify_waiters();
            std::future::pending::<()>().await;
        }
    };
    let ended = tokio::select! {
        ended = run => ended,
        () = refreshing => Ok(()),
    };
    control.sites.remove(provider, &site);
    control.changed.notify_waiters();
    if !control.sites.is_connected(provider) {
        let why = ended.err().map_or_else(String::new, |error| format!(": {error}"));
        let text = format!("the agent of host '{name}' is not connected any more{why}");
        tell(&control, &name, "AgentDisconnected", Health::Warning, text).await;
    }
}

/// Serves a data connection. A host may touch the replicas of the items that it is a side of, and no others.
async fn serve_data(stream: TlsStream<TcpStream>, provider: ProviderId, control: Arc<Control>) {
    let replicas: HashSet<Uuid> = match control.db.items().await {
        Ok(items) => items
            .iter()
            .filter(|item| item.primary_provider == provider || item.recovery_provider == provider)
            .map(|item| item.id.0)
            .collect(),
        Err(error) => return tracing::error!(%error, "a data connection could not be authorised"),
    };
    let authorize = move |access: &Access| replicas.contains(&access.replica);
    match serve_connection(Box::new(stream), &control.store, &authorize).await {
        Ok(report) => {
            metrics::counter!("mainstay_data_bytes_received").increment(report.traffic.received());
            metrics::counter!("mainstay_data_bytes_sent").increment(report.traffic.sent());
        }
        Err(error) => tracing::debug!(%provider, %error, "a data connection ended early"),
    }
}

async fn tell(control: &Control, name: &str, code: &str, severity: Health, text: String) {
    let event = control.event("AgentStatus", code, severity, text, name.to_owned(), String::new());
    if let Err(error) = control.record_event(event).await {
        tracing::error!(%error, "an event could not be recorded");
    }
}
