//! Network mappings: in which network of a recovery site the VMs of a network continue, unless somebody chose otherwise.

use mainstay_model::ConfigurationChange;
use mainstay_provider::NicPlan;
use serde::{Deserialize, Serialize};

use super::{Requester, check_name};
use crate::{
    Control, ControlError,
    db::{ConfigurationJob, ItemRecord, Resource, ResourceKind},
};

/// A mapping of a network to one of a recovery fabric.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkMappingRecord {
    /// Its name, unique among the network's.
    pub name: String,
    /// The protected fabric.
    pub fabric: String,
    /// The network there.
    pub network: String,
    /// The recovery fabric.
    pub recovery_fabric: String,
    /// The network there.
    pub recovery_network: String,
}

fn key(fabric: &str, network: &str, name: &str) -> String {
    format!("{fabric}/{network}/{name}")
}

impl Resource for NetworkMappingRecord {
    const KIND: ResourceKind = ResourceKind::NetworkMapping;

    fn name(&self) -> String {
        key(&self.fabric, &self.network, &self.name)
    }
}

/// The network that a mapping leads to from a fabric's network to a recovery fabric.
pub(crate) fn mapped<'a>(
    mappings: &'a [NetworkMappingRecord],
    fabric: &str,
    recovery_fabric: &str,
    network: &str,
) -> Option<&'a str> {
    let found = mappings.iter().find(|mapping| {
        mapping.fabric.eq_ignore_ascii_case(fabric)
            && mapping.recovery_fabric.eq_ignore_ascii_case(recovery_fabric)
            && mapping.network == network
    });
    found.map(|mapping| mapping.recovery_network.as_str())
}

impl Control {
    /// The networks of a fabric as last discovered.
    pub async fn network_names(&self, fabric: &str) -> Result<Vec<String>, ControlError> {
        let providers = self.providers().await?;
        let mut names: Vec<_> = providers
            .iter()
            .filter(|provider| provider.fabric.eq_ignore_ascii_case(fabric))
            .filter_map(|provider| provider.discovery.as_ref())
            .flat_map(|discovery| &discovery.inventory.networks)
            .map(|network| network.name.clone())
            .collect();
        names.sort();
        names.dedup();
        Ok(names)
    }

    /// Makes or changes a mapping. Without a recovery fabric the only other fabric is meant.
    pub async fn put_network_mapping(
        &self,
        fabric: &str,
        network: &str,
        name: &str,
        recovery: (Option<&str>, &str),
        by: Requester,
    ) -> Result<ConfigurationJob, ControlError> {
        check_name("network mapping", name)?;
        let fabric = self.fabric(fabric).await?;
        let known = self.network_names(&fabric.name).await?;
        let found = known.iter().find(|known| known.eq_ignore_ascii_case(network));
        let network = found.ok_or_else(|| ControlError::not_found("network", network))?.clone();
        let recovery_fabric = self.recovery_fabric(&fabric, recovery.0).await?;
        let known = self.network_names(&recovery_fabric.name).await?;
        let Some(recovery_network) = known.iter().find(|known| known.eq_ignore_ascii_case(recovery.1)) else {
            return Err(ControlError::invalid(
                "NetworkNotFound",
                format!("fabric '{}' has no network '{}'", recovery_fabric.name, recovery.1),
                format!("Its networks are: {}.", known.join(", ")),
            ));
        };
        let record = NetworkMappingRecord {
            name: name.to_owned(),
            fabric: fabric.name,
            network,
            recovery_fabric: recovery_fabric.name,
            recovery_network: recovery_network.clone(),
        };
        let job = self.configuration_job(ConfigurationChange::MapNetwork, &record.network, by);
        let mut transaction = self.db.begin().await?;
        let others = transaction.resources::<NetworkMappingRecord>().await?;
        if let Some(other) = others.iter().find(|other| {
            Resource::name(*other).to_lowercase() != Resource::name(&record).to_lowercase()
                && other.fabric == record.fabric
                && other.network == record.network
                && other.recovery_fabric == record.recovery_fabric
        }) {
            return Err(ControlError::Conflict(format!(
                "network '{}' is mapped to fabric '{}' already, by the mapping '{}'",
                record.network, record.recovery_fabric, other.name
            )));
        }
        transaction.put_resource(&record).await?;
        transaction.put_configuration_job(&job).await?;
        transaction.commit().await?;
        Ok(job)
    }

    /// All mappings.
    pub async fn network_mappings(&self) -> Result<Vec<NetworkMappingRecord>, ControlError> {
        Ok(self.db.resources().await?)
    }

    /// A mapping by fabric, network and name.
    pub async fn network_mapping(
        &self,
        fabric: &str,
        network: &str,
        name: &str,
    ) -> Result<NetworkMappingRecord, ControlError> {
        let found = self.db.resource(&key(fabric, network, name)).await?;
        found.ok_or_else(|| ControlError::not_found("network mapping", name))
    }

    /// Removes a mapping. What items have chosen by it they keep.
    pub async fn remove_network_mapping(
        &self,
        fabric: &str,
        network: &str,
        name: &str,
        by: Requester,
    ) -> Result<ConfigurationJob, ControlError> {
        let mapping = self.network_mapping(fabric, network, name).await?;
        let job = self.configuration_job(ConfigurationChange::UnmapNetwork, &mapping.network, by);
        let mut transaction = self.db.begin().await?;
        transaction.remove_resource::<NetworkMappingRecord>(&Resource::name(&mapping)).await?;
        transaction.put_configuration_job(&job).await?;
        transaction.commit().await?;
        Ok(job)
    }

    /// What becomes of an item's adapters at the recovery site: each with the network that was chosen for it, else with the
    /// item's, else with the one that its network at home is mapped to.
    pub(crate) async fn planned_nics(&self, item: &ItemRecord) -> Result<Vec<NicPlan>, ControlError> {
        let mut plans = item.target.nics.clone();
        for plan in &mut plans {
            if plan.network.is_none() {
                plan.network.clone_from(&item.target.network);
            }
        }
        if plans.iter().all(|plan| plan.network.is_some()) {
            return Ok(plans);
        }
        let mappings = self.network_mappings().await?;
        // As last discovered: the protected site may be lost.
        let home = self.provider(item.primary_provider).await?.discovery;
        let nics = home
            .and_then(|home| home.inventory.vms.into_iter().find(|vm| vm.id == item.vm))
            .map_or_else(Vec::new, |vm| vm.nics);
        for plan in plans.iter_mut().filter(|plan| plan.network.is_none()) {
            let nic = nics.iter().find(|nic| nic.mac.eq_ignore_ascii_case(&plan.mac));
            plan.network = nic
                .and_then(|nic| mapped(&mappings, &item.fabric, &item.recovery_fabric, &nic.network))
                .map(str::to_owned);
        }
        Ok(plans)
    }
}
