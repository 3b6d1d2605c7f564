//! What a host lacks: decided from what was seen of it, each with what to do about it.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use mainstay_provider::{Finding, FindingSeverity};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
use nix::unistd::{AccessFlags, Gid, Uid, User, access, getgrouplist};

use crate::files::Owner;

/// Pull backups of whole disks without asking for them in libvirt's configuration are in libvirt since 7.2 (its NEWS).
const LIBVIRT_NEEDED: Version = (7, 2);
/// `<reconnect delay=…>` of a disk that comes over NBD is known since libvirt 9.2 (its NEWS); before, it is ignored.
const LIBVIRT_WANTED: Version = (9, 2);
/// Extended L2 entries, and the depth of allocation as something that an export shows, are in QEMU since 5.2.
const QEMU_NEEDED: Version = (5, 2);
/// Below it a single failover of a small VM can fill the file system: overlays hold what guests write, scratch files what they
/// write during captures.
const FREE_BYTES_WANTED: u64 = 10 << 30;
/// `RAMFS_MAGIC` of Linux's `magic.h`.
const RAMFS: i64 = 0x8584_58f6;

/// Major and minor.
type Version = (u32, u32);

/// The programs that the driver starts, with the package that Debian has them in.
const PROGRAMS: [(&str, &str); 3] = [("qemu-img", "qemu-utils"), ("qemu-nbd", "qemu-utils"), ("tar", "tar")];

/// Code of the finding that no recovery VM can run on a host.
pub const INSTANT_RECOVERY_UNAVAILABLE: &str = "InstantRecoveryUnavailable";

/// What was seen of a host.
#[derive(Debug)]
pub(super) struct Seen<'a> {
    pub(super) libvirt: &'a str,
    pub(super) qemu: &'a str,
    /// Why recovery VMs cannot run here.
    pub(super) confinement: Option<&'a str>,
    pub(super) free_bytes: u64,
    /// Where disks and scratch files go.
    pub(super) vm_dir: SeenDirectory,
    /// Where the sockets of recovery VMs go, if that is another.
    pub(super) run_dir: Option<SeenDirectory>,
}

/// What was seen of a directory.
#[derive(Debug)]
pub(super) struct SeenDirectory {
    pub(super) path: PathBuf,
    pub(super) is_writable: bool,
    /// It is kept in memory.
    pub(super) is_volatile: bool,
    /// The first directory on the way, itself included, that QEMU's account may not pass through.
    pub(super) barred: Option<PathBuf>,
}

fn finding(code: &str, severity: FindingSeverity, message: String, remedy: &str) -> Finding {
    Finding { code: code.to_owned(), severity, message, remedy: remedy.to_owned() }
}

/// What a host lacks, apart from programs.
pub(super) fn findings(seen: &Seen<'_>) -> Vec<Finding> {
    use FindingSeverity::{Error, Warning};
    let mut findings = Vec::new();
    findings.extend(too_old("Libvirt", "libvirt", seen.libvirt, LIBVIRT_NEEDED));
    findings.extend(too_old("Qemu", "QEMU", seen.qemu, QEMU_NEEDED));
    if (LIBVIRT_NEEDED..LIBVIRT_WANTED).contains(&version(seen.libvirt)) {
        let message = format!(
            "libvirt {} does not let a disk wait for its store: a recovery VM that is still being filled pauses, or sees I/O \
             errors, as soon as agent or server are restarted",
            seen.libvirt
        );
        let remedy = "Update libvirt to 9.2 or newer (on Debian 12: from bookworm-backports).";
        findings.push(finding("LibvirtWithoutReconnect", Warning, message, remedy));
    }
    if let Some(reason) = seen.confinement {
        let message = format!("this host cannot be a recovery site: {reason}");
        let remedy =
            "Do that, restart libvirt's daemon, then the agent. A host that is only protected needs neither.";
        findings.push(finding(INSTANT_RECOVERY_UNAVAILABLE, Error, message, remedy));
    }
    for (directory, key) in [(Some(&seen.vm_dir), "vm_dir"), (seen.run_dir.as_ref(), "run_dir")] {
        let Some(directory) = directory else { continue };
        findings.extend(of_directory(directory, key));
    }
    if seen.vm_dir.is_volatile {
        let message = format!(
            "vm_dir {} is kept in memory: recovery VMs would be gone after the next boot of this host",
            seen.vm_dir.path.display()
        );
        let remedy = "Set vm_dir to a directory on a disk in the agent's configuration.";
        findings.push(finding("DirectoryVolatile", Error, message, remedy));
    }
    if seen.free_bytes < FREE_BYTES_WANTED {
        let message = format!(
            "{} MiB are free in vm_dir {}; less than {} MiB is little for recovery VMs and scratch files",
            seen.free_bytes >> 20,
            seen.vm_dir.path.display(),
            FREE_BYTES_WANTED >> 20
        );
        let remedy = "Make room there, or set vm_dir to a larger file system in the agent's configuration.";
        findings.push(finding("LittleSpace", Warning, message, remedy));
    }
    findings
}

fn of_directory(directory: &SeenDirectory, key: &str) -> Vec<Finding> {
    let path = directory.path.display();
    let mut findings = Vec::new();
    if !directory.is_writable {
        let message = format!("the agent may not write to {key} {path}");
        let remedy =
            "Give the agent's account the directory, and see whether its file system is mounted read-only.";
        findings.push(finding("DirectoryNotWritable", FindingSeverity::Error, message, remedy));
    }
    if let Some(barred) = &directory.barred {
        let barred = barred.display();
        let message = format!("QEMU's account may not pass through {barred}, where {key} {path} lies");
        let remedy = format!("Let it: `chmod o+x {barred}`, or set {key} to a directory elsewhere.");
        findings.push(finding("DirectoryBarred", FindingSeverity::Error, message, &remedy));
    }
    findings
}

fn too_old(code: &str, what: &str, found: &str, needed: Version) -> Option<Finding> {
    let (major, minor) = needed;
    (version(found) < needed).then(|| {
        finding(
            &format!("{code}TooOld"),
            FindingSeverity::Error,
            format!("{what} is {found}, and captures and recovery VMs need {major}.{minor} or newer"),
            &format!("Update {what}."),
        )
    })
}

/// The first two numbers of a version; 0 where there is none.
pub(super) fn version(text: &str) -> Version {
    let mut numbers = text.split('.').map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// The programs that are missing on this host; what a VM with a TPM needs is only missed by those that have one.
pub fn missing_programs() -> Vec<Finding> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    missing_among(&path, |program| {
        fs::metadata(program).is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0)
    })
}

fn missing_among(path: &OsStr, is_program: impl Fn(&Path) -> bool) -> Vec<Finding> {
    let is_missing =
        |name: &str| !std::env::split_paths(path).any(|directory| is_program(&directory.join(name)));
    let mut findings: Vec<Finding> = PROGRAMS
        .iter()
        .filter(|(name, _)| is_missing(name))
        .map(|(name, package)| {
            finding(
                "ProgramMissing",
                FindingSeverity::Error,
                format!("the program {name} is not on the agent's PATH"),
                &format!("Install it (on Debian: apt install {package})."),
            )
        })
        .collect();
    if is_missing("swtpm") {
        findings.push(finding(
            "TpmEmulatorMissing",
            FindingSeverity::Warning,
            "the program swtpm is missing: VMs with a TPM do not start here".to_owned(),
            "Install it if there are such VMs (on Debian: apt install swtpm swtpm-tools).",
        ));
    }
    findings
}

/// An account, as far as the passage through directories goes.
#[derive(Debug)]
pub(super) struct Account {
    uid: u32,
    gids: Vec<u32>,
}

impl Account {
    /// The account with all its groups: libvirt gives QEMU those too.
    pub(super) fn of(owner: Owner) -> Self {
        let mut gids = vec![owner.gid];
        if let Ok(Some(user)) = User::from_uid(Uid::from_raw(owner.uid))
            && let Ok(name) = std::ffi::CString::new(user.name)
            && let Ok(groups) = getgrouplist(&name, Gid::from_raw(owner.gid))
        {
            gids.extend(groups.into_iter().map(Gid::as_raw));
        }
        Self { uid: owner.uid, gids }
    }

    /// Whether a directory of that owner, group and mode lets it through.
    fn passes(&self, uid: u32, gid: u32, mode: u32) -> bool {
        let bit = if self.uid == uid {
            0o100
        } else if self.gids.contains(&gid) {
            0o010
        } else {
            0o001
        };
        self.uid == 0 || mode & bit != 0
    }
}

/// Looks at a directory; `account` is QEMU's if it is not the agent's own.
pub(super) fn look(path: &Path, account: Option<&Account>) -> SeenDirectory {
    let is_volatile =
        statfs(path).is_ok_and(|about| [TMPFS_MAGIC, FsType(RAMFS)].contains(&about.filesystem_type()));
    SeenDirectory {
        path: path.to_owned(),
        is_writable: access(path, AccessFlags::W_OK | AccessFlags::X_OK).is_ok(),
        is_volatile,
        barred: account.and_then(|account| barred(path, account)),
    }
}

fn barred(path: &Path, account: &Account) -> Option<PathBuf> {
    // As it really lies: a link's target has other parents.
    let path = fs::canonicalize(path).ok()?;
    let mut ways: Vec<&Path> = path.ancestors().collect();
    ways.reverse();
    let bars = |way: &&Path| {
        let Ok(about) = fs::metadata(way) else { return false };
        // What a list of rights says in addition is not read here: it is there because somebody has thought about it.
        let has_list = rustix::fs::getxattr(*way, "system.posix_acl_access", &mut [0_u8; 0]).is_ok();
        !has_list && !account.passes(about.uid(), about.gid(), about.mode())
    };
    ways.into_iter().find(bars).map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(path: &str) -> SeenDirectory {
        SeenDirectory { path: path.into(), is_writable: true, is_volatile: false, barred: None }
    }

    fn good() -> Seen<'static> {
        Seen {
            libvirt: "11.3.0",
            qemu: "10.0.2",
            confinement: None,
            free_bytes: 1 << 40,
            vm_dir: directory("/vms"),
            run_dir: Some(directory("/run/mainstay")),
        }
    }

    fn codes(seen: &Seen<'_>) -> Vec<String> {
        let findings = findings(seen);
        assert!(findings.iter().all(|finding| !finding.message.is_empty() && !finding.remedy.is_empty()));
        findings.into_iter().map(|finding| finding.code).collect()
    }

    #[test]
    fn a_host_that_has_everything_lacks_nothing() {
        assert_eq!(codes(&good()), [""; 0]);
        // A directory for sockets may be in memory.
        let run_dir = SeenDirectory { is_volatile: true, ..directory("/run/mainstay") };
        assert_eq!(codes(&Seen { run_dir: Some(run_dir), ..good() }), [""; 0]);
    }

    #[test]
    fn old_versions_are_told() {
        let told = |libvirt, qemu| codes(&Seen { libvirt, qemu, ..good() });
        assert_eq!(told("9.0.0", "7.2.11"), ["LibvirtWithoutReconnect"], "Debian 12 as it comes");
        assert_eq!(told("9.2.0", "5.2.0"), [""; 0]);
        assert_eq!(told("7.1.9", "5.1.9"), ["LibvirtTooOld", "QemuTooOld"]);
        assert_eq!(told("7.2.0", "10.0.2"), ["LibvirtWithoutReconnect"]);
        assert_eq!(told("", "x.y"), ["LibvirtTooOld", "QemuTooOld"]);
    }

    #[test]
    fn what_is_wrong_with_the_directories_is_told() {
        let vm_dir = SeenDirectory {
            is_writable: false,
            is_volatile: true,
            barred: Some("/vms/private".into()),
            ..directory("/vms/private/kvm")
        };
        let seen = Seen { vm_dir, free_bytes: FREE_BYTES_WANTED - 1, ..good() };
        let expected = ["DirectoryNotWritable", "DirectoryBarred", "DirectoryVolatile", "LittleSpace"];
        assert_eq!(codes(&seen), expected);
        let barred = findings(&seen).remove(1);
        assert!(barred.remedy.contains("chmod o+x /vms/private"), "{barred:?}");
        let run_dir = SeenDirectory { is_writable: false, ..directory("/run/mainstay") };
        let told = findings(&Seen { run_dir: Some(run_dir), ..good() }).remove(0);
        assert!(told.message.contains("run_dir /run/mainstay"), "{told:?}");
    }

    #[test]
    fn confinement_is_an_error_with_its_remedy() {
        let told = findings(&Seen { confinement: Some("set security_driver"), ..good() }).remove(0);
        assert_eq!(told.severity, FindingSeverity::Error);
        assert!(told.message.contains("set security_driver"), "{told:?}");
    }

    #[test]
    fn programs_are_looked_for_where_they_would_be_started_from() {
        let there = |names: &'static [&str]| {
            missing_among(OsStr::new("/sbin:/bin"), move |path| {
                names.iter().any(|name| path == Path::new("/bin").join(name))
            })
        };
        assert_eq!(there(&["qemu-img", "qemu-nbd", "tar", "swtpm"]), []);
        let told = there(&["qemu-img", "tar"]);
        let told: Vec<_> = told.iter().map(|found| (found.code.as_str(), found.severity)).collect();
        assert_eq!(
            told,
            [("ProgramMissing", FindingSeverity::Error), ("TpmEmulatorMissing", FindingSeverity::Warning)]
        );
    }

    #[test]
    fn the_right_bit_decides_who_passes() {
        let qemu = Account { uid: 64_055, gids: vec![107, 994] };
        assert!(qemu.passes(0, 0, 0o711) && !qemu.passes(0, 0, 0o770));
        assert!(qemu.passes(0, 994, 0o710) && qemu.passes(64_055, 0, 0o700));
        // The nearest bit counts alone, as in the kernel.
        assert!(!qemu.passes(0, 107, 0o701) && !qemu.passes(64_055, 107, 0o011));
        assert!(Account { uid: 0, gids: vec![0] }.passes(1, 1, 0));
    }

    #[test]
    fn the_first_directory_that_bars_the_way_is_named() {
        let base = tempfile::tempdir().unwrap();
        let (shut, beneath) = (base.path().join("shut"), base.path().join("shut/kvm"));
        fs::create_dir_all(&beneath).unwrap();
        for path in [base.path(), &shut, &beneath] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o711)).unwrap();
        }
        // Nobody's account, of no group.
        let stranger = Account { uid: 4_000_000_000, gids: vec![4_000_000_000] };
        let shut = fs::canonicalize(shut).unwrap();
        let before = barred(&beneath, &stranger);
        fs::set_permissions(&shut, fs::Permissions::from_mode(0o700)).unwrap();
        // Where the tests' own directory is private already, that is the first.
        assert_eq!(barred(&beneath, &stranger), Some(before.unwrap_or(shut)));
        assert!(look(&beneath, None).is_writable && look(&beneath, None).barred.is_none());
        assert!(!look(&beneath.join("missing"), None).is_writable);
    }
}
