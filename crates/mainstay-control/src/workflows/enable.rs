//! Enable replication, and its completion after the first recovery point.

use async_trait::async_trait;
use mainstay_provider::{
    Discover, Examine, FindingSeverity, MacPolicy, NetworkKind, NicPlan, Protect, Unprotect,
};
use serde::{Deserialize, Serialize};

use super::points::PointChoice;
use crate::{
    ControlError,
    app::{disk_obstacle, mapped},
    db::{DiskRecord, JobError},
    jobs::{Done, Patience, Retry, Step, StepAction, StepContext, Undone},
};

pub(super) fn steps() -> Vec<Step> {
    vec![
        Step::new(
            "EnableProtectionPreflightChecksTask",
            CHECK,
            "Prerequisites check for enabling protection",
            CheckPrerequisites,
        ),
        Step::new("CreateProtectionTargetTask", TARGET, "Identifying the replication target", IdentifyTarget),
        Step::new("EnableProtectionTask", "EnableProtection", "Enable replication", EnableReplication),
        Step::new(
            "StartInitialReplicationTask",
            "VmStartInitialReplication",
            "Starting initial replication",
            StartInitialReplication,
        ),
        Step::new("UpdateDraStateTask", "UpdateDraState", "Updating the provider states", UpdateProviders),
    ]
}

pub(super) fn finalize_steps() -> Vec<Step> {
    vec![Step::new(
        "IrCompletionTask",
        "VmIrCompletion",
        "Finalize protection on the virtual machine",
        FinalizeProtection,
    )]
}

const CHECK: &str = "EnableProtectionPrerequisitesCheck";
const TARGET: &str = "CreateProtectionTarget";

#[derive(Serialize, Deserialize)]
struct Checked {
    vm_name: String,
    disks: Vec<DiskRecord>,
    /// MAC address and network of each adapter.
    nics: Vec<(String, String)>,
}

struct CheckPrerequisites;

#[async_trait]
impl StepAction for CheckPrerequisites {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let examined = step.call(item.primary_provider, Examine { vm: item.vm }, Patience::RESTART).await?;
        let errors: Vec<_> = examined
            .vm
            .findings
            .iter()
            .filter(|finding| finding.severity == FindingSeverity::Error)
            .collect();
        if let Some(first) = errors.first() {
            let all: Vec<_> = errors.iter().map(|finding| finding.message.as_str()).collect();
            return Err(JobError::new(&first.code, all.join("; "), first.remedy.clone()));
        }
        // What the request excluded; `item.disks` holds only that until now.
        let excluded: Vec<_> =
            item.disks.iter().filter(|disk| !disk.is_included).map(|disk| disk.key.clone()).collect();
        if let Some(unknown) =
            excluded.iter().find(|key| !examined.vm.disks.iter().any(|disk| disk.key == **key))
        {
            let known: Vec<_> = examined.vm.disks.iter().map(|disk| disk.key.as_str()).collect();
            return Err(JobError::new(
                "DiskNotFound",
                format!("'{}' has no disk '{unknown}' to exclude", examined.vm.name),
                format!("Its disks are: {}.", known.join(", ")),
            ));
        }
        let disks: Vec<_> = examined
            .vm
            .disks
            .iter()
            .map(|disk| DiskRecord::of(disk, !excluded.contains(&disk.key)))
            .collect();
        if !disks.iter().any(|disk| disk.is_included) {
            return Err(JobError::new(
                "NoDisk",
                format!("no disk of '{}' would be replicated", examined.vm.name),
                "Exclude fewer disks.",
            ));
        }
        let mut included = examined.vm.disks.iter().filter(|disk| !excluded.contains(&disk.key));
        if let Some((why, remedy)) = included.find_map(|disk| disk_obstacle(&examined.vm, disk)) {
            return Err(JobError::new(
                "DiskNotReplicable",
                format!("'{}' cannot be protected as a whole: {why}", examined.vm.name),
                remedy,
            ));
        }
        let nics = examined.vm.nics.iter().map(|nic| (nic.mac.clone(), nic.network.clone())).collect();
        let mut done = Done::with(&Checked { vm_name: examined.vm.name, disks, nics })?;
        for finding in
            examined.vm.findings.iter().filter(|finding| finding.severity == FindingSeverity::Warning)
        {
            done =
                done.warning(JobError::new(&finding.code, finding.message.clone(), finding.remedy.clone()));
        }
        // Read now: what was discovered may be half a minute old, and from the next step on protection has changed it.
        let autostart = examined.vm.autostart;
        Ok(done.changing(move |item| item.autostart = autostart))
    }
}

struct IdentifyTarget;

#[async_trait]
impl StepAction for IdentifyTarget {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let checked: Checked = step.expect_output(CHECK)?;
        let target = step.call(item.recovery_provider, Discover {}, Patience::RESTART).await?;
        let networks: Vec<_> = target
            .inventory
            .networks
            .iter()
            .filter(|network| network.kind == NetworkKind::Production)
            .map(|network| network.name.clone())
            .collect();
        let mappings = step.control.network_mappings().await?;
        let by_mapping =
            |name: &str| mapped(&mappings, &item.fabric, &item.recovery_fabric, name).map(str::to_owned);
        // Without a mapping the network of the same name, else the only one there is.
        let by_name = |name: &str| match networks.as_slice() {
            _ if name.is_empty() => None,
            networks if networks.iter().any(|network| network == name) => Some(name.to_owned()),
            [only] => Some(only.clone()),
            _ => None,
        };
        let mut done = Done::default();
        let mut nics = Vec::new();
        for (mac, network) in checked.nics {
            let plan = NicPlan {
                mac: mac.clone(),
                network: by_mapping(&network).or_else(|| by_name(&network)),
                mac_policy: MacPolicy::Keep,
                address: None,
            };
            if plan.network.is_none() && !network.is_empty() {
                done = done.warning(JobError::new(
                    "NetworkNotMapped",
                    format!("the recovery site has no network '{network}' for adapter {mac}; it would not be connected"),
                    "Map the network, or choose a network of the recovery site in the item's network settings.",
                ));
            }
            nics.push(plan);
        }
        // The replica, and with it the item's place in the catalogue. First made and last removed: as long as a host has anything
        // of the item, a server that loses its database finds out about it.
        let generation = item.state.generation.0;
        step.control.store.raise_generation(item.id.0, generation).await.map_err(ControlError::from)?;
        Ok(done.changing(move |item| {
            item.vm_name = checked.vm_name;
            item.disks = checked.disks;
            if item.target.name.is_empty() {
                item.target.name.clone_from(&item.vm_name);
            }
            if item.target.nics.is_empty() {
                item.target.nics = nics;
            }
        }))
    }

    async fn undo(&self, step: &StepContext<'_>) -> Result<Undone, JobError> {
        step.control.delete_replica(step.item_id()).await?;
        Ok(Undone::default())
    }
}

struct EnableReplication;

#[async_trait]
impl StepAction for EnableReplication {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let protect = Protect {
            item: item.id,
            vm: item.vm,
            disks: item.included_disks(),
            generation: item.state.generation,
        };
        step.call(item.primary_provider, protect, Patience::RESTART).await?;
        Ok(Done::default())
    }

    async fn undo(&self, step: &StepContext<'_>) -> Result<Undone, JobError> {
        let item = step.item().await?;
        step.call(
            item.primary_provider,
            Unprotect { item: item.id, generation: item.state.generation, is_active: true },
            Patience::OUTAGE,
        )
        .await?;
        Ok(Undone::default())
    }
}

/// The transfer itself is the replication reconciler's: it begins when this job ends, and may take days.
struct StartInitialReplication;

#[async_trait]
impl StepAction for StartInitialReplication {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        // What it will write into.
        step.control.store.replica(step.item_id().0).await.map_err(ControlError::from)?;
        Ok(Done::default())
    }
}

struct UpdateProviders;

#[async_trait]
impl StepAction for UpdateProviders {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let mut retry = Retry::new(Patience::RESTART);
        loop {
            match step.control.refresh_provider(item.primary_provider).await {
                Err(ControlError::Site(error)) if retry.pause(&error).await => {}
                // The VM is protected; what else is on its host is read again by and by.
                Err(ControlError::Site(error)) => return Ok(Done::default().warning(error.into())),
                Err(error) => return Err(error.into()),
                Ok(_) => return Ok(Done::default()),
            }
        }
    }
}

struct FinalizeProtection;

#[async_trait]
impl StepAction for FinalizeProtection {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        // The proof that the item is protected: a recovery point that can be opened, with a definition to boot from.
        let point = step.control.choose_point(&item, PointChoice::LatestProcessed).await?;
        step.control.point_contents(item.id, mainstay_model::PointId(point.id)).await?;
        Ok(Done::default())
    }
}
