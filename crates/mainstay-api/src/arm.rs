//! Resources and requests of the Azure Resource Manager API.
//!
//! Fields that Mainstay does not use are left out of requests and ignored when they come; times are RFC 3339 text.

mod azure;
mod exports;
mod health;
mod items;
mod networks;
mod recovery_plan;
mod settings;

pub use azure::{AzureDiskDetails, AzureItemDetails};
pub use exports::{EXPORT_JOB_DETAILS, ExportJobDetails, JobQueryParameter};
pub use health::{HealthErrorSummary, ResourceHealthSummary, VaultHealthProperties};
pub use items::{ResolveHealthError, ResolveHealthInput, TargetComputeSizeProperties};
pub use networks::{
    LogicalNetworkProperties, NetworkMappingInput, NetworkMappingProperties, NetworkMappingSettings,
    NetworkProperties,
};
pub use recovery_plan::*;
pub use settings::{
    AlertProperties, CertificateInput, ExtendedInfoProperties, NameQuestion, VaultSettingProperties,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The namespace of all resource types here.
pub const NAMESPACE: &str = "Microsoft.RecoveryServices";
/// The API version that this crate's client asks for; the server accepts any.
pub const API_VERSION: &str = "2024-04-01";
/// The literal that stands for the recovery site where an ARM id is not given.
pub const AZURE: &str = "Microsoft Azure";
/// The instance type under which every pair of sites is shown.
pub const HYPERV_REPLICA_AZURE: &str = "HyperVReplicaAzure";
/// The instance type of a failback request.
pub const HYPERV_REPLICA_AZURE_FAILBACK: &str = "HyperVReplicaAzureFailback";

/// Clients write null where they leave something out.
fn null_as_default<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: Default + Deserialize<'de>,
    D: serde::Deserializer<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A resource envelope.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Resource<P> {
    /// ARM id.
    pub id: String,
    /// Name.
    pub name: String,
    /// Type, `Microsoft.RecoveryServices/vaults/…`.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// Location, on resources that have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub location: Option<String>,
    /// Everything else.
    pub properties: P,
}

/// A page of resources.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "{T}List")]
pub struct List<T> {
    /// The resources.
    pub value: Vec<T>,
    /// Where the next page is.
    #[serde(default)]
    pub next_link: Option<String>,
}

/// The body of an error answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: Error,
}

/// An error.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Error {
    /// Stable name.
    pub code: String,
    /// What happened.
    pub message: String,
    /// Causes and actions.
    pub details: Vec<ErrorDetail>,
}

/// Detail of an error.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct ErrorDetail {
    /// Stable name.
    pub code: String,
    /// What happened.
    pub message: String,
    /// What usually causes it.
    pub possible_causes: String,
    /// What to do.
    pub recommended_action: String,
    /// Operations that the item allows now (Mainstay's addition).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_operations: Option<Vec<String>>,
}

/// The body of `replicationOperationStatus`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OperationStatus {
    /// Always null, as recorded.
    #[serde(default)]
    pub id: Option<String>,
    /// The operation's id, which is the job's name.
    pub name: String,
    /// `InProgress`, `Succeeded`, `Failed`, `Canceled`.
    pub status: String,
    /// When it began.
    pub start_time: Option<String>,
    /// When it ended.
    pub end_time: Option<String>,
    /// Not used, as recorded.
    #[serde(default)]
    pub percent_complete: Option<f64>,
    /// Always null, as recorded.
    #[serde(default)]
    pub properties: Option<Value>,
    /// Why it failed, or information with a success.
    #[serde(default)]
    pub error: Option<Error>,
}

/// `properties` of a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request<P> {
    /// The request itself.
    pub properties: P,
}

/// A fabric.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FabricProperties {
    /// Name for people.
    pub friendly_name: String,
    /// Internal identifier.
    pub internal_identifier: String,
    /// `Normal` or `Critical`.
    pub health: String,
    /// `Valid`.
    pub bcdr_state: String,
    /// `HyperVSite` details.
    pub custom_details: Value,
    /// Health errors.
    pub health_error_details: Vec<Value>,
    /// Encryption.
    pub encryption_details: Value,
    /// The same for rollover.
    pub rollover_encryption_details: Value,
}

/// A registered host's agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProviderProperties {
    /// `HyperVSite`.
    pub fabric_type: String,
    /// The host's name.
    pub friendly_name: String,
    /// The agent's version.
    pub provider_version: String,
    /// `Connected` or `NotConnected`.
    pub connection_status: String,
    /// When it was last heard of.
    pub last_heart_beat: Option<String>,
    /// The fabric's name.
    pub fabric_friendly_name: String,
    /// `Refresh`.
    pub allowed_scenarios: Vec<String>,
    /// Items that it protects.
    pub protected_item_count: i64,
    /// What the host lacks.
    #[serde(default)]
    pub health_error_details: Vec<HealthError>,
}

/// A replication policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyProperties {
    /// Name for people.
    pub friendly_name: String,
    /// The values.
    pub provider_specific_details: PolicyDetails,
}

/// Values of a policy, as answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyDetails {
    /// [`HYPERV_REPLICA_AZURE`].
    pub instance_type: String,
    /// Hours for which recovery points are kept.
    pub recovery_point_history_duration_in_hours: u32,
    /// Hours between application-consistent points.
    pub application_consistent_snapshot_frequency_in_hours: u32,
    /// Seconds between deltas.
    pub replication_interval: u32,
    /// Not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub online_replication_start_time: Option<String>,
    /// `Disabled`.
    pub encryption: String,
    /// Not used.
    pub active_storage_account_id: Option<String>,
}

/// A request for a policy (create and update).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyInput {
    /// The values; the update calls them `replicationProviderSettings`.
    #[serde(alias = "replicationProviderSettings", default, deserialize_with = "null_as_default")]
    pub provider_specific_input: PolicySettings,
    /// The values as they were answered, when a client sends back what it got.
    #[serde(default, deserialize_with = "null_as_default", skip_serializing)]
    pub provider_specific_details: PolicySettings,
}

/// Values of a policy, as asked for; those left out are kept, or have defaults.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicySettings {
    /// [`HYPERV_REPLICA_AZURE`].
    #[serde(deserialize_with = "null_as_default")]
    pub instance_type: String,
    /// Hours for which recovery points are kept.
    #[serde(alias = "recoveryPointHistoryDurationInHours", skip_serializing_if = "Option::is_none")]
    pub recovery_point_history_duration: Option<u32>,
    /// Hours between application-consistent points.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub application_consistent_snapshot_frequency_in_hours: Option<u32>,
    /// Seconds between deltas.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replication_interval: Option<u32>,
}

/// A protection container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerProperties {
    /// The fabric's name.
    pub fabric_friendly_name: String,
    /// Name for people: the site's.
    pub friendly_name: String,
    /// `HyperVSite`.
    pub fabric_type: String,
    /// VMs that are protected.
    pub protected_item_count: i64,
    /// `Paired` or `NotPaired`.
    pub pairing_status: String,
    /// `Primary` or empty.
    pub role: String,
    /// Null.
    pub fabric_specific_details: Option<Value>,
}

/// A container mapping.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerMappingProperties {
    /// The recovery container: its ARM id, or [`AZURE`].
    pub target_protection_container_id: String,
    /// Its name.
    pub target_protection_container_friendly_name: String,
    /// The policy's ARM id.
    pub policy_id: String,
    /// Its name.
    pub policy_friendly_name: String,
    /// The protected fabric.
    pub source_fabric_friendly_name: String,
    /// The recovery fabric.
    pub target_fabric_friendly_name: String,
    /// The protected container.
    pub source_protection_container_friendly_name: String,
    /// `Paired`.
    pub state: String,
    /// `Normal`.
    pub health: String,
    /// Reasons for another health.
    #[serde(default)]
    pub health_error_details: Vec<Value>,
    /// Null, as recorded.
    #[serde(default)]
    pub provider_specific_details: Option<Value>,
}

/// A request for a container mapping.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerMappingInput {
    /// The policy's ARM id.
    pub policy_id: String,
    /// The recovery container's ARM id, or [`AZURE`].
    pub target_protection_container_id: String,
}

/// A discovered VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProtectableItemProperties {
    /// The VM's name.
    pub friendly_name: String,
    /// `Unprotected` or `Protected`.
    pub protection_status: String,
    /// The item that protects it.
    pub replication_protected_item_id: Option<String>,
    /// The host's agent.
    pub recovery_services_provider_id: String,
    /// Why it cannot be protected; those that begin with [`WITHOUT`] only stand in the way of one disk.
    pub protection_readiness_errors: Vec<String>,
    /// [`HYPERV_REPLICA_AZURE`].
    pub supported_replication_providers: Vec<String>,
    /// Disks and the like.
    pub custom_details: VirtualMachineDetails,
}

/// How a readiness error begins that goes away when a disk is left out; its key follows, and then why.
pub const WITHOUT: &str = "without ";

/// Details of a discovered VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VirtualMachineDetails {
    /// `HyperVVirtualMachine`.
    pub instance_type: String,
    /// The VM's identifier on its host.
    pub source_item_id: String,
    /// Generation: `1` (BIOS) or `2` (UEFI).
    pub generation: String,
    /// Null: what runs in the VM is not looked at.
    #[serde(default)]
    pub os_details: Option<Value>,
    /// Disks.
    pub disk_details: Vec<DiskDetails>,
    /// `NotPresent`, `Present` or `Unknown`: disks that are a device of the host.
    #[serde(default)]
    pub has_physical_disk: String,
    /// The same of Fibre Channel adapters.
    #[serde(default)]
    pub has_fibre_channel_adapter: String,
    /// The same of disks that several VMs share.
    #[serde(default)]
    pub has_shared_vhd: String,
    /// The host.
    #[serde(default)]
    pub hyper_v_host_id: String,
}

/// A disk of a discovered VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DiskDetails {
    /// Size in MiB, rounded up.
    #[serde(rename = "maxSizeMB")]
    pub max_size_mb: i64,
    /// `OperatingSystem` or `DataDisk`.
    pub vhd_type: String,
    /// The disk's key.
    pub vhd_id: String,
    /// Its name.
    pub vhd_name: String,
}

/// A request to protect a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EnableProtectionInput {
    /// The policy's ARM id.
    pub policy_id: String,
    /// The protectable item's ARM id.
    pub protectable_item_id: String,
    /// Details.
    #[serde(default, deserialize_with = "null_as_default")]
    pub provider_specific_details: EnableDetails,
}

/// Details of a request to protect a VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EnableDetails {
    /// [`HYPERV_REPLICA_AZURE`].
    #[serde(deserialize_with = "null_as_default")]
    pub instance_type: String,
    /// The target name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_azure_vm_name: Option<String>,
    /// The target network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_azure_network_id: Option<String>,
    /// The VM's identifier on its host, if it is told a second time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hv_host_vm_id: Option<String>,
    /// Key of the disk that the VM boots from, if it is told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vhd_id: Option<String>,
    /// The target size: `VCPUS` or `VCPUSxMEMORY_MIB`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_vm_size: Option<String>,
    /// Keys of the disks to replicate; absent = all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disks_to_include: Option<Vec<String>>,
}

/// A replicated item.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ItemProperties {
    /// The VM's name.
    pub friendly_name: String,
    /// `HyperVVirtualMachine`.
    pub protected_item_type: String,
    /// The protectable item.
    pub protectable_item_id: String,
    /// The host's agent.
    pub recovery_services_provider_id: String,
    /// The protected fabric.
    pub primary_fabric_friendly_name: String,
    /// `SingleHostHyperVFabric`.
    pub primary_fabric_provider: String,
    /// The recovery fabric.
    pub recovery_fabric_friendly_name: String,
    /// Its ARM id.
    pub recovery_fabric_id: String,
    /// The protected container.
    pub primary_protection_container_friendly_name: String,
    /// The recovery container.
    pub recovery_protection_container_friendly_name: String,
    /// Where it stands.
    pub protection_state: String,
    /// For people.
    pub protection_state_description: String,
    /// `Primary` or `Recovery`.
    pub active_location: String,
    /// Where the rehearsal stands.
    pub test_failover_state: String,
    /// For people.
    pub test_failover_state_description: String,
    /// `None`.
    pub switch_provider_state: String,
    /// Null.
    pub switch_provider_state_description: Option<String>,
    /// What may be done now.
    pub allowed_operations: Vec<String>,
    /// `Normal`, `Warning`, `Critical`.
    pub replication_health: String,
    /// `Normal`, `Warning`.
    pub failover_health: String,
    /// Reasons.
    pub health_errors: Vec<HealthError>,
    /// The policy's ARM id.
    pub policy_id: String,
    /// Its name.
    pub policy_friendly_name: String,
    /// When a failover last succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_successful_failover_time: Option<String>,
    /// When a test failover was last cleaned up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_successful_test_failover_time: Option<String>,
    /// What is under way.
    pub current_scenario: CurrentScenario,
    /// The point that was failed over to.
    pub failover_recovery_point_id: Option<String>,
    /// Details.
    pub provider_specific_details: ItemDetails,
    /// The recovery container's ARM id.
    pub recovery_container_id: String,
    /// What events of the item have in common: its internal id.
    #[serde(default)]
    pub event_correlation_id: String,
}

/// What is under way on an item.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CurrentScenario {
    /// `None` when idle.
    pub scenario_name: String,
    /// The job.
    pub job_id: String,
    /// When it began.
    pub start_time: String,
}

/// A health error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HealthError {
    /// Empty.
    pub inner_health_errors: Vec<Value>,
    /// Where it comes from.
    pub error_source: String,
    /// Stable name.
    pub error_type: String,
    /// `Warning` or `Error`.
    pub error_level: String,
    /// `Replication`, `TestFailover`.
    pub error_category: String,
    /// Stable code.
    pub error_code: String,
    /// Short text.
    pub summary_message: String,
    /// What is wrong.
    pub error_message: String,
    /// What usually causes it.
    pub possible_causes: String,
    /// What to do.
    pub recommended_action: String,
    /// When it was noticed.
    pub creation_time_utc: String,
    /// Null.
    pub recovery_provider_error_message: Option<String>,
    /// The VM.
    pub entity_id: String,
    /// Stable id.
    pub error_id: String,
    /// `Allowed` or `NotAllowed`.
    pub customer_resolvability: String,
}

/// Details of a replicated item.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ItemDetails {
    /// [`HYPERV_REPLICA_AZURE`].
    pub instance_type: String,
    /// Disks.
    pub azure_vm_disk_details: Vec<ItemDisk>,
    /// The target name.
    pub recovery_azure_vm_name: String,
    /// The target size.
    #[serde(rename = "recoveryAzureVMSize")]
    pub recovery_azure_vm_size: Option<String>,
    /// When data last arrived.
    pub last_replicated_time: Option<String>,
    /// The age of the newest recovery point in seconds.
    pub rpo_in_seconds: Option<i64>,
    /// When that was computed.
    pub last_rpo_calculated_time: Option<String>,
    /// The VM's identifier.
    pub vm_id: String,
    /// State of the VM's protection.
    pub vm_protection_state: String,
    /// For people.
    pub vm_protection_state_description: String,
    /// How far the initial replication is.
    pub initial_replication_details: InitialReplicationDetails,
    /// Adapters.
    pub vm_nics: Vec<ItemNic>,
    /// The target network.
    pub selected_recovery_azure_network_id: Option<String>,
    /// `Disabled`.
    pub encryption: String,
    /// Target memory in MiB.
    #[serde(rename = "sourceVmRamSizeInMB")]
    pub source_vm_ram_size_in_mb: Option<i64>,
    /// Target processors.
    pub source_vm_cpu_count: Option<i64>,
    /// `true` or `false` as text.
    pub use_managed_disks: String,
    /// The newest recovery point.
    pub last_recovery_point_received: Option<String>,
    /// What only Azure has.
    #[serde(flatten)]
    pub azure: AzureItemDetails,
}

/// How far the initial replication is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InitialReplicationDetails {
    /// `InitialReplication`.
    pub initial_replication_type: String,
    /// `0` to `100`, as text.
    pub initial_replication_progress_percentage: String,
}

/// A disk of a replicated item.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ItemDisk {
    /// `OperatingSystem` or `DataDisk`.
    pub vhd_type: String,
    /// The disk's key.
    pub vhd_id: String,
    /// The disk's key.
    pub disk_id: String,
    /// Its name.
    pub vhd_name: String,
    /// Size in MiB, as text.
    #[serde(rename = "maxSizeMB")]
    pub max_size_mb: String,
    /// Position.
    pub lun_id: String,
    /// What only Azure has.
    #[serde(flatten)]
    pub azure: AzureDiskDetails,
}

/// An adapter of a replicated item.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ItemNic {
    /// The adapter: its MAC address.
    pub nic_id: String,
    /// The network after a failover.
    #[serde(rename = "recoveryVMNetworkId")]
    pub recovery_vm_network_id: Option<String>,
    /// Addresses.
    pub ip_configs: Vec<ItemIpConfig>,
    /// `SelectedByUser` or `NotSelected`.
    pub selection_type: Option<String>,
    /// The network of test copies.
    #[serde(rename = "tfoVMNetworkId")]
    pub tfo_vm_network_id: Option<String>,
    /// `Keep` or `Generate`: Mainstay's addition to requests; answers have it in [`crate::v1::ItemStatus`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac_policy: Option<String>,
    /// What only Azure has; absent in requests.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub azure: Option<AzureNicDetails>,
}

/// Fields of an adapter that have a meaning in Azure only.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are Azure's, and none of them means anything here")]
pub struct AzureNicDetails {
    pub replica_nic_id: Option<String>,
    pub source_nic_arm_id: Option<String>,
    #[serde(rename = "vMNetworkName")]
    pub vm_network_name: Option<String>,
    pub recovery_network_security_group_id: Option<String>,
    pub enable_accelerated_networking_on_recovery: Option<bool>,
    pub tfo_network_security_group_id: Option<String>,
    pub enable_accelerated_networking_on_tfo: Option<bool>,
    pub recovery_nic_name: Option<String>,
    pub recovery_nic_resource_group_name: Option<String>,
    pub reuse_existing_nic: bool,
    pub tfo_recovery_nic_name: Option<String>,
    pub tfo_recovery_nic_resource_group_name: Option<String>,
    pub tfo_reuse_existing_nic: bool,
    pub target_nic_name: Option<String>,
}

/// An address of an adapter.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ItemIpConfig {
    /// Whether it is the first.
    pub is_primary: Option<bool>,
    /// Whether it is used; spelt as in the service.
    pub is_seleted_for_failover: Option<bool>,
    /// The address after a failover, `ADDRESS/PREFIX`.
    #[serde(rename = "recoveryStaticIPAddress")]
    pub recovery_static_ip_address: Option<String>,
    /// `Static` or `Dynamic`.
    #[serde(rename = "recoveryIPAddressType")]
    pub recovery_ip_address_type: Option<String>,
    /// What only Azure has; absent in requests.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub azure: Option<AzureIpConfigDetails>,
}

/// Fields of an address that have a meaning in Azure only; null.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are Azure's, and none of them means anything here")]
pub struct AzureIpConfigDetails {
    pub name: Option<String>,
    pub subnet_name: Option<String>,
    #[serde(rename = "staticIPAddress")]
    pub static_ip_address: Option<String>,
    #[serde(rename = "ipAddressType")]
    pub ip_address_type: Option<String>,
    pub recovery_subnet_name: Option<String>,
    #[serde(rename = "recoveryPublicIPAddressId")]
    pub recovery_public_ip_address_id: Option<String>,
    #[serde(rename = "recoveryLBBackendAddressPoolIds")]
    pub recovery_lb_backend_address_pool_ids: Option<Vec<String>>,
    pub tfo_subnet_name: Option<String>,
    #[serde(rename = "tfoStaticIPAddress")]
    pub tfo_static_ip_address: Option<String>,
    #[serde(rename = "tfoPublicIPAddressId")]
    pub tfo_public_ip_address_id: Option<String>,
    #[serde(rename = "tfoLBBackendAddressPoolIds")]
    pub tfo_lb_backend_address_pool_ids: Option<Vec<String>>,
}

/// A request to change an item; what is left out is kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct UpdateItemInput {
    /// The target name.
    #[serde(
        rename = "recoveryAzureVMName",
        alias = "recoveryAzureVmName",
        skip_serializing_if = "Option::is_none"
    )]
    pub recovery_azure_vm_name: Option<String>,
    /// The target size: `VCPUS` or `VCPUSxMEMORY_MIB`, `2x1024`.
    #[serde(rename = "recoveryAzureVMSize", skip_serializing_if = "Option::is_none")]
    pub recovery_azure_vm_size: Option<String>,
    /// The target network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selected_recovery_azure_network_id: Option<String>,
    /// The network of test copies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selected_tfo_azure_network_id: Option<String>,
    /// Adapters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm_nics: Option<Vec<ItemNic>>,
}

/// A recovery point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RecoveryPointProperties {
    /// The moment it shows.
    pub recovery_point_time: String,
    /// `CrashConsistent` or `AppConsistent`.
    pub recovery_point_type: String,
}

/// A request for a failover of any kind.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FailoverInput {
    /// `PrimaryToRecovery` or `RecoveryToPrimary`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failover_direction: Option<String>,
    /// `Required` or `NotRequired`: whether to stop the source first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_site_operations: Option<String>,
    /// `VmNetworkAsInput` or `NoNetworkAttachAsInput`, for test failovers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_type: Option<String>,
    /// The network of a test failover.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_id: Option<String>,
    /// Details.
    #[serde(deserialize_with = "null_as_default")]
    pub provider_specific_details: FailoverDetails,
}

/// Details of a failover request.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FailoverDetails {
    /// [`HYPERV_REPLICA_AZURE`] or [`HYPERV_REPLICA_AZURE_FAILBACK`].
    #[serde(deserialize_with = "null_as_default")]
    pub instance_type: String,
    /// The point's ARM id or name; absent = latest. Mainstay also takes `Latest`, `LatestProcessed` and
    /// `LatestApplicationConsistent`, the service's words for recovery plans.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovery_point_id: Option<String>,
    /// `ForDownTime` (synchronise first) or `ForSynchronization` (during), for failbacks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_sync_option: Option<String>,
    /// `CreateVmIfNotFound` or `NoAction`, for failbacks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovery_vm_creation_option: Option<String>,
    /// Another host's agent to return to, for failbacks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provider_id_for_alternate_recovery: Option<String>,
}

/// A request to run another recovery point.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ApplyRecoveryPointInput {
    /// The point's ARM id or name.
    pub recovery_point_id: String,
    /// Details.
    #[serde(deserialize_with = "null_as_default")]
    pub provider_specific_details: FailoverDetails,
}

/// A request that carries a remark: test failover clean-up, resume of a job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CommentsInput {
    /// The remark.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub comments: Option<String>,
}

/// A job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JobProperties {
    /// For support.
    pub activity_id: String,
    /// What it does.
    pub scenario_name: String,
    /// For people.
    pub friendly_name: String,
    /// `NotStarted`, `InProgress`, `Succeeded`, `Failed`, `Cancelled`, `Suspended`, `Cancelling`.
    pub state: String,
    /// More precisely.
    pub state_description: String,
    /// Steps.
    pub tasks: Vec<JobTask>,
    /// What went wrong.
    pub errors: Vec<JobErrorDetails>,
    /// When it began.
    pub start_time: Option<String>,
    /// When it ended.
    pub end_time: Option<String>,
    /// `Cancel`, `Resume`, `Restart`.
    pub allowed_actions: Vec<String>,
    /// What it is about: the protectable item's name.
    pub target_object_id: String,
    /// Its name.
    pub target_object_name: String,
    /// `ProtectionEntity`.
    pub target_instance_type: String,
    /// Details.
    pub custom_details: Value,
}

/// A step of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JobTask {
    /// Identifier.
    pub task_id: String,
    /// Name.
    pub name: String,
    /// When it began.
    pub start_time: Option<String>,
    /// When it ended.
    pub end_time: Option<String>,
    /// What may be done.
    pub allowed_actions: Vec<String>,
    /// For people.
    pub friendly_name: String,
    /// `NotStarted`, `InProgress`, `Succeeded`, `Failed`, `Suspended`, `Other`.
    pub state: String,
    /// More precisely.
    pub state_description: String,
    /// `TaskDetails`.
    pub task_type: String,
    /// Of an action or a machine of a recovery plan; see also [`crate::v1::TaskStatus`].
    pub custom_details: Option<Value>,
    /// Of a group of a recovery plan: its machines' tasks.
    pub group_task_custom_details: Option<Value>,
    /// What went wrong.
    pub errors: Vec<JobErrorDetails>,
}

/// Something that went wrong in a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JobErrorDetails {
    /// What the service says.
    pub service_error_details: ServiceError,
    /// Null.
    pub provider_error_details: Option<Value>,
    /// `Error` or `Warning`.
    pub error_level: String,
    /// When.
    pub creation_time: Option<String>,
    /// The step.
    pub task_id: String,
}

/// An error as the service says it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceError {
    /// Stable name.
    pub code: String,
    /// What happened.
    pub message: String,
    /// What usually causes it.
    pub possible_causes: String,
    /// What to do.
    pub recommended_action: String,
    /// For support.
    pub activity_id: String,
}

/// An event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EventProperties {
    /// Stable name.
    pub event_code: String,
    /// What happened.
    pub description: String,
    /// `VmHealth`, `JobStatus`, `AgentStatus`.
    pub event_type: String,
    /// The VM's or host's name.
    pub affected_object_friendly_name: String,
    /// `OK`, `Warning`, `Critical`.
    pub severity: String,
    /// When.
    pub time_of_occurrence: String,
    /// The fabric's ARM id.
    pub fabric_id: Option<String>,
    /// Empty.
    pub health_errors: Vec<Value>,
}
