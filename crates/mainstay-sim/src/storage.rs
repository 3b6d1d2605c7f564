//! The object storage beneath the server: it fails, is slow, is full, and forgets at a crash what it had not made durable.
//!
//! Durability is that of a local directory: a put that was acknowledged is durable, together with whatever had happened in
//! its directory before; a put whose answer was an error or never came may be there and yet be lost at a crash; and so
//! may come back what was deleted, because a deletion is never synced. Effects on different objects are lost
//! independently of each other, which is every order in which a disk may have written them. Objects are never torn: they
//! are staged, synced and then renamed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream, stream::BoxStream};
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt as _, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, memory::InMemory,
    path::Path,
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use crate::{trace, turns};

/// Longest delay of an answer, in milliseconds: long against everything else that happens in a world, and many of them
/// fit into any wait.
const DELAY_MS_MAX: u64 = 15;

/// What is wrong with the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageTrouble {
    /// One request in so many fails, before or after it was carried out, and one in so many is slow.
    Flaky {
        /// At least 1.
        one_in: u32,
    },
    /// There is no space: nothing can be written.
    Full,
}

/// Object storage in memory. Clones are the same storage.
#[derive(Clone)]
pub struct SimStorage {
    inner: Arc<Mutex<State>>,
}

struct State {
    objects: InMemory,
    /// What a crash may bring back: earlier contents, oldest first; `None` = the object was not there.
    earlier: BTreeMap<Path, Vec<Option<Bytes>>>,
    trouble: Option<StorageTrouble>,
    /// Whether a request failed by it.
    has_failed: bool,
    rng: StdRng,
    /// Objects read since [`SimStorage::record_reads`].
    reads: Option<BTreeSet<Path>>,
}

/// What happens to a request.
struct Plan {
    delay_before: Duration,
    delay_after: Duration,
    fails_before: Option<Error>,
    fails_after: Option<Error>,
}

fn failed(why: &'static str) -> Error {
    Error::Generic { store: "simulated storage", source: why.into() }
}

fn no_space() -> Error {
    let full = io::Error::new(io::ErrorKind::StorageFull, "an injected lack of space");
    Error::Generic { store: "simulated storage", source: full.into() }
}

fn at_once<T>(answer: impl Future<Output = T>) -> T {
    answer.now_or_never().expect("memory answers at once")
}

fn directory(path: &Path) -> &str {
    path.as_ref().rsplit_once('/').map_or("", |(directory, _)| directory)
}

impl State {
    fn content(&self, path: &Path) -> Option<Bytes> {
        let found = at_once(self.objects.get(path)).ok()?;
        Some(at_once(found.bytes()).expect("an object in memory is read"))
    }

    /// Puts something in an object's place, whatever it held.
    fn set(&self, path: &Path, content: Option<Bytes>) {
        let done = match content {
            Some(bytes) => at_once(self.objects.put(path, bytes.into())).map(|_| ()),
            None => at_once(self.objects.delete(path)),
        };
        match done {
            Ok(()) | Err(Error::NotFound { .. }) => {}
            Err(error) => panic!("memory fails: {error}"),
        }
    }

    fn put(&mut self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let before = self.content(path);
        let put = at_once(self.objects.put_opts(path, payload, options))?;
        self.earlier.entry(path.clone()).or_default().push(before);
        Ok(put)
    }

    fn delete(&mut self, path: &Path) -> Result<()> {
        let before = self.content(path);
        at_once(self.objects.delete(path))?;
        self.earlier.entry(path.clone()).or_default().push(before);
        Ok(())
    }

    /// The directory was synced.
    fn make_durable(&mut self, synced: &Path) {
        self.earlier.retain(|path, _| directory(path) != directory(synced));
    }

    fn plan(&mut self, writes: bool) -> Plan {
        let mut plan = Plan {
            delay_before: Duration::ZERO,
            delay_after: Duration::ZERO,
            fails_before: None,
            fails_after: None,
        };
        match self.trouble {
            None => {}
            Some(StorageTrouble::Full) if writes => plan.fails_before = Some(no_space()),
            Some(StorageTrouble::Full) => {}
            Some(StorageTrouble::Flaky { one_in }) => {
                let mut strikes = || self.rng.random_range(0..one_in) == 0;
                let (fails, is_slow) = (strikes(), strikes());
                if is_slow {
                    let mut delay = || Duration::from_millis(self.rng.random_range(0..=DELAY_MS_MAX));
                    (plan.delay_before, plan.delay_after) = (delay(), delay());
                }
                match (fails, self.rng.random_range(0..4)) {
                    (false, _) => {}
                    (true, 0) if writes => plan.fails_before = Some(no_space()),
                    (true, 0..2) => plan.fails_before = Some(failed("an injected fault")),
                    (true, _) => plan.fails_after = Some(failed("an injected fault after the effect")),
                }
            }
        }
        self.has_failed |= plan.fails_before.is_some() || plan.fails_after.is_some();
        plan
    }
}

impl SimStorage {
    /// An empty storage without trouble.
    pub fn new(seed: u64) -> Self {
        let state = State {
            objects: InMemory::new(),
            earlier: BTreeMap::new(),
            trouble: None,
            has_failed: false,
            rng: StdRng::seed_from_u64(seed),
            reads: None,
        };
        Self { inner: Arc::new(Mutex::new(state)) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins or ends trouble.
    pub fn set_trouble(&self, trouble: Option<StorageTrouble>) {
        self.lock().trouble = trouble;
    }

    /// Ends trouble; answers whether a request failed by it since this was last asked.
    pub(crate) fn end_trouble(&self) -> bool {
        let mut state = self.lock();
        state.trouble = None;
        std::mem::take(&mut state.has_failed)
    }

    /// Whether anything can be written.
    pub(crate) fn is_full(&self) -> bool {
        self.lock().trouble == Some(StorageTrouble::Full)
    }

    /// The power fails: of what was not durable, each object keeps what it holds or gets back something earlier.
    pub(crate) fn crash(&self) {
        let mut state = self.lock();
        for (path, mut earlier) in std::mem::take(&mut state.earlier) {
            let kept = state.rng.random_range(0..=earlier.len());
            if kept < earlier.len() {
                state.set(&path, earlier.swap_remove(kept));
            }
        }
    }

    /// A bit turns over on the medium, at this share of the object's length.
    pub(crate) fn flip(&self, path: &Path, share: f64) {
        let state = self.lock();
        let mut bytes = state.content(path).expect("the object is there").to_vec();
        let at = ((bytes.len() as f64 * share) as usize).min(bytes.len() - 1);
        bytes[at] ^= 0x40;
        state.set(path, Some(bytes.into()));
    }

    /// A copy of all that is stored.
    pub(crate) fn copy(&self) -> BTreeMap<Path, Bytes> {
        let (paths, state) = (self.objects(), self.lock());
        paths.into_iter().filter_map(|path| state.content(&path).map(|content| (path, content))).collect()
    }

    /// Puts a copy in the place of all that is stored.
    pub(crate) fn replace(&self, copy: &BTreeMap<Path, Bytes>) {
        let (paths, mut state) = (self.objects(), self.lock());
        paths.iter().for_each(|path| state.set(path, None));
        copy.iter().for_each(|(path, content)| state.set(path, Some(content.clone())));
        state.earlier.clear();
    }

    /// The names of all objects.
    pub(crate) fn objects(&self) -> Vec<Path> {
        let listed = at_once(self.lock().objects.list(None).try_collect::<Vec<_>>());
        listed.expect("memory is listed").into_iter().map(|object| object.location).collect()
    }

    /// From now on remembers which objects are read.
    pub(crate) fn record_reads(&self) {
        self.lock().reads = Some(BTreeSet::new());
    }

    /// Stops remembering, and answers what was read.
    pub(crate) fn take_reads(&self) -> BTreeSet<Path> {
        self.lock().reads.take().unwrap_or_default()
    }

    /// Carries a request out as it is planned. Whoever asked may go away in any of its delays.
    async fn carry_out<T>(
        &self,
        request: String,
        writes: bool,
        effect: impl FnOnce(&mut State) -> Result<T> + Send,
    ) -> Result<T> {
        let plan = self.lock().plan(writes);
        turns::pause("storage").await;
        pause(plan.delay_before).await;
        trace::note(format_args!("storage {request}"));
        if let Some(error) = plan.fails_before {
            return Err(error);
        }
        let done = effect(&mut self.lock());
        trace::note(format_args!("storage {request}: done {}", done.is_ok()));
        pause(plan.delay_after).await;
        turns::pause("storage done").await;
        match plan.fails_after {
            Some(error) => done.and(Err(error)),
            None => done,
        }
    }
}

async fn pause(delay: Duration) {
    if delay > Duration::ZERO {
        tokio::time::sleep(delay).await;
    }
}

impl fmt::Debug for SimStorage {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("SimStorage")
    }
}

impl fmt::Display for SimStorage {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("simulated storage")
    }
}

#[async_trait]
impl ObjectStore for SimStorage {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let put = self
            .carry_out(format!("put {path} {}", payload.content_length()), true, |state| {
                state.put(path, payload.clone(), options.clone())
            })
            .await?;
        self.lock().make_durable(path);
        Ok(put)
    }

    async fn put_multipart_opts(&self, _: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        Err(failed("the store puts objects whole"))
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        let get = |state: &mut State| {
            if let Some(reads) = &mut state.reads {
                reads.insert(path.clone());
            }
            at_once(state.objects.get_opts(path, options.clone()))
        };
        self.carry_out(format!("get {path} {:?}", options.range), false, get).await
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let storage = self.clone();
        let delete = move |path: Result<Path>| {
            let storage = storage.clone();
            async move {
                let path = path?;
                storage.carry_out(format!("delete {path}"), false, |state| state.delete(&path)).await?;
                Ok(path)
            }
        };
        paths.then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (storage, prefix) = (self.clone(), prefix.cloned());
        let list = async move {
            let listed = storage
                .carry_out(format!("list {prefix:?}"), false, |state| {
                    at_once(state.objects.list(prefix.as_ref()).try_collect::<Vec<_>>())
                })
                .await?;
            Ok::<_, Error>(stream::iter(listed.into_iter().map(Ok)))
        };
        stream::once(list).try_flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.carry_out(format!("list in {prefix:?}"), false, |state| {
            at_once(state.objects.list_with_delimiter(prefix))
        })
        .await
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(failed("the store copies nothing"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Path {
        Path::from(text)
    }

    async fn put(storage: &SimStorage, name: &str, text: &'static str) -> Result<()> {
        storage.put(&path(name), Bytes::from_static(text.as_bytes()).into()).await.map(|_| ())
    }

    async fn get(storage: &SimStorage, name: &str) -> Option<Bytes> {
        match storage.get(&path(name)).await {
            Ok(found) => Some(found.bytes().await.expect("bytes")),
            Err(Error::NotFound { .. }) => None,
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn what_was_acknowledged_outlives_a_crash_and_nothing_else_must() {
        crate::simulate(|| async {
            let (mut lost, mut kept, mut came_back) = (false, false, false);
            for seed in 0..64 {
                let storage = SimStorage::new(seed);
                put(&storage, "a/acknowledged", "1").await.expect("no trouble");
                put(&storage, "b/deleted", "2").await.expect("no trouble");
                storage.delete(&path("b/deleted")).await.expect("no trouble");
                storage.set_trouble(Some(StorageTrouble::Flaky { one_in: 1 }));
                // Fails each time, and sometimes after its effect.
                put(&storage, "c/unacknowledged", "3").await.expect_err("every request fails");
                storage.set_trouble(None);
                let was_there = get(&storage, "c/unacknowledged").await.is_some();
                storage.crash();
                assert_eq!(get(&storage, "a/acknowledged").await.as_deref(), Some(&b"1"[..]));
                let is_there = get(&storage, "c/unacknowledged").await.is_some();
                assert!(was_there || !is_there, "something came from nowhere");
                lost |= was_there && !is_there;
                kept |= was_there && is_there;
                came_back |= get(&storage, "b/deleted").await.is_some();
            }
            assert!(lost && kept && came_back, "{lost} {kept} {came_back}");
        });
    }

    #[test]
    fn a_later_put_in_the_directory_makes_everything_in_it_durable() {
        crate::simulate(|| async {
            for seed in 0..32 {
                let storage = SimStorage::new(seed);
                storage.set_trouble(Some(StorageTrouble::Flaky { one_in: 1 }));
                put(&storage, "a/first", "1").await.expect_err("every request fails");
                storage.set_trouble(None);
                let was_there = get(&storage, "a/first").await.is_some();
                put(&storage, "a/second", "2").await.expect("no trouble");
                storage.crash();
                assert_eq!(get(&storage, "a/first").await.is_some(), was_there);
            }
        });
    }

    #[test]
    fn a_full_storage_can_be_read_and_emptied() {
        crate::simulate(|| async {
            let storage = SimStorage::new(0);
            put(&storage, "a/there", "1").await.expect("no trouble");
            storage.set_trouble(Some(StorageTrouble::Full));
            let refused = put(&storage, "a/new", "2").await.expect_err("there is no space");
            assert!(refused.to_string().contains("space"), "{refused}");
            assert!(get(&storage, "a/there").await.is_some());
            storage.delete(&path("a/there")).await.expect("deleting needs no space");
            assert!(get(&storage, "a/there").await.is_none());
        });
    }
}
