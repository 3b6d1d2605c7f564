//! What can be tuned.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

/// Limits and thresholds of a [`Store`](crate::Store). The defaults suit a server with a few GiB of memory.
#[derive(Clone)]
pub struct StoreOptions {
    /// A segment is closed when it reaches this many bytes. 16 MiB: one request of object storage that amortises
    /// its latency, and small enough to rewrite.
    pub segment_bytes: usize,
    /// Segments of one session being uploaded at once; with the one being filled this bounds a session's memory.
    pub uploads_in_flight: usize,
    /// Attempts to write a segment before its session fails.
    pub upload_attempts: u32,
    /// Pause before the second attempt; doubles each time.
    pub upload_retry: Duration,
    /// Map entries one session may collect; about 100 bytes of memory each.
    pub session_entries_max: usize,
    /// Maps a read of a recovery point has to look at, at most, once maintenance ran; twice as many before.
    pub path_maps_max: usize,
    /// Memory for decoded frames, bytes, over all readers.
    pub frame_cache_bytes: usize,
    /// Memory for decoded map chunks, bytes, over all readers.
    pub chunk_cache_bytes: usize,
    /// An unreferenced object is deleted in a pass that comes at least this many milliseconds after the pass that
    /// found it. Must exceed the longest session when several servers share the storage.
    pub garbage_age_ms: u64,
    /// Old manifest versions younger than this (by the storage's own clock) are kept, so that a delayed writer
    /// meets the version that beat it.
    pub manifest_age: Duration,
    /// A segment with a smaller share of live blocks is rewritten.
    pub compact_live_share: f64,
    /// Segments smaller than a sixteenth of `segment_bytes` are joined when a layer has this many.
    pub compact_small_segments: usize,
    /// Bytes of segments one maintenance pass may rewrite.
    pub compact_bytes_per_pass: u64,
    /// Map entries one maintenance pass may merge or flatten.
    pub merge_entries_per_pass: u64,
    /// Whether so many more bytes of recovery points fit. Asked before each segment of a session; not for manifests, maps
    /// and maintenance, which are small or make space, so that a full store can still be failed over from and
    /// emptied.
    pub has_room: Arc<dyn Fn(u64) -> bool + Send + Sync>,
    /// Source of ids; tests pass a deterministic one.
    pub new_id: Arc<dyn Fn() -> Uuid + Send + Sync>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            segment_bytes: 16 << 20,
            uploads_in_flight: 3,
            upload_attempts: 4,
            upload_retry: Duration::from_millis(200),
            session_entries_max: 16 << 20,
            path_maps_max: 16,
            frame_cache_bytes: 256 << 20,
            chunk_cache_bytes: 64 << 20,
            garbage_age_ms: 3_600_000,
            manifest_age: Duration::from_secs(600),
            compact_live_share: 0.7,
            compact_small_segments: 16,
            compact_bytes_per_pass: 512 << 20,
            merge_entries_per_pass: 32 << 20,
            has_room: Arc::new(|_bytes| true),
            new_id: Arc::new(Uuid::new_v4),
        }
    }
}

impl std::fmt::Debug for StoreOptions {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("StoreOptions")
            .field("segment_bytes", &self.segment_bytes)
            .field("path_maps_max", &self.path_maps_max)
            .finish_non_exhaustive()
    }
}
