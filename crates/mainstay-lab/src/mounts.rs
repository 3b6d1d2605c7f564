//! Full file systems, for tests. Mounting is for the administrator, but in a mount table of one's own everybody may; so such
//! a test runs itself again in one, and everything that it starts there sees the same. Likewise with networks.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;

/// Set in the process that has a mount table, or a network, of its own.
const INSIDE: &str = "MAINSTAY_TEST_INSIDE";
const CHUNK: usize = 64 << 10;

/// Runs an ignored test of this test program in a mount table of its own.
pub fn run_in_own_mounts(test: &str) -> Result<()> {
    run_inside("--mount", test)
}

/// Runs an ignored test of this test program in a network of its own, which nothing is in yet.
pub fn run_in_own_network(test: &str) -> Result<()> {
    run_inside("--net", test)
}

/// Whether this process has something of its own, which it may change without anybody else noticing.
pub(crate) fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

fn run_inside(namespace: &str, test: &str) -> Result<()> {
    let mut command = Command::new("unshare");
    command.arg(namespace);
    if !nix::unistd::Uid::effective().is_root() {
        command.args(["--map-current-user", "--keep-caps"]);
    }
    command.arg(std::env::current_exe()?).args(["--ignored", "--exact", "--nocapture", test]);
    let output = command.env(INSIDE, "1").output().context("starting unshare")?;
    let told = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success() && told.contains("1 passed"),
        "{test} failed:\n{told}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// A file system of its own over a directory, as long as this lives.
#[derive(Debug)]
pub struct Mounted(PathBuf);

impl Mounted {
    /// Mounts an empty file system in memory. Only within [`run_in_own_mounts`]: elsewhere all would see it.
    pub fn tmpfs(directory: &Path, bytes: u64) -> Result<Self> {
        ensure!(is_inside(), "this test is run by another one, in its own mount table");
        let mode = std::fs::metadata(directory)?.permissions().mode() & 0o777;
        let options = format!("size={bytes},mode={mode:o}");
        mount(Some("tmpfs"), directory, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
            .with_context(|| format!("mounting a file system on {}", directory.display()))?;
        Ok(Self(directory.to_owned()))
    }

    /// Nothing can be written to it any more, as when a kernel has found a file system damaged; or again.
    pub fn set_read_only(&self, is_read_only: bool) -> Result<()> {
        let flags = MsFlags::MS_REMOUNT | if is_read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
        mount(None::<&str>, &self.0, None::<&str>, flags, None::<&str>)
            .with_context(|| format!("mounting {} anew", self.0.display()))
    }

    /// Bytes that are free.
    pub fn free_bytes(&self) -> Result<u64> {
        let space = statvfs(&self.0)?;
        Ok(space.blocks_available() * space.fragment_size())
    }

    /// Writes a file until at most so many bytes are free.
    pub fn fill(&self, ballast: &Path, free_bytes: u64) -> Result<()> {
        let mut file = File::create(ballast)?;
        let chunk = vec![0x5a; CHUNK];
        while self.free_bytes()? > free_bytes {
            let length = usize::try_from(self.free_bytes()? - free_bytes).unwrap_or(CHUNK).min(CHUNK);
            match file.write_all(&chunk[..length]) {
                // Others write too; it is as full as it gets.
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => break,
                written => written?,
            }
        }
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // What stays mounted shows when the directory cannot be removed.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
