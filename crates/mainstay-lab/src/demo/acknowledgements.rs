//! When which number was acknowledged: the collector's clock on what the guest says.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::ledger::{self, Boot};

/// How often the file is looked at. A number counts as acknowledged from the look that found it, so looking less often
/// asks less of the system, never more.
const LOOK: Duration = Duration::from_millis(50);

/// Watches a guest's acknowledgements.
pub(super) struct Watch {
    file: PathBuf,
    /// Length of the file at each look.
    looks: Arc<Mutex<Vec<(i64, u64)>>>,
    task: tokio::task::JoinHandle<()>,
}

/// Milliseconds since the Unix epoch.
pub(super) fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| i64::try_from(time.as_millis()).unwrap_or(i64::MAX))
}

impl Watch {
    /// Begins to watch.
    pub(super) fn begin(acks: &Path, name: &str) -> Self {
        let file = acks.join(name);
        let looks = Arc::new(Mutex::new(Vec::new()));
        let task = tokio::spawn({
            let (file, looks) = (file.clone(), looks.clone());
            async move {
                loop {
                    let length = fs::metadata(&file).map_or(0, |data| data.len());
                    looks.lock().unwrap_or_else(PoisonError::into_inner).push((now_ms(), length));
                    tokio::time::sleep(LOOK).await;
                }
            }
        });
        Self { file, looks, task }
    }

    /// The highest number that was acknowledged at a moment, on the timeline of these boots.
    pub(super) fn acknowledged_at(&self, time_ms: i64, boots: &[Boot]) -> u64 {
        let looks = self.looks.lock().unwrap_or_else(PoisonError::into_inner);
        let length = looks.iter().rev().find(|(at_ms, _)| *at_ms <= time_ms).map_or(0, |(_, length)| *length);
        let text = fs::read(&self.file).unwrap_or_default();
        let seen = usize::try_from(length).unwrap_or(usize::MAX).min(text.len());
        ledger::acknowledged(&String::from_utf8_lossy(&text[..seen]), boots)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}
