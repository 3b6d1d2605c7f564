//! The home host is lost for good: its VM fails back to another host of the site, where there is nothing of it yet.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use mainstay_lab::{HOME, LabAction, LedgerCopy, Process, RECOVERY, Site, ledger};
use nix::sys::signal::Signal;

use crate::support::{PATIENCE, World, eventually, virsh};

const OTHER: &str = "other";

/// A second host of the protected site, with its agent.
struct OtherHost {
    site: Site,
    agent: Process,
}

impl OtherHost {
    /// Sets a host up and registers it as an administrator does.
    async fn start(world: &World) -> Result<Self> {
        let dir = world.lab.dir();
        let site = Site::open(dir, OTHER).await?;
        site.start().await?;
        let agent = Process::new(dir, "agent-other");
        let other = Self { site, agent };
        let (data, config) = (dir.join(OTHER).join("agent"), dir.join(OTHER).join("agent.toml"));
        fs::create_dir_all(&data)?;
        other.site.account().give(&data)?;
        let driver = other.site.driver_directory_short();
        let network = &world.lab.file().site(HOME)?.network;
        fs::write(
            &config,
            format!(
                "data_dir = {data:?}\nvm_dir = {driver:?}\nrun_dir = {driver:?}\nlibvirt_uri = {:?}\n\
                 networks = [{network:?}]\n",
                other.site.uri()
            ),
        )?;
        other.site.account().give(&config)?;
        let told = world.cli(&["host", "key", "--fabric", HOME]).expect(0);
        // The lab's own, which its account can read.
        let program = dir.join("bin/mainstay").to_string_lossy().into_owned();
        let mut register = other.site.account().command(&program);
        register.args(["agent", "register", "--name", OTHER, "--config"]).arg(&config);
        let registered = register.env("MAINSTAY_REGISTRATION_KEY", told.out.trim()).output().await?;
        ensure!(registered.status.success(), "{}", String::from_utf8_lossy(&registered.stderr));
        let mut run = other.site.account().command(&program);
        run.args(["agent", "run", "--config"]).arg(&config);
        other.agent.start(run)?;
        eventually("the other host is connected", async || {
            let hosts = world.cli(&["host", "list", "--json"]).expect(0).json()?;
            let hosts = hosts.as_array().context("a list")?;
            let other = hosts.iter().find(|host| host["properties"]["friendlyName"] == OTHER);
            let status = other.map(|host| host["properties"]["connectionStatus"].clone());
            ensure!(status.as_ref().is_some_and(|status| status == "Connected"), "it is {status:?}");
            Ok(())
        })
        .await?;
        Ok(other)
    }
}

impl Drop for OtherHost {
    fn drop(&mut self) {
        // The lab does not know of it, and takes down what it knows. It may have ended by itself.
        let _ = self.agent.signal(Signal::SIGKILL);
        self.site.cut_power();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_whose_host_is_lost_fails_back_to_another_host() -> Result<()> {
    let mut world = World::up("other-host").await?;
    let vm = world.guest("vm1", "ledger.rate=10")?;
    world.protect(&vm).await?;
    world.wait_point("vm1").await?;
    world.lab.act(LabAction::Kill, "host:home").await?;
    world.cli(&["failover", "vm1", "--no-shutdown-source"]).expect(0);
    world.whole("vm1", RECOVERY).await?;
    world.cli(&["commit", "vm1"]).expect(0);
    let (_, recovered) = world.lab.vm("vm1", LedgerCopy::Active).await?;

    // Where there is no such VM, one is made only when that is asked for.
    let other = OtherHost::start(&world).await?;
    let home = ["planned-failover", "vm1", "--direction", "RecoveryToPrimary", "--host", OTHER];
    world.cli(&home).expect(1).says("--create-vm");
    world.cli(&[&home[..], &["--create-vm"]].concat()).expect(6);
    let before = ledger::query(world.lab.site(RECOVERY)?, recovered).await?;
    world.cli(&["complete-failover", "vm1"]).expect(0);
    ledger::wait_until_up(&other.site, vm.id, PATIENCE).await?;
    let after = ledger::query(&other.site, vm.id).await?;
    ensure!(after.is_whole() && after.last >= before.acknowledged, "{before:?}, {after:?}");
    world.cli(&["commit", "vm1"]).expect(0);
    world.cli(&["reverse-replicate", "vm1"]).expect(0);
    world.wait_point("vm1").await?;

    // The lost host comes back after all: its copy is an old one, also when somebody starts it there.
    world.lab.act(LabAction::Start, "host:home").await?;
    world.lab.wait_connected(HOME).await?;
    world.wait_event("SourceStoodDown", "the former home host of 'vm1'").await?;
    world.virsh(HOME, &["start", "vm1"])?;
    world.wait_event("OldCopyStopped", "found running on 'home'").await?;
    world.until_off("vm1").await?;
    let state = virsh(&other.site, &["domstate", "vm1"])?;
    ensure!(state.trim() == "running", "the active VM is {state}");
    drop(other);
    world.proved()
}
