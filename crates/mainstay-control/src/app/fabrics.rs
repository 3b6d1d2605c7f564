//! Fabrics: the sites. Each has one protection container, named after it.

use mainstay_model::ConfigurationChange;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{ProviderRecord, Requester, check_name};
use crate::{
    Control, ControlError,
    db::{ConfigurationJob, Resource, ResourceKind},
};

/// A site.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FabricRecord {
    /// Its name.
    pub name: String,
    /// Its internal identifier.
    pub id: Uuid,
    /// When it was created, milliseconds since the Unix epoch.
    pub created_ms: i64,
}

impl FabricRecord {
    /// Name of its protection container, in the form that a Hyper-V site has it.
    pub fn container(&self) -> String {
        format!("cloud_{}", self.id)
    }
}

impl Resource for FabricRecord {
    const KIND: ResourceKind = ResourceKind::Fabric;

    fn name(&self) -> String {
        self.name.clone()
    }
}

impl Control {
    /// Makes a fabric, unless there is one of that name.
    pub async fn create_fabric(&self, name: &str, by: Requester) -> Result<ConfigurationJob, ControlError> {
        check_name("fabric", name)?;
        let mut transaction = self.db.begin().await?;
        if transaction.resource::<FabricRecord>(name).await?.is_none() {
            let fabric =
                FabricRecord { name: name.to_owned(), id: Uuid::new_v4(), created_ms: self.clock.now_ms() };
            transaction.put_resource(&fabric).await?;
        }
        let job = self.configuration_job(ConfigurationChange::CreateFabric, name, by);
        transaction.put_configuration_job(&job).await?;
        transaction.commit().await?;
        Ok(job)
    }

    /// A fabric by name.
    pub async fn fabric(&self, name: &str) -> Result<FabricRecord, ControlError> {
        self.db.resource(name).await?.ok_or_else(|| ControlError::not_found("fabric", name))
    }

    /// All fabrics.
    pub async fn fabrics(&self) -> Result<Vec<FabricRecord>, ControlError> {
        Ok(self.db.resources().await?)
    }

    /// Removes a fabric that nothing depends on.
    pub async fn remove_fabric(&self, name: &str, by: Requester) -> Result<ConfigurationJob, ControlError> {
        let fabric = self.fabric(name).await?;
        let is_named = |other: &str| other.eq_ignore_ascii_case(&fabric.name);
        if let Some(item) = self
            .db
            .items()
            .await?
            .iter()
            .find(|item| is_named(&item.fabric) || is_named(&item.recovery_fabric))
        {
            return Err(ControlError::Conflict(format!(
                "fabric '{name}' still has the replicated item '{}'",
                item.name
            )));
        }
        let providers: Vec<ProviderRecord> = self.db.resources().await?;
        if let Some(provider) = providers.iter().find(|provider| is_named(&provider.fabric)) {
            return Err(ControlError::Conflict(format!(
                "fabric '{name}' still has the registered host '{}'; remove it first",
                provider.name
            )));
        }
        let mappings = self.container_mappings().await?;
        let mut transaction = self.db.begin().await?;
        for mapping in mappings {
            if is_named(&mapping.fabric) || is_named(&mapping.recovery_fabric) {
                transaction
                    .remove_resource::<super::ContainerMappingRecord>(&Resource::name(&mapping))
                    .await?;
            }
        }
        for mapping in transaction.resources::<super::NetworkMappingRecord>().await? {
            if is_named(&mapping.fabric) || is_named(&mapping.recovery_fabric) {
                transaction.remove_resource::<super::NetworkMappingRecord>(&Resource::name(&mapping)).await?;
            }
        }
        transaction.remove_resource::<FabricRecord>(name).await?;
        let job = self.configuration_job(ConfigurationChange::DeleteFabric, name, by);
        transaction.put_configuration_job(&job).await?;
        transaction.commit().await?;
        Ok(job)
    }
}
