//! The driver's state in memory: the connection, who owns what, and what is open.

use std::collections::{HashMap, HashSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mainstay_model::VmId;
use mainstay_provider::{Network, PowerState, SiteError};
use tokio::sync::OwnedMutexGuard;

use crate::error::{While as _, failed, not_found};
use crate::files::{Files, Owner, give};
use crate::libvirt::{Libvirt, NO_DOMAIN, XmlKind};
use crate::xml::Domain;

/// How to reach a host and where to keep things on it.
#[derive(Clone, Debug)]
pub struct KvmOptions {
    /// libvirt's URI: `qemu:///system`, or `qemu:///session?socket=…`.
    pub uri: String,
    /// The driver's own directory, at most 60 bytes long, with room for recovery VMs' disks. QEMU's account must
    /// be able to pass through its parents.
    pub directory: PathBuf,
    /// Where the sockets lie over which recovery VMs read, if not there: looked at for what the host lacks.
    pub socket_directory: Option<PathBuf>,
    /// Networks that libvirt does not know of: `mcast:ADDRESS:PORT`, `bridge:NAME`.
    pub networks: Vec<Network>,
    /// How fast each disk of a recovery VM is copied out of the store at most; `None` = as fast as it goes.
    pub hydration_bytes_per_second: Option<u64>,
}

/// What all parts of the driver share.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) libvirt: Libvirt,
    pub(crate) files: Files,
    pub(crate) options: KvmOptions,
    /// Read once: libvirt takes up to eight seconds to put them together, every time.
    capabilities: tokio::sync::OnceCell<String>,
    /// One operation at a time that changes a VM.
    locks: Mutex<HashMap<VmId, Arc<tokio::sync::Mutex<()>>>>,
    /// Captures that are open in this process.
    captures: Mutex<HashSet<VmId>>,
    /// Locked home disks of staging areas.
    pub(crate) staged: Mutex<HashMap<VmId, Vec<std::fs::File>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Host {
    pub(crate) fn open(options: KvmOptions) -> Result<Self, SiteError> {
        Ok(Self {
            libvirt: Libvirt::new(options.uri.clone()),
            files: Files::open(&options.directory)?,
            options,
            capabilities: tokio::sync::OnceCell::new(),
            locks: Mutex::default(),
            captures: Mutex::default(),
            staged: Mutex::default(),
        })
    }

    /// Waits for other operations on the VM.
    pub(crate) async fn lock(&self, vm: VmId) -> OwnedMutexGuard<()> {
        let mutex = Arc::clone(lock(&self.locks).entry(vm).or_default());
        mutex.lock_owned().await
    }

    /// Notes a capture; `false` if one is open.
    pub(crate) fn note_capture(&self, vm: VmId) -> bool {
        lock(&self.captures).insert(vm)
    }

    pub(crate) fn forget_capture(&self, vm: VmId) {
        lock(&self.captures).remove(&vm);
    }

    pub(crate) fn has_capture(&self, vm: VmId) -> bool {
        lock(&self.captures).contains(&vm)
    }

    /// The host's capabilities as XML, as of the first time they were asked for.
    pub(crate) async fn capabilities(&self) -> Result<&str, SiteError> {
        let read = self.capabilities.get_or_try_init(|| self.libvirt.capabilities());
        read.await.map(String::as_str).doing("asking libvirt for the host's capabilities")
    }

    /// The account under which QEMU runs, if files must be given to it.
    pub(crate) async fn owner(&self) -> Result<Option<Owner>, SiteError> {
        if !nix::unistd::Uid::effective().is_root() {
            return Ok(None);
        }
        if let Some(owner) = qemu_account(self.capabilities().await?) {
            return Ok(Some(owner));
        }
        // A daemon of an ordinary user runs QEMU as that user, who also owns its socket.
        let socket =
            self.options.uri.split_once("socket=").map(|(_, path)| path.split('&').next().unwrap_or(path));
        match socket {
            Some(socket) => {
                let metadata = std::fs::metadata(socket).doing(&format!("looking at {socket}"))?;
                Ok(Some(Owner { uid: metadata.uid(), gid: metadata.gid() }))
            }
            None => Ok(None),
        }
    }

    /// Makes a directory that QEMU may write to.
    pub(crate) async fn make_directory(&self, path: &std::path::Path) -> Result<(), SiteError> {
        mainstay_block::durable::create_directory(path).doing(&format!("creating {}", path.display()))?;
        give(path, self.owner().await?)
    }

    /// Reads a description.
    pub(crate) async fn domain(&self, vm: VmId, kind: XmlKind) -> Result<Domain, SiteError> {
        Domain::parse(&self.libvirt.xml(vm, kind).await.map_err(|error| no_vm(vm, error))?)
    }

    pub(crate) async fn power(&self, vm: VmId) -> Result<PowerState, SiteError> {
        Ok(self.libvirt.state(vm).await.map_err(|error| no_vm(vm, error))?.power)
    }

    /// Whether libvirt knows the VM.
    pub(crate) async fn exists(&self, vm: VmId) -> Result<bool, SiteError> {
        match self.libvirt.name(vm).await {
            Ok(_) => Ok(true),
            Err(error) if error.code == NO_DOMAIN => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

fn no_vm(vm: VmId, error: crate::libvirt::LibvirtError) -> SiteError {
    if error.code == NO_DOMAIN {
        not_found(format!("there is no VM {vm} on this host"))
    } else {
        error.into()
    }
}

/// The account in libvirt's security model `dac`: `<baselabel type='kvm'>+64055:+107</baselabel>`.
fn qemu_account(capabilities: &str) -> Option<Owner> {
    let document = roxmltree::Document::parse(capabilities).ok()?;
    let is_dac = |node: &roxmltree::Node<'_, '_>| {
        node.has_tag_name("secmodel")
            && node.children().any(|child| child.has_tag_name("model") && child.text() == Some("dac"))
    };
    let model = document.descendants().find(is_dac)?;
    let label = model.children().find(|child| child.has_tag_name("baselabel"))?.text()?;
    let (uid, gid) = label.split_once(':')?;
    let number = |text: &str| text.trim_start_matches('+').parse().ok();
    Some(Owner { uid: number(uid)?, gid: number(gid)? })
}

/// The disk of a description, or an error that names it.
pub(crate) fn find_disk<'a>(domain: &'a Domain, key: &str) -> Result<&'a crate::xml::DomainDisk, SiteError> {
    domain.disk(key).ok_or_else(|| not_found(format!("VM {} has no disk {key}", domain.name)))
}

/// The image of a disk on the host.
pub(crate) fn disk_path(disk: &crate::xml::DomainDisk) -> Result<PathBuf, SiteError> {
    let path =
        disk.path.as_ref().ok_or_else(|| failed(format!("disk {} is not a file or device", disk.key)))?;
    Ok(PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_qemus_account() {
        let xml =
            "<capabilities><host><secmodel><model>apparmor</model></secmodel><secmodel><model>dac</model>
            <doi>0</doi><baselabel type='kvm'>+64055:+107</baselabel></secmodel></host></capabilities>";
        assert_eq!(qemu_account(xml), Some(Owner { uid: 64055, gid: 107 }));
        assert_eq!(qemu_account("<capabilities/>"), None);
    }
}
