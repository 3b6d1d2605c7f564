//! `cargo xtask openapi`: the document that is checked in, as the server answers it.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use crate::cargo;

/// Has the server say it and writes it down.
pub(crate) fn run(repository: &Path) -> Result<()> {
    let mut server = cargo::command(repository);
    let document =
        cargo::output_of(server.args(["run", "--quiet", "--bin", "mainstay", "--", "server", "openapi"]))?;
    let path = repository.join("docs/api/openapi-v1.json");
    fs::write(&path, document).with_context(|| format!("write {}", path.display()))
}
