//! Tasks of the repository itself: `cargo xtask <task>`.

mod bench;
mod cargo;
mod ci;
mod cpio;
mod fuzz;
mod guest;
mod openapi;
mod tidy;

use std::path::Path;

use anyhow::Context as _;
use clap::Parser as _;

fn main() -> anyhow::Result<()> {
    let repository =
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies outside the repository")?;
    match Xtask::parse() {
        Xtask::Audit => ci::audit(repository),
        Xtask::Bench { arguments } => bench::run(repository, &arguments),
        Xtask::Ci => ci::run(repository),
        Xtask::Fuzz { targets } => fuzz::run(repository, &targets),
        Xtask::Guest { refresh } => guest::run(refresh),
        Xtask::Openapi => openapi::run(repository),
        Xtask::Soak { parts } => ci::soak(repository, &parts),
        Xtask::Tidy => tidy::run(repository),
    }
}

/// Tasks of the repository itself.
#[derive(clap::Parser)]
enum Xtask {
    /// Known vulnerabilities in the dependencies, from the RustSec database (needs the network).
    Audit,
    /// Everything that a change must pass: formatting, tidy, dependencies, lints, tests; prints the time per suite.
    Ci,
    /// Measures the product on real VMs, against its aims and other tools (`docs/benchmarks.md`).
    Bench {
        /// For the measuring program: `--json FILE`, `--only NAME`, `--quick`; `-- --help` explains them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Fuzzes what reads bytes from outside: each target for an hour, or `MAINSTAY_FUZZ_SECONDS` (nightly compiler needed).
    Fuzz {
        /// Names of targets; all without any.
        targets: Vec<String>,
    },
    /// Writes `docs/api/openapi-v1.json` anew, from the server's code.
    Openapi,
    /// The long tests: random worlds, random kills on real VMs, an hour of fuzzing for each target.
    Soak {
        /// All parts without any.
        parts: Vec<ci::SoakPart>,
    },
    /// Dependency direction, file sizes, format documents.
    Tidy,
    /// Builds the ledger guest (kernel and initramfs) into `.cache/guest`, without root.
    Guest {
        /// Fetches the Debian packages anew.
        #[arg(long)]
        refresh: bool,
    },
}
