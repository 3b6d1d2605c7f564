//! `cargo xtask fuzz`: each target of `fuzz/` for an hour, from the inputs that the repository keeps and those found before.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

/// How long each target runs, unless `MAINSTAY_FUZZ_SECONDS` says otherwise.
const SECONDS: u64 = 3600;
/// libFuzzer's options. Memory: several times the largest document (64 MiB) with what the sanitizer adds. Time for one input: none
/// takes a second without the sanitizer. Length: longer than a frame or a large body, short enough to be mutated.
const OPTIONS: [&str; 4] = ["-rss_limit_mb=2048", "-timeout=25", "-max_len=65536", "-print_final_stats=1"];

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
    for target in &targets {
        // What is found stays for the next time, but only what somebody chooses goes into the repository.
        let found = repository.join(".cache/fuzz").join(target);
        fs::create_dir_all(&found)?;
        let status = Command::new(&program)
            .args(["run", "--features", "control", target])
            .args([&found, &repository.join("fuzz/corpus").join(target)])
            .arg("--")
            .arg(format!("-max_total_time={seconds}"))
            .args(OPTIONS)
            .current_dir(repository)
            .env("RUSTUP_TOOLCHAIN", "nightly")
            // Ours is that of the toolchain that builds the rest.
            .env_remove("CARGO")
            .status()
            .with_context(|| format!("start {}", program.display()))?;
        ensure!(
            status.success(),
            "fuzzing '{target}' has found something: the input is in fuzz/artifacts/{target}; keep it in fuzz/corpus/{target} \
             with the fix, where every test run tries it"
        );
    }
    Ok(())
}
