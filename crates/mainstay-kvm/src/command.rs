//! Running QEMU's command-line tools.

use std::path::Path;
use std::process::Stdio;

use mainstay_provider::{ErrorKind, SiteError};
use serde_json::Value;
use tokio::process::Command;

use crate::error::failed;

/// Runs a tool to its end and answers its standard output. The tool ends with the future.
pub(crate) async fn run(program: &str, arguments: &[&str]) -> Result<String, SiteError> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.map_err(|error| failed(format!("starting {program}: {error}")))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let action = arguments.first().copied().unwrap_or_default();
    Err(SiteError::new(kind_of(&text), format!("{program} {action}: {text}")))
}

pub(crate) fn kind_of(text: &str) -> ErrorKind {
    if text.contains("lock") && text.contains("Failed to get") {
        ErrorKind::Busy
    } else if text.contains("No space left") {
        ErrorKind::NoSpace
    } else if text.contains("No such file") {
        ErrorKind::NotFound
    } else {
        ErrorKind::Failed
    }
}

/// A path as an argument. QEMU reads a colon before the first slash as a protocol, so paths are absolute.
pub(crate) fn argument(path: &Path) -> Result<&str, SiteError> {
    path.to_str().filter(|text| text.starts_with('/')).ok_or_else(|| {
        failed(format!("{} is not an absolute path in UTF-8, which QEMU's tools need", path.display()))
    })
}

/// What `qemu-img info` says about an image that may be in use, without its backing files.
pub(crate) async fn image_info(path: &Path, format: &str) -> Result<Value, SiteError> {
    let text = run("qemu-img", &["info", "-U", "--output=json", "-f", format, argument(path)?]).await?;
    serde_json::from_str(&text).map_err(|error| failed(format!("reading qemu-img's answer: {error}")))
}

/// The same of a qcow2 image and all images beneath it, nearest first.
pub(crate) async fn image_chain(path: &Path) -> Result<Vec<Value>, SiteError> {
    let arguments = ["info", "-U", "--output=json", "--backing-chain", "-f", "qcow2", argument(path)?];
    let text = run("qemu-img", &arguments).await?;
    serde_json::from_str(&text).map_err(|error| failed(format!("reading qemu-img's answer: {error}")))
}

/// The names of our bitmaps in an image, with whether each is usable.
pub(crate) async fn image_bitmaps(path: &Path) -> Result<Vec<(String, bool)>, SiteError> {
    let info = image_info(path, "qcow2").await?;
    let list = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    let read = |bitmap: &Value| {
        let name = bitmap["name"].as_str()?.to_owned();
        let flags = bitmap["flags"].as_array().map(Vec::as_slice).unwrap_or_default();
        // `in-use`: QEMU died with it; `auto`: it notes writes whenever the image is open.
        let is_usable = flags.iter().any(|flag| flag == "auto") && !flags.iter().any(|flag| flag == "in-use");
        name.starts_with(crate::nodes::PREFIX).then_some((name, is_usable))
    };
    Ok(list.iter().filter_map(read).collect())
}
