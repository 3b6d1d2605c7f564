//! A VM's definition in a recovery point.
//!
//! The blob is JSON: `{"format": 1, "xml": …, "nvram": base64 or null, "tpm": base64 of a tar file or null}`. Format 1:
//! the first. `xml` is the inactive, migratable description of the domain, with secrets.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mainstay_model::VmId;
use mainstay_provider::{SiteError, VmDefinition};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::command::argument;
use crate::error::{While as _, failed};
use crate::files::{Owner, give, remove_directory};
use crate::host::Host;
use crate::libvirt::XmlKind;
use crate::xml::Domain;

const FORMAT: u32 = 1;
/// UEFI variables are 528 KiB with OVMF; anything much larger is something else.
const NVRAM_BYTES_MAX: u64 = 16 << 20;
/// A TPM's state is a few hundred KiB.
const TPM_BYTES_MAX: usize = 16 << 20;
/// Where libvirt as a system service keeps the state of TPMs.
const SYSTEM_TPM: &str = "/var/lib/libvirt/swtpm";

/// The decoded blob.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Definition {
    format: u32,
    pub(crate) xml: String,
    nvram: Option<String>,
    tpm: Option<String>,
}

impl Definition {
    /// Reads a blob.
    pub(crate) fn decode(definition: &VmDefinition) -> Result<Self, SiteError> {
        let decoded: Self = serde_json::from_slice(&definition.0)
            .map_err(|error| failed(format!("the recovery point's VM definition cannot be read: {error}")))?;
        if decoded.format != FORMAT {
            return Err(failed(format!("the VM definition has format {}, not {FORMAT}", decoded.format))
                .with_remedy("Update the agent of this host."));
        }
        Ok(decoded)
    }

    /// Writes the UEFI variables to a file; answers its path if there were any.
    pub(crate) fn write_nvram(
        &self,
        directory: &Path,
        owner: Option<Owner>,
    ) -> Result<Option<PathBuf>, SiteError> {
        let Some(text) = &self.nvram else { return Ok(None) };
        let bytes =
            STANDARD.decode(text).map_err(|error| failed(format!("reading UEFI variables: {error}")))?;
        let path = directory.join("nvram.fd");
        if !path.exists() {
            std::fs::write(&path, bytes).doing("writing UEFI variables")?;
        }
        give(&path, owner)?;
        Ok(Some(path))
    }

    /// Unpacks the TPM's state; answers its directory if there was any.
    pub(crate) async fn write_tpm(
        &self,
        directory: &Path,
        owner: Option<Owner>,
    ) -> Result<Option<PathBuf>, SiteError> {
        let Some(text) = &self.tpm else { return Ok(None) };
        let bytes =
            STANDARD.decode(text).map_err(|error| failed(format!("reading the TPM's state: {error}")))?;
        let path = directory.join("tpm");
        if path.exists() {
            return Ok(Some(path));
        }
        let new_path = directory.join("tpm.new");
        remove_directory(&new_path)?;
        std::fs::create_dir_all(&new_path).doing("making room for the TPM's state")?;
        let mut tar = Command::new("tar");
        tar.args(["--extract", "--no-same-owner", "--directory", argument(&new_path)?]);
        tar.stdin(Stdio::piped()).stdout(Stdio::null()).kill_on_drop(true);
        let mut child = tar.spawn().doing("starting tar")?;
        if let Some(mut input) = child.stdin.take() {
            input.write_all(&bytes).await.doing("unpacking the TPM's state")?;
        }
        if !child.wait().await.doing("unpacking the TPM's state")?.success() {
            return Err(failed("the TPM's state cannot be unpacked"));
        }
        for entry in std::fs::read_dir(&new_path)? {
            give(&entry?.path(), owner)?;
        }
        give(&new_path, owner)?;
        std::fs::rename(&new_path, &path).doing("unpacking the TPM's state")?;
        Ok(Some(path))
    }
}

/// Reads a VM's definition, with what belongs to it outside of libvirt's description.
pub(crate) async fn read(host: &Host, vm: VmId) -> Result<VmDefinition, SiteError> {
    // First, for the error that says which VM is missing.
    let domain = host.domain(vm, XmlKind::Inactive).await?;
    let xml = host.libvirt.xml(vm, XmlKind::Portable).await?;
    let definition = Definition {
        format: FORMAT,
        nvram: read_nvram(&domain)?,
        tpm: read_tpm(vm, &domain, &xml).await,
        xml,
    };
    let bytes =
        serde_json::to_vec(&definition).map_err(|error| failed(format!("writing a definition: {error}")))?;
    Ok(VmDefinition(bytes))
}

fn read_nvram(domain: &Domain) -> Result<Option<String>, SiteError> {
    // There is none before the first start.
    let Some(path) = domain.nvram.as_ref().filter(|path| path.exists()) else { return Ok(None) };
    let doing = format!("reading UEFI variables from {}", path.display());
    if std::fs::metadata(path).doing(&doing)?.len() > NVRAM_BYTES_MAX {
        return Err(failed(format!("{doing}: the file is too large")));
    }
    Ok(Some(STANDARD.encode(std::fs::read(path).doing(&doing)?)))
}

/// The TPM's state, if it can be reached: a recovery point without it is better than none.
async fn read_tpm(vm: VmId, domain: &Domain, xml: &str) -> Option<String> {
    if !domain.has_tpm {
        return None;
    }
    let directory = tpm_directory(vm, xml).filter(|path| path.is_dir());
    let Some(directory) = directory else {
        tracing::warn!(%vm, "the TPM's state cannot be reached; the recovery point will not hold it");
        return None;
    };
    let mut tar = Command::new("tar");
    // The daemon's lock is no part of the state.
    tar.args(["--create", "--exclude=.lock", "--directory"]).arg(&directory).arg(".");
    let output = tar.stdin(Stdio::null()).kill_on_drop(true).output().await.ok()?;
    if !output.status.success() || output.stdout.len() > TPM_BYTES_MAX {
        tracing::warn!(%vm, "the TPM's state cannot be read; the recovery point will not hold it");
        return None;
    }
    Some(STANDARD.encode(output.stdout))
}

fn tpm_directory(vm: VmId, xml: &str) -> Option<PathBuf> {
    let document = roxmltree::Document::parse(xml).ok()?;
    let backend = document.descendants().find(|node| {
        node.has_tag_name("backend") && node.parent().is_some_and(|parent| parent.has_tag_name("tpm"))
    })?;
    let source = backend.children().find(|node| node.has_tag_name("source"));
    match source.and_then(|source| source.attribute("path")) {
        Some(path) => Some(PathBuf::from(path)),
        None => Some(Path::new(SYSTEM_TPM).join(vm.to_string()).join("tpm2")),
    }
}
