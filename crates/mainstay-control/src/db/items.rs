//! Replicated items as stored.

use mainstay_model::{CycleError, Generation, ItemId, ItemState, Location, PointId, ProviderId, VmId};
use mainstay_provider::{Disk, NicPlan};
use serde::{Deserialize, Serialize};
use sqlx::Row as _;
use uuid::Uuid;

use super::{Db, DbError, Transaction, decode, encode};

/// A replicated item. What is state by the model's rules is in `state`; the rest is configuration, identities of
/// what was made for it, and evidence of what was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ItemRecord {
    /// Identifier, also the replica's in the store.
    pub id: ItemId,
    /// Name of the resource, chosen by the client.
    pub name: String,
    /// Name of the VM when last seen.
    pub vm_name: String,
    /// The fabric that protects it.
    pub fabric: String,
    /// The agent at home.
    pub primary_provider: ProviderId,
    /// The fabric that it is recovered in.
    pub recovery_fabric: String,
    /// The agent there.
    pub recovery_provider: ProviderId,
    /// The VM at home.
    pub vm: VmId,
    /// Whether its host started it by itself before it was protected.
    #[serde(default)]
    pub autostart: bool,
    /// The host that was home before a failback to another one that is not committed yet.
    #[serde(default)]
    pub former_home: Option<ProviderId>,
    /// Hosts that were home before failbacks to others. What is left there is old.
    #[serde(default)]
    pub given_up: Vec<ProviderId>,
    /// The replication policy's name.
    pub policy: String,
    /// The model's state.
    pub state: ItemState,
    /// All disks of the VM; position among the included ones = index in the store.
    pub disks: Vec<DiskRecord>,
    /// What the recovery VM shall be.
    pub target: TargetRecord,
    /// The recovery VM, from the failover until the commit of the failback.
    pub recovery_vm: Option<VmCopy>,
    /// The test copy.
    pub test_vm: Option<VmCopy>,
    /// The last failover.
    pub failover: Option<FailoverRecord>,
    /// Hosts that must be told that they are no longer the active side, one line each.
    #[serde(default)]
    pub stand_downs: Vec<StandDownRecord>,
    /// The host on which a copy that is not the active one runs, where such a copy is reported and not stopped.
    #[serde(default)]
    pub old_copy: Option<ProviderId>,
    /// The host that has booted and could not start the VM, and why.
    #[serde(default)]
    pub not_started: Option<(ProviderId, String)>,
    /// How replication goes.
    pub replication: ReplicationRecord,
    /// What was found when its replica was read through.
    #[serde(default)]
    pub scrub: ScrubRecord,
    /// When it was created, milliseconds since the Unix epoch; so all times here.
    pub created_ms: i64,
    /// When a failover last succeeded.
    pub last_failover_ms: Option<i64>,
    /// When a test failover was last cleaned up.
    pub last_test_failover_ms: Option<i64>,
    /// Codes of health errors that somebody has seen and wants out of sight.
    #[serde(default)]
    pub resolved_errors: Vec<String>,
    /// Counts writes; managed by the database.
    pub version: i64,
}

/// A disk of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// The disk's key on the host.
    pub key: String,
    /// Virtual size in bytes when last seen.
    pub size_bytes: u64,
    /// Image format, for people.
    pub format: String,
    /// Whether the VM boots from it.
    pub is_os_disk: bool,
    /// Whether it is replicated.
    pub is_included: bool,
}

impl DiskRecord {
    /// A disk as its host describes it.
    pub fn of(disk: &Disk, is_included: bool) -> Self {
        Self {
            key: disk.key.clone(),
            size_bytes: disk.size_bytes,
            format: format!("{:?}", disk.format),
            is_os_disk: disk.is_os_disk,
            is_included,
        }
    }
}

/// What the recovery VM shall be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetRecord {
    /// Its name.
    pub name: String,
    /// Virtual processors; `None` = as at home.
    pub vcpus: Option<u32>,
    /// Memory in bytes; `None` = as at home.
    pub memory_bytes: Option<u64>,
    /// The network after a failover, for adapters that say nothing else.
    pub network: Option<String>,
    /// The network of test copies; `None` = an isolated one of their own.
    pub test_network: Option<String>,
    /// What becomes of each adapter.
    pub nics: Vec<NicPlan>,
}

/// A VM that was made from a recovery point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmCopy {
    /// Its identifier at the recovery site.
    pub vm: VmId,
    /// The point it was made from.
    pub point: PointId,
    /// The moment that the point shows.
    pub taken_at_ms: i64,
    /// Whether its disks no longer need the store.
    pub is_hydrated: bool,
    /// Bytes copied out of the store.
    pub bytes_done: u64,
    /// Bytes to copy in all; 0 = not known yet.
    pub bytes_total: u64,
}

/// What is known about the last failover.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailoverRecord {
    /// Seconds between the moment of the point and the failover: what may be lost. 0 = nothing.
    pub loss_seconds: i64,
    /// Bytes that may be lost, estimated from the recent rate of change; `None` = not known.
    pub loss_bytes: Option<u64>,
    /// When the request was accepted.
    pub requested_ms: i64,
    /// When the recovery VM had been started.
    pub started_ms: Option<i64>,
}

/// A side that must be told that it is no longer active.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandDownRecord {
    /// Its agent.
    pub provider: ProviderId,
    /// Its VM.
    pub vm: VmId,
    /// The generation that is active elsewhere.
    pub generation: Generation,
    /// Whether the item has nothing more to do with that host: its traces go too.
    #[serde(default)]
    pub is_final: bool,
    /// It had stood down, or had never been the active side, and its VM was found running.
    #[serde(default)]
    pub was_found_running: bool,
}

/// How replication goes: evidence, written by the replication reconciler alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicationRecord {
    /// The newest durable recovery point.
    pub last_point: Option<PointId>,
    /// The moment it shows, by the server's clock.
    pub last_point_ms: Option<i64>,
    /// The moment of the newest application-consistent one.
    pub last_app_point_ms: Option<i64>,
    /// When the last cycle began.
    pub last_cycle_ms: Option<i64>,
    /// How long the last successful cycle took, milliseconds.
    #[serde(default)]
    pub last_cycle_length_ms: i64,
    /// When the next one is due at the earliest, after failures.
    pub not_before_ms: Option<i64>,
    /// Failed cycles in a row.
    pub failures: u32,
    /// The error of the last cycle, if it failed.
    pub last_error: Option<CycleError>,
    /// Bytes changed, summed over all cycles.
    pub bytes_changed: u64,
    /// Bytes that went over the data connection, summed over all cycles.
    pub bytes_moved: u64,
    /// Bytes changed per second between the last two points.
    pub bytes_per_second: u64,
    /// Percent of the initial replication that is done.
    pub initial_percent: u32,
}

/// What scrubs of the replica found, and what became of it: evidence.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubRecord {
    /// When somebody asked for one that has not begun.
    pub requested_ms: Option<i64>,
    /// When the last complete one ended.
    pub finished_ms: Option<i64>,
    /// Objects it read.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Damaged objects that were put right from the store alone, in all scrubs so far.
    pub mended: u64,
    /// What is damaged still, the first of it.
    pub damage: Vec<DamageRecord>,
    /// Recovery points that cannot be read whole.
    pub damaged_points: Vec<PointId>,
    /// Blocks (first, end) per disk that the next cycle is to send again.
    pub resend: Vec<Vec<(u64, u64)>>,
    /// Nothing can be built on what the replica has: the next cycle begins anew.
    pub is_head_lost: bool,
    /// A cycle has sent them: what is damaged is to be looked at again.
    pub is_recheck_due: bool,
}

impl ScrubRecord {
    /// Whether the next cycle has something to put right.
    pub fn wants_repair(&self) -> bool {
        self.is_head_lost || self.resend.iter().any(|disk| !disk.is_empty())
    }
}

/// A damaged object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamageRecord {
    /// Its key in the store.
    pub key: String,
    /// What is wrong with it.
    pub what: String,
    /// The segment, if it is one.
    pub segment: Option<Uuid>,
    /// Recovery points that need it.
    pub points: usize,
}

impl ItemRecord {
    /// A host must be told that it is no longer the active side.
    pub fn order_stand_down(&mut self, order: StandDownRecord) {
        self.withdraw_stand_down(order.provider);
        self.stand_downs.push(order);
    }

    /// A host is the active side after all, or again.
    pub fn withdraw_stand_down(&mut self, provider: ProviderId) {
        self.stand_downs.retain(|order| order.provider != provider);
    }

    /// The host of the active side.
    pub fn active_provider(&self) -> ProviderId {
        match self.state.phase.active_location() {
            Location::Primary => self.primary_provider,
            Location::Recovery => self.recovery_provider,
        }
    }

    /// The copy of the VM that is active; `None` while the active side has none.
    pub fn active_vm(&self) -> Option<VmId> {
        match self.state.phase.active_location() {
            Location::Primary => Some(self.vm),
            Location::Recovery => self.recovery_vm.map(|copy| copy.vm),
        }
    }

    /// The copy at a host that must not run, because the active one is elsewhere.
    pub fn inactive_vm_at(&self, provider: ProviderId) -> Option<VmId> {
        match self.state.phase.active_location() {
            Location::Primary if provider == self.recovery_provider => self.recovery_vm.map(|copy| copy.vm),
            Location::Recovery if provider == self.primary_provider => Some(self.vm),
            _ => None,
        }
    }

    /// Keys of the replicated disks, in the order of the store.
    pub fn included_disks(&self) -> Vec<String> {
        self.disks.iter().filter(|disk| disk.is_included).map(|disk| disk.key.clone()).collect()
    }
}

impl Db {
    /// Reads an item.
    pub async fn item(&self, id: ItemId) -> Result<Option<ItemRecord>, DbError> {
        let row = sqlx::query("SELECT id, version, document FROM items WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.connections)
            .await?;
        row.map(|row| read(&row)).transpose()
    }
}

impl Transaction {
    /// Reads an item.
    pub async fn item(&mut self, id: ItemId) -> Result<Option<ItemRecord>, DbError> {
        let row = sqlx::query("SELECT id, version, document FROM items WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&mut self.inner)
            .await?;
        row.map(|row| read(&row)).transpose()
    }

    /// Adds an item; a second one of the same name or VM is a conflict.
    pub async fn insert_item(&mut self, item: &ItemRecord) -> Result<(), DbError> {
        let written = self.item_write().await?;
        let result = sqlx::query(
            "INSERT INTO items (id, name, fabric, vm, version, document, written) VALUES ($1, $2, $3, $4, 1, $5, $6)
             ON CONFLICT DO NOTHING",
        )
        .bind(item.id.to_string())
        .bind(item.name.to_lowercase())
        .bind(item.fabric.to_lowercase())
        .bind(item.vm.to_string())
        .bind(encode("item", &item.name, item)?)
        .bind(written)
        .execute(&mut self.inner)
        .await?;
        if result.rows_affected() == 0 {
            return Err(DbError::Conflict { kind: "item", key: item.name.clone() });
        }
        Ok(())
    }

    /// Writes an item that was read at `item.version`.
    pub async fn update_item(&mut self, item: &ItemRecord) -> Result<(), DbError> {
        let written = self.item_write().await?;
        let result = sqlx::query(
            "UPDATE items SET version = version + 1, document = $1, written = $2 WHERE id = $3 AND version = $4",
        )
        .bind(encode("item", &item.name, item)?)
        .bind(written)
        .bind(item.id.to_string())
        .bind(item.version)
        .execute(&mut self.inner)
        .await?;
        if result.rows_affected() == 0 {
            return Err(DbError::Conflict { kind: "item", key: item.name.clone() });
        }
        Ok(())
    }

    /// Counts an item as written that is as it was.
    pub(super) async fn touch_item(&mut self, id: ItemId) -> Result<(), DbError> {
        let written = self.item_write().await?;
        sqlx::query("UPDATE items SET version = version + 1, written = $1 WHERE id = $2")
            .bind(written)
            .bind(id.to_string())
            .execute(&mut self.inner)
            .await?;
        Ok(())
    }

    /// Writes an item in the place of whatever is there of it, as if it had been written `version` times.
    pub async fn adopt_item(&mut self, item: &ItemRecord, version: i64) -> Result<(), DbError> {
        self.remove_item(item.id).await?;
        self.insert_item(item).await?;
        sqlx::query("UPDATE items SET version = $1 WHERE id = $2")
            .bind(version)
            .bind(item.id.to_string())
            .execute(&mut self.inner)
            .await?;
        Ok(())
    }

    /// Removes an item.
    pub async fn remove_item(&mut self, id: ItemId) -> Result<(), DbError> {
        self.count_item_removal().await?;
        sqlx::query("DELETE FROM items WHERE id = $1").bind(id.to_string()).execute(&mut self.inner).await?;
        Ok(())
    }
}

pub(super) fn read(row: &sqlx::sqlite::SqliteRow) -> Result<ItemRecord, DbError> {
    let mut item: ItemRecord = decode("item", row.try_get("id")?, row.try_get("document")?)?;
    item.version = row.try_get("version")?;
    Ok(item)
}
