//! Container mappings: which policy protects the VMs of a fabric, and towards which fabric.

use mainstay_model::ConfigurationChange;
use serde::{Deserialize, Serialize};

use super::{FabricRecord, Requester, check_name};
use crate::{
    Control, ControlError,
    db::{ConfigurationJob, Resource, ResourceKind},
};

/// A mapping of a fabric's container to a recovery fabric under a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerMappingRecord {
    /// Its name, unique in its fabric.
    pub name: String,
    /// The protected fabric.
    pub fabric: String,
    /// The recovery fabric.
    pub recovery_fabric: String,
    /// The policy.
    pub policy: String,
}

impl Resource for ContainerMappingRecord {
    const KIND: ResourceKind = ResourceKind::ContainerMapping;

    fn name(&self) -> String {
        format!("{}/{}", self.fabric, self.name)
    }
}

impl Control {
    /// Makes a mapping. Without a recovery fabric the only other fabric is meant.
    pub async fn put_container_mapping(
        &self,
        fabric: &str,
        name: &str,
        policy: &str,
        recovery_fabric: Option<&str>,
        by: Requester,
    ) -> Result<ConfigurationJob, ControlError> {
        check_name("container mapping", name)?;
        let fabric = self.fabric(fabric).await?;
        let policy = self.policy(policy).await?;
        let recovery_fabric = self.recovery_fabric(&fabric, recovery_fabric).await?;
        let record = ContainerMappingRecord {
            name: name.to_owned(),
            fabric: fabric.name,
            recovery_fabric: recovery_fabric.name,
            policy: policy.name,
        };
        let present: Option<ContainerMappingRecord> = self.db.resource(&Resource::name(&record)).await?;
        if let Some(present) = present.filter(|present| *present != record) {
            self.check_unused(&present).await?;
        }
        let job = self.configuration_job(ConfigurationChange::AssociatePolicy, &record.policy, by);
        let mut transaction = self.db.begin().await?;
        transaction.put_resource(&record).await?;
        transaction.put_configuration_job(&job).await?;
        transaction.commit().await?;
        Ok(job)
    }

    /// The recovery site that a mapping of a fabric means: the named one, or the only other one.
    pub(super) async fn recovery_fabric(
        &self,
        fabric: &FabricRecord,
        name: Option<&str>,
    ) -> Result<FabricRecord, ControlError> {
        let found = match name {
            Some(name) => self.fabric(name).await?,
            None => {
                let mut others = self.fabrics().await?;
                others.retain(|other| other.id != fabric.id);
                match others.len() {
                    1 => others.remove(0),
                    count => {
                        return Err(ControlError::invalid(
                            "RecoveryFabricAmbiguous",
                            format!("fabric '{}' could be recovered in {count} fabrics", fabric.name),
                            "Name the recovery fabric, or a resource of it by its id.",
                        ));
                    }
                }
            }
        };
        if found.id == fabric.id {
            return Err(ControlError::invalid(
                "SameFabric",
                format!("fabric '{}' cannot be its own recovery site", fabric.name),
                "Choose another fabric.",
            ));
        }
        Ok(found)
    }

    /// Refuses to touch a mapping that an item is replicated by.
    async fn check_unused(&self, mapping: &ContainerMappingRecord) -> Result<(), ControlError> {
        let items = self.db.items().await?;
        let user = items.iter().find(|item| {
            item.fabric.eq_ignore_ascii_case(&mapping.fabric)
                && item.recovery_fabric.eq_ignore_ascii_case(&mapping.recovery_fabric)
                && item.policy.eq_ignore_ascii_case(&mapping.policy)
        });
        if let Some(item) = user {
            return Err(ControlError::Conflict(format!(
                "mapping '{}' is used by the replicated item '{}'",
                mapping.name, item.name
            )));
        }
        Ok(())
    }

    /// All mappings.
    pub async fn container_mappings(&self) -> Result<Vec<ContainerMappingRecord>, ControlError> {
        Ok(self.db.resources().await?)
    }

    /// A mapping by fabric and name.
    pub async fn container_mapping(
        &self,
        fabric: &str,
        name: &str,
    ) -> Result<ContainerMappingRecord, ControlError> {
        let key = format!("{fabric}/{name}");
        self.db.resource(&key).await?.ok_or_else(|| ControlError::not_found("container mapping", key))
    }

    /// Removes a mapping that no item uses.
    pub async fn remove_container_mapping(
        &self,
        fabric: &str,
        name: &str,
        by: Requester,
    ) -> Result<ConfigurationJob, ControlError> {
        let mapping = self.container_mapping(fabric, name).await?;
        self.check_unused(&mapping).await?;
        let mut transaction = self.db.begin().await?;
        transaction.remove_resource::<ContainerMappingRecord>(&Resource::name(&mapping)).await?;
        let job = self.configuration_job(ConfigurationChange::DissociatePolicy, &mapping.policy, by);
        transaction.put_configuration_job(&job).await?;
        transaction.commit().await?;
        Ok(job)
    }
}
