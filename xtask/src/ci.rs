//! `cargo xtask ci`: what a change must pass. `make test` and the continuous integration call it and nothing else.

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::tidy;

/// A suite and how long it took.
struct Timed {
    name: String,
    elapsed: Duration,
}

/// Runs everything, stops at the first failure, and prints the time of each suite at the end.
pub(crate) fn run(repository: &Path) -> Result<()> {
    let mut times = Vec::new();
    let outcome = suites(repository, &mut times);
    say("");
    say("suite                                       seconds");
    for timed in &times {
        say(&format!("{:<40} {:>10.1}", timed.name, timed.elapsed.as_secs_f64()));
    }
    let total: f64 = times.iter().map(|timed| timed.elapsed.as_secs_f64()).sum();
    say(&format!("{:<40} {total:>10.1}", "all"));
    outcome
}

/// Runs the tests that take too long for every change.
pub(crate) fn soak(repository: &Path) -> Result<()> {
    cargo(
        repository,
        &["test", "--package", "mainstay-cli", "--test", "kills", "--", "--ignored", "--nocapture"],
    )
}

fn suites(repository: &Path, times: &mut Vec<Timed>) -> Result<()> {
    timed(times, "formatting", || cargo(repository, &["fmt", "--all", "--check"]))?;
    timed(times, "tidy", || tidy::run(repository))?;
    timed(times, "lints", || {
        cargo(repository, &["clippy", "--quiet", "--workspace", "--all-targets", "--", "--deny", "warnings"])
    })?;
    timed(times, "build", || cargo(repository, &["test", "--quiet", "--workspace", "--no-run"]))?;
    for package in tidy::packages(repository)? {
        timed(times, &format!("tests of {package}"), || cargo(repository, &["test", "--package", &package]))?;
    }
    Ok(())
}

fn timed(times: &mut Vec<Timed>, name: &str, suite: impl FnOnce() -> Result<()>) -> Result<()> {
    say(&format!("== {name}"));
    let began = Instant::now();
    let outcome = suite();
    times.push(Timed { name: name.to_owned(), elapsed: began.elapsed() });
    outcome.with_context(|| name.to_owned())
}

fn cargo(repository: &Path, arguments: &[&str]) -> Result<()> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let status = Command::new(cargo).args(arguments).current_dir(repository).status()?;
    if !status.success() {
        bail!("cargo {} failed", arguments.join(" "));
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the report of the run is its output")]
fn say(text: &str) {
    println!("{text}");
}
