//! Replicated items: protecting a VM, and every verb on what is protected.

use std::{net::IpAddr, sync::Arc};

use mainstay_model::{
    ConfigurationChange, Evidence, Health, HealthError, ItemId, ItemState, Operation, PointId, ProviderId,
    ReplicationPolicy, VmId, replication_health, rpo_seconds,
};
use mainstay_replication::{Access, RefusalKind, SessionKind};
use serde_json::Value;
use uuid::Uuid;

use super::{ProtectableItem, disk_obstacle};
use crate::{
    Control, ControlError,
    db::{ConfigurationJob, DiskRecord, ItemRecord, JobRecord, ReplicationRecord, ScrubRecord, TargetRecord},
    jobs::JobRequest,
    workflows::{
        DisableParams, FailbackParams, FailoverParams, PointChoice, TestFailoverParams, UpdateParams,
    },
};

/// Who asks, for the job and the audit trail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requester(pub String);

/// A request to protect a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnableRequest {
    /// Name of the new item.
    pub name: String,
    /// The VM's fabric.
    pub fabric: String,
    /// The VM.
    pub vm: VmId,
    /// The policy; a container mapping with it says where to.
    pub policy: String,
    /// Keys of disks that are not replicated.
    pub excluded_disks: Vec<String>,
    /// What the recovery VM shall be; empty fields are filled in.
    pub target: TargetRecord,
}

impl Control {
    /// Begins to protect a VM.
    pub async fn enable_protection(
        self: &Arc<Self>,
        request: EnableRequest,
        by: Requester,
    ) -> Result<JobRecord, ControlError> {
        super::check_name("replicated item", &request.name)?;
        let found = self.protectable_items(&request.fabric).await?;
        let ProtectableItem { vm, provider, fabric, item, why_not, obstacles: _ } =
            found.into_iter().find(|found| found.vm.id == request.vm).ok_or_else(|| {
                ControlError::NotFound { kind: "protectable item", name: request.vm.to_string() }
            })?;
        if item.is_some() {
            return Err(ControlError::Conflict(format!(
                "protection has already been enabled for '{}'",
                vm.name
            )));
        }
        if !why_not.is_empty() {
            return Err(ControlError::invalid(
                "NotProtectable",
                format!("'{}' cannot be protected: {}", vm.name, why_not.join(" ")),
                "Remove the causes, then refresh the host.",
            ));
        }
        let mut included = vm.disks.iter().filter(|disk| !request.excluded_disks.contains(&disk.key));
        if let Some((why, remedy)) = included.find_map(|disk| disk_obstacle(&vm, disk)) {
            return Err(ControlError::invalid(
                "DiskNotReplicable",
                format!("'{}' cannot be protected as a whole: {why}", vm.name),
                remedy,
            ));
        }
        let policy = self.policy(&request.policy).await?;
        let mapping = self
            .container_mappings()
            .await?
            .into_iter()
            .find(|mapping| {
                mapping.fabric.eq_ignore_ascii_case(&fabric)
                    && mapping.policy.eq_ignore_ascii_case(&policy.name)
            })
            .ok_or_else(|| {
                ControlError::invalid(
                    "NotMapped",
                    format!(
                        "fabric '{fabric}' is not mapped to a recovery site under policy '{}'",
                        policy.name
                    ),
                    "Make a container mapping with this policy first.",
                )
            })?;
        let recovery_provider = self.recovery_provider(&mapping.recovery_fabric).await?;
        let excluded = |key: String| DiskRecord {
            key,
            size_bytes: 0,
            format: String::new(),
            is_os_disk: false,
            is_included: false,
        };
        let record = ItemRecord {
            id: ItemId(Uuid::new_v4()),
            name: request.name,
            vm_name: vm.name,
            fabric,
            primary_provider: provider,
            recovery_fabric: mapping.recovery_fabric,
            recovery_provider,
            vm: request.vm,
            autostart: false,
            former_home: None,
            given_up: Vec::new(),
            policy: policy.name,
            state: ItemState::new(),
            disks: request.excluded_disks.into_iter().map(excluded).collect(),
            target: request.target,
            recovery_vm: None,
            test_vm: None,
            failover: None,
            stand_downs: Vec::new(),
            old_copy: None,
            not_started: None,
            scrub: ScrubRecord::default(),
            replication: ReplicationRecord::default(),
            created_ms: self.clock.now_ms(),
            last_failover_ms: None,
            last_test_failover_ms: None,
            resolved_errors: Vec::new(),
            version: 1,
        };
        let request =
            JobRequest { operation: Operation::EnableProtection, params: Value::Null, requested_by: by.0 };
        self.start_first_job(record, request).await
    }

    /// The host of a recovery fabric that is to carry a new item: the connected one with the most free space.
    async fn recovery_provider(&self, fabric: &str) -> Result<ProviderId, ControlError> {
        let providers = self.providers().await?;
        providers
            .iter()
            .filter(|provider| provider.fabric.eq_ignore_ascii_case(fabric))
            .max_by_key(|provider| {
                let free_bytes = provider.discovery.as_ref().map_or(0, |discovery| discovery.host.free_bytes);
                (self.sites.is_connected(provider.id), free_bytes)
            })
            .map(|provider| provider.id)
            .ok_or_else(|| {
                ControlError::invalid(
                    "NoRecoveryHost",
                    format!("no host is registered in the recovery fabric '{fabric}'"),
                    "Register one with `mainstay host key` and `mainstay agent register`.",
                )
            })
    }

    /// An item of a fabric by its name.
    pub async fn item_named(&self, fabric: &str, name: &str) -> Result<ItemRecord, ControlError> {
        let item = self.db.item_named(fabric, name).await?;
        item.map(Arc::unwrap_or_clone).ok_or_else(|| ControlError::not_found("replicated item", name))
    }

    /// Whether a host may do something with an item's data in the store. It must be a side of the item; and new recovery points
    /// come from the active side alone, in a generation that the item has had: what a host says of itself is not what fences
    /// it. What cannot be found out is not allowed.
    pub async fn authorize(&self, provider: ProviderId, access: Access) -> Result<(), RefusalKind> {
        let id = ItemId(access.replica);
        let item = match self.db.item(id).await {
            Ok(item) => item,
            Err(error) => {
                tracing::error!(%provider, item = %id, %error, "a data connection could not be authorised");
                None
            }
        };
        let item = item.ok_or(RefusalKind::NotAuthorized)?;
        if provider != item.primary_provider && provider != item.recovery_provider {
            return Err(RefusalKind::NotAuthorized);
        }
        let current = item.state.generation;
        match access.kind {
            SessionKind::Replicate { generation }
                if provider != item.active_provider() || generation > current.0 =>
            {
                tracing::warn!(%provider, item = %id, generation, %current, "a host that is not the active side wants to write");
                Err(RefusalKind::Fenced { current: current.0 })
            }
            _ => Ok(()),
        }
    }

    /// Begins any operation whose parameters are ready.
    async fn begin(
        self: &Arc<Self>,
        item: &ItemRecord,
        operation: Operation,
        params: impl serde::Serialize,
        by: Requester,
    ) -> Result<JobRecord, ControlError> {
        let params = serde_json::to_value(params).map_err(|error| {
            ControlError::invalid("InvalidParameters", error.to_string(), "Please report this.")
        })?;
        self.start_job(item.id, JobRequest { operation, params, requested_by: by.0 }).await
    }

    /// Refuses a choice of a point that does not exist before a job is made of it. The state comes first: in one that does not
    /// allow the operation there may be no points at all, and to say that one does not exist would hide the reason.
    async fn check_point(
        &self,
        item: &ItemRecord,
        operation: Operation,
        choice: PointChoice,
    ) -> Result<(), ControlError> {
        item.state.check(operation)?;
        let points = self.recovery_points(item).await?;
        if let PointChoice::Point(id) = choice
            && !points.iter().any(|point| PointId(point.id) == id)
        {
            return Err(ControlError::not_found("recovery point", id.to_string()));
        }
        Ok(())
    }

    /// Begins a test failover.
    pub async fn test_failover(
        self: &Arc<Self>,
        item: &ItemRecord,
        params: TestFailoverParams,
        by: Requester,
    ) -> Result<JobRecord, ControlError> {
        self.check_point(item, Operation::TestFailover, params.point).await?;
        self.begin(item, Operation::TestFailover, params, by).await
    }

    /// Begins the clean-up of a test failover; `notes` are kept with the job.
    pub async fn test_failover_cleanup(
        self: &Arc<Self>,
        item: &ItemRecord,
        notes: &str,
        by: Requester,
    ) -> Result<JobRecord, ControlError> {
        self.begin(item, Operation::TestFailoverCleanup, serde_json::json!({ "notes": notes }), by).await
    }

    /// Begins an unplanned failover.
    pub async fn unplanned_failover(
        self: &Arc<Self>,
        item: &ItemRecord,
        params: FailoverParams,
        by: Requester,
    ) -> Result<JobRecord, ControlError> {
        self.check_point(item, Operation::UnplannedFailover, params.point).await?;
        self.begin(item, Operation::UnplannedFailover, params, by).await
    }

    /// Begins a planned failover to the recovery site.
    pub async fn planned_failover(
        self: &Arc<Self>,
        item: &ItemRecord,
        params: FailoverParams,
        by: Requester,
    ) -> Result<JobRecord, ControlError> {
        self.begin(item, Operation::PlannedFailover, FailoverParams { shutdown_source: true, ..params }, by)
            .await
    }

    /// Cancels the failover or failback that is under way; after its point of no return, and when it has ended, there is
    /// nothing to cancel.
    pub async fn cancel_failover(self: &Arc<Self>, item: &ItemRecord) -> Result<JobRecord, ControlError> {
        let running = item.state.running.filter(|running| {
            matches!(
                running.operation,
                Operation::PlannedFailover | Operation::UnplannedFailover | Operation::Failback
            )
        });
        match running {
            Some(running) => self.cancel_job(running.job).await,
            None => Err(ControlError::NotAllowed {
                reason: format!("no failover of '{}' is under way", item.vm_name),
                allowed: item.state.allowed_operations(),
            }),
        }
    }

    /// Puts health errors out of sight, all of them or none. Only those that tell of something to do rather than of something
    /// broken can be.
    pub async fn resolve_health_errors(
        &self,
        item: &ItemRecord,
        codes: &[String],
        by: Requester,
    ) -> Result<ConfigurationJob, ControlError> {
        let (_, mut present, _) = self.item_health(item).await?;
        present.extend(rehearsal_warning(item));
        for code in codes {
            let known: Vec<_> = present.iter().map(|error| error.code.as_str()).collect();
            if !known.contains(&code.as_str()) {
                return Err(ControlError::invalid(
                    "HealthErrorNotFound",
                    format!("'{}' has no health error '{code}'", item.vm_name),
                    format!("Its health errors are: {}.", known.join(", ")),
                ));
            }
            if !is_resolvable(code) {
                return Err(ControlError::invalid(
                    "HealthErrorNotResolvable",
                    format!("health error '{code}' of '{}' goes away with its cause only", item.vm_name),
                    "Do what the error recommends.",
                ));
            }
        }
        let job = self.configuration_job(ConfigurationChange::ResolveHealthErrors, &item.vm_name, by);
        let mut transaction = self.db.begin().await?;
        let found = transaction.item(item.id).await?;
        let mut found =
            found.ok_or_else(|| ControlError::not_found("replicated item", item.name.as_str()))?;
        found.resolved_errors.extend(codes.iter().cloned());
        found.resolved_errors.sort();
        found.resolved_errors.dedup();
        transaction.update_item(&found).await?;
        transaction.put_configuration_job(&job).await?;
        transaction.commit().await?;
        Ok(job)
    }

    /// Begins a failback.
    pub async fn failback(
        self: &Arc<Self>,
        item: &ItemRecord,
        params: FailbackParams,
        by: Requester,
    ) -> Result<JobRecord, ControlError> {
        item.state.check(Operation::Failback)?;
        if let Some(host) = params.host {
            let provider = self.provider(host).await?;
            if !provider.fabric.eq_ignore_ascii_case(&item.fabric) {
                return Err(ControlError::invalid(
                    "HostOfOtherFabric",
                    format!("host '{}' does not belong to fabric '{}'", provider.name, item.fabric),
                    "Choose a host of the protected fabric.",
                ));
            }
        }
        self.begin(item, Operation::Failback, params, by).await
    }

    /// Begins to run another recovery point.
    pub async fn change_recovery_point(
        self: &Arc<Self>,
        item: &ItemRecord,
        point: PointChoice,
        by: Requester,
    ) -> Result<JobRecord, ControlError> {
        self.check_point(item, Operation::ChangeRecoveryPoint, point).await?;
        let params = FailoverParams { point, shutdown_source: false, shutdown_timeout_ms: 0 };
        self.begin(item, Operation::ChangeRecoveryPoint, params, by).await
    }

    /// Begins a commit.
    pub async fn commit(
        self: &Arc<Self>,
        item: &ItemRecord,
        by: Requester,
    ) -> Result<JobRecord, ControlError> {
        self.begin(item, Operation::Commit, Value::Null, by).await
    }

    /// Begins reverse replication.
    pub async fn reverse_replicate(
        self: &Arc<Self>,
        item: &ItemRecord,
        by: Requester,
    ) -> Result<JobRecord, ControlError> {
        self.begin(item, Operation::ReverseReplicate, Value::Null, by).await
    }

    /// Begins a resynchronization.
    pub async fn resynchronize(
        self: &Arc<Self>,
        item: &ItemRecord,
        by: Requester,
    ) -> Result<JobRecord, ControlError> {
        self.begin(item, Operation::Resynchronize, Value::Null, by).await
    }

    /// Begins to change what the recovery VM shall be.
    pub async fn update_item_target(
        self: &Arc<Self>,
        item: &ItemRecord,
        target: TargetRecord,
        by: Requester,
    ) -> Result<JobRecord, ControlError> {
        check_target(item, &target)?;
        self.begin(item, Operation::UpdateProperties, UpdateParams { target }, by).await
    }

    /// Begins to disable replication. With `force`, sites that are away are not waited for.
    pub async fn disable_protection(
        self: &Arc<Self>,
        item: &ItemRecord,
        force: bool,
        by: Requester,
    ) -> Result<JobRecord, ControlError> {
        self.begin(item, Operation::DisableProtection, DisableParams { force }, by).await
    }

    /// Health, its reasons and the RPO in seconds of an item, as of now.
    pub async fn item_health(
        &self,
        item: &ItemRecord,
    ) -> Result<(Health, Vec<HealthError>, Option<i64>), ControlError> {
        let policy = self.policy(&item.policy).await?;
        Ok(self.item_health_under(item, &policy.policy))
    }

    /// As [`Self::item_health`], for who has read the policy.
    pub fn item_health_under(
        &self,
        item: &ItemRecord,
        policy: &ReplicationPolicy,
    ) -> (Health, Vec<HealthError>, Option<i64>) {
        let now_ms = self.clock.now_ms();
        let evidence = Evidence {
            last_point_ms: item.replication.last_point_ms,
            replicating_since_ms: Some(item.created_ms),
            last_error: item.replication.last_error.clone(),
            is_agent_connected: self.sites.is_connected(item.primary_provider),
            damaged_points: item.scrub.damaged_points.len(),
            is_old_copy_running: item.old_copy.is_some(),
            not_started: item
                .not_started
                .as_ref()
                .filter(|(host, _)| *host == item.active_provider())
                .map(|(_, why)| why.clone()),
            is_newest_damaged: item
                .replication
                .last_point
                .is_some_and(|newest| item.scrub.damaged_points.contains(&newest)),
        };
        let (health, errors) = replication_health(&item.state, policy, &evidence, now_ms);
        let rpo = if item.state.phase.is_replicating() {
            rpo_seconds(evidence.last_point_ms, now_ms)
        } else {
            None
        };
        (health, errors, rpo)
    }
}

/// Code of the warning that a failover was never rehearsed; the service's.
const NOT_REHEARSED: &str = "161011";

/// Whether a person may put a health error out of sight.
pub fn is_resolvable(code: &str) -> bool {
    code == NOT_REHEARSED
}

/// The warning about an item whose failover was never rehearsed, unless somebody has put it out of sight.
pub fn rehearsal_warning(item: &ItemRecord) -> Option<HealthError> {
    let is_silent =
        item.last_test_failover_ms.is_some() || item.resolved_errors.iter().any(|code| code == NOT_REHEARSED);
    (!is_silent).then(|| HealthError {
        code: NOT_REHEARSED.to_owned(),
        level: Health::Warning,
        message: format!(
            "No successful test failover has been done on the virtual machine '{}'.",
            item.vm_name
        ),
        possible_causes: "No test failover was done and cleaned up since the VM is replicated.".to_owned(),
        recommended_action: "Do a test failover on the virtual machine.".to_owned(),
    })
}

/// Smallest memory of a recovery VM: less boots nothing.
pub const MEMORY_BYTES_MIN: u64 = 16 << 20;

fn check_target(item: &ItemRecord, target: &TargetRecord) -> Result<(), ControlError> {
    if target.name.trim().is_empty() {
        return Err(ControlError::invalid("InvalidName", "the recovery VM needs a name", "Name it."));
    }
    if target.vcpus == Some(0) {
        return Err(ControlError::invalid(
            "InvalidSize",
            "a VM needs at least one processor",
            "Choose 1 or more.",
        ));
    }
    if target.memory_bytes.is_some_and(|bytes| bytes < MEMORY_BYTES_MIN) {
        return Err(ControlError::invalid(
            "InvalidSize",
            "a VM needs at least 16 MiB of memory",
            "Choose more.",
        ));
    }
    for nic in &target.nics {
        if !item.target.nics.iter().any(|known| known.mac.eq_ignore_ascii_case(&nic.mac)) {
            let known: Vec<_> = item.target.nics.iter().map(|nic| nic.mac.as_str()).collect();
            return Err(ControlError::invalid(
                "AdapterNotFound",
                format!("'{}' has no adapter {}", item.vm_name, nic.mac),
                format!("Its adapters are: {}.", known.join(", ")),
            ));
        }
        if let Some(address) = &nic.address {
            check_address(address)?;
        }
    }
    Ok(())
}

/// Checks an address with its prefix length. IPv4 only, because that is all that drivers can reserve or set in a guest: what
/// they would refuse in the middle of a failover is refused here, when it is chosen.
pub fn check_address(address: &str) -> Result<(), ControlError> {
    let parsed = address.split_once('/').and_then(|(ip, prefix)| {
        let ip: IpAddr = ip.parse().ok()?;
        let prefix: u8 = prefix.parse().ok()?;
        (prefix <= if ip.is_ipv4() { 32 } else { 128 }).then_some(ip)
    });
    match parsed {
        Some(IpAddr::V4(_)) => Ok(()),
        Some(IpAddr::V6(_)) => Err(ControlError::invalid(
            "InvalidAddress",
            format!("'{address}' is an IPv6 address, and an adapter can be given an IPv4 address only"),
            "Choose an IPv4 address, like 10.0.0.7/24, or none: the adapter then has what its network gives it.",
        )),
        None => Err(ControlError::invalid(
            "InvalidAddress",
            format!("'{address}' is not an IPv4 address with a prefix length"),
            "Write it like 10.0.0.7/24.",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_take_ipv4_addresses_with_a_prefix_only() {
        for good in ["10.0.0.7/24", "10.0.0.7/32", "192.168.1.1/0"] {
            check_address(good).unwrap();
        }
        for bad in ["10.0.0.7", "10.0.0.7/33", "10.0.0/24", "fd00::1", "fd00::1/129", "", "/24"] {
            let told = check_address(bad).unwrap_err().to_string();
            assert!(told.contains("not an IPv4 address with a prefix length"), "{told}");
        }
        for other in ["fd00::1/64", "::ffff:10.0.0.7/120"] {
            let told = check_address(other).unwrap_err().to_string();
            assert!(told.contains("IPv4 address only"), "{told}");
        }
    }
}
