//! Recovery plans.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::CurrentScenario;

/// A recovery plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RecoveryPlanProperties {
    /// Its name.
    pub friendly_name: String,
    /// The protected site.
    pub primary_fabric_id: String,
    /// Its name.
    pub primary_fabric_friendly_name: String,
    /// The recovery site.
    pub recovery_fabric_id: String,
    /// Its name.
    pub recovery_fabric_friendly_name: String,
    /// `ResourceManager`.
    pub failover_deployment_model: String,
    /// The kinds of replication of its machines.
    pub replication_providers: Vec<String>,
    /// What can be asked for now.
    pub allowed_operations: Vec<String>,
    /// When a planned failover last succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_planned_failover_time: Option<String>,
    /// When an unplanned failover last succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_unplanned_failover_time: Option<String>,
    /// When a test failover last succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_test_failover_time: Option<String>,
    /// What it is carrying out, or carried out last; null before the first time.
    pub current_scenario: Option<CurrentScenario>,
    /// That job's state.
    pub current_scenario_status: Option<String>,
    /// More precisely.
    pub current_scenario_status_description: Option<String>,
    /// `Shutdown`, `Failover` and the groups of machines; empty in lists.
    pub groups: Vec<RecoveryPlanGroup>,
    /// Empty.
    pub provider_specific_details: Vec<Value>,
}

/// A group of a plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RecoveryPlanGroup {
    /// `Shutdown`, `Failover` or `Boot`; only the last has machines.
    pub group_type: String,
    /// Machines.
    pub replication_protected_items: Option<Vec<RecoveryPlanProtectedItem>>,
    /// What is done before it.
    pub start_group_actions: Option<Vec<RecoveryPlanAction>>,
    /// What is done after it.
    pub end_group_actions: Option<Vec<RecoveryPlanAction>>,
}

/// A machine of a plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RecoveryPlanProtectedItem {
    /// The replicated item.
    pub id: Option<String>,
    /// Its VM.
    pub virtual_machine_id: Option<String>,
}

/// An action of a plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RecoveryPlanAction {
    /// Its name.
    pub action_name: String,
    /// `TestFailover`, `PlannedFailover`, `UnplannedFailover`.
    pub failover_types: Vec<String>,
    /// `PrimaryToRecovery`, `RecoveryToPrimary`.
    pub failover_directions: Vec<String>,
    /// What it is.
    pub custom_details: RecoveryPlanActionDetails,
}

/// What an action is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RecoveryPlanActionDetails {
    /// `ManualActionDetails` or `ScriptActionDetails`.
    pub instance_type: String,
    /// What a person is to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The script's file name in the server's script directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// How long it may run: an ISO 8601 duration, or seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<String>,
    /// `Primary` or `Recovery`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fabric_location: Option<String>,
}

/// A request to make or change a plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RecoveryPlanInput {
    /// The protected site.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub primary_fabric_id: Option<String>,
    /// The recovery site, or [`super::AZURE`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovery_fabric_id: Option<String>,
    /// The groups.
    pub groups: Option<Vec<RecoveryPlanGroup>>,
}

/// A request for a failover of a plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RecoveryPlanFailoverInput {
    /// `PrimaryToRecovery` or `RecoveryToPrimary`.
    pub failover_direction: Option<String>,
    /// `Required` or `NotRequired`: whether to stop the machines first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_site_operations: Option<String>,
    /// `VmNetworkAsInput` or `NoNetworkAttachAsInput`, for test failovers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_type: Option<String>,
    /// The network of a test failover.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_id: Option<String>,
    /// One entry for each kind of replication.
    pub provider_specific_details: Option<Vec<RecoveryPlanFailoverDetails>>,
}

/// Details of a failover of a plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RecoveryPlanFailoverDetails {
    /// [`super::HYPERV_REPLICA_AZURE`] or [`super::HYPERV_REPLICA_AZURE_FAILBACK`].
    pub instance_type: String,
    /// `Latest`, `LatestProcessed` or `LatestApplicationConsistent`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovery_point_type: Option<String>,
    /// `ForDownTime` or `ForSynchronization`, for failbacks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_sync_option: Option<String>,
    /// `CreateVmIfNotFound` or `NoAction`, for failbacks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovery_vm_creation_option: Option<String>,
}
