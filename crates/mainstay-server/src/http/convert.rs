//! From the control plane's records to the API's resources, and ids back to names.

use std::collections::HashMap;

use jiff::Timestamp;
use mainstay_api::arm::{
    self, AZURE, ContainerMappingProperties, ContainerProperties, CurrentScenario, DiskDetails,
    EventProperties, FabricProperties, HYPERV_REPLICA_AZURE, HealthError, InitialReplicationDetails,
    ItemDetails, ItemDisk, ItemIpConfig, ItemNic, ItemProperties, JobErrorDetails, JobProperties, JobTask,
    NAMESPACE, NetworkProperties, PolicyDetails, PolicyProperties, ProtectableItemProperties,
    ProviderProperties, RecoveryPointProperties, Resource, ServiceError, VirtualMachineDetails,
};
use mainstay_api::v1::{CycleProgress, DiskProgress, JobStatus, TaskStatus};
use mainstay_control::{
    app::{
        ContainerMappingRecord, FabricRecord, PolicyRecord, ProtectableItem, ProviderRecord, VaultRecord,
        is_resolvable, rehearsal_warning,
    },
    db::{ConfigurationJob, EventRecord, ItemRecord, JobEntry, JobError, JobRecord, JobState, StepRecord},
    jobs::{Task, job_log, tasks},
};
use mainstay_model::{Ending, Health, JobId, Operation, StepState, projection};
use mainstay_provider::{Finding, FindingSeverity, Firmware, Network, Progress};
use mainstay_store::{Consistency, PointInfo};
use serde_json::{Value, json};

use super::recovery_plans;

/// RFC 3339 text of a time in milliseconds since the Unix epoch.
pub(super) fn time_text(time_ms: i64) -> String {
    Timestamp::from_millisecond(time_ms)
        .map_or_else(|_| "9999-12-31T23:59:59Z".to_owned(), |time| time.to_string())
}

/// The last segment of an ARM id; a bare name is itself.
pub(super) fn last_segment(id: &str) -> &str {
    id.trim_end_matches('/').rsplit('/').next().unwrap_or(id)
}

/// The segment that follows `kind` in an ARM id.
pub(super) fn segment_after<'a>(id: &'a str, kind: &str) -> Option<&'a str> {
    let mut segments = id.split('/').filter(|segment| !segment.is_empty());
    segments.find(|segment| segment.eq_ignore_ascii_case(kind))?;
    segments.next()
}

/// Makes ids of a vault's resources.
pub(super) struct Ids<'a>(pub(super) &'a VaultRecord);

impl Ids<'_> {
    pub(super) fn fabric(&self, fabric: &str) -> String {
        format!("{}/replicationFabrics/{fabric}", self.0.id())
    }

    pub(super) fn provider(&self, fabric: &str, provider: impl std::fmt::Display) -> String {
        format!("{}/replicationRecoveryServicesProviders/{provider}", self.fabric(fabric))
    }

    pub(super) fn container(&self, fabric: &FabricRecord) -> String {
        format!("{}/replicationProtectionContainers/{}", self.fabric(&fabric.name), fabric.container())
    }

    pub(super) fn container_mapping(&self, fabric: &FabricRecord, name: &str) -> String {
        format!("{}/replicationProtectionContainerMappings/{name}", self.container(fabric))
    }

    pub(super) fn protectable_item(&self, fabric: &FabricRecord, vm: impl std::fmt::Display) -> String {
        format!("{}/replicationProtectableItems/{vm}", self.container(fabric))
    }

    pub(super) fn item(&self, fabric: &FabricRecord, name: &str) -> String {
        format!("{}/replicationProtectedItems/{name}", self.container(fabric))
    }

    pub(super) fn policy(&self, name: &str) -> String {
        format!("{}/replicationPolicies/{name}", self.0.id())
    }

    pub(super) fn recovery_plan(&self, name: &str) -> String {
        format!("{}/replicationRecoveryPlans/{name}", self.0.id())
    }

    pub(super) fn job(&self, name: impl std::fmt::Display) -> String {
        format!("{}/replicationJobs/{name}", self.0.id())
    }

    pub(super) fn network(&self, fabric: &str, name: &str) -> String {
        format!("{}/replicationNetworks/{name}", self.fabric(fabric))
    }
}

pub(super) fn resource<P>(id: String, kind: &str, properties: P) -> Resource<P> {
    let name = last_segment(&id).to_owned();
    Resource { id, name, kind: format!("{NAMESPACE}/vaults/{kind}"), location: None, properties }
}

/// `hosts`: the fabric's.
pub(super) fn fabric(
    ids: &Ids<'_>,
    record: &FabricRecord,
    hosts: &[&ProviderRecord],
    is_healthy: bool,
) -> Resource<FabricProperties> {
    let no_encryption = json!({ "kekState": "None", "kekCertThumbprint": null });
    let hosts: Vec<_> = hosts
        .iter()
        // The agent is what replicates, as Azure's is.
        .map(|host| json!({ "id": host.id, "name": host.name, "marsAgentVersion": host.version }))
        .collect();
    resource(
        ids.fabric(&record.name),
        "replicationFabrics",
        FabricProperties {
            friendly_name: record.name.clone(),
            internal_identifier: record.id.to_string(),
            health: if is_healthy { "Normal" } else { "Critical" }.to_owned(),
            bcdr_state: "Valid".to_owned(),
            custom_details: json!({ "instanceType": "HyperVSite", "hyperVHosts": hosts }),
            health_error_details: Vec::new(),
            encryption_details: no_encryption.clone(),
            rollover_encryption_details: no_encryption,
        },
    )
}

pub(super) fn provider(
    ids: &Ids<'_>,
    record: &ProviderRecord,
    is_connected: bool,
    items: usize,
) -> Resource<ProviderProperties> {
    resource(
        ids.provider(&record.fabric, record.id),
        "replicationFabrics/replicationRecoveryServicesProviders",
        ProviderProperties {
            fabric_type: "HyperVSite".to_owned(),
            friendly_name: record.name.clone(),
            provider_version: record.version.clone(),
            connection_status: if is_connected { "Connected" } else { "NotConnected" }.to_owned(),
            last_heart_beat: Some(time_text(record.last_seen_ms)),
            fabric_friendly_name: record.fabric.clone(),
            allowed_scenarios: vec!["Refresh".to_owned()],
            protected_item_count: items as i64,
            health_error_details: host_errors(record),
        },
    )
}

/// What a host lacked when it was last looked at, as `mainstay agent doctor` says it there.
fn host_errors(record: &ProviderRecord) -> Vec<HealthError> {
    let Some(discovery) = &record.discovery else { return Vec::new() };
    let time = time_text(record.discovered_ms.unwrap_or(record.last_seen_ms));
    let error = |finding: &Finding| {
        let level = match finding.severity {
            FindingSeverity::Error => Health::Critical,
            FindingSeverity::Warning => Health::Warning,
            FindingSeverity::Information => return None,
        };
        let error = mainstay_model::HealthError {
            code: finding.code.clone(),
            level,
            message: finding.message.clone(),
            possible_causes: String::new(),
            recommended_action: finding.remedy.clone(),
        };
        Some(health_error(&record.name, &error, "Configuration", &time))
    };
    discovery.host.findings.iter().filter_map(error).collect()
}

pub(super) fn policy(ids: &Ids<'_>, record: &PolicyRecord) -> Resource<PolicyProperties> {
    resource(
        ids.policy(&record.name),
        "replicationPolicies",
        PolicyProperties {
            friendly_name: record.name.clone(),
            provider_specific_details: PolicyDetails {
                instance_type: HYPERV_REPLICA_AZURE.to_owned(),
                recovery_point_history_duration_in_hours: record.policy.retention_hours,
                application_consistent_snapshot_frequency_in_hours: record
                    .policy
                    .app_consistent_frequency_hours,
                replication_interval: record.policy.copy_frequency_seconds,
                online_replication_start_time: None,
                encryption: "Disabled".to_owned(),
                active_storage_account_id: None,
            },
        },
    )
}

pub(super) fn container(
    ids: &Ids<'_>,
    record: &FabricRecord,
    items: usize,
    is_paired: bool,
) -> Resource<ContainerProperties> {
    resource(
        ids.container(record),
        "replicationFabrics/replicationProtectionContainers",
        ContainerProperties {
            fabric_friendly_name: record.name.clone(),
            friendly_name: record.name.clone(),
            fabric_type: "HyperVSite".to_owned(),
            protected_item_count: items as i64,
            pairing_status: if is_paired { "Paired" } else { "NotPaired" }.to_owned(),
            role: if is_paired { "Primary" } else { "" }.to_owned(),
            fabric_specific_details: None,
        },
    )
}

pub(super) fn container_mapping(
    ids: &Ids<'_>,
    source: &FabricRecord,
    target: &FabricRecord,
    record: &ContainerMappingRecord,
) -> Resource<ContainerMappingProperties> {
    resource(
        ids.container_mapping(source, &record.name),
        "replicationFabrics/replicationProtectionContainers/replicationProtectionContainerMappings",
        ContainerMappingProperties {
            target_protection_container_id: ids.container(target),
            target_protection_container_friendly_name: target.name.clone(),
            policy_id: ids.policy(&record.policy),
            policy_friendly_name: record.policy.clone(),
            source_fabric_friendly_name: source.name.clone(),
            target_fabric_friendly_name: target.name.clone(),
            source_protection_container_friendly_name: source.name.clone(),
            state: "Paired".to_owned(),
            health: "Normal".to_owned(),
            health_error_details: Vec::new(),
            provider_specific_details: None,
        },
    )
}

/// MiB, rounded up.
fn mebibytes(bytes: u64) -> i64 {
    i64::try_from(bytes.div_ceil(1 << 20)).unwrap_or(i64::MAX)
}

fn vhd_type(is_os_disk: bool) -> String {
    if is_os_disk { "OperatingSystem" } else { "DataDisk" }.to_owned()
}

pub(super) fn protectable_item(
    ids: &Ids<'_>,
    fabric: &FabricRecord,
    found: &ProtectableItem,
    item_name: Option<&str>,
) -> Resource<ProtectableItemProperties> {
    let vm = &found.vm;
    let without = found.obstacles.iter().map(|(disk, why)| format!("{}{disk}: {why}", arm::WITHOUT));
    resource(
        ids.protectable_item(fabric, vm.id),
        "replicationFabrics/replicationProtectionContainers/replicationProtectableItems",
        ProtectableItemProperties {
            friendly_name: vm.name.clone(),
            protection_status: if found.item.is_some() { "Protected" } else { "Unprotected" }.to_owned(),
            replication_protected_item_id: item_name.map(|name| ids.item(fabric, name)),
            recovery_services_provider_id: ids.provider(&fabric.name, found.provider),
            protection_readiness_errors: found.why_not.iter().cloned().chain(without).collect(),
            supported_replication_providers: vec![HYPERV_REPLICA_AZURE.to_owned()],
            custom_details: VirtualMachineDetails {
                instance_type: "HyperVVirtualMachine".to_owned(),
                source_item_id: vm.id.to_string(),
                generation: if vm.firmware == Firmware::Uefi { "2" } else { "1" }.to_owned(),
                os_details: None,
                has_physical_disk: "NotPresent".to_owned(),
                has_fibre_channel_adapter: "NotPresent".to_owned(),
                has_shared_vhd: "Unknown".to_owned(),
                hyper_v_host_id: found.provider.to_string(),
                disk_details: vm
                    .disks
                    .iter()
                    .map(|disk| DiskDetails {
                        max_size_mb: mebibytes(disk.size_bytes),
                        vhd_type: vhd_type(disk.is_os_disk),
                        vhd_id: disk.key.clone(),
                        vhd_name: disk.key.clone(),
                    })
                    .collect(),
            },
        },
    )
}

fn health_word(health: Health) -> String {
    format!("{health:?}")
}

fn health_error(vm: &str, error: &mainstay_model::HealthError, category: &str, time: &str) -> HealthError {
    HealthError {
        inner_health_errors: Vec::new(),
        error_source: "Mainstay".to_owned(),
        error_type: error.code.clone(),
        error_level: if error.level == Health::Critical { "Error" } else { "Warning" }.to_owned(),
        error_category: category.to_owned(),
        error_code: error.code.clone(),
        summary_message: String::new(),
        error_message: error.message.clone(),
        possible_causes: error.possible_causes.clone(),
        recommended_action: error.recommended_action.clone(),
        creation_time_utc: time.to_owned(),
        recovery_provider_error_message: None,
        entity_id: vm.to_owned(),
        error_id: error.code.clone(),
        customer_resolvability: if is_resolvable(&error.code) { "Allowed" } else { "NotAllowed" }.to_owned(),
    }
}

/// What an item's resource is made of.
pub(super) struct ItemView<'a> {
    pub(super) record: &'a ItemRecord,
    pub(super) fabric: &'a FabricRecord,
    pub(super) recovery_fabric: &'a FabricRecord,
    pub(super) health: Health,
    pub(super) errors: &'a [mainstay_model::HealthError],
    pub(super) rpo_seconds: Option<i64>,
    pub(super) initial_percent: u32,
    pub(super) job: Option<&'a JobRecord>,
    pub(super) now_ms: i64,
}

pub(super) fn item(ids: &Ids<'_>, view: &ItemView<'_>) -> Resource<ItemProperties> {
    let ItemView { record, fabric, recovery_fabric, .. } = view;
    let now = time_text(view.now_ms);
    let vm = record.vm.to_string();
    let (state, state_text) = projection::protection_state(&record.state);
    let (vm_state, vm_state_text) = projection::vm_protection_state(&record.state);
    let (test_state, test_text) = projection::test_failover_state(record.state.test_failover);
    let mut errors: Vec<_> =
        view.errors.iter().map(|error| health_error(&vm, error, "Replication", &now)).collect();
    let warning = rehearsal_warning(record);
    errors.extend(warning.iter().map(|warning| health_error(&vm, warning, "TestFailover", &now)));
    let last_point = record.replication.last_point_ms.map(time_text);
    resource(
        ids.item(fabric, &record.name),
        "replicationFabrics/replicationProtectionContainers/replicationProtectedItems",
        ItemProperties {
            friendly_name: record.vm_name.clone(),
            protected_item_type: "HyperVVirtualMachine".to_owned(),
            protectable_item_id: ids.protectable_item(fabric, &vm),
            recovery_services_provider_id: ids.provider(&fabric.name, record.primary_provider),
            primary_fabric_friendly_name: fabric.name.clone(),
            primary_fabric_provider: "SingleHostHyperVFabric".to_owned(),
            recovery_fabric_friendly_name: recovery_fabric.name.clone(),
            recovery_fabric_id: ids.fabric(&recovery_fabric.name),
            primary_protection_container_friendly_name: fabric.name.clone(),
            recovery_protection_container_friendly_name: recovery_fabric.name.clone(),
            protection_state: state.to_owned(),
            protection_state_description: state_text.to_owned(),
            active_location: projection::active_location(record.state.phase.active_location()).to_owned(),
            test_failover_state: test_state.to_owned(),
            test_failover_state_description: test_text.to_owned(),
            switch_provider_state: "None".to_owned(),
            switch_provider_state_description: None,
            allowed_operations: projection::allowed_operations(&record.state)
                .into_iter()
                .map(str::to_owned)
                .collect(),
            replication_health: health_word(view.health),
            failover_health: if warning.is_none() { "Normal" } else { "Warning" }.to_owned(),
            health_errors: errors,
            policy_id: ids.policy(&record.policy),
            policy_friendly_name: record.policy.clone(),
            last_successful_failover_time: record.last_failover_ms.map(time_text),
            last_successful_test_failover_time: record.last_test_failover_ms.map(time_text),
            current_scenario: current_scenario(ids, view.job),
            failover_recovery_point_id: record
                .recovery_vm
                .map(|copy| format!("{}/recoveryPoints/{}", ids.item(fabric, &record.name), copy.point)),
            provider_specific_details: ItemDetails {
                instance_type: HYPERV_REPLICA_AZURE.to_owned(),
                azure_vm_disk_details: item_disks(record),
                recovery_azure_vm_name: record.target.name.clone(),
                recovery_azure_vm_size: size_text(record),
                last_replicated_time: last_point.clone(),
                rpo_in_seconds: view.rpo_seconds,
                last_rpo_calculated_time: view.rpo_seconds.map(|_| now.clone()),
                vm_id: vm,
                vm_protection_state: vm_state.to_owned(),
                vm_protection_state_description: vm_state_text.to_owned(),
                initial_replication_details: InitialReplicationDetails {
                    initial_replication_type: "InitialReplication".to_owned(),
                    initial_replication_progress_percentage: view.initial_percent.to_string(),
                },
                vm_nics: record.target.nics.iter().map(|nic| item_nic(ids, record, nic)).collect(),
                selected_recovery_azure_network_id: record
                    .target
                    .network
                    .as_ref()
                    .map(|network| ids.network(&recovery_fabric.name, network)),
                encryption: "Disabled".to_owned(),
                source_vm_ram_size_in_mb: record.target.memory_bytes.map(mebibytes),
                source_vm_cpu_count: record.target.vcpus.map(i64::from),
                use_managed_disks: "false".to_owned(),
                last_recovery_point_received: last_point,
                azure: arm::AzureItemDetails {
                    selected_source_nic_id: record.target.nics.first().map(|nic| nic.mac.clone()),
                    ..arm::AzureItemDetails::default()
                },
            },
            recovery_container_id: ids.container(recovery_fabric),
            event_correlation_id: record.id.to_string(),
        },
    )
}

/// Only included disks: what is excluded is told by its absence here and its presence at the protectable item.
fn item_disks(record: &ItemRecord) -> Vec<ItemDisk> {
    record
        .disks
        .iter()
        .filter(|disk| disk.is_included)
        .enumerate()
        .map(|(index, disk)| ItemDisk {
            vhd_type: vhd_type(disk.is_os_disk),
            vhd_id: disk.key.clone(),
            disk_id: disk.key.clone(),
            vhd_name: disk.key.clone(),
            max_size_mb: mebibytes(disk.size_bytes).to_string(),
            lun_id: index.to_string(),
            azure: arm::AzureDiskDetails::default(),
        })
        .collect()
}

fn item_nic(ids: &Ids<'_>, record: &ItemRecord, nic: &mainstay_provider::NicPlan) -> ItemNic {
    let network = nic.network.as_ref().or(record.target.network.as_ref());
    ItemNic {
        nic_id: nic.mac.clone(),
        recovery_vm_network_id: network.map(|network| ids.network(&record.recovery_fabric, network)),
        ip_configs: vec![ItemIpConfig {
            is_primary: Some(true),
            is_seleted_for_failover: Some(true),
            // Empty, as recorded, where the network gives it.
            recovery_static_ip_address: Some(nic.address.clone().unwrap_or_default()),
            recovery_ip_address_type: Some(
                if nic.address.is_some() { "Static" } else { "Dynamic" }.to_owned(),
            ),
            azure: Some(arm::AzureIpConfigDetails::default()),
        }],
        selection_type: Some("SelectedByUser".to_owned()),
        tfo_vm_network_id: record
            .target
            .test_network
            .as_ref()
            .map(|name| ids.network(&record.recovery_fabric, name)),
        mac_policy: None,
        azure: Some(arm::AzureNicDetails::default()),
    }
}

/// `VCPUSxMEMORY_MIB`, with what is set.
fn size_text(record: &ItemRecord) -> Option<String> {
    match (record.target.vcpus, record.target.memory_bytes) {
        (None, None) => None,
        (Some(vcpus), None) => Some(vcpus.to_string()),
        (vcpus, Some(bytes)) => Some(format!("{}x{}", vcpus.unwrap_or(1), mebibytes(bytes))),
    }
}

pub(super) fn recovery_point(item_id: &str, point: &PointInfo) -> Resource<RecoveryPointProperties> {
    let kind = match point.consistency {
        Consistency::App => "AppConsistent",
        // Partial states are never listed.
        Consistency::Crash | Consistency::Partial => "CrashConsistent",
    };
    resource(
        format!("{item_id}/recoveryPoints/{}", point.id),
        "replicationFabrics/replicationProtectionContainers/replicationProtectedItems/recoveryPoints",
        RecoveryPointProperties {
            recovery_point_time: time_text(i64::try_from(point.time_ms).unwrap_or(i64::MAX)),
            recovery_point_type: kind.to_owned(),
        },
    )
}

pub(super) fn job_entry(ids: &Ids<'_>, entry: &JobEntry, children: &Children) -> Resource<JobProperties> {
    match entry {
        JobEntry::Item(record) => job(ids, record, children),
        JobEntry::Configuration(record) => configuration_job(ids, record),
    }
}

fn configuration_job(ids: &Ids<'_>, record: &ConfigurationJob) -> Resource<JobProperties> {
    let (scenario, friendly_name, target) = projection::configuration_job(record.change);
    let time = time_text(record.time_ms);
    let task = JobTask {
        task_id: format!("{scenario}Task"),
        name: format!("{scenario}Task"),
        start_time: Some(time.clone()),
        end_time: Some(time.clone()),
        allowed_actions: Vec::new(),
        friendly_name: friendly_name.to_owned(),
        state: "Succeeded".to_owned(),
        state_description: "Completed".to_owned(),
        task_type: "TaskDetails".to_owned(),
        custom_details: None,
        group_task_custom_details: None,
        errors: Vec::new(),
    };
    resource(
        ids.job(record.id),
        "replicationJobs",
        JobProperties {
            activity_id: record.id.to_string(),
            scenario_name: scenario.to_owned(),
            friendly_name: friendly_name.to_owned(),
            state: "Succeeded".to_owned(),
            state_description: "Completed".to_owned(),
            tasks: vec![task],
            errors: Vec::new(),
            start_time: Some(time.clone()),
            end_time: Some(time),
            allowed_actions: Vec::new(),
            target_object_id: record.object.clone(),
            target_object_name: record.object.clone(),
            target_instance_type: target.to_owned(),
            custom_details: json!({ "instanceType": "AsrJobDetails", "affectedObjectDetails": {} }),
        },
    )
}

/// What is under way, or was last.
pub(super) fn current_scenario(ids: &Ids<'_>, job: Option<&JobRecord>) -> CurrentScenario {
    match job {
        Some(job) => CurrentScenario {
            scenario_name: projection::scenario_name(job.operation).to_owned(),
            job_id: ids.job(job.id),
            start_time: time_text(job.created_ms),
        },
        None => CurrentScenario {
            scenario_name: "None".to_owned(),
            job_id: ids.job("None"),
            start_time: "1753-01-01T01:01:01Z".to_owned(),
        },
    }
}

/// `state` and `stateDescription`.
pub(super) fn job_state(record: &JobRecord) -> (&'static str, &'static str) {
    match record.state {
        JobState::InProgress => ("InProgress", "InProgress"),
        JobState::Suspended => ("Suspended", "WaitingForUserInput"),
        JobState::Cancelling => ("Cancelling", "Cancelling"),
        JobState::Ended(Ending::Succeeded) => {
            ("Succeeded", if has_warnings(record) { "CompletedWithInformation" } else { "Completed" })
        }
        JobState::Ended(Ending::Failed) => ("Failed", "Failed"),
        JobState::Ended(Ending::Cancelled) => ("Cancelled", "Cancelled"),
        JobState::Ended(Ending::Stuck) => ("Failed", "Stuck"),
    }
}

/// Machines' jobs of a recovery plan's job.
pub(super) type Children = HashMap<JobId, JobRecord>;

fn job(ids: &Ids<'_>, record: &JobRecord, children: &Children) -> Resource<JobProperties> {
    let (state, description) = job_state(record);
    let mut errors: Vec<_> = record
        .steps
        .iter()
        .flat_map(|step| step.errors.iter().map(|error| job_error(record, step, error)))
        .collect();
    if record.state == JobState::Ended(Ending::Stuck) {
        let stuck = JobError::new(
            "Stuck",
            "the job could neither be completed nor undone; its item stays with it",
            "Remove the cause that its tasks tell, then restart the job.",
        );
        if let Some(step) = record.steps.last() {
            errors.insert(0, job_error(record, step, &stuck));
        }
    }
    let mut tasks: Vec<_> =
        record.steps.iter().zip(tasks(record)).map(|(step, task)| job_task(record, step, task)).collect();
    if let Some(plan) = record.plan.as_deref() {
        recovery_plans::complete_tasks(ids, record, plan, children, &mut tasks);
    }
    let is_plan = record.plan.is_some();
    resource(
        ids.job(record.id),
        "replicationJobs",
        JobProperties {
            activity_id: record.id.to_string(),
            scenario_name: projection::scenario_name(record.operation).to_owned(),
            friendly_name: projection::friendly_name(record.operation).to_owned(),
            state: state.to_owned(),
            state_description: description.to_owned(),
            tasks,
            errors,
            start_time: Some(time_text(record.created_ms)),
            end_time: record.ended_ms.map(time_text),
            allowed_actions: allowed_actions(record),
            target_object_id: if is_plan { record.item_name.clone() } else { record.item.to_string() },
            target_object_name: record.vm_name.clone(),
            target_instance_type: if is_plan { "RecoveryPlan" } else { "ProtectionEntity" }.to_owned(),
            custom_details: job_details(record),
        },
    )
}

/// What the service tells of a job of this kind. What a rehearsal showed is the remark that it was cleaned up with.
fn job_details(record: &JobRecord) -> Value {
    let mut details = json!({
        "instanceType": "AsrJobDetails",
        "affectedObjectDetails": {
            "primaryVmName": record.vm_name,
            "primaryCloudName": record.fabric,
            "primaryFabricProviderId": "HyperVSite",
            "recoveryCloudName": AZURE,
            "recoveryFabricProviderId": "Azure",
        },
    });
    if record.operation == Operation::TestFailoverCleanup {
        details["instanceType"] = "TestFailoverJobDetails".into();
        details["comments"] = record.params["notes"].as_str().unwrap_or_default().into();
    }
    details
}

fn has_warnings(record: &JobRecord) -> bool {
    record.steps.iter().any(|step| !step.errors.is_empty())
}

fn allowed_actions(record: &JobRecord) -> Vec<String> {
    let mut actions = Vec::new();
    if job_log(record).check_cancel().is_ok()
        && !matches!(record.state, JobState::Ended(_))
        && !record.is_cancel_requested
    {
        actions.push("Cancel".to_owned());
    }
    match record.state {
        JobState::Suspended => actions.push("Resume".to_owned()),
        JobState::Ended(Ending::Stuck) => actions.push("Restart".to_owned()),
        _ => {}
    }
    actions
}

fn job_task(job: &JobRecord, step: &StepRecord, task: Task) -> JobTask {
    let (state, description) = match step.state {
        StepState::NotStarted => ("NotStarted", "NotStarted"),
        StepState::Started => ("InProgress", "InProgress"),
        StepState::Waiting => ("Suspended", "WaitingForUserInput"),
        StepState::Succeeded => ("Succeeded", "Completed"),
        StepState::Skipped => ("Other", "Skipped"),
        StepState::Failed => ("Failed", "Failed"),
        StepState::UndoStarted => ("Other", "Cancelling"),
        StepState::Undone => ("Other", "Cancelled"),
        StepState::UndoFailed => ("Failed", "UndoFailed"),
    };
    JobTask {
        task_id: task.id.into_owned(),
        name: task.name.into_owned(),
        start_time: Some(step.started_ms.map_or_else(no_time, time_text)),
        end_time: Some(step.ended_ms.map_or_else(no_time, time_text)),
        allowed_actions: if step.state == StepState::Waiting {
            vec!["Resume".to_owned()]
        } else {
            Vec::new()
        },
        friendly_name: task.friendly_name.into_owned(),
        state: state.to_owned(),
        state_description: description.to_owned(),
        task_type: "TaskDetails".to_owned(),
        custom_details: None,
        group_task_custom_details: None,
        errors: step.errors.iter().map(|error| job_error(job, step, error)).collect(),
    }
}

pub(super) fn job_status(entry: &JobEntry) -> JobStatus {
    match entry {
        JobEntry::Item(job) => JobStatus {
            id: job.id.to_string(),
            requested_by: job.requested_by.clone(),
            tasks: job
                .steps
                .iter()
                .map(|step| TaskStatus {
                    name: step.name.clone(),
                    attempts: step.attempts,
                    output: step.output.clone(),
                    progress: progress(step.progress.clone()),
                })
                .collect(),
        },
        JobEntry::Configuration(job) => {
            JobStatus { id: job.id.to_string(), requested_by: job.requested_by.clone(), tasks: Vec::new() }
        }
    }
}

pub(super) fn progress(progress: Progress) -> CycleProgress {
    let disk = |disk: mainstay_provider::DiskProgress| DiskProgress {
        key: disk.key,
        bytes_done: disk.bytes_done,
        bytes_total: disk.bytes_total,
    };
    CycleProgress {
        phase: progress.phase,
        bytes_done: progress.bytes_done,
        bytes_total: progress.bytes_total,
        bytes_moved: progress.bytes_moved,
        disks: progress.disks.into_iter().map(disk).collect(),
    }
}

/// How the service writes a time that has not come.
pub(super) fn no_time() -> String {
    "0001-01-01T00:00:00".to_owned()
}

pub(super) fn job_error(job: &JobRecord, step: &StepRecord, error: &JobError) -> JobErrorDetails {
    JobErrorDetails {
        service_error_details: ServiceError {
            code: error.code.clone(),
            message: error.message.clone(),
            possible_causes: String::new(),
            recommended_action: error.recommended_action.clone(),
            activity_id: job.id.to_string(),
        },
        provider_error_details: None,
        error_level: if error.is_warning { "Warning" } else { "Error" }.to_owned(),
        creation_time: step.ended_ms.map(time_text),
        task_id: step.name.clone(),
    }
}

/// The error of a failed job, for its operation's status.
pub(super) fn operation_error(record: &JobRecord) -> Option<arm::Error> {
    let found = record.steps.iter().flat_map(|step| &step.errors).find(|error| !error.is_warning)?;
    Some(arm::Error {
        code: found.code.clone(),
        message: found.message.clone(),
        details: vec![arm::ErrorDetail {
            code: found.code.clone(),
            message: found.message.clone(),
            possible_causes: String::new(),
            recommended_action: found.recommended_action.clone(),
            allowed_operations: None,
        }],
    })
}

/// How bad an event is, in the service's words.
pub(super) fn severity(severity: Health) -> &'static str {
    match severity {
        Health::Normal => "OK",
        Health::Warning => "Warning",
        Health::Critical => "Critical",
    }
}

pub(super) fn event(ids: &Ids<'_>, record: &EventRecord) -> Resource<EventProperties> {
    resource(
        format!("{}/replicationEvents/{}", ids.0.id(), record.id),
        "replicationEvents",
        EventProperties {
            event_code: record.code.clone(),
            description: record.description.clone(),
            event_type: record.kind.clone(),
            affected_object_friendly_name: record.affected_object.clone(),
            severity: severity(record.severity).to_owned(),
            time_of_occurrence: time_text(record.time_ms),
            fabric_id: (!record.fabric.is_empty()).then(|| ids.fabric(&record.fabric)),
            health_errors: Vec::new(),
        },
    )
}

pub(super) fn network(ids: &Ids<'_>, fabric: &str, record: &Network) -> Resource<NetworkProperties> {
    resource(
        ids.network(fabric, &record.name),
        "replicationFabrics/replicationNetworks",
        NetworkProperties {
            fabric_type: "HyperVSite".to_owned(),
            subnets: Vec::<Value>::new(),
            friendly_name: record.name.clone(),
            network_type: format!("{:?}", record.kind),
        },
    )
}
