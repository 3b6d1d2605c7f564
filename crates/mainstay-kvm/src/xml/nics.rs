//! Rewriting what a domain's network adapters are attached to.

use mainstay_model::VmId;
use mainstay_provider::{MacPolicy, NicPlan, SiteError};
use sha2::{Digest as _, Sha256};
use xmltree::Element;

use super::tree::{attribute, element, push, remove, retain};
use crate::error::refused;

/// What becomes of the adapters.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NicRules<'a> {
    pub(crate) vm: VmId,
    pub(crate) plans: &'a [NicPlan],
    /// Where adapters of a test copy go for which no network is named.
    pub(crate) isolated: Option<&'a str>,
}

/// Rewrites the adapters; those without a plan go.
pub(super) fn rewrite(devices: &mut Element, rules: &NicRules<'_>) -> Result<(), SiteError> {
    let mut result = Ok(());
    retain(devices, |device| {
        if device.name != "interface" {
            return true;
        }
        let mac = attribute(device, "mac", "address").unwrap_or_default().to_lowercase();
        let Some(plan) = rules.plans.iter().find(|plan| plan.mac.eq_ignore_ascii_case(&mac)) else {
            return false;
        };
        if result.is_ok() {
            result = attach(device, plan.network.as_deref().or(rules.isolated));
        }
        let mac = planned_mac(rules.vm, plan);
        remove(device, &["mac"]);
        push(device, element("mac", &[("address", &mac)]));
        true
    });
    result
}

/// Attaches an adapter to a network, by the names that [`super::read`] gives them. `None`: to nothing.
fn attach(device: &mut Element, network: Option<&str>) -> Result<(), SiteError> {
    // What belongs to the old attachment: its host's names, filters and tunnels.
    let old = [
        "source",
        "target",
        "virtualport",
        "filterref",
        "bandwidth",
        "vlan",
        "link",
        "backend",
        "portForward",
        "ip",
    ];
    remove(device, &old);
    device.attributes.remove("trustGuestRxFilters");
    let (kind, source) = match network {
        None => {
            // There is no adapter without a network in QEMU; this one reaches nothing, its cable being out.
            push(device, element("link", &[("state", "down")]));
            ("user", None)
        }
        Some("user") => ("user", None),
        Some(name) => match name.split_once(':') {
            Some(("bridge", bridge)) => ("bridge", Some(element("source", &[("bridge", bridge)]))),
            Some(("direct", parent)) => {
                ("direct", Some(element("source", &[("dev", parent), ("mode", "bridge")])))
            }
            Some(("mcast", group)) => {
                let (address, port) = group.split_once(':').ok_or_else(|| no_network(name))?;
                ("mcast", Some(element("source", &[("address", address), ("port", port)])))
            }
            Some(_) => return Err(no_network(name)),
            None => ("network", Some(element("source", &[("network", name)]))),
        },
    };
    device.attributes.insert("type".to_owned(), kind.to_owned());
    if let Some(source) = source {
        push(device, source);
    }
    Ok(())
}

fn no_network(name: &str) -> SiteError {
    refused(format!("'{name}' names no network of this host"), "Choose one of the networks in the inventory.")
}

/// The MAC address that an adapter of a recovery VM has.
pub(crate) fn planned_mac(vm: VmId, plan: &NicPlan) -> String {
    let mac = plan.mac.to_lowercase();
    match plan.mac_policy {
        MacPolicy::Keep => mac,
        MacPolicy::Generate => generated_mac(vm, &mac),
    }
}

/// An address in QEMU's range that is the same every time.
fn generated_mac(vm: VmId, mac: &str) -> String {
    let digest = Sha256::new().chain_update(vm.0.as_bytes()).chain_update(mac).finalize();
    format!("52:54:00:{:02x}:{:02x}:{:02x}", digest[0], digest[1], digest[2])
}
