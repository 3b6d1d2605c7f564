//! The few operations of object storage that are used, and which objects must not be collected meanwhile.

use std::collections::HashMap;
use std::ops::Range;
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

/// What describes data is written twice, one copy after the other: it is small, and without it far more than itself is lost.
pub(crate) fn twice(copy: Bytes) -> PutPayload {
    [copy.clone(), copy].into_iter().collect()
}

/// A part of the second copy, where there is one.
pub(crate) fn second_copy(object: &[u8], part: Range<u64>, copy_bytes: u64) -> Option<&[u8]> {
    let at = |offset: u64| usize::try_from(offset.checked_add(copy_bytes)?).ok();
    object.get(at(part.start)?..at(part.end)?)
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
            Err(error) => {
                // Some storages answer a range beyond the end with an error of their own.
                let is_short =
                    self.inner.head(key).await.is_ok_and(|object| object.size < from.saturating_add(length));
                return Err(match is_short {
                    true => StoreError::damaged(key, "the object is too short"),
                    false => StoreError::storage(key, error),
                });
            }
        };
        if bytes.len() as u64 != length {
            return Err(StoreError::damaged(key, "the object is too short"));
        }
        Ok(bytes)
    }

    /// Reads a part of an object that was written twice ([`twice`]), from the copy in which `decode` finds it sound.
    /// `copy_bytes` is the length of one copy. An object that has only one is read as well.
    pub(crate) async fn get_part<T>(
        &self,
        key: &Path,
        part: Range<u64>,
        copy_bytes: u64,
        decode: impl Fn(&[u8]) -> Result<T, &'static str>,
    ) -> Result<T, StoreError> {
        let first = match self.get_range(key, part.start, part.end - part.start).await {
            Ok(bytes) => match decode(&bytes) {
                Ok(found) => return Ok(found),
                Err(what) => StoreError::damaged(key, what),
            },
            // Too short: the second copy cannot be there either.
            Err(error) => return Err(error),
        };
        let Some(object) = self.get(key).await? else { return Err(first) };
        let found = second_copy(&object, part, copy_bytes).and_then(|bytes| decode(bytes).ok());
        if found.is_some() {
            tracing::warn!(%key, "one of an object's two copies is damaged; the next scrub mends it");
        }
        found.ok_or(first)
    }

    pub(crate) async fn put(&self, key: &Path, bytes: impl Into<PutPayload>) -> Result<(), StoreError> {
        let put = self.inner.put(key, bytes.into()).await;
        put.map(|_| ()).map_err(|error| StoreError::storage(key, error))
    }

    pub(crate) async fn create(&self, key: &Path, bytes: PutPayload) -> Result<Created, StoreError> {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        match self.inner.put_opts(key, bytes, options).await {
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
