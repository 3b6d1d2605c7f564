//! Static addresses by DHCP reservation, on networks where libvirt itself hands addresses out. The guest then needs no
//! agent to get its address, keeps it over restarts, and still says itself that it has it.

use std::net::Ipv4Addr;

use mainstay_model::VmId;
use mainstay_provider::{NicPlan, SiteError};
use roxmltree::{Document, Node};
use serde::{Deserialize, Serialize};

use crate::error::{While as _, failed, refused};
use crate::libvirt::Libvirt;
use crate::xml::planned_mac;

/// A reservation made for a recovery VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reservation {
    network: String,
    mac: String,
    address: Ipv4Addr,
}

/// What stands in the way of a reservation, if anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    /// The network hands out no addresses: the guest agent must set it.
    NoDhcp,
    /// It is there already.
    Present,
    /// It must be made.
    Missing,
}

/// Decides, from the network's description.
fn plan(xml: &str, wanted: &Reservation) -> Result<Plan, SiteError> {
    let document = Document::parse(xml)
        .map_err(|error| failed(format!("reading network {}: {error}", wanted.network)))?;
    let is_named = |name: &'static str| move |node: &Node<'_, '_>| node.has_tag_name(name);
    let ranges: Vec<_> = document
        .root_element()
        .children()
        .filter(is_named("ip"))
        .filter_map(|ip| Some((ip, ip.children().find(is_named("dhcp"))?)))
        .filter(|(ip, _)| ip.attribute("family").is_none_or(|family| family == "ipv4"))
        .collect();
    if ranges.is_empty() {
        return Ok(Plan::NoDhcp);
    }
    let address = wanted.address;
    let holds =
        |ip: &Node<'_, '_>| subnet(ip).is_some_and(|(own, mask)| (own ^ address.to_bits()) & mask == 0);
    let Some((ip, dhcp)) = ranges.iter().find(|(ip, _)| holds(ip)) else {
        return Err(refused(
            format!("the address {address} is not one of network {}", wanted.network),
            "Choose an address of the network, or another network.",
        ));
    };
    let taken = |by: &str| {
        refused(
            format!("the address {address} is taken on network {} by {by}", wanted.network),
            "Choose another address, or free this one.",
        )
    };
    if ip.attribute("address") == Some(address.to_string().as_str()) {
        return Err(taken("the network itself"));
    }
    for host in dhcp.children().filter(is_named("host")) {
        let mac = host.attribute("mac").unwrap_or_default();
        let is_ours = mac.eq_ignore_ascii_case(&wanted.mac);
        let has_address = host.attribute("ip").is_some_and(|ip| ip == address.to_string());
        match (is_ours, has_address) {
            (true, true) => return Ok(Plan::Present),
            (false, true) => return Err(taken(&format!("a reservation for {mac}"))),
            (true, false) => {
                let present = host.attribute("ip").unwrap_or("another address");
                return Err(refused(
                    format!("network {} reserves {present} for adapter {mac} already", wanted.network),
                    "Use that address, or remove the reservation.",
                ));
            }
            (false, false) => {}
        }
    }
    Ok(Plan::Missing)
}

/// The network's own address and its mask.
fn subnet(ip: &Node<'_, '_>) -> Option<(u32, u32)> {
    let own: Ipv4Addr = ip.attribute("address")?.parse().ok()?;
    let mask = match (ip.attribute("netmask"), ip.attribute("prefix")) {
        (Some(mask), _) => mask.parse::<Ipv4Addr>().ok()?.to_bits(),
        (None, prefix) => {
            let bits: u32 = prefix?.parse().ok().filter(|bits| *bits <= 32)?;
            u32::MAX.checked_shl(32 - bits).unwrap_or(0)
        }
    };
    Some((own.to_bits(), mask))
}

/// The reservations that a recovery VM's adapters need, on networks of libvirt's. An address that is taken is an error.
pub(crate) async fn needed(
    libvirt: &Libvirt,
    vm: VmId,
    nics: &[NicPlan],
) -> Result<Vec<Reservation>, SiteError> {
    if nics.iter().all(|nic| nic.address.is_none() || nic.network.is_none()) {
        return Ok(Vec::new());
    }
    let networks = libvirt.networks().await?;
    let mut found = Vec::new();
    for nic in nics {
        let (Some(address), Some(network)) = (&nic.address, &nic.network) else { continue };
        let Some((_, xml)) = networks.iter().find(|(name, _)| name == network) else { continue };
        let bare = address.split('/').next().unwrap_or(address);
        let address = bare.parse().map_err(|_invalid| {
            refused(format!("'{address}' is not an IPv4 address with a prefix"), "Write it as 10.0.0.7/24.")
        })?;
        let wanted = Reservation { network: network.clone(), mac: planned_mac(vm, nic), address };
        if plan(xml, &wanted)? != Plan::NoDhcp {
            found.push(wanted);
        }
    }
    Ok(found)
}

/// Makes reservations; those that are there stay.
pub(crate) async fn make(libvirt: &Libvirt, wanted: &[Reservation]) -> Result<(), SiteError> {
    for reservation in wanted {
        let networks = libvirt.networks().await?;
        let xml = networks.iter().find(|(name, _)| *name == reservation.network).map(|(_, xml)| xml);
        if xml.is_some_and(|xml| plan(xml, reservation).is_ok_and(|plan| plan == Plan::Missing)) {
            let doing = format!("reserving {} on network {}", reservation.address, reservation.network);
            libvirt.change_reservation(&reservation.network, reservation.xml(), true).await.doing(&doing)?;
        }
    }
    Ok(())
}

/// Removes reservations; those that are gone, or went with their network, are no error.
pub(crate) async fn remove(libvirt: &Libvirt, made: &[Reservation]) -> Result<(), SiteError> {
    for reservation in made {
        let networks = libvirt.networks().await?;
        let xml = networks.iter().find(|(name, _)| *name == reservation.network).map(|(_, xml)| xml);
        if xml.is_some_and(|xml| plan(xml, reservation).is_ok_and(|plan| plan == Plan::Present)) {
            let doing = format!("freeing {} on network {}", reservation.address, reservation.network);
            libvirt.change_reservation(&reservation.network, reservation.xml(), false).await.doing(&doing)?;
        }
    }
    Ok(())
}

impl Reservation {
    fn xml(&self) -> String {
        format!("<host mac='{}' ip='{}'/>", self.mac, self.address)
    }

    /// Whether it is for this adapter and address (`ADDRESS/PREFIX`).
    pub(crate) fn is_for(&self, mac: &str, address: &str) -> bool {
        self.mac.eq_ignore_ascii_case(mac)
            && address.split('/').next().is_some_and(|bare| bare == self.address.to_string())
    }
}

#[cfg(test)]
mod tests {
    use mainstay_provider::MacPolicy;

    use super::*;

    fn nic(network: &str, address: &str) -> NicPlan {
        NicPlan {
            mac: "52:54:00:00:00:01".to_owned(),
            network: Some(network.to_owned()),
            mac_policy: MacPolicy::Keep,
            address: Some(address.to_owned()),
        }
    }

    #[test]
    fn a_taken_or_foreign_address_is_refused_with_the_reason() {
        let xml = "<network><ip address='10.0.0.1' prefix='24'><dhcp><range start='10.0.0.2' end='10.0.0.9'/>
            <host mac='52:54:00:00:00:AA' ip='10.0.0.5'/></dhcp></ip></network>";
        let plan_of = |xml: &str, mac: &str, address: [u8; 4]| {
            let wanted =
                Reservation { network: "lan".to_owned(), mac: mac.to_owned(), address: address.into() };
            plan(xml, &wanted).map_err(|error| error.message)
        };
        assert_eq!(plan_of(xml, "52:54:00:00:00:01", [10, 0, 0, 7]), Ok(Plan::Missing));
        assert_eq!(plan_of(xml, "52:54:00:00:00:aa", [10, 0, 0, 5]), Ok(Plan::Present));
        for (mac, address, word) in [
            ("52:54:00:00:00:01", [10, 0, 0, 5], "52:54:00:00:00:AA"),
            ("52:54:00:00:00:01", [10, 0, 0, 1], "the network itself"),
            ("52:54:00:00:00:01", [10, 0, 1, 7], "is not one of network lan"),
            ("52:54:00:00:00:aa", [10, 0, 0, 7], "reserves 10.0.0.5"),
        ] {
            let error = plan_of(xml, mac, address).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        let silent = "<network><ip address='10.0.0.1' netmask='255.255.255.0'/></network>";
        assert_eq!(plan_of(silent, "52:54:00:00:00:01", [10, 0, 0, 7]), Ok(Plan::NoDhcp));
    }

    /// On libvirt's own test driver, which needs no privileges and keeps networks in memory.
    #[tokio::test]
    async fn reservations_are_made_once_and_removed() {
        let libvirt = Libvirt::new("test:///default");
        let vm = VmId(uuid::Uuid::new_v4());
        let nics = [nic("default", "192.168.122.77/24"), nic("mcast:230.0.0.1:5", "10.0.0.1/24")];
        let wanted = needed(&libvirt, vm, &nics).await.unwrap();
        assert_eq!(wanted.len(), 1);
        let is_there = async || libvirt.networks().await.unwrap()[0].1.contains("192.168.122.77");
        make(&libvirt, &wanted).await.unwrap();
        assert!(is_there().await);
        make(&libvirt, &wanted).await.unwrap();
        assert_eq!(needed(&libvirt, vm, &nics).await.unwrap(), wanted);
        // Another adapter does not get the address.
        let other = NicPlan { mac: "52:54:00:00:00:02".to_owned(), ..nics[0].clone() };
        let error = needed(&libvirt, vm, &[other]).await.unwrap_err();
        assert!(error.message.contains("52:54:00:00:00:01"), "{error}");
        assert!(wanted[0].is_for("52:54:00:00:00:01", "192.168.122.77/24"));
        remove(&libvirt, &wanted).await.unwrap();
        assert!(!is_there().await);
        remove(&libvirt, &wanted).await.unwrap();
    }
}
