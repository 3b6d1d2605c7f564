//! The built-in certificate authority: its own certificate, the server's, and those of agents.
//!
//! Keys are files that only the server's user can read. An agent's certificate names its provider id as common name; being
//! signed by this authority is what lets it in, and being registered is what lets it do anything.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use mainstay_block::durable::{create_directory, write_private};
use mainstay_model::ProviderId;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData as _, SanType,
};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier},
    sign::CertifiedKey,
};
use time::{Duration, OffsetDateTime};

/// Validity of the authority: longer than any installation should go without a renewal.
const AUTHORITY_DAYS: i64 = 3650;
/// Validity of certificates it signs: two years, the longest that TLS clients commonly accept.
const CERTIFICATE_DAYS: i64 = 730;
/// Certificates are valid from a day before they are made: clocks differ.
const CLOCK_SLACK_DAYS: i64 = 1;

/// The protocols that agents speak on one port, told apart by ALPN.
pub(crate) const CONTROL_PROTOCOL: &[u8] = b"mainstay-control/1";
/// The data plane.
pub(crate) const DATA_PROTOCOL: &[u8] = b"mainstay-data/1";
/// A request for a certificate that lasts longer, answered with it.
pub(crate) const RENEWAL_PROTOCOL: &[u8] = b"mainstay-renewal/1";

/// Why the authority failed.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A certificate could not be made or read.
    #[error("certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// A stored key or certificate cannot be read.
    #[error("{path} is not a PEM file of the expected kind")]
    Pem {
        /// Which.
        path: PathBuf,
    },
    /// TLS cannot be set up with what is there.
    #[error("TLS: {0}")]
    Tls(String),
}

/// The certificate authority.
pub struct Authority {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    certificate_pem: String,
}

pub(crate) fn file_error(path: &Path) -> impl FnOnce(std::io::Error) -> AuthorityError + '_ {
    move |source| AuthorityError::File { path: path.to_owned(), source }
}

/// Writes a secret; an error names the file.
pub(crate) fn write_secret(path: &Path, text: &str) -> Result<(), AuthorityError> {
    write_private(path, text.as_bytes()).map_err(file_error(path))
}

/// Who signed it is told in each certificate: clients that check by RFC 5280 strictly, as Python does since 3.13, ask for it.
fn signed_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.use_authority_key_identifier_extension = true;
    params
}

fn validity(params: &mut CertificateParams, now: OffsetDateTime, days: i64) {
    params.not_before = now - Duration::days(CLOCK_SLACK_DAYS);
    params.not_after = now + Duration::days(days);
}

impl Authority {
    /// Opens the authority in a directory, or makes it.
    pub fn open(dir: &Path) -> Result<Self, AuthorityError> {
        create_directory(dir).map_err(file_error(dir))?;
        let (key_path, certificate_path) = (dir.join("ca.key"), dir.join("ca.pem"));
        if !certificate_path.exists() {
            let key = KeyPair::generate()?;
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, "Mainstay certificate authority");
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            validity(&mut params, OffsetDateTime::now_utc(), AUTHORITY_DAYS);
            let certificate = params.self_signed(&key)?;
            write_secret(&key_path, &key.serialize_pem())?;
            // The certificate is written last: it is there means that the key is there.
            write_secret(&certificate_path, &certificate.pem())?;
        }
        let key = fs::read_to_string(&key_path).map_err(file_error(&key_path))?;
        let key = KeyPair::from_pem(&key).map_err(|_| AuthorityError::Pem { path: key_path })?;
        let certificate_pem = fs::read_to_string(&certificate_path).map_err(file_error(&certificate_path))?;
        let issuer = Issuer::from_ca_cert_pem(&certificate_pem, key)
            .map_err(|_| AuthorityError::Pem { path: certificate_path })?;
        Ok(Self { dir: dir.to_owned(), issuer, certificate_pem })
    }

    /// The authority's certificate, PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Digest of the public key in an agent's request, if it could be signed.
    pub(crate) fn request_key(request_pem: &str) -> Result<String, AuthorityError> {
        let request = CertificateSigningRequestParams::from_pem(request_pem)?;
        Ok(key_digest(request.public_key.der_bytes()))
    }

    /// Signs an agent's request: only its public key is taken from it.
    pub fn sign_agent(&self, request_pem: &str, provider: ProviderId) -> Result<String, AuthorityError> {
        let request = CertificateSigningRequestParams::from_pem(request_pem)?;
        let mut params = signed_params();
        params.distinguished_name.push(DnType::CommonName, provider.to_string());
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        validity(&mut params, OffsetDateTime::now_utc(), CERTIFICATE_DAYS);
        Ok(params.signed_by(&request.public_key, &self.issuer)?.pem())
    }

    /// A certificate for the server under its names, with a new key.
    fn server_certificate(
        &self,
        names: &[String],
        now: OffsetDateTime,
    ) -> Result<CertifiedKey, AuthorityError> {
        let key = KeyPair::generate()?;
        let mut params = signed_params();
        params.distinguished_name.push(DnType::CommonName, "Mainstay server");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        for name in names {
            params.subject_alt_names.push(match name.parse() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(name.as_str().try_into()?),
            });
        }
        validity(&mut params, now, CERTIFICATE_DAYS);
        let certificate = params.signed_by(&key, &self.issuer)?;
        let key = PrivateKeyDer::try_from(key.serialize_der())
            .map_err(|error| AuthorityError::Tls(error.to_owned()))?;
        CertifiedKey::from_der(vec![certificate.der().clone()], key, &Self::provider())
            .map_err(|error| AuthorityError::Tls(error.to_string()))
    }

    fn provider() -> Arc<CryptoProvider> {
        Arc::new(rustls::crypto::ring::default_provider())
    }

    /// TLS for the API: clients authenticate by token.
    pub(crate) fn api_tls(self: &Arc<Self>, names: &[String]) -> Result<Arc<ServerConfig>, AuthorityError> {
        let certificate = ServerCertificate::new(self.clone(), names)?;
        let mut config = ServerConfig::builder_with_provider(Self::provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| AuthorityError::Tls(error.to_string()))?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(certificate));
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    /// TLS for agents: a certificate of this authority is demanded.
    pub(crate) fn agent_tls(self: &Arc<Self>, names: &[String]) -> Result<Arc<ServerConfig>, AuthorityError> {
        let certificate = ServerCertificate::new(self.clone(), names)?;
        let path = self.dir.join("ca.pem");
        let mut roots = RootCertStore::empty();
        let authority = CertificateDer::from_pem_slice(self.certificate_pem.as_bytes())
            .map_err(|_| AuthorityError::Pem { path: path.clone() })?;
        roots.add(authority).map_err(|_| AuthorityError::Pem { path })?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Self::provider())
            .build()
            .map_err(|error| AuthorityError::Tls(error.to_string()))?;
        let mut config = ServerConfig::builder_with_provider(Self::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| AuthorityError::Tls(error.to_string()))?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(certificate));
        config.alpn_protocols =
            [CONTROL_PROTOCOL, DATA_PROTOCOL, RENEWAL_PROTOCOL].map(<[u8]>::to_vec).to_vec();
        Ok(Arc::new(config))
    }
}

/// The server's own certificate: made at its start, and anew when half of its time is over, for servers run for years.
struct ServerCertificate {
    authority: Arc<Authority>,
    names: Vec<String>,
    current: Mutex<(OffsetDateTime, Arc<CertifiedKey>)>,
}

impl ServerCertificate {
    fn new(authority: Arc<Authority>, names: &[String]) -> Result<Self, AuthorityError> {
        let now = OffsetDateTime::now_utc();
        let made = Arc::new(authority.server_certificate(names, now)?);
        Ok(Self { authority, names: names.to_vec(), current: Mutex::new((now, made)) })
    }

    fn at(&self, now: OffsetDateTime) -> Arc<CertifiedKey> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let good = current.0..current.0 + Duration::days(CERTIFICATE_DAYS / 2);
        // Clients do not take one from a time to come: the clock was ahead, and has been set.
        if !good.contains(&now) {
            match self.authority.server_certificate(&self.names, now) {
                Ok(made) => *current = (now, Arc::new(made)),
                Err(error) => tracing::error!(%error, "the server's certificate could not be renewed"),
            }
        }
        current.1.clone()
    }
}

impl ResolvesServerCert for ServerCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.at(OffsetDateTime::now_utc()))
    }
}

impl std::fmt::Debug for ServerCertificate {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("ServerCertificate").field("names", &self.names).finish_non_exhaustive()
    }
}

/// Whom a verified certificate was signed for.
pub(crate) struct CertificateSubject {
    /// The host.
    pub(crate) provider: ProviderId,
    /// Digest of its public key.
    pub(crate) public_key: String,
}

impl CertificateSubject {
    /// Reads it; `None` if the certificate is not one of a host.
    pub(crate) fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
        let name = certificate.subject().iter_common_name().next()?;
        let provider = name.as_str().ok()?.parse().ok()?;
        Some(Self { provider, public_key: key_digest(&certificate.public_key().subject_public_key.data) })
    }
}

fn key_digest(key: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, key);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agents_certificate_names_its_provider_whatever_it_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        Authority::open(dir.path()).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut asked = CertificateParams::default();
        asked.distinguished_name.push(DnType::CommonName, "somebody else");
        let request = asked.serialize_request(&key).unwrap().pem().unwrap();
        let provider = ProviderId(uuid::Uuid::from_u128(7));
        // A second opening finds the same authority.
        let signed = Authority::open(dir.path()).unwrap().sign_agent(&request, provider).unwrap();
        let certificate = CertificateDer::from_pem_slice(signed.as_bytes()).unwrap();
        let subject = CertificateSubject::of(&certificate).unwrap();
        assert_eq!(subject.provider, provider);
        assert_eq!(subject.public_key, Authority::request_key(&request).unwrap());
    }

    #[test]
    fn a_server_that_runs_for_years_has_a_valid_certificate_every_day() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Arc::new(Authority::open(dir.path()).unwrap());
        let certificate = ServerCertificate::new(authority, &["vault.example".to_owned()]).unwrap();
        let start = OffsetDateTime::now_utc();
        let mut made = std::collections::HashSet::new();
        // Five years, and a day of before the server's start.
        for day in (0..5 * 365).chain([-900]) {
            let now = start + Duration::days(day);
            let key = certificate.at(now);
            let (_, parsed) = x509_parser::parse_x509_certificate(&key.cert[0]).unwrap();
            let validity = parsed.validity();
            let now = now.unix_timestamp();
            assert!(
                validity.not_before.timestamp() <= now && now < validity.not_after.timestamp(),
                "day {day}"
            );
            made.insert(key.cert[0].to_vec());
        }
        assert_eq!(made.len(), 6, "one a year, and one more");
    }

    #[test]
    fn keys_are_readable_by_their_owner_only() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        Authority::open(dir.path()).unwrap();
        let mode = fs::metadata(dir.path().join("ca.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
