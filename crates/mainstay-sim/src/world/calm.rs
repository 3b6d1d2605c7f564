//! What must be true when nothing has gone wrong for a while.

use std::collections::BTreeSet;

use mainstay_control::db::{ItemRecord, ReplicationRecord};
use mainstay_model::{Generation, ItemId, Phase, VmId};
use mainstay_store::{ScrubOptions, StoreError};
use object_store::path::Path;

use super::World;

/// What a cycle may move beside the blocks that differ: messages, and when the agent's hash tables were lost, the hashes
/// of all blocks.
const OVERHEAD_BYTES: u64 = 64 << 10;
/// What the cycles of an item have shipped up to a moment.
#[derive(Debug)]
pub struct Shipped {
    name: String,
    item: ItemId,
    vm: VmId,
    generation: Generation,
    /// The capture of the recovery point before the newest one, of which the agent may not have told yet what it shipped.
    since_ms: i64,
    bytes_changed: u64,
    bytes_moved: u64,
}

/// How far the clock moves between two looks at what is stored.
const LOOK_MS: i64 = 1_000;

impl World {
    /// A cycle ships what differs from the recovery point before it and no more, also when nobody knows what was written:
    /// trackers and hash tables may be lost, the lineage in the store is not.
    pub async fn check_resend(&self, name: &str) {
        let (before, before_ms) = self.last_point(name).await;
        self.cycle(name).await;
        let (after, after_ms) = self.last_point(name).await;
        let differing = self.oracle.bytes_between(before_ms, after_ms).expect("both are captures");
        let changed = after.bytes_changed - before.bytes_changed;
        assert!(changed <= differing, "{changed} bytes of '{name}' were shipped, {differing} differ");
        let moved = after.bytes_moved - before.bytes_moved;
        assert!(
            moved <= differing + OVERHEAD_BYTES,
            "{moved} bytes of '{name}' were moved, {differing} differ"
        );
    }

    /// What has been shipped so far of a VM that is protected at home and on which no job works.
    pub async fn shipped(&self, name: &str) -> Option<Shipped> {
        let item = self.item(name).await?;
        if item.state.phase != Phase::Protected || item.state.running.is_some() {
            return None;
        }
        let read = move |control: std::sync::Arc<mainstay_control::Control>| async move {
            control.store.points(item.id.0).await
        };
        let mut points = match self.ask(read).await {
            // Its protection has been disabled since the item was read.
            Err(StoreError::Deleted(_)) => {
                let now = self.item(name).await;
                assert!(now.is_none_or(|now| now.state != item.state), "the replica of '{name}' is gone");
                return None;
            }
            points => points.expect("the points are listed"),
        };
        points.sort_unstable_by_key(|point| point.sequence);
        let since_ms = points.iter().rev().nth(1)?.time_ms.cast_signed();
        Some(Shipped {
            name: name.to_owned(),
            item: item.id,
            vm: item.vm,
            generation: item.state.generation,
            since_ms,
            bytes_changed: item.replication.bytes_changed,
            bytes_moved: item.replication.bytes_moved,
        })
    }

    /// Whatever has gone wrong before, the cycles since then have shipped what the disks differed in and no more.
    pub async fn check_shipped(&self, before: Shipped) {
        let Some(item) = self.item(&before.name).await else { return };
        let is_same = (item.id, item.state.generation) == (before.item, before.generation);
        if !is_same || item.state.phase != Phase::Protected {
            return;
        }
        let (differing, cycles) =
            self.oracle.bytes_since(before.vm, before.since_ms).expect("every point comes from a capture");
        let changed = item.replication.bytes_changed - before.bytes_changed;
        assert!(changed <= differing, "{changed} bytes were shipped, {differing} differ: {before:?}");
        let moved = item.replication.bytes_moved - before.bytes_moved;
        let overhead = OVERHEAD_BYTES * cycles;
        assert!(moved <= differing + overhead, "{moved} bytes were moved, {differing} differ: {before:?}");
    }

    /// The moment that the newest recovery point of an item shows, by its host's clock; and what had been replicated with it,
    /// which is read at once, because a cycle may end at any time.
    async fn last_point(&self, name: &str) -> (ReplicationRecord, i64) {
        let found = std::sync::Mutex::new(None);
        // Retention may have taken it out since a cycle put another one in its place, which the item does not show yet.
        self.until("the newest recovery point is there", async |world| {
            let item = world.item(name).await.expect("the VM is protected");
            let last = item.replication.last_point.expect("there is a recovery point");
            let read = move |control: std::sync::Arc<mainstay_control::Control>| async move {
                control.store.point(item.id.0, last.0).await
            };
            let point = match world.ask(read).await {
                Err(StoreError::NoPoint(_)) => None,
                point => Some(point.expect("the catalogue is read")),
            };
            let is_there = point.is_some();
            *found.lock().expect("nobody panics here") = point.map(|point| (item.replication, point));
            is_there
        })
        .await;
        let found = found.into_inner().expect("nobody panics here");
        let (replication, point) = found.expect("it was waited for");
        (replication, point.time_ms.cast_signed())
    }

    /// The alarm is raised exactly when the newest recovery point is older than three copy frequencies and half a minute.
    pub async fn check_alarm(&self, name: &str) {
        let item = self.item(name).await.expect("the VM is protected");
        let home = item.primary_provider;
        let policy = self.ask(move |control| async move { control.policy(&item.policy).await }).await;
        let frequency_ms = i64::from(policy.expect("the policy").policy.copy_frequency_seconds) * 1_000;
        loop {
            self.cycle_in_a_moment(name).await;
            assert!(!self.has_alarm(name).await, "'{name}' has a new recovery point and an alarm");
            // From here on there is no newer one, whatever the clock says.
            self.network.cut(home);
            let (_, taken_ms) = self.last_point(name).await;
            let captured_ms = self.oracle.captured_ms(taken_ms).expect("every point comes from a capture");
            let breached_ms = captured_ms + 3 * frequency_ms + 30_000;
            self.clock.advance_ms(breached_ms - mainstay_control::Clock::now_ms(&*self.clock));
            let is_early = self.has_alarm(name).await;
            self.clock.advance_ms(1);
            let is_raised = self.has_alarm(name).await;
            let is_newest = self.last_point(name).await.1 == taken_ms;
            self.network.mend(home);
            self.until("the host is connected", async |world| world.control().sites.is_connected(home)).await;
            // Otherwise a cycle whose answer was on its way when the network was cut has ended in between.
            if is_newest {
                assert!(!is_early, "the alarm of '{name}' is early");
                assert!(is_raised, "the alarm of '{name}' is late");
                break;
            }
        }
        self.cycle(name).await;
        assert!(!self.has_alarm(name).await, "'{name}' has a new recovery point and keeps its alarm");
    }

    /// A cycle in which the clock does not go on: when in it the capture was, only the host's clock says, which may be wrong.
    async fn cycle_in_a_moment(&self, name: &str) {
        loop {
            self.cycle(name).await;
            let item = self.item(name).await.expect("the VM is protected");
            if item.replication.last_cycle_length_ms == 0 {
                return;
            }
        }
    }

    async fn has_alarm(&self, name: &str) -> bool {
        let item: ItemRecord = self.item(name).await.expect("the VM is protected");
        let health = self.ask(move |control| async move { control.item_health(&item).await }).await;
        let (_, errors, _) = health.expect("the health is read");
        errors.iter().any(|error| error.code == "RpoExceeded")
    }

    /// Whatever nothing needs goes, if nothing comes in between: what is garbage now is gone, or needed, after a few passes
    /// of maintenance.
    pub async fn check_garbage(&self) {
        let garbage = std::sync::Mutex::new(self.unreferenced().await);
        self.until("what nothing needs is gone from the store", async |world| {
            world.clock.advance_ms(LOOK_MS);
            world.control().changed.notify_waiters();
            let left = world.unreferenced().await;
            let mut garbage = garbage.lock().expect("nobody panics here");
            garbage.retain(|path| left.contains(path));
            tracing::debug!(?garbage, "what nothing needs");
            garbage.is_empty()
        })
        .await;
    }

    /// Objects of replicas that a scrub, which reads everything that is referred to, does not read. Manifests are not among
    /// them: how many are kept goes by the storage's own clock.
    async fn unreferenced(&self) -> BTreeSet<Path> {
        // Before the scrub: what is committed meanwhile is read by it.
        let objects = self.storage.objects();
        self.storage.record_reads();
        self.ask(|control| async move {
            for replica in control.store.replicas().await.expect("replicas are listed") {
                match control.store.scrub(replica, ScrubOptions::default()).await {
                    Ok(report) => assert!(report.damage.is_empty(), "{report:?}"),
                    Err(StoreError::Deleted(_) | StoreError::NoReplica(_)) => {}
                    Err(error) => panic!("a replica cannot be read: {error}"),
                }
            }
        })
        .await;
        let read = self.storage.take_reads();
        let mut unreferenced = BTreeSet::new();
        for path in objects {
            let is_kept = matches!(
                path.as_ref().split('/').collect::<Vec<_>>()[..],
                [_, "catalogue" | "keyring", ..] | [_, _, "manifest", _]
            );
            if !is_kept && !read.contains(&path) {
                unreferenced.insert(path);
            }
        }
        unreferenced
    }
}
