//! A replica store that is encrypted: from the first byte, only with its key, and with another one later.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use crate::support::Server;
use mainstay_control::SystemClock;
use mainstay_server::{ServerConfig, create_vault_key, rebuild, run_with_clock};

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

async fn start_and_stop(config: &ServerConfig) -> Result<(), String> {
    match run_with_clock(config, Arc::new(SystemClock)).await {
        Ok(running) => {
            running.stop().await;
            Ok(())
        }
        Err(error) => Err(format!("{error:#}")),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_is_read_with_its_key_and_with_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let key = |name: &str| dir.path().join(name);
    let first = create_vault_key(&key("first")).unwrap();
    let second = create_vault_key(&key("second")).unwrap();
    assert_eq!(std::fs::metadata(key("first")).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(create_vault_key(&key("first")).is_err(), "a key is never overwritten");

    let server =
        Server::start_with(Arc::new(SystemClock), |config| config.vault_key_file = Some(key("first"))).await;
    let path = format!("{}/replicationFabrics/paris", server.vault.id());
    let (status, answer) = server.send("PUT", &path, Some(br#"{"properties": {}}"#.to_vec())).await;
    assert!(status < 300, "{answer}");
    let config = server.config.clone();
    // Written a moment after what it is about.
    let catalogue = config.store_dir().join("v1/catalogue/resources");
    tokio::time::timeout(PATIENCE, async {
        while !catalogue.exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("the catalogue is written");
    let server = server
        .restart(async || {
            let stored = files(&config.store_dir());
            assert!(stored.len() > 1);
            for path in stored {
                let bytes = std::fs::read(&path).unwrap();
                let is_sealed = bytes.starts_with(b"MSSEALD1");
                assert!(is_sealed || path.ends_with("v1/keyring"), "{}", path.display());
                assert!(!bytes.windows(5).any(|found| found == b"paris"), "{}", path.display());
            }
            let with = |key_file: Option<&str>, former: &[&str]| ServerConfig {
                vault_key_file: key_file.map(key),
                former_vault_key_files: former.iter().map(|name| key(name)).collect(),
                ..config.clone()
            };
            let refused = start_and_stop(&with(None, &[])).await.unwrap_err();
            assert!(refused.contains(&first) && refused.contains("vault_key_file"), "{refused}");
            let refused = start_and_stop(&with(Some("second"), &[])).await.unwrap_err();
            assert!(refused.contains(&first) && refused.contains(&second), "{refused}");
            let refused = start_and_stop(&with(Some("missing"), &[])).await.unwrap_err();
            assert!(refused.contains("missing"), "{refused}");

            // From the store alone, and the key.
            let fresh = |key_file| ServerConfig {
                data_dir: dir.path().join("fresh"),
                store_dir: Some(config.store_dir()),
                ..with(key_file, &[])
            };
            assert!(rebuild(&fresh(None)).await.is_err());
            let rebuilt = rebuild(&fresh(Some("first"))).await.unwrap();
            assert_eq!(rebuilt.vaults.len(), 1);

            start_and_stop(&with(Some("second"), &["first"])).await.unwrap();
            assert!(start_and_stop(&with(Some("first"), &[])).await.is_err());
            start_and_stop(&with(Some("first"), &["second"])).await.unwrap();
        })
        .await;
    let (status, answer) = server.send("GET", &path, None).await;
    assert!(status == 200 && answer.contains("paris"), "{answer}");
    server.running.stop().await;
}
