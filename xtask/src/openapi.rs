//! `cargo xtask openapi`: the document that is checked in, as the server answers it.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, bail};

/// Has the server say it and writes it down.
pub(crate) fn run(repository: &Path) -> Result<()> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args(["run", "--quiet", "--bin", "mainstay", "--", "server", "openapi"])
        .current_dir(repository)
        .stderr(std::process::Stdio::inherit())
        .output()?;
    if !output.status.success() {
        bail!("the server does not say its document");
    }
    let path = repository.join("docs/api/openapi-v1.json");
    fs::write(&path, output.stdout).with_context(|| format!("write {}", path.display()))
}
