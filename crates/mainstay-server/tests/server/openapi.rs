//! `/api/v1` does what its OpenAPI document says, whatever it is asked.

use std::{net::SocketAddr, path::Path};

use mainstay_api::{Client, Connection};
use mainstay_server::{ServerConfig, initialize, run};
use serde_json::json;
use tokio::process::Command;

/// Requests per operation and phase; more find the same in more time.
const EXAMPLES: &str = "60";
/// Operations that the document has at least.
const OPERATIONS_MIN: usize = 13;

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_asked_is_answered_as_documented() {
    let dir = tempfile::tempdir().unwrap();
    let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
    let config = ServerConfig {
        data_dir: dir.path().join("server"),
        listen: anywhere,
        agent_listen: anywhere,
        // Every operation is also asked with bad tokens, all from one address.
        failed_sign_ins_per_minute: u32::MAX,
        ..ServerConfig::default()
    };
    let made = initialize(&config, "group", "vault").await.unwrap();
    let running = run(&config).await.unwrap();
    let url = format!("https://127.0.0.1:{}", running.api_address.port());
    let token = made.token.unwrap().0;
    let connection =
        Connection { url: url.clone(), authority_pem: made.authority_pem.clone(), token: token.clone() };
    let client = Client::new(&connection).unwrap();
    let fabric = format!("{}/replicationFabrics/home", made.vault.id());
    let job = client.begin(reqwest::Method::PUT, &fabric, Some(&json!({ "properties": {} }))).await.unwrap();
    let ca_file = dir.path().join("ca.pem");
    std::fs::write(&ca_file, &made.authority_pem).unwrap();

    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let settings = std::fs::read_to_string(here.join("tests/schemathesis.toml")).unwrap();
    // What is there, so that not everything is asked of nothing.
    let there = format!("[parameters]\nfabric = \"home\"\njob = \"{}\"\n\n", job.unwrap());
    let settings_file = dir.path().join("schemathesis.toml");
    std::fs::write(&settings_file, there + &settings).unwrap();
    let program = here.join("../../.cache/tools/bin/schemathesis");
    let output = Command::new(&program)
        .arg("--config-file")
        .arg(&settings_file)
        .args(["run", &format!("{url}/api/v1/openapi.json"), "--no-color", "--tls-verify"])
        .arg(&ca_file)
        .args(["--header", &format!("Authorization: Bearer {token}")])
        // The same requests every time: what fails can be looked at again.
        .args(["--generation-deterministic", "--max-examples", EXAMPLES, "--continue-on-failure"])
        .current_dir(dir.path())
        .kill_on_drop(true)
        .output()
        .await
        .unwrap_or_else(|error| panic!("{}: {error}; `make setup` installs it", program.display()));
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    // It really asked: a document without operations would be answered well, too.
    let asked = said.lines().find_map(|line| line.trim().strip_prefix("Operations:"));
    let asked = asked.and_then(|text| text.split_whitespace().next()?.parse::<usize>().ok());
    assert!(asked.is_some_and(|count| count >= OPERATIONS_MIN), "{said}");
    running.stop().await;
}
