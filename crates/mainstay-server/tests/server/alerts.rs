//! Mails about what goes wrong, through a mail server that we did not write.

use std::{
    io::{BufRead as _, BufReader, Lines},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::support::Server;
use mainstay_control::{Control, ManualClock};
use mainstay_model::Health;
use mainstay_server::{SmtpConfig, SmtpTls, run_with_clock};
use serde_json::{Value, json};

/// How long something may take that happens in a second on an idle machine.
const PATIENCE: Duration = Duration::from_secs(300);
const MINUTE_MS: i64 = 60_000;

struct MailServer {
    process: Child,
    lines: Option<Lines<BufReader<ChildStdout>>>,
    port: u16,
}

impl Drop for MailServer {
    fn drop(&mut self) {
        // It may have ended by itself, which the test then says.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl MailServer {
    fn start(port: u16, demands: &[&str]) -> Self {
        let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut process = Command::new(crate_dir.join("../../.cache/tools/bin/python"))
            .arg(crate_dir.join("tests/mail_server.py"))
            .arg(port.to_string())
            .args(demands)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let port = lines.next().unwrap().unwrap().parse().unwrap();
        Self { process, lines: Some(lines), port }
    }

    /// The next mail.
    async fn mail(&mut self) -> Value {
        let mut lines = self.lines.take().unwrap();
        let (line, lines) = tokio::task::spawn_blocking(move || (lines.next(), lines)).await.unwrap();
        self.lines = Some(lines);
        serde_json::from_str(&line.unwrap().unwrap()).unwrap()
    }
}

fn smtp(port: u16) -> SmtpConfig {
    SmtpConfig {
        host: "127.0.0.1".to_owned(),
        port: Some(port),
        tls: SmtpTls::None,
        ca_file: None,
        user: None,
        password_file: None,
        sender: "mainstay@example.org".to_owned(),
        owners: vec!["owner@example.org".to_owned()],
    }
}

async fn tell(server: &Server, owners: &str, addresses: &[&str]) {
    let body = json!({ "properties": { "sendToOwners": owners, "customEmailAddresses": addresses } });
    let path = server.at("replicationAlertSettings/defaultAlertSetting");
    let (status, text) = server.send("PUT", &path, Some(body.to_string().into_bytes())).await;
    assert_eq!(status, 200, "{text}");
}

/// Something goes wrong.
async fn goes_wrong(control: &Arc<Control>, severity: Health, what: &str) {
    let event = control.event(
        "VmHealth",
        "HealthChanged",
        severity,
        what.to_owned(),
        "vm1".to_owned(),
        "home".to_owned(),
    );
    control.record_event(event).await.unwrap();
}

async fn events(server: &Server, code: &str) -> Vec<Value> {
    let path = server.at(&format!("replicationEvents?$filter=EventCode%20eq%20'{code}'"));
    let list: Value = server.administrator.get(&path).await.unwrap();
    list["value"].as_array().unwrap().clone()
}

async fn until<T>(what: &str, probe: impl AsyncFn() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn events_are_told_at_once_and_a_storm_in_one_mail_a_minute() {
    let mut mails = MailServer::start(0, &["--refuse", "gone@example.org"]);
    let clock = Arc::new(ManualClock::default());
    let server = Server::start_with(clock.clone(), |config| config.smtp = Some(smtp(mails.port))).await;
    let control = server.records().await;
    tell(&server, "Send", &["gone@example.org"]).await;
    goes_wrong(&control, Health::Normal, "nothing to tell of").await;
    goes_wrong(&control, Health::Critical, "the replica of 'vm1' is lost: größer").await;
    let mail = mails.mail().await;
    assert_eq!(mail["to"], json!(["owner@example.org"]));
    assert_eq!(mail["from"], "mainstay@example.org");
    assert_eq!(mail["subject"], "[Mainstay vault] Critical: the replica of 'vm1' is lost: größer");
    assert!(mail["text"].as_str().unwrap().contains("vm1 (home)"), "{mail}");
    assert!(!mail["text"].as_str().unwrap().contains("nothing to tell of"), "{mail}");
    // One address that is refused for good keeps no mail from the others, and is told of.
    let refusal = until("the refusal", async || events(&server, "AlertDelivery").await.pop()).await;
    assert!(refusal["properties"]["description"].as_str().unwrap().contains("gone@example.org"), "{refusal}");

    tell(&server, "Send", &[]).await;
    for index in 0..500 {
        goes_wrong(&control, Health::Warning, &format!("storm {index}")).await;
    }
    clock.advance_ms(MINUTE_MS);
    let storm = mails.mail().await;
    assert_eq!(storm["subject"], "[Mainstay vault] 500 events");
    assert!(storm["text"].as_str().unwrap().contains("and 400 earlier ones"), "{storm}");

    // Nobody wants to know: what is owed then is told to nobody later.
    tell(&server, "DoNotSend", &[]).await;
    goes_wrong(&control, Health::Critical, "unheard").await;
    clock.advance_ms(MINUTE_MS);
    until("the unheard event to be settled", async || {
        (control.db.owed_alerts().await.unwrap() == 0).then_some(())
    })
    .await;
    tell(&server, "Send", &[]).await;
    goes_wrong(&control, Health::Critical, "heard").await;
    clock.advance_ms(MINUTE_MS);
    assert_eq!(mails.mail().await["subject"], "[Mainstay vault] Critical: heard");
    server.running.stop().await;
}

#[tokio::test]
async fn a_mail_server_that_is_away_gets_everything_later_also_after_a_restart() {
    // A port that nobody listens on, until later.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let clock = Arc::new(ManualClock::default());
    let server = Server::start_with(clock.clone(), |config| config.smtp = Some(smtp(port))).await;
    let control = server.records().await;
    tell(&server, "true", &[]).await;
    goes_wrong(&control, Health::Critical, "first").await;
    let failure =
        until("the failure to be told", async || events(&server, "AlertDelivery").await.pop()).await;
    let text = failure["properties"]["description"].as_str().unwrap();
    assert!(text.contains("cannot be sent") && text.contains("refused"), "{text}");
    goes_wrong(&control, Health::Warning, "second").await;

    let server = server.restart(async || {}).await;
    let mut mails = MailServer::start(port, &[]);
    // The wait after a failure, however often it was tried.
    clock.advance_ms(10 * MINUTE_MS);
    let mail = mails.mail().await;
    assert_eq!(mail["subject"], "[Mainstay vault] 2 events, 1 of them critical");
    assert!(mail["text"].as_str().unwrap().contains("first"), "{mail}");
    server.running.stop().await;
}

#[tokio::test]
async fn the_connection_is_secured_before_anybody_signs_in() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate =
        rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
    let certificate = certificate.self_signed(&key).unwrap();
    let certificate = file("certificate.pem", &certificate.pem());
    let key = file("key.pem", &key.serialize_pem());
    let demands =
        ["--tls", certificate.to_str().unwrap(), key.to_str().unwrap(), "--user", "robot", "pass word"];
    let mut mails = MailServer::start(0, &demands);
    let mut config = smtp(mails.port);
    config.host = "localhost".to_owned();
    config.tls = SmtpTls::StartTls;
    config.user = Some("robot".to_owned());
    config.password_file = Some(file("password", "pass word\n"));
    config.ca_file = Some(certificate);
    let clock = Arc::new(ManualClock::default());
    let server = Server::start_with(clock.clone(), |server| server.smtp = Some(config)).await;
    tell(&server, "DoNotSend", &["night@example.org"]).await;
    goes_wrong(&server.records().await, Health::Critical, "secret").await;
    let mail = mails.mail().await;
    assert_eq!(mail["to"], json!(["night@example.org"]));
    assert_eq!((&mail["is_secured"], &mail["user"]), (&json!(true), &json!("robot")));
    server.running.stop().await;
}

#[tokio::test]
async fn a_configuration_that_cannot_work_is_refused_at_the_start() {
    let server = Server::start(Arc::new(ManualClock::default())).await;
    let mut config = server.config.clone();
    server.running.stop().await;
    let mut refused = async |smtp: SmtpConfig| {
        config.smtp = Some(smtp);
        match run_with_clock(&config, Arc::new(ManualClock::default())).await {
            Ok(_) => panic!("{config:?}"),
            Err(error) => format!("{error:#}"),
        }
    };
    let plain =
        SmtpConfig { user: Some("robot".to_owned()), password_file: Some("/nowhere".into()), ..smtp(25) };
    assert!(refused(plain.clone()).await.contains("over TLS only"));
    assert!(refused(SmtpConfig { tls: SmtpTls::Tls, ..plain.clone() }).await.contains("/nowhere"));
    assert!(refused(SmtpConfig { password_file: None, ..plain }).await.contains("belong together"));
    assert!(refused(SmtpConfig { sender: "nobody".to_owned(), ..smtp(25) }).await.contains("'nobody'"));
}
