//! The few operations of object storage that are used, and which objects must not be collected meanwhile.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::TryStreamExt as _;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, PutPayload};

use crate::StoreError;

/// How a put-if-absent ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Created {
    Ours,
    Taken,
}

/// Object storage plus the objects that are being written or read and must not be collected.
#[derive(Debug)]
pub(crate) struct Storage {
    inner: Arc<dyn ObjectStore>,
    held: Arc<Mutex<HashMap<Path, usize>>>,
}

/// Keeps an object from being collected until dropped.
#[derive(Debug)]
pub(crate) struct Hold {
    key: Path,
    held: Arc<Mutex<HashMap<Path, usize>>>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = held.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.key);
            }
        }
    }
}

impl Storage {
    pub(crate) fn new(inner: Arc<dyn ObjectStore>) -> Self {
        Self { inner, held: Arc::default() }
    }

    pub(crate) fn hold(&self, key: &Path) -> Hold {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        *held.entry(key.clone()).or_default() += 1;
        Hold { key: key.clone(), held: Arc::clone(&self.held) }
    }

    pub(crate) fn held(&self) -> std::collections::HashSet<Path> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    pub(crate) async fn get(&self, key: &Path) -> Result<Option<Bytes>, StoreError> {
        match self.inner.get(key).await {
            Ok(found) => found.bytes().await.map(Some).map_err(|error| StoreError::storage(key, error)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(StoreError::storage(key, error)),
        }
    }

    /// Reads a range that must be there: a missing or short object is damage.
    pub(crate) async fn get_range(&self, key: &Path, from: u64, length: u64) -> Result<Bytes, StoreError> {
        let bytes = match self.inner.get_range(key, from..from + length).await {
            Ok(bytes) => bytes,
            Err(object_store::Error::NotFound { .. }) => {
                return Err(StoreError::damaged(key, "the object is missing"));
            }
            Err(error) => return Err(StoreError::storage(key, error)),
        };
        if bytes.len() as u64 != length {
            return Err(StoreError::damaged(key, "the object is too short"));
        }
        Ok(bytes)
    }

    pub(crate) async fn put(&self, key: &Path, bytes: impl Into<PutPayload>) -> Result<(), StoreError> {
        let put = self.inner.put(key, bytes.into()).await;
        put.map(|_| ()).map_err(|error| StoreError::storage(key, error))
    }

    pub(crate) async fn create(&self, key: &Path, bytes: Bytes) -> Result<Created, StoreError> {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        match self.inner.put_opts(key, PutPayload::from(bytes), options).await {
            Ok(_) => Ok(Created::Ours),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(Created::Taken),
            Err(error) => Err(StoreError::storage(key, error)),
        }
    }

    pub(crate) async fn list(&self, prefix: &Path) -> Result<Vec<ObjectMeta>, StoreError> {
        let listed = self.inner.list(Some(prefix)).try_collect().await;
        listed.map_err(|error| StoreError::storage(prefix, error))
    }

    pub(crate) async fn folders(&self, prefix: &Path) -> Result<Vec<Path>, StoreError> {
        let listed = self.inner.list_with_delimiter(Some(prefix)).await;
        listed.map(|listed| listed.common_prefixes).map_err(|error| StoreError::storage(prefix, error))
    }

    pub(crate) async fn delete(&self, key: &Path) -> Result<(), StoreError> {
        match self.inner.delete(key).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(StoreError::storage(key, error)),
        }
    }
}
