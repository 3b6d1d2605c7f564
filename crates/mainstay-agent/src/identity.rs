//! Who the agent is: a key that never leaves the host, and the certificate that the server signed for it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use mainstay_api::{
    Client, Connection,
    v1::{RegisterAnswer, RegisterRequest},
};
use mainstay_block::durable::{create_directory, write_private};
use mainstay_provider::{Finding, FindingSeverity};
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    CipherSuite, ClientConfig, RootCertStore,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use serde::{Deserialize, Serialize};
use x509_parser::{certificate::Validity, time::ASN1Time};

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

/// The server takes the first cipher suite of an agent that it knows. AES-128 goes first: recovery points by the gigabyte are
/// encrypted here and decrypted there, which took 15 % of the processors' time of both with AES-256 and 13 % with AES-128
/// (docs/benchmarks.md), and nothing that can be done today breaks either.
fn provider() -> CryptoProvider {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
}

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
    create_directory(&dir).with_context(|| format!("create {}", dir.display()))?;
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
        Self::find(data_dir)?.with_context(|| {
            let path = identity_dir(data_dir).join(IDENTITY_FILE);
            format!(
                "this agent is not registered ({} is missing): run `mainstay agent register --key KEY`",
                path.display()
            )
        })
    }

    /// The identity of an agent, if it is registered.
    pub fn find(data_dir: &Path) -> anyhow::Result<Option<Self>> {
        let dir = identity_dir(data_dir);
        let path = dir.join(IDENTITY_FILE);
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.with_context(|| format!("read {}", path.display()))?,
        };
        let mut identity: Self =
            serde_json::from_str(&text).with_context(|| format!("read {}", path.display()))?;
        identity.dir = dir;
        Ok(Some(identity))
    }

    /// TLS towards the server, with this agent's certificate, for one protocol.
    pub(crate) fn tls(&self, protocol: &[u8]) -> anyhow::Result<Arc<ClientConfig>> {
        let certificate =
            CertificateDer::from_pem_file(self.dir.join(CERTIFICATE_FILE)).context("read agent.pem")?;
        let key = PrivateKeyDer::from_pem_file(self.dir.join(KEY_FILE)).context("read agent.key")?;
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.dir.join("ca.pem")).context("read ca.pem")?)?;
        let mut config = ClientConfig::builder_with_provider(Arc::new(provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![certificate], key)?;
        config.alpn_protocols = vec![protocol.to_vec()];
        Ok(Arc::new(config))
    }

    /// When the certificate is valid.
    fn validity(&self) -> anyhow::Result<Validity> {
        let certificate =
            CertificateDer::from_pem_file(self.dir.join(CERTIFICATE_FILE)).context("read agent.pem")?;
        let (_, certificate) = x509_parser::parse_x509_certificate(&certificate).context("read agent.pem")?;
        Ok(certificate.validity().clone())
    }

    /// Whether less than a third of the certificate's time is left, and some still is.
    pub(crate) fn is_renewal_due(&self) -> anyhow::Result<bool> {
        let validity = self.validity()?;
        let (begin, end) = (validity.not_before.timestamp(), validity.not_after.timestamp());
        Ok((begin + (end - begin) / 3 * 2..end).contains(&ASN1Time::now().timestamp()))
    }

    /// What keeps the server from letting this host in, whatever else is right: a certificate that is not valid now.
    pub fn lapse(&self) -> anyhow::Result<Option<Finding>> {
        let (validity, now) = (self.validity()?, ASN1Time::now());
        let (message, remedy) = if now > validity.not_after {
            (
                format!("This host's certificate ended on {}.", validity.not_after),
                "Register the host again: `mainstay host key`, then `mainstay agent register --key KEY` here.",
            )
        } else if now < validity.not_before {
            (
                format!("This host's certificate begins on {}; the clock says {now}.", validity.not_before),
                "Set this host's clock.",
            )
        } else {
            return Ok(None);
        };
        Ok(Some(Finding {
            code: "CertificateNotValid".to_owned(),
            severity: FindingSeverity::Error,
            message,
            remedy: remedy.to_owned(),
        }))
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

#[cfg(test)]
mod tests {
    use time::{Duration, OffsetDateTime};

    use super::*;

    /// An agent whose certificate is valid from so many days from now until so many.
    fn registered(data_dir: &Path, from: i64, until: i64) -> Identity {
        let key = KeyPair::generate().unwrap();
        let now = OffsetDateTime::now_utc();
        let mut params = CertificateParams::default();
        params.not_before = now + Duration::days(from);
        params.not_after = now + Duration::days(until);
        let dir = identity_dir(data_dir);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(CERTIFICATE_FILE), params.self_signed(&key).unwrap().pem()).unwrap();
        fs::write(dir.join(IDENTITY_FILE), br#"{"provider":"p","fabric":"f","endpoint":"vault.example:1"}"#)
            .unwrap();
        Identity::load(data_dir).unwrap()
    }

    #[test]
    fn a_certificate_that_is_not_valid_now_is_told_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Identity::find(dir.path()).unwrap().is_none());
        assert!(Identity::load(dir.path()).unwrap_err().to_string().contains("agent register"));
        assert_eq!(registered(dir.path(), -700, 30).lapse().unwrap(), None);
        let ended = registered(dir.path(), -731, -1).lapse().unwrap().unwrap();
        assert!(ended.message.contains(" ended on ") && ended.remedy.contains("agent register"), "{ended:?}");
        let early = registered(dir.path(), 1, 731).lapse().unwrap().unwrap();
        assert!(early.message.contains(" begins on ") && early.remedy.contains("clock"), "{early:?}");
    }
}
