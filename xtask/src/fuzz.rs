//! `cargo xtask fuzz`: each target of `fuzz/` for an hour, as many at once as there are processors, from the inputs that the
//! repository keeps and those found before.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use crate::{cargo, ci};

/// How long each target runs, unless `MAINSTAY_FUZZ_SECONDS` says otherwise.
const SECONDS: u64 = 3600;
/// libFuzzer's options. Memory: several times the largest document (64 MiB) with what the sanitizer adds. Time for one input: none
/// takes a second without the sanitizer. Length: longer than a frame or a large body, short enough to be mutated.
const OPTIONS: [&str; 4] = ["-rss_limit_mb=2048", "-timeout=25", "-max_len=65536", "-print_final_stats=1"];

/// Lines of libFuzzer's that are shown when it has found something.
const LINES_TOLD: usize = 40;

/// Fuzzes all targets, or those named; stops at the first that fails.
pub(crate) fn run(repository: &Path, names: &[String]) -> Result<()> {
    let seconds = match std::env::var("MAINSTAY_FUZZ_SECONDS") {
        Ok(text) => {
            text.parse().with_context(|| format!("MAINSTAY_FUZZ_SECONDS is '{text}', not a number"))?
        }
        Err(_) => SECONDS,
    };
    let program = repository.join(".cache/cargo/bin/cargo-fuzz");
    ensure!(program.exists(), "{} is missing: run `scripts/setup.sh soak`", program.display());
    let nightly =
        Command::new("rustup").args(["run", "nightly", "rustc", "--version"]).stdout(Stdio::null()).status();
    ensure!(
        nightly.is_ok_and(|status| status.success()),
        "fuzzing needs a nightly compiler: run `rustup toolchain install nightly`"
    );
    let mut targets = Vec::new();
    for entry in fs::read_dir(repository.join("fuzz/fuzz_targets"))? {
        let path = entry?.path();
        targets.push(path.file_stem().context("a target's name")?.to_string_lossy().into_owned());
    }
    targets.sort();
    if let Some(unknown) = names.iter().find(|name| !targets.contains(name)) {
        bail!("there is no target '{unknown}' (there are: {})", targets.join(", "));
    }
    targets.retain(|target| names.is_empty() || names.contains(target));
    let fuzz = Fuzz { repository, program, seconds };
    ensure!(fuzz.command("build").status()?.success(), "the targets do not build");
    // One for each processor: a target is one thread.
    let workers = std::thread::available_parallelism()?.get().min(targets.len());
    let queue = Mutex::new(targets.iter());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || -> Result<()> {
        while let Some(target) = next() {
            let executions = fuzz.run(target).inspect_err(|_| while next().is_some() {})?;
            ci::say(&format!("{target}: {executions} executions in {seconds} s, nothing found"));
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| anyhow!("a worker panicked"))?)
    })
}

struct Fuzz<'a> {
    repository: &'a Path,
    program: PathBuf,
    seconds: u64,
}

impl Fuzz<'_> {
    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.args([verb, "--features", "control"]).current_dir(self.repository);
        // Ours is that of the toolchain that builds the rest.
        cargo::from_shell(&mut command).env("RUSTUP_TOOLCHAIN", "nightly").env_remove("CARGO");
        command
    }

    /// Fuzzes a target; answers how often it was executed.
    fn run(&self, target: &str) -> Result<u64> {
        // What is found stays for the next time, but only what somebody chooses goes into the repository.
        let found = self.repository.join(".cache/fuzz").join(target);
        fs::create_dir_all(&found)?;
        let log = found.with_extension("log");
        let status = self
            .command("run")
            .arg(target)
            .args([&found, &self.repository.join("fuzz/corpus").join(target)])
            .arg("--")
            .arg(format!("-max_total_time={}", self.seconds))
            .args(OPTIONS)
            .stderr(fs::File::create(&log)?)
            .status()
            .with_context(|| format!("start {}", self.program.display()))?;
        let said = fs::read_to_string(&log)?;
        let lines: Vec<_> = said.lines().collect();
        ensure!(
            status.success(),
            "fuzzing '{target}' has found something: the input is in fuzz/artifacts/{target}; keep it in fuzz/corpus/{target} \
             with the fix, where every test run tries it. {} ends so:\n{}",
            log.display(),
            lines[lines.len().saturating_sub(LINES_TOLD)..].join("\n")
        );
        let executions = lines.iter().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
        executions.and_then(|number| number.trim().parse().ok()).with_context(|| {
            format!("libFuzzer does not say how often it has executed '{target}': see {}", log.display())
        })
    }
}
