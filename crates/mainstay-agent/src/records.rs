//! What the agent must know after a crash: one JSON file per item and per recovery VM, replaced atomically.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use mainstay_block::durable::{UNFINISHED, create_directory, sync_parent, write_aside};
use mainstay_model::{Generation, ItemId, PointId, VmId};
use mainstay_provider::TrackerId;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// An item as this host knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ItemFile {
    /// The item.
    pub item: ItemId,
    /// Its VM on this host.
    pub vm: VmId,
    /// Keys of the replicated disks, in the order of the store.
    pub disks: Vec<String>,
    /// The newest generation this host has heard of.
    pub generation: Generation,
    /// What the VM's disks are told from.
    pub base: Option<Base>,
    /// The capture that is being, or was being, shipped.
    pub pending: Option<Pending>,
    /// Whether the host started the VM by itself before protection took that over; `None` = not taken over.
    pub autostart_before: Option<bool>,
    /// The host has booted since the VM ran, and would have started it: see [`mainstay_provider::Discovery::waiting`].
    #[serde(default)]
    pub is_waiting: bool,
    /// The staging area over the VM's disks.
    pub staging: Option<StagingFile>,
}

/// A recovery point and the tracker that tells what changed on the VM's disks since.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// The point.
    pub point: PointId,
    /// The tracker; `None` = the disks equal the point as long as the VM has not been started.
    pub tracker: Option<TrackerId>,
    /// Byte ranges (start, end) per disk in which the disks may differ from the point whatever the tracker says: the point
    /// is a partial state that did not get that far. Empty otherwise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<Vec<(u64, u64)>>,
}

impl Base {
    /// A whole recovery point.
    pub fn new(point: PointId, tracker: Option<TrackerId>) -> Self {
        Self { point, tracker, left: Vec::new() }
    }

    /// Whether the tracker alone tells what differs from the point.
    pub fn is_whole(&self) -> bool {
        self.left.iter().all(Vec::is_empty)
    }
}

/// A capture that may become a base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// Its tracker.
    pub tracker: TrackerId,
    /// As in [`Base::left`], written before the server is asked for a partial state.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<Vec<(u64, u64)>>,
}

/// A staging area.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagingFile {
    /// Keys and sizes of the disks.
    pub disks: Vec<(String, u64)>,
    /// The point that home disk and staging area together equal; `None` = nothing was staged yet.
    pub at: Option<PointId>,
    /// Whether nothing at home can be trusted: everything is fetched.
    pub is_blank: bool,
    /// Block ranges (first, end) per disk that were staged, for the proof.
    pub touched: Vec<Vec<(u64, u64)>>,
}

/// A recovery VM whose disks may still be served out of the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryVmFile {
    /// The VM.
    pub vm: VmId,
    /// The item.
    pub item: ItemId,
    /// The point it was made from.
    pub point: PointId,
    /// Keys and sizes of the disks, in the order of the store.
    pub disks: Vec<(String, u64)>,
    /// Whether it is a test copy.
    pub is_test: bool,
    /// Whether it no longer needs the store.
    pub is_hydrated: bool,
}

/// The agent's records.
#[derive(Clone, Debug)]
pub struct Records {
    dir: PathBuf,
}

impl Records {
    /// Opens the records under a data directory.
    pub fn open(data_dir: &Path) -> io::Result<Self> {
        let dir = data_dir.to_owned();
        for name in ["items", "recovery"] {
            let path = dir.join(name);
            create_directory(&path)?;
            // Names of what is in it may have been made just before the agent died.
            File::open(&path)?.sync_all()?;
        }
        Ok(Self { dir })
    }

    /// Where an item's record and hash tables are.
    pub fn item_dir(&self, item: ItemId) -> PathBuf {
        self.dir.join("items").join(item.to_string())
    }

    /// Path of the hash table of a disk.
    pub fn table_path(&self, item: ItemId, index: usize) -> PathBuf {
        self.item_dir(item).join(format!("disk-{index}.hashes"))
    }

    /// Reads an item's record.
    pub fn item(&self, item: ItemId) -> io::Result<Option<ItemFile>> {
        read(&self.item_dir(item).join("item.json"))
    }

    /// Writes an item's record.
    pub fn put_item(&self, record: &ItemFile) -> io::Result<()> {
        let dir = self.item_dir(record.item);
        create_directory(&dir)?;
        replace(&dir.join("item.json"), record)
    }

    /// Writes an item's record so that the agent finds it after its own death; after a loss of the host's power it may find
    /// the one before. For what the one before leads to again: what was pending is settled with the server.
    pub fn put_settled_item(&self, record: &ItemFile) -> io::Result<()> {
        write_aside(&self.item_dir(record.item).join("item.json"), &serde_json::to_vec_pretty(record)?)
    }

    /// Removes an item's record and hash tables.
    pub fn remove_item(&self, item: ItemId) -> io::Result<()> {
        let dir = self.item_dir(item);
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            // Also what an earlier call removed before a loss of power.
            _ => sync_parent(&dir),
        }
    }

    fn boot_path(&self) -> PathBuf {
        self.dir.join("boot.json")
    }

    /// The boot of the host in which the agent last ran.
    pub fn boot(&self) -> io::Result<Option<String>> {
        read(&self.boot_path())
    }

    /// Notes the boot of the host in which the agent runs.
    pub fn put_boot(&self, boot: &str) -> io::Result<()> {
        replace(&self.boot_path(), &boot)
    }

    /// All items on record.
    pub fn items(&self) -> io::Result<Vec<ItemFile>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.dir.join("items"))? {
            found.extend(read(&entry?.path().join("item.json"))?);
        }
        Ok(found)
    }

    fn recovery_path(&self, vm: VmId) -> PathBuf {
        self.dir.join("recovery").join(format!("{vm}.json"))
    }

    /// Reads a recovery VM's record.
    pub fn recovery_vm(&self, vm: VmId) -> io::Result<Option<RecoveryVmFile>> {
        read(&self.recovery_path(vm))
    }

    /// Writes a recovery VM's record.
    pub fn put_recovery_vm(&self, record: &RecoveryVmFile) -> io::Result<()> {
        replace(&self.recovery_path(record.vm), record)
    }

    /// Removes a recovery VM's record.
    pub fn remove_recovery_vm(&self, vm: VmId) -> io::Result<()> {
        let path = self.recovery_path(vm);
        // What a crash left half written goes too: nobody would replace it any more.
        for path in [&path.with_extension(UNFINISHED), &path] {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        sync_parent(&path)
    }

    /// All recovery VMs on record.
    pub fn recovery_vms(&self) -> io::Result<Vec<RecoveryVmFile>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.dir.join("recovery"))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                found.extend(read(&path)?);
            }
        }
        Ok(found)
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{} cannot be read: {error}", path.display()))
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes a file whole or not at all, and durably.
fn replace(path: &Path, record: &impl Serialize) -> io::Result<()> {
    write_aside(path, &serde_json::to_vec_pretty(record)?)?;
    sync_parent(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn records_survive_and_leave_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let item = ItemId(Uuid::from_u128(1));
        let record = ItemFile {
            item,
            vm: VmId(Uuid::from_u128(2)),
            disks: vec!["vda".to_owned()],
            generation: Generation(3),
            base: None,
            pending: None,
            autostart_before: Some(true),
            is_waiting: false,
            staging: None,
        };
        records.put_item(&record).unwrap();
        assert_eq!(Records::open(dir.path()).unwrap().item(item).unwrap(), Some(record.clone()));
        assert_eq!(records.items().unwrap(), [record]);
        records.remove_item(item).unwrap();
        records.remove_item(item).unwrap();
        assert_eq!(records.items().unwrap(), []);
    }

    #[test]
    fn a_damaged_record_is_an_error_and_not_an_absence() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let item = ItemId(Uuid::from_u128(1));
        fs::create_dir_all(records.item_dir(item)).unwrap();
        fs::write(records.item_dir(item).join("item.json"), b"{").unwrap();
        assert_eq!(records.item(item).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
