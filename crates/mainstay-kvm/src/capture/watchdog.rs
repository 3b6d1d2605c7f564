//! Watching an open capture, so that it never harms the guest: it ends when its scratch files grow beyond their
//! budget, when it gets old, and when the guest was paused because of it.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mainstay_model::VmId;
use mainstay_provider::CaptureLimits;
use tokio_util::sync::CancellationToken;

use super::device::GivenUp;
use super::scratch;
use super::stale::is_ours;
use super::wait_until_idle;
use crate::host::Host;

const PERIOD: Duration = Duration::from_secs(1);

/// Watches until told to stop, or until it had to end the capture.
pub(crate) async fn watch(
    host: Arc<Host>,
    vm: VmId,
    run: PathBuf,
    limits: CaptureLimits,
    given_up: GivenUp,
    stop: CancellationToken,
) {
    let begun = Instant::now();
    let (kind, reason) = loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(PERIOD) => {}
        }
        if begun.elapsed() > limits.age_max {
            let reason = format!("the capture was open for more than {} s", limits.age_max.as_secs());
            break (ErrorKind::TimedOut, reason);
        }
        match host.libvirt.job(vm).await {
            Ok(job) if job.operation.is_none() => {
                break (ErrorKind::TimedOut, "the capture's job has ended".to_owned());
            }
            Ok(job) if job.scratch_bytes > limits.scratch_bytes_max => {
                let reason = format!(
                    "the guest overwrote more than {} bytes during the capture, for which there is scratch space",
                    limits.scratch_bytes_max
                );
                break (ErrorKind::StorageFull, reason);
            }
            Ok(_) => {}
            // libvirt is away for a moment, or the VM has ended; its NBD server tells the reader.
            Err(error) => tracing::debug!(%vm, %error, "an open capture cannot be watched"),
        }
        if host.libvirt.state(vm).await.is_ok_and(|state| state.is_paused_by_io_error) {
            let reason = "there was no space left for scratch, and the guest was paused".to_owned();
            break (ErrorKind::StorageFull, reason);
        }
    };
    tracing::warn!(%vm, reason, "a capture is given up");
    given_up.because(kind, reason);
    match is_ours(&host, vm, &run).await {
        Ok(true) => {
            // The job may end by itself at the same time; what matters is that there is none.
            let _ = host.libvirt.abort_job(vm).await;
            match wait_until_idle(&host, vm).await.and_then(|()| scratch::remove_all(&run)) {
                Ok(()) => {}
                Err(error) => tracing::warn!(%vm, %error, "the capture's job or its scratch files do not go"),
            }
        }
        Ok(false) => {}
        Err(error) => tracing::warn!(%vm, %error, "the capture's job cannot be ended yet"),
    }
    let is_paused = host.libvirt.state(vm).await.is_ok_and(|state| state.is_paused_by_io_error);
    if is_paused && let Err(error) = host.libvirt.resume(vm).await {
        tracing::error!(%vm, %error, "a guest that was paused by a capture cannot be resumed");
    }
}
