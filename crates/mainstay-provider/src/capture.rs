//! Captures: a consistent view of all disks of a VM at one moment, and what changed since another.

use std::{fmt, ops::Range, sync::Arc, time::Duration};

use async_trait::async_trait;
use mainstay_block::BlockDevice;
use mainstay_model::CaptureId;
use serde::{Deserialize, Serialize};

use crate::SiteError;

/// What to capture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureRequest {
    /// Names the capture; a driver derives all names it leaves in the hypervisor from it.
    pub capture: CaptureId,
    /// Keys of the disks to capture, in the order of [`Capture::disks`].
    pub disks: Vec<String>,
    /// Report what changed since this tracker; `None` = report nothing but what is allocated.
    pub since: Option<TrackerId>,
    /// Ask the guest to freeze its file systems, for at most this long; `None` = crash-consistent.
    pub freeze_timeout: Option<Duration>,
    /// When to give the capture up rather than harm the guest.
    pub limits: CaptureLimits,
}

/// When to give a capture up rather than harm the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureLimits {
    /// Scratch bytes over all disks; beyond it the capture ends and reads fail.
    pub scratch_bytes_max: u64,
    /// Age at which the capture ends and reads fail.
    pub age_max: Duration,
}

/// A driver's mark on a VM from which changes can be told: a set of dirty bitmaps, an overlay, an RCT id.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TrackerId(pub String);

impl fmt::Display for TrackerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether applications in the guest took part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Consistency {
    /// As after a power cut, consistent across all disks.
    Crash,
    /// The guest flushed and froze its file systems for the moment of the capture.
    Application,
}

/// What a disk's tracker says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Changed {
    /// A superset of the byte ranges that differ from the state at the tracker; sorted, disjoint.
    Since(Vec<Range<u64>>),
    /// The tracker is gone or never was: anything may have changed. The caller compares hashes.
    Unknown {
        /// Why, for the log and the health error.
        reason: String,
    },
}

/// A disk within a capture.
pub struct CapturedDisk {
    /// The disk's key.
    pub key: String,
    /// The disk as of the moment of the capture, read-only. Its `extents` tell what is allocated.
    pub device: Arc<dyn BlockDevice>,
    /// What changed since the tracker that was asked for.
    pub changed: Changed,
}

/// An open capture. While it is open the guest pays for it: read, then [`Capture::close`].
///
/// Taking a capture also sets a new tracker at (or just before) the same moment, so that the changes
/// reported since it are a superset of the changes since this view. The tracker asked for in
/// `since` stays until [`crate::Hypervisor::confirm_tracker`] says that the new one replaces it.
/// A capture that is dropped without `close` is cleaned up by the next
/// [`crate::Hypervisor::abandon_stale_captures`].
#[async_trait]
pub trait Capture: Send + Sync {
    /// When the view was taken, by the host's clock, milliseconds since the Unix epoch.
    fn taken_at_ms(&self) -> i64;

    /// What was reached, which may be less than asked for; the reason is then in [`Capture::note`].
    fn consistency(&self) -> Consistency;

    /// Why an application-consistent capture became crash-consistent; empty otherwise.
    fn note(&self) -> &str;

    /// The disks, in the order of the request.
    fn disks(&self) -> &[CapturedDisk];

    /// The tracker that was set with this capture.
    fn tracker(&self) -> &TrackerId;

    /// Ends the view. Both trackers remain. Returns once the guest no longer pays.
    async fn close(self: Box<Self>) -> Result<(), SiteError>;
}
