//! The vault: what a control plane serves, and part of every ARM path. The server's first vault also keeps the list of the
//! others that the server hosts, each of which has a control plane of its own.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{FabricRecord, ProviderRecord};
use crate::{
    Control, ControlError,
    db::{Resource, ResourceKind},
};

/// The vault's identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VaultRecord {
    /// Azure subscription id, made up at `server init`; the same for all vaults of a server.
    pub subscription: String,
    /// Resource group.
    pub resource_group: String,
    /// Name.
    pub name: String,
    /// Location as shown.
    pub location: String,
    /// What clients have written on it.
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    /// Changes with every change; `None` = never changed.
    #[serde(default)]
    pub etag: Option<Uuid>,
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

/// A further vault of the server. Who it is stands in its own database.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostedVaultRecord {
    /// The name of its directories.
    pub id: Uuid,
    /// It is gone for clients; its directories are being removed.
    pub is_deleting: bool,
}

impl Resource for HostedVaultRecord {
    const KIND: ResourceKind = ResourceKind::HostedVault;

    fn name(&self) -> String {
        self.id.to_string()
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
        let mut transaction = self.db.begin().await?;
        let mut present: Vec<VaultRecord> = transaction.resources().await?;
        if let Some(present) = present.pop() {
            return Ok(present);
        }
        transaction.put_resource(&vault).await?;
        transaction.commit().await?;
        Ok(vault)
    }

    /// Writes other tags on the vault.
    pub async fn tag_vault(&self, tags: BTreeMap<String, String>) -> Result<VaultRecord, ControlError> {
        let mut vault = self.vault().await?;
        if vault.tags != tags {
            vault.tags = tags;
            vault.etag = Some(Uuid::new_v4());
            let mut transaction = self.db.begin().await?;
            transaction.put_resource(&vault).await?;
            transaction.commit().await?;
        }
        Ok(vault)
    }

    /// What would be lost with the vault, for people; empty = nothing.
    pub async fn vault_contents(&self) -> Result<Vec<String>, ControlError> {
        let mut contents = Vec::new();
        contents.extend(self.db.items().await?.iter().map(|item| format!("replicated item '{}'", item.name)));
        let hosts: Vec<ProviderRecord> = self.db.resources().await?;
        contents.extend(hosts.iter().map(|host| format!("registered host '{}'", host.name)));
        let fabrics: Vec<FabricRecord> = self.db.resources().await?;
        contents.extend(fabrics.iter().map(|fabric| format!("fabric '{}'", fabric.name)));
        Ok(contents)
    }

    /// The further vaults of the server; only its first vault knows them.
    pub async fn hosted_vaults(&self) -> Result<Vec<HostedVaultRecord>, ControlError> {
        Ok(self.db.resources().await?)
    }

    /// Adds a vault to them, or writes down that it is being removed.
    pub async fn put_hosted_vault(&self, vault: &HostedVaultRecord) -> Result<(), ControlError> {
        let mut transaction = self.db.begin().await?;
        transaction.put_resource(vault).await?;
        Ok(transaction.commit().await?)
    }

    /// Forgets one whose directories are gone.
    pub async fn forget_hosted_vault(&self, id: Uuid) -> Result<(), ControlError> {
        let mut transaction = self.db.begin().await?;
        transaction.remove_resource::<HostedVaultRecord>(&id.to_string()).await?;
        Ok(transaction.commit().await?)
    }
}
