//! Several vaults in one server: what is in one is in no other, and a vault goes only when it is empty.

use std::{path::PathBuf, sync::Arc};

use crate::support::Server;
use mainstay_api::{
    arm::List,
    v1::{RegisterAnswer, RegistrationKey, Vault},
};
use mainstay_control::{SystemClock, app::HostedVaultRecord};
use serde_json::{Value, json};
use uuid::Uuid;

const NEW: &str = r#"{"location": "westeurope", "sku": {"name": "Standard"}, "tags": {"stage": "test"}}"#;

impl Server {
    fn vault_path(&self, group: &str, name: &str) -> String {
        let tenant = &self.tenant;
        format!(
            "/subscriptions/{tenant}/resourceGroups/{group}/providers/Microsoft.RecoveryServices/vaults/{name}"
        )
    }

    async fn told(&self, method: &str, path: &str, body: Option<&str>) -> (u16, Value) {
        let (status, text) = self.send(method, path, body.map(|body| body.as_bytes().to_vec())).await;
        (status, serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    async fn make_fabric(&self, vault: &str, name: &str) {
        let path = format!("{vault}/replicationFabrics/{name}");
        let (status, answer) = self.told("PUT", &path, Some(r#"{"properties": {}}"#)).await;
        assert!(status < 300, "{answer}");
    }

    async fn fabrics(&self, vault: &str) -> Vec<String> {
        let (status, answer) = self.told("GET", &format!("{vault}/replicationFabrics"), None).await;
        assert_eq!(status, 200, "{answer}");
        let names = answer["value"].as_array().unwrap().iter();
        names.map(|fabric| fabric["name"].as_str().unwrap().to_owned()).collect()
    }

    async fn names(&self) -> Vec<String> {
        let path = format!("/subscriptions/{}/providers/Microsoft.RecoveryServices/vaults", self.tenant);
        let (_, answer) = self.told("GET", &path, None).await;
        let vaults = answer["value"].as_array().unwrap().iter();
        vaults.map(|vault| vault["name"].as_str().unwrap().to_owned()).collect()
    }

    /// Directories of further vaults.
    fn directories(&self) -> Vec<PathBuf> {
        let dirs = [self.config.data_dir.join("vaults"), self.config.data_dir.join("store/vaults")];
        let entries = dirs.iter().filter_map(|dir| std::fs::read_dir(dir).ok()).flatten();
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vault_is_made_changed_and_listed_as_clients_expect() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let second = server.vault_path("Other", "second");
    assert_eq!(server.told("GET", &second, None).await.0, 404);
    for wrong in [
        r#"{"sku": {"name": "Standard"}}"#,
        r#"{"location": 7}"#,
        r#"{"location": "here", "sku": {"name": "Gold"}}"#,
        r#"{"location": "here", "tags": {"a": 1}}"#,
        r#"{"location": "here", "tags": {"": "nameless"}}"#,
    ] {
        let (status, answer) = server.told("PUT", &second, Some(wrong)).await;
        assert_eq!(status, 400, "{wrong}: {answer}");
    }
    assert_eq!(server.told("PUT", &server.vault_path("Other", "..%2f"), Some(NEW)).await.0, 400);
    assert!(server.directories().is_empty());

    let (status, made) = server.told("PUT", &second, Some(NEW)).await;
    assert_eq!(status, 201, "{made}");
    assert_eq!(made["location"], "westeurope");
    assert_eq!(made["properties"]["provisioningState"], "Succeeded");
    assert_eq!(made["tags"], json!({ "stage": "test" }));
    assert_eq!(server.told("GET", &server.vault_path("OTHER", "Second"), None).await, (200, made.clone()));
    assert_eq!(server.names().await, ["vault", "second"]);

    // Again it is an update: the same changes nothing, tags are what the body says, and a vault does not move.
    assert_eq!(server.told("PUT", &second, Some(NEW)).await, (200, made.clone()));
    let (status, answer) = server.told("PUT", &second, Some(r#"{"location": "eastus"}"#)).await;
    assert_eq!((status, answer["error"]["code"].as_str()), (409, Some("InvalidResourceLocation")));
    let (status, tagged) = server.told("PATCH", &second, Some(r#"{"tags": {"stage": "live"}}"#)).await;
    assert_eq!((status, &tagged["tags"]), (200, &json!({ "stage": "live" })));
    assert_ne!(tagged["etag"], made["etag"]);
    assert_eq!(server.told("PATCH", &second, Some("{}")).await, (200, tagged));
    let (_, cleared) = server.told("PUT", &second, Some(r#"{"location": "West Europe"}"#)).await;
    assert_eq!(cleared.get("tags"), None);

    let groups = format!("/subscriptions/{}/resourceGroups", server.tenant);
    let (_, answer) = server.told("GET", &groups, None).await;
    let names: Vec<_> = answer["value"].as_array().unwrap().iter().map(|group| &group["name"]).collect();
    assert_eq!(names, ["group", "Other"]);
    let question = r#"{"type": "Microsoft.RecoveryServices/Vaults", "name": "second"}"#;
    for (group, is_free) in [("other", false), ("group", true)] {
        let path = format!(
            "{groups}/{group}/providers/Microsoft.RecoveryServices/locations/x/checkNameAvailability"
        );
        let (_, answer) = server.told("POST", &path, Some(question)).await;
        assert_eq!(answer["nameAvailable"], is_free, "{group}");
    }
    let listed: List<Vault> = server.administrator.get("/api/v1/vaults").await.unwrap();
    assert_eq!(listed.value.len(), 2);
    let named: Vault = server.administrator.get("/api/v1/vault?vault=other/SECOND").await.unwrap();
    assert_eq!(named, listed.value[1]);
    server.running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_one_vault_is_in_no_other_also_after_a_restart() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let (first, second) = (server.vault.id(), server.vault_path("group", "second"));
    assert_eq!(server.told("PUT", &second, Some(NEW)).await.0, 201);
    server.make_fabric(&first, "home").await;
    server.make_fabric(&second, "home").await;
    server.make_fabric(&second, "away").await;

    // A host belongs to the vault whose key it shows.
    let key: RegistrationKey = server
        .administrator
        .post("/api/v1/fabrics/home/registrationKeys?vault=second", &json!({}))
        .await
        .unwrap();
    let registered = register(&server, &key.key).await;
    let hosts = |vault: &str| format!("{vault}/replicationRecoveryServicesProviders");
    let (_, answer) = server.told("GET", &hosts(&second), None).await;
    assert_eq!(answer["value"][0]["name"], registered.provider);
    let (_, answer) = server.told("GET", &hosts(&first), None).await;
    assert_eq!(answer["value"], json!([]));
    let of_first = "/api/v1/fabrics/away/registrationKeys?vault=vault";
    let unknown = server.administrator.post::<RegistrationKey>(of_first, &json!({})).await;
    assert_eq!(unknown.unwrap_err().status(), Some(404));

    let server = server.restart(async || {}).await;
    assert_eq!(server.fabrics(&first).await, ["home"]);
    assert_eq!(server.fabrics(&second).await, ["away", "home"]);
    let (_, answer) = server.told("GET", &format!("{second}/replicationJobs"), None).await;
    let jobs = answer["value"].as_array().unwrap();
    assert!(jobs.iter().all(|job| job["id"].as_str().unwrap().contains("/vaults/second/")), "{answer}");
    assert!(!jobs.is_empty());
    let name = jobs[0]["name"].as_str().unwrap();
    assert_eq!(server.told("GET", &format!("{first}/replicationJobs/{name}"), None).await.0, 404);
    server.running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vault_is_deleted_only_when_nothing_is_in_it_and_leaves_nothing() {
    let server = Server::start(Arc::new(SystemClock)).await;
    let second = server.vault_path("group", "second");
    assert_eq!(server.told("PUT", &second, Some(NEW)).await.0, 201);
    assert_eq!(server.directories().len(), 2);
    server.make_fabric(&second, "home").await;
    let (status, answer) = server.told("DELETE", &second, None).await;
    assert_eq!(status, 409, "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("fabric 'home'"), "{answer}");
    assert_eq!(server.fabrics(&second).await, ["home"]);
    let (status, _) = server.told("DELETE", &format!("{second}/replicationFabrics/home"), None).await;
    assert!(status < 300);
    assert_eq!(server.told("DELETE", &second, None).await.0, 204);
    assert_eq!(server.told("GET", &second, None).await.0, 404);
    assert_eq!(server.told("GET", &format!("{second}/replicationFabrics"), None).await.0, 404);
    assert_eq!(server.told("DELETE", &second, None).await.0, 204);
    assert!(server.directories().is_empty());

    // The first stays, and a name can be used again.
    let (status, answer) = server.told("DELETE", &server.vault.id(), None).await;
    assert_eq!(status, 409, "{answer}");
    assert_eq!(server.told("PUT", &second, Some(NEW)).await.0, 201);
    assert!(server.fabrics(&second).await.is_empty());

    // A crash in the middle of a deletion: the next start ends it.
    let records = server.records().await;
    let id = records.hosted_vaults().await.unwrap()[0].id;
    let server = server
        .restart(async || {
            records.put_hosted_vault(&HostedVaultRecord { id, is_deleting: true }).await.unwrap();
        })
        .await;
    assert_eq!(server.names().await, ["vault"]);
    assert!(server.directories().is_empty());
    assert!(records.hosted_vaults().await.unwrap().is_empty());
    server.running.stop().await;
}

/// Requests in a vault and its deletion, at once: each either finds the vault or does not, and what was acknowledged kept
/// the vault from being deleted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_to_a_deletion() {
    let server = Arc::new(Server::start(Arc::new(SystemClock)).await);
    for round in 0..8 {
        let second = server.vault_path("group", &format!("round{round}"));
        assert_eq!(server.told("PUT", &second, Some(NEW)).await.0, 201);
        let (writer, path) = (server.clone(), format!("{second}/replicationFabrics/home"));
        let writing =
            tokio::spawn(async move { writer.told("PUT", &path, Some(r#"{"properties": {}}"#)).await.0 });
        let deleted = server.told("DELETE", &second, None).await.0;
        match (writing.await.unwrap(), deleted) {
            (404, 204) => assert_eq!(server.told("GET", &second, None).await.0, 404),
            (200..300, 409) => assert_eq!(server.fabrics(&second).await, ["home"]),
            other => panic!("the writing and the deletion were answered {other:?}"),
        }
    }
}

async fn register(server: &Server, key: &str) -> RegisterAnswer {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    let key: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(key).unwrap()).unwrap();
    let request = rcgen::CertificateParams::default()
        .serialize_request(&rcgen::KeyPair::generate().unwrap())
        .unwrap()
        .pem()
        .unwrap();
    let body = json!({
        "secret": key["secret"], "host": Uuid::new_v4().to_string(), "version": "1", "certificateRequest": request,
    });
    server.administrator.post("/api/v1/register", &body).await.unwrap()
}

/// What the server remembers of a vault is what it has written, whoever wrote beside whom.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tags_that_are_written_at_once_are_remembered_as_they_are_kept() {
    let server = Arc::new(Server::start(Arc::new(SystemClock)).await);
    let path = server.vault.id();
    let mut writers = Vec::new();
    for number in 0..32 {
        let (server, path) = (server.clone(), path.clone());
        writers.push(tokio::spawn(async move {
            let body = format!(r#"{{"tags": {{"writer": "{number}"}}}}"#);
            assert_eq!(server.told("PATCH", &path, Some(&body)).await.0, 200);
        }));
    }
    for writer in writers {
        writer.await.unwrap();
    }
    let kept = server.records().await.vault().await.unwrap();
    let (_, shown) = server.told("GET", &path, None).await;
    assert_eq!(shown["tags"], json!(kept.tags));
    assert_eq!(shown["etag"], format!("W/\"{}\"", kept.etag.unwrap()));
}
