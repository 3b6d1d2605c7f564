//! Tasks of the repository itself: `cargo xtask <task>`.

fn main() -> anyhow::Result<()> {
    use clap::Parser as _;
    match Xtask::parse() {}
}

/// Tasks of the repository itself.
#[derive(clap::Parser)]
enum Xtask {}
