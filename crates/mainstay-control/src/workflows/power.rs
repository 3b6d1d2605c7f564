//! Starting VMs and removing them, in steps and in their undoing.

use mainstay_model::{Health, ProviderId, VmId};
use mainstay_provider::{ErrorKind, PowerOffVm, PowerState, ReadPower, RemoveRecoveryVm, SiteError, StartVm};

use crate::{
    ControlError,
    db::{ItemRecord, JobError},
    jobs::{Patience, StepContext},
};

/// How often a VM is started that is off again when it is looked at. A hypervisor's daemon that dies while it starts a VM ends it
/// at its own next start; a guest that ends by itself does so each time.
const STARTS_MAX: u32 = 3;

/// Starts an item's VM and sees that it runs; `patience` is for the start.
pub(super) async fn start(
    step: &StepContext<'_>,
    item: &ItemRecord,
    provider: ProviderId,
    vm: VmId,
    patience: Patience,
) -> Result<(), JobError> {
    match start_and_look(step, item, provider, vm, patience).await? {
        PowerState::Running => Ok(()),
        power => {
            let site = if provider == item.primary_provider { "at home" } else { "at the recovery site" };
            Err(JobError::new(
                "VmNotRunning",
                format!("'{}' was started {site} but is {power:?}", item.vm_name),
                "Look at its console and at the hypervisor's log.",
            ))
        }
    }
}

/// Starts a VM that a step had stopped. One that does not stay on is told, and so is a host that refuses because it knows of a
/// later failover; the undoing goes on, because nothing that is left of it would help.
pub(super) async fn start_again(
    step: &StepContext<'_>,
    item: &ItemRecord,
    provider: ProviderId,
    vm: VmId,
) -> Result<(), JobError> {
    let (code, what) = match start_and_look(step, item, provider, vm, Patience::OUTAGE).await {
        Ok(PowerState::Running) => return Ok(()),
        Ok(power) => (
            "VmNotRunning",
            format!("'{}' was started again but is {power:?}; start it by hand", item.vm_name),
        ),
        Err(error) if error.kind == ErrorKind::Fenced => {
            ("ServerSetBack", format!("'{}' was not started again: {error}. {}", item.vm_name, error.remedy))
        }
        Err(error) => return Err(error.into()),
    };
    let event = step.control.item_event(item, code, Health::Critical, what);
    Ok(step.control.record_event(event).await.map_err(ControlError::from)?)
}

async fn start_and_look(
    step: &StepContext<'_>,
    item: &ItemRecord,
    provider: ProviderId,
    vm: VmId,
    patience: Patience,
) -> Result<PowerState, SiteError> {
    let mut starts = 0;
    loop {
        let order = StartVm { item: item.id, generation: item.state.generation, vm };
        step.call(provider, order, patience).await?;
        let power = step.call(provider, ReadPower { vm }, Patience::RESTART).await?;
        starts += 1;
        if power != PowerState::Off || starts == STARTS_MAX {
            return Ok(power);
        }
        tracing::warn!(%vm, starts, "a VM is off right after its start; it is started again");
    }
}

/// Stops a VM as a power cut would.
pub(super) async fn power_off(
    step: &StepContext<'_>,
    item: &ItemRecord,
    provider: ProviderId,
    vm: VmId,
    patience: Patience,
) -> Result<(), SiteError> {
    let order = PowerOffVm { item: Some(item.id), generation: item.state.generation, vm };
    step.call(provider, order, patience).await
}

/// Stops a VM at the recovery site and removes it with its disks.
pub(super) async fn remove(
    step: &StepContext<'_>,
    item: &ItemRecord,
    vm: VmId,
    patience: Patience,
) -> Result<(), SiteError> {
    power_off(step, item, item.recovery_provider, vm, patience).await?;
    let order = RemoveRecoveryVm { item: item.id, generation: item.state.generation, vm };
    step.call(item.recovery_provider, order, patience).await
}
