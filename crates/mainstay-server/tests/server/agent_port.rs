//! The agents' port against those who are no agents, or not the one they should be: over the wire, with a running server.

use std::{io, sync::Arc};

use crate::{
    replay::{Host, until},
    support::{Seed, Server, seed},
};
use mainstay_api::v1::{RegisterAnswer, RegisterRequest, RegistrationKey};
use mainstay_control::{Control, ManualClock, app::REGISTRATION_KEY_HOURS};
use mainstay_model::ProviderId;
use mainstay_server::Authority;
use mainstay_sim::{Oracle, SimHypervisor};
use rcgen::{CertificateParams, DnType, Issuer, KeyPair};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use uuid::Uuid;

const CONTROL: &[u8] = b"mainstay-control/1";
const DATA: &[u8] = b"mainstay-data/1";
const RENEWAL: &[u8] = b"mainstay-renewal/1";

/// What somebody shows at the port.
struct Credentials {
    certificate: String,
    key: KeyPair,
}

impl Server {
    async fn registration_key(&self, fabric: &str) -> String {
        let path = format!("/api/v1/fabrics/{fabric}/registrationKeys");
        let key: RegistrationKey = self.administrator.post(&path, &json!({})).await.unwrap();
        key.key
    }

    async fn key(&self, fabric: &str) -> String {
        use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
        let key = self.registration_key(fabric).await;
        let said: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(key).unwrap()).unwrap();
        said["secret"].as_str().unwrap().to_owned()
    }

    /// Registers as an agent does; asks for a certificate in somebody's name, which must not matter.
    async fn register(
        &self,
        secret: &str,
        host: &str,
        as_whom: &str,
    ) -> Result<(ProviderId, Credentials), (u16, String)> {
        let key = KeyPair::generate().unwrap();
        let mut asked = CertificateParams::default();
        asked.distinguished_name.push(DnType::CommonName, as_whom);
        let request = RegisterRequest {
            secret: secret.to_owned(),
            host: host.to_owned(),
            version: "1".to_owned(),
            certificate_request: asked.serialize_request(&key).unwrap().pem().unwrap(),
        };
        let answer: Result<RegisterAnswer, _> = self.client("").post("/api/v1/register", &request).await;
        let answer = answer.map_err(|error| (error.status().unwrap_or(0), error.to_string()))?;
        Ok((answer.provider.parse().unwrap(), Credentials { certificate: answer.certificate, key }))
    }

    /// A certificate of this server's authority, valid for some days from now (or until some days ago).
    fn certify(&self, provider: ProviderId, days: i64) -> Credentials {
        self.certify_key(KeyPair::generate().unwrap(), provider, days)
    }

    fn certify_key(&self, key: KeyPair, provider: ProviderId, days: i64) -> Credentials {
        let file = |name| std::fs::read_to_string(self.config.data_dir.join("pki").join(name)).unwrap();
        let authority = KeyPair::from_pem(&file("ca.key")).unwrap();
        let issuer = Issuer::from_ca_cert_pem(&file("ca.pem"), authority).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, provider.to_string());
        let now = time::OffsetDateTime::now_utc();
        params.not_before = now - time::Duration::days(10);
        params.not_after = now + time::Duration::days(days);
        Credentials { certificate: params.signed_by(&key, &issuer).unwrap().pem(), key }
    }

    /// A connection as an agent makes it. Its first read tells whether it was let in: with TLS 1.3 the client has done its part
    /// before its certificate is looked at.
    async fn dial(&self, who: Option<&Credentials>, protocol: &[u8]) -> io::Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.authority_pem.as_bytes()).unwrap()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match who {
            Some(who) => {
                let chain = vec![CertificateDer::from_pem_slice(who.certificate.as_bytes()).unwrap()];
                let key = PrivateKeyDer::try_from(who.key.serialize_der()).unwrap();
                config.with_client_auth_cert(chain, key).unwrap()
            }
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = vec![protocol.to_vec()];
        let stream = TcpStream::connect(self.running.agent_address).await?;
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, stream).await
    }

    /// A control connection on which the server has spoken.
    async fn connected(&self, who: &Credentials) -> TlsStream<TcpStream> {
        let mut stream = self.dial(Some(who), CONTROL).await.unwrap();
        hear(&mut stream).await;
        stream
    }

    /// Why the port hangs up on these credentials, on both protocols; panics if it speaks first.
    async fn turned_away(&self, who: Option<&Credentials>) -> String {
        let mut why = String::new();
        for protocol in [CONTROL, DATA] {
            why = match self.dial(who, protocol).await {
                Err(error) => error.to_string(),
                Ok(mut stream) => {
                    // Whoever was hung up on may not be able to write any more, which is as good.
                    let _ = stream.write_all(&hello(Uuid::nil(), &OUTCOME)).await;
                    let mut said = Vec::new();
                    let end = stream.read_to_end(&mut said).await;
                    assert!(said.is_empty(), "the port spoke: {said:?}");
                    end.err().map(|error| error.to_string()).unwrap_or_default()
                }
            };
        }
        why
    }

    async fn still_serves(&self) {
        let listed: Value = self.administrator.get("/subscriptions").await.unwrap();
        assert_eq!(listed["value"].as_array().unwrap().len(), 1);
    }
}

/// What the server says next on a control connection: a heartbeat every two seconds, if nothing else.
async fn hear(stream: &mut TlsStream<TcpStream>) -> Vec<u8> {
    let length = stream.read_u32().await.unwrap();
    let mut said = vec![0; length as usize];
    stream.read_exact(&mut said).await.unwrap();
    said
}

/// Reads until the server hangs up, with or without a farewell.
async fn until_the_end(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Vec<u8> {
    let mut said = Vec::new();
    if let Err(error) = stream.read_to_end(&mut said).await {
        let kinds = [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset];
        assert!(kinds.contains(&error.kind()), "{error}");
    }
    said
}

/// A message of the data plane (`docs/formats/wire.md`).
fn message(kind: u8, tag: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"MSDP".to_vec();
    bytes.extend_from_slice(&[kind, 0, 0, 0]);
    bytes.extend_from_slice(&tag.to_le_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// Purposes of a data connection, as they follow the replica in a hello. Identifiers are 16 and their bytes.
const REPLICATE: [u8; 22] = {
    let mut bytes = [7; 22];
    bytes[0] = 0;
    bytes[1] = 16;
    // Generation 1, no parent, no disks, no fork.
    (bytes[18], bytes[19], bytes[20], bytes[21]) = (1, 0, 0, 0);
    bytes
};
const MOUNT: [u8; 18] = identified(1);
const FETCH: [u8; 23] = {
    let mut bytes = [7; 23];
    bytes[0] = 2;
    bytes[1] = 16;
    // From nothing, no difference, no extra, from the beginning.
    (bytes[18], bytes[19], bytes[20], bytes[21], bytes[22]) = (0, 0, 0, 0, 0);
    bytes
};
const OUTCOME: [u8; 18] = identified(3);

const fn identified(purpose: u8) -> [u8; 18] {
    let mut bytes = [7; 18];
    bytes[0] = purpose;
    bytes[1] = 16;
    bytes
}

fn hello(replica: Uuid, purpose: &[u8]) -> Vec<u8> {
    let payload = [[1, 1, 16].as_slice(), replica.as_bytes(), purpose].concat();
    message(1, 0, &payload)
}

async fn start() -> (Server, Arc<ManualClock>, Arc<Control>, Seed) {
    let clock = Arc::new(ManualClock::default());
    let server = Server::start_with(clock.clone(), |config| config.request_timeout_seconds = 1).await;
    let control = server.records().await;
    let seed = seed(&control).await;
    (server, clock, control, seed)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_valid_certificate_of_this_authority_for_a_registered_host_is_let_in() {
    let (server, _, _, seed) = start().await;
    let why = server.turned_away(None).await;
    assert!(why.contains("CertificateRequired"), "{why}");

    let dir = tempfile::tempdir().unwrap();
    let other = Authority::open(dir.path()).unwrap();
    let key = KeyPair::generate().unwrap();
    let request = CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
    let certificate = other.sign_agent(&request, seed.home).unwrap();
    let why = server.turned_away(Some(&Credentials { certificate, key })).await;
    // It has the name of our authority, but not its key.
    assert!(why.contains("DecryptError") || why.contains("UnknownCA"), "{why}");

    let why = server.turned_away(Some(&server.certify(seed.home, -1))).await;
    assert!(why.contains("CertificateExpired"), "{why}");
    server.turned_away(Some(&server.certify(ProviderId(Uuid::new_v4()), 1))).await;

    let good = server.certify(seed.home, 1);
    server.connected(&good).await;
    // A protocol of tomorrow is none of today's.
    assert!(server.dial(Some(&good), b"mainstay-control/9").await.is_err());
    server.still_serves().await;
    server.running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_touches_the_data_of_its_own_items_only_and_cannot_say_that_it_is_another() {
    let (server, _, _, seed) = start().await;
    let secret = server.key("home").await;
    // It asks for a certificate in the name of the host whose item it wants.
    let (intruder, credentials) = server
        .register(&secret, "intruder", &seed.home.to_string())
        .await
        .unwrap_or_else(|why| panic!("{why:?}"));
    assert_ne!(intruder, seed.home);
    let replica = seed.item.id.0;
    for purpose in [REPLICATE.as_slice(), &MOUNT, &FETCH, &OUTCOME] {
        let mut stream = server.dial(Some(&credentials), DATA).await.unwrap();
        stream.write_all(&hello(replica, purpose)).await.unwrap();
        let said = until_the_end(&mut stream).await;
        assert_eq!(said.get(..5), Some(b"MSDP\x03".as_slice()), "{said:?}");
        assert!(String::from_utf8_lossy(&said).contains("not allowed for this replica"), "{said:?}");
    }
    // Either side of the item is answered; the hello was a good one.
    for provider in [seed.home, seed.recovery] {
        let mut stream = server.dial(Some(&server.certify(provider, 1)), DATA).await.unwrap();
        stream.write_all(&hello(replica, &OUTCOME)).await.unwrap();
        let said = until_the_end(&mut stream).await;
        assert_eq!(said.get(..5), Some(b"MSDP\x02".as_slice()), "{said:?}");
    }
    server.running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_is_removed_is_cut_off_at_once() {
    let (server, _, _, seed) = start().await;
    let secret = server.key("home").await;
    let (provider, credentials) = server.register(&secret, "leaving", "x").await.unwrap();
    let mut control = server.connected(&credentials).await;
    let mut data = server.dial(Some(&credentials), DATA).await.unwrap();
    let mut staying = server.connected(&server.certify(seed.home, 1)).await;
    let path = format!("replicationFabrics/home/replicationRecoveryServicesProviders/{provider}");
    let (status, text) = server.send("DELETE", &server.at(&path), None).await;
    assert!((200..300).contains(&status), "{status} {text}");
    until_the_end(&mut control).await;
    assert!(until_the_end(&mut data).await.is_empty());
    server.turned_away(Some(&credentials)).await;
    // Who stays is not disturbed: one message may have been under way, the next is of now.
    hear(&mut staying).await;
    hear(&mut staying).await;
    server.running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_registration_takes_the_place_of_the_old_certificate() {
    let (server, clock, _, _) = start().await;
    let secret = server.key("home").await;
    let (provider, lost) = server.register(&secret, "kvm1", "x").await.unwrap();
    // As if the answer to the first had been lost: the same key again.
    let (again, first) = server.register(&secret, "kvm1", "x").await.unwrap();
    assert_eq!(provider, again);
    server.turned_away(Some(&lost)).await;
    let mut stream = server.connected(&first).await;

    // Now that it has connected, whoever finds the key cannot become this host with it.
    clock.advance_ms(1000);
    let (status, why) = server.register(&secret, "KVM1", "x").await.err().unwrap();
    assert_eq!(status, 401, "{why}");
    assert!(why.contains("older than that"), "{why}");
    // It still registers another.
    assert_ne!(server.register(&secret, "kvm2", "x").await.unwrap().0, provider);

    let newer = server.key("home").await;
    let (same, second) = server.register(&newer, "kvm1", "x").await.unwrap();
    assert_eq!(same, provider);
    until_the_end(&mut stream).await;
    server.turned_away(Some(&first)).await;
    server.connected(&second).await;

    clock.advance_ms(REGISTRATION_KEY_HOURS * 3_600_000);
    for secret in [secret.as_str(), &newer, &newer[1..], "../../pki/ca.key"] {
        let (status, why) = server.register(secret, "kvm3", "x").await.err().unwrap();
        assert_eq!(status, 401, "{why}");
    }
    server.running.stop().await;
}

/// Days until a certificate ends.
fn days_left(pem: &[u8]) -> i64 {
    let certificate = CertificateDer::from_pem_slice(pem).unwrap();
    let (_, certificate) = x509_parser::parse_x509_certificate(&certificate).unwrap();
    let left =
        certificate.validity().not_after.timestamp() - time::OffsetDateTime::now_utc().unix_timestamp();
    left / 86_400
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_renews_its_certificate_in_time_and_for_its_own_key_only() {
    let (server, clock, ..) = start().await;
    let dir = tempfile::tempdir().unwrap();
    Host::register(dir.path(), "kvm1", &server.registration_key("home").await).await;
    let file = |name: &str| dir.path().join("data/identity").join(name);
    let pem = || std::fs::read(file("agent.pem")).unwrap();
    let identity: Value = serde_json::from_slice(&std::fs::read(file("identity.json")).unwrap()).unwrap();
    let provider: ProviderId = identity["provider"].as_str().unwrap().parse().unwrap();
    let key = || KeyPair::from_pem(&std::fs::read_to_string(file("agent.key")).unwrap()).unwrap();
    // Made ten days ago: with 25 days left nothing is due, with four it is.
    for days in [25, 4] {
        let old = server.certify_key(key(), provider, days).certificate;
        std::fs::write(file("agent.pem"), &old).unwrap();
        let oracle = Arc::new(Oracle::new(clock.clone()));
        let host = Host::run(dir.path(), SimHypervisor::new("kvm1", oracle)).await;
        let path =
            server.at(&format!("replicationFabrics/home/replicationRecoveryServicesProviders/{provider}"));
        until("the agent is connected", async || {
            let host: Value = server.administrator.get(&path).await.unwrap();
            (host["properties"]["connectionStatus"] == "Connected").then_some(())
        })
        .await;
        if days == 4 {
            until("the certificate is renewed", async || (days_left(&pem()) > 700).then_some(())).await;
        }
        host.stop().await;
        assert_eq!(pem() == old.as_bytes(), days == 25);
    }
    // What was signed is good, and serves for the next renewal as well.
    let renewed = Credentials { certificate: String::from_utf8(pem()).unwrap(), key: key() };
    server.connected(&renewed).await;
    let ask = async |request: String| {
        let mut stream = server.dial(Some(&renewed), RENEWAL).await.unwrap();
        // Whoever was hung up on may not be able to write any more, which is as good.
        let _ = stream.write_all(request.as_bytes()).await;
        let _ = stream.shutdown().await;
        until_the_end(&mut stream).await
    };
    let request = |key: &KeyPair| CertificateParams::default().serialize_request(key).unwrap().pem().unwrap();
    assert!(days_left(&ask(request(&renewed.key)).await) > 700);
    for wrong in [request(&KeyPair::generate().unwrap()), String::new(), "x".repeat(1 << 20)] {
        assert!(ask(wrong).await.is_empty());
    }
    server.still_serves().await;
    server.running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_never_ends_a_handshake_is_hung_up_on() {
    let (server, ..) = start().await;
    let mut slow = Vec::new();
    for index in 0..50 {
        let mut stream = TcpStream::connect(server.running.agent_address).await.unwrap();
        if index % 2 == 0 {
            // The beginning of a TLS record that is to have 512 bytes.
            stream.write_all(&[0x16, 3, 1, 2, 0, 1]).await.unwrap();
        }
        slow.push(stream);
    }
    server.still_serves().await;
    for mut stream in slow {
        until_the_end(&mut stream).await;
    }
    server.running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nonsense_ends_its_own_connection_and_nothing_else() {
    let (server, _, _, seed) = start().await;
    let mut plain = TcpStream::connect(server.running.agent_address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    until_the_end(&mut plain).await;

    let credentials = server.certify(seed.home, 1);
    let mut staying = server.connected(&server.certify(seed.recovery, 1)).await;
    let json = |text: &str| [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat();
    let deep =
        format!("{{\"Done\":{{\"id\":1,\"result\":{{\"Ok\":{}{}}}}}}}", "[".repeat(9000), "]".repeat(9000));
    let on_control = [
        u32::MAX.to_be_bytes().to_vec(),
        ((64_u32 << 20) + 1).to_be_bytes().to_vec(),
        json("{\"Start\":{\"id\":1}}"),
        json("\u{0}"),
        json(&deep),
        vec![0; 4],
    ];
    for bytes in on_control {
        let mut stream = server.connected(&credentials).await;
        stream.write_all(&bytes).await.unwrap();
        until_the_end(&mut stream).await;
    }
    let mut oversized = message(1, 0, &[]);
    oversized[16..].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut frame = message(5, 1, &[]);
    frame[16..].copy_from_slice(&(1_u32 << 20).to_le_bytes());
    let frame = [hello(seed.item.id.0, &REPLICATE), frame].concat();
    for bytes in [oversized, frame, vec![0xff; 100], message(5, 0, b"MSFR"), message(1, 0, &[0xff; 200])] {
        let mut stream = server.dial(Some(&credentials), DATA).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        let said = until_the_end(&mut stream).await;
        assert_eq!(said.get(..5), Some(b"MSDP\x03".as_slice()), "it is told why: {said:?}");
    }
    hear(&mut staying).await;
    server.still_serves().await;
    server.running.stop().await;
}
