//! The lab that a measurement is made in, and what several measurements do with it.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use mainstay_lab::{HOME, Item, Lab, LabAction, LabOptions, LedgerCopy, LedgerVm, Point, RECOVERY, ledger};
use mainstay_provider::PowerState;
use reqwest::Method;
use serde_json::{Value, json};

/// How long a guest may take to answer after a start, in software emulation on a busy machine.
pub(crate) const GUEST_TIMEOUT: Duration = Duration::from_secs(180);
/// How often a change is looked for whose time is measured: a hundredth of the smallest time that matters here.
const LOOK: Duration = Duration::from_millis(10);
/// How long one look may take.
const LOOK_MAX: Duration = Duration::from_secs(5);

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scale {
    /// What `docs/benchmarks.md` records.
    Full,
    /// Just enough to see that the measurement works.
    Quick,
}

impl Scale {
    pub(crate) fn pick<T>(self, full: T, quick: T) -> T {
        match self {
            Self::Full => full,
            Self::Quick => quick,
        }
    }
}

/// A lab with no guests yet.
pub(crate) struct Stand {
    pub(crate) lab: Lab,
    dir: PathBuf,
}

impl Stand {
    /// Brings a lab up in a directory, has it used, and takes it down whatever happened.
    pub(crate) async fn with<T>(dir: &Path, work: impl AsyncFnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let options = LabOptions::without_guests(program()?)?;
        let outcome = match Lab::up(dir, &options).await {
            Ok(lab) => work(&mut Self { lab, dir: dir.to_owned() }).await,
            Err(error) => Err(error.context("the lab does not come up")),
        };
        if let (Err(_), Some(kept)) = (&outcome, std::env::var_os("MAINSTAY_BENCH_LOGS")) {
            // The lab's directory goes with the lab.
            crate::tool::run("cp", &["-r", crate::tool::text(&dir.join("logs"))?, &kept.to_string_lossy()])
                .await?;
        }
        Lab::down(dir).await.context("take the lab down")?;
        outcome
    }

    /// A directory for what is no part of the lab, on the same file system, open to the lab's account.
    pub(crate) fn beside(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir.join(name);
        std::fs::create_dir_all(&path)?;
        self.lab.site(HOME)?.account().give(&path)?;
        Ok(path)
    }

    /// Makes a guest and waits until it answers.
    pub(crate) async fn guest(&mut self, vm: LedgerVm) -> Result<()> {
        let name = vm.name.clone();
        let vm = LedgerVm { network: Some(self.lab.network(HOME)?), ..vm };
        self.lab.add(&vm, &|_, _| Ok(())).await?;
        self.lab.ledger(&name, LedgerCopy::Active, GUEST_TIMEOUT).await?;
        Ok(())
    }

    /// Makes a guest that commits `rate` records a second and has a file of `file_mib` MiB of noise on its first disk.
    pub(crate) async fn filled_guest(
        &mut self,
        name: &str,
        rate: u32,
        file_mib: u64,
        disk_mib: u64,
    ) -> Result<()> {
        let options = format!("ledger.rate={rate} ledger.ring_mib=4");
        self.guest(LedgerVm { disk_mib, options, ..LedgerVm::new(name) }).await?;
        self.load(name, &format!("fill {file_mib}"), Duration::from_secs(1)).await?;
        Ok(())
    }

    /// Runs `ledger load` in the copy of a guest that is in production. `time` is how long it takes by itself.
    pub(crate) async fn load(&self, vm: &str, words: &str, time: Duration) -> Result<Value> {
        let (site, id) = self.lab.vm(vm, LedgerCopy::Active).await?;
        let arguments: Vec<&str> = ["load"].into_iter().chain(words.split(' ')).collect();
        let answer = ledger::run_in_guest_for(site, id, "/usr/bin/ledger", &arguments, time).await?;
        serde_json::from_str(&answer).with_context(|| format!("the answer of `ledger load {words}`"))
    }

    /// Kills the source as a crash would, requests a failover, and answers how long after its acceptance the VM ran at the
    /// recovery site. The job has ended well when this returns.
    pub(crate) async fn fail_over(&mut self, item: &Item, vm: &str) -> Result<Duration> {
        self.lab.act(LabAction::Kill, &format!("vm:{vm}@{HOME}")).await?;
        let body = json!({ "properties": { "failoverDirection": "PrimaryToRecovery", "sourceSiteOperations": "NotRequired",
            "providerSpecificDetails": { "instanceType": "HyperVReplicaAzure", "recoveryPointId": "LatestProcessed" } } });
        let job = item.begin(Method::POST, "unplannedFailover", &body).await?;
        let accepted = Instant::now();
        let site = self.lab.site(RECOVERY)?;
        let running = async {
            loop {
                if let Some(id) = site.libvirt().find_by_name(vm).await?
                    && site.libvirt().state(id).await?.power == PowerState::Running
                {
                    return anyhow::Ok(accepted.elapsed());
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::pin!(running);
        // A job that fails must not be waited for.
        let elapsed = tokio::select! {
            biased;
            elapsed = &mut running => elapsed?,
            job = item.finish(&job) => {
                job?;
                // The job may have ended while libvirt was being asked.
                let late = tokio::time::timeout(LOOK_MAX, &mut running).await;
                late.with_context(|| format!("the failover ended, but '{vm}' does not run at the recovery site"))??
            }
        };
        item.finish(&job).await?;
        Ok(elapsed)
    }
}

/// Protects a guest and waits until it is protected.
pub(crate) async fn protect(lab: &Lab, vm: &str, copy_frequency_seconds: u32) -> Result<Item> {
    let policy = format!("every-{copy_frequency_seconds}-s");
    let item = Item::protect_under(lab, vm, &policy, copy_frequency_seconds, 0).await?;
    item.wait("protection", |item| item.protection_state == "Protected").await?;
    Ok(item)
}

/// The newest point that was taken after a moment, as soon as there is one.
pub(crate) async fn point_after(item: &Item, time_ms: i64) -> Result<Point> {
    item.wait_points(time_ms, 1).await?.pop().context("a recovery point")
}

/// The bytes that all cycles moved so far. A point is there before its cycle is accounted for: waits for that.
pub(crate) async fn bytes_moved(item: &Item) -> Result<u64> {
    let deadline = Instant::now() + GUEST_TIMEOUT;
    loop {
        let status = item.status().await?;
        if status.cycle.is_none() {
            return Ok(status.bytes_moved);
        }
        if Instant::now() > deadline {
            bail!("a replication cycle does not end");
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// The `mainstay` that was built with this program.
fn program() -> Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name("mainstay");
    if !path.exists() {
        bail!("{} is missing; `cargo xtask bench` builds both", path.display());
    }
    Ok(path)
}

/// Milliseconds since the Unix epoch.
pub(crate) fn now_ms() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}
