//! Tasks of the repository itself: `cargo xtask <task>`.

mod cpio;
mod guest;

use clap::Parser as _;

fn main() -> anyhow::Result<()> {
    match Xtask::parse() {
        Xtask::Guest { refresh } => guest::run(refresh),
    }
}

/// Tasks of the repository itself.
#[derive(clap::Parser)]
enum Xtask {
    /// Builds the ledger guest (kernel and initramfs) into `.cache/guest`, without root.
    Guest {
        /// Fetches the Debian packages anew.
        #[arg(long)]
        refresh: bool,
    },
}
