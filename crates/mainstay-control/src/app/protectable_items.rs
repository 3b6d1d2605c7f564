//! Protectable items: the VMs that were discovered in a fabric.

use std::collections::{HashMap, HashSet};

use mainstay_model::{ItemId, ProviderId, VmId};
use mainstay_provider::{FindingSeverity, VirtualMachine};

use crate::{Control, ControlError, db::ItemRecord};

/// A discovered VM.
#[derive(Clone, Debug, PartialEq)]
pub struct ProtectableItem {
    /// The VM.
    pub vm: VirtualMachine,
    /// The host's agent.
    pub provider: ProviderId,
    /// The fabric.
    pub fabric: String,
    /// The item that protects it, if any.
    pub item: Option<ItemId>,
    /// Why it cannot be protected; empty = it can.
    pub why_not: Vec<String>,
}

impl Control {
    /// The VMs of a fabric as last discovered. Recovery VMs and test copies of ours are not among them.
    pub async fn protectable_items(&self, fabric: &str) -> Result<Vec<ProtectableItem>, ControlError> {
        let fabric = self.fabric(fabric).await?;
        let items = self.db.items().await?;
        let copies = |item: &ItemRecord| [item.recovery_vm, item.test_vm].into_iter().flatten();
        let ours: HashSet<VmId> = items.iter().flat_map(|item| copies(item)).map(|copy| copy.vm).collect();
        let protected: HashMap<VmId, ItemId> = items.iter().map(|item| (item.vm, item.id)).collect();
        let mut found = Vec::new();
        for provider in self.providers().await?.iter() {
            if !provider.fabric.eq_ignore_ascii_case(&fabric.name) {
                continue;
            }
            let Some(discovery) = &provider.discovery else { continue };
            for vm in discovery.inventory.vms.iter().filter(|vm| !ours.contains(&vm.id)) {
                let why_not = vm
                    .findings
                    .iter()
                    .filter(|finding| finding.severity == FindingSeverity::Error)
                    .map(|finding| format!("{} {}", finding.message, finding.remedy))
                    .collect();
                found.push(ProtectableItem {
                    vm: vm.clone(),
                    provider: provider.id,
                    fabric: fabric.name.clone(),
                    item: protected.get(&vm.id).copied(),
                    why_not,
                });
            }
        }
        found.sort_by(|a, b| a.vm.name.cmp(&b.vm.name));
        Ok(found)
    }
}
