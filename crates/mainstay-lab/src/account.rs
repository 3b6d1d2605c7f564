//! Who runs the virtual machines of the lab.

use std::os::unix::fs::chown;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use nix::unistd::{Uid, User};
use tokio::process::Command;

/// The account under which a lab's daemons and virtual machines run. Root gives its privileges up: the lab
/// shall behave like an ordinary user's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    uid: u32,
    gid: u32,
    /// Whether we are root and become this account.
    is_other: bool,
}

impl Account {
    /// The caller's own account, or `nobody` for root.
    pub fn choose() -> Result<Self> {
        let uid = Uid::effective();
        if !uid.is_root() {
            return Ok(Self { uid: uid.as_raw(), gid: nix::unistd::getegid().as_raw(), is_other: false });
        }
        // Every Debian has it, with an entry in the password file, which libvirt insists on.
        let nobody = User::from_name("nobody")?.context("this machine has no account 'nobody'")?;
        Ok(Self { uid: nobody.uid.as_raw(), gid: nobody.gid.as_raw(), is_other: true })
    }

    /// Gives a file or directory to the account.
    pub fn give(&self, path: &Path) -> Result<()> {
        if self.is_other {
            chown(path, Some(self.uid), Some(self.gid))
                .with_context(|| format!("giving {} away", path.display()))?;
        }
        Ok(())
    }

    /// A command that runs as the account.
    pub fn command(&self, program: &str) -> Command {
        if !self.is_other {
            return Command::new(program);
        }
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid",
            &self.uid.to_string(),
            "--regid",
            &self.gid.to_string(),
            "--clear-groups",
            program,
        ]);
        command
    }

    /// Fails with advice when the account cannot enter a directory.
    pub(crate) async fn check_reach(&self, directory: &Path) -> Result<()> {
        let status = self.command("test").arg("-x").arg(directory).status().await?;
        if !status.success() {
            bail!(
                "the account that runs the lab's machines cannot enter {}: choose a directory whose parents \
                 everybody may pass through",
                directory.display()
            );
        }
        Ok(())
    }
}
