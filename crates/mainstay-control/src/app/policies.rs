//! Replication policies as named resources.

use std::collections::HashMap;

use mainstay_model::{ConfigurationChange, ReplicationPolicy};
use serde::{Deserialize, Serialize};

use super::{Requester, check_name};
use crate::{
    Control, ControlError,
    db::{ConfigurationJob, Resource, ResourceKind},
};

/// A named policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyRecord {
    /// Its name.
    pub name: String,
    /// What it says.
    pub policy: ReplicationPolicy,
}

impl Resource for PolicyRecord {
    const KIND: ResourceKind = ResourceKind::Policy;

    fn name(&self) -> String {
        self.name.clone()
    }
}

impl Control {
    /// Makes or changes a policy; items that use it follow at their next cycle.
    pub async fn put_policy(
        &self,
        name: &str,
        policy: ReplicationPolicy,
        by: Requester,
    ) -> Result<ConfigurationJob, ControlError> {
        check_name("policy", name)?;
        policy.validate()?;
        let record = PolicyRecord { name: name.to_owned(), policy };
        let mut transaction = self.db.begin().await?;
        let change = match transaction.resource::<PolicyRecord>(name).await? {
            Some(_) => ConfigurationChange::UpdatePolicy,
            None => ConfigurationChange::CreatePolicy,
        };
        let job = self.configuration_job(change, name, by);
        transaction.put_resource(&record).await?;
        transaction.put_configuration_job(&job).await?;
        transaction.commit().await?;
        self.changed.notify_waiters();
        Ok(job)
    }

    /// A policy by name.
    pub async fn policy(&self, name: &str) -> Result<PolicyRecord, ControlError> {
        self.db.resource(name).await?.ok_or_else(|| ControlError::not_found("policy", name))
    }

    /// All policies.
    pub async fn policies(&self) -> Result<Vec<PolicyRecord>, ControlError> {
        Ok(self.db.resources().await?)
    }

    /// What all policies say, by their names in lower case.
    pub(crate) async fn policies_by_name(&self) -> Result<HashMap<String, ReplicationPolicy>, ControlError> {
        let policies = self.policies().await?.into_iter();
        Ok(policies.map(|record| (record.name.to_lowercase(), record.policy)).collect())
    }

    /// Removes a policy that nothing uses.
    pub async fn remove_policy(&self, name: &str, by: Requester) -> Result<ConfigurationJob, ControlError> {
        self.policy(name).await?;
        if let Some(item) = self.db.items().await?.iter().find(|item| item.policy.eq_ignore_ascii_case(name))
        {
            return Err(ControlError::Conflict(format!(
                "policy '{name}' is used by the replicated item '{}'",
                item.name
            )));
        }
        let mappings = self.container_mappings().await?;
        let mut transaction = self.db.begin().await?;
        for mapping in mappings {
            if mapping.policy.eq_ignore_ascii_case(name) {
                transaction
                    .remove_resource::<super::ContainerMappingRecord>(&Resource::name(&mapping))
                    .await?;
            }
        }
        transaction.remove_resource::<PolicyRecord>(name).await?;
        let job = self.configuration_job(ConfigurationChange::DeletePolicy, name, by);
        transaction.put_configuration_job(&job).await?;
        transaction.commit().await?;
        Ok(job)
    }
}
