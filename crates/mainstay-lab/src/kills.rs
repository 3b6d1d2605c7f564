//! Killing the server and the agents at random moments of every workflow, on real VMs: after a restart everything must
//! end as if nothing had happened.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    HOME, Lab, LabAction, LedgerCopy, RECOVERY,
    item::{Item, Job},
    ledger::Ledger,
};

/// How long a guest may take to answer after a start, in software emulation on a busy machine.
const GUEST_TIMEOUT: Duration = Duration::from_secs(180);
/// Longest wait before the kill: longer than any operation here takes undisturbed.
const KILL_WITHIN_MS: u64 = 2500;

/// What a run did.
#[derive(Clone, Debug, Default)]
pub struct KillReport {
    /// Each kill: during which operation, of what, how long after its acceptance in milliseconds.
    pub kills: Vec<(String, String, u64)>,
}

struct Killer<'a> {
    lab: &'a mut Lab,
    item: Item,
    vm: String,
    random: StdRng,
    report: KillReport,
    say: &'a (dyn Fn(&str) + Send + Sync),
}

/// Carries rounds of the journey out, with one kill in every operation.
pub async fn run(
    lab: &mut Lab,
    seed: u64,
    rounds: usize,
    say: &(dyn Fn(&str) + Send + Sync),
) -> Result<KillReport> {
    let vm = lab.file().vms.first().context("the lab has no VM")?.name.clone();
    lab.ledger(&vm, LedgerCopy::Active, GUEST_TIMEOUT).await?;
    let item = Item::protect(lab, &vm, 5).await?;
    let random = StdRng::seed_from_u64(seed);
    let mut killer = Killer { lab, item, vm, random, report: KillReport::default(), say };
    killer.item.wait("protection", |item| item.protection_state == "Protected").await?;
    for round in 1..=rounds {
        say(&format!("round {round} of {rounds}"));
        killer
            .round()
            .await
            .with_context(|| format!("seed {seed}, round {round}, kills {:?}", killer.report.kills))?;
    }
    Ok(killer.report)
}

impl Killer<'_> {
    async fn round(&mut self) -> Result<()> {
        let to_recovery = json!({ "properties": { "failoverDirection": "PrimaryToRecovery",
            "providerSpecificDetails": { "instanceType": "HyperVReplicaAzure" } } });
        let home = json!({ "properties": { "failoverDirection": "RecoveryToPrimary", "providerSpecificDetails": {
            "instanceType": "HyperVReplicaAzureFailback", "dataSyncOption": "ForDownTime",
            "recoveryVmCreationOption": "NoAction" } } });
        self.operation("testFailover", &to_recovery).await?;
        self.operation("testFailoverCleanup", &json!({ "properties": { "comments": "" } })).await?;
        ensure!(self.item.remains(self.lab).await?.is_empty(), "the clean-up left something behind");
        self.operation("plannedFailover", &to_recovery).await?;
        self.whole_at(RECOVERY).await?;
        self.operation("failoverCommit", &json!({})).await?;
        let before = self.whole_at(RECOVERY).await?;
        let job = self.operation("plannedFailover", &home).await?;
        ensure!(
            job.resource.properties.state == "Suspended",
            "the failback is {}",
            job.resource.properties.state
        );
        let name = self.item.begin_resume(&job).await?;
        self.kill_during("complete", &name).await?;
        let after = self.whole_at(HOME).await?;
        ensure!(
            after.last >= before.acknowledged,
            "acknowledged {}, at home {}",
            before.acknowledged,
            after.last
        );
        self.operation("failoverCommit", &json!({})).await?;
        ensure!(self.item.remains(self.lab).await?.is_empty(), "the commit left something behind");
        self.operation("reProtect", &to_recovery).await?;
        self.item.wait("protection", |item| item.protection_state == "Protected").await?;
        self.whole_at(HOME).await?;
        Ok(())
    }

    /// Begins an operation, kills something at a random moment, and waits for the job's good end.
    async fn operation(&mut self, verb: &str, body: &Value) -> Result<Job> {
        let job = self.item.begin(Method::POST, verb, body).await.with_context(|| verb.to_owned())?;
        self.kill_during(verb, &job).await
    }

    async fn kill_during(&mut self, verb: &str, job: &str) -> Result<Job> {
        let victims = ["server", "agent:home", "agent:recovery"];
        let victim = victims[self.random.random_range(0..victims.len())];
        let after_ms = self.random.random_range(0..KILL_WITHIN_MS);
        tokio::time::sleep(Duration::from_millis(after_ms)).await;
        (self.say)(&format!("{verb}: {victim} is killed after {after_ms} ms"));
        self.report.kills.push((verb.to_owned(), victim.to_owned(), after_ms));
        self.lab.act(LabAction::Kill, victim).await?;
        self.lab.act(LabAction::Start, victim).await?;
        for site in [HOME, RECOVERY] {
            self.lab.wait_connected(site).await?;
        }
        self.item.finish(job).await.with_context(|| format!("{verb}, {victim} killed after {after_ms} ms"))
    }

    /// The ledger must be whole and the VM where it belongs, and nowhere else.
    async fn whole_at(&self, site: &str) -> Result<Ledger> {
        let found = self.lab.ledger(&self.vm, LedgerCopy::Active, GUEST_TIMEOUT).await?;
        ensure!(found.site == site, "the VM runs at {}, not at {site}", found.site);
        ensure!(found.is_whole(), "the ledger is not whole: {found:?}");
        Ok(found)
    }
}
