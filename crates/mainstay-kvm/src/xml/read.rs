//! Reading a domain's description.

use std::path::PathBuf;

use mainstay_model::{ItemId, VmId};
use mainstay_provider::SiteError;
use roxmltree::{Document, Node};

use super::NAMESPACE;
use crate::error::failed;

/// What a domain's description says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Domain {
    pub(crate) id: VmId,
    pub(crate) name: String,
    pub(crate) vcpus: u32,
    pub(crate) memory_bytes: u64,
    pub(crate) is_uefi: bool,
    pub(crate) nvram: Option<PathBuf>,
    pub(crate) has_tpm: bool,
    /// The guest agent's channel.
    pub(crate) agent: Option<AgentChannel>,
    pub(crate) has_passthrough: bool,
    pub(crate) disks: Vec<DomainDisk>,
    pub(crate) nics: Vec<DomainNic>,
    /// Set on recovery VMs of ours.
    pub(crate) recovery: Option<RecoveryMark>,
}

/// The channel that a guest agent uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AgentChannel {
    /// Whether libvirt talks to an agent in the guest.
    pub(crate) is_connected: bool,
    /// QEMU's name of it; only while the VM runs.
    pub(crate) alias: Option<String>,
    /// Its socket on the host; only while the VM runs.
    pub(crate) socket: Option<PathBuf>,
}

/// What makes a domain a recovery VM of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecoveryMark {
    /// The replicated item it belongs to.
    pub item: ItemId,
    /// Whether it is a test copy.
    pub is_test: bool,
}

/// The mark in a domain's description; `None` if it is not a recovery VM of ours.
pub fn recovery_mark(xml: &str) -> Result<Option<RecoveryMark>, SiteError> {
    let document = Document::parse(xml).map_err(|error| failed(format!("reading libvirt's XML: {error}")))?;
    Ok(read_mark(document.root_element()))
}

/// A disk (not a CD or floppy).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DomainDisk {
    pub(crate) key: String,
    /// `file`, `block`, `network`, `volume`, …
    pub(crate) kind: String,
    pub(crate) path: Option<String>,
    pub(crate) format: String,
    pub(crate) is_read_only: bool,
    pub(crate) is_shared: bool,
    pub(crate) is_encrypted: bool,
    pub(crate) boot_order: Option<u32>,
    /// The number in its node's name; only while it runs.
    pub(crate) index: Option<u32>,
    /// The images beneath, nearest first.
    pub(crate) backing: Vec<BackingImage>,
}

/// An image beneath a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BackingImage {
    pub(crate) kind: String,
    pub(crate) path: Option<String>,
    pub(crate) index: Option<u32>,
}

/// A network adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DomainNic {
    pub(crate) mac: String,
    pub(crate) network: String,
}

fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.has_tag_name(name))
}

fn attribute(node: Option<Node<'_, '_>>, name: &str) -> Option<String> {
    node?.attribute(name).map(str::to_owned)
}

fn text(node: Node<'_, '_>, name: &str) -> Option<String> {
    Some(child(node, name)?.text()?.trim().to_owned())
}

impl Domain {
    /// Reads a description.
    pub(crate) fn parse(xml: &str) -> Result<Self, SiteError> {
        let wrong = |what: &str| failed(format!("libvirt's description of the VM has no {what}"));
        let document =
            Document::parse(xml).map_err(|error| failed(format!("reading libvirt's XML: {error}")))?;
        let domain = document.root_element();
        let devices = child(domain, "devices").ok_or_else(|| wrong("devices"))?;
        let os = child(domain, "os");
        let loader = os.and_then(|os| child(os, "loader"));
        let nvram = os.and_then(|os| text(os, "nvram")).map(PathBuf::from);
        let is_uefi = attribute(os, "firmware").as_deref() == Some("efi")
            || attribute(loader, "type").as_deref() == Some("pflash")
            || nvram.is_some();
        let id = text(domain, "uuid").and_then(|uuid| uuid.parse().ok()).ok_or_else(|| wrong("UUID"))?;
        let vcpu = child(domain, "vcpu");
        let vcpus = attribute(vcpu, "current").or_else(|| vcpu?.text().map(|text| text.trim().to_owned()));
        let named = |name: &'static str| devices.children().filter(move |node| node.has_tag_name(name));
        let is_agent = |channel: Node<'_, '_>| {
            child(channel, "target").and_then(|target| target.attribute("name"))
                == Some("org.qemu.guest_agent.0")
        };
        let agent = named("channel").find(|channel| is_agent(*channel));
        Ok(Self {
            id,
            name: text(domain, "name").ok_or_else(|| wrong("name"))?,
            vcpus: vcpus.and_then(|count| count.parse().ok()).unwrap_or(1),
            memory_bytes: memory_bytes(domain).unwrap_or(0),
            is_uefi,
            nvram,
            has_tpm: named("tpm").next().is_some(),
            agent: agent.map(|channel| AgentChannel {
                is_connected: attribute(child(channel, "target"), "state").as_deref() == Some("connected"),
                alias: attribute(child(channel, "alias"), "name"),
                socket: attribute(child(channel, "source"), "path").map(PathBuf::from),
            }),
            has_passthrough: named("hostdev").next().is_some(),
            disks: named("disk").filter_map(read_disk).collect(),
            nics: named("interface").map(read_nic).collect(),
            recovery: read_mark(domain),
        })
    }

    /// The disk of that key.
    pub(crate) fn disk(&self, key: &str) -> Option<&DomainDisk> {
        self.disks.iter().find(|disk| disk.key == key)
    }
}

/// The maximum memory; libvirt's unit is KiB unless it says otherwise.
fn memory_bytes(domain: Node<'_, '_>) -> Option<u64> {
    let memory = child(domain, "memory")?;
    let number: u64 = memory.text()?.trim().parse().ok()?;
    let unit = match memory.attribute("unit").unwrap_or("KiB") {
        "b" | "bytes" => 1,
        "KB" => 1000,
        "MB" => 1_000_000,
        "MiB" | "M" => 1 << 20,
        "GB" => 1_000_000_000,
        "GiB" | "G" => 1 << 30,
        "TiB" | "T" => 1 << 40,
        _ => 1 << 10,
    };
    number.checked_mul(unit)
}

fn read_disk(node: Node<'_, '_>) -> Option<DomainDisk> {
    if !matches!(node.attribute("device"), None | Some("disk" | "lun")) {
        return None;
    }
    let source = child(node, "source");
    let mut backing = Vec::new();
    let mut beneath = child(node, "backingStore");
    while let Some(node) = beneath {
        let Some(kind) = node.attribute("type") else { break };
        let source = child(node, "source");
        let index = node.attribute("index").and_then(|index| index.parse().ok());
        backing.push(BackingImage { kind: kind.to_owned(), path: source_path(source), index });
        beneath = child(node, "backingStore");
    }
    let format = attribute(child(node, "driver"), "type").unwrap_or_else(|| "raw".to_owned());
    let is_lun = node.attribute("device") == Some("lun");
    Some(DomainDisk {
        key: attribute(child(node, "target"), "dev")?,
        kind: if is_lun { "lun".to_owned() } else { node.attribute("type").unwrap_or_default().to_owned() },
        path: source_path(source),
        format,
        is_read_only: child(node, "readonly").is_some(),
        is_shared: child(node, "shareable").is_some(),
        is_encrypted: source.is_some_and(|source| child(source, "encryption").is_some())
            || child(node, "encryption").is_some(),
        boot_order: attribute(child(node, "boot"), "order").and_then(|order| order.parse().ok()),
        index: attribute(source, "index").and_then(|index| index.parse().ok()),
        backing,
    })
}

fn source_path(source: Option<Node<'_, '_>>) -> Option<String> {
    let source = source?;
    source.attribute("file").or_else(|| source.attribute("dev")).map(str::to_owned)
}

/// Names a network the way [`super::rewrite`] understands it again.
fn read_nic(node: Node<'_, '_>) -> DomainNic {
    let source = child(node, "source");
    let of = |name: &str| attribute(source, name).unwrap_or_default();
    let is_down = attribute(child(node, "link"), "state").as_deref() == Some("down");
    let network = match node.attribute("type").unwrap_or_default() {
        "network" => of("network"),
        "bridge" => format!("bridge:{}", of("bridge")),
        "direct" => format!("direct:{}", of("dev")),
        "mcast" => format!("mcast:{}:{}", of("address"), of("port")),
        // How an adapter that is not connected is written.
        "user" if is_down => String::new(),
        other => other.to_owned(),
    };
    DomainNic { mac: attribute(child(node, "mac"), "address").unwrap_or_default().to_lowercase(), network }
}

fn read_mark(domain: Node<'_, '_>) -> Option<RecoveryMark> {
    let metadata = child(domain, "metadata")?;
    let mark = metadata.children().find(|node| node.has_tag_name((NAMESPACE, "recovery")))?;
    Some(RecoveryMark {
        item: mark.attribute("item")?.parse().ok()?,
        is_test: mark.attribute("test") == Some("yes"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_running_recovery_vm() {
        let domain = Domain::parse(
            "<domain type='qemu'><name>web</name><uuid>0b6a2f4e-7b1f-4c1e-9d55-3a1c3f0a9b77</uuid>
             <metadata><m:recovery xmlns:m='https://mainstay.dev/xml/domain/1' test='yes'
               item='5b6a2f4e-7b1f-4c1e-9d55-3a1c3f0a9b70'/></metadata>
             <memory unit='KiB'>196608</memory><vcpu current='1'>2</vcpu>
             <os firmware='efi'><type>hvm</type><nvram>/n/web.fd</nvram></os><devices>
             <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/r/top' index='3'/>
              <backingStore type='file' index='5'><format type='qcow2'/><source file='/r/mid'/>
               <backingStore type='network' index='6'><format type='raw'/><source protocol='nbd' name='vda'/>
                <backingStore/></backingStore></backingStore><target dev='vda'/><boot order='1'/></disk>
             <disk type='file' device='cdrom'><target dev='sda'/></disk>
             <interface type='mcast'><mac address='52:54:00:AA:00:01'/><source address='230.0.0.1' port='5'/></interface>
             <interface type='user'><mac address='52:54:00:aa:00:02'/><link state='down'/></interface>
             <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
             </devices></domain>",
        )
        .unwrap();
        assert_eq!((domain.vcpus, domain.memory_bytes, domain.is_uefi), (1, 192 << 20, true));
        assert!(domain.agent.is_some() && !domain.has_tpm && domain.recovery.unwrap().is_test);
        let disk = domain.disk("vda").unwrap();
        assert_eq!((disk.index, disk.boot_order, disk.path.as_deref()), (Some(3), Some(1), Some("/r/top")));
        assert_eq!(disk.backing.iter().map(|image| image.index.unwrap()).collect::<Vec<_>>(), [5, 6]);
        assert_eq!(disk.backing[1].kind, "network");
        assert_eq!(domain.disks.len(), 1);
        assert_eq!(
            (domain.nics[0].network.as_str(), domain.nics[0].mac.as_str()),
            ("mcast:230.0.0.1:5", "52:54:00:aa:00:01")
        );
        assert_eq!(domain.nics[1].network, "");
    }

    #[test]
    fn nonsense_is_an_error() {
        for xml in [
            "",
            "<domain/>",
            "<domain><devices/></domain>",
            "<a",
            "<domain><uuid>x</uuid><devices/></domain>",
        ] {
            assert!(Domain::parse(xml).is_err());
        }
    }
}
