//! The server's life: initialise, run, stop.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::Context as _;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use mainstay_control::{
    Clock, SystemClock,
    app::{Role, TokenSecret, VaultRecord},
};
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;
use uuid::Uuid;

use crate::{
    Authority, ServerConfig,
    agents::{self, Agents},
    http::{Api, Limit, Peer, TOKEN_REQUESTS_MAX, router},
    listener::{Limits, Secured, listen},
    smtp::Smtp,
    token_key::TokenKey,
    vaults::{AlertSettings, Vaults, open_control},
};

/// What `server init` made.
pub struct Initialized {
    /// The vault.
    pub vault: VaultRecord,
    /// The first token's secret; `None` if the server had been initialised before.
    pub token: Option<TokenSecret>,
    /// The authority's certificate, PEM.
    pub authority_pem: String,
}

/// Makes the vault, the certificate authority and the first token. Called again it makes nothing anew.
pub async fn initialize(
    config: &ServerConfig,
    resource_group: &str,
    vault: &str,
) -> anyhow::Result<Initialized> {
    let control = open_control(config, None, Arc::new(SystemClock)).await?;
    let authority = Authority::open(&config.data_dir.join("pki"))?;
    let vault = VaultRecord {
        subscription: Uuid::new_v4().to_string(),
        resource_group: resource_group.to_owned(),
        name: vault.to_owned(),
        location: "mainstay".to_owned(),
        tags: BTreeMap::new(),
        etag: None,
    };
    let vault = control.create_vault(vault).await?;
    let token = if control.tokens().await?.is_empty() {
        Some(control.create_token("first administrator", Role::Contributor, None).await?.1)
    } else {
        None
    };
    control.db.close().await;
    Ok(Initialized { vault, token, authority_pem: authority.certificate_pem().to_owned() })
}

/// A running server.
pub struct Running {
    /// Where the API really listens.
    pub api_address: std::net::SocketAddr,
    /// Where agents are really let in.
    pub agent_address: std::net::SocketAddr,
    stop: CancellationToken,
    tasks: TaskTracker,
    vaults: Arc<Vaults>,
}

/// Connections of API clients, whose requests are small.
const CONNECTIONS_MAX: usize = 1024;
const BUFFER_BYTES: usize = 32 << 10;

/// Starts the server; it is ready when this returns.
pub async fn run(config: &ServerConfig) -> anyhow::Result<Running> {
    run_with_clock(config, Arc::new(SystemClock)).await
}

/// Starts the server with another clock than the computer's: for tests of what ends.
pub async fn run_with_clock(config: &ServerConfig, clock: Arc<dyn Clock>) -> anyhow::Result<Running> {
    let name = config.names.first().map_or("localhost", String::as_str);
    // A configuration that cannot work is told before anything begins.
    let alerts = match &config.smtp {
        Some(smtp) => {
            Some(AlertSettings { sender: Arc::new(Smtp::open(smtp, name)?), owners: smtp.owners.clone() })
        }
        None => None,
    };
    let vaults = Arc::new(Vaults::open(config, clock, alerts).await?);
    let pki_dir = config.data_dir.join("pki");
    let authority = Arc::new(Authority::open(&pki_dir)?);
    let token_key = TokenKey::open(&pki_dir)?;
    let (api_tls, agent_tls) = (authority.api_tls(&config.names)?, authority.agent_tls(&config.names)?);
    let api_listener =
        TcpListener::bind(config.listen).await.with_context(|| format!("listen on {}", config.listen))?;
    let agent_listener = TcpListener::bind(config.agent_listen)
        .await
        .with_context(|| format!("listen on {}", config.agent_listen))?;
    let (api_address, agent_address) = (api_listener.local_addr()?, agent_listener.local_addr()?);
    let agent_endpoint = if config.agent_endpoint.is_empty() {
        format!("{name}:{}", agent_address.port())
    } else {
        config.agent_endpoint.clone()
    };
    let request_timeout = Duration::from_secs(u64::from(config.request_timeout_seconds));
    let first = vaults.first();
    let api = Arc::new(Api {
        directory: first.control.clone(),
        tenant: first.record().subscription.clone(),
        vaults: vaults.clone(),
        authority: authority.clone(),
        base_url: format!("https://{name}:{}", api_address.port()),
        agent_endpoint,
        request_timeout,
        shutdown_timeout: Duration::from_secs(u64::from(config.shutdown_timeout_seconds)),
        metrics: metrics_recorder(),
        token_key,
        names: config.names.clone(),
        failed_sign_ins: Limit::new(config.failed_sign_ins_per_minute),
        token_requests: Limit::new(TOKEN_REQUESTS_MAX),
    });
    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();
    let agents = Agents { vaults: vaults.clone(), authority, request_timeout };
    tasks.spawn(agents::serve(agent_listener, agent_tls, agents, stop.clone()));
    tasks.spawn(serve_api(api_listener, api_tls, router(api), request_timeout, stop.clone()));
    let resumed = vaults.start().await?;
    tracing::info!(%api_address, %agent_address, resumed, "the server is ready");
    Ok(Running { api_address, agent_address, stop, tasks, vaults })
}

impl Running {
    /// Returns when another server has taken over the replica store; this one must stop.
    pub async fn superseded(&self) {
        self.vaults.superseded().await;
    }

    /// Stops orderly: no new work, what is under way ends where it can be taken up again.
    pub async fn stop(self) {
        self.vaults.halt().await;
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.vaults.close().await;
        tracing::info!("the server has stopped");
    }
}

/// One recorder for the process, also when several servers run in it (tests).
fn metrics_recorder() -> metrics_exporter_prometheus::PrometheusHandle {
    static HANDLE: std::sync::OnceLock<metrics_exporter_prometheus::PrometheusHandle> =
        std::sync::OnceLock::new();
    HANDLE
        .get_or_init(|| {
            let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
            let handle = recorder.handle();
            if metrics::set_global_recorder(recorder).is_err() {
                tracing::warn!("another metrics recorder was set first; /metrics stays empty");
            }
            handle
        })
        .clone()
}

async fn serve_api(
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    router: axum::Router,
    request_timeout: Duration,
    stop: CancellationToken,
) {
    let until = stop.clone();
    let serve = move |stream: Secured| {
        let (router, until) = (router.clone(), until.clone());
        async move {
            let peer = match stream.get_ref().0.get_ref().peer_addr() {
                Ok(peer) => Peer(peer.ip()),
                Err(error) => {
                    tracing::debug!(%error, "a client was gone before its first request");
                    return;
                }
            };
            let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
                request.extensions_mut().insert(peer);
                router.clone().oneshot(request)
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                // Also how long a connection may wait for its next request.
                .header_read_timeout(request_timeout)
                .serve_connection(TokioIo::new(stream), service);
            tokio::pin!(connection);
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = until.cancelled() => {
                    // Requests under way are answered; idle connections close at once.
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a client's connection ended badly");
            }
        }
    };
    let limits = Limits::new(CONNECTIONS_MAX, BUFFER_BYTES, request_timeout);
    listen(listener, tls, limits, stop, serve).await;
}
