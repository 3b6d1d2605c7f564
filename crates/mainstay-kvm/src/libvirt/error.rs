//! libvirt's errors, and what they mean to a caller.

use std::time::Duration;

use mainstay_provider::{ErrorKind, SiteError};

/// What libvirt said.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct LibvirtError {
    /// `virErrorNumber`.
    pub code: i32,
    /// libvirt's own words.
    pub message: String,
    /// Whether the connection to the daemon is gone.
    pub is_disconnected: bool,
}

pub(crate) const NO_SUPPORT: i32 = 3;
pub(crate) const NO_DOMAIN: i32 = 42;
pub(crate) const NO_NETWORK: i32 = 43;
const NO_CONNECT: i32 = 5;
const INVALID_CONNECTION: i32 = 6;
const AUTH_FAILED: i32 = 45;
const OPERATION_TIMEOUT: i32 = 68;
pub(super) const AGENT_UNRESPONSIVE: i32 = 86;
const ACCESS_DENIED: i32 = 88;
pub(crate) const NO_DOMAIN_BACKUP: i32 = 104;
/// Ours: libvirt's numbers are positive.
const HUNG: i32 = -1;

impl LibvirtError {
    pub(crate) fn new(code: i32, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), is_disconnected: false }
    }

    /// A call was given up.
    pub(super) fn hung(after: Duration) -> Self {
        Self::new(HUNG, format!("no answer within {} s", after.as_secs()))
    }

    /// Whether libvirt (11.3) takes a backup for running of which it knows nothing: its daemon died just when one was begun.
    /// Nothing can be aborted, and no other backup can begin, until [`super::mend_statuses`] has taken the note back.
    pub(crate) fn is_of_phantom_job(&self) -> bool {
        self.message.contains("backup job data missing")
    }
}

impl From<LibvirtError> for SiteError {
    fn from(error: LibvirtError) -> Self {
        if error.is_disconnected {
            return Self::new(ErrorKind::Unavailable, format!("libvirt is away: {}", error.message))
                .with_remedy("Check that libvirtd runs on the host.");
        }
        if error.code == HUNG {
            let remedy =
                "See whether `virsh list` answers on the host; if not, restart libvirt's daemon: VMs run on.";
            return Self::new(ErrorKind::TimedOut, format!("libvirt: {}", error.message)).with_remedy(remedy);
        }
        let kind = match error.code {
            NO_DOMAIN | NO_NETWORK => ErrorKind::NotFound,
            NO_CONNECT | INVALID_CONNECTION | AGENT_UNRESPONSIVE => ErrorKind::Unavailable,
            // Another job holds the domain.
            OPERATION_TIMEOUT => ErrorKind::Busy,
            AUTH_FAILED | ACCESS_DENIED | NO_SUPPORT => ErrorKind::Refused,
            _ if error.message.contains("No space left") => ErrorKind::NoSpace,
            _ if was_killed(&error.message) => ErrorKind::Unavailable,
            _ => ErrorKind::Failed,
        };
        Self::new(kind, format!("libvirt: {}", error.message))
    }
}

/// What libvirt (11.3) says of a QEMU that is gone and has said nothing itself. Where it has, that follows behind a colon. The last
/// is what it says of one that was there a moment ago: nothing is asked of a QEMU whose VM was not seen running.
const GONE: [&str; 4] = [
    "process exited while connecting to monitor",
    "guest unexpectedly quit",
    "domain is no longer running",
    "domain is not running",
];

/// What it says when QEMU goes while it is being asked; the system's word for it follows. QEMU itself says nothing there.
const CUT_OFF: [&str; 4] = [
    "Unable to read from monitor",
    "Unable to write to monitor",
    "QEMU monitor was closed",
    "End of file from qemu monitor",
];

/// Whether QEMU was killed, while it started or meanwhile: what was asked for can be asked for again. One that ends by itself
/// says why.
fn was_killed(message: &str) -> bool {
    let is_closed = message.contains("unexpectedly closed the monitor") && message.ends_with("')");
    is_closed
        || GONE.iter().any(|gone| message.ends_with(gone))
        || CUT_OFF.iter().any(|cut_off| message.contains(cut_off))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_that_was_killed_at_its_start_is_started_again_and_one_that_cannot_start_is_not() {
        let kind = |message: &str| SiteError::from(LibvirtError::new(1, message)).kind;
        for killed in [
            "internal error: QEMU unexpectedly closed the monitor (vm='web')",
            "internal error: process exited while connecting to monitor",
            "operation failed: domain is no longer running",
            "Requested operation is not valid: domain is not running",
        ] {
            assert_eq!(kind(killed), ErrorKind::Unavailable, "{killed}");
            assert_eq!(
                kind(&format!("{killed}: qemu: could not open 'disk'")),
                ErrorKind::Failed,
                "{killed}"
            );
        }
        for cut_off in [
            "Unable to read from monitor: Connection reset by peer",
            "Unable to write to monitor: Broken pipe",
        ] {
            assert_eq!(kind(cut_off), ErrorKind::Unavailable, "{cut_off}");
        }
        assert_eq!(kind("internal error: there is no disk 'vda' (vm='web')"), ErrorKind::Failed);
    }
}
