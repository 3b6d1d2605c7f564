//! What can be asked of the control plane, one file per resource. Methods of [`crate::Control`] that answer with records
//! or say why not; who may ask is decided before, how it is shown after.

mod alert_settings;
mod configuration;
mod container_mappings;
mod fabrics;
mod job_exports;
mod jobs;
mod network_mappings;
mod policies;
mod protectable_items;
mod protected_items;
mod providers;
mod recovery_plans;
mod service_principals;
mod tokens;
mod vault;
mod vault_settings;

pub use alert_settings::{ALERT_SETTING, AlertSettingRecord};
pub use container_mappings::ContainerMappingRecord;
pub use fabrics::FabricRecord;
pub use job_exports::{EXPORT_HOURS, ExportFormat, ExportQuery, JobExportRecord};
pub use network_mappings::NetworkMappingRecord;
pub(crate) use network_mappings::mapped;
pub use policies::PolicyRecord;
pub use protectable_items::ProtectableItem;
pub(crate) use protectable_items::disk_obstacle;
pub use protected_items::{
    EnableRequest, MEMORY_BYTES_MIN, Requester, check_address, is_resolvable, rehearsal_warning,
};
pub use providers::{HostRegistration, ProviderRecord, REGISTRATION_KEY_HOURS, RegistrationKeyRecord};
pub use recovery_plans::RecoveryPlanRecord;
pub use service_principals::ServicePrincipalRecord;
pub use tokens::{Role, TokenRecord, TokenSecret};
pub use vault::{HostedVaultRecord, VaultRecord};
pub use vault_settings::{ExtendedInfo, VaultSettingRecord};

use crate::ControlError;

/// Longest name of a resource, as in Azure.
const NAME_LENGTH_MAX: usize = 63;

/// Checks a name that a client chose.
fn check_name(kind: &str, name: &str) -> Result<(), ControlError> {
    let is_good = !name.is_empty()
        && name.len() <= NAME_LENGTH_MAX
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        && name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if is_good {
        return Ok(());
    }
    Err(ControlError::invalid(
        "InvalidName",
        format!("'{name}' cannot be the name of a {kind}"),
        format!(
            "Use 1 to {NAME_LENGTH_MAX} letters, digits, '-', '_' or '.', beginning with a letter or digit."
        ),
    ))
}
