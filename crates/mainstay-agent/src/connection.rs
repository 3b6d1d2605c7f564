//! The agent's connections: it dials, nothing listens.

use std::{
    convert::Infallible,
    io,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use anyhow::Context as _;
use async_trait::async_trait;
use mainstay_provider::{Site, serve_site};
use mainstay_replication::{BoxStream, Connect};
use rand::Rng as _;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    sync::watch,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use crate::Identity;

/// ALPN of the control channel.
const CONTROL_PROTOCOL: &[u8] = b"mainstay-control/1";
/// ALPN of the data plane.
const DATA_PROTOCOL: &[u8] = b"mainstay-data/1";
/// ALPN of a request for a certificate that lasts longer.
const RENEWAL_PROTOCOL: &[u8] = b"mainstay-renewal/1";
/// How often the certificate's end is looked at: it is renewed months before.
const RENEWAL_LOOK: Duration = Duration::from_secs(24 * 3600);
/// A certificate is a kilobyte.
const CERTIFICATE_BYTES_MAX: u64 = 16 << 10;
/// A dial that takes longer is tried anew.
const DIAL_MAX: Duration = Duration::from_secs(10);
/// First pause after a lost connection; doubles up to the longest.
const RETRY_MIN: Duration = Duration::from_millis(100);
/// Bytes read from a connection, and encrypted for it, at once: more than a frame, which in smaller pieces would wake the
/// other end several times, at a higher cost than that of its bytes.
const BUFFER_BYTES: usize = 320 << 10;
/// Longest pause.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// How to reach the server.
#[derive(Clone)]
pub struct ServerLink {
    address: String,
    name: ServerName<'static>,
    identity: Identity,
    tls: Arc<RwLock<Protocols>>,
    is_connected: watch::Sender<bool>,
}

/// TLS with the agent's certificate, for each protocol.
struct Protocols {
    control: Arc<ClientConfig>,
    data: Arc<ClientConfig>,
    renewal: Arc<ClientConfig>,
}

impl Protocols {
    fn of(identity: &Identity) -> anyhow::Result<Self> {
        Ok(Self {
            control: identity.tls(CONTROL_PROTOCOL)?,
            data: identity.tls(DATA_PROTOCOL)?,
            renewal: identity.tls(RENEWAL_PROTOCOL)?,
        })
    }
}

impl ServerLink {
    /// A link for a registered agent. `address` is `HOST:PORT`.
    pub fn new(identity: &Identity, address: &str) -> anyhow::Result<Self> {
        let (host, _) = address.rsplit_once(':').with_context(|| format!("'{address}' is not HOST:PORT"))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name =
            ServerName::try_from(host).with_context(|| format!("'{address}' has no valid host name"))?;
        Ok(Self {
            address: address.to_owned(),
            name,
            identity: identity.clone(),
            tls: Arc::new(RwLock::new(Protocols::of(identity)?)),
            is_connected: watch::Sender::new(false),
        })
    }

    /// Whether the server is connected, now and from now on.
    pub fn connection(&self) -> watch::Receiver<bool> {
        self.is_connected.subscribe()
    }

    fn tls(&self, protocol: fn(&Protocols) -> &Arc<ClientConfig>) -> Arc<ClientConfig> {
        protocol(&self.tls.read().unwrap_or_else(PoisonError::into_inner)).clone()
    }

    /// Has the server sign a certificate that lasts longer, when a third of the present one's time is left. Connections that
    /// are made from then on show it.
    async fn renew_if_due(&self) -> anyhow::Result<()> {
        if !self.identity.is_renewal_due()? {
            return Ok(());
        }
        let asked = timeout(DIAL_MAX, async {
            let mut stream = self.dial(&self.tls(|tls| &tls.renewal)).await?;
            stream.write_all(self.identity.certificate_request()?.as_bytes()).await?;
            stream.shutdown().await?;
            let mut certificate = String::new();
            stream.take(CERTIFICATE_BYTES_MAX).read_to_string(&mut certificate).await?;
            anyhow::Ok(certificate)
        });
        let certificate = asked.await.context("the server does not answer")??;
        self.identity.take_certificate(&certificate)?;
        *self.tls.write().unwrap_or_else(PoisonError::into_inner) = Protocols::of(&self.identity)?;
        tracing::info!("this host's certificate was renewed");
        Ok(())
    }

    async fn keep_certificate(&self) -> Infallible {
        loop {
            if let Err(error) = self.renew_if_due().await {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "this host's certificate could not be renewed yet"
                );
            }
            tokio::time::sleep(RENEWAL_LOOK).await;
        }
    }

    async fn dial(&self, tls: &Arc<ClientConfig>) -> io::Result<BoxStream> {
        let dialled = timeout(DIAL_MAX, async {
            let stream = TcpStream::connect(&self.address).await?;
            stream.set_nodelay(true)?;
            // The TLS library reads in pieces of 4 KiB, each a system call.
            let stream = BufReader::with_capacity(BUFFER_BYTES, stream);
            let mut stream = TlsConnector::from(tls.clone()).connect(self.name.clone(), stream).await?;
            stream.get_mut().1.set_buffer_limit(Some(BUFFER_BYTES));
            Ok::<_, io::Error>(stream)
        });
        let stream = dialled
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the server does not answer"))??;
        Ok(Box::new(stream))
    }
}

#[async_trait]
impl Connect for ServerLink {
    async fn connect(&self) -> io::Result<BoxStream> {
        self.dial(&self.tls(|tls| &tls.data)).await
    }
}

/// Serves a site to the server until `stop`, dialling again whenever the connection is lost.
pub async fn run(link: ServerLink, site: Arc<dyn Site>, stop: CancellationToken) {
    let mut pause = RETRY_MIN;
    let mut is_told = false;
    loop {
        let session = async {
            let stream = link.dial(&link.tls(|tls| &tls.control)).await?;
            tracing::info!(server = link.address, "connected to the server");
            link.is_connected.send_replace(true);
            tokio::select! {
                served = serve_site(stream, site.clone()) => Ok::<_, io::Error>(served),
                never = link.keep_certificate() => match never {},
            }
        };
        let ended = tokio::select! {
            () = stop.cancelled() => return,
            ended = session => ended,
        };
        link.is_connected.send_replace(false);
        match ended {
            Ok(served) => {
                let error = served.err().map(|error| error.to_string()).unwrap_or_default();
                tracing::warn!(server = link.address, error, "the connection to the server is lost");
                pause = RETRY_MIN;
                is_told = false;
            }
            Err(error) if is_told => {
                tracing::debug!(server = link.address, %error, "the server still cannot be reached");
            }
            Err(error) => {
                tracing::warn!(server = link.address, %error, "the server cannot be reached; trying on");
                // TLS says no more than that the server broke it off.
                match link.identity.lapse() {
                    Ok(None) => {}
                    Ok(Some(finding)) => tracing::error!("{} {}", finding.message, finding.remedy),
                    Err(error) => {
                        tracing::error!(
                            error = format!("{error:#}"),
                            "this host's certificate cannot be read"
                        );
                    }
                }
                is_told = true;
            }
        }
        let jitter = rand::rng().random_range(0.5..1.0);
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause.mul_f64(jitter)) => {}
        }
        pause = (pause * 2).min(RETRY_MAX);
    }
}
