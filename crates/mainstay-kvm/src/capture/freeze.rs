//! Freezing the guest's file systems, and above all thawing them.
//!
//! A freeze can strike late: an agent that hung answers the time-out with nothing and freezes when it wakes. So a
//! marker is written before every attempt and stays until the guest's agent has said that it is thawed; as long as it
//! is there somebody keeps thawing, and nobody freezes again. Captures go on meanwhile, crash-consistent.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mainstay_model::VmId;
use mainstay_provider::{PowerState, SiteError};
use serde_json::Value;

use crate::error::{busy, failed};
use crate::files::{remove_file, write_passing_record};
use crate::host::Host;
use crate::xml::Domain;

/// How long one question to the agent may take.
const AGENT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a capture waits for the proof; a healthy guest gives it in milliseconds.
const THAW_TIMEOUT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(100);
/// How often a guest that gives no proof is thawed again, until it gives it or is off.
const THAW_AGAIN: Duration = Duration::from_secs(5);

fn marker(host: &Host, vm: VmId) -> PathBuf {
    host.files.directory().join("captures").join(format!("{vm}.frozen"))
}

/// Asks the guest to freeze. After it, whatever the answer, comes [`release`].
pub(crate) async fn freeze(
    host: &Host,
    vm: VmId,
    domain: &Domain,
    timeout: Duration,
) -> Result<(), SiteError> {
    if domain.agent.is_none() {
        return Err(failed("the VM has no guest agent channel"));
    }
    if !host.libvirt.is_agent_there(domain).await {
        return Err(failed("no guest agent runs in the guest"));
    }
    if marker(host, vm).exists() {
        return Err(busy("the guest has not thawed since an earlier freeze", "Restart the guest's agent."));
    }
    write_passing_record(&marker(host, vm), &vm)?;
    host.libvirt.freeze(vm, timeout).await
}

/// Thaws what was frozen, or may be. What cannot be proved now is pursued in the background.
pub(crate) async fn release(host: &Arc<Host>, vm: VmId) {
    let marker = marker(host, vm);
    if !marker.exists() {
        return;
    }
    match thaw(host, vm).await {
        Ok(()) => forget(&marker),
        Err(error) => {
            tracing::error!(%vm, %error, "the guest may be frozen; thawing it goes on");
            let host = Arc::clone(host);
            tokio::spawn(async move {
                while marker.exists() && thaw(&host, vm).await.is_err() {
                    tokio::time::sleep(THAW_AGAIN).await;
                }
                forget(&marker);
            });
        }
    }
}

/// Goes on with the guests that an agent before us left frozen; answers which.
pub(crate) async fn release_all(host: &Arc<Host>) -> Result<Vec<VmId>, SiteError> {
    let mut vms = Vec::new();
    for entry in std::fs::read_dir(host.files.directory().join("captures"))? {
        let path = entry?.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        if let (Ok(vm), Some("frozen")) = (stem.parse(), path.extension().and_then(|end| end.to_str())) {
            release(host, vm).await;
            vms.push(vm);
        }
    }
    Ok(vms)
}

fn forget(marker: &std::path::Path) {
    if let Err(error) = remove_file(marker) {
        tracing::warn!(%error, "a marker of a frozen guest stays; the next thaw removes it");
    }
}

/// Thaws until the guest says that it is thawed, or is off.
async fn thaw(host: &Host, vm: VmId) -> Result<(), SiteError> {
    let deadline = Instant::now() + THAW_TIMEOUT;
    loop {
        // It fails also when nothing is frozen; only the question afterwards counts.
        let thawed = host.libvirt.thaw(vm, AGENT_TIMEOUT).await;
        let status = host.libvirt.agent(vm, "guest-fsfreeze-status", Value::Null, AGENT_TIMEOUT).await;
        if status.as_ref().is_ok_and(|status| status == "thawed") {
            return Ok(());
        }
        // Memory that is gone is not frozen.
        match host.power(vm).await {
            Ok(PowerState::Off) => return Ok(()),
            Err(error) if error.kind == mainstay_provider::ErrorKind::NotFound => return Ok(()),
            _ => {}
        }
        if Instant::now() > deadline {
            return Err(failed(format!("the guest does not say that it is thawed: {thawed:?}, {status:?}")));
        }
        tokio::time::sleep(POLL).await;
    }
}
