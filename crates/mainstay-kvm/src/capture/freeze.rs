//! Freezing the guest's file systems, and above all thawing them.
//!
//! A freeze can strike late: an agent that hung answers the time-out with nothing and freezes when it wakes. So
//! after every attempt, successful or not, the guest is thawed until its agent says that it is.

use std::time::{Duration, Instant};

use mainstay_model::VmId;
use mainstay_provider::{ErrorKind, SiteError};
use serde_json::Value;

use crate::error::failed;
use crate::host::Host;

/// How long one question to the agent may take.
const AGENT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a capture waits for the proof. What comes later is seen to when the capture closes.
pub(crate) const THAW_TIMEOUT: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(100);

/// Asks the guest to freeze.
pub(crate) async fn freeze(host: &Host, vm: VmId, timeout: Duration) -> Result<(), SiteError> {
    Ok(host.libvirt.freeze(vm, timeout).await?)
}

/// Thaws until the guest says that it is thawed. A guest without an agent cannot be frozen.
pub(crate) async fn thaw(host: &Host, vm: VmId, patience: Duration) -> Result<(), SiteError> {
    let deadline = Instant::now() + patience;
    loop {
        // It fails also when nothing is frozen; only the question afterwards counts.
        let thawed = host.libvirt.thaw(vm, AGENT_TIMEOUT).await;
        let status = host.libvirt.agent(vm, "guest-fsfreeze-status", Value::Null, AGENT_TIMEOUT).await;
        match status {
            Ok(status) if status == "thawed" => return Ok(()),
            Err(error) if error.kind == ErrorKind::NotFound => return Ok(()),
            status if Instant::now() > deadline => {
                return Err(failed(format!("the guest is not known to be thawed: {thawed:?}, {status:?}")));
            }
            _ => tokio::time::sleep(POLL).await,
        }
    }
}
