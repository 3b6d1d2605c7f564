//! The vault: one per server for now; its identity is part of every ARM path.

use serde::{Deserialize, Serialize};

use crate::{
    Control, ControlError,
    db::{Resource, ResourceKind},
};

/// The vault's identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VaultRecord {
    /// Azure subscription id, made up at `server init`.
    pub subscription: String,
    /// Resource group.
    pub resource_group: String,
    /// Name.
    pub name: String,
    /// Location as shown.
    pub location: String,
}

impl VaultRecord {
    /// The ARM id, in the casing in which the service answers.
    pub fn id(&self) -> String {
        format!(
            "/Subscriptions/{}/resourceGroups/{}/providers/Microsoft.RecoveryServices/vaults/{}",
            self.subscription, self.resource_group, self.name
        )
    }
}

impl Resource for VaultRecord {
    const KIND: ResourceKind = ResourceKind::Vault;

    fn name(&self) -> String {
        self.name.clone()
    }
}

impl Control {
    /// The vault.
    pub async fn vault(&self) -> Result<VaultRecord, ControlError> {
        self.db
            .resources()
            .await?
            .into_iter()
            .next()
            .ok_or_else(|| ControlError::not_found("vault", "(none; run `mainstay server init`)"))
    }

    /// Makes the vault, or answers the present one.
    pub async fn create_vault(&self, vault: VaultRecord) -> Result<VaultRecord, ControlError> {
        super::check_name("vault", &vault.name)?;
        super::check_name("resource group", &vault.resource_group)?;
        let mut present: Vec<VaultRecord> = self.db.resources().await?;
        if let Some(present) = present.pop() {
            return Ok(present);
        }
        let mut transaction = self.db.begin().await?;
        transaction.put_resource(&vault).await?;
        transaction.commit().await?;
        Ok(vault)
    }
}
