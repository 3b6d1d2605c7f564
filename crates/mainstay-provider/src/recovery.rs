//! Recovery VMs at the recovery site and staging at home: where replicated bytes become disks again.

use std::{path::PathBuf, sync::Arc};

use async_trait::async_trait;
use mainstay_block::BlockDevice;
use mainstay_model::{ItemId, VmId};
use serde::{Deserialize, Serialize};

use crate::SiteError;

/// A VM's definition as its own hypervisor writes it, with firmware variables and TPM state: opaque to
/// all but the driver that made it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VmDefinition(#[serde(with = "base64_bytes")] pub Vec<u8>);

/// Bytes as base64 text: definitions travel in JSON, where a list of numbers is four times as long.
mod base64_bytes {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map_err(D::Error::custom)
    }
}

/// A VM to be made from a recovery point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryVmSpec {
    /// The VM's identifier, chosen by the caller before anything is created, so that every step can be
    /// repeated.
    pub vm: VmId,
    /// The replicated item it belongs to; recorded with the VM so that it is recognised.
    pub item: ItemId,
    /// Its name; refused if another VM has it.
    pub name: String,
    /// Whether it is a test copy: attached to isolated networks only.
    pub is_test: bool,
    /// The definition from the recovery point.
    pub definition: VmDefinition,
    /// Its disks.
    pub disks: Vec<RecoveryDisk>,
    /// Virtual processors; `None` = as defined.
    pub vcpus: Option<u32>,
    /// Memory in bytes; `None` = as defined.
    pub memory_bytes: Option<u64>,
    /// What becomes of each adapter, by the MAC address in the definition. Adapters that are not
    /// named are left out.
    pub nics: Vec<NicPlan>,
}

/// A disk of a recovery VM, backed by a recovery point that is served over NBD.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryDisk {
    /// The disk's key in the definition.
    pub key: String,
    /// Virtual size in bytes.
    pub size_bytes: u64,
    /// The unix socket of the NBD server.
    pub nbd_socket: PathBuf,
    /// The export's name on it.
    pub nbd_export: String,
}

/// What becomes of a network adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicPlan {
    /// The adapter's MAC address in the definition.
    pub mac: String,
    /// The network to attach to; for a test copy `None` means an isolated network of its own, else
    /// `None` means not connected.
    pub network: Option<String>,
    /// Which MAC address the recovery VM has.
    pub mac_policy: MacPolicy,
    /// The address the guest shall have there, `ADDRESS/PREFIX`; `None` = whatever the network gives.
    pub address: Option<String>,
}

/// Which MAC address an adapter of a recovery VM has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MacPolicy {
    /// The same as at home: licences and DHCP reservations keep working. Default.
    #[default]
    Keep,
    /// A new one, derived from the VM's identifier, so that repeating gives the same.
    Generate,
}

/// What becomes of a hydration while the VM is off: copying needs it in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum WhenOff {
    /// It waits until somebody starts the VM.
    #[default]
    Wait,
    /// The VM is held in memory without running, for as long as it takes, and is off again afterwards.
    Hold,
    /// A hold ends, if there is one, and nothing is copied.
    Release,
}

/// How far a recovery VM's disks have been copied out of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hydration {
    /// Bytes copied so far, over all disks.
    pub bytes_done: u64,
    /// Bytes to copy in all.
    pub bytes_total: u64,
    /// Whether the VM no longer needs the recovery point, now or at its next start.
    pub is_complete: bool,
}

/// A home VM whose disks are about to receive the changes made at the recovery site.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagingSpec {
    /// The home VM, which is off.
    pub vm: VmId,
    /// The replicated item.
    pub item: ItemId,
    /// The disks to stage, with the size that they shall have (at least the present size).
    pub disks: Vec<StagingDisk>,
}

/// A disk to be staged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagingDisk {
    /// The disk's key.
    pub key: String,
    /// Virtual size in bytes.
    pub size_bytes: u64,
}

/// An open staging area: writes go to an overlay, the home disks stay bit-identical.
#[async_trait]
pub trait Staging: Send + Sync {
    /// One writable device per disk of the spec, in its order, showing the home disk with the staged
    /// changes over it. What was flushed survives any crash.
    fn devices(&self) -> &[Arc<dyn BlockDevice>];

    /// Whether the home disk beneath was changed by somebody else since the staging began.
    async fn is_base_changed(&self) -> Result<bool, SiteError>;

    /// Lets go of the devices; what was staged stays on disk for the next
    /// [`crate::Hypervisor::open_staging`], [`crate::Hypervisor::commit_staging`] or
    /// [`crate::Hypervisor::discard_staging`].
    async fn close(self: Box<Self>) -> Result<(), SiteError>;
}
