//! Where the driver keeps things, and who may touch them.
//!
//! | beneath the driver's directory | |
//! |---|---|
//! | `captures/VM.json` | a capture that is open, or was when the agent died |
//! | `recovery/VM/` | images and record of a recovery VM |
//! | `staging/VM/` | overlays and record of a staging area |
//! | `run/` | sockets and scratch files; QEMU makes some of them, so it belongs to QEMU's account |

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, lchown};
use std::path::{Path, PathBuf};

use mainstay_block::durable::{create_directory, sync_parent, write_aside};
use mainstay_model::VmId;
use mainstay_provider::SiteError;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{While as _, failed, refused};

/// Sockets are named `run/` and a name of at most 42 bytes, and Linux allows 107 in all.
const DIRECTORY_BYTES_MAX: usize = 60;
/// libvirt's names of disks are two or three letters, a few more for the number.
const DISK_KEY_BYTES_MAX: usize = 32;

/// The account under which QEMU runs, if it is not ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// The driver's directory.
#[derive(Clone, Debug)]
pub(crate) struct Files {
    directory: PathBuf,
}

impl Files {
    /// Lays the directory out. Its parents must be passable for QEMU's account.
    pub(crate) fn open(directory: &Path) -> Result<Self, SiteError> {
        if directory.as_os_str().len() > DIRECTORY_BYTES_MAX {
            return Err(failed(format!(
                "the directory {} is too long for sockets: at most {DIRECTORY_BYTES_MAX} bytes",
                directory.display()
            )));
        }
        for name in ["", "captures", "recovery", "staging", "run"] {
            let path = directory.join(name);
            create_directory(&path).doing(&format!("creating {}", path.display()))?;
            // Nobody but the owners of what is inside may read it; everybody may pass who knows a name.
            let mode = if matches!(name, "captures" | "staging") { 0o700 } else { 0o711 };
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        }
        Ok(Self { directory: directory.to_owned() })
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn run(&self) -> PathBuf {
        self.directory.join("run")
    }

    pub(crate) fn capture_record(&self, vm: VmId) -> PathBuf {
        self.directory.join("captures").join(format!("{vm}.json"))
    }

    pub(crate) fn recovery(&self, vm: VmId) -> PathBuf {
        self.directory.join("recovery").join(vm.to_string())
    }

    pub(crate) fn staging(&self, vm: VmId) -> PathBuf {
        self.directory.join("staging").join(vm.to_string())
    }

    /// The VMs of which there is a record of an open capture.
    pub(crate) fn captured_vms(&self) -> Result<Vec<VmId>, SiteError> {
        let mut vms = Vec::new();
        for entry in fs::read_dir(self.directory.join("captures"))? {
            let path = entry?.path();
            let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            if let (Ok(vm), Some("json")) = (stem.parse(), path.extension().and_then(|end| end.to_str())) {
                vms.push(vm);
            }
        }
        Ok(vms)
    }
}

/// Gives a file to QEMU's account.
pub(crate) fn give(path: &Path, owner: Option<Owner>) -> Result<(), SiteError> {
    match owner {
        Some(owner) => {
            // Never through a symbolic link, to something of somebody else.
            lchown(path, Some(owner.uid), Some(owner.gid))
                .doing(&format!("giving {} to QEMU", path.display()))
        }
        None => Ok(()),
    }
}

/// Refuses names of disks that could lead out of a directory, or that libvirt would not give. They come from another host.
pub(crate) fn check_disk_key(key: &str) -> Result<(), SiteError> {
    let is_good =
        (1..=DISK_KEY_BYTES_MAX).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if is_good {
        return Ok(());
    }
    Err(refused(
        format!("{key:?} cannot be the name of a disk on this host"),
        "Disks are named like vda or sdb1: see what the other host says of the VM.",
    ))
}

/// Writes a record so that after a crash there is the old one or the new one.
pub(crate) fn write_record(path: &Path, record: &impl Serialize) -> Result<(), SiteError> {
    write_passing_record(path, record)?;
    sync_parent(path).doing(&format!("writing {}", path.display()))
}

/// Writes a record that must outlive the agent and not the host: without power there is no VM whose state it could tell. It
/// is whole then, or not there.
pub(crate) fn write_passing_record(path: &Path, record: &impl Serialize) -> Result<(), SiteError> {
    let text =
        serde_json::to_vec_pretty(record).map_err(|error| failed(format!("writing a record: {error}")))?;
    write_aside(path, &text).doing(&format!("writing {}", path.display()))
}

/// Reads a record; `None` if there is none.
pub(crate) fn read_record<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, SiteError> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| failed(format!("{} cannot be read: {error}", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).doing(&format!("reading {}", path.display())),
    }
}

/// Removes a file; one that is gone is no error.
pub(crate) fn remove_file(path: &Path) -> Result<(), SiteError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).doing(&format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Removes a directory with everything in it; one that is gone is no error.
pub(crate) fn remove_directory(path: &Path) -> Result<(), SiteError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).doing(&format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// What tells whether somebody else has written to a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
pub(crate) struct Identity {
    inode: u64,
    size: u64,
    modified_s: i64,
    modified_ns: i64,
}

impl Identity {
    pub(crate) fn of(path: &Path) -> Result<Self, SiteError> {
        let metadata = fs::metadata(path).doing(&format!("looking at {}", path.display()))?;
        Ok(Self {
            inode: metadata.ino(),
            size: metadata.len(),
            modified_s: metadata.mtime(),
            modified_ns: metadata.mtime_nsec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_of_other_hosts_have_harmless_names() {
        for good in ["vda", "sdaa", "xvdb1"] {
            check_disk_key(good).unwrap();
        }
        let long = "a".repeat(DISK_KEY_BYTES_MAX + 1);
        for bad in
            ["", ".", "..", "../vda", "/etc/x", "a/b", "vda\0", "vda\n", "vd a", "v'da", "vdä", "-vda", &long]
        {
            assert!(check_disk_key(bad).is_err(), "{bad:?}");
        }
    }
}
