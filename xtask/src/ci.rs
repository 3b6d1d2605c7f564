//! `cargo xtask ci`: what a change must pass. `make test` and the continuous integration call it and nothing else.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{fuzz, tidy};

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
    say("");
    say("suite                                       seconds       idle");
    for timed in &times {
        let idle = timed.idle.map_or_else(String::new, |idle| format!("{:>9.0}%", idle * 100.0));
        say(&format!("{:<40} {:>10.1} {idle}", timed.name, timed.elapsed.as_secs_f64()));
    }
    let total: f64 = times.iter().map(|timed| timed.elapsed.as_secs_f64()).sum();
    say(&format!("{:<40} {total:>10.1}", "all"));
    outcome
}

/// How long a soak begins new simulated worlds, in seconds, unless `SIM_SECONDS` says otherwise: some thousands.
const SOAK_SIM_SECONDS: &str = "7200";

/// Rounds of kills in each lab of a soak, of a dozen or two each, unless `MAINSTAY_ROUNDS` says otherwise: more than an hour.
const SOAK_KILL_ROUNDS: &str = "20";

/// Runs the tests that take too long for every change.
pub(crate) fn soak(repository: &Path) -> Result<()> {
    let seconds = std::env::var("SIM_SECONDS").unwrap_or_else(|_| SOAK_SIM_SECONDS.to_owned());
    let worlds = ["test", "--workspace", "--test", "sim", "random", "--", "--nocapture"];
    cargo_with(repository, &worlds, &[("SIM_SECONDS", &seconds)])?;
    let kills = ["test", "--workspace", "--test", "kills", "--", "--nocapture"];
    let rounds = std::env::var("MAINSTAY_ROUNDS").unwrap_or_else(|_| SOAK_KILL_ROUNDS.to_owned());
    cargo_with(repository, &kills, &[("MAINSTAY_ROUNDS", &rounds)])?;
    fuzz::run(repository, &[])
}

fn suites(repository: &Path, times: &mut Vec<Timed>) -> Result<()> {
    // Downloads and compilers do not want the same things of the machine.
    let mut setup =
        Background::start("setup", Command::new(repository.join("scripts/setup.sh")).arg("test"))?;
    timed(times, "formatting", || cargo(repository, &["fmt", "--all", "--check"]))?;
    timed(times, "tidy", || tidy::run(repository))?;
    let mut tests = Vec::new();
    timed(times, "build", || {
        tests = test_binaries(repository)?;
        Ok(())
    })?;
    timed(times, "setup", || setup.finish())?;
    timed(times, "dependencies", || deny(repository, &["bans", "licenses", "sources"]))?;
    let mut lints = lints(repository)?;
    for test in tests {
        timed(times, &test.name, || {
            let status = Command::new(&test.executable)
                .current_dir(&test.directory)
                .env("CARGO_MANIFEST_DIR", &test.directory)
                .status()?;
            if !status.success() {
                bail!("{} failed", test.executable.display());
            }
            Ok(())
        })?;
        lints.check()?;
    }
    timed(times, "lints", || lints.finish())
}

/// Begins to lint. It compiles all dependencies once more, which takes minutes in a fresh clone, in the time that the tests leave
/// the processors idle: they wait for virtual machines to boot, and nothing waits for the lints.
fn lints(repository: &Path) -> Result<Background> {
    let mut command = Command::new("chrt");
    command.args(["--idle", "0", &cargo_program(), "clippy", "--quiet", "--workspace", "--all-targets"]);
    command.args(["--", "--deny", "warnings"]).current_dir(repository);
    Background::start("lints", &mut command)
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
    let output = Command::new(cargo_program())
        .args(["test", "--quiet", "--workspace", "--no-run", "--message-format", "json-render-diagnostics"])
        .current_dir(repository)
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        bail!("the tests do not build");
    }
    let mut found = Vec::new();
    for line in String::from_utf8(output.stdout)?.lines() {
        let message: Value = serde_json::from_str(line)?;
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

fn cargo_program() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}

fn cargo(repository: &Path, arguments: &[&str]) -> Result<()> {
    cargo_with(repository, arguments, &[])
}

fn cargo_with(repository: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    let mut command = Command::new(cargo_program());
    let status =
        command.args(arguments).envs(environment.iter().copied()).current_dir(repository).status()?;
    if !status.success() {
        bail!("cargo {} failed", arguments.join(" "));
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the report of the run is its output")]
pub(crate) fn say(text: &str) {
    println!("{text}");
}
