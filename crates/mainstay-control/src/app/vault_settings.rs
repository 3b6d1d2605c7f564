//! What clients keep in the vault and find again there. Nothing here means anything to replication.

use serde::{Deserialize, Serialize};

use crate::{
    Control, ControlError,
    db::{Resource, ResourceKind},
};

/// Settings and extended information of the vault, as clients wrote them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VaultSettingRecord {
    /// `migrationSolutionId`.
    pub migration_solution: Option<String>,
    /// `vmwareToAzureProviderType`.
    pub vmware_provider: Option<String>,
    /// The extended information; `None` = nobody wrote it.
    pub extended: Option<ExtendedInfo>,
}

/// The vault's extended information.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtendedInfo {
    /// `integrityKey`.
    pub integrity_key: Option<String>,
    /// `encryptionKey`.
    pub encryption_key: Option<String>,
    /// `encryptionKeyThumbprint`.
    pub encryption_key_thumbprint: Option<String>,
    /// `algorithm`.
    pub algorithm: Option<String>,
    /// Another one after each write.
    pub etag: String,
}

const NAME: &str = "default";

impl Resource for VaultSettingRecord {
    const KIND: ResourceKind = ResourceKind::VaultSetting;

    fn name(&self) -> String {
        NAME.to_owned()
    }
}

impl Control {
    /// The vault's settings.
    pub async fn vault_settings(&self) -> Result<VaultSettingRecord, ControlError> {
        Ok(self.db.resource(NAME).await?.unwrap_or_default())
    }

    /// Changes the vault's settings and answers them.
    pub async fn change_vault_settings(
        &self,
        change: impl FnOnce(&mut VaultSettingRecord) + Send,
    ) -> Result<VaultSettingRecord, ControlError> {
        let mut transaction = self.db.begin().await?;
        let mut settings: VaultSettingRecord = transaction.resource(NAME).await?.unwrap_or_default();
        change(&mut settings);
        transaction.put_resource(&settings).await?;
        transaction.commit().await?;
        Ok(settings)
    }
}
