//! `cargo xtask bench`: builds the product and the measuring program, and runs it. The measuring itself is in
//! `mainstay-bench`, so that this program does not need the whole product to be built.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::cargo;

/// Builds optimised and runs with these arguments.
pub(crate) fn run(repository: &Path, arguments: &[String]) -> Result<()> {
    let mut build = cargo::command(repository);
    build.args(["build", "--release", "--package", "mainstay-cli", "--package", "mainstay-bench"]);
    // Cargo says where it put the program; the target directory may be anywhere.
    let messages = cargo::output_of(build.args(["--message-format", "json-render-diagnostics"]))?;
    let built = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let programs = built.filter_map(|message| message["executable"].as_str().map(str::to_owned));
    let program = programs.into_iter().find(|path| path.ends_with("/mainstay-bench"));
    let program = program.context("cargo built no measuring program")?;
    let status = Command::new(program).args(arguments).status()?;
    if !status.success() {
        bail!("a measurement failed, or an accepted value is missed; the table says which");
    }
    Ok(())
}
