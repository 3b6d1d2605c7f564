//! A cache bounded in bytes whose values are loaded once even when many ask at the same time.

use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use lru::LruCache;
use tokio::sync::OnceCell;

use crate::StoreError;

/// Values of about `weight` bytes, least recently used first out.
pub(crate) struct ByteCache<K: Hash + Eq + Clone, V> {
    inner: Mutex<Inner<K, V>>,
    limit: usize,
}

/// A value being loaded or loaded.
type Cell<V> = Arc<OnceCell<Arc<V>>>;

struct Inner<K: Hash + Eq + Clone, V> {
    /// With the weight accounted for each; 0 until it is loaded.
    cells: LruCache<K, (Cell<V>, usize)>,
    bytes: usize,
}

impl<K: Hash + Eq + Clone, V> ByteCache<K, V> {
    pub(crate) fn new(limit: usize) -> Self {
        Self { inner: Mutex::new(Inner { cells: LruCache::unbounded(), bytes: 0 }), limit }
    }

    /// The cached value, or the one that `load` makes. Concurrent callers of one key share one load; a
    /// failed load is not remembered.
    pub(crate) async fn get<F>(
        &self,
        key: &K,
        weight: impl Fn(&V) -> usize,
        load: impl FnOnce() -> F,
    ) -> Result<Arc<V>, StoreError>
    where
        F: Future<Output = Result<V, StoreError>>,
    {
        let cell = {
            let mut inner = self.lock();
            match inner.cells.get(key) {
                Some((cell, _)) => Arc::clone(cell),
                None => {
                    let cell = Arc::new(OnceCell::new());
                    inner.cells.put(key.clone(), (Arc::clone(&cell), 0));
                    cell
                }
            }
        };
        let value = match cell.get_or_try_init(|| async { load().await.map(Arc::new) }).await {
            Ok(value) => Arc::clone(value),
            Err(error) => {
                let mut inner = self.lock();
                let empty = inner.cells.peek(key).is_some_and(|(cell, _)| cell.get().is_none());
                if empty {
                    inner.cells.pop(key);
                }
                return Err(error);
            }
        };
        self.account(key, &cell, weight(&value));
        Ok(value)
    }

    fn account(&self, key: &K, cell: &Cell<V>, weight: usize) {
        let mut inner = self.lock();
        if let Some((there, weighed)) = inner.cells.peek_mut(key)
            && Arc::ptr_eq(there, cell)
            && *weighed == 0
        {
            *weighed = weight;
            inner.bytes += weight;
        }
        while inner.bytes > self.limit && inner.cells.len() > 1 {
            let Some((_, (_, weight))) = inner.cells.pop_lru() else { break };
            inner.bytes -= weight;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner<K, V>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bounded_and_shared() {
        let cache = ByteCache::<u32, Vec<u8>>::new(1000);
        for key in 0..50 {
            cache.get(&key, Vec::len, || async { Ok(vec![0; 100]) }).await.unwrap();
        }
        let held = cache.lock().bytes;
        assert_eq!((held, cache.lock().cells.len()), (1000, 10));
        cache.get(&49, Vec::len, || async { Err(StoreError::Busy) }).await.unwrap();
        assert!(cache.get(&0, Vec::len, || async { Err(StoreError::Busy) }).await.is_err());
        cache.get(&0, Vec::len, || async { Ok(vec![0; 100]) }).await.unwrap();
    }
}
