//! A store's medium that does not keep what was written to it.

use mainstay_model::PointId;
use mainstay_store::StoreError;
use object_store::path::Path;

use super::World;

/// What the recovery points of an item are found to be.
#[derive(Debug, Default)]
pub struct Legible {
    /// Those that read back as the oracle remembers them, oldest first.
    pub whole: Vec<PointId>,
    /// Those with blocks that the store refuses to return, by identifier.
    pub damaged: Vec<PointId>,
}

impl World {
    /// Keys of the stored objects in a folder, in order.
    pub fn objects(&self, folder: &str) -> Vec<Path> {
        let inside = self.storage.objects().into_iter();
        let mut keys: Vec<_> = inside.filter(|key| key.parts().any(|part| part.as_ref() == folder)).collect();
        keys.sort_unstable();
        keys
    }

    /// Flips a bit of a stored object, at this share of its length.
    pub fn flip(&self, key: &Path, share: f64) {
        self.storage.flip(key, share);
    }

    /// Reads all recovery points of a VM; none may be wrong.
    pub async fn legible(&self, name: &str) -> Legible {
        let item = self.item(name).await.expect("the VM is protected");
        let read = move |control: std::sync::Arc<mainstay_control::Control>| async move {
            let mut found = Vec::new();
            for point in control.store.points(item.id.0).await.expect("the catalogue is read") {
                let reader = control.store.open_point(item.id.0, point.id).await;
                // Retention has taken it out in between.
                if matches!(reader, Err(StoreError::NoPoint(_))) {
                    continue;
                }
                let disks = async {
                    let reader = reader?;
                    let mut disks = Vec::new();
                    for disk in &point.disks {
                        disks.push(reader.disk(disk.index)?.read_range(0, disk.bytes).await?.to_vec());
                    }
                    Ok::<_, StoreError>(disks)
                };
                found.push((point.clone(), disks.await));
            }
            found
        };
        let mut legible = Legible::default();
        for (point, disks) in self.ask(read).await {
            match disks {
                Ok(disks) => {
                    let expected = self.oracle.disks_at(point.time_ms.cast_signed());
                    assert!(*expected.expect("every point comes from a capture") == disks, "wrong bytes");
                    legible.whole.push(PointId(point.id));
                }
                Err(StoreError::Damaged { .. }) => legible.damaged.push(PointId(point.id)),
                Err(error) => panic!("a point cannot be read: {error}"),
            }
        }
        legible.damaged.sort_unstable();
        legible
    }

    /// Has the replica of a VM read through, and waits until that is over and a cycle has put right what it could.
    pub async fn scrub(&self, name: &str) {
        let item = self.item(name).await.expect("the VM is protected");
        let id = item.id;
        let before_ms = item.scrub.finished_ms;
        self.clock.advance_ms(1);
        self.ask(move |control| async move { control.request_scrub(id).await }).await.expect("a scrub");
        self.until("the replica is read through", async |world| {
            let scrub = world.item(name).await.expect("the VM is protected").scrub;
            scrub.requested_ms.is_none() && scrub.finished_ms != before_ms
        })
        .await;
    }

    /// Waits until a cycle has sent again what could not be read, and that has been looked at.
    pub async fn until_looked_at(&self, name: &str) {
        self.until("what was sent again has been looked at", async |world| {
            let scrub = world.item(name).await.expect("the VM is protected").scrub;
            !scrub.wants_repair() && !scrub.is_recheck_due
        })
        .await;
    }
}
