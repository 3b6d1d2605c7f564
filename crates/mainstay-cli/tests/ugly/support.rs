//! What the tests stand on: a lab, the command line, and waiting for things to happen.

#![expect(clippy::print_stderr, reason = "a failed test tells what the lab's parts logged")]

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use mainstay_api::v1::ItemStatus;
use mainstay_lab::{HOME, Lab, LabOptions, LedgerCopy, LedgerVm, RECOVERY, Site, ledger};
use serde_json::Value;

/// How long anything may take. Far more than it does: the machine may be busy with other things.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(100);
/// Incompressible bytes of [`World::write_content`].
const CONTENT_MIB: u64 = 32;
/// What moves as much has not sent everything again. Far more than slow guests change meanwhile, also on a busy machine.
const DELTA_BYTES_MAX: u64 = 24 << 20;

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Told {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Told {
    /// Fails unless the command ended with this code.
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.out, self.err);
        self
    }

    /// Fails unless the command said this on standard error.
    #[track_caller]
    pub(crate) fn says(self, words: &str) -> Self {
        assert!(self.err.contains(words), "not said: {words}\nstderr: {}", self.err);
        self
    }

    pub(crate) fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.out).with_context(|| format!("not JSON: {}", self.out))
    }
}

/// A lab with the command line.
pub(crate) struct World {
    pub(crate) lab: Lab,
    dir: PathBuf,
    is_proved: bool,
}

impl World {
    /// A lab without guests.
    pub(crate) async fn up(name: &str) -> Result<Self> {
        Self::up_with(name, None).await
    }

    /// A lab without guests, whose protected site finds the server at an address of its own.
    pub(crate) async fn up_with(name: &str, far_server: Option<Ipv4Addr>) -> Result<Self> {
        // Not beneath a test's own directory: the lab's machines may run as another account, which must get through.
        let dir = mainstay_lab::scratch_dir().join(format!("mainstay-{name}-{}", std::process::id()));
        let options = LabOptions {
            has_relays: true,
            far_server,
            ..LabOptions::without_guests(PathBuf::from(env!("CARGO_BIN_EXE_mainstay")))?
        };
        match Lab::up(&dir, &options).await {
            Ok(lab) => Ok(Self { lab, dir, is_proved: false }),
            Err(error) => {
                take_down(&dir);
                Err(error)
            }
        }
    }

    /// The test has shown what it was to show.
    pub(crate) fn proved(mut self) -> Result<()> {
        self.is_proved = true;
        Ok(())
    }

    /// A guest on the home site's production network, with other settings as wanted.
    pub(crate) fn guest(&self, name: &str, options: &str) -> Result<LedgerVm> {
        let mut vm = LedgerVm::new(name);
        vm.network = Some(self.lab.network(HOME)?);
        vm.options = options.to_owned();
        Ok(vm)
    }

    /// Makes a guest, and protects it with a copy frequency of five seconds; answers when it is protected.
    pub(crate) async fn protect(&mut self, vm: &LedgerVm) -> Result<()> {
        self.add(vm).await?;
        self.protect_added(vm).await
    }

    /// Makes a guest; answers when it writes.
    pub(crate) async fn add(&mut self, vm: &LedgerVm) -> Result<()> {
        self.lab.add(vm, &|_, _| Ok(())).await?;
        self.lab.ledger(&vm.name, LedgerCopy::Active, PATIENCE).await?;
        Ok(())
    }

    /// The second half of [`World::protect`].
    pub(crate) async fn protect_added(&self, vm: &LedgerVm) -> Result<()> {
        if self.cli(&["policy", "show", "often"]).code != 0 {
            let values = ["--copy-frequency", "5", "--retention", "24", "--app-consistent-frequency", "0"];
            self.cli(&[&["policy", "create", "often"], &values[..]].concat()).expect(0);
        }
        self.cli(&["protect", &vm.name, "--policy", "often"]).expect(0);
        self.wait_item(&vm.name, "is protected", |item| item["protectionState"] == "Protected").await?;
        Ok(())
    }

    /// Runs `mainstay --lab DIR …`.
    pub(crate) fn cli(&self, arguments: &[&str]) -> Told {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mainstay"));
        command.arg("--lab").arg(&self.dir).args(arguments);
        run(command)
    }

    /// Runs `mainstay lab … --dir DIR`.
    pub(crate) fn lab_cli(&self, arguments: &[&str]) -> Told {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mainstay"));
        command.arg("lab").args(arguments).arg("--dir").arg(&self.dir);
        run(command)
    }

    /// What `mainstay lab ledger` says of a guest by one of its names.
    pub(crate) fn ledger_by(&self, name: &str) -> Result<Value> {
        let patience = PATIENCE.as_secs().to_string();
        self.lab_cli(&["ledger", name, "--json", "--timeout", &patience]).expect(0).json()
    }

    /// Runs `virsh` at a site.
    pub(crate) fn virsh(&self, site: &str, arguments: &[&str]) -> Result<String> {
        virsh(self.lab.site(site)?, arguments)
    }

    /// The item's ARM properties.
    pub(crate) fn item(&self, name: &str) -> Result<Value> {
        let told = self.cli(&["item", "show", name, "--json"]).expect(0);
        Ok(told.json()?["properties"].take())
    }

    /// What ARM has no field for.
    pub(crate) async fn status(&self, name: &str) -> Result<ItemStatus> {
        Ok(self.lab.client()?.get(&format!("/api/v1/items/{name}")).await?)
    }

    /// Waits until an item is as wanted.
    pub(crate) async fn wait_item(
        &self,
        name: &str,
        what: &str,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        eventually(&format!("'{name}' {what}"), async || {
            let item = self.item(name)?;
            if wanted(&item) { Ok(item) } else { bail!("it is {item}") }
        })
        .await
    }

    /// The recovery points' ids, newest first.
    pub(crate) fn points(&self, name: &str) -> Result<Vec<String>> {
        let points = self.cli(&["recovery-points", name, "--json"]).expect(0).json()?;
        let id = |point: &Value| point["name"].as_str().unwrap_or_default().to_owned();
        Ok(points.as_array().context("a list")?.iter().map(id).collect())
    }

    /// Waits for a recovery point that is taken from now on: the second newest that comes may have been under way.
    pub(crate) async fn wait_point(&self, name: &str) -> Result<()> {
        let known = self.points(name)?;
        eventually(&format!("a new recovery point of '{name}'"), async || {
            let new = self.points(name)?.into_iter().filter(|point| !known.contains(point)).count();
            ensure!(new >= 2, "{new} new ones; {}", self.item(name)?["healthErrors"]);
            Ok(())
        })
        .await
    }

    /// Descriptions of all events with a code, newest first.
    pub(crate) fn events(&self, code: &str) -> Result<Vec<Value>> {
        let events = self.cli(&["event", "list", "--limit", "500", "--json"]).expect(0).json()?;
        let mut found = Vec::new();
        for event in events.as_array().context("a list")? {
            if event["properties"]["eventCode"] == code {
                found.push(event["properties"].clone());
            }
        }
        Ok(found)
    }

    /// Waits for an event whose description contains some words.
    pub(crate) async fn wait_event(&self, code: &str, words: &str) -> Result<Value> {
        eventually(&format!("event {code}"), async || {
            let events = self.events(code)?;
            let holds = |event: &&Value| event["description"].as_str().unwrap_or_default().contains(words);
            events.iter().find(holds).cloned().with_context(|| format!("there are {events:?}"))
        })
        .await
    }

    /// Runs a shell script in a copy of a guest.
    pub(crate) async fn in_guest(&self, name: &str, copy: LedgerCopy, script: &str) -> Result<String> {
        let (site, vm) = self.lab.vm(name, copy).await?;
        let told = ledger::run_in_guest(site, vm, "/bin/sh", &["-c", script]).await?;
        Ok(told.trim().to_owned())
    }

    /// Asks the ledger of the active copy: it must be whole.
    pub(crate) async fn whole(&self, name: &str, site: &str) -> Result<ledger::Ledger> {
        let found = self.lab.ledger(name, LedgerCopy::Active, PATIENCE).await?;
        ensure!(found.is_whole() && found.site == site, "not whole, or not at {site}: {found:?}");
        Ok(found)
    }

    /// Waits until the copy of a VM on the home host is off.
    pub(crate) async fn until_off(&self, vm: &str) -> Result<()> {
        eventually("the old VM is off", async || {
            let state = self.virsh(HOME, &["domstate", vm])?;
            ensure!(state.trim() == "shut off", "it is {state}");
            Ok(())
        })
        .await
    }

    /// Brings a VM home that was failed over and committed, proves that nothing was lost on the way, and protects it again.
    pub(crate) async fn bring_home(&self, name: &str) -> Result<()> {
        self.cli(&["planned-failover", name, "--direction", "RecoveryToPrimary"]).expect(6);
        let before = self.whole(name, RECOVERY).await?;
        self.cli(&["complete-failover", name]).expect(0);
        let home = self.whole(name, HOME).await?;
        ensure!(home.last >= before.acknowledged, "{before:?}, {home:?}");
        self.cli(&["commit", name]).expect(0);
        self.cli(&["reverse-replicate", name]).expect(0);
        self.wait_point(name).await
    }

    /// Has the active copy write random bytes to a file on its second disk.
    pub(crate) async fn write_random(&self, name: &str, file: &str, mib: u64) -> Result<()> {
        let (site, vm) = self.lab.vm(name, LedgerCopy::Active).await?;
        ledger::write_random(site, vm, file, mib).await
    }

    /// Writes much to the second disk, so that sending everything again would be seen; answers when it is replicated.
    pub(crate) async fn write_content(&self, name: &str) -> Result<()> {
        self.write_random(name, "content", CONTENT_MIB).await?;
        self.wait_point(name).await
    }

    /// Fails unless the guest's `/ledger0/note` is in a test copy of the newest recovery point, and far less than everything was
    /// moved for it.
    pub(crate) async fn arrived(&self, name: &str, note: &str, moved_before: u64) -> Result<()> {
        self.wait_item(name, "is well", |item| item["replicationHealth"] == "Normal").await?;
        self.cli(&["test-failover", name]).expect(0);
        let ledger = self.lab.ledger(name, LedgerCopy::Test, PATIENCE).await?;
        ensure!(ledger.is_whole(), "{ledger:?}");
        let told = self.in_guest(name, LedgerCopy::Test, "cat /ledger0/note").await?;
        ensure!(told == note, "the copy says '{told}', not '{note}'");
        self.cli(&["cleanup-test-failover", name]).expect(0);
        let moved = self.status(name).await?.bytes_moved - moved_before;
        let resynchronizations = self.events("Resynchronized")?.len();
        ensure!(moved < DELTA_BYTES_MAX, "{moved} bytes were moved, {resynchronizations} resynchronizations");
        Ok(())
    }

    /// Waits until the guest has acknowledged some more records: it runs, and its disks take writes.
    pub(crate) async fn writes_on(&self, name: &str) -> Result<()> {
        let file = self.lab.site(HOME)?.acks().join(name);
        let count = std::fs::read_to_string(&file)?.lines().filter(|line| line.starts_with("A ")).count();
        ledger::wait_for_acknowledgements(&file, count + 40, PATIENCE).await
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if !self.is_proved {
            let logs = ["server", "agent-home", "agent-recovery"]
                .map(|name| self.dir.join(format!("logs/{name}.log")));
            let consoles = std::fs::read_dir(self.dir.join(HOME).join("consoles"));
            let consoles = consoles.into_iter().flatten().flatten().map(|entry| entry.path());
            for file in logs.into_iter().chain(consoles) {
                let bytes = std::fs::read(&file).unwrap_or_default();
                let text = String::from_utf8_lossy(&bytes);
                let lines: Vec<_> = text.lines().collect();
                eprintln!("-- {}\n{}", file.display(), lines[lines.len().saturating_sub(40)..].join("\n"));
            }
            if std::env::var_os("MAINSTAY_KEEP").is_some() {
                eprintln!("the lab is left in {}", self.dir.display());
                return;
            }
        }
        take_down(&self.dir);
    }
}

/// Runs `virsh` at a site that the lab may not know of.
pub(crate) fn virsh(site: &Site, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new("virsh");
    command.args(["-q", "-c", site.uri()]).args(arguments);
    let told = run(command);
    ensure!(told.code == 0, "virsh {arguments:?}: {}", told.err);
    Ok(told.out)
}

fn take_down(dir: &std::path::Path) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mainstay"));
    command.args(["lab", "down", "--dir"]).arg(dir);
    let told = run(command);
    // A lab that stays must not hide why the test failed.
    if told.code != 0 {
        eprintln!("{} could not be taken down: {}", dir.display(), told.err);
    }
}

pub(crate) fn run(mut command: Command) -> Told {
    // The test decides which server is meant, not the environment it runs in.
    for name in ["MAINSTAY_URL", "MAINSTAY_CA_FILE", "MAINSTAY_TOKEN", "MAINSTAY_LAB"] {
        command.env_remove(name);
    }
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    Told {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Tries until it succeeds; the last failure is told when patience ends.
pub(crate) async fn eventually<T>(what: &str, attempt: impl AsyncFn() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt().await {
            Ok(done) => return Ok(done),
            Err(error) if Instant::now() > deadline => {
                return Err(error.context(format!("it did not happen: {what}")));
            }
            Err(_) => tokio::time::sleep(POLL).await,
        }
    }
}
