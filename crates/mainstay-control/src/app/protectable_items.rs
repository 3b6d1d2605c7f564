//! Protectable items: the VMs that were discovered in a fabric.

use std::collections::{HashMap, HashSet};

use mainstay_model::{ItemId, ProviderId, VmId};
use mainstay_provider::{Disk, FindingSeverity, VirtualMachine};

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
    /// Disks without which it can be protected only: their keys, and why.
    pub obstacles: Vec<(String, String)>,
}

/// Why a disk cannot be replicated, and what to do; `None` if it can be. For listings, and for whoever tries it all the same.
pub(crate) fn disk_obstacle(vm: &VirtualMachine, disk: &Disk) -> Option<(String, String)> {
    if disk.is_replicable {
        return None;
    }
    let key = &disk.key;
    let (why, remedy) = match vm.obstacle(disk) {
        Some(finding) => (finding.message.clone(), finding.remedy.clone()),
        None => (
            format!("disk {key} cannot be replicated"),
            "Convert it to a raw or qcow2 image, or leave it out.".to_owned(),
        ),
    };
    let how = format!(
        "To leave it out: `mainstay protect … --exclude-disk {key}`, or `disksToInclude` without it."
    );
    Some((why, format!("{remedy} {how}")))
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
                    .map(|finding| format!("{}. {}", finding.message, finding.remedy))
                    .collect();
                let obstacle = |disk: &Disk| {
                    disk_obstacle(vm, disk)
                        .map(|(why, remedy)| (disk.key.clone(), format!("{why}. {remedy}")))
                };
                let obstacles = vm.disks.iter().filter_map(obstacle).collect();
                found.push(ProtectableItem {
                    vm: vm.clone(),
                    provider: provider.id,
                    fabric: fabric.name.clone(),
                    item: protected.get(&vm.id).copied(),
                    why_not,
                    obstacles,
                });
            }
        }
        found.sort_by(|a, b| a.vm.name.cmp(&b.vm.name));
        Ok(found)
    }
}
