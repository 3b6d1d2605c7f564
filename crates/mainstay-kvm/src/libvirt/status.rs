//! What libvirt's daemon has written down of the running VMs, mended while it does not run.
//!
//! A daemon notes that a backup begins before it notes which (libvirt 9 and 11). If it dies in between, the next one takes the
//! backup for running, does not know it, and lets nobody end it or begin another, for as long as the VM runs. Only the note
//! itself can be taken back, and only before the next daemon reads it.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{FcntlArg, fcntl},
    libc::{F_RDLCK, F_UNLCK, SEEK_SET, flock},
    unistd::Pid,
};

use crate::definition::replace_file;

/// Why notes were not mended.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// The daemon lives, and would overwrite what is mended.
    #[error("libvirt's daemon (process {0}) runs: stop it, mend, and start it again; VMs go on meanwhile")]
    DaemonRuns(Pid),
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Where the daemon behind a URI keeps its notes; `None` if the URI does not tell.
pub fn status_directory(uri: &str) -> Option<PathBuf> {
    match uri {
        "qemu:///system" => Some(PathBuf::from("/run/libvirt/qemu")),
        "qemu:///session" => {
            std::env::var_os("XDG_RUNTIME_DIR").map(|dir| PathBuf::from(dir).join("libvirt/qemu/run"))
        }
        _ => None,
    }
}

/// Takes back the notes of backups of which nothing else is noted; answers the names of the VMs concerned. Refused while the
/// daemon runs. To be called before each start of the daemon.
pub fn mend_statuses(directory: &Path) -> Result<Vec<String>, StatusError> {
    let in_file = |path: &Path| {
        let path = path.to_owned();
        move |source| StatusError::File { path, source }
    };
    let lock = directory.join("driver.pid");
    if let Some(pid) = lock_holder(&lock).map_err(in_file(&lock))? {
        return Err(StatusError::DaemonRuns(pid));
    }
    let mut mended = Vec::new();
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(mended),
        entries => entries.map_err(in_file(directory))?,
    };
    for entry in entries {
        let path = entry.map_err(in_file(directory))?.path();
        if path.extension().is_none_or(|extension| extension != "xml") {
            continue;
        }
        let text = fs::read_to_string(&path).map_err(in_file(&path))?;
        if let Some(text) = without_lost_backup(&text) {
            replace_file(&path, text.as_bytes()).map_err(in_file(&path))?;
            mended.push(path.file_stem().unwrap_or_default().to_string_lossy().into_owned());
        }
    }
    mended.sort();
    Ok(mended)
}

/// The process that holds the lock on a file, as libvirt's daemons do with their process files while they live. A killed
/// process that has threads left to end already looks like one that ended, but keeps its locks.
pub fn lock_holder(path: &Path) -> io::Result<Option<Pid>> {
    let file = match fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut lock =
        flock { l_type: F_RDLCK as i16, l_whence: SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    fcntl(&file, FcntlArg::F_GETLK(&mut lock))?;
    Ok((i32::from(lock.l_type) != F_UNLCK).then(|| Pid::from_raw(lock.l_pid)))
}

/// A status without its lost backup; `None` if it has none.
fn without_lost_backup(status: &str) -> Option<String> {
    let document = roxmltree::Document::parse(status).ok()?;
    let root = document.root_element();
    let job = root.children().find(|node| node.has_tag_name("job"))?;
    let is_known = root.descendants().any(|node| node.has_tag_name("domainbackup"));
    if job.attribute("async") != Some("backup") || is_known {
        return None;
    }
    let range = job.range();
    Some(format!("{}<job type='none' async='none'/>{}", &status[..range.start], &status[range.end..]))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    use super::*;

    const LOST: &str = "<!-- libvirt -->\n<domstatus state='running'>\n  <job type='none' async='backup' \
        flags='0x0' asyncStarted='17'/>\n  <domain type='kvm'><name>web</name></domain>\n</domstatus>\n";

    #[test]
    fn only_a_backup_of_which_nothing_is_known_is_taken_back() {
        let mended = without_lost_backup(LOST).expect("it is lost");
        assert!(mended.contains("  <job type='none' async='none'/>\n  <domain"), "{mended}");
        assert!(mended.starts_with("<!-- libvirt -->\n"));
        assert_eq!(without_lost_backup(&mended), None);
        let known = LOST.replace("  <domain ", "  <backups><domainbackup/></backups><domain ");
        assert_eq!(without_lost_backup(&known), None);
        assert_eq!(without_lost_backup(&LOST.replace("'backup'", "'snapshot'")), None);
        assert_eq!(without_lost_backup("<domstatus>"), None);
    }

    #[test]
    fn notes_are_mended_in_place_and_others_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let (lost, other) = (dir.path().join("web.xml"), dir.path().join("web.pid"));
        fs::write(&lost, LOST).expect("a file");
        fs::set_permissions(&lost, fs::Permissions::from_mode(0o600)).expect("rights");
        fs::write(&other, LOST).expect("a file");
        fs::write(dir.path().join("driver.pid"), "1\n").expect("a file");
        assert_eq!(mend_statuses(dir.path()).expect("mended"), ["web"]);
        assert_eq!(mend_statuses(dir.path()).expect("nothing is left"), Vec::<String>::new());
        assert_eq!(fs::metadata(&lost).expect("the file").mode() & 0o777, 0o600);
        assert_eq!(fs::read_to_string(&other).expect("the file"), LOST);
        assert!(!dir.path().join("web.new").exists());
        assert_eq!(
            mend_statuses(&dir.path().join("none")).expect("no daemon ever ran"),
            Vec::<String>::new()
        );
    }
}
