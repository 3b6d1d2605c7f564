//! Clients that Mainstay did not write, driving the whole tutorial on real VMs.

mod azure;

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use mainstay_lab::{HOME, Lab, LabOptions, LedgerCopy, LedgerVm, RECOVERY};
use serde_json::Value;

/// How long a guest may take to answer, on a busy machine without hardware virtualisation.
const PATIENCE: Duration = Duration::from_secs(300);
const VM: &str = "vm1";

/// The tutorial's steps as the clients name them, and where the active copy then runs.
const STEPS: [(&str, &str); 12] = [
    ("protected", HOME),
    ("test-failover", HOME),
    ("test-failover-cleanup", HOME),
    ("failover", RECOVERY),
    ("change-recovery-point", RECOVERY),
    ("failover-commit", RECOVERY),
    ("failback-synchronize", RECOVERY),
    ("failback-complete", HOME),
    ("failback-commit", HOME),
    ("reverse-replication", HOME),
    ("planned-failover", RECOVERY),
    ("disabled", RECOVERY),
];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A lab, with a guest that writes or without; taken down whatever happens.
async fn with_lab(
    name: &str,
    has_guest: bool,
    work: impl AsyncFnOnce(&mut Lab, &Path) -> Result<()>,
) -> Result<()> {
    // Not beneath a test's own directory: the lab's machines may run as another account, which must get through.
    let dir = mainstay_lab::scratch_dir().join(format!("mainstay-{name}-{}", std::process::id()));
    let options = LabOptions::without_guests(PathBuf::from(env!("CARGO_BIN_EXE_mainstay")))?;
    let done = match Lab::up(&dir, &options).await {
        Ok(mut lab) => {
            if has_guest {
                let vm = LedgerVm { network: Some(lab.network(HOME)?), ..LedgerVm::new(VM) };
                lab.add(&vm, &|_, _| Ok(())).await?;
                lab.ledger(VM, LedgerCopy::Active, PATIENCE).await?;
            }
            work(&mut lab, &dir).await
        }
        Err(error) => Err(error),
    };
    let down = Lab::down(&dir).await;
    done.and(down)
}

/// After a step of a client: the guest is where it should be, and its data are whole.
async fn look(lab: &Lab, vm: &str, step: &str, site: &str) -> Result<()> {
    let copy = if step == "test-failover" { LedgerCopy::Test } else { LedgerCopy::Active };
    let site = if step == "test-failover" { RECOVERY } else { site };
    let found = lab.ledger(vm, copy, PATIENCE).await.with_context(|| format!("{vm} after {step}"))?;
    ensure!(found.site == site, "after {step} the guest is at {}", found.site);
    ensure!(found.corrupt == 0 && found.gaps == 0 && found.disks_agree, "after {step}: {found:?}");
    // What a planned move may not lose.
    if matches!(step, "failback-complete" | "planned-failover" | "failback") {
        ensure!(found.last >= found.acknowledged, "after {step}: {found:?}");
    }
    Ok(())
}

/// Runs a client's program; after each step that it tells the guest is looked at.
async fn journey(
    mut program: Command,
    expected: &[&str],
    look: impl AsyncFn(&str) -> Result<()>,
) -> Result<()> {
    let mut client = program.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut answers = client.stdin.take().context("the client's input")?;
    let mut steps = Vec::new();
    let mut outcome = Ok(());
    for line in BufReader::new(client.stdout.take().context("the client's output")?).lines() {
        let told: Value = serde_json::from_str(&line?)?;
        let step = told["step"].as_str().context("a step")?.to_owned();
        outcome = look(&step).await;
        if outcome.is_err() {
            break;
        }
        steps.push(step);
        answers.write_all(b"go on\n")?;
    }
    // Without its input it ends.
    drop(answers);
    let status = client.wait()?;
    outcome?;
    ensure!(status.success(), "the client failed after {steps:?}");
    ensure!(steps == expected, "the client did {steps:?}");
    Ok(())
}

/// The only version of which there are official files here; the clients' own are newer.
const PINNED: &str = "2024-04-01";

fn clients() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients")
}

/// A program of a client: the interpreter and the script, ready for the arguments.
type Client = fn() -> Command;

fn python_program(script: &str) -> Command {
    let mut program = Command::new(repository().join(".cache/tools/bin/python"));
    program.arg(clients().join(script));
    // Nothing is written into the repository.
    program.env("PYTHONDONTWRITEBYTECODE", "1");
    program
}

fn python() -> Command {
    python_program("journey.py")
}

fn node(script: &str) -> Command {
    let mut program = Command::new("node");
    program.arg(clients().join(script));
    program.env("MAINSTAY_NODE_MODULES", repository().join(".cache/node/node_modules"));
    program
}

fn javascript() -> Command {
    node("journey.mjs")
}

/// Carries the tutorial out with a client as it is, or pinned to a version of the API. Pinned, every request and answer is
/// judged by the official files.
async fn tutorial(name: &str, client: Client, version: Option<&str>) -> Result<()> {
    let recordings = tempfile::tempdir()?;
    let recording = recordings.path().join("recording.jsonl");
    with_lab(&format!("{name}-{}", version.unwrap_or("default")), true, async |lab, dir| {
        let mut program = client();
        program.arg(dir.join("lab.json")).arg(VM).arg(&recording).args(version);
        program.env("NODE_EXTRA_CA_CERTS", &lab.file().ca_file);
        let look = async |step: &str| {
            let site = STEPS.iter().find(|(name, _)| *name == step).context("a step of the tutorial")?.1;
            look(lab, VM, step, site).await
        };
        journey(program, &STEPS.map(|(name, _)| name), look).await
    })
    .await?;
    if version == Some(PINNED) { judge(&recording, JOURNEY) } else { Ok(()) }
}

/// Different operations that are judged at least; fewer were not recorded, or not judged. How often each is called is up to the
/// machine: on a fast one clients poll less.
const JOURNEY: usize = 26;
const OPERATIONS: usize = 30;
const PLAN: usize = 14;

fn judge(recording: &Path, operations_min: usize) -> Result<()> {
    let output = node("judge.mjs").arg(clients().join("openapi")).arg(recording).output()?;
    ensure!(output.status.success(), "oav: {}", String::from_utf8_lossy(&output.stderr));
    let outcome: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("oav said {}", String::from_utf8_lossy(&output.stdout)))?;
    let errors = outcome["errors"].as_array().context("errors")?;
    ensure!(errors.is_empty(), "oav: {}", serde_json::to_string_pretty(errors)?);
    let operations = outcome["operations"].as_object().map_or(0, serde_json::Map::len);
    ensure!(operations >= operations_min, "only {operations} operations were judged: {outcome}");
    let pairs = std::fs::read_to_string(recording)?;
    let pairs = pairs.lines().filter(|line| !line.is_empty()).count() as u64;
    let judged =
        outcome["judged"].as_u64().zip(outcome["left_out"].as_u64()).map(|(judged, left)| judged + left);
    ensure!(judged == Some(pairs), "of {pairs} pairs not all were looked at: {outcome}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_python_sdk_carries_out_the_tutorial() -> Result<()> {
    tutorial("python", python, None).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_python_sdk_does_it_by_the_official_files() -> Result<()> {
    tutorial("python", python, Some(PINNED)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_javascript_sdk_carries_out_the_tutorial() -> Result<()> {
    tutorial("javascript", javascript, None).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_javascript_sdk_does_it_by_the_official_files() -> Result<()> {
    tutorial("javascript", javascript, Some(PINNED)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_python_sdk_carries_out_a_recovery_plan_by_the_official_files() -> Result<()> {
    const STEPS: [(&str, &str); 8] = [
        ("created", HOME),
        ("test-failover", HOME),
        ("test-failover-cleanup", HOME),
        ("manual-action", RECOVERY),
        ("planned-failover", RECOVERY),
        ("failback", HOME),
        ("reverse-replication", HOME),
        ("removed", HOME),
    ];
    let recordings = tempfile::tempdir()?;
    let recording = recordings.path().join("recording.jsonl");
    with_lab("plan", true, async |lab, dir| {
        let second = LedgerVm { network: Some(lab.network(HOME)?), ..LedgerVm::new("vm2") };
        lab.add(&second, &|_, _| Ok(())).await?;
        lab.ledger("vm2", LedgerCopy::Active, PATIENCE).await?;
        let mainstay = |arguments: &[&str]| -> Result<String> {
            let mut command = Command::new(env!("CARGO_BIN_EXE_mainstay"));
            let output = command.arg("--lab").arg(dir).args(arguments).output()?;
            ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
            Ok(String::from_utf8(output.stdout)?)
        };
        let often = ["--copy-frequency", "30", "--retention", "2", "--app-consistent-frequency", "0"];
        mainstay(&[&["policy", "create", "often"][..], &often].concat())?;
        for vm in [VM, "vm2"] {
            mainstay(&["protect", vm, "--policy", "often"])?;
        }
        let mut program = python_program("plan.py");
        program.arg(dir.join("lab.json")).arg(format!("{VM},vm2")).arg(&recording).arg(PINNED);
        let look = async |step: &str| {
            if step == "manual-action" {
                // While it is carried out it can neither be changed nor removed.
                let refused = mainstay(&["plan", "delete", "shop"]).err().context("a plan was removed")?;
                ensure!(refused.to_string().contains("is being carried out"), "{refused}");
            }
            if step == "created" {
                let shown = mainstay(&["plan", "show", "shop"])?;
                ensure!(shown.contains("check the database (manual)") && shown.contains("vm2"), "{shown}");
                mainstay(&["plan", "create", "other", "--group", "vm2", "--group", VM])?;
                let file = dir.join("other.json");
                std::fs::write(&file, mainstay(&["plan", "show", "other", "--json"])?)?;
                let file = file.to_str().context("a path")?;
                mainstay(&["plan", "create", "other", "--file", file])?;
                ensure!(mainstay(&["plan", "list"])?.contains("other"));
                mainstay(&["plan", "delete", "other"])?;
            }
            let site = STEPS.iter().find(|(name, _)| *name == step).context("a step of the plan")?.1;
            look(lab, VM, step, site).await?;
            // Its turn comes when the person has answered; until then it is shut down.
            if step == "manual-action" { Ok(()) } else { look(lab, "vm2", step, site).await }
        };
        journey(program, &STEPS.map(|(name, _)| name), look).await
    })
    .await?;
    judge(&recording, PLAN)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_small_operations_are_as_the_official_files_say() -> Result<()> {
    for version in [None, Some(PINNED)] {
        let recordings = tempfile::tempdir()?;
        let recording = recordings.path().join("recording.jsonl");
        with_lab(&format!("operations-{}", version.unwrap_or("default")), false, async |_, dir| {
            let mut program = python_program("operations.py");
            program.arg(dir.join("lab.json")).arg(&recording).args(version);
            let output = program.output()?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Ok(())
        })
        .await?;
        if version.is_some() {
            judge(&recording, OPERATIONS)?;
        }
    }
    Ok(())
}
