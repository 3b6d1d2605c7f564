//! Rewriting where a domain's disks come from.

use std::path::PathBuf;

use mainstay_provider::SiteError;
use xmltree::Element;

use super::tree::{attribute, child, element, parse, push, remove, retain, to_text, with};

/// How long QEMU waits for the server of a recovery point before it pauses the guest.
const RECONNECT_SECONDS: &str = "300";

/// Where a disk comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DiskSource {
    /// An overlay for the guest's writes, over an image that is being filled from a recovery point.
    Recovery { key: String, top: PathBuf, middle: PathBuf, socket: PathBuf, export: String },
    /// An image of its own.
    Image { key: String, path: PathBuf, format: String },
}

impl DiskSource {
    pub(super) fn key(&self) -> &str {
        match self {
            Self::Recovery { key, .. } | Self::Image { key, .. } => key,
        }
    }

    /// Gives a `<disk>` this source; its place on the bus, serial number and limits stay.
    pub(super) fn apply(&self, disk: &mut Element) {
        remove(disk, &["source", "backingStore", "mirror", "auth", "encryption", "transient", "readonly"]);
        disk.attributes.insert("type".to_owned(), "file".to_owned());
        disk.attributes.insert("device".to_owned(), "disk".to_owned());
        disk.attributes.remove("snapshot");
        let driver = child(disk, "driver");
        // What the disk was on, its host knew best; here the images are on a file system.
        for name in ["io", "cache", "iothread", "queues"] {
            driver.attributes.remove(name);
        }
        let mut set = |name: &str, value: &str| driver.attributes.insert(name.to_owned(), value.to_owned());
        set("name", "qemu");
        let path_of = |path: &PathBuf| path.display().to_string();
        match self {
            Self::Recovery { top, middle, socket, export, .. } => {
                set("type", "qcow2");
                // The guest shall wait for the recovery point's server, not see its disk fail.
                set("error_policy", "stop");
                set("rerror_policy", "stop");
                push(disk, element("source", &[("file", &path_of(top))]));
                let host = element("host", &[("transport", "unix"), ("socket", &path_of(socket))]);
                let nbd = element("source", &[("protocol", "nbd"), ("name", export)]);
                let nbd = with(with(nbd, host), element("reconnect", &[("delay", RECONNECT_SECONDS)]));
                let store = with(
                    element("backingStore", &[("type", "network")]),
                    element("format", &[("type", "raw")]),
                );
                let store = with(with(store, nbd), Element::new("backingStore"));
                let mid = with(
                    element("backingStore", &[("type", "file")]),
                    element("format", &[("type", "qcow2")]),
                );
                let mid = with(mid, element("source", &[("file", &path_of(middle))]));
                push(disk, with(mid, store));
            }
            Self::Image { path, format, .. } => {
                set("type", format);
                driver.attributes.remove("error_policy");
                driver.attributes.remove("rerror_policy");
                push(disk, element("source", &[("file", &path_of(path))]));
            }
        }
    }
}

/// Rewrites the disks of a domain: those named get their sources, other disks go, CDs and floppies are emptied.
pub(super) fn rewrite(devices: &mut Element, sources: &[DiskSource]) {
    retain(devices, |device| {
        if device.name != "disk" {
            return true;
        }
        let kind = device.attributes.get("device").map(String::as_str);
        if matches!(kind, Some("cdrom" | "floppy")) {
            // Whatever was in the drive is not at this host.
            remove(device, &["source", "backingStore"]);
            device.attributes.insert("type".to_owned(), "file".to_owned());
            return true;
        }
        let key = attribute(device, "target", "dev").unwrap_or_default().to_owned();
        match sources.iter().find(|source| source.key() == key) {
            Some(source) => {
                source.apply(device);
                true
            }
            None => false,
        }
    });
}

/// Removes what a description says about the images beneath a disk: they then say it themselves.
pub(crate) fn drop_backing_store(xml: &str, key: &str) -> Result<String, SiteError> {
    let mut domain = parse(xml)?;
    retain(child(&mut domain, "devices"), |device| {
        if device.name == "disk" && attribute(device, "target", "dev") == Some(key) {
            remove(device, &["backingStore"]);
        }
        true
    });
    to_text(&domain)
}
