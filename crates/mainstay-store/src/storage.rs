//! The few operations of object storage that are used, and which objects must not be collected meanwhile.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use bytes::Bytes;
use futures::TryStreamExt as _;
use lru::LruCache;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, PutPayload};

use crate::StoreError;
use crate::cipher::{self, CHUNK_BYTES, HEADER_BYTES, Header};
use crate::keyring::DataKeys;
use crate::store::lock;

/// Headers of sealed objects that are remembered: 64 bytes and a name each.
const HEADERS_KNOWN: NonZeroUsize = NonZeroUsize::new(8192).unwrap();
/// Longer parts are opened on a thread for such work.
const SEALED_INLINE_BYTES: u64 = 128 << 10;

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
    keys: RwLock<Option<Arc<DataKeys>>>,
    /// Headers of sealed objects that were read lately; `None` for those that are not sealed.
    headers: Mutex<LruCache<Path, Option<Header>>>,
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

/// An object of one copy.
pub(crate) struct Single {
    /// Its content.
    pub(crate) bytes: Bytes,
    /// Bytes that it takes in storage.
    pub(crate) stored_bytes: u64,
    /// It is stored as it would be now: with the key of today, or without one.
    pub(crate) is_current: bool,
}

/// An object that was written twice.
pub(crate) struct Copies {
    /// The content of either.
    pub(crate) copies: [Bytes; 2],
    /// As it is stored.
    pub(crate) raw: Bytes,
    /// It is stored as it would be now.
    pub(crate) is_current: bool,
}

impl Copies {
    /// Two copies that were not sealed.
    pub(crate) fn new(copies: [Bytes; 2]) -> Self {
        let raw = copies.concat().into();
        Self { copies, raw, is_current: true }
    }

    /// The copies of an object whose copies have so many bytes: one that was written only once has one.
    pub(crate) fn of_length(&self, bytes: u64) -> [&[u8]; 2] {
        match self.raw.len() as u64 == bytes {
            true => [&self.raw, &[]],
            false => [&self.copies[0], &self.copies[1]],
        }
    }
}

fn slice(bytes: &[u8], part: Range<u64>) -> Option<&[u8]> {
    bytes.get(usize::try_from(part.start).ok()?..usize::try_from(part.end).ok()?)
}

fn open_copy(keys: &DataKeys, header: Header, key: &Path) -> Option<cipher::Copy> {
    cipher::Copy::open(header, keys.all.get(&header.key())?, key.as_ref())
}

impl Storage {
    pub(crate) fn new(inner: Arc<dyn ObjectStore>) -> Self {
        let headers = Mutex::new(LruCache::new(HEADERS_KNOWN));
        Self { inner, held: Arc::default(), keys: RwLock::default(), headers }
    }

    pub(crate) fn hold(&self, key: &Path) -> Hold {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        *held.entry(key.clone()).or_default() += 1;
        Hold { key: key.clone(), held: Arc::clone(&self.held) }
    }

    pub(crate) fn held(&self) -> std::collections::HashSet<Path> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// What objects are sealed with from now on, and were before.
    pub(crate) fn set_keys(&self, keys: DataKeys) {
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(keys));
    }

    fn keys(&self) -> Option<Arc<DataKeys>> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn get_raw(&self, key: &Path) -> Result<Option<Bytes>, StoreError> {
        match self.inner.get(key).await {
            Ok(found) => found.bytes().await.map(Some).map_err(|error| StoreError::storage(key, error)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(StoreError::storage(key, error)),
        }
    }

    async fn get_raw_range(&self, key: &Path, range: Range<u64>) -> Result<Bytes, StoreError> {
        let bytes = match self.inner.get_range(key, range.clone()).await {
            Ok(bytes) => bytes,
            Err(object_store::Error::NotFound { .. }) => {
                return Err(StoreError::damaged(key, "the object is missing"));
            }
            Err(error) => {
                // Some storages answer a range beyond the end with an error of their own.
                let is_short = self.inner.head(key).await.is_ok_and(|object| object.size < range.end);
                return Err(match is_short {
                    true => StoreError::damaged(key, "the object is too short"),
                    false => StoreError::storage(key, error),
                });
            }
        };
        if bytes.len() as u64 != range.end - range.start {
            return Err(StoreError::damaged(key, "the object is too short"));
        }
        Ok(bytes)
    }

    /// An object of one copy. Where it cannot be opened zeros stand, so that what is left of it can be told.
    pub(crate) async fn get(&self, key: &Path) -> Result<Option<Single>, StoreError> {
        let Some(raw) = self.get_raw(key).await? else { return Ok(None) };
        let stored_bytes = raw.len() as u64;
        let (bytes, is_current) = self.opened(key, raw).await?;
        Ok(Some(Single { bytes, stored_bytes, is_current }))
    }

    /// An object that was written twice ([`Self::put_twice`]).
    pub(crate) async fn get_copies(&self, key: &Path) -> Result<Option<Copies>, StoreError> {
        let Some(raw) = self.get_raw(key).await? else { return Ok(None) };
        let half = raw.len() / 2;
        let (first, first_is_current) = self.opened(key, raw.slice(..half)).await?;
        let (second, second_is_current) = self.opened(key, raw.slice(half..)).await?;
        let is_current = first_is_current && second_is_current;
        Ok(Some(Copies { copies: [first, second], raw, is_current }))
    }

    /// The content of a copy, and whether it is stored as it would be now.
    async fn opened(&self, key: &Path, raw: Bytes) -> Result<(Bytes, bool), StoreError> {
        let keys = self.keys();
        let header = Header::parse(&raw);
        let (Some(keys), Some(header)) = (&keys, header) else {
            return Ok((raw, keys.is_none() && header.is_none()));
        };
        let Some(copy) = open_copy(keys, header, key) else { return Ok((Bytes::new(), false)) };
        let open = move || copy.unseal(0, &raw[HEADER_BYTES..]).0.freeze();
        let bytes = mainstay_block::elsewhere::spawn_blocking(open).await.map_err(StoreError::internal)?;
        Ok((bytes, header.key() == keys.active.id))
    }

    /// Reads a range that must be there: a missing or short object is damage. Of an object of two copies, in the first.
    pub(crate) async fn get_range(&self, key: &Path, from: u64, length: u64) -> Result<Bytes, StoreError> {
        let Some(keys) = self.keys() else {
            return self.get_raw_range(key, from..from + length).await;
        };
        let (header, is_fresh) = self.header(key).await?;
        match self.get_sealed_range(key, &keys, header, from, length).await {
            // It was sealed anew since.
            Err(StoreError::Damaged { .. }) if !is_fresh => {
                lock(&self.headers).pop(key);
                let (header, _) = self.header(key).await?;
                self.get_sealed_range(key, &keys, header, from, length).await
            }
            done => done,
        }
    }

    /// The header of an object, if it is sealed, and whether it was read just now.
    async fn header(&self, key: &Path) -> Result<(Option<Header>, bool), StoreError> {
        if let Some(known) = lock(&self.headers).get(key) {
            return Ok((*known, false));
        }
        let header = match self.get_raw_range(key, 0..HEADER_BYTES as u64).await {
            Ok(bytes) => Header::parse(&bytes),
            // Too short for one: whoever reads a range of it finds what is wrong.
            Err(StoreError::Damaged { .. }) => None,
            Err(error) => return Err(error),
        };
        lock(&self.headers).put(key.clone(), header);
        Ok((header, true))
    }

    async fn get_sealed_range(
        &self,
        key: &Path,
        keys: &DataKeys,
        header: Option<Header>,
        from: u64,
        length: u64,
    ) -> Result<Bytes, StoreError> {
        let Some(header) = header else { return self.get_raw_range(key, from..from + length).await };
        let damaged = |what| StoreError::damaged(key, what);
        let copy = open_copy(keys, header, key).ok_or_else(|| damaged("it is sealed with an unknown key"))?;
        let (first, range) = copy.place(from, length).ok_or_else(|| damaged("the object is too short"))?;
        let sealed = self.get_raw_range(key, range).await?;
        let open = move || copy.unseal(first, &sealed);
        let (plain, bad) = match length <= SEALED_INLINE_BYTES {
            true => open(),
            false => mainstay_block::elsewhere::spawn_blocking(open).await.map_err(StoreError::internal)?,
        };
        let at = (from - first * CHUNK_BYTES as u64) as usize;
        if bad > 0 || plain.len() < at + length as usize {
            return Err(damaged("the seal"));
        }
        Ok(plain.freeze().slice(at..at + length as usize))
    }

    /// Reads a part of an object that was written twice, from the copy in which `decode` finds it sound. An object that has
    /// one copy only is read as well.
    pub(crate) async fn get_part<T>(
        &self,
        key: &Path,
        part: Range<u64>,
        decode: impl Fn(&[u8]) -> Result<T, &'static str>,
    ) -> Result<T, StoreError> {
        let first = match self.get_range(key, part.start, part.end - part.start).await {
            Ok(bytes) => match decode(&bytes) {
                Ok(found) => return Ok(found),
                Err(what) => StoreError::damaged(key, what),
            },
            Err(error @ StoreError::Damaged { .. }) => error,
            Err(error) => return Err(error),
        };
        let Some(copies) = self.get_copies(key).await? else { return Err(first) };
        let found = slice(&copies.copies[1], part).and_then(|bytes| decode(bytes).ok());
        if found.is_some() {
            tracing::warn!(%key, "one of an object's two copies is damaged; the next scrub mends it");
        }
        found.ok_or(first)
    }

    /// A copy as it is to be written.
    async fn sealed(&self, key: &Path, plain: Vec<Bytes>) -> Result<PutPayload, StoreError> {
        let Some(keys) = self.keys() else { return Ok(plain.into_iter().collect()) };
        let (name, salt) = (key.to_string(), DataKeys::salt()?);
        let seal = move || cipher::seal(&keys.active, &name, salt, &plain);
        let sealed = mainstay_block::elsewhere::spawn_blocking(seal).await.map_err(StoreError::internal)?;
        sealed.map(PutPayload::from).ok_or_else(|| StoreError::Internal("sealing failed".to_owned()))
    }

    /// As [`Self::sealed`], once more.
    async fn sealed_twice(&self, key: &Path, plain: Bytes) -> Result<PutPayload, StoreError> {
        let copy: Vec<Bytes> = self.sealed(key, vec![plain]).await?.into_iter().collect();
        Ok(copy.iter().cloned().chain(copy.iter().cloned()).collect())
    }

    pub(crate) async fn put(&self, key: &Path, parts: Vec<Bytes>) -> Result<(), StoreError> {
        let payload = self.sealed(key, parts).await?;
        self.put_raw(key, payload).await
    }

    /// Writes what describes data: two copies, one after the other. It is small, and without it far more than itself is lost.
    pub(crate) async fn put_twice(&self, key: &Path, copy: Bytes) -> Result<(), StoreError> {
        let payload = self.sealed_twice(key, copy).await?;
        self.put_raw(key, payload).await
    }

    async fn put_raw(&self, key: &Path, payload: PutPayload) -> Result<(), StoreError> {
        let put = self.inner.put(key, payload).await;
        // Somebody may have read the header of what was there before.
        lock(&self.headers).pop(key);
        put.map(|_| ()).map_err(|error| StoreError::storage(key, error))
    }

    /// As [`Self::put_twice`], if there is no such object.
    pub(crate) async fn create_twice(&self, key: &Path, copy: Bytes) -> Result<Created, StoreError> {
        let payload = self.sealed_twice(key, copy).await?;
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        match self.inner.put_opts(key, payload, options).await {
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
