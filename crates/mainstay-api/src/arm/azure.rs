//! Fields that mean something in Azure only.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Fields of a replicated item that have a meaning in Azure only. They are answered, because clients look for them, with
/// what the service answers when nothing was chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are Azure's, and none of them means anything here")]
pub struct AzureItemDetails {
    pub recovery_azure_storage_account: Option<String>,
    pub recovery_azure_log_storage_account_id: Option<String>,
    pub selected_source_nic_id: Option<String>,
    #[serde(rename = "oSDetails")]
    pub os_details: Option<Value>,
    pub enable_rdp_on_target_option: String,
    pub recovery_azure_resource_group_id: Option<String>,
    pub recovery_availability_set_id: Option<String>,
    pub target_availability_zone: Option<String>,
    pub target_proximity_placement_group_id: Option<String>,
    pub license_type: String,
    pub sql_server_license_type: String,
    pub target_vm_tags: Value,
    pub seed_managed_disk_tags: Option<Value>,
    pub target_managed_disk_tags: Option<Value>,
    pub target_nic_tags: Value,
    pub protected_managed_disks: Vec<Value>,
}

impl Default for AzureItemDetails {
    fn default() -> Self {
        Self {
            recovery_azure_storage_account: None,
            recovery_azure_log_storage_account_id: None,
            selected_source_nic_id: None,
            os_details: None,
            enable_rdp_on_target_option: "Never".to_owned(),
            recovery_azure_resource_group_id: None,
            recovery_availability_set_id: None,
            target_availability_zone: None,
            target_proximity_placement_group_id: None,
            license_type: "NotSpecified".to_owned(),
            sql_server_license_type: "NotSpecified".to_owned(),
            target_vm_tags: Value::Object(serde_json::Map::new()),
            seed_managed_disk_tags: None,
            target_managed_disk_tags: None,
            target_nic_tags: Value::Object(serde_json::Map::new()),
            protected_managed_disks: Vec::new(),
        }
    }
}

/// Fields of a replicated disk that have a meaning in Azure only; null.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "the names are Azure's, and none of them means anything here")]
pub struct AzureDiskDetails {
    pub target_disk_location: Option<String>,
    pub target_disk_name: Option<String>,
    pub disk_encryption_set_id: Option<String>,
    pub custom_target_disk_name: Option<String>,
}
