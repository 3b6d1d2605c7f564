//! Who the agent is: a key that never leaves the host, and the certificate that the server signed for it.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use mainstay_api::{
    Client, Connection,
    v1::{RegisterAnswer, RegisterRequest},
};
use mainstay_block::durable::write_private;
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use serde::{Deserialize, Serialize};

/// What a registration key says.
#[derive(Clone, Deserialize)]
pub struct RegistrationKey {
    /// The server's API.
    pub url: String,
    /// The proof.
    secret: String,
    /// The authority's certificate, PEM: the key was handed over by a person, so it can be trusted.
    authority: String,
}

impl RegistrationKey {
    /// Reads a key as `mainstay host key` printed it.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let bytes = URL_SAFE_NO_PAD
            .decode(text.trim())
            .context("the registration key is not whole; copy it again")?;
        serde_json::from_slice(&bytes).context("the registration key is not one of Mainstay's; copy it again")
    }
}

/// What the agent keeps of its registration.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// The host's identifier.
    pub provider: String,
    /// Its fabric.
    pub fabric: String,
    /// Address of the agents' endpoint.
    pub endpoint: String,
    #[serde(skip)]
    dir: PathBuf,
}

const IDENTITY_FILE: &str = "identity.json";
const CERTIFICATE_FILE: &str = "agent.pem";
const KEY_FILE: &str = "agent.key";

fn identity_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("identity")
}

/// Exchanges a registration key for a certificate. The private key is made here and stays here.
pub async fn register(
    data_dir: &Path,
    key: &RegistrationKey,
    host: &str,
    version: &str,
) -> anyhow::Result<Identity> {
    let dir = identity_dir(data_dir);
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let key_pair = KeyPair::generate()?;
    let request = RegisterRequest {
        secret: key.secret.clone(),
        host: host.to_owned(),
        version: version.to_owned(),
        certificate_request: CertificateParams::default().serialize_request(&key_pair)?.pem()?,
    };
    let client = Client::new(&Connection {
        url: key.url.clone(),
        authority_pem: key.authority.clone(),
        token: String::new(),
    })?;
    let answer: RegisterAnswer = client.post("/api/v1/register", &request).await?;
    let identity = Identity {
        provider: answer.provider,
        fabric: answer.fabric,
        endpoint: answer.endpoint,
        dir: dir.clone(),
    };
    write_private(&dir.join(KEY_FILE), key_pair.serialize_pem().as_bytes())?;
    write_private(&dir.join(CERTIFICATE_FILE), answer.certificate.as_bytes())?;
    write_private(&dir.join("ca.pem"), answer.authority.as_bytes())?;
    // Written last: it is there means that the rest is there.
    write_private(&dir.join(IDENTITY_FILE), &serde_json::to_vec_pretty(&identity)?)?;
    Ok(identity)
}

impl Identity {
    /// Reads the identity of a registered agent.
    pub fn load(data_dir: &Path) -> anyhow::Result<Self> {
        let dir = identity_dir(data_dir);
        let path = dir.join(IDENTITY_FILE);
        let text = fs::read_to_string(&path).with_context(|| {
            format!(
                "this agent is not registered ({} is missing): run `mainstay agent register --key KEY`",
                path.display()
            )
        })?;
        let mut identity: Self =
            serde_json::from_str(&text).with_context(|| format!("read {}", path.display()))?;
        identity.dir = dir;
        Ok(identity)
    }

    /// TLS towards the server, with this agent's certificate, for one protocol.
    pub(crate) fn tls(&self, protocol: &[u8]) -> anyhow::Result<Arc<ClientConfig>> {
        let certificate =
            CertificateDer::from_pem_file(self.dir.join(CERTIFICATE_FILE)).context("read agent.pem")?;
        let key = PrivateKeyDer::from_pem_file(self.dir.join(KEY_FILE)).context("read agent.key")?;
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.dir.join("ca.pem")).context("read ca.pem")?)?;
        let mut config =
            ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_protocol_versions(&[&rustls::version::TLS13])?
                .with_root_certificates(roots)
                .with_client_auth_cert(vec![certificate], key)?;
        config.alpn_protocols = vec![protocol.to_vec()];
        Ok(Arc::new(config))
    }

    /// When the certificate begins and ends, seconds since 1970.
    fn validity(&self) -> anyhow::Result<(i64, i64)> {
        let certificate =
            CertificateDer::from_pem_file(self.dir.join(CERTIFICATE_FILE)).context("read agent.pem")?;
        let (_, certificate) = x509_parser::parse_x509_certificate(&certificate).context("read agent.pem")?;
        let validity = certificate.validity();
        Ok((validity.not_before.timestamp(), validity.not_after.timestamp()))
    }

    /// Whether less than a third of the certificate's time is left, and some still is.
    pub(crate) fn is_renewal_due(&self) -> anyhow::Result<bool> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs().try_into()?;
        let (begin, end) = self.validity()?;
        Ok((begin + (end - begin) / 3 * 2..end).contains(&now))
    }

    /// A request for a certificate for the key that this agent has.
    pub(crate) fn certificate_request(&self) -> anyhow::Result<String> {
        let key = fs::read_to_string(self.dir.join(KEY_FILE)).context("read agent.key")?;
        Ok(CertificateParams::default().serialize_request(&KeyPair::from_pem(&key)?)?.pem()?)
    }

    /// Puts a certificate that the server has signed into the place of the present one.
    pub(crate) fn take_certificate(&self, pem: &str) -> anyhow::Result<()> {
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).context("not a certificate")?;
        let key = PrivateKeyDer::from_pem_file(self.dir.join(KEY_FILE)).context("read agent.key")?;
        let key = rustls::crypto::ring::sign::any_supported_type(&key)?;
        rustls::sign::CertifiedKey::new(vec![certificate], key)
            .keys_match()
            .context("not one for this agent's key")?;
        Ok(write_private(&self.dir.join(CERTIFICATE_FILE), pem.as_bytes())?)
    }
}
