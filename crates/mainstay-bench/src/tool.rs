//! Other programs: the peers, and what is needed to set them to work.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use tokio::process::Command;

/// Runs a program to its good end and answers what it printed.
pub(crate) async fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .kill_on_drop(true)
        .output()
        .await
        .with_context(|| format!("starting {program}; `scripts/setup.sh bench` installs the peers"))?;
    if !output.status.success() {
        bail!(
            "{program} {} failed: {} {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim(),
            String::from_utf8_lossy(&output.stdout).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A path as an argument.
pub(crate) fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

/// Bytes of all files in a directory and below.
pub(crate) fn bytes_in(directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    let entries = std::fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        let kind = entry.metadata()?;
        bytes += if kind.is_dir() { bytes_in(&entry.path())? } else { kind.len() };
    }
    Ok(bytes)
}
