//! Starting and stopping VMs.

use std::time::{Duration, Instant};

use mainstay_model::VmId;
use mainstay_provider::{ErrorKind, PowerState, ShutdownOutcome, SiteError, TrackerId};

use crate::bitmaps::set_live;
use crate::capture::CREATION_TRACKER;
use crate::error::{While as _, busy, failed};
use crate::host::{Host, find_disk};
use crate::libvirt::{LibvirtError, XmlKind};
use crate::nodes::Nodes;

const POLL: Duration = Duration::from_millis(100);
/// How long to wait for the answer that a guest agent gives only when it does not obey.
const AGENT_TIMEOUT: Duration = Duration::from_secs(1);
/// A guest that has just booted ignores the power button; it is pressed again.
const ASK_AGAIN: Duration = Duration::from_secs(10);
/// How long resuming is tried while a disk's server comes back: QEMU notices it within half a second or so.
const RESUME_TIMEOUT: Duration = Duration::from_secs(15);
const RESUME_POLL: Duration = Duration::from_millis(500);
/// How long a VM whose guest has shut down may take to go: QEMU writes its bitmaps, a second or two. libvirt can miss the
/// end, and then waits for a minute.
const LINGER: Duration = Duration::from_secs(15);

/// Starts a VM, or lets it go on.
pub(crate) async fn start(host: &Host, vm: VmId) -> Result<(), SiteError> {
    let _lock = host.lock(vm).await;
    wait_for_end(host, vm).await?;
    match host.power(vm).await? {
        PowerState::Running => {}
        PowerState::Paused => resume(host, vm).await?,
        PowerState::Off => {
            refuse_capture(host, vm)?;
            crate::recovery::grant_sockets(host, vm).await?;
            host.libvirt.start(vm, false).await.doing("starting the VM")?;
        }
    }
    see_running(host, vm).await
}

/// Starts a VM with a tracker set before its first instruction.
pub(crate) async fn start_tracked(
    host: &Host,
    vm: VmId,
    keys: &[String],
    tracker: &TrackerId,
) -> Result<(), SiteError> {
    let _lock = host.lock(vm).await;
    wait_for_end(host, vm).await?;
    match host.power(vm).await? {
        PowerState::Running => return see_running(host, vm).await,
        PowerState::Paused => {}
        PowerState::Off => {
            refuse_capture(host, vm)?;
            crate::recovery::grant_sockets(host, vm).await?;
            host.libvirt.start(vm, true).await.doing("starting the VM")?;
        }
    }
    // It is always there, made with the images.
    if tracker.0 != CREATION_TRACKER {
        let domain = host.domain(vm, XmlKind::Live).await?;
        let all = Nodes::query(&host.libvirt, vm).await?;
        let mut nodes = Vec::new();
        for key in keys {
            nodes.push(all.top_of(find_disk(&domain, key)?)?);
        }
        set_live(host, vm, &nodes, &tracker.0).await.doing("setting a tracker")?;
    }
    resume(host, vm).await?;
    see_running(host, vm).await
}

/// Has QEMU itself say that it runs. A daemon that has just come back calls a VM running by its notes, before it has reached its
/// QEMU, and ends it where it does not; to ask QEMU waits for that.
async fn see_running(host: &Host, vm: VmId) -> Result<(), SiteError> {
    let Err(error) = host.libvirt.qmp(vm, "query-status", serde_json::Value::Null).await else {
        return Ok(());
    };
    match host.power(vm).await? {
        PowerState::Off => Err(was_ended()),
        PowerState::Running | PowerState::Paused => Err(error),
    }
}

/// QEMU was killed, or libvirt's daemon, which at its next start ends a VM whose start it had not finished.
fn was_ended() -> SiteError {
    SiteError::new(ErrorKind::Unavailable, "the VM was ended while it was started")
        .with_remedy("It is started again. If this stays, see QEMU's log of the VM.")
}

/// A VM that is just ending is neither running nor startable.
async fn wait_for_end(host: &Host, vm: VmId) -> Result<(), SiteError> {
    let deadline = Instant::now() + LINGER;
    // An unknown VM is reported by what comes next.
    while host.libvirt.state(vm).await.is_ok_and(|state| state.is_shutting_down) {
        if Instant::now() > deadline {
            return Err(busy("the VM is still ending", "Try again; `virsh destroy` ends it at once."));
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// An open capture of a VM that is off reads its images.
fn refuse_capture(host: &Host, vm: VmId) -> Result<(), SiteError> {
    if host.has_capture(vm) {
        return Err(busy("a capture of the VM is open", "It ends by itself; try again."));
    }
    Ok(())
}

/// Resumes until the VM runs: one that waits for a disk pauses again at once.
async fn resume(host: &Host, vm: VmId) -> Result<(), SiteError> {
    let deadline = Instant::now() + RESUME_TIMEOUT;
    loop {
        let resumed = host.libvirt.resume(vm).await;
        if let Some(ended) = after_resume(host.power(vm).await?, resumed, Instant::now() > deadline) {
            return ended;
        }
        tokio::time::sleep(RESUME_POLL).await;
    }
}

/// What a VM's power says after it was told to resume; nothing where it is to be told again.
fn after_resume(
    power: PowerState,
    resumed: Result<(), LibvirtError>,
    is_late: bool,
) -> Option<Result<(), SiteError>> {
    match power {
        PowerState::Running => Some(Ok(())),
        PowerState::Off => Some(Err(was_ended())),
        PowerState::Paused if is_late => Some(Err(match resumed.doing("resuming the VM") {
            Err(error) => error,
            Ok(()) => failed("the VM pauses again as soon as it is resumed: a disk reports errors"),
        })),
        PowerState::Paused => None,
    }
}

/// Asks the guest to stop.
pub(crate) async fn shut_down(
    host: &Host,
    vm: VmId,
    timeout: Duration,
) -> Result<ShutdownOutcome, SiteError> {
    {
        // Not held while waiting: somebody may lose patience and switch the VM off.
        let _lock = host.lock(vm).await;
    }
    if host.power(vm).await? == PowerState::Off {
        return Ok(ShutdownOutcome::Off);
    }
    if host.has_capture(vm) {
        return Err(busy("a capture of the VM is open", "Close it before the VM is shut down."));
    }
    let deadline = Instant::now() + timeout;
    let mut by_agent =
        host.domain(vm, XmlKind::Live).await?.agent.is_some() && crate::guest::is_agent_up(host, vm).await;
    let mut ask_at = Instant::now();
    let mut ended_at = None;
    loop {
        let state = host.libvirt.state(vm).await?;
        if state.is_shutting_down && *ended_at.get_or_insert_with(Instant::now) + LINGER < Instant::now() {
            return power_off(host, vm).await.map(|()| ShutdownOutcome::Off);
        }
        if Instant::now() >= ask_at && state.power == PowerState::Running && !state.is_shutting_down {
            ask_at = Instant::now() + ASK_AGAIN;
            if by_agent {
                // An agent that obeys does not answer. (libvirt's own way of asking it waits a minute for that.)
                let mode = serde_json::json!({"mode": "powerdown"});
                if let Err(error) = host.libvirt.agent(vm, "guest-shutdown", mode, AGENT_TIMEOUT).await {
                    tracing::debug!(%vm, %error, "the guest agent was asked to shut down");
                }
            } else if let Err(error) = host.libvirt.press_power_button(vm).await {
                tracing::debug!(%vm, %error, "the power button cannot be pressed");
            }
            // Both ways in turn: the agent may be gone, or the button ignored.
            by_agent = !by_agent;
        }
        if state.power == PowerState::Off {
            return Ok(ShutdownOutcome::Off);
        }
        if Instant::now() > deadline && !state.is_shutting_down {
            return Ok(ShutdownOutcome::Refused);
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Stops a VM at once.
pub(crate) async fn power_off(host: &Host, vm: VmId) -> Result<(), SiteError> {
    let _lock = host.lock(vm).await;
    if host.power(vm).await? == PowerState::Off {
        return Ok(());
    }
    let destroyed = host.libvirt.destroy(vm).await;
    // One that has ended by itself in between is off as well.
    if host.power(vm).await? == PowerState::Off { Ok(()) } else { destroyed.doing("stopping the VM") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_that_was_ended_while_it_was_started_is_started_again() {
        let gone = || Err(LibvirtError::new(55, "Requested operation is not valid: domain is not running"));
        let kind = |power, resumed, is_late| {
            after_resume(power, resumed, is_late).map(|ended| ended.map_err(|e| e.kind))
        };
        assert_eq!(kind(PowerState::Running, Ok(()), false), Some(Ok(())));
        assert_eq!(kind(PowerState::Running, gone(), true), Some(Ok(())));
        for is_late in [false, true] {
            assert_eq!(kind(PowerState::Off, gone(), is_late), Some(Err(ErrorKind::Unavailable)));
        }
        assert_eq!(kind(PowerState::Paused, Ok(()), false), None);
        assert_eq!(kind(PowerState::Paused, Ok(()), true), Some(Err(ErrorKind::Failed)));
        let refused = Err(LibvirtError::new(1, "internal error: unable to execute QEMU command 'cont'"));
        assert_eq!(kind(PowerState::Paused, refused, true), Some(Err(ErrorKind::Failed)));
    }
}
