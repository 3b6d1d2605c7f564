//! `cargo xtask bench`: builds the product and the measuring program, and runs it. The measuring itself is in
//! `mainstay-bench`, so that this program does not need the whole product to be built.

use std::{path::Path, process::Command};

use anyhow::{Result, bail};

use crate::cargo;

/// Builds optimised and runs with these arguments.
pub(crate) fn run(repository: &Path, arguments: &[String]) -> Result<()> {
    let mut build = cargo::command(repository);
    build.args(["build", "--release", "--package", "mainstay-cli", "--package", "mainstay-bench"]);
    let program = cargo::program_of(&mut build, "mainstay-bench")?;
    let status = Command::new(program).args(arguments).status()?;
    if !status.success() {
        bail!("a measurement failed, or an accepted value is missed; the table says which");
    }
    Ok(())
}
