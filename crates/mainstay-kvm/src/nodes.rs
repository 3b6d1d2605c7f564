//! QEMU's block nodes of a running VM, and the dirty bitmaps on them.

use std::path::{Path, PathBuf};

use mainstay_model::VmId;
use mainstay_provider::SiteError;
use serde_json::{Value, json};

use crate::error::failed;
use crate::libvirt::Libvirt;
use crate::xml::DomainDisk;

/// Every bitmap and export of ours begins with this.
pub(crate) const PREFIX: &str = "ms-";

/// A block node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) name: String,
    /// The file that it reads and writes; of a node above another one, what QEMU makes of it, which may be JSON.
    pub(crate) file: PathBuf,
    pub(crate) is_qcow2: bool,
    /// Whether bitmaps can be stored in the image.
    pub(crate) keeps_bitmaps: bool,
    pub(crate) size_bytes: u64,
    /// Images beneath another one are not.
    pub(crate) is_writable: bool,
    /// Newest first.
    pub(crate) bitmaps: Vec<Bitmap>,
}

/// A dirty bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bitmap {
    pub(crate) name: String,
    /// It notes writes, and was there from its first moment on.
    pub(crate) is_usable: bool,
}

/// All block nodes of a VM.
#[derive(Clone, Debug)]
pub(crate) struct Nodes(Vec<Node>);

impl Nodes {
    /// Asks QEMU.
    pub(crate) async fn query(libvirt: &Libvirt, vm: VmId) -> Result<Self, SiteError> {
        let answer = libvirt.qmp(vm, "query-named-block-nodes", json!({"flat": true})).await?;
        let list = answer.as_array().ok_or_else(|| failed("QEMU's list of block nodes is no list"))?;
        Ok(Self(list.iter().filter_map(read_node).collect()))
    }

    /// The top node of a disk. libvirt names nodes by the index in the live description; a raw disk often has no
    /// format node.
    pub(crate) fn top_of(&self, disk: &DomainDisk) -> Result<&Node, SiteError> {
        let index =
            disk.index.ok_or_else(|| failed(format!("disk {} has no index: does the VM run?", disk.key)))?;
        self.by_index(index).ok_or_else(|| failed(format!("QEMU has no block node for disk {}", disk.key)))
    }

    /// The node that libvirt's index stands for.
    pub(crate) fn by_index(&self, index: u32) -> Option<&Node> {
        let named = |kind: &str| {
            let name = format!("libvirt-{index}-{kind}");
            self.0.iter().find(|node| node.name == name)
        };
        named("format").or_else(|| named("storage"))
    }

    /// The node of libvirt's that understands the format of an image.
    pub(crate) fn of_image(&self, file: &Path) -> Option<&Node> {
        let storage = self.0.iter().find(|node| node.file == file && node.name.ends_with("-storage"))?;
        let index = storage.name.strip_prefix("libvirt-")?.strip_suffix("-storage")?;
        self.by_index(index.parse().ok()?)
    }

    /// The nodes of the images beneath a disk, nearest first; `None` in the place of one that QEMU does not know.
    pub(crate) fn beneath<'a>(&'a self, disk: &'a DomainDisk) -> impl Iterator<Item = Option<&'a Node>> {
        disk.backing.iter().map(|image| self.by_index(image.index?))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Node> {
        self.0.iter()
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.iter().any(|node| node.name == name)
    }
}

impl Node {
    pub(crate) fn bitmap(&self, name: &str) -> Option<&Bitmap> {
        self.bitmaps.iter().find(|bitmap| bitmap.name == name)
    }
}

fn read_node(node: &Value) -> Option<Node> {
    let image = &node["image"];
    let is_qcow2 = node["drv"] == "qcow2";
    let bitmaps = node["dirty-bitmaps"].as_array().map(Vec::as_slice).unwrap_or_default();
    Some(Node {
        name: node["node-name"].as_str()?.to_owned(),
        file: node["file"].as_str().unwrap_or_default().into(),
        is_qcow2,
        keeps_bitmaps: is_qcow2 && image["format-specific"]["data"]["compat"] != "0.10",
        size_bytes: image["virtual-size"].as_u64().unwrap_or(0),
        is_writable: node["ro"] != true,
        bitmaps: bitmaps.iter().filter_map(read_bitmap).collect(),
    })
}

fn read_bitmap(bitmap: &Value) -> Option<Bitmap> {
    Some(Bitmap {
        name: bitmap["name"].as_str()?.to_owned(),
        is_usable: bitmap["recording"] == true && bitmap["inconsistent"] != true,
    })
}
