//! Changing what the recovery VM shall be.

use async_trait::async_trait;
use mainstay_provider::Discover;
use serde::{Deserialize, Serialize};

use crate::{
    db::{JobError, TargetRecord},
    jobs::{Done, Patience, Step, StepAction, StepContext},
};

/// The new target, whole.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UpdateParams {
    /// What the recovery VM shall be from now on.
    pub target: TargetRecord,
}

pub(super) fn steps() -> Vec<Step> {
    vec![Step::new(
        "UpdateVmPropertiesTask",
        "VmUpdateProperties",
        "Updating the virtual machine's properties",
        UpdateTarget,
    )]
}

struct UpdateTarget;

#[async_trait]
impl StepAction for UpdateTarget {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let UpdateParams { target } = step.params()?;
        let named: Vec<_> = [&target.network, &target.test_network]
            .into_iter()
            .flatten()
            .chain(target.nics.iter().filter_map(|nic| nic.network.as_ref()))
            .collect();
        if !named.is_empty() {
            let site = step.call(item.recovery_provider, Discover {}, Patience::RESTART).await?;
            if let Some(unknown) = named
                .into_iter()
                .find(|name| !site.inventory.networks.iter().any(|network| network.name == **name))
            {
                let known: Vec<_> =
                    site.inventory.networks.iter().map(|network| network.name.as_str()).collect();
                return Err(JobError::new(
                    "NetworkNotFound",
                    format!("the recovery site has no network '{unknown}'"),
                    format!("Its networks are: {}.", known.join(", ")),
                ));
            }
        }
        Ok(Done::default().changing(move |item| item.target = target))
    }
}
