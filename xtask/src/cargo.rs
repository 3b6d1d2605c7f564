//! Cargo, as if it were called from a shell.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// Cargo in the repository.
pub(crate) fn command(repository: &Path) -> Command {
    let mut command = Command::new(program());
    from_shell(&mut command).current_dir(repository);
    command
}

/// The program.
pub(crate) fn program() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}

/// Takes away what cargo says to a program that it runs, as it runs this one. Build scripts ask to be run anew when such a variable
/// changes (ring's does), and all that stands on them would be compiled once for `cargo xtask` and once more for a shell.
pub(crate) fn from_shell(command: &mut Command) -> &mut Command {
    for (name, _) in std::env::vars_os() {
        let is_about_us = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
        if name.to_str().is_some_and(is_about_us) {
            command.env_remove(name);
        }
    }
    command
}

/// Builds, and answers what cargo says of each program that there is then: the target directory may be anywhere.
pub(crate) fn programs(build: &mut Command) -> Result<Vec<Value>> {
    let messages = output_of(build.args(["--message-format", "json-render-diagnostics"]))?;
    let mut programs = Vec::new();
    for line in messages.lines() {
        let message: Value = serde_json::from_str(line)?;
        if message["executable"].is_string() {
            programs.push(message);
        }
    }
    Ok(programs)
}

/// Builds, and answers where the program of this name is.
pub(crate) fn program_of(build: &mut Command, name: &str) -> Result<PathBuf> {
    let built = programs(build)?;
    let program = built.iter().find(|program| program["target"]["name"] == name);
    let path = program.and_then(|program| program["executable"].as_str());
    Ok(path.with_context(|| format!("cargo built no program '{name}'"))?.into())
}

/// What a command of cargo's says on its standard output.
pub(crate) fn output_of(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::inherit()).output().with_context(|| format!("start {command:?}"))?;
    ensure!(output.status.success(), "{command:?} failed");
    Ok(String::from_utf8(output.stdout)?)
}
