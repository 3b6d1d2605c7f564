//! Replicated items: smaller operations.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A request to put health errors out of sight.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ResolveHealthInput {
    /// Which.
    pub health_errors: Vec<ResolveHealthError>,
}

/// A health error that is meant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ResolveHealthError {
    /// Its `errorId`.
    pub health_error_id: String,
}

/// A size that a recovery VM could have.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TargetComputeSizeProperties {
    /// As `recoveryAzureVMSize` takes it.
    pub name: String,
    /// For people.
    pub friendly_name: String,
    /// Virtual processors.
    pub cpu_cores_count: i64,
    /// The same.
    #[serde(rename = "vCPUsAvailable")]
    pub vcpus_available: i64,
    /// Memory in GiB.
    #[serde(rename = "memoryInGB")]
    pub memory_in_gb: f64,
    /// Disks that a VM can have besides the first.
    pub max_data_disk_count: i64,
    /// Adapters that a VM can have.
    pub max_nics_count: i64,
    /// Empty: sizes that do not fit are not told.
    pub errors: Vec<Value>,
    /// `Supported`.
    pub high_iops_supported: String,
    /// `V1` (BIOS) and `V2` (UEFI).
    #[serde(rename = "hyperVGenerations")]
    pub hyper_v_generations: Vec<String>,
}
