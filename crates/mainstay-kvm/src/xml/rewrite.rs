//! Making a domain for this host from a definition that another host wrote.

use std::path::{Path, PathBuf};

use mainstay_model::VmId;
use mainstay_provider::SiteError;
use xmltree::{Element, Namespace};

use super::tree::{attribute, child, element, parse, push, remove, retain, set_text, to_text};
use super::{DiskSource, NAMESPACE, NicRules, RecoveryMark, disks, nics};
use crate::error::failed;

/// What the domain shall be here.
#[derive(Clone, Debug)]
pub(crate) struct Adaptation<'a> {
    pub(crate) id: VmId,
    pub(crate) name: &'a str,
    pub(crate) mark: Option<RecoveryMark>,
    pub(crate) vcpus: Option<u32>,
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) disks: &'a [DiskSource],
    /// `None`: the adapters stay as they are.
    pub(crate) nics: Option<NicRules<'a>>,
    /// Whether guests run on the processor here.
    pub(crate) has_hardware: bool,
    /// The machine types that QEMU knows here.
    pub(crate) machines: &'a [String],
    /// The file of UEFI variables, if the definition brought one.
    pub(crate) nvram: Option<PathBuf>,
    /// The directory of the TPM's state, if the definition brought one.
    pub(crate) tpm: Option<PathBuf>,
}

/// Parts of a definition that only mean something on the host where it was written: pinning, pages, partitions,
/// labels, and devices of that host.
const HOST_PARTS: [&str; 7] =
    ["cputune", "numatune", "memoryBacking", "resource", "seclabel", "iothreadids", "genid"];
const HOST_DEVICES: [&str; 5] = ["hostdev", "filesystem", "shmem", "emulator", "redirdev"];

/// Rewrites a definition.
pub(crate) fn adapt(xml: &str, to: &Adaptation<'_>) -> Result<String, SiteError> {
    let mut domain = parse(xml)?;
    if domain.name != "domain" {
        return Err(failed("the definition is not a libvirt domain"));
    }
    remove(&mut domain, &HOST_PARTS);
    domain.attributes.remove("id");
    set_text(child(&mut domain, "name"), to.name);
    set_text(child(&mut domain, "uuid"), &to.id.to_string());
    rewrite_sysinfo(&mut domain, to.id);
    rewrite_processor(&mut domain, to);
    if let Some(bytes) = to.memory_bytes {
        rewrite_memory(&mut domain, bytes);
    }
    rewrite_firmware(&mut domain, to);
    rewrite_mark(&mut domain, to.mark);
    let devices = child(&mut domain, "devices");
    remove(devices, &HOST_DEVICES);
    rewrite_devices(devices, to);
    disks::rewrite(devices, to.disks);
    if let Some(rules) = &to.nics {
        nics::rewrite(devices, rules)?;
    }
    to_text(&domain)
}

/// libvirt insists that the UUID in the system information is the domain's.
fn rewrite_sysinfo(domain: &mut Element, id: VmId) {
    let Some(system) = domain.get_mut_child("sysinfo").and_then(|info| info.get_mut_child("system")) else {
        return;
    };
    retain(system, |entry| {
        if entry.attributes.get("name").is_some_and(|name| name == "uuid") {
            set_text(entry, &id.to_string());
        }
        true
    });
}

fn rewrite_processor(domain: &mut Element, to: &Adaptation<'_>) {
    if !to.has_hardware && domain.attributes.get("type").is_some_and(|kind| kind == "kvm") {
        domain.attributes.insert("type".to_owned(), "qemu".to_owned());
        let mode = domain.get_child("cpu").and_then(|cpu| cpu.attributes.get("mode")).map(String::as_str);
        if matches!(mode, Some("host-passthrough" | "host-model")) {
            // Emulation has no host processor to pass through.
            remove(domain, &["cpu"]);
            push(domain, element("cpu", &[("mode", "maximum")]));
        }
    }
    if let Some(vcpus) = to.vcpus {
        remove(domain, &["vcpu", "vcpus"]);
        let mut vcpu = Element::new("vcpu");
        set_text(&mut vcpu, &vcpus.to_string());
        push(domain, vcpu);
        if let Some(cpu) = domain.get_mut_child("cpu") {
            // They would have to multiply to the old number.
            remove(cpu, &["topology", "numa"]);
        }
    } else if let Some(vcpu) = domain.get_mut_child("vcpu") {
        vcpu.attributes.remove("cpuset");
    }
}

fn rewrite_memory(domain: &mut Element, bytes: u64) {
    remove(domain, &["memory", "currentMemory", "maxMemory"]);
    let mut memory = element("memory", &[("unit", "b")]);
    set_text(&mut memory, &bytes.to_string());
    push(domain, memory);
}

fn rewrite_firmware(domain: &mut Element, to: &Adaptation<'_>) {
    let os = child(domain, "os");
    let kind = child(os, "type");
    if let Some(machine) = kind.attributes.get("machine").cloned() {
        let is_known = to.machines.is_empty() || to.machines.contains(&machine);
        if let Some(alias) = machine_alias(&machine).filter(|_| !is_known) {
            kind.attributes.insert("machine".to_owned(), alias.to_owned());
        }
    }
    if let Some(nvram) = os.get_mut_child("nvram") {
        match &to.nvram {
            Some(path) => {
                nvram.attributes.retain(|name, _| name == "template" || name == "templateFormat");
                set_text(nvram, &path.display().to_string());
            }
            // libvirt makes a new one from the template.
            None => remove(os, &["nvram"]),
        }
    }
    let is_missing = |path: &str| !Path::new(path).exists();
    let loader = os.get_child("loader").and_then(Element::get_text).map(|text| text.into_owned());
    if loader.is_some_and(|path| is_missing(&path)) {
        // Another distribution keeps its firmware elsewhere: libvirt finds it by what it is.
        remove(os, &["loader"]);
        os.attributes.insert("firmware".to_owned(), "efi".to_owned());
        if let Some(nvram) = os.get_mut_child("nvram") {
            nvram.attributes.clear();
        }
    }
}

/// The unversioned name of a machine type.
fn machine_alias(machine: &str) -> Option<&'static str> {
    if machine.starts_with("pc-q35-") {
        Some("q35")
    } else if machine.starts_with("pc-i440fx-") {
        Some("pc")
    } else {
        None
    }
}

/// Writes down whose recovery VM this is; a home VM has no mark.
fn rewrite_mark(domain: &mut Element, mark: Option<RecoveryMark>) {
    let metadata = child(domain, "metadata");
    retain(metadata, |entry| entry.namespace.as_deref() != Some(NAMESPACE));
    let Some(mark) = mark else { return };
    let is_test = if mark.is_test { "yes" } else { "no" };
    let mut entry = element("recovery", &[("item", &mark.item.to_string()), ("test", is_test)]);
    let mut namespaces = Namespace::empty();
    namespaces.put("mainstay", NAMESPACE);
    entry.prefix = Some("mainstay".to_owned());
    entry.namespace = Some(NAMESPACE.to_owned());
    entry.namespaces = Some(namespaces);
    push(metadata, entry);
}

fn rewrite_devices(devices: &mut Element, to: &Adaptation<'_>) {
    retain(devices, |device| {
        match device.name.as_str() {
            // The socket of the agent's channel is made by libvirt for each domain.
            "channel" if attribute(device, "target", "name") == Some("org.qemu.guest_agent.0") => {
                remove(device, &["source"]);
            }
            // A console in a file of the old host, or logged to one.
            "serial" | "console" => {
                device.attributes.insert("type".to_owned(), "pty".to_owned());
                remove(device, &["source", "log"]);
            }
            "graphics" => {
                device.attributes.retain(|name, _| name == "type" || name == "passwd");
                device.attributes.insert("autoport".to_owned(), "yes".to_owned());
                remove(device, &["listen"]);
            }
            "tpm" => {
                if let Some(path) = &to.tpm {
                    let backend = child(device, "backend");
                    remove(backend, &["source"]);
                    push(
                        backend,
                        element("source", &[("type", "dir"), ("path", &path.display().to_string())]),
                    );
                }
            }
            _ => {}
        }
        true
    });
}

#[cfg(test)]
mod tests {
    use mainstay_provider::{MacPolicy, NicPlan};

    use super::super::Domain;
    use super::*;

    const SOURCE: &str = "<domain type='kvm' id='4'><name>web</name><uuid>0b6a2f4e-7b1f-4c1e-9d55-3a1c3f0a9b77</uuid>
        <metadata><x:app xmlns:x='urn:x' y='1'/></metadata><memory unit='GiB'>4</memory>
        <vcpu cpuset='0-3'>4</vcpu><cpu mode='host-passthrough'><topology sockets='1' cores='4' threads='1'/></cpu>
        <cputune/><os><type machine='pc-q35-99.0'>hvm</type></os><seclabel/>
        <sysinfo type='smbios'><system><entry name='uuid'>0b6a2f4e-7b1f-4c1e-9d55-3a1c3f0a9b77</entry></system></sysinfo>
        <devices><emulator>/old/qemu</emulator><hostdev/>
        <disk type='block' device='disk'><driver name='qemu' type='raw' cache='none'/><source dev='/dev/vg/web'/>
          <target dev='vda' bus='virtio'/><serial>S1</serial><boot order='1'/></disk>
        <disk type='file' device='disk'><source file='/other'/><target dev='vdb'/></disk>
        <disk type='file' device='cdrom'><source file='/iso'/><target dev='sda'/></disk>
        <interface type='bridge'><mac address='52:54:00:AA:00:01'/><source bridge='br0'/><model type='virtio'/></interface>
        <interface type='bridge'><mac address='52:54:00:aa:00:02'/><source bridge='br1'/></interface>
        <serial type='pty'><log file='/old/console.log' append='on'/><target port='0'/></serial>
        <graphics type='vnc' port='5901'/></devices></domain>";

    fn adapted(change: impl FnOnce(&mut Adaptation<'_>)) -> String {
        let plans = [NicPlan {
            mac: "52:54:00:aa:00:01".to_owned(),
            network: Some("mcast:230.0.0.1:99".to_owned()),
            mac_policy: MacPolicy::Keep,
            address: None,
        }];
        let id = "1b6a2f4e-7b1f-4c1e-9d55-3a1c3f0a9b77".parse().unwrap();
        let disks = [DiskSource::Recovery {
            key: "vda".to_owned(),
            top: "/r/top".into(),
            middle: "/r/mid".into(),
            socket: "/r/sock".into(),
            export: "e".to_owned(),
        }];
        let item = "2b6a2f4e-7b1f-4c1e-9d55-3a1c3f0a9b77".parse().unwrap();
        let mut to = Adaptation {
            id,
            name: "web-dr",
            mark: Some(RecoveryMark { item, is_test: true }),
            vcpus: None,
            memory_bytes: None,
            disks: &disks,
            nics: Some(NicRules { vm: id, plans: &plans, isolated: None }),
            has_hardware: false,
            machines: &["pc-q35-10.0".to_owned()],
            nvram: None,
            tpm: None,
        };
        change(&mut to);
        adapt(SOURCE, &to).unwrap()
    }

    #[test]
    fn a_definition_becomes_a_recovery_vm_of_this_host() {
        let xml = adapted(|_| {});
        let domain = Domain::parse(&xml).unwrap();
        assert_eq!((domain.name.as_str(), domain.vcpus, domain.memory_bytes), ("web-dr", 4, 4 << 30));
        assert!(domain.recovery.unwrap().is_test);
        assert_eq!(domain.disks.len(), 1);
        let disk = domain.disk("vda").unwrap();
        assert_eq!(
            (disk.path.as_deref(), disk.kind.as_str(), disk.boot_order),
            (Some("/r/top"), "file", Some(1))
        );
        assert_eq!(disk.backing[0].path.as_deref(), Some("/r/mid"));
        assert_eq!(domain.nics.len(), 1);
        assert_eq!(domain.nics[0].network, "mcast:230.0.0.1:99");
        for gone in [
            "host-passthrough",
            "/old/qemu",
            "hostdev",
            "/iso",
            "/old/console.log",
            "cputune",
            "seclabel",
            "99.0",
            "5901",
            "cpuset",
        ] {
            assert!(!xml.contains(gone), "{gone} is still in {xml}");
        }
        for kept in
            ["urn:x", "<serial>S1</serial>", "reconnect", "rerror_policy=\"stop\"", "model type=\"virtio\""]
        {
            assert!(xml.contains(kept), "{kept} is not in {xml}");
        }
        assert!(!xml.contains("0b6a2f4e"));
        let dropped = super::super::drop_backing_store(&xml, "vda").unwrap();
        assert!(Domain::parse(&dropped).unwrap().disk("vda").unwrap().backing.is_empty());
    }

    #[test]
    fn size_and_hardware_are_as_asked() {
        let xml = adapted(|to| {
            to.vcpus = Some(2);
            to.memory_bytes = Some(1 << 30);
            to.has_hardware = true;
            to.nics = None;
        });
        let domain = Domain::parse(&xml).unwrap();
        assert_eq!((domain.vcpus, domain.memory_bytes, domain.nics.len()), (2, 1 << 30, 2));
        assert!(xml.contains("type=\"kvm\"") && !xml.contains("topology"));
    }
}
