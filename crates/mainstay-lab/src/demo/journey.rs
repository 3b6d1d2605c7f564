//! The journey, phase by phase.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mainstay_api::Client;
use reqwest::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{
    DemoReport, Narrator, PhaseReport,
    acknowledgements::{Watch, now_ms},
};
use crate::{
    HOME, Image, Images, Lab, LabAction, LabFile, LedgerCopy, RECOVERY,
    item::{Item, Job, Point},
    ledger::{self, Ledger, Status},
};

/// How long a guest may take to answer after a start, in software emulation on a busy machine.
const GUEST_TIMEOUT: Duration = Duration::from_secs(180);
/// Seconds between two deltas.
const COPY_FREQUENCY_SECONDS: u32 = 5;
/// Deltas in the phase that shows them.
const DELTAS: usize = 3;

/// Carries the journey out on the lab's first VM. The report's phases end with the first that failed.
pub async fn run(lab: &mut Lab, narrator: &dyn Narrator) -> DemoReport {
    let mut report = DemoReport::default();
    let file = lab.file().clone();
    let outcome = tokio::select! {
        outcome = journey(lab, narrator, &mut report) => outcome,
        never = tell_progress(&file, narrator) => never,
    };
    if let Err(error) = outcome {
        let mut failed = report.phases.pop().unwrap_or_default();
        failed.proved = false;
        failed.notes = format!("{error:#}");
        narrator.end(&failed);
        report.phases.push(failed);
    }
    report.ok = report.phases.len() == PHASES.len() && report.phases.iter().all(|phase| phase.proved);
    report
}

/// Tells how far what goes on is, for ever. While the VM is not protected, or the server is away, there is nothing to tell.
async fn tell_progress(lab: &LabFile, narrator: &dyn Narrator) -> Result<()> {
    let client = Client::new(&lab.connection()?)?;
    let vm = lab.vms.first().context("a VM")?.name.clone();
    loop {
        let progress = Item::progress_of(&client, lab, &vm).await.unwrap_or_default();
        narrator.progress(&progress);
        tokio::time::sleep(LOOK).await;
    }
}

/// How often it is asked how far what goes on is.
const LOOK: Duration = Duration::from_millis(500);

/// The phases in order.
const PHASES: [&str; 12] = [
    "initial-replication",
    "delta-replication",
    "test-failover",
    "test-failover-cleanup",
    "failover",
    "change-recovery-point",
    "failover-commit",
    "failback-synchronize",
    "failback-complete",
    "failback-commit",
    "reverse-replication",
    "planned-failover",
];

/// The phase that is under way.
struct Phases<'a> {
    report: &'a mut DemoReport,
    narrator: &'a dyn Narrator,
    began: Instant,
}

impl Phases<'_> {
    fn begin(&mut self) {
        let name = PHASES.get(self.report.phases.len()).copied().unwrap_or("more");
        self.narrator.begin(name);
        self.report.phases.push(PhaseReport { name: name.to_owned(), ..PhaseReport::default() });
        self.began = Instant::now();
    }

    /// The phase's work is over; proving it is not part of its time.
    fn worked(&mut self) {
        let seconds = self.began.elapsed().as_secs_f64();
        self.now().seconds = seconds;
    }

    fn now(&mut self) -> &mut PhaseReport {
        if self.report.phases.is_empty() {
            self.report.phases.push(PhaseReport::default());
        }
        let last = self.report.phases.len() - 1;
        &mut self.report.phases[last]
    }

    fn proved(&mut self, notes: impl Into<String>) {
        let phase = self.now();
        phase.proved = true;
        phase.notes = notes.into();
        let phase = phase.clone();
        self.narrator.end(&phase);
    }
}

fn whole(ledger: &Ledger) -> Result<()> {
    ensure!(
        ledger.is_whole(),
        "the ledger is not whole: last {}, acknowledged {}, corrupt {}, gaps {}, disks agree: {}",
        ledger.last,
        ledger.acknowledged,
        ledger.corrupt,
        ledger.gaps,
        ledger.disks_agree
    );
    Ok(())
}

/// The number after which a copy began to write: everything up to it came with the recovery point.
fn resumed_at(status: &Status) -> u64 {
    status.boots.last().map_or(0, |boot| boot.first.saturating_sub(1))
}

fn seconds_between(from_ms: i64, to_ms: i64) -> f64 {
    (to_ms - from_ms).max(0) as f64 / 1000.0
}

fn uuid_at(value: &Value, pointer: &str) -> Result<Uuid> {
    value
        .pointer(pointer)
        .and_then(Value::as_str)
        .and_then(|text| text.parse().ok())
        .with_context(|| format!("{pointer} of {value}"))
}

fn count_at(value: &Value, pointer: &str) -> Option<u64> {
    value.pointer(pointer).and_then(Value::as_u64)
}

/// What the phases share.
struct World<'a> {
    lab: &'a mut Lab,
    item: Item,
    images: Images,
    watch: Watch,
    vm: String,
}

impl World<'_> {
    /// The ledger of the copy that runs now, and its own account of itself, as soon as it answers.
    async fn answer(&self, copy: LedgerCopy) -> Result<(Ledger, Status)> {
        let found = self.lab.ledger(&self.vm, copy, GUEST_TIMEOUT).await?;
        let (site, vm) = self.lab.vm(&self.vm, copy).await?;
        Ok((found, ledger::status(site, vm).await?))
    }

    /// Checks that a copy holds everything that was acknowledged when its recovery point was taken.
    fn holds_point(&self, status: &Status, time_ms: i64) -> Result<u64> {
        let resumed = resumed_at(status);
        let earlier = &status.boots[..status.boots.len().saturating_sub(1)];
        let acknowledged = self.watch.acknowledged_at(time_ms, earlier);
        ensure!(
            resumed >= acknowledged,
            "number {acknowledged} was acknowledged before the recovery point was taken, but the copy resumed at {resumed}"
        );
        Ok(acknowledged)
    }
}

async fn journey(lab: &mut Lab, narrator: &dyn Narrator, report: &mut DemoReport) -> Result<()> {
    let mut phases = Phases { report, narrator, began: Instant::now() };
    let vm = lab.file().vms.first().context("the lab has no VM")?.name.clone();

    phases.begin();
    lab.ledger(&vm, LedgerCopy::Active, GUEST_TIMEOUT).await.context("the guest is not up")?;
    phases.began = Instant::now();
    let watch = Watch::begin(&lab.site(HOME)?.acks(), &vm);
    let item = Item::protect(lab, &vm, COPY_FREQUENCY_SECONDS).await?;
    item.wait("protection", |item| item.protection_state == "Protected").await?;
    phases.worked();
    let images = Images::open(lab, item.status().await?.id.parse()?)?;
    let mut world = World { lab, item, images, watch, vm };
    let last = initial_replication(&world, &mut phases).await?;
    delta_replication(&world, &mut phases, last).await?;
    test_failover(&world, &mut phases).await?;
    let chosen = failover(&mut world, &mut phases).await?;
    failback(&world, &mut phases, chosen).await?;
    planned_failover(&world, &mut phases).await
}

async fn initial_replication(world: &World<'_>, phases: &mut Phases<'_>) -> Result<Point> {
    let first = *world.item.points().await?.first().context("the first recovery point")?;
    let status = world.item.status().await?;
    let (found, _) = world.answer(LedgerCopy::Active).await?;
    let phase = phases.now();
    phase.bytes_changed = Some(world.images.read(first.id).await?.bytes_changed_since(None));
    phase.bytes_moved = Some(status.bytes_moved);
    phase.rpo_seconds = status.rpo_seconds.map(|seconds| seconds as f64);
    phase.ledger = Some(found.clone());
    whole(&found)?;
    phases.proved("the first recovery point opens; the guest was not disturbed");
    Ok(first)
}

async fn delta_replication(world: &World<'_>, phases: &mut Phases<'_>, first: Point) -> Result<()> {
    phases.begin();
    let before = world.item.points().await?;
    let last = *before.last().unwrap_or(&first);
    let moved_before = world.item.status().await?.bytes_moved;
    let points = world.item.wait_points(last.time_ms, DELTAS).await?;
    phases.worked();
    let status = world.item.status().await?;
    let mut changed = 0;
    let mut before = world.images.read(last.id).await?;
    for point in &points {
        let after = world.images.read(point.id).await?;
        changed += after.bytes_changed_since(Some(&before));
        before = after;
    }
    let (found, _) = world.answer(LedgerCopy::Active).await?;
    let phase = phases.now();
    phase.bytes_changed = Some(changed);
    phase.bytes_moved = Some(status.bytes_moved - moved_before);
    phase.rpo_seconds = status.rpo_seconds.map(|seconds| seconds as f64);
    phase.ledger = Some(found.clone());
    whole(&found)?;
    ensure!(changed > 0, "the guest writes all the time, but no block differs between recovery points");
    phases.proved(format!("{} deltas at a copy frequency of {COPY_FREQUENCY_SECONDS} s", points.len()));
    Ok(())
}

async fn test_failover(world: &World<'_>, phases: &mut Phases<'_>) -> Result<()> {
    phases.begin();
    let point = *world.item.points().await?.last().context("a recovery point")?;
    let body = json!({ "properties": { "failoverDirection": "PrimaryToRecovery", "networkType": "NoNetworkAttachAsInput",
        "providerSpecificDetails": { "instanceType": "HyperVReplicaAzure", "recoveryPointId": point.id } } });
    let job = world.item.begin(Method::POST, "testFailover", &body).await?;
    let requested = Instant::now();
    world.item.finish(&job).await?;
    phases.worked();
    let (found, status) = world.answer(LedgerCopy::Test).await?;
    let rto = requested.elapsed().as_secs_f64();
    let acknowledged = world.holds_point(&status, point.time_ms)?;
    let production = world.answer(LedgerCopy::Active).await?.0;
    let phase = phases.now();
    phase.rto_seconds = Some(rto);
    phase.ledger = Some(found.clone());
    ensure!(found.site == RECOVERY && production.site == HOME, "the copies run at the wrong sites");
    ensure!(
        found.corrupt == 0 && found.gaps == 0 && found.disks_agree,
        "the copy's ledger is not whole: {found:?}"
    );
    whole(&production)?;
    let item = world.item.show().await?;
    ensure!(item.active_location == "Primary", "the item is active at {}", item.active_location);
    phases.proved(format!("the copy holds all {acknowledged} records of its point; production went on"));

    phases.begin();
    let before_ms = now_ms();
    let body = json!({ "properties": { "comments": "demonstration" } });
    world.item.run(Method::POST, "testFailoverCleanup", &body).await?;
    phases.worked();
    let remains = world.item.remains(world.lab).await?;
    ensure!(remains.is_empty(), "the clean-up left behind: {}", remains.join(", "));
    world.item.wait_points(before_ms, 1).await.context("replication did not go on")?;
    let (found, _) = world.answer(LedgerCopy::Active).await?;
    whole(&found)?;
    phases.now().ledger = Some(found);
    phases.proved("no domain, no disk, no overlay is left; replication goes on");
    Ok(())
}

/// Failover with the source killed, change of the recovery point, commit. Answers the point that runs.
async fn failover(world: &mut World<'_>, phases: &mut Phases<'_>) -> Result<Image> {
    let points = world.item.points().await?;
    ensure!(points.len() >= 2, "there are not enough recovery points to change to another");
    phases.begin();
    let victim = format!("vm:{}@{HOME}", world.vm);
    world.lab.act(LabAction::Kill, &victim).await.context("kill the source VM")?;
    let body = json!({ "properties": { "failoverDirection": "PrimaryToRecovery", "sourceSiteOperations": "NotRequired",
        "providerSpecificDetails": { "instanceType": "HyperVReplicaAzure", "recoveryPointId": "LatestProcessed" } } });
    let requested_ms = now_ms();
    let job = world.item.begin(Method::POST, "unplannedFailover", &body).await?;
    let requested = Instant::now();
    world.item.finish(&job).await?;
    phases.worked();
    let (found, status) = world.answer(LedgerCopy::Active).await?;
    let rto = requested.elapsed().as_secs_f64();
    let latest = *world.item.points().await?.last().context("the point that was failed over to")?;
    let acknowledged = world.holds_point(&status, latest.time_ms)?;
    let resumed_latest = resumed_at(&status);
    let phase = phases.now();
    phase.rto_seconds = Some(rto);
    phase.rpo_seconds = Some(seconds_between(latest.time_ms, requested_ms));
    phase.ledger = Some(found.clone());
    ensure!(found.site == RECOVERY, "the VM runs at {}", found.site);
    whole(&found)?;
    phases.proved(format!("nothing lost beyond the recovery point: resumed at {resumed_latest}, {acknowledged} acknowledged by then"));

    phases.begin();
    let older = points[points.len() - 2];
    let body = json!({ "properties": { "recoveryPointId": older.id,
        "providerSpecificDetails": { "instanceType": "HyperVReplicaAzure" } } });
    let job = world.item.begin(Method::POST, "applyRecoveryPoint", &body).await?;
    let requested = Instant::now();
    world.item.finish(&job).await?;
    phases.worked();
    let (found, status) = world.answer(LedgerCopy::Active).await?;
    let rto = requested.elapsed().as_secs_f64();
    world.holds_point(&status, older.time_ms)?;
    let resumed = resumed_at(&status);
    let phase = phases.now();
    phase.rto_seconds = Some(rto);
    phase.rpo_seconds = Some(seconds_between(older.time_ms, requested_ms));
    phase.ledger = Some(found.clone());
    ensure!(
        resumed < resumed_latest,
        "the older point resumed at {resumed}, the newer one at {resumed_latest}"
    );
    whole(&found)?;
    phases.proved(format!("the VM runs the older point: resumed at {resumed} instead of {resumed_latest}"));

    phases.begin();
    world.item.run(Method::POST, "failoverCommit", &json!({})).await?;
    phases.worked();
    let left = world.item.points().await?;
    ensure!(left.is_empty(), "{} recovery points are left after the commit", left.len());
    ensure!(
        world.item.refuses("applyRecoveryPoint", &body).await?,
        "the recovery point could be changed after the commit"
    );
    let (found, _) = world.answer(LedgerCopy::Active).await?;
    whole(&found)?;
    phases.now().ledger = Some(found);
    phases.proved("no recovery point is left, and a change is refused");
    // The state that home and the recovery VM have in common, as long as the store keeps it.
    world.images.read(older.id).await
}

/// Failback with delta synchronisation, completion, commit, reverse replication.
async fn failback(world: &World<'_>, phases: &mut Phases<'_>, chosen: Image) -> Result<()> {
    phases.begin();
    let body = json!({ "properties": { "failoverDirection": "RecoveryToPrimary", "providerSpecificDetails": {
        "instanceType": "HyperVReplicaAzureFailback", "dataSyncOption": "ForDownTime",
        "recoveryVmCreationOption": "NoAction" } } });
    let job: Job = world.item.run(Method::POST, "plannedFailover", &body).await?;
    phases.worked();
    ensure!(
        job.resource.properties.state == "Suspended",
        "the job is {}, not waiting",
        job.resource.properties.state
    );
    let output = job.output("VmDataSync");
    let staged = world.images.read(uuid_at(&output, "/point")?).await?;
    let (found, _) = world.answer(LedgerCopy::Active).await?;
    let phase = phases.now();
    phase.bytes_changed = Some(staged.bytes_changed_since(Some(&chosen)));
    phase.bytes_moved = count_at(&output, "/bytes_moved");
    phase.ledger = Some(found.clone());
    ensure!(found.site == RECOVERY, "the VM runs at {} during the synchronisation", found.site);
    whole(&found)?;
    // Not among the bytes that were moved home: the store is the recovery site's.
    let captured = count_at(&output, "/bytes_captured").context("what was captured of the recovery VM")?;
    phases.proved(format!(
        "the VM ran on while its changes went into the store ({:.1} MB) and home; the job waits for Complete failover",
        captured as f64 / 1e6
    ));

    phases.begin();
    let before = world.answer(LedgerCopy::Active).await?.0;
    let requested = Instant::now();
    let job = world.item.resume(&job).await?;
    phases.worked();
    let (found, status) = world.answer(LedgerCopy::Active).await?;
    let rto = requested.elapsed().as_secs_f64();
    let output = job.output("VmFailback");
    let common = world.images.read(uuid_at(&output, "/point")?).await?;
    let resumed = resumed_at(&status);
    let phase = phases.now();
    phase.bytes_changed = Some(common.bytes_changed_since(Some(&staged)));
    phase.bytes_moved = count_at(&output, "/moved/bytes_moved");
    phase.rpo_seconds = Some(0.0);
    phase.rto_seconds = Some(rto);
    phase.ledger = Some(found.clone());
    ensure!(found.site == HOME, "the VM runs at {}", found.site);
    ensure!(
        resumed >= before.acknowledged,
        "acknowledged {} at the recovery site, resumed at {resumed}",
        before.acknowledged
    );
    let lost = world.watch.acknowledged_at(now_ms(), &status.boots[..status.boots.len().saturating_sub(1)]);
    ensure!(
        resumed >= lost,
        "number {lost} was acknowledged at the recovery site, but home resumed at {resumed}"
    );
    whole(&found)?;
    phases.proved(format!(
        "home resumed at {resumed}; nothing that was acknowledged is lost; equality proved by hashes"
    ));

    phases.begin();
    world.item.run(Method::POST, "failoverCommit", &json!({})).await?;
    phases.worked();
    let remains = world.item.remains(world.lab).await?;
    ensure!(remains.is_empty(), "the commit left behind: {}", remains.join(", "));
    let (found, _) = world.answer(LedgerCopy::Active).await?;
    whole(&found)?;
    phases.now().ledger = Some(found);
    phases.proved("the recovery VM, its disks and overlays are gone");

    phases.begin();
    let body = json!({ "properties": { "failoverDirection": "PrimaryToRecovery",
        "providerSpecificDetails": { "instanceType": "HyperVReplicaAzure" } } });
    let job = world.item.run(Method::POST, "reProtect", &body).await?;
    phases.worked();
    let output = job.output("VmStartInitialReplication");
    let reversed = world.images.read(uuid_at(&output, "/point")?).await?;
    let (found, _) = world.answer(LedgerCopy::Active).await?;
    let item = world.item.show().await?;
    let phase = phases.now();
    phase.bytes_changed = Some(reversed.bytes_changed_since(Some(&common)));
    phase.bytes_moved = count_at(&output, "/bytes_moved");
    phase.ledger = Some(found.clone());
    ensure!(item.protection_state == "Protected", "the item is {}", item.protection_state);
    whole(&found)?;
    phases.proved("replicated again, with what changed since the recovery VM stopped");
    Ok(())
}

async fn planned_failover(world: &World<'_>, phases: &mut Phases<'_>) -> Result<()> {
    phases.begin();
    let last = world.item.points().await?.last().context("a recovery point")?.id;
    let body = json!({ "properties": { "failoverDirection": "PrimaryToRecovery",
        "providerSpecificDetails": { "instanceType": "HyperVReplicaAzure" } } });
    let job = world.item.begin(Method::POST, "plannedFailover", &body).await?;
    let requested = Instant::now();
    let job = world.item.finish(&job).await?;
    phases.worked();
    let (found, status) = world.answer(LedgerCopy::Active).await?;
    let rto = requested.elapsed().as_secs_f64();
    let output = job.output("VmPrepareForFailover");
    let last = world.images.read(last).await?;
    let shipped = world.images.read(uuid_at(&output, "/point")?).await?;
    let resumed = resumed_at(&status);
    let earlier = &status.boots[..status.boots.len().saturating_sub(1)];
    let acknowledged = world.watch.acknowledged_at(now_ms(), earlier);
    let phase = phases.now();
    phase.bytes_changed = Some(shipped.bytes_changed_since(Some(&last)));
    phase.bytes_moved = count_at(&output, "/bytes_moved");
    phase.rpo_seconds = Some(0.0);
    phase.rto_seconds = Some(rto);
    phase.ledger = Some(found.clone());
    ensure!(found.site == RECOVERY, "the VM runs at {}", found.site);
    ensure!(
        resumed >= acknowledged,
        "number {acknowledged} was acknowledged at home, but the recovery site resumed at {resumed}"
    );
    whole(&found)?;
    phases.proved(format!("nothing lost at all: {acknowledged} acknowledged at home, resumed at {resumed}"));
    Ok(())
}
