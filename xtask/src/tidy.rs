//! Rules that a machine can check: which crate may depend on which, how long a file may be, which formats have a
//! document, and what the repository must not say.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

/// Crates from the bottom up; a crate may depend only on crates of lower layers.
const LAYERS: &[&[&str]] = &[
    &["mainstay-model", "mainstay-block", "mainstay-api", "mainstay-ledger"],
    &["mainstay-nbd", "mainstay-store", "mainstay-provider"],
    &["mainstay-replication", "mainstay-kvm"],
    &["mainstay-control", "mainstay-agent"],
    &["mainstay-server", "mainstay-lab", "mainstay-sim"],
    &["mainstay-cli", "mainstay-bench"],
];

/// Longest source file; longer ones are split.
const LINES_MAX: usize = 800;

/// Files that may be longer, each with its reason.
const LONG_FILES: &[(&str, &str)] = &[(
    "crates/mainstay-api/src/arm.rs",
    "one shape after the other, in the order of the official documents",
)];

/// Byte formats and the documents that specify them.
const FORMATS: &[&str] =
    &["catalogue", "frame", "hash-table", "layer", "manifest", "sealed", "segment", "wire"];

/// Names of all packages, lowest first.
pub(crate) fn packages(repository: &Path) -> Result<Vec<String>> {
    let mut found: Vec<String> =
        LAYERS.iter().flat_map(|layer| layer.iter()).map(|name| (*name).to_owned()).collect();
    found.retain(|name| repository.join("crates").join(name).exists());
    found.push("xtask".to_owned());
    Ok(found)
}

/// Checks all rules and reports everything that breaks one.
pub(crate) fn run(repository: &Path) -> Result<()> {
    let mut complaints = Vec::new();
    layers(repository, &mut complaints)?;
    sources(repository, &mut complaints)?;
    for format in FORMATS {
        let document = repository.join("docs/formats").join(format!("{format}.md"));
        if !document.exists() {
            complaints.push(format!("{} is missing: formats are promises", document.display()));
        }
    }
    if complaints.is_empty() {
        return Ok(());
    }
    bail!("{}", complaints.join("\n"));
}

fn layer_of(name: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&name))
}

fn layers(repository: &Path, complaints: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(repository.join("crates"))? {
        let path = entry?.path();
        let name = path.file_name().context("a crate's name")?.to_string_lossy().into_owned();
        let Some(layer) = layer_of(&name) else {
            complaints.push(format!("crate {name} has no layer in xtask/src/tidy.rs"));
            continue;
        };
        let manifest = fs::read_to_string(path.join("Cargo.toml"))?;
        let dependencies = manifest.split("[dependencies]").nth(1).unwrap_or_default();
        let dependencies = dependencies.split("\n[").next().unwrap_or_default();
        for line in dependencies.lines() {
            let dependency = line.split(['.', ' ', '=']).next().unwrap_or_default();
            if let Some(below) = layer_of(dependency)
                && below >= layer
            {
                complaints
                    .push(format!("{name} must not depend on {dependency}: dependencies point downwards"));
            }
        }
    }
    Ok(())
}

fn sources(repository: &Path, complaints: &mut Vec<String>) -> Result<()> {
    let mut files = Vec::new();
    for directory in ["crates", "xtask"] {
        collect(&repository.join(directory), &mut files)?;
    }
    for file in files {
        let text = fs::read_to_string(&file)?;
        let name = file.strip_prefix(repository)?.to_string_lossy().into_owned();
        let lines = text.lines().count();
        if lines > LINES_MAX && !LONG_FILES.iter().any(|(long, _)| *long == name) {
            complaints.push(format!("{name} has {lines} lines; split it near {LINES_MAX}"));
        }
        // Spelt in two halves, so that this file does not find itself.
        for word in [concat!("todo", "!("), concat!("unimplemented", "!("), concat!("dbg", "!(")] {
            if text.contains(word) {
                complaints.push(format!("{name} contains {word}…)"));
            }
        }
    }
    Ok(())
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}
