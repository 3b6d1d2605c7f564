//! What a world has come to, comparable between runs.

use std::collections::BTreeMap;

use mainstay_block::BlockDevice as _;
use mainstay_model::Phase;
use mainstay_provider::PowerState;

use super::{Host, World};
use crate::hypervisor::forget_boots;

/// A digest of disks: long enough that two different ones do not look alike.
type Digest = u64;

/// Phase, VMs with their disks, and recovery points with theirs. Identifiers differ from run to run and are left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The item's phase; `None` = there is no item.
    pub phase: Option<Phase>,
    /// By site and name: whether it runs, and what its disks hold.
    pub vms: BTreeMap<String, (PowerState, Digest)>,
    /// What the recovery points hold, oldest first; equal neighbours once.
    pub points: Vec<Digest>,
    /// What the recovery VM shall be.
    pub vcpus: Option<u32>,
}

fn digest(disks: &[Vec<u8>]) -> Digest {
    use std::hash::{DefaultHasher, Hash as _, Hasher as _};
    let mut hasher = DefaultHasher::new();
    disks.hash(&mut hasher);
    hasher.finish()
}

impl World {
    /// What the world has come to as far as one VM is concerned.
    pub async fn snapshot(&self, name: &str) -> Snapshot {
        let mut vms = BTreeMap::new();
        for (site, host) in [("home", &self.home), ("recovery", &self.recovery)] {
            self.add_vms(site, host, &mut vms).await;
        }
        let item = self.item(name).await;
        let mut points = Vec::new();
        if let Some(item) = &item {
            for (_, disks) in self.read_points(item.id).await {
                points.push(digest(&disks));
            }
            points.dedup();
        }
        Snapshot {
            phase: item.as_ref().map(|item| item.state.phase),
            vms,
            points,
            vcpus: item.and_then(|item| item.target.vcpus),
        }
    }

    /// What the disks of all VMs hold, by site and name, but for the blocks that a guest writes when it boots and is shut down.
    pub async fn held(&self) -> BTreeMap<String, Vec<Vec<u8>>> {
        let mut held = BTreeMap::new();
        for (site, host) in [("home", &self.home), ("recovery", &self.recovery)] {
            for view in host.hypervisor.views() {
                let mut disks = host.hypervisor.disks(view.id).await.expect("disks are read");
                forget_boots(&mut disks);
                held.insert(format!("{site}/{}", view.name), disks);
            }
        }
        held
    }

    async fn add_vms(&self, site: &str, host: &Host, vms: &mut BTreeMap<String, (PowerState, Digest)>) {
        for view in host.hypervisor.views() {
            let disks = host.hypervisor.disks(view.id).await.expect("disks are read");
            vms.insert(format!("{site}/{}", view.name), (view.power, digest(&disks)));
        }
    }

    /// All recovery points in the catalogue, by their moment, with what they hold.
    pub(super) async fn read_points(&self, item: mainstay_model::ItemId) -> Vec<(i64, Vec<Vec<u8>>)> {
        let read = |control: std::sync::Arc<mainstay_control::Control>| async move {
            let points = match control.store.points(item.0).await {
                Err(mainstay_store::StoreError::NoReplica(_)) => return Vec::new(),
                points => points.expect("the catalogue is read"),
            };
            let mut read = Vec::new();
            for point in points {
                let reader = match control.store.open_point(item.0, point.id).await {
                    // Retention has taken it out in between.
                    Err(mainstay_store::StoreError::NoPoint(_)) => continue,
                    reader => reader.expect("a point opens"),
                };
                let mut disks = Vec::new();
                for disk in &point.disks {
                    let device = reader.disk(disk.index).expect("a point has its disks");
                    disks.push(device.read(0, disk.bytes).await.expect("a point is read").to_vec());
                }
                read.push((point.time_ms.cast_signed(), disks));
            }
            read
        };
        self.ask(read).await
    }
}
