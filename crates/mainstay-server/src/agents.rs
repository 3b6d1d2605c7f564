//! The agents' endpoint: one port, mutual TLS, control and data told apart by ALPN.

use std::sync::Arc;

use futures::FutureExt as _;
use mainstay_control::Control;
use mainstay_model::{Health, ItemId, ProviderId};
use mainstay_provider::{RemoteSite, Site};
use mainstay_replication::{Access, serve_connection};
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    authority::{CONTROL_PROTOCOL, DATA_PROTOCOL, certificate_provider},
    listener::{Limits, Secured, listen},
    vaults::Vaults,
};

/// Each agent has one connection for control and a few for data, over which gigabytes go in frames of 256 KiB: in smaller
/// pieces, waking each other costs the two ends more than the bytes.
const LIMITS: Limits = Limits { connections_max: 4096, buffer_bytes: 320 << 10 };

/// Serves agents until `stop`.
pub(crate) async fn serve(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    vaults: Arc<Vaults>,
    stop: CancellationToken,
) {
    let until = stop.clone();
    let serve = move |stream| {
        let (vaults, until) = (vaults.clone(), until.clone());
        async move {
            tokio::select! {
                () = until.cancelled() => {}
                () = serve_peer(stream, &vaults) => {}
            }
        }
    };
    listen(listener, tls, LIMITS, stop, serve).await;
}

async fn serve_peer(stream: Secured, vaults: &Vaults) {
    let Some(provider) = peer(&stream) else {
        return tracing::warn!("a certificate of ours does not name a host");
    };
    // The certificate may outlive the registration.
    let (control, name) = match vaults.hosting(provider).await {
        Ok((vault, name)) => (vault.control.clone(), name),
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

fn peer(stream: &Secured) -> Option<ProviderId> {
    certificate_provider(stream.get_ref().1.peer_certificates()?.first()?)
}

async fn serve_control(stream: Secured, provider: ProviderId, name: String, control: Arc<Control>) {
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
    // The inventory is read at once: the reconciler sees that the agent has arrived.
    control.changed.notify_waiters();
    let ended = run.await;
    control.sites.remove(provider, &site);
    control.changed.notify_waiters();
    if !control.sites.is_connected(provider) {
        let why = ended.err().map_or_else(String::new, |error| format!(": {error}"));
        let text = format!("the agent of host '{name}' is not connected any more{why}");
        tell(&control, &name, "AgentDisconnected", Health::Warning, text).await;
    }
}

/// Serves a data connection. A host may touch the replicas of the items that it is a side of, and no others.
async fn serve_data(stream: Secured, provider: ProviderId, control: Arc<Control>) {
    let authorize = |access: Access| {
        let control = control.clone();
        async move { control.may_touch(provider, ItemId(access.replica)).await }.boxed()
    };
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
