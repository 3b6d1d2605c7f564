//! Object storage in a local directory with real durability.

use std::io;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, Extensions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

use crate::direct;

/// Objects from this size on come in numbers, and are not read again soon: the segments of long transfers. The last changes of
/// a VM, which a failover reads first, are mostly smaller.
const BULK_BYTES: usize = 4 << 20;

/// Object storage in a local directory, created if missing, in which every acknowledged put is durable: file and
/// directory are synced. Half-written staging files of a crashed process are removed. What is written in bulk goes past the
/// host's page cache.
///
/// # Errors
/// Those of creating and reading the directory.
pub fn local_storage(directory: &FilePath) -> io::Result<Arc<dyn ObjectStore>> {
    mainstay_block::durable::create_directory(directory)?;
    remove_staging_files(directory)?;
    let files = LocalFileSystem::new_with_prefix(directory).map_err(io::Error::other)?;
    Ok(Arc::new(LocalStorage { files: files.with_fsync(true), staged: AtomicU64::new(0) }))
}

/// `object_store` stages an upload as `name#number` beside its target; none of our names has a `#`.
fn remove_staging_files(directory: &FilePath) -> io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            remove_staging_files(&entry.path())?;
        } else if kind.is_file() && entry.file_name().to_string_lossy().contains('#') {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[derive(Debug)]
struct LocalStorage {
    files: LocalFileSystem,
    /// Objects written past the page cache so far.
    staged: AtomicU64,
}

impl std::fmt::Display for LocalStorage {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.files.fmt(out)
    }
}

impl LocalStorage {
    /// Writes an object past the page cache; `false` if the file system does not do that.
    async fn put_direct(&self, location: &Path, payload: &PutPayload) -> Result<bool> {
        let path = self.files.path_to_filesystem(location)?;
        // No name of ours has a `#` (see above), and none of `object_store`'s has this one.
        let number = self.staged.fetch_add(1, Ordering::Relaxed);
        let staging = path.with_added_extension(format!("#direct{number}"));
        let parts = payload.clone();
        let written =
            mainstay_block::elsewhere::spawn_blocking(move || direct::write(&path, &staging, parts.as_ref()))
                .await;
        let failed = |source| object_store::Error::Generic { store: "LocalStorage", source };
        written.map_err(|error| failed(error.into()))?.map_err(|error| failed(error.into()))
    }
}

#[async_trait]
impl ObjectStore for LocalStorage {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let is_bulk = payload.content_length() >= BULK_BYTES;
        if is_bulk && options.mode == PutMode::Overwrite && self.put_direct(location, &payload).await? {
            return Ok(PutResult { e_tag: None, version: None, extensions: Extensions::new() });
        }
        self.files.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.files.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.files.get_opts(location, options).await
    }

    async fn get_ranges(
        &self,
        location: &Path,
        ranges: &[std::ops::Range<u64>],
    ) -> Result<Vec<bytes::Bytes>> {
        self.files.get_ranges(location, ranges).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.files.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.files.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.files.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.files.copy_opts(from, to, options).await
    }
}
