//! The server itself is lost: its database, its keys, or all of it with the source site.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use mainstay_lab::{HOME, LabAction, RECOVERY};
use serde_json::Value;

use crate::support::{World, eventually};

struct Paths {
    config: String,
    data: PathBuf,
    store: PathBuf,
}

fn paths(world: &World) -> Paths {
    let dir = world.lab.dir();
    Paths {
        config: dir.join("server.toml").display().to_string(),
        data: dir.join("server"),
        store: dir.join("server/store"),
    }
}

/// Removes everything of the server's but the recovery points.
fn lose_state(paths: &Paths) -> Result<()> {
    for entry in fs::read_dir(&paths.data)? {
        let path = entry?.path();
        if path == paths.store {
            continue;
        }
        if path.is_dir() { fs::remove_dir_all(&path)? } else { fs::remove_file(&path)? }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fresh_server_fails_over_from_the_store_alone_when_source_and_server_are_gone() -> Result<()> {
    let mut world = World::up("rebuild").await?;
    let vm = world.guest("vm1", "ledger.rate=20")?;
    world.protect(&vm).await?;
    world.cli(&["item", "set", "vm1", "--target-name", "web-dr"]).expect(0);
    world.wait_point("vm1").await?;
    let before = world.points("vm1")?;
    let paths = paths(&world);
    world.lab.act(LabAction::Kill, "host:home").await?;
    world.lab.act(LabAction::Kill, "server").await?;
    lose_state(&paths)?;

    let store = paths.store.display().to_string();
    let rebuild = ["vault", "rebuild", "--config", &paths.config, "--store", &store, "--json"];
    let made = world.cli(&rebuild).expect(0).json()?;
    let item = &made["vaults"][0]["items"][0];
    assert_eq!(item["name"], "vm1", "{made}");
    ensure!(item["recovery_points"].as_u64() >= Some(before.len() as u64), "{made}");
    // Done again it would put what the store says in the place of what a server says by now.
    world.cli(&rebuild).expect(1).says("is in use");
    world.lab.set_token(made["token"].as_str().context("a token")?)?;
    world.lab.act(LabAction::Start, "server").await?;
    ensure!(before.iter().all(|point| world.points("vm1").is_ok_and(|now| now.contains(point))));
    world.wait_event("VaultRebuilt", "vm1").await?;

    // The recovery site's agent knows the lost server's authority, and nobody else's.
    world.lab.act(LabAction::Stop, "agent:recovery").await?;
    world.lab.register(RECOVERY).await?;
    world.lab.act(LabAction::Start, "agent:recovery").await?;
    world.lab.wait_connected(RECOVERY).await?;
    world.cli(&["failover", "vm1", "--no-shutdown-source"]).expect(0);
    world.whole("web-dr", RECOVERY).await?;
    world.cli(&["commit", "vm1"]).expect(0);
    assert!(world.points("vm1")?.is_empty());
    world.proved()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_server_learns_from_the_store_what_it_has_missed() -> Result<()> {
    let mut world = World::up("restore").await?;
    let vm = world.guest("vm1", "ledger.rate=20")?;
    world.protect(&vm).await?;
    world.wait_point("vm1").await?;
    let paths = paths(&world);
    let backup = world.lab.dir().join("backup");
    let backup_text = backup.display().to_string();
    let copy = ["server", "backup", "--config", &paths.config, &backup_text];
    // Whatever it is, it is not removed.
    let unfinished = world.lab.dir().join("backup.unfinished");
    fs::create_dir(&unfinished)?;
    world.cli(&copy).expect(1).says("was not finished");
    fs::remove_dir(&unfinished)?;
    world.cli(&copy).expect(0);
    world.cli(&copy).expect(1).says("is there already");
    // After the backup: the VM moves to the other site, and the source is switched off by us.
    world.cli(&["failover", "vm1", "--shutdown-source"]).expect(0);
    world.whole("vm1", RECOVERY).await?;
    let restore = ["server", "restore", "--config", &paths.config, &backup_text];
    world.cli(&restore).expect(1).says("stop the server");
    world.lab.act(LabAction::Kill, "server").await?;
    lose_state(&paths)?;
    world.cli(&restore).expect(0);
    // Agents know it: keys and certificates are those of the lost one.
    world.lab.act(LabAction::Start, "server").await?;
    for site in [HOME, RECOVERY] {
        world.lab.wait_connected(site).await?;
    }
    world.wait_event("VaultRebuilt", "vm1").await?;
    // A job whose end the store had not heard of goes on to it first.
    let is_over = |item: &Value| {
        let allowed = item["allowedOperations"].as_array().into_iter().flatten();
        item["activeLocation"] == "Recovery" && allowed.into_iter().any(|operation| operation == "Commit")
    };
    world.wait_item("vm1", "is failed over and can be committed", is_over).await?;
    // The old copy is not started, nor replicated from.
    let state = world.virsh(HOME, &["domstate", "vm1"])?;
    assert_eq!(state.trim(), "shut off");
    world.cli(&["commit", "vm1"]).expect(0);
    world.whole("vm1", RECOVERY).await?;

    // A second server over the same store stops the first.
    let other = world.lab.dir().join("second");
    let second = other.display().to_string();
    world.cli(&["server", "restore", "--data-dir", &second, &backup_text]).expect(0);
    let config = fs::read_to_string(&paths.config)?;
    let lines = config.lines().filter(|line| !line.starts_with("data_dir") && !line.contains("listen = "));
    let lines = lines.chain([r#"listen = "127.0.0.1:0""#, r#"agent_listen = "127.0.0.1:0""#]);
    let mut text = format!("data_dir = {other:?}\nstore_dir = {:?}\n", paths.store);
    text.extend(lines.flat_map(|line| [line, "\n"]));
    let second_config = world.lab.dir().join("second.toml");
    fs::write(&second_config, text)?;
    let mut process = tokio::process::Command::new(env!("CARGO_BIN_EXE_mainstay"))
        .args(["server", "run", "--config"])
        .arg(&second_config)
        .stderr(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    eventually("the first server has stopped", async || {
        let log = fs::read_to_string(world.lab.dir().join("logs/server.log"))?;
        ensure!(log.contains("another server has taken over the replica store; only one"), "{log}");
        Ok(())
    })
    .await?;
    ensure!(process.try_wait()?.is_none(), "the second server has ended as well");
    process.kill().await?;
    world.lab.act(LabAction::Start, "server").await?;
    world.proved()
}
