//! One replica's manifest: loading it and editing it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use uuid::Uuid;

use crate::manifest::Manifest;
use crate::storage::{Created, Storage};
use crate::{StoreError, keys};

/// Attempts against concurrent writers. Within one server there are none, so this is about other servers.
const EDIT_ATTEMPTS: usize = 16;

/// The manifest of a replica as this process last saw it.
#[derive(Debug)]
pub(crate) struct Replica {
    pub(crate) id: Uuid,
    current: RwLock<Option<Arc<Manifest>>>,
    edit: tokio::sync::Mutex<()>,
    /// A put failed in a way that may have left a manifest in storage that is not durable yet.
    unconfirmed: AtomicBool,
}

impl Replica {
    pub(crate) fn new(id: Uuid) -> Self {
        Self {
            id,
            current: RwLock::default(),
            edit: tokio::sync::Mutex::default(),
            unconfirmed: AtomicBool::new(false),
        }
    }

    fn cached(&self) -> Option<Arc<Manifest>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn remember(&self, manifest: Option<Arc<Manifest>>) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = manifest;
    }

    /// Forgets the cached manifest, so that the next use sees what other servers wrote.
    pub(crate) fn forget(&self) {
        self.remember(None);
    }

    /// The newest manifest; version 0 (never written) for a replica that does not exist.
    pub(crate) async fn load(&self, storage: &Storage) -> Result<Arc<Manifest>, StoreError> {
        if let Some(manifest) = self.cached() {
            return Ok(manifest);
        }
        let _guard = self.edit.lock().await;
        self.load_locked(storage).await
    }

    async fn load_locked(&self, storage: &Storage) -> Result<Arc<Manifest>, StoreError> {
        if let Some(manifest) = self.cached() {
            return Ok(manifest);
        }
        // A version found by the listing can be collected before it is read, but only when newer ones exist.
        for _ in 0..EDIT_ATTEMPTS {
            let listed = storage.list(&keys::manifests(self.id)).await?;
            let newest = listed.iter().filter_map(|object| keys::manifest_version(&object.location)).max();
            let manifest = match newest {
                None => Some(Manifest::new(self.id)),
                Some(version) => self.load_version(storage, version).await?,
            };
            if let Some(manifest) = manifest {
                let manifest = Arc::new(manifest);
                self.remember(Some(Arc::clone(&manifest)));
                return Ok(manifest);
            }
        }
        Err(StoreError::Busy)
    }

    async fn load_version(&self, storage: &Storage, version: u64) -> Result<Option<Manifest>, StoreError> {
        let key = keys::manifest(self.id, version);
        let Some(object) = storage.get_copies(&key).await? else { return Ok(None) };
        let manifest = Manifest::decode(&object, self.id, version);
        manifest.map(|(manifest, _)| Some(manifest)).map_err(|what| StoreError::damaged(&key, what))
    }

    /// Applies a change to the newest manifest and writes it as the next version. `change` may run several
    /// times, each time on a fresh copy. A change that changes nothing writes nothing.
    pub(crate) async fn edit<T>(
        &self,
        storage: &Storage,
        new_id: &(dyn Fn() -> Uuid + Send + Sync),
        mut change: impl FnMut(&mut Manifest) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let _guard = self.edit.lock().await;
        // The outcome of a change that is in storage but whose put did not end cleanly.
        let mut landed = None;
        for _ in 0..EDIT_ATTEMPTS {
            let base = self.load_locked(storage).await?;
            let mut next = (*base).clone();
            let outcome = match landed.take() {
                Some(outcome) => outcome,
                None => {
                    let outcome = change(&mut next)?;
                    next.prune();
                    if next == *base && !self.unconfirmed.load(Ordering::SeqCst) {
                        return Ok(outcome);
                    }
                    outcome
                }
            };
            next.version += 1;
            next.edit = new_id();
            next.check()
                .map_err(|what| StoreError::Internal(format!("refused to write a manifest: {what}")))?;
            let bytes = next.encode().map_err(StoreError::internal)?;
            let key = keys::manifest(self.id, next.version);
            // Whatever interrupts us from here on, the cache must not hide what may have been written, and
            // what may have been written is not yet known to be durable.
            self.forget();
            self.unconfirmed.store(true, Ordering::SeqCst);
            let written = storage.create_twice(&key, bytes.into()).await;
            if matches!(written, Ok(Created::Ours)) {
                self.unconfirmed.store(false, Ordering::SeqCst);
                self.remember(Some(Arc::new(next)));
                return Ok(outcome);
            }
            // Taken, or unknown: a retried request may have met its own first attempt. If the version is ours,
            // a clean put of the next one proves it durable: they share a directory.
            match self.load_version(storage, next.version).await {
                Ok(Some(there)) if there.edit == next.edit => landed = Some(outcome),
                Ok(_) => {
                    written?;
                }
                Err(error) => return Err(written.err().unwrap_or(error)),
            }
        }
        Err(StoreError::Busy)
    }
}
