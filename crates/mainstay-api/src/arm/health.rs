//! How the vault is.

use serde::{Deserialize, Serialize};

use super::HealthError;

/// How the vault is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VaultHealthProperties {
    /// Of the vault itself.
    pub vault_errors: Vec<HealthError>,
    /// Of the replicated items.
    pub protected_items_health: ResourceHealthSummary,
    /// Of the sites.
    pub fabrics_health: ResourceHealthSummary,
    /// Of their containers.
    pub containers_health: ResourceHealthSummary,
}

/// How resources of a kind are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ResourceHealthSummary {
    /// How many there are.
    pub resource_count: i64,
    /// What is wrong, by cause.
    pub issues: Vec<HealthErrorSummary>,
    /// How many of each health.
    pub categorized_resource_counts: std::collections::BTreeMap<String, i64>,
}

/// A cause, and what it affects.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HealthErrorSummary {
    /// Stable name.
    pub summary_code: String,
    /// `Replication`, `FabricInfrastructure`.
    pub category: String,
    /// `Warning` or `Error`.
    pub severity: String,
    /// What is wrong with the first of them.
    pub summary_message: String,
    /// `ProtectedItems`, `Fabric`, `ProtectionContainer`.
    pub affected_resource_type: String,
    /// `HyperVSite`.
    pub affected_resource_subtype: String,
    /// Identifiers of the affected.
    pub affected_resource_correlation_ids: Vec<String>,
}
