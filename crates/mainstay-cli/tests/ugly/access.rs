//! Wrong keys and wrong words: exit codes that scripts rely on, and texts that help.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use mainstay_lab::HOME;

use crate::support::{World, eventually, run};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mistakes_have_their_exit_codes_and_say_what_to_do() -> Result<()> {
    let world = World::up("access").await?;
    let file = world.lab.file().clone();
    let with_token = |token: &str, arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mainstay"));
        command.args(["--url", &file.url, "--token", token, "--ca-file"]).arg(&file.ca_file);
        command.args(arguments);
        run(command)
    };

    // 5: access.
    with_token(&file.token, &["item", "list"]).expect(0);
    with_token("wrong", &["item", "list"]).expect(5).says("bearer token").says("Check the token");
    let token = |options: &[&str]| -> Result<String> {
        let told = world.cli(&[&["token", "create", "test", "--json"], options].concat()).expect(0);
        Ok(told.json()?["secret"].as_str().context("a secret")?.to_owned())
    };
    let expired = token(&["--days", "0"])?;
    with_token(&expired, &["item", "list"]).expect(5).says("bearer token");
    let reader = token(&["--role", "Reader"])?;
    with_token(&reader, &["policy", "list"]).expect(0);
    with_token(&reader, &["policy", "create", "often"]).expect(5);
    let revoked = world.cli(&["token", "list", "--json"]).expect(0).json()?;
    let digest = |token: &serde_json::Value| token["digest"].as_str().unwrap_or_default().to_owned();
    let of_reader = revoked.as_array().context("a list")?.iter().find(|token| token["role"] == "Reader");
    for token in revoked.as_array().context("a list")?.iter().filter(|token| token["role"] == "Reader") {
        world.cli(&["token", "revoke", &digest(token)]).expect(0);
    }
    assert!(of_reader.is_some());
    with_token(&reader, &["policy", "list"]).expect(5);

    // 4: what is named does not exist.
    world.cli(&["failover", "nobody"]).expect(4).says("there is no replicated item 'nobody'");
    world.cli(&["protect", "nobody", "--policy", "often"]).expect(4).says("there is no VM 'nobody'");
    world.cli(&["policy", "show", "nothing"]).expect(4).says("nothing");
    world.cli(&["job", "show", "0b6a2f4e-7b1f-4c1e-9d55-3a1c3f0a9b77"]).expect(4);
    world.cli(&["host", "key", "--fabric", "nowhere"]).expect(4).says("nowhere");
    world.cli(&["token", "revoke", "abc"]).expect(4);
    let map = ["network", "map", "lan", "lan", "--fabric", "nowhere"];
    world.cli(&map).expect(4).says("there is no fabric 'nowhere'").says(HOME);

    // 2: usage.
    world.cli(&["failover"]).expect(2);
    world.cli(&["planned-failover", "vm1", "--direction", "Sideways"]).expect(2).says("PrimaryToRecovery");
    world.cli(&["policy", "create", "hasty", "--copy-frequency", "1"]).expect(2).says("5");
    world.lab_cli(&["kill", "everything"]).expect(2).says("is not a component");
    world.lab_cli(&["kill", "vm:nobody"]).expect(4).says("no VM 'nobody'");
    world.lab_cli(&["cut", "moon"]).expect(4).says("its sites are: home, recovery");
    world.lab_cli(&["ledger", "nobody"]).expect(4).says("no VM 'nobody'");
    let mut nowhere = Command::new(env!("CARGO_BIN_EXE_mainstay"));
    nowhere.args(["item", "list"]);
    run(nowhere).expect(2).says("which server?");

    registration(&world)?;
    doctor(&world)?;
    second_vault(&world).await?;
    world.proved()
}

/// Keys that register nothing.
fn registration(world: &World) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let register = |key: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mainstay"));
        command
            .args(["agent", "register", "--name", "third", "--key", key, "--data-dir"])
            .arg(scratch.path());
        run(command)
    };
    register("not-a-key").expect(2).says("copy it again");
    let key = world.cli(&["host", "key", "--fabric", HOME]).expect(0).out.trim().to_owned();
    register(&key[..key.len() / 2]).expect(2).says("copy it again");
    // One of another server, or one that was removed here: whole, but unknown.
    let foreign = other_secret(&key)?;
    register(&foreign).expect(5).says("not known to this server").says("mainstay host key");
    let mut unregistered = Command::new(env!("CARGO_BIN_EXE_mainstay"));
    unregistered.args(["agent", "run", "--data-dir"]).arg(scratch.path());
    run(unregistered).expect(1).says("mainstay agent register");
    register(&key).expect(0);
    world.cli(&["host", "remove", "third"]).expect(0);
    Ok(())
}

/// A host joins another vault of the same server: it is seen there, and only there, and the vault stays until it has left.
async fn second_vault(world: &World) -> Result<()> {
    world.cli(&["vault", "create", "second", "--tag", "stage=test"]).expect(0);
    let in_second = |words: &[&str]| world.cli(&[&["--in-vault", "second"], words].concat());
    in_second(&["fabric", "create", "apart"]).expect(0);
    let key = in_second(&["host", "key", "--fabric", "apart"]).expect(0).out.trim().to_owned();
    let scratch = tempfile::tempdir()?;
    let mut register = Command::new(env!("CARGO_BIN_EXE_mainstay"));
    register.args(["agent", "register", "--name", "moved", "--key", &key, "--data-dir"]).arg(scratch.path());
    run(register).expect(0);
    let config = scratch.path().join("agent.toml");
    let text = format!(
        "data_dir = {0:?}\nrun_dir = {0:?}\nlibvirt_uri = {1:?}\n",
        scratch.path(),
        world.lab.site(HOME)?.uri()
    );
    std::fs::write(&config, text)?;
    let mut agent = tokio::process::Command::new(env!("CARGO_BIN_EXE_mainstay"));
    let mut agent = agent.args(["agent", "run", "--config"]).arg(&config).kill_on_drop(true).spawn()?;
    eventually("the host is connected to its vault", async || {
        let hosts = in_second(&["host", "list", "--json"]).expect(0).json()?;
        ensure!(hosts[0]["properties"]["connectionStatus"] == "Connected", "{hosts}");
        Ok(())
    })
    .await?;
    ensure!(!world.cli(&["host", "list"]).expect(0).out.contains("moved"));
    ensure!(!world.cli(&["fabric", "list"]).expect(0).out.contains("apart"));
    world.cli(&["vault", "delete", "second"]).expect(3).says("host 'moved'");
    in_second(&["host", "remove", "moved"]).expect(0);
    agent.kill().await?;
    in_second(&["fabric", "delete", "apart"]).expect(0);
    world.cli(&["vault", "delete", "second"]).expect(0);
    in_second(&["fabric", "list"]).expect(4).says("second");
    let vaults = world.cli(&["vault", "list", "--json"]).expect(0).json()?;
    assert_eq!(vaults.as_array().context("a list")?.len(), 1);
    Ok(())
}

/// A registration key with another secret.
fn other_secret(key: &str) -> Result<String> {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    let mut value: serde_json::Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(key)?)?;
    value["secret"] = "another".into();
    Ok(URL_SAFE_NO_PAD.encode(value.to_string()))
}

/// What a host is told about itself.
fn doctor(world: &World) -> Result<()> {
    let config = world.lab.dir().join(HOME).join("agent.toml");
    let doctor = |options: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mainstay"));
        command.args(["agent", "doctor", "--config"]).arg(&config).args(options);
        run(command)
    };
    let told = doctor(&["--json"]);
    let facts = told.json()?;
    // The machine that runs the tests may be confined, or have its lab in memory: both are said, and make it unfit.
    let findings = facts["findings"].as_array().context("a list")?;
    let errors: Vec<_> = findings.iter().filter(|finding| finding["severity"] == "Error").collect();
    let known = ["InstantRecoveryUnavailable", "DirectoryVolatile"];
    assert!(errors.iter().all(|finding| known.iter().any(|code| finding["code"] == *code)), "{errors:?}");
    let exit = i32::from(!errors.is_empty());
    told.expect(exit);
    let told = doctor(&[]).expect(exit);
    for word in
        ["hypervisor:    QEMU", "managed by:    libvirt", "acceleration:", "free space:", "InstantRecovery"]
    {
        assert!(told.out.contains(word), "{word} is not in {}", told.out);
    }
    let capabilities = facts["capabilities"].as_array().context("a list")?;
    for capability in capabilities {
        let is_available = capability["is_available"].as_bool().context("a word")?;
        let reason = capability["reason"].as_str().context("a reason")?;
        assert_eq!(is_available, reason.is_empty(), "{capability}");
    }
    // What confines QEMU on this machine is what is said about it.
    let confined = std::path::Path::new("/sys/kernel/security/apparmor").exists()
        && world.virsh(HOME, &["capabilities"])?.contains("<model>apparmor</model>");
    let instant = capabilities.iter().find(|capability| capability["name"] == "InstantRecovery");
    let instant = instant.context("InstantRecovery")?;
    if confined {
        assert!(instant["is_available"] == true || instant["reason"].to_string().contains("AppArmor"));
    } else {
        assert_eq!(instant["is_available"], true);
    }

    // A host whose libvirt does not run, and settings that make no sense.
    doctor(&["--libvirt-uri", "qemu:///session?socket=/nonexistent"]).expect(1).says("libvirt");
    let text = std::fs::read_to_string(&config)?;
    for (line, words) in [
        ("isolated_networks = [\"lab\"]", "write bridge:NAME"),
        ("isolated_networks = [\"mcast:10.0.0.1:9\"]", "multicast"),
        ("no_such_key = 1", "no_such_key"),
    ] {
        std::fs::write(&config, format!("{text}{line}\n"))?;
        doctor(&[]).expect(2).says(words);
    }
    std::fs::write(&config, text)?;
    Ok(())
}
