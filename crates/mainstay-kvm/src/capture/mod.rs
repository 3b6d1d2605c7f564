//! Captures: see [`live`] for VMs that are in memory and [`offline`] for those that are not.
//!
//! A record is written before anything is done to the VM, so that an agent that dies in the middle finds out
//! what it left ([`stale`]). Both trackers outlive the capture; a capture that fails or is abandoned leaves a
//! tracker too many at worst, never one too few.

mod device;
mod freeze;
mod live;
mod map;
mod offline;
mod scratch;
mod stale;
mod watchdog;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use mainstay_model::VmId;
use mainstay_provider::{
    Capture, CaptureRequest, CapturedDisk, Consistency, ErrorKind, PowerState, SiteError, TrackerId,
};
use serde::{Deserialize, Serialize};

use crate::error::busy;
use crate::files::{read_record, write_passing_record};
use crate::host::Host;
use crate::nodes::PREFIX;
pub(crate) use stale::{abandon, abandon_all, wait_until_idle};

/// The tracker that every recovery VM has from its creation on: what its top images hold.
pub(crate) const CREATION_TRACKER: &str = "ms-creation";

/// A capture that is open, on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct CaptureRecord {
    /// The directory of its sockets and scratch files.
    run: PathBuf,
}

/// What both ways of capturing come to.
struct Opened {
    disks: Vec<CapturedDisk>,
    taken_at_ms: i64,
    consistency: Consistency,
    note: String,
    keeper: Keeper,
}

/// What keeps the view open.
enum Keeper {
    Live(live::Keeper),
    Offline(offline::Keeper),
}

struct KvmCapture {
    host: Arc<Host>,
    vm: VmId,
    tracker: TrackerId,
    opened: Opened,
    _open: OpenMark,
}

/// Frees the VM for the next capture, however this one ends.
struct OpenMark {
    host: Arc<Host>,
    vm: VmId,
}

/// How often it is tried to end a capture that could not be ended at once.
const END_AGAIN: Duration = Duration::from_secs(1);

/// Ends the capture of which there is a record. If that fails now (libvirt is away), it is pursued until it succeeds:
/// the guest pays as long as it is open, and nobody watches it any more. The VM counts as captured until then.
async fn end(open: OpenMark) -> Result<(), SiteError> {
    let ended = abandon(&open.host, open.vm).await;
    if ended.is_err() {
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(END_AGAIN).await;
                let _lock = open.host.lock(open.vm).await;
                match abandon(&open.host, open.vm).await {
                    Ok(()) => break,
                    Err(error) => tracing::debug!(vm = %open.vm, %error, "a capture cannot be ended yet"),
                }
            }
            tracing::info!(vm = %open.vm, "a capture that could not be ended at once has been ended");
        });
    }
    ended
}

impl Drop for OpenMark {
    fn drop(&mut self) {
        self.host.forget_capture(self.vm);
    }
}

/// Takes a capture.
pub(crate) async fn begin(
    host: &Arc<Host>,
    vm: VmId,
    request: &CaptureRequest,
) -> Result<Box<dyn Capture>, SiteError> {
    let _lock = host.lock(vm).await;
    if !host.note_capture(vm) {
        return Err(busy("a capture of the VM is open already", "It ends by itself; try again."));
    }
    let open = OpenMark { host: Arc::clone(host), vm };
    let record_path = host.files.capture_record(vm);
    if read_record::<CaptureRecord>(&record_path)?.is_some() {
        abandon(host, vm).await?;
    }
    let tracker = format!("{PREFIX}{}", request.capture.0.simple());
    let power = host.power(vm).await?;
    if power != PowerState::Off {
        // Before the record: somebody else's job is none of our business.
        live::refuse_foreign_job(host, vm).await?;
    }
    let run = host.files.run().join(request.capture.0.simple().to_string());
    let record = CaptureRecord { run };
    write_passing_record(&record_path, &record)?;
    let opened = async {
        host.make_directory(&record.run).await?;
        if power == PowerState::Off {
            offline::begin(host, vm, request, &record, &tracker).await
        } else {
            live::begin(host, vm, request, &record, &tracker, power).await
        }
    };
    match opened.await {
        Ok(opened) => {
            let host = Arc::clone(host);
            Ok(Box::new(KvmCapture { host, vm, tracker: TrackerId(tracker), opened, _open: open }))
        }
        Err(error) => {
            if let Err(cleanup) = end(open).await {
                tracing::warn!(%vm, error = %cleanup, "a failed capture could not be ended yet");
            }
            Err(match host.power(vm).await {
                Ok(now) if (now == PowerState::Off) != (power == PowerState::Off) => SiteError::new(
                    ErrorKind::Unavailable,
                    format!("the VM was stopped or started while a capture was begun: {}", error.message),
                )
                .with_remedy("Nothing to do: it is tried again."),
                _ => error,
            })
        }
    }
}

#[async_trait]
impl Capture for KvmCapture {
    fn taken_at_ms(&self) -> i64 {
        self.opened.taken_at_ms
    }

    fn consistency(&self) -> Consistency {
        self.opened.consistency
    }

    fn note(&self) -> &str {
        &self.opened.note
    }

    fn disks(&self) -> &[CapturedDisk] {
        &self.opened.disks
    }

    fn tracker(&self) -> &TrackerId {
        &self.tracker
    }

    async fn close(self: Box<Self>) -> Result<(), SiteError> {
        let Self { host, vm, opened, _open: open, .. } = *self;
        let _lock = host.lock(vm).await;
        let Opened { disks, keeper, .. } = opened;
        drop(disks);
        let stopped = match keeper {
            Keeper::Live(keeper) => {
                keeper.stop().await;
                Ok(())
            }
            Keeper::Offline(keeper) => keeper.stop().await,
        };
        end(open).await.and(stopped)
    }
}

fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}
