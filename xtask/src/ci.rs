//! `cargo xtask ci`: what a change must pass. `make test` and the continuous integration call it and nothing else.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum as _;

use crate::{cargo, fuzz, tidy};

/// A suite, how long it took, and the share of that in which the machine's processors had nothing to do, not even to lint.
struct Timed {
    name: String,
    elapsed: Duration,
    idle: Option<f64>,
}

/// Runs everything, stops at the first failure, and prints the time of each suite at the end.
pub(crate) fn run(repository: &Path) -> Result<()> {
    let mut times = Vec::new();
    let outcome = suites(repository, &mut times);
    tell(&times);
    outcome
}

/// Prints the time of each suite.
fn tell(times: &[Timed]) {
    say("");
    say("suite                                       seconds       idle");
    for timed in times {
        let idle = timed.idle.map_or_else(String::new, |idle| format!("{:>9.0}%", idle * 100.0));
        say(&format!("{:<40} {:>10.1} {idle}", timed.name, timed.elapsed.as_secs_f64()));
    }
    let total: f64 = times.iter().map(|timed| timed.elapsed.as_secs_f64()).sum();
    say(&format!("{:<40} {total:>10.1}", "all"));
}

/// How long a soak begins new simulated worlds, in seconds, unless `SIM_SECONDS` says otherwise: some thousands.
const SOAK_SIM_SECONDS: &str = "7200";

/// Rounds of kills in each lab of a soak, of a dozen or two each, unless `MAINSTAY_ROUNDS` says otherwise: more than an hour.
const SOAK_KILL_ROUNDS: &str = "20";

/// A part of a soak.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum SoakPart {
    /// Random worlds of the simulation, for two hours (`SIM_SECONDS`).
    Worlds,
    /// Kills at random moments on real VMs, for more than an hour (`MAINSTAY_ROUNDS`).
    Kills,
    /// An hour of fuzzing for each target (`MAINSTAY_FUZZ_SECONDS`).
    Fuzz,
}

/// Runs the tests that take too long for every change: all parts without any, and prints the time of each.
pub(crate) fn soak(repository: &Path, parts: &[SoakPart]) -> Result<()> {
    let parts = if parts.is_empty() { SoakPart::value_variants() } else { parts };
    let mut times = Vec::new();
    let outcome = parts
        .iter()
        .try_for_each(|&part| timed(&mut times, &format!("{part:?}"), || soak_part(repository, part)));
    tell(&times);
    outcome
}

fn soak_part(repository: &Path, part: SoakPart) -> Result<()> {
    let (test, scope, default) = match part {
        SoakPart::Worlds => (&["sim", "random"][..], "SIM_SECONDS", SOAK_SIM_SECONDS),
        SoakPart::Kills => (&["kills"][..], "MAINSTAY_ROUNDS", SOAK_KILL_ROUNDS),
        SoakPart::Fuzz => return fuzz::run(repository, &[]),
    };
    let chosen = std::env::var(scope).unwrap_or_else(|_| default.to_owned());
    let arguments = [&["test", "--workspace", "--test"], test, &["--", "--nocapture"]].concat();
    run_cargo(repository, &arguments, &[(scope, &chosen)])
}

fn suites(repository: &Path, times: &mut Vec<Timed>) -> Result<()> {
    // Downloads and compilers do not want the same things of the machine.
    let mut setup =
        Background::start("setup", Command::new(repository.join("scripts/setup.sh")).arg("test"))?;
    timed(times, "formatting", || run_cargo(repository, &["fmt", "--all", "--check"], &[]))?;
    timed(times, "tidy", || tidy::run(repository))?;
    let mut tests = Vec::new();
    timed(times, "build", || {
        tests = test_binaries(repository)?;
        Ok(())
    })?;
    timed(times, "setup", || setup.finish())?;
    timed(times, "dependencies", || deny(repository, &["bans", "licenses", "sources"]))?;
    let mut lints = lints(repository)?;
    let mut worlds = worlds(&tests)?;
    for test in &tests {
        timed(times, &test.name, || {
            // The fresh worlds are those in the background.
            let status = Command::new(&test.executable)
                .current_dir(&test.directory)
                .env("CARGO_MANIFEST_DIR", &test.directory)
                .env("SIM_SECONDS", "0")
                .env("RUST_TEST_THREADS", at_once(test).to_string())
                .status()?;
            if !status.success() {
                bail!("{} failed", test.executable.display());
            }
            Ok(())
        })?;
        lints.check()?;
        worlds.check()?;
    }
    timed(times, "lints", || lints.finish())?;
    timed(times, "fresh worlds", || worlds.finish())
}

/// How many tests of a suite run at a time: one for each processor, and twice as many where they wait for virtual machines to boot
/// most of the time.
fn at_once(test: &TestBinary) -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let has_machines =
        ["mainstay-cli:", "mainstay-kvm:"].iter().any(|package| test.name.starts_with(package));
    if has_machines { 2 * processors } else { processors }
}

/// Fresh random worlds of the simulation in a run of `ci`.
const FRESH_WORLDS: u64 = 300;
/// The test that runs them.
const WORLDS_TEST: &str = "random::random_worlds_keep_every_promise";

/// Begins fresh random worlds of the simulation: in the idle time of the other suites, like the lints.
fn worlds(tests: &[TestBinary]) -> Result<Background> {
    let sim = tests.iter().find(|test| test.name == "mainstay-sim: sim").context("the simulation's tests")?;
    // Without a test of that name nothing would run, and nothing fail.
    let listed = Command::new(&sim.executable).args(["--list", "--exact", WORLDS_TEST]).output()?;
    ensure!(listed.stdout.starts_with(WORLDS_TEST.as_bytes()), "there is no test '{WORLDS_TEST}'");
    // Different ones each time, and far from those that people count.
    let first = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() << 16;
    say(&format!("fresh worlds: {FRESH_WORLDS} seeds from {first} on, in what time the suites leave"));
    let mut command = Command::new("chrt");
    command.args(["--idle", "0"]).arg(&sim.executable);
    command.args([WORLDS_TEST, "--exact", "--quiet"]);
    command.env("SIM_FIRST_SEED", first.to_string()).env("SIM_SEEDS", FRESH_WORLDS.to_string());
    Background::start("fresh worlds", command.current_dir(&sim.directory))
}

/// Begins to lint. It compiles all dependencies once more, which takes minutes in a fresh clone, in the time that the tests leave
/// the processors idle: they wait for virtual machines to boot, and nothing waits for the lints.
fn lints(repository: &Path) -> Result<Background> {
    let mut command = Command::new("chrt");
    command.args(["--idle", "0", &cargo::program(), "clippy", "--quiet", "--workspace", "--all-targets"]);
    command.args(["--", "--deny", "warnings"]).current_dir(repository);
    Background::start("lints", cargo::from_shell(&mut command))
}

/// A program that runs beside the suites. Ended with them.
struct Background {
    name: &'static str,
    child: Child,
}

impl Background {
    fn start(name: &'static str, command: &mut Command) -> Result<Self> {
        let child = command.spawn().with_context(|| format!("start {name}: {command:?}"))?;
        Ok(Self { name, child })
    }

    /// An error if it has failed already.
    fn check(&mut self) -> Result<()> {
        let status = self.child.try_wait()?;
        self.judge(status.is_none_or(|status| status.success()))
    }

    fn finish(&mut self) -> Result<()> {
        let status = self.child.wait()?;
        self.judge(status.success())
    }

    fn judge(&self, is_good: bool) -> Result<()> {
        if is_good { Ok(()) } else { bail!("{} failed; what it said is above", self.name) }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            // It has ended in between, which is what is wanted.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Looks for known vulnerabilities in the dependencies. Not part of `ci`: the database of advisories is fetched from the
/// network, and yesterday's change must not turn red because of today's advisory.
pub(crate) fn audit(repository: &Path) -> Result<()> {
    deny(repository, &["advisories"])
}

/// Checks the dependencies against `deny.toml`.
fn deny(repository: &Path, checks: &[&str]) -> Result<()> {
    let program = repository.join(".cache/tools/bin/cargo-deny");
    let status = Command::new(&program)
        .args(["--log-level", "warn", "check", "--hide-inclusion-graph"])
        .args(checks)
        .current_dir(repository)
        .status()
        .with_context(|| format!("start {}; `make setup` installs it", program.display()))?;
    if !status.success() {
        bail!("cargo deny check {} failed", checks.join(" "));
    }
    Ok(())
}

/// A built test binary.
struct TestBinary {
    name: String,
    executable: PathBuf,
    directory: PathBuf,
}

/// Builds all tests at once and answers their binaries, in the order of the layers. Built package by package, libraries
/// would be compiled again for each set of features.
fn test_binaries(repository: &Path) -> Result<Vec<TestBinary>> {
    let mut build = cargo::command(repository);
    build.args(["test", "--quiet", "--workspace", "--no-run"]);
    let mut found = Vec::new();
    for message in cargo::programs(&mut build)? {
        let (Some(executable), Some(manifest), Some(true)) = (
            message["executable"].as_str(),
            message["manifest_path"].as_str(),
            message["profile"]["test"].as_bool(),
        ) else {
            continue;
        };
        let directory = Path::new(manifest).parent().context("a manifest lies in a directory")?.to_owned();
        let package = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let target = message["target"]["name"].as_str().unwrap_or_default();
        found.push(TestBinary {
            name: format!("{package}: {target}"),
            executable: executable.into(),
            directory,
        });
    }
    let order = tidy::packages(repository)?;
    found.sort_by_key(|test| {
        let package = test.name.split(':').next().unwrap_or_default();
        (order.iter().position(|name| name == package), test.name.clone())
    });
    Ok(found)
}

fn timed(times: &mut Vec<Timed>, name: &str, suite: impl FnOnce() -> Result<()>) -> Result<()> {
    say(&format!("== {name}"));
    let (began, ticks) = (Instant::now(), Ticks::now());
    let outcome = suite();
    let idle = ticks.zip(Ticks::now()).map(|(before, after)| after.idle_since(&before));
    times.push(Timed { name: name.to_owned(), elapsed: began.elapsed(), idle });
    outcome.with_context(|| name.to_owned())
}

/// What the machine's processors have done since it was started, in the kernel's own unit.
struct Ticks {
    idle: u64,
    all: u64,
}

impl Ticks {
    /// `None` where the kernel does not tell.
    fn now() -> Option<Self> {
        let stat = std::fs::read_to_string("/proc/stat").ok()?;
        // cpu user nice system idle iowait irq softirq steal …: proc_stat(5)
        let fields = stat.lines().next()?.split_whitespace().skip(1);
        let ticks: Vec<u64> = fields.map_while(|field| field.parse().ok()).take(8).collect();
        Some(Self { idle: ticks.get(3)? + ticks.get(4)?, all: ticks.iter().sum() })
    }

    fn idle_since(&self, before: &Self) -> f64 {
        (self.idle - before.idle) as f64 / (self.all - before.all).max(1) as f64
    }
}

fn run_cargo(repository: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    let mut command = cargo::command(repository);
    let status = command.args(arguments).envs(environment.iter().copied()).status()?;
    if !status.success() {
        bail!("cargo {} failed", arguments.join(" "));
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the report of the run is its output")]
pub(crate) fn say(text: &str) {
    println!("{text}");
}
