//! A VM's definition in a recovery point.
//!
//! The blob is JSON: `{"format": 1, "xml": …, "nvram": base64 or null, "tpm": base64 of a tar file or null}`. Format 1:
//! the first. `xml` is the inactive, migratable description of the domain, with secrets.

use std::fs::Permissions;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mainstay_model::VmId;
use mainstay_provider::{PowerState, SiteError, VmDefinition};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::command::argument;
use crate::error::{While as _, failed, refused};
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
        if !holds_only_files(&new_path).doing("looking at the TPM's state")? {
            remove_directory(&new_path)?;
            return Err(failed(
                "the TPM's state in the recovery point holds links or devices, which no TPM makes",
            )
            .with_remedy("Choose another recovery point, and see who has written on the VM's host."));
        }
        for entry in std::fs::read_dir(&new_path)? {
            give(&entry?.path(), owner)?;
        }
        give(&new_path, owner)?;
        std::fs::rename(&new_path, &path).doing("unpacking the TPM's state")?;
        mainstay_block::durable::sync_parent(&path).doing("unpacking the TPM's state")?;
        Ok(Some(path))
    }
}

/// Whether there is nothing but files and directories in a directory. What another host has packed is then handled as if it
/// were ours: a link would lead elsewhere.
fn holds_only_files(directory: &Path) -> std::io::Result<bool> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        let is_good = kind.is_file() || kind.is_dir() && holds_only_files(&entry.path())?;
        if !is_good {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Reads a VM's definition, with what belongs to it outside of libvirt's description.
pub(crate) async fn read(host: &Host, vm: VmId) -> Result<VmDefinition, SiteError> {
    // First, for the error that says which VM is missing.
    let domain = host.domain(vm, XmlKind::Inactive).await?;
    let xml = host.libvirt.xml(vm, XmlKind::Portable).await?;
    let definition = Definition {
        format: FORMAT,
        nvram: read_nvram(&domain)?,
        tpm: read_tpm(host, vm, &domain, &xml).await,
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
async fn read_tpm(host: &Host, vm: VmId, domain: &Domain, xml: &str) -> Option<String> {
    if !domain.has_tpm {
        return None;
    }
    let Some(directory) = tpm_directory(host, vm, domain, xml) else {
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

/// Puts a definition's UEFI variables and TPM state into a VM that is off, in place of its own.
pub(crate) async fn restore_state(host: &Host, vm: VmId, definition: &VmDefinition) -> Result<(), SiteError> {
    let _lock = host.lock(vm).await;
    let definition = Definition::decode(definition)?;
    if definition.nvram.is_none() && definition.tpm.is_none() {
        return Ok(());
    }
    if host.power(vm).await? != PowerState::Off {
        return Err(refused("the VM runs", "Shut it down before its firmware's state is replaced."));
    }
    let domain = host.domain(vm, XmlKind::Inactive).await?;
    if let (Some(text), Some(path)) = (&definition.nvram, &domain.nvram) {
        let bytes =
            STANDARD.decode(text).map_err(|error| failed(format!("reading UEFI variables: {error}")))?;
        replace_file(path, &bytes).doing(&format!("writing UEFI variables to {}", path.display()))?;
    }
    let xml = host.libvirt.xml(vm, XmlKind::Portable).await?;
    match tpm_directory(host, vm, &domain, &xml).filter(|_| definition.tpm.is_some()) {
        Some(present) => {
            let scratch = host.files.run().join(format!("{}-tpm", vm.0.simple()));
            remove_directory(&scratch)?;
            std::fs::create_dir_all(&scratch).doing("making room for the TPM's state")?;
            if let Some(unpacked) = definition.write_tpm(&scratch, None).await? {
                for entry in std::fs::read_dir(&unpacked)? {
                    let entry = entry?;
                    let bytes = std::fs::read(entry.path()).doing("reading the TPM's state")?;
                    let path = present.join(entry.file_name());
                    replace_file(&path, &bytes)
                        .doing(&format!("writing the TPM's state to {}", path.display()))?;
                }
            }
            remove_directory(&scratch)
        }
        None if definition.tpm.is_some() && domain.has_tpm => {
            tracing::warn!(%vm, "the TPM's state cannot be reached and stays as it was");
            Ok(())
        }
        None => Ok(()),
    }
}

/// Replaces a file, whole or not at all, by one of the same owner (or its directory's) and rights.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let like = match std::fs::metadata(path) {
        Ok(present) => Some(present),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let parent = path.parent().map(std::fs::metadata).transpose()?;
    let new_path = path.with_extension("new");
    let mut file = std::fs::File::create(&new_path)?;
    file.set_permissions(like.as_ref().map_or(Permissions::from_mode(0o600), |like| like.permissions()))?;
    if nix::unistd::Uid::effective().is_root()
        && let Some(owner) = like.or(parent)
    {
        std::os::unix::fs::chown(&new_path, Some(owner.uid()), Some(owner.gid()))?;
    }
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&new_path, path)?;
    mainstay_block::durable::sync_parent(path)
}

/// Where the TPM's state lies. libvirt says so only if somebody chose the place; its own choice depends on how it was
/// started, and is beside the UEFI variables where it runs for a user.
fn tpm_directory(host: &Host, vm: VmId, domain: &Domain, xml: &str) -> Option<PathBuf> {
    let document = roxmltree::Document::parse(xml).ok()?;
    let backend = document.descendants().find(|node| {
        node.has_tag_name("backend") && node.parent().is_some_and(|parent| parent.has_tag_name("tpm"))
    })?;
    let source = backend.children().find(|node| node.has_tag_name("source"));
    if let Some(path) = source.and_then(|source| source.attribute("path")) {
        return Some(PathBuf::from(path)).filter(|path| path.is_dir());
    }
    let of_vm = |base: PathBuf| base.join(vm.to_string()).join("tpm2");
    let mut places = Vec::new();
    if host.libvirt.uri().starts_with("qemu:///system") {
        places.push(of_vm(PathBuf::from(SYSTEM_TPM)));
    }
    // …/libvirt/qemu/nvram/NAME_VARS.fd and …/libvirt/qemu/swtpm/UUID/tpm2.
    let beside = domain.nvram.as_ref().and_then(|path| path.parent()?.parent());
    places.extend(beside.map(|base| of_vm(base.join("swtpm"))));
    places.into_iter().find(|path| path.is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A definition whose TPM state is what `tar` packs with these words, in a directory with a link and a file.
    fn with_tpm(words: &[&str]) -> Definition {
        let directory = tempfile::tempdir().unwrap();
        let inside = directory.path().join("inside");
        std::fs::create_dir(&inside).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", inside.join("link")).unwrap();
        std::fs::write(inside.join("tpm2-00.permall"), "state").unwrap();
        std::fs::write(directory.path().join("outside"), "planted").unwrap();
        let mut tar = std::process::Command::new("tar");
        tar.args(["--create", "--absolute-names", "--directory"]).arg(&inside).args(words);
        let output = tar.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        Definition {
            format: FORMAT,
            xml: String::new(),
            nvram: None,
            tpm: Some(STANDARD.encode(output.stdout)),
        }
    }

    #[tokio::test]
    async fn a_tpms_state_leads_nowhere_else() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("a/b");
        std::fs::create_dir_all(&target).unwrap();
        let refused = with_tpm(&["."]).write_tpm(&target, None).await.unwrap_err();
        assert!(refused.message.contains("links"), "{refused}");
        // Nothing is left of it, and nothing lies beside it. tar itself refuses to go up.
        assert!(with_tpm(&["../outside"]).write_tpm(&target, None).await.is_err());
        assert!(!target.join("tpm").exists() && !directory.path().join("a/outside").exists());
        let good = with_tpm(&["tpm2-00.permall"]).write_tpm(&target, None).await.unwrap().unwrap();
        assert_eq!(std::fs::read(good.join("tpm2-00.permall")).unwrap(), b"state");
    }

    #[test]
    fn a_file_is_replaced_with_its_rights() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("web_VARS.fd");
        std::fs::write(&path, "old").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        replace_file(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        let fresh = directory.path().join("tpm2-00.permall");
        replace_file(&fresh, b"state").unwrap();
        assert_eq!(std::fs::metadata(&fresh).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
    }
}
