//! Which machine is meant. A guest can be renamed by its administrator, recovered under another name and exist in several
//! copies; what they all have in common is the file of acknowledgements that the guest was made with.

use anyhow::{Context as _, Result};
use mainstay_api::{
    arm::{ItemProperties, Resource},
    v1::ItemStatus,
};
use mainstay_kvm::{libvirt::XmlKind, recovery_mark};
use mainstay_model::VmId;
use mainstay_provider::PowerState;

use crate::{Lab, LedgerCopy, NotThere, Site, ledger};

/// A machine that is a copy of some guest.
struct Copy<'a> {
    site: &'a Site,
    vm: VmId,
    name: String,
    /// The guest it is a copy of: its file of acknowledgements.
    guest: String,
    /// The item, if Mainstay made it.
    item: Option<String>,
    is_test: bool,
}

impl Lab {
    /// A copy of a guest that is known by the name it was made with, the name it has now at either site, or its replicated
    /// item's name or id. The active copy is the one that runs, else the one that is there; at the recovery site rather
    /// than at home while both run, because then the one at home is about to be stopped.
    pub async fn vm(&self, name: &str, copy: LedgerCopy) -> Result<(&Site, VmId)> {
        let (copies, unheard) = self.copies().await;
        let (guest, unheard) = match self.guest_by_name(&copies, name) {
            Some(guest) => (Some(guest), unheard),
            None => match self.guest_by_item(&copies, name).await {
                Ok(guest) => (guest, unheard),
                Err(error) => (None, Some(error.context("the server does not answer"))),
            },
        };
        let mut present = None;
        for found in copies.iter().filter(|found| Some(&found.guest) == guest.as_ref()) {
            if found.is_test != (copy == LedgerCopy::Test) {
                continue;
            }
            if found.site.libvirt().state(found.vm).await?.power != PowerState::Off {
                return Ok((found.site, found.vm));
            }
            present = Some((found.site, found.vm));
        }
        // What is off at a site that answers says nothing about one that does not.
        if let Some(error) = unheard {
            return Err(error);
        }
        if guest.is_none() {
            return Err(NotThere(format!("the lab has no VM '{name}'")).into());
        }
        present.with_context(|| match copy {
            LedgerCopy::Active => format!("there is no active copy of '{name}'"),
            LedgerCopy::Test => format!("there is no test copy of '{name}'"),
        })
    }

    /// The machine that has a name at a site, or is the copy there of the guest of that name.
    pub(crate) async fn vm_at(&self, site: &Site, name: &str) -> Result<VmId> {
        if let Some(vm) = site.libvirt().find_by_name(name).await? {
            return Ok(vm);
        }
        let (copies, _) = self.copies().await;
        let guest = self.guest_by_name(&copies, name);
        let found = copies
            .iter()
            .find(|found| found.site.name() == site.name() && Some(&found.guest) == guest.as_ref());
        found
            .map(|found| found.vm)
            .ok_or_else(|| NotThere(format!("site {} has no VM '{name}'", site.name())).into())
    }

    /// All copies, the recovery site's first, and why a site could not be asked.
    async fn copies(&self) -> (Vec<Copy<'_>>, Option<anyhow::Error>) {
        let (mut copies, mut unheard) = (Vec::new(), None);
        for site in [self.recovery(), self.home()] {
            match copies_at(site).await {
                Ok(found) => copies.extend(found),
                Err(error) => {
                    unheard = Some(error.context(format!("site {} does not answer", site.name())));
                }
            }
        }
        (copies, unheard)
    }

    fn guest_by_name(&self, copies: &[Copy<'_>], name: &str) -> Option<String> {
        let named = |site: &Site| {
            let mut at_site = copies.iter().filter(|copy| copy.site.name() == site.name());
            at_site.find(|copy| copy.name == name).map(|copy| copy.guest.clone())
        };
        let made = || self.file().vms.iter().find(|vm| vm.name == name).map(|vm| vm.name.clone());
        named(self.home()).or_else(made).or_else(|| named(self.recovery()))
    }

    /// The guest of a replicated item.
    async fn guest_by_item(&self, copies: &[Copy<'_>], name: &str) -> Result<Option<String>> {
        let client = self.client()?;
        let path = format!("{}/replicationProtectedItems", self.vault_path());
        let items: Vec<Resource<ItemProperties>> = client.list(&path).await?;
        let item = items.into_iter().find(|item| {
            item.id.eq_ignore_ascii_case(name)
                || item.name.eq_ignore_ascii_case(name)
                || item.properties.friendly_name == name
                || item.properties.provider_specific_details.recovery_azure_vm_name == name
        });
        let Some(item) = item else { return Ok(None) };
        let status: ItemStatus = client.get(&format!("/api/v1/items/{}", item.name)).await?;
        let is_of_item =
            |copy: &&Copy<'_>| copy.vm.to_string() == status.vm || copy.item.as_ref() == Some(&status.id);
        Ok(copies.iter().find(is_of_item).map(|copy| copy.guest.clone()))
    }
}

async fn copies_at(site: &Site) -> Result<Vec<Copy<'_>>> {
    let mut copies = Vec::new();
    for vm in site.libvirt().domains().await? {
        let xml = site.libvirt().xml(vm, XmlKind::Live).await?;
        // A machine that is not one of the lab's guests acknowledges nothing.
        let Some(guest) = ledger::acknowledgements_in(site, &xml) else { continue };
        let mark = recovery_mark(&xml)?;
        copies.push(Copy {
            site,
            vm,
            name: site.libvirt().name(vm).await?,
            guest,
            item: mark.map(|mark| mark.item.to_string()),
            is_test: mark.is_some_and(|mark| mark.is_test),
        });
    }
    Ok(copies)
}
