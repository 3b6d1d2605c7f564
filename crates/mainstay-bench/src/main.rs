//! `mainstay-bench`: measures what the project promises, on real VMs, against other tools in the same run.
//!
//! Each measurement has a module, makes its own lab, and answers figures with an aim and an accepted value; see
//! `docs/benchmarks.md` for what is measured how, and for recorded results. Run it by `cargo xtask bench`.

mod control_plane;
mod data;
mod failback;
mod failover;
mod figure;
mod guest_latency;
mod initial;
mod output;
mod rpo;
mod space;
mod stand;
mod tool;
mod wire;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::Context as _;
use clap::Parser as _;

use crate::figure::{Figure, Verdict};
use crate::stand::Scale;

/// Measures Mainstay: a table on standard output, progress on standard error. Exit code 1 if a measurement failed or an
/// accepted value is missed.
#[derive(clap::Parser)]
#[command(name = "mainstay-bench", version)]
struct Arguments {
    /// Writes the figures as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only these measurements (may be given several times).
    #[arg(long, value_name = "NAME", value_parser = NAMES)]
    only: Vec<String>,
    /// Small disks and short times, to try the measurements themselves; the figures mean nothing.
    #[arg(long)]
    quick: bool,
    /// Where labs, stores and copies are made: all on one file system. A temporary directory by default.
    #[arg(long)]
    dir: Option<PathBuf>,
}

/// The measurements, in the order in which they run.
const NAMES: [&str; 8] =
    ["control-plane", "space", "initial-replication", "wire", "failover", "failback", "guest-latency", "rpo"];

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            output::note(&format!("mainstay-bench: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<bool> {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Runtime::new().context("the asynchronous runtime")?;
    let base = arguments.dir.clone().unwrap_or_else(mainstay_lab::scratch_dir);
    let dir = tempfile::Builder::new()
        .prefix("mainstay-bench-")
        .tempdir_in(&base)
        .with_context(|| format!("a directory in {}", base.display()))?;
    output::note(&format!("everything is made in {}", dir.path().display()));
    runtime.block_on(async {
        tokio::select! {
            done = measure(&arguments, dir.path()) => done,
            _ = tokio::signal::ctrl_c() => {
                // The lab of the measurement that was under way; its processes would outlive us.
                for name in NAMES.iter().filter(|name| dir.path().join(name).join("server.toml").exists()) {
                    mainstay_lab::Lab::down(&dir.path().join(name)).await?;
                }
                anyhow::bail!("interrupted")
            }
        }
    })
}

/// Whether everything was measured and accepted.
async fn measure(arguments: &Arguments, dir: &Path) -> anyhow::Result<bool> {
    let scale = if arguments.quick { Scale::Quick } else { Scale::Full };
    let (mut figures, mut is_complete) = (Vec::new(), true);
    for name in NAMES {
        if !arguments.only.is_empty() && !arguments.only.iter().any(|only| only == name) {
            continue;
        }
        output::note(&format!("== {name}"));
        let begun = Instant::now();
        let path = dir.join(name);
        let measured: anyhow::Result<Vec<Figure>> = match name {
            "control-plane" => control_plane::measure(&path, scale).await,
            "space" => space::measure(&path, scale).await,
            "initial-replication" => initial::measure(&path, scale).await,
            "wire" => wire::measure(&path, scale).await,
            "failover" => failover::measure(&path, scale).await,
            "failback" => failback::measure(&path, scale).await,
            "guest-latency" => guest_latency::measure(&path, scale).await,
            _ => rpo::measure(&path, scale).await,
        };
        match measured {
            Ok(measured) => {
                for figure in &measured {
                    output::note(&figure.row().join("  "));
                }
                figures.extend(measured);
            }
            Err(error) => {
                output::note(&format!("{name} could not be measured: {error:#}"));
                is_complete = false;
            }
        }
        output::note(&format!("   {:.0} s", begun.elapsed().as_secs_f64()));
    }
    output::table(&figures);
    if let Some(path) = &arguments.json {
        std::fs::write(path, serde_json::to_vec_pretty(&figures)?)
            .with_context(|| format!("write {}", path.display()))?;
    }
    Ok(is_complete && figures.iter().all(|figure| figure.verdict() != Verdict::Missed))
}
