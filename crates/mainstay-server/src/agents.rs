//! The agents' endpoint: one port, mutual TLS, control and data told apart by ALPN.

use std::{sync::Arc, time::Duration};

use anyhow::{anyhow, ensure};
use futures::FutureExt as _;
use mainstay_control::Control;
use mainstay_model::{Health, ProviderId};
use mainstay_provider::{RemoteSite, Site};
use mainstay_replication::{Access, serve_connection};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    sync::watch,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    Authority,
    authority::{CONTROL_PROTOCOL, CertificateSubject, DATA_PROTOCOL, RENEWAL_PROTOCOL},
    listener::{Limits, Secured, listen},
    vaults::Vaults,
};

/// Each agent has one connection for control and a few for data, over which gigabytes go in frames of 256 KiB: in smaller
/// pieces, waking each other costs the two ends more than the bytes.
const CONNECTIONS_MAX: usize = 4096;
const BUFFER_BYTES: usize = 320 << 10;

/// A request for a certificate is a key and its signature.
const RENEWAL_BYTES_MAX: u64 = 16 << 10;

/// What agents are served with.
#[derive(Clone)]
pub(crate) struct Agents {
    pub(crate) vaults: Arc<Vaults>,
    pub(crate) authority: Arc<Authority>,
    pub(crate) request_timeout: Duration,
}

/// Serves agents until `stop`.
pub(crate) async fn serve(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    agents: Agents,
    stop: CancellationToken,
) {
    let until = stop.clone();
    let limits = Limits::new(CONNECTIONS_MAX, BUFFER_BYTES, agents.request_timeout);
    let serve = move |stream| {
        let (agents, until) = (agents.clone(), until.clone());
        async move {
            tokio::select! {
                () = until.cancelled() => {}
                () = serve_peer(stream, &agents) => {}
            }
        }
    };
    listen(listener, tls, limits, stop, serve).await;
}

async fn serve_peer(stream: Secured, agents: &Agents) {
    let vaults = &*agents.vaults;
    let Some(subject) = subject(&stream) else {
        return tracing::warn!("a certificate of ours does not name a host");
    };
    let provider = subject.provider;
    let (control, name, mut registrations) = match admit(&subject, vaults).await {
        Ok(admitted) => admitted,
        Err(why) => return tracing::warn!(%provider, why, "a host was turned away"),
    };
    let removed = async {
        while registrations.changed().await.is_ok() {
            if let Err(why) = admit(&subject, vaults).await {
                return why;
            }
        }
        "the vault is closed".to_owned()
    };
    let serve = async {
        match stream.get_ref().1.alpn_protocol() {
            Some(protocol) if protocol == CONTROL_PROTOCOL => {
                serve_control(stream, provider, name, control).await;
            }
            Some(protocol) if protocol == DATA_PROTOCOL => serve_data(stream, provider, control).await,
            Some(protocol) if protocol == RENEWAL_PROTOCOL => {
                let renewed =
                    timeout(agents.request_timeout, renew(stream, &subject, &agents.authority)).await;
                match renewed.unwrap_or_else(|_| Err(anyhow!("it took too long"))) {
                    Ok(()) => {
                        let text = format!("the certificate of host '{name}' was renewed");
                        tell(&control, &name, "CertificateRenewed", Health::Normal, text).await;
                    }
                    Err(why) => tracing::warn!(%provider, %why, "a host's certificate was not renewed"),
                }
            }
            _ => {
                tracing::warn!(%provider, "an agent speaks no protocol that this server knows; update the older one");
            }
        }
    };
    tokio::select! {
        why = removed => tracing::warn!(%provider, why, "a host's connection was ended"),
        () = serve => {}
    }
}

/// The control plane that a host belongs to, its name there, and what says when to ask again; or why it may not connect.
/// The certificate may outlive the registration, and another one may have taken its place.
async fn admit(
    subject: &CertificateSubject,
    vaults: &Vaults,
) -> Result<(Arc<Control>, String, watch::Receiver<()>), String> {
    let asked = vaults.hosting(subject.provider).await;
    let vault = asked.map_err(|error| error.to_string())?;
    // Watched before the host is looked at, so that no removal falls between.
    let registrations = vault.control.sites.watch_registrations();
    let host = vault.control.provider(subject.provider).await.map_err(|error| error.to_string())?;
    if host.public_key.as_ref().is_some_and(|known| *known != subject.public_key) {
        return Err(format!(
            "host '{}' has been registered again since this certificate was signed",
            host.name
        ));
    }
    Ok((vault.control.clone(), host.name, registrations))
}

fn subject(stream: &Secured) -> Option<CertificateSubject> {
    CertificateSubject::of(stream.get_ref().1.peer_certificates()?.first()?)
}

/// A host that is connected until this is dropped.
struct Connected {
    control: Arc<Control>,
    provider: ProviderId,
    site: Arc<dyn Site>,
}

impl Connected {
    fn new(control: Arc<Control>, provider: ProviderId, site: Arc<dyn Site>) -> Self {
        control.sites.insert(provider, site.clone());
        Self { control, provider, site }
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.control.sites.remove(self.provider, &self.site);
        self.control.changed.notify_waiters();
    }
}

async fn serve_control(stream: Secured, provider: ProviderId, name: String, control: Arc<Control>) {
    if let Err(error) = control.note_connection(provider).await {
        return tracing::error!(%provider, %error, "a host's connection could not be noted; it was ended");
    }
    let (site, run) = RemoteSite::connect(stream);
    let connected = Connected::new(control.clone(), provider, site);
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
    drop(connected);
    if !control.sites.is_connected(provider) {
        let why = ended.err().map_or_else(String::new, |error| format!(": {error}"));
        let text = format!("the agent of host '{name}' is not connected any more{why}");
        tell(&control, &name, "AgentDisconnected", Health::Warning, text).await;
    }
}

/// Answers a host's request for a certificate with one for the same key: another key is a new registration.
async fn renew(
    mut stream: Secured,
    subject: &CertificateSubject,
    authority: &Authority,
) -> anyhow::Result<()> {
    let mut request = String::new();
    (&mut stream).take(RENEWAL_BYTES_MAX).read_to_string(&mut request).await?;
    ensure!(Authority::request_key(&request)? == subject.public_key, "it asks for another key");
    stream.write_all(authority.sign_agent(&request, subject.provider)?.as_bytes()).await?;
    Ok(stream.shutdown().await?)
}

/// Serves a data connection. A host may touch the replicas of the items that it is a side of, and no others.
async fn serve_data(stream: Secured, provider: ProviderId, control: Arc<Control>) {
    let authorize = |access: Access| {
        let control = control.clone();
        async move { control.authorize(provider, access).await }.boxed()
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
