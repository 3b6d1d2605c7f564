//! Killing the server, the agents, the hypervisors' daemons and the VM at random moments of every workflow, on real VMs: after a
//! restart everything must end as if nothing had happened.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mainstay_api::ClientError;
use mainstay_model::VmId;
use mainstay_provider::PowerState;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    HOME, Lab, LabAction, LedgerCopy, RECOVERY,
    item::{Item, Job},
    ledger::{self, Ledger},
};

/// How long a guest may take to answer after a start, in software emulation on a busy machine.
const GUEST_TIMEOUT: Duration = Duration::from_secs(180);
/// Longest wait before something breaks: longer than any operation here takes undisturbed.
const BREAK_WITHIN_MS: u64 = 2500;
/// How often things break while one job runs, at most: the job then lasts longer, and has more moments to break in.
const BREAKS_MAX: usize = 5;
/// Longest wait from one to the next.
const BREAK_AGAIN_WITHIN_MS: u64 = 700;

/// What may be killed, each with -9: `vm` is the active copy, which its administrator then starts again. Or the job is cancelled.
/// What carries the jobs comes twice as often.
const VICTIMS: [&str; 10] = [
    "server",
    "server",
    "agent:home",
    "agent:home",
    "agent:recovery",
    "agent:recovery",
    "hypervisor:home",
    "hypervisor:recovery",
    "vm",
    CANCEL,
];
const CANCEL: &str = "cancel";
/// Incompressible bytes on the VM's disks. An operation that moves as much has sent everything again.
const CONTENT_MIB: u64 = 32;
/// How long the hypervisor may refuse a VM's start because its disks are in use.
const START_TIMEOUT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(100);

/// What a run did.
#[derive(Clone, Debug, Default)]
pub struct KillReport {
    /// Each kill: during which operation, of what, how long after its acceptance in milliseconds.
    pub kills: Vec<(String, String, u64)>,
    /// Each job that was cancelled, and how long that took from the request on if nothing was killed meanwhile.
    pub cancels: Vec<(String, Option<Duration>)>,
}

/// The policy: its name, seconds between two deltas, hours between two application-consistent points.
const POLICY: (&str, u32, u32) = ("demo", 5, 1);

fn to_recovery() -> Value {
    json!({ "properties": { "failoverDirection": "PrimaryToRecovery",
        "providerSpecificDetails": { "instanceType": "HyperVReplicaAzure" } } })
}

fn is_missing(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(ClientError::Refused { status: 404, .. }))
}

struct Killer<'a> {
    lab: &'a mut Lab,
    item: Item,
    vm: String,
    random: StdRng,
    report: KillReport,
    say: &'a (dyn Fn(&str) + Send + Sync),
}

/// Carries rounds of the journey out, in every operation of which something breaks, and more until `least` processes of ours were
/// killed.
pub async fn run(
    lab: &mut Lab,
    seed: u64,
    rounds: u64,
    least: usize,
    say: &(dyn Fn(&str) + Send + Sync),
) -> Result<KillReport> {
    let vm = lab.file().vms.first().context("the lab has no VM")?.name.clone();
    lab.ledger(&vm, LedgerCopy::Active, GUEST_TIMEOUT).await?;
    let (item, job) = Item::begin_protection(lab, &vm, POLICY).await?;
    let random = StdRng::seed_from_u64(seed);
    let mut killer = Killer { lab, item, vm, random, report: KillReport::default(), say };
    killer.until_enabled(&job).await?;
    killer.write_content().await?;
    for round in 1.. {
        if round > rounds && killer.report.ours() >= least {
            break;
        }
        say(&format!("round {round} of {rounds}"));
        // Labs with seeds one after the other have different rounds at the same time.
        let outcome =
            if (seed + round).is_multiple_of(2) { killer.planned().await } else { killer.unplanned().await };
        outcome.with_context(|| format!("seed {seed}, round {round}, kills {:?}", killer.report.kills))?;
    }
    Ok(killer.report)
}

impl KillReport {
    /// How many processes of ours were killed.
    pub fn ours(&self) -> usize {
        self.kills.iter().filter(|(_, victim, _)| victim == "server" || victim.starts_with("agent:")).count()
    }
}

impl Killer<'_> {
    /// Rehearsal, planned failover, failback while the recovery VM runs, reversal.
    async fn planned(&mut self) -> Result<()> {
        self.operation("testFailover", &to_recovery()).await?;
        self.operation("testFailoverCleanup", &json!({ "properties": { "comments": "" } })).await?;
        ensure!(self.item.remains(self.lab).await?.is_empty(), "the clean-up left something behind");
        self.operation("plannedFailover", &to_recovery()).await?;
        self.whole_at(RECOVERY).await?;
        self.operation("failoverCommit", &json!({})).await?;
        self.come_home("ForDownTime").await
    }

    /// Comparison of everything, failover with what is there, another recovery point, failback with all that there is, reversal;
    /// then protection is disabled and enabled again.
    async fn unplanned(&mut self) -> Result<()> {
        self.operation("repairReplication", &json!({})).await?;
        let mut body = to_recovery();
        body["properties"]["sourceSiteOperations"] = "Required".into();
        self.operation("unplannedFailover", &body).await?;
        self.whole_at(RECOVERY).await?;
        let points = self.item.points().await?;
        let older = points.iter().rev().nth(1).context("another recovery point")?;
        let mut body = to_recovery();
        body["properties"]["recoveryPointId"] = older.id.to_string().into();
        self.operation("applyRecoveryPoint", &body).await?;
        self.whole_at(RECOVERY).await?;
        self.operation("failoverCommit", &json!({})).await?;
        self.come_home("ForSynchronization").await?;
        self.disable().await?;
        let (item, job) = Item::begin_protection(self.lab, &self.vm, POLICY).await?;
        self.item = item;
        self.until_enabled(&job).await
    }

    /// Breaks things while protection is enabled; it is in the end.
    async fn until_enabled(&mut self, job: &str) -> Result<()> {
        let home = (HOME, self.lab.vm_at(self.lab.home(), &self.vm).await?);
        if self.trouble("enable", job, home).await?.is_none() {
            self.item = Item::protect(self.lab, &self.vm, POLICY.1).await?;
        }
        self.item.wait("protection", |item| item.protection_state == "Protected").await.map(drop)
    }

    /// Breaks things while protection is disabled; nothing of it is left, and the VM runs on.
    async fn disable(&mut self) -> Result<()> {
        let body = json!({ "properties": { "disableProtectionReason": "NotSpecified" } });
        let active = self.active().await?;
        let job = self.item.begin(Method::POST, "remove", &body).await.context("remove")?;
        if self.trouble("remove", &job, active).await?.is_none() {
            self.item.run(Method::POST, "remove", &body).await.context("again, after it was cancelled")?;
        }
        ensure!(self.item.show().await.is_err_and(|error| is_missing(&error)), "the item is there still");
        ensure!(self.item.remains(self.lab).await?.is_empty(), "something is left at the recovery site");
        self.whole_at(HOME).await?;
        let flat = json!({ "flat": true });
        let nodes = self.lab.home().libvirt().qmp(active.1, "query-named-block-nodes", flat).await?;
        ensure!(!nodes.to_string().contains("\"ms-"), "a tracker is left: {nodes}");
        Ok(())
    }

    /// Fails back, and is protected again.
    async fn come_home(&mut self, synchronization: &str) -> Result<()> {
        let home = json!({ "properties": { "failoverDirection": "RecoveryToPrimary", "providerSpecificDetails": {
            "instanceType": "HyperVReplicaAzureFailback", "dataSyncOption": synchronization,
            "recoveryVmCreationOption": "NoAction" } } });
        let before = self.whole_at(RECOVERY).await?;
        let job = self.operation("plannedFailover", &home).await?;
        // Only who synchronises while the VM runs is asked when to stop it.
        let (state, waits) = (&job.resource.properties.state, synchronization == "ForDownTime");
        ensure!(state == if waits { "Suspended" } else { "Succeeded" }, "the failback is {state}");
        if waits {
            self.complete(job, &home).await?;
        }
        let after = self.whole_at(HOME).await?;
        ensure!(
            after.last >= before.acknowledged,
            "acknowledged {}, at home {}",
            before.acknowledged,
            after.last
        );
        self.operation("failoverCommit", &json!({})).await?;
        ensure!(self.item.remains(self.lab).await?.is_empty(), "the commit left something behind");
        self.operation("reProtect", &to_recovery()).await?;
        self.item.wait("protection", |item| item.protection_state == "Protected").await?;
        self.whole_at(HOME).await?;
        Ok(())
    }

    async fn write_content(&self) -> Result<()> {
        // A VM that was killed while protection was enabled boots still.
        self.whole_at(HOME).await?;
        let (site, vm) = self.lab.vm(&self.vm, LedgerCopy::Active).await?;
        ledger::write_random(site, vm, "content", CONTENT_MIB).await?;
        let now_ms = jiff::Timestamp::now().as_millisecond();
        // When the second is there, what the first moved has been counted.
        self.item.wait_points(now_ms, 2).await.map(drop)
    }

    /// Begins an operation, breaks things at random moments, and waits for the job's good end.
    async fn operation(&mut self, verb: &str, body: &Value) -> Result<Job> {
        let moved = self.item.status().await?.bytes_moved;
        let active = self.active().await?;
        let job = self.item.begin(Method::POST, verb, body).await.with_context(|| verb.to_owned())?;
        let done = match self.trouble(verb, &job, active).await? {
            Some(done) => done,
            None => self.item.run(Method::POST, verb, body).await.context("again, after it was cancelled")?,
        };
        let moved = self.item.status().await?.bytes_moved.saturating_sub(moved);
        let is_full = body["properties"]["providerSpecificDetails"]["dataSyncOption"] == "ForSynchronization";
        ensure!(
            is_full || moved < CONTENT_MIB << 20,
            "{verb}: {moved} bytes were moved, which is everything"
        );
        Ok(done)
    }

    /// Completes a failback that waits for that, and breaks things meanwhile.
    async fn complete(&mut self, job: Job, home: &Value) -> Result<()> {
        let active = self.active().await?;
        let name = self.item.begin_resume(&job).await?;
        if self.trouble("complete", &name, active).await?.is_none() {
            self.whole_at(RECOVERY).await.context("after the failback was cancelled")?;
            let job = self.item.run(Method::POST, "plannedFailover", home).await?;
            self.item.resume(&job).await?;
        }
        Ok(())
    }

    /// The copy that is active now, and where.
    async fn active(&self) -> Result<(&'static str, VmId)> {
        let site = match self.item.show().await {
            Ok(item) if item.active_location == "Recovery" => RECOVERY,
            // Not protected (any more).
            Err(error) if is_missing(&error) => HOME,
            item => item.map(|_| HOME)?,
        };
        Ok((site, self.lab.vm_at(self.lab.site(site)?, &self.vm).await?))
    }

    /// Breaks things while a job runs, one after the other; `None` if the job was cancelled. `active`: the copy that was active
    /// before the operation, which has something to lose; not one that the operation makes.
    async fn trouble(&mut self, verb: &str, job: &str, active: (&'static str, VmId)) -> Result<Option<Job>> {
        let mut broken = Vec::new();
        let (mut cancelled_at, mut is_vm_killed) = (None, false);
        for _ in 0..self.random.random_range(1..=BREAKS_MAX) {
            let victim = *VICTIMS.choose(&mut self.random).context("a victim")?;
            let within_ms = if broken.is_empty() { BREAK_WITHIN_MS } else { BREAK_AGAIN_WITHIN_MS };
            let after_ms = self.random.random_range(0..within_ms);
            tokio::time::sleep(Duration::from_millis(after_ms)).await;
            // The first may come too late, as it does in life.
            if !broken.is_empty() && !self.item.is_running(job).await? {
                break;
            }
            (self.say)(&format!("{verb}: {victim} after {after_ms} ms"));
            broken.push(format!("{victim} after {after_ms} ms"));
            let what = || format!("{verb}, {}", broken.join(", "));
            if victim == CANCEL {
                let at = Instant::now();
                if self.item.cancel(job).await.with_context(what)? {
                    let accepted_ms = jiff::Timestamp::now().as_millisecond();
                    cancelled_at.get_or_insert((at, accepted_ms, broken.len()));
                }
                continue;
            }
            if victim == "vm" {
                if !self.kill_vm(active).await.with_context(what)? {
                    continue;
                }
                is_vm_killed = true;
            } else {
                self.lab.act(LabAction::Kill, victim).await.with_context(what)?;
                self.lab.act(LabAction::Start, victim).await.with_context(what)?;
            }
            self.report.kills.push((verb.to_owned(), victim.to_owned(), after_ms));
        }
        let what = || format!("{verb}, {}", broken.join(", "));
        let done = self.item.finish_or_cancelled(job).await.with_context(what)?;
        if let (Some((at, accepted_ms, count)), None) = (cancelled_at, &done) {
            let late = self.item.begun_after(job, accepted_ms).await.with_context(what)?;
            ensure!(late.is_empty(), "{}: begun after the cancel was accepted: {late:?}", what());
            (self.say)(&format!("{verb}: cancelled within {:.1} s", at.elapsed().as_secs_f64()));
            let is_undisturbed = count == broken.len();
            self.report.cancels.push((verb.to_owned(), is_undisturbed.then(|| at.elapsed())));
        }
        for site in [HOME, RECOVERY] {
            self.lab.wait_connected(site).await.with_context(what)?;
        }
        if is_vm_killed {
            self.start_active().await.with_context(what)?;
        }
        Ok(done)
    }

    /// Kills a VM's process; `false` if the operation has stopped or removed the VM already.
    async fn kill_vm(&self, (site, vm): (&str, VmId)) -> Result<bool> {
        let site = self.lab.site(site)?;
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let Err(error) = site.kill_vm(vm).await else { return Ok(true) };
            // One whose process has ended is off a moment later, unless it is started again; one that was removed has no state.
            let is_off = !site.libvirt().state(vm).await.is_ok_and(|state| state.power != PowerState::Off);
            if is_off || Instant::now() > deadline {
                return if is_off { Ok(false) } else { Err(error) };
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The administrator finds the active copy off and starts it.
    async fn start_active(&self) -> Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let (site, vm) = self.active().await?;
            let site = self.lab.site(site)?;
            if site.libvirt().state(vm).await?.power != PowerState::Off {
                return Ok(());
            }
            match site.libvirt().start(vm, false).await {
                Ok(()) => return Ok(()),
                // A capture of a VM that is off holds its disks for a moment.
                Err(_) if Instant::now() < deadline => tokio::time::sleep(POLL).await,
                Err(error) => return Err(error).context("the active VM does not start"),
            }
        }
    }

    /// The ledger must be whole and the VM where it belongs, and nowhere else.
    async fn whole_at(&self, site: &str) -> Result<Ledger> {
        let found = self.lab.ledger(&self.vm, LedgerCopy::Active, GUEST_TIMEOUT).await?;
        ensure!(found.site == site, "the VM runs at {}, not at {site}", found.site);
        ensure!(found.is_whole(), "the ledger is not whole: {found:?}");
        Ok(found)
    }
}
