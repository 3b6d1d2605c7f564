//! The control plane.
//!
//! * [`app`]: what can be asked for, one file per resource: authorise nothing, decide by the model, write once.
//! * [`jobs`]: the engine that carries out what takes more than one request.
//! * [`workflows`]: the jobs' steps, one file per operation.
//! * [`reconcilers`]: what must stay true without anybody asking.
//! * [`alerts`]: mails about events.
//! * `catalogue`: the copy of the vault's state in the replica store.
//! * [`db`]: the only module that knows SQL.
//!
//! It knows sites only as [`mainstay_provider::Site`] and nothing of HTTP.

pub mod alerts;
pub mod app;
mod catalogue;
mod clock;
pub mod db;
mod error;
#[doc(hidden)]
pub mod fuzzing;
pub mod jobs;
pub mod reconcilers;
mod sites;
pub mod workflows;

use std::{panic::AssertUnwindSafe, sync::Arc};

use futures::FutureExt as _;
use mainstay_model::{Health, ItemId};
use mainstay_store::Store;
use uuid::Uuid;

pub use catalogue::Adoption;
pub use clock::{Clock, ManualClock, SystemClock};
pub use error::ControlError;
pub use sites::SiteDirectory;

use db::{Db, DbError, EventRecord, ItemRecord};
use jobs::Engine;

/// What a future comes to, or the words of its panic: a mistake of ours in one job must not leave it without an end, nor stop what
/// looks after all the others.
pub(crate) async fn caught<T>(work: impl Future<Output = T>) -> Result<T, String> {
    AssertUnwindSafe(work).catch_unwind().await.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic".to_owned())
    })
}

/// What every part of the control plane works with.
pub struct Control {
    /// The database.
    pub db: Db,
    /// The replica store.
    pub store: Arc<Store>,
    /// The agents that are connected now.
    pub sites: SiteDirectory,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// The job engine.
    pub engine: Engine,
    /// Wakes the reconcilers when something changed that they care about.
    pub changed: tokio::sync::Notify,
    /// The health that was last told, by item. Lost at a restart: the present health is then told again if it is bad.
    health_told: std::sync::Mutex<std::collections::HashMap<ItemId, Health>>,
    /// The directory whose programs recovery plans may run; without it they run none.
    pub scripts: std::sync::OnceLock<std::path::PathBuf>,
    /// The vault's name, where metrics tell several vaults apart.
    pub vault_name: std::sync::OnceLock<String>,
    /// Replication cycles under way.
    pub cycles: reconcilers::Cycles,
    /// Scrubs under way.
    pub scrubs: reconcilers::Scrubs,
    /// What becomes of copies that run although another one is active. Set once, before the reconcilers run.
    pub old_copies: std::sync::OnceLock<reconcilers::OldCopies>,
    catalogue: catalogue::Catalogue,
}

impl Control {
    /// Puts the parts together; nothing runs yet.
    pub fn new(db: Db, store: Arc<Store>, clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self {
            db,
            store,
            sites: SiteDirectory::default(),
            clock,
            engine: Engine::default(),
            health_told: std::sync::Mutex::default(),
            changed: tokio::sync::Notify::new(),
            scripts: std::sync::OnceLock::new(),
            old_copies: std::sync::OnceLock::new(),
            vault_name: std::sync::OnceLock::new(),
            cycles: reconcilers::Cycles::default(),
            scrubs: reconcilers::Scrubs::default(),
            catalogue: catalogue::Catalogue::default(),
        })
    }

    /// Reads an item or says that it does not exist.
    pub async fn item(&self, id: ItemId) -> Result<ItemRecord, ControlError> {
        self.db.item(id).await?.ok_or_else(|| ControlError::not_found("replicated item", id.to_string()))
    }

    /// Changes an item in one transaction: reads it, lets `change` decide, writes it.
    pub async fn change_item<R>(
        &self,
        id: ItemId,
        change: impl FnOnce(&mut ItemRecord) -> Result<R, ControlError> + Send,
    ) -> Result<R, ControlError> {
        let mut transaction = self.db.begin().await?;
        let mut item = transaction
            .item(id)
            .await?
            .ok_or_else(|| ControlError::not_found("replicated item", id.to_string()))?;
        let before = item.clone();
        let result = change(&mut item)?;
        if item != before {
            transaction.update_item(&item).await?;
            transaction.commit().await?;
        }
        Ok(result)
    }

    /// An event about an item, with the time of now.
    pub fn item_event(
        &self,
        item: &ItemRecord,
        code: &str,
        severity: Health,
        description: String,
    ) -> EventRecord {
        self.event("VmHealth", code, severity, description, item.vm_name.clone(), item.fabric.clone())
    }

    /// An event, with the time of now.
    pub fn event(
        &self,
        kind: &str,
        code: &str,
        severity: Health,
        description: String,
        affected_object: String,
        fabric: String,
    ) -> EventRecord {
        EventRecord {
            id: Uuid::now_v7().to_string(),
            time_ms: self.clock.now_ms(),
            code: code.to_owned(),
            kind: kind.to_owned(),
            severity,
            description,
            affected_object,
            fabric,
        }
    }

    /// Records an event.
    pub async fn record_event(&self, event: EventRecord) -> Result<(), DbError> {
        match event.severity {
            Health::Critical => {
                tracing::error!(code = event.code, object = event.affected_object, "{}", event.description);
            }
            Health::Warning => {
                tracing::warn!(code = event.code, object = event.affected_object, "{}", event.description);
            }
            Health::Normal => {
                tracing::info!(code = event.code, object = event.affected_object, "{}", event.description);
            }
        }
        let mut transaction = self.db.begin().await?;
        transaction.add_event(&event).await?;
        transaction.commit().await
    }
}
