//! Secrets stay where they belong: what the real commands do, searched for the tokens, keys and private keys that there are.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::{
    collections::BTreeMap,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::Value;

/// How long anything may take. Far more than it does.
const PATIENCE: Duration = Duration::from_secs(120);

/// The server, which ends with the test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Looks at the command lines of all processes, over and over, for words that must not be there.
struct Watch {
    stop: Arc<AtomicBool>,
    looks: Arc<AtomicUsize>,
    thread: std::thread::JoinHandle<Vec<String>>,
}

impl Watch {
    fn start(secrets: Vec<String>) -> Self {
        let (stop, looks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (until, count) = (stop.clone(), looks.clone());
        let thread = std::thread::spawn(move || {
            let mut found = Vec::new();
            while !until.load(Ordering::Relaxed) {
                for entry in std::fs::read_dir("/proc").unwrap().flatten() {
                    // A process may end while it is looked at.
                    let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
                    let line = String::from_utf8_lossy(&line).into_owned();
                    if secrets.iter().any(|secret| line.contains(secret)) {
                        found.push(line);
                    }
                }
                count.fetch_add(1, Ordering::Relaxed);
            }
            found
        });
        Self { stop, looks, thread }
    }

    /// What was found; at least one whole look was taken since the last command began.
    fn end(self) -> Vec<String> {
        let before = self.looks.load(Ordering::Relaxed);
        while self.looks.load(Ordering::Relaxed) < before + 2 && !self.thread.is_finished() {
            std::thread::yield_now();
        }
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn mainstay(environment: &BTreeMap<&str, String>, words: &[&str], input: Option<&str>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mainstay"));
    command.args(words).envs(environment).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut child = command.spawn().unwrap();
    if let Some(input) = input {
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    }
    child.wait_with_output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn good(output: &Output) -> String {
    assert!(output.status.success(), "{}", said(output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What is within a PEM file's armour, line by line.
fn key_material(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap();
    let lines: Vec<String> = text
        .lines()
        .filter(|line| line.len() > 20 && !line.starts_with("-----"))
        .map(str::to_owned)
        .collect();
    assert!(!lines.is_empty(), "{}", path.display());
    // The first line of a PKCS #8 key says only of what kind it is, as every other.
    lines.into_iter().skip(1).collect()
}

#[test]
fn no_secret_is_in_a_log_a_list_of_processes_or_an_answer() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("server");
    let log = dir.path().join("server.log");
    let file = |name: &str, content: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path.display().to_string()
    };
    // None of anybody's.
    let (vault_key, password) = ("5ec2e7".repeat(11)[..64].to_owned(), "the-mail-servers-5ec2e7");
    let mut environment = BTreeMap::from([
        ("MAINSTAY_SERVER_VAULT_KEY_FILE", file("vault.key", &format!("mainstay-vault-key-1:{vault_key}\n"))),
        ("MAINSTAY_SERVER_SMTP_HOST", "127.0.0.1".to_owned()),
        ("MAINSTAY_SERVER_SMTP_SENDER", "mainstay@example.org".to_owned()),
        ("MAINSTAY_SERVER_SMTP_USER", "mainstay".to_owned()),
        ("MAINSTAY_SERVER_SMTP_PASSWORD_FILE", file("smtp.password", password)),
        ("MAINSTAY_SERVER_DATA_DIR", data.display().to_string()),
        ("MAINSTAY_SERVER_LISTEN", "127.0.0.1:0".to_owned()),
        ("MAINSTAY_SERVER_AGENT_LISTEN", "127.0.0.1:0".to_owned()),
        // The most that anybody turns on.
        ("MAINSTAY_LOG", "trace".to_owned()),
        ("MAINSTAY_LOG_FORMAT", "json".to_owned()),
    ]);
    let made: Value =
        serde_json::from_str(&good(&mainstay(&environment, &["server", "init", "--json"], None))).unwrap();
    let token = made["token"].as_str().unwrap().to_owned();

    let mut command = Command::new(env!("CARGO_BIN_EXE_mainstay"));
    command.args(["server", "run"]).envs(&environment).stderr(std::fs::File::create(&log).unwrap());
    let daemon = Daemon(command.spawn().unwrap());
    let deadline = Instant::now() + PATIENCE;
    let address = loop {
        let text = std::fs::read_to_string(&log).unwrap();
        let ready = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let mut ready = ready.filter(|line| line["fields"]["message"] == "the server is ready");
        if let Some(line) = ready.next() {
            break line["fields"]["api_address"].as_str().unwrap().to_owned();
        }
        assert!(Instant::now() < deadline, "the server is not ready: {text}");
        std::thread::sleep(Duration::from_millis(50));
    };
    let port = address.rsplit_once(':').unwrap().1;
    environment.insert("MAINSTAY_URL", format!("https://localhost:{port}"));
    environment.insert("MAINSTAY_CA_FILE", data.join("pki/ca.pem").display().to_string());
    environment.insert("MAINSTAY_TOKEN", token.clone());
    let cli = |words: &[&str]| mainstay(&environment, words, None);

    good(&cli(&["fabric", "create", "home"]));
    let key = good(&cli(&["host", "key", "--fabric", "home"])).trim().to_owned();
    let whole: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(&key).unwrap()).unwrap();
    let key_secret = whole["secret"].as_str().unwrap().to_owned();
    let second: Value = serde_json::from_str(&good(&cli(&["token", "create", "second", "--json"]))).unwrap();
    let second = second["secret"].as_str().unwrap().to_owned();
    let principal = good(&cli(&["principal", "create", "script", "--role", "Reader", "--json"]));
    let principal: Value = serde_json::from_str(&principal).unwrap();
    let principal = principal["secret"].as_str().unwrap().to_owned();

    let mut secrets = vec![token, key_secret, second, principal, vault_key, password.to_owned()];
    let mut in_lists = secrets.clone();
    in_lists.push(key.clone());
    let watch = Watch::start(in_lists);
    let agent = dir.path().join("agent").display().to_string();
    // By standard input, and by the environment.
    let register = ["agent", "register", "--name", "kvm1", "--data-dir", &agent];
    let registered = mainstay(&environment, &[register.as_slice(), &["--key", "-"]].concat(), Some(&key));
    good(&registered);
    let mut with_key = environment.clone();
    with_key.insert("MAINSTAY_REGISTRATION_KEY", key.clone());
    let mut outputs = vec![said(&registered), said(&mainstay(&with_key, &register, None))];
    // A key that is refused is not repeated; nor is a token.
    let half = &key[..key.len() / 2];
    let refused = mainstay(&environment, &[register.as_slice(), &["--key", "-"]].concat(), Some(half));
    assert!(!refused.status.success() && !said(&refused).contains(&half[40..]), "{}", said(&refused));
    let mut wrong = environment.clone();
    let bent = format!("{}x", &secrets[0][..secrets[0].len() - 1]);
    wrong.insert("MAINSTAY_TOKEN", bent.clone());
    let refused = mainstay(&wrong, &["fabric", "list"], None);
    assert!(!refused.status.success() && !said(&refused).contains(&bent), "{}", said(&refused));
    for words in [
        &["token", "list"] as &[&str],
        &["token", "list", "--json"],
        &["principal", "list"],
        &["principal", "list", "--json"],
        &["host", "list", "--json"],
        &["fabric", "list", "--json"],
        &["vault", "list", "--json"],
        &["job", "list", "--json"],
        &["agent", "register", "--help"],
        &["item", "list", "--help"],
    ] {
        outputs.push(good(&cli(words)));
    }
    assert_eq!(watch.end(), [] as [String; 0], "command lines with secrets");

    for name in ["ca.key", "token.key"] {
        let path = data.join("pki").join(name);
        secrets.extend(key_material(&path));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{name}");
    }
    let agent_key = dir.path().join("agent/identity/agent.key");
    secrets.extend(key_material(&agent_key));
    assert_eq!(std::fs::metadata(&agent_key).unwrap().permissions().mode() & 0o777, 0o600);
    drop(daemon);
    let logged = std::fs::read_to_string(&log).unwrap();
    assert!(
        logged.contains("a host was registered") && logged.contains("TRACE"),
        "the log holds what was done"
    );
    for secret in &secrets {
        assert!(!logged.contains(secret), "the log holds {secret}");
        assert!(outputs.iter().all(|output| !output.contains(secret)), "an answer holds {secret}");
    }
    // Nor does the database hold what opens anything: digests only.
    for entry in std::fs::read_dir(&data).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let bytes = std::fs::read(&path).unwrap();
            let text = String::from_utf8_lossy(&bytes);
            for secret in &secrets {
                assert!(!text.contains(secret), "{} holds {secret}", path.display());
            }
        }
    }
}
