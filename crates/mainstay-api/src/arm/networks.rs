//! Networks, their mappings, and logical networks.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A network of a fabric.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NetworkProperties {
    /// `HyperVSite`.
    pub fabric_type: String,
    /// Empty.
    pub subnets: Vec<Value>,
    /// Name for people.
    pub friendly_name: String,
    /// `Production` or `Isolated`.
    pub network_type: String,
}

/// A mapping of a network to one of a recovery site.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NetworkMappingProperties {
    /// `Paired`.
    pub state: String,
    /// The network's name.
    pub primary_network_friendly_name: String,
    /// Its ARM id.
    pub primary_network_id: String,
    /// Its fabric.
    pub primary_fabric_friendly_name: String,
    /// The recovery network's name.
    pub recovery_network_friendly_name: String,
    /// Its ARM id.
    pub recovery_network_id: String,
    /// Its fabric's ARM id.
    pub recovery_fabric_arm_id: String,
    /// Its fabric.
    pub recovery_fabric_friendly_name: String,
    /// What kind of mapping it is.
    pub fabric_specific_settings: NetworkMappingSettings,
}

/// What kind of mapping it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NetworkMappingSettings {
    /// `VmmToAzure`.
    pub instance_type: String,
}

/// A request for a mapping, or to change one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetworkMappingInput {
    /// The recovery fabric: its name, its id, or `Microsoft Azure` for the only other one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovery_fabric_name: Option<String>,
    /// The recovery network: its ARM id or name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovery_network_id: Option<String>,
}

/// A logical network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LogicalNetworkProperties {
    /// Name for people.
    pub friendly_name: String,
    /// `NetworkVirtualizationNotEnabled`.
    pub network_virtualization_status: String,
    /// `NotUsedAsPrivateNetworkForTestFailover`.
    pub logical_network_usage: String,
    /// `LogicalNetworkDefinitionsNotIsolated` or `LogicalNetworkDefinitionsIsolated`.
    pub logical_network_definitions_status: String,
}
