//! The vault's second copy, in the replica store: what is needed to make use of the recovery points there should the database
//! be lost, or be replaced by an older one.
//!
//! Each item is a document of its own, with the job that has it, so that a job goes on in a database that never heard of it;
//! everything else that people have set up is one document. They are written a moment after the database, which is the
//! truth as long as it is not older than they are: the database counts its writes, and each document says how many there
//! were. What has a job is also written before each of its steps does anything: a log that did not know of a step would not
//! undo it. What is not in it: history (ended jobs, events, the audit trail) and who may sign in.
//!
//! A third document names the server process that looks after the store. A second server over the same store, started from a
//! copy of the first one's database, takes its place; the first finds that out and stops.

use std::collections::{HashMap, HashSet};

use mainstay_model::{Ending, Health, ItemId};
use mainstay_store::{Consistency, StoreError};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest as _, Sha256};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    Control, ControlError,
    app::{ProviderRecord, RecoveryPlanRecord, VaultRecord},
    db::{ItemRecord, JobError, JobRecord, JobState, ReplicationRecord, StoredResource},
    workflows::point_time_ms,
};

/// Folder of the items' documents.
const ITEMS: &str = "items";
/// Document of everything else.
const RESOURCES: &str = "resources";
/// Document of the server that looks after the store.
const SERVER: &str = "server";
/// Items written in one pass, so that a first one over thousands does not keep the disk from everybody else.
const ITEMS_PER_PASS: usize = 50;
/// How often an item is read again that changes while its job is read.
const READS_MAX: usize = 10;
/// How often the server looks whether another one has taken its place: as long as both may look after the store. What either
/// commits meanwhile is decided by the store and by the agents, each of which has one of them to talk to.
const SERVER_CHECK_MS: i64 = 5_000;

/// An item as it is kept.
#[derive(Serialize, Deserialize)]
struct CataloguedItem {
    /// How often items had been written in the database: one that has seen fewer writes does not know this.
    writes: i64,
    /// How often this one had been.
    version: i64,
    item: ItemRecord,
    /// The job that has it.
    job: Option<JobRecord>,
}

impl CataloguedItem {
    /// Tells one state from another, however often it was written.
    fn sum(&self) -> Result<Sum, ControlError> {
        Ok(Sha256::digest(write(&(&self.item, &self.job))?).into())
    }
}

/// What became of what was to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Catalogued {
    /// It is there anew.
    Written,
    /// It was there.
    Known,
    /// It is gone, or changes too fast for this pass.
    Left,
    /// The store is another server's.
    Superseded,
}

/// What people have set up.
#[derive(Serialize, Deserialize)]
struct CataloguedResources {
    /// How often resources had been written in the database.
    writes: i64,
    resources: Vec<StoredResource>,
    /// Jobs of recovery plans that are not over.
    plan_jobs: Vec<JobRecord>,
}

#[derive(Serialize, Deserialize)]
struct CataloguedServer {
    id: Uuid,
}

type Sum = [u8; 32];

/// What this process knows of the catalogue.
pub(crate) struct Catalogue {
    server: Uuid,
    /// Another server has taken this one's place.
    superseded: CancellationToken,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// By item, the version that was last looked at (`None` = not by this process) and what is in the store.
    items: HashMap<ItemId, (Option<i64>, Sum)>,
    resources: Option<(i64, Sum)>,
    checked_ms: Option<i64>,
    /// Whether this server's name is in the store.
    is_claimed: bool,
}

impl Default for Catalogue {
    fn default() -> Self {
        Self { server: Uuid::new_v4(), superseded: CancellationToken::new(), known: Mutex::default() }
    }
}

impl Catalogue {
    /// Whether another server has taken this one's place.
    pub(crate) fn is_superseded(&self) -> bool {
        self.superseded.is_cancelled()
    }
}

/// What a database took from the store's catalogue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Adoption {
    /// Whether fabrics, hosts, policies and the like were older or not there.
    pub resources: bool,
    /// Names of the items that were older or not there.
    pub items: Vec<String>,
    /// Names of the items that had been removed since.
    pub removed: Vec<String>,
    /// What could not be read, for people.
    pub damaged: Vec<String>,
}

impl Adoption {
    /// Whether the database had everything.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

fn read<T: DeserializeOwned>(document: &[u8]) -> Result<T, String> {
    serde_json::from_slice(document).map_err(|error| error.to_string())
}

/// Reads a document as each kind of the catalogue: for fuzzing.
pub(crate) fn read_any(document: &[u8]) {
    let kinds = [
        read::<CataloguedItem>(document).map(|known| write(&known).is_ok()),
        read::<CataloguedResources>(document).map(|known| write(&known).is_ok()),
        read::<CataloguedServer>(document).map(|known| write(&known).is_ok()),
    ];
    assert!(!kinds.contains(&Ok(false)), "what was read can be written");
}

fn write(document: &impl Serialize) -> Result<Vec<u8>, ControlError> {
    serde_json::to_vec(document)
        .map_err(|error| ControlError::Conflict(format!("the catalogue cannot be written: {error}")))
}

fn name_of(item: ItemId) -> String {
    format!("{ITEMS}/{item}")
}

/// Without what changes with every cycle, and is seen again soon enough.
fn lasting(item: &ItemRecord) -> ItemRecord {
    let mut item = item.clone();
    item.replication = ReplicationRecord::default();
    item.version = 0;
    for copy in item.recovery_vm.iter_mut().chain(&mut item.test_vm) {
        copy.bytes_done = 0;
        copy.bytes_total = 0;
    }
    item
}

fn lasting_resource(mut resource: StoredResource) -> StoredResource {
    if resource.is::<ProviderRecord>()
        && let Ok(mut provider) = serde_json::from_value::<ProviderRecord>(resource.document.clone())
    {
        provider.discovery = None;
        provider.discovered_ms = None;
        provider.last_seen_ms = provider.registered_ms;
        if let Ok(document) = serde_json::to_value(provider) {
            resource.document = document;
        }
    }
    resource
}

impl Control {
    /// Returns when another server has taken this one's place at the store.
    pub async fn superseded(&self) {
        self.catalogue.superseded.cancelled().await;
    }

    /// Brings the database up to what the store remembers, and takes the store over. Before anything else runs.
    /// `is_rebuild` takes the store's word also where the database knows better, and whoever's vault it is.
    ///
    /// # Errors
    /// [`ControlError::Conflict`] when the store belongs to another vault.
    pub async fn adopt_catalogue(&self, is_rebuild: bool) -> Result<Adoption, ControlError> {
        let mut adoption = Adoption::default();
        self.adopt_resources(is_rebuild, &mut adoption).await?;
        let mut found = Vec::new();
        for name in self.store.documents(ITEMS).await? {
            match self.document::<CataloguedItem>(&name).await? {
                Ok(Some(item)) => {
                    // What is there need not be written again.
                    let known = (None, item.sum()?);
                    self.catalogue.known.lock().await.items.insert(item.item.id, known);
                    found.push(item);
                }
                Ok(None) => {}
                Err(what) => adoption.damaged.push(what),
            }
        }
        self.remove_gone_items(&found, &mut adoption).await?;
        let (seen, newest) =
            (self.db.item_writes().await?, found.iter().map(|one| one.writes).max().unwrap_or_default());
        for one in found {
            let is_news = is_rebuild || one.writes > seen;
            self.adopt_item(one, is_news, is_rebuild, &mut adoption).await?;
        }
        self.db.note_item_writes(newest).await?;
        match self.claim_store(&mut *self.catalogue.known.lock().await).await {
            // A store that something else has filled can still be read, and people must be told: it is claimed when there is
            // space again, and before anything is written.
            Err(ControlError::Store(error @ StoreError::Full)) => {
                tracing::error!(%error, "the replica store could not be claimed yet: make space");
            }
            claimed => claimed?,
        }
        if !adoption.is_empty() {
            let text = format!(
                "the database was older than the replica store: taken from there were {}the items {:?}; removed were {:?}; \
                 unreadable was {:?}",
                if adoption.resources { "fabrics, hosts, policies and plans, " } else { "" },
                adoption.items,
                adoption.removed,
                adoption.damaged
            );
            let severity = if adoption.damaged.is_empty() { Health::Warning } else { Health::Critical };
            let event =
                self.event("VaultHealth", "VaultRebuilt", severity, text, String::new(), String::new());
            self.record_event(event).await?;
        }
        Ok(adoption)
    }

    /// Reads a document; the inner error is damage, for people.
    async fn document<T: DeserializeOwned>(
        &self,
        name: &str,
    ) -> Result<Result<Option<T>, String>, ControlError> {
        let bytes = match self.store.document(name).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(Ok(None)),
            Err(error @ StoreError::Damaged { .. }) => return Ok(Err(error.to_string())),
            Err(error) => return Err(error.into()),
        };
        Ok(read(&bytes).map(Some).map_err(|error| format!("{name}: {error}")))
    }

    async fn adopt_resources(&self, is_rebuild: bool, adoption: &mut Adoption) -> Result<(), ControlError> {
        let found = match self.document::<CataloguedResources>(RESOURCES).await? {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(()),
            Err(what) => {
                adoption.damaged.push(what);
                return Ok(());
            }
        };
        let theirs = found.resources.iter().find(|resource| resource.is::<VaultRecord>());
        let theirs = theirs.and_then(|vault| serde_json::from_value(vault.document.clone()).ok());
        let ours: Vec<VaultRecord> = self.db.resources().await?;
        if let (Some(theirs), Some(ours), false) = (&theirs, ours.first(), is_rebuild)
            && VaultRecord::id(theirs) != ours.id()
        {
            return Err(ControlError::Conflict(format!(
                "the replica store belongs to the vault {}, and the database to {}: choose another store directory, or take \
                 over what is there with `mainstay vault rebuild`",
                theirs.id(),
                ours.id()
            )));
        }
        if !is_rebuild && found.writes <= self.db.resource_writes().await? {
            return Ok(());
        }
        let mut transaction = self.db.begin().await?;
        for job in &found.plan_jobs {
            transaction.put_job(job).await?;
        }
        transaction.replace_catalogued_resources(&found.resources, found.writes).await?;
        transaction.commit().await?;
        adoption.resources = true;
        self.forget_lost_plan_jobs().await
    }

    /// A plan whose job nobody remembers is free again.
    async fn forget_lost_plan_jobs(&self) -> Result<(), ControlError> {
        for mut plan in self.db.resources::<RecoveryPlanRecord>().await? {
            let Some(running) = plan.running else { continue };
            if self.db.job(running).await?.is_none() {
                plan.running = None;
                let mut transaction = self.db.begin().await?;
                transaction.put_resource(&plan).await?;
                transaction.commit().await?;
            }
        }
        Ok(())
    }

    /// Items of an older database whose protection has ended since: their replica says so.
    async fn remove_gone_items(
        &self,
        found: &[CataloguedItem],
        adoption: &mut Adoption,
    ) -> Result<(), ControlError> {
        let kept: HashSet<_> = found.iter().map(|one| one.item.id).collect();
        for item in self.db.items().await?.iter() {
            // A document may be left by a server that ended before it removed it. With a job, it is left by one that ended in the
            // middle of the job, which goes on.
            if kept.contains(&item.id) && item.state.running.is_some() {
                continue;
            }
            if !matches!(self.store.head(item.id.0).await, Err(StoreError::Deleted(_))) {
                continue;
            }
            self.end_lost_jobs(item, None).await?;
            let mut transaction = self.db.begin().await?;
            transaction.remove_item(item.id).await?;
            transaction.commit().await?;
            adoption.removed.push(item.name.clone());
        }
        Ok(())
    }

    async fn adopt_item(
        &self,
        found: CataloguedItem,
        is_news: bool,
        is_rebuild: bool,
        adoption: &mut Adoption,
    ) -> Result<(), ControlError> {
        let CataloguedItem { version, mut item, job, .. } = found;
        match self.db.item(item.id).await? {
            Some(present) if !is_news || (present.version >= version && !is_rebuild) => return Ok(()),
            // The database saw it go, and the process died before its document went.
            None if !is_news => return Ok(self.store.remove_document(&name_of(item.id)).await?),
            _ => {}
        }
        match self.store.replica(item.id.0).await {
            // It was removed, and its document was about to be.
            Err(StoreError::Deleted(_)) => return Ok(self.store.remove_document(&name_of(item.id)).await?),
            Ok(replica) => {
                // Raised in the moment in which the database was lost.
                item.state.generation.0 = item.state.generation.0.max(replica.generation);
            }
            // Nothing has been replicated yet, or nothing of it can be read; the item tells what there should be.
            Err(StoreError::NoReplica(_)) => {}
            Err(error @ StoreError::Damaged { .. }) => {
                adoption.damaged.push(format!("{}: {error}", item.name));
            }
            Err(error) => return Err(error.into()),
        }
        item.replication = self.seen_replication(&item).await?;
        // A job that nobody remembers cannot have the item.
        if job.is_none() {
            item.state.running = None;
        }
        self.end_lost_jobs(&item, job.as_ref()).await?;
        let mut transaction = self.db.begin().await?;
        if let Some(job) = &job {
            transaction.put_job(job).await?;
        }
        transaction.adopt_item(&item, version).await?;
        transaction.commit().await?;
        adoption.items.push(item.name);
        Ok(())
    }

    /// What the recovery points themselves tell of an item's replication.
    async fn seen_replication(&self, item: &ItemRecord) -> Result<ReplicationRecord, ControlError> {
        let points = match self.store.points(item.id.0).await {
            Ok(points) => points,
            Err(StoreError::NoReplica(_) | StoreError::Damaged { .. }) => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        let newest = points.last();
        let is_app = |point: &&mainstay_store::PointInfo| point.consistency == Consistency::App;
        Ok(ReplicationRecord {
            last_point: newest.map(|point| mainstay_model::PointId(point.id)),
            last_point_ms: newest.map(point_time_ms),
            last_app_point_ms: points.iter().rev().find(is_app).map(point_time_ms),
            ..ReplicationRecord::default()
        })
    }

    /// Ends the open jobs of an older database that the item has left behind since.
    async fn end_lost_jobs(&self, item: &ItemRecord, kept: Option<&JobRecord>) -> Result<(), ControlError> {
        for mut job in self.db.open_jobs().await? {
            if job.item != item.id || kept.is_some_and(|kept| kept.id == job.id) {
                continue;
            }
            job.state = JobState::Ended(Ending::Failed);
            job.ended_ms = Some(self.clock.now_ms());
            let error = JobError::new(
                "VaultRebuilt",
                "how the job ended is not known: the vault's database was replaced by an older one",
                "See the item's state, which is what the replica store remembers of it.",
            );
            if let Some(step) = job.steps.last_mut() {
                step.errors.push(error);
            }
            let mut transaction = self.db.begin().await?;
            transaction.put_job(&job).await?;
            transaction.commit().await?;
        }
        Ok(())
    }

    /// Writes down what has changed.
    pub async fn reconcile_catalogue(&self) -> Result<(), ControlError> {
        if self.catalogue.is_superseded() {
            return Ok(());
        }
        {
            let mut known = self.catalogue.known.lock().await;
            // One of the future was done before the clock was set back.
            let is_due = |checked_ms| !(0..SERVER_CHECK_MS).contains(&(self.clock.now_ms() - checked_ms));
            if known.checked_ms.is_none_or(is_due) && self.is_superseded(&mut known).await? {
                return Ok(());
            }
            self.catalogue_resources(&mut known).await?;
        }
        let items = self.db.items().await?;
        let mut written = 0;
        for item in items.iter() {
            // Taken anew for each: a job waits for this before it goes on.
            let mut known = self.catalogue.known.lock().await;
            let version = known.items.get(&item.id).and_then(|(version, _)| *version);
            if item.state.running.is_none() && version == Some(item.version) {
                continue;
            }
            // Thousands of items must not hold up whoever waits for this thread.
            tokio::task::consume_budget().await;
            if written < ITEMS_PER_PASS && self.catalogue_item(item, &mut known).await? == Catalogued::Written
            {
                written += 1;
            }
        }
        let mut known = self.catalogue.known.lock().await;
        // Read while nothing is added: an item that is younger than the list above is not gone.
        let present: HashSet<_> = self.db.items().await?.iter().map(|item| item.id).collect();
        let gone: Vec<_> = known.items.keys().filter(|id| !present.contains(id)).copied().collect();
        for id in gone {
            self.store.remove_document(&name_of(id)).await?;
            known.items.remove(&id);
        }
        Ok(())
    }

    /// Writes down a job that is about to do something, before it does: should the database be lost in the middle of it, the job
    /// is known, and how far it may have come.
    pub(crate) async fn catalogue_ahead(&self, job: &JobRecord) -> Result<(), ControlError> {
        let mut known = self.catalogue.known.lock().await;
        let catalogued = match job.plan {
            Some(_) => self.catalogue_resources(&mut known).await?,
            None => self.catalogue_item(&self.item(job.item).await?, &mut known).await?,
        };
        match catalogued {
            Catalogued::Written | Catalogued::Known => Ok(()),
            Catalogued::Left => Err(ControlError::Conflict(format!(
                "'{}' changed too often while it was written to the store's catalogue",
                job.item_name
            ))),
            Catalogued::Superseded => Err(ControlError::Conflict(
                "another server has taken over the replica store: this one does nothing more".to_owned(),
            )),
        }
    }

    /// Whether another server has taken this one's place. Looked at before each write, too: what a server writes that has lost
    /// the store would be taken for news.
    async fn is_superseded(&self, known: &mut Known) -> Result<bool, ControlError> {
        if !known.is_claimed {
            // Whose name is there is the one whose place this server takes.
            self.claim_store(known).await?;
            return Ok(false);
        }
        let server = self.document::<CataloguedServer>(SERVER).await?;
        known.checked_ms = Some(self.clock.now_ms());
        match server {
            Ok(Some(server)) if server.id != self.catalogue.server => {
                tracing::error!("another server has taken over the replica store: this one stops");
                self.catalogue.superseded.cancel();
                Ok(true)
            }
            Ok(Some(_)) => Ok(false),
            // Removed or damaged: nobody claims the store.
            Ok(None) | Err(_) => {
                self.claim_store(known).await?;
                Ok(false)
            }
        }
    }

    /// Takes the store over.
    async fn claim_store(&self, known: &mut Known) -> Result<(), ControlError> {
        let server = CataloguedServer { id: self.catalogue.server };
        self.store.put_document(SERVER, &write(&server)?).await?;
        known.is_claimed = true;
        Ok(())
    }

    async fn catalogue_item(&self, item: &ItemRecord, known: &mut Known) -> Result<Catalogued, ControlError> {
        let Some((item, mut job)) = self.item_with_job(item).await? else { return Ok(Catalogued::Left) };
        for step in job.iter_mut().flat_map(|job| &mut job.steps) {
            step.progress = mainstay_provider::Progress::default();
        }
        let mut found = CataloguedItem { writes: 0, version: 0, item: lasting(&item), job };
        let sum = found.sum()?;
        let is_new = known.items.get(&item.id).is_none_or(|(_, before)| *before != sum);
        if is_new {
            if self.is_superseded(known).await? {
                return Ok(Catalogued::Superseded);
            }
            // After reading the item: at least as many as made it what it is.
            found.writes = self.db.item_writes().await?;
            found.version = item.version;
            self.store.put_document(&name_of(item.id), &write(&found)?).await?;
        }
        known.items.insert(item.id, (Some(item.version), sum));
        Ok(if is_new { Catalogued::Written } else { Catalogued::Known })
    }

    /// An item and the job that has it, as they were at one moment: a step that the job says was done has changed the item.
    /// `None` when the item is gone, or changes too fast for this pass.
    async fn item_with_job(
        &self,
        item: &ItemRecord,
    ) -> Result<Option<(ItemRecord, Option<JobRecord>)>, ControlError> {
        let mut item = item.clone();
        for _ in 0..READS_MAX {
            let job = match item.state.running {
                Some(running) => self.db.job(running.job).await?,
                None => None,
            };
            let Some(now) = self.db.item(item.id).await? else { return Ok(None) };
            if now.version == item.version {
                return Ok(Some((item, job)));
            }
            item = ItemRecord::clone(&now);
        }
        Ok(None)
    }

    async fn catalogue_resources(&self, known: &mut Known) -> Result<Catalogued, ControlError> {
        let before = self.db.resource_writes().await?;
        let plans: Vec<RecoveryPlanRecord> = self.db.resources().await?;
        let running: Vec<_> = plans.iter().filter_map(|plan| plan.running).collect();
        if running.is_empty() && known.resources.is_some_and(|(seen, _)| seen == before) {
            return Ok(Catalogued::Known);
        }
        let mut plan_jobs = Vec::new();
        for job in running {
            plan_jobs.extend(self.db.job(job).await?);
        }
        for step in plan_jobs.iter_mut().flat_map(|job| &mut job.steps) {
            step.progress = mainstay_provider::Progress::default();
        }
        let resources = self.db.catalogued_resources().await?.into_iter().map(lasting_resource).collect();
        let mut found = CataloguedResources { writes: 0, resources, plan_jobs };
        let sum: Sum = Sha256::digest(write(&found)?).into();
        let is_new = known.resources.is_none_or(|(_, known)| known != sum);
        if is_new {
            if self.is_superseded(known).await? {
                return Ok(Catalogued::Superseded);
            }
            found.writes = self.db.resource_writes().await?;
            self.store.put_document(RESOURCES, &write(&found)?).await?;
        }
        // Before reading: what was written meanwhile is looked at next time.
        known.resources = Some((before, sum));
        Ok(if is_new { Catalogued::Written } else { Catalogued::Known })
    }
}
