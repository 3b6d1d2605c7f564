//! The replication schedule: every item that should replicate has a cycle at its copy frequency.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use mainstay_model::{
    CycleError, Event, Health, ItemId, Operation, Outcome, Phase, ReplicationPolicy, SessionId,
    retry_delay_seconds,
};
use mainstay_provider::{Consistency, ErrorKind, Progress, ProgressSink, Replicate, Replicated, SiteError};
use tokio::{sync::watch, task::AbortHandle, time::Instant};
use uuid::Uuid;

use super::note_replicated;
use crate::{
    Control, ControlError,
    db::{ItemRecord, ScrubRecord},
    jobs::{JobRequest, call_heard},
    workflows::transfer_error,
};

/// The reconcilers' tick, in milliseconds.
const TICK_MS: i64 = super::TICK.as_millis() as i64;
/// The longest pause after failed cycles: the last step of [`retry_delay_seconds`].
const PAUSE_MS_MAX: i64 = 30 * 60_000;
/// Cycles under way in all: each holds a capture open on some host and a transfer into the store.
const CYCLES_MAX: usize = 16;
/// A cycle of which nothing is heard for so long is not counted among them: a host that hangs must not keep others from
/// replicating.
const QUIET: Duration = Duration::from_secs(60);
/// And after so long it is given up: its agent may be reading the hashes of a large disk over a slow line until then.
const SILENCE_MAX: Duration = Duration::from_secs(3600);
/// The longest pause after cycles that were interrupted.
const INTERRUPTED_PAUSE_MAX: Duration = Duration::from_secs(10);
/// So many interruptions in a row are not told, the next one is: if its agent is there, the item has an error then.
const INTERRUPTIONS_UNTOLD: u32 = 2;

/// Replication cycles under way.
#[derive(Default)]
pub struct Cycles {
    state: Mutex<CycleState>,
}

#[derive(Default)]
struct CycleState {
    running: HashMap<ItemId, Running>,
    paused: HashSet<ItemId>,
    progress: HashMap<ItemId, Progress>,
    interrupted: HashMap<ItemId, Interrupted>,
}

/// What is known of cycles that were interrupted, one after the other. A server that starts anew need not know it.
struct Interrupted {
    times: u32,
    /// When the next may begin: an agent whose hypervisor is away says so at once, and would be asked without end.
    not_before: Instant,
}

struct Running {
    task: AbortHandle,
    ended: watch::Receiver<bool>,
    /// When something was last heard of it.
    heard: Instant,
}

/// Keeps cycles of an item from beginning while it lives.
pub struct CyclePause<'a> {
    cycles: &'a Cycles,
    item: ItemId,
}

impl Drop for CyclePause<'_> {
    fn drop(&mut self) {
        self.cycles.lock().paused.remove(&self.item);
    }
}

impl Cycles {
    fn lock(&self) -> std::sync::MutexGuard<'_, CycleState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cancels the item's cycle, if there is one, and waits until it is over.
    pub async fn stop(&self, item: ItemId) {
        let running =
            self.lock().running.get(&item).map(|running| (running.task.clone(), running.ended.clone()));
        if let Some((task, mut ended)) = running {
            task.abort();
            // An error means that the task is gone, which is what is waited for.
            let _ = ended.wait_for(|ended| *ended).await;
        }
        // What comes after it need not wait.
        self.lock().interrupted.remove(&item);
    }

    /// Cancels all cycles.
    pub(super) async fn stop_all(&self) {
        let items: Vec<_> = self.lock().running.keys().copied().collect();
        for item in items {
            self.stop(item).await;
        }
    }

    /// Notes that a cycle was interrupted; answers how many were, in a row.
    fn note_interrupted(&self, item: ItemId) -> u32 {
        let mut state = self.lock();
        let now = Instant::now();
        let interrupted = state.interrupted.entry(item).or_insert(Interrupted { times: 0, not_before: now });
        interrupted.not_before = now + interrupted_pause(interrupted.times);
        interrupted.times += 1;
        interrupted.times
    }

    /// Keeps cycles of the item from beginning while the answer lives.
    pub fn pause(&self, item: ItemId) -> CyclePause<'_> {
        self.lock().paused.insert(item);
        CyclePause { cycles: self, item }
    }

    /// Progress of the item's cycle, if there is one.
    pub fn progress(&self, item: ItemId) -> Option<Progress> {
        let state = self.lock();
        state.running.contains_key(&item).then(|| state.progress.get(&item).cloned().unwrap_or_default())
    }
}

/// Removes the cycle from the table when its task ends, however it ends.
struct CycleEnd {
    control: Arc<Control>,
    item: ItemId,
    ended: watch::Sender<bool>,
}

impl Drop for CycleEnd {
    fn drop(&mut self) {
        let mut state = self.control.cycles.lock();
        state.running.remove(&self.item);
        state.progress.remove(&self.item);
        drop(state);
        self.ended.send_replace(true);
        self.control.changed.notify_waiters();
    }
}

struct CycleProgress<'a> {
    control: &'a Control,
    item: ItemId,
}

impl ProgressSink for CycleProgress<'_> {
    fn report(&self, progress: Progress) {
        let mut state = self.control.cycles.lock();
        if let Some(running) = state.running.get_mut(&self.item) {
            running.heard = Instant::now();
        }
        state.progress.insert(self.item, progress);
    }
}

/// Whether a cycle of the item is due. Pure, so that it can be tested and printed.
fn is_due(item: &ItemRecord, policy: &ReplicationPolicy, now_ms: i64) -> bool {
    if !item.state.is_replicating() {
        return false;
    }
    // A pause that is longer than any that we make was begun before the clock was set back.
    let is_pausing = |not_before_ms: i64| (1..=PAUSE_MS_MAX).contains(&(not_before_ms - now_ms));
    if item.replication.not_before_ms.is_some_and(is_pausing) {
        return false;
    }
    // Initial replication goes on at once after an interruption; deltas keep their rhythm. The frequency is a promise about
    // the recovery points' age, so a cycle begins early enough to be over in time: by as long as the last one took, but
    // by half of the time at most, or a VM that is slow to replicate would do nothing else; and by the time until the next look.
    let frequency_ms = i64::from(policy.copy_frequency_seconds) * 1000;
    let ahead_ms = item.replication.last_cycle_length_ms.clamp(0, frequency_ms / 2) + TICK_MS;
    item.replication.last_point_ms.is_none()
        || item.replication.last_cycle_ms.is_none_or(|last_ms| {
            // A cycle that began in the future began before the clock was set back, nobody knows how long ago.
            last_ms > now_ms || now_ms - last_ms >= frequency_ms - ahead_ms
        })
}

/// Whether a cycle ended because something was away, or was taken away from it.
fn is_interruption(error: &SiteError) -> bool {
    matches!(error.kind, ErrorKind::Unavailable | ErrorKind::Cancelled)
}

/// How long to wait after a cycle that was interrupted, as so many before it.
fn interrupted_pause(times_before: u32) -> Duration {
    Duration::from_secs(1 << times_before.min(8)).min(INTERRUPTED_PAUSE_MAX)
}

/// When a capture of a cycle was taken, by the server's clock: that is the one by which its age is told. The host's may be
/// wrong, so it counts only as far as it says something that can be.
fn captured_ms(taken_at_ms: i64, started_ms: i64, ended_ms: i64) -> i64 {
    // Set back in between, the clock says that the cycle ended before it began.
    taken_at_ms.max(started_ms).min(ended_ms)
}

impl Control {
    pub(super) async fn reconcile_replication(self: Arc<Self>) -> Result<(), ControlError> {
        let now_ms = self.clock.now_ms();
        let policies = self.policies_by_name().await?;
        for item in self.db.items().await?.iter() {
            tokio::task::consume_budget().await;
            if item.state.phase == Phase::FinalizingProtection && item.state.running.is_none() {
                self.finalize(item).await?;
            }
            let Some(policy) = policies.get(&item.policy.to_lowercase()) else { continue };
            if is_due(item, policy, now_ms) && self.sites.is_connected(item.primary_provider) {
                self.begin_cycle(item, *policy);
            }
        }
        Ok(())
    }

    async fn finalize(self: &Arc<Self>, item: &ItemRecord) -> Result<(), ControlError> {
        let request = JobRequest {
            operation: Operation::FinalizeProtection,
            params: serde_json::Value::Null,
            requested_by: "Mainstay".to_owned(),
        };
        match self.start_job(item.id, request).await {
            // Somebody began another operation in the same moment; the next pass looks again.
            Err(ControlError::NotAllowed { .. } | ControlError::Conflict(_)) => Ok(()),
            result => result.map(|_| ()),
        }
    }

    fn begin_cycle(self: &Arc<Self>, item: &ItemRecord, policy: ReplicationPolicy) {
        let mut state = self.cycles.lock();
        if state.running.contains_key(&item.id)
            || state.paused.contains(&item.id)
            || state.interrupted.get(&item.id).is_some_and(|last| Instant::now() < last.not_before)
            || state.running.values().filter(|running| running.heard.elapsed() < QUIET).count() >= CYCLES_MAX
        {
            return;
        }
        let (ended, watching) = watch::channel(false);
        let end = CycleEnd { control: self.clone(), item: item.id, ended };
        let (control, id) = (self.clone(), item.id);
        let task = tokio::spawn(async move {
            let _end = end;
            if let Err(error) = control.run_cycle(id, policy).await {
                control.cycles.note_interrupted(id);
                tracing::warn!(item = %id, %error, "a replication cycle could not be written down");
            }
        });
        let running = Running { task: task.abort_handle(), ended: watching, heard: Instant::now() };
        state.running.insert(item.id, running);
    }

    async fn run_cycle(self: &Arc<Self>, id: ItemId, policy: ReplicationPolicy) -> Result<(), ControlError> {
        let started_ms = self.clock.now_ms();
        let item = self.item(id).await?;
        // Read again after the cycle was entered in the table: from here on `Cycles::stop` reaches it.
        if !item.state.is_replicating() {
            return Ok(());
        }
        let site = match self.sites.get(item.primary_provider) {
            Ok(site) => site,
            Err(_) => return Ok(()),
        };
        let parent = match self.parent_of_next(&item).await {
            Ok(parent) => parent,
            Err(error) => return self.cycle_failed(id, started_ms, transfer_error(&error)).await,
        };
        // One of the future was taken before the clock was set back.
        let last_app_ms = item.replication.last_app_point_ms.filter(|last_ms| *last_ms <= started_ms);
        let operation = Replicate {
            item: id,
            generation: item.state.generation,
            session: SessionId(Uuid::now_v7()),
            parent,
            resend: item.scrub.resend.clone(),
            application_consistent: policy.wants_app_consistent(last_app_ms, started_ms),
            compare_all: false,
            bytes_per_second_max: policy.bytes_per_second_max,
        };
        let sink = CycleProgress { control: self, item: id };
        match call_heard(&*site, operation, &sink, SILENCE_MAX).await {
            Ok(replicated) => self.cycle_succeeded(id, started_ms, &item.scrub, &replicated).await,
            // Mostly an operation of ours has overtaken the cycle. If there was none, somebody else's has: the server was set back
            // together with its store, and the host knows better.
            Err(error) if error.kind == ErrorKind::Fenced && self.item(id).await?.state != item.state => {
                Ok(())
            }
            Err(error) => self.cycle_failed(id, started_ms, error).await,
        }
    }

    async fn cycle_succeeded(
        &self,
        id: ItemId,
        started_ms: i64,
        asked: &ScrubRecord,
        replicated: &Replicated,
    ) -> Result<(), ControlError> {
        metrics::counter!("mainstay_replication_bytes_changed").increment(replicated.bytes_changed);
        metrics::counter!("mainstay_replication_bytes_moved").increment(replicated.bytes_moved);
        metrics::counter!("mainstay_replication_cycles", "result" => "succeeded").increment(1);
        let ended_ms = self.clock.now_ms();
        let captured_ms = captured_ms(replicated.taken_at_ms, started_ms, ended_ms);
        let recovered = self
            .change_item(id, |item| {
                let record = &mut item.replication;
                let recovered = record.last_error.take();
                if let Some(last_ms) = record.last_point_ms
                    && captured_ms > last_ms
                {
                    let elapsed_ms = (captured_ms - last_ms).unsigned_abs();
                    record.bytes_per_second = replicated.bytes_changed.saturating_mul(1000) / elapsed_ms;
                }
                record.last_point = Some(replicated.point);
                record.last_point_ms = Some(captured_ms);
                if replicated.consistency == Consistency::Application {
                    record.last_app_point_ms = Some(captured_ms);
                }
                record.last_cycle_ms = Some(started_ms);
                record.last_cycle_length_ms = ended_ms - started_ms;
                record.not_before_ms = None;
                record.failures = 0;
                record.bytes_changed += replicated.bytes_changed;
                record.bytes_moved += replicated.bytes_moved;
                record.initial_percent = 100;
                note_replicated(item, asked, replicated);
                if let Outcome::State(state) = item.state.apply(Event::PointReached)? {
                    item.state = state;
                }
                Ok(recovered)
            })
            .await?;
        self.cycles.lock().interrupted.remove(&id);
        let item = self.item(id).await?;
        if let Some(error) = recovered {
            let text = format!("replication of '{}' goes on after: {}", item.vm_name, error.message);
            self.record_event(self.item_event(&item, "ReplicationRecovered", Health::Normal, text)).await?;
        }
        if let Some(reason) = &replicated.resynchronized {
            let text = format!("'{}' was resynchronized by comparing hashes: {reason}", item.vm_name);
            self.record_event(self.item_event(&item, "Resynchronized", Health::Normal, text)).await?;
        }
        if !replicated.note.is_empty() {
            let text = format!(
                "the recovery point of '{}' is crash-consistent only: {}",
                item.vm_name, replicated.note
            );
            self.record_event(self.item_event(&item, "NotAppConsistent", Health::Warning, text)).await?;
        }
        Ok(())
    }

    async fn cycle_failed(&self, id: ItemId, started_ms: i64, error: SiteError) -> Result<(), ControlError> {
        metrics::counter!("mainstay_replication_cycles", "result" => "failed").increment(1);
        // A lost connection is the agent's to bring back, and a hypervisor that is started anew comes back by itself. But one that
        // stays away is told.
        if is_interruption(&error) {
            tracing::info!(item = %id, %error, "a replication cycle was interrupted");
            let times = self.cycles.note_interrupted(id);
            if times > INTERRUPTIONS_UNTOLD && self.sites.is_connected(self.item(id).await?.primary_provider)
            {
                self.tell_of_failure(id, &error, |_item| {}).await?;
            }
            return Ok(());
        }
        let now_ms = self.clock.now_ms();
        let pause = |item: &mut ItemRecord| {
            let record = &mut item.replication;
            record.failures += 1;
            record.last_cycle_ms = Some(started_ms);
            let delay_seconds = if matches!(error.kind, ErrorKind::NoSpace | ErrorKind::Busy) {
                // Somebody makes space, somebody's backup ends; looking costs nothing.
                WAITING_RETRY_SECONDS
            } else {
                retry_delay_seconds(record.failures)
            };
            record.not_before_ms = Some(now_ms + i64::from(delay_seconds) * 1000);
        };
        self.tell_of_failure(id, &error, pause).await?;
        self.cycles.lock().interrupted.remove(&id);
        Ok(())
    }

    /// Writes down why the item's cycles fail and, if that is new, an event.
    async fn tell_of_failure(
        &self,
        id: ItemId,
        error: &SiteError,
        change: impl FnOnce(&mut ItemRecord) + Send,
    ) -> Result<(), ControlError> {
        // A full site ends by itself, but not without a person.
        let is_interruption = is_interruption(error);
        let is_mild = is_interruption || error.is_transient() && error.kind != ErrorKind::NoSpace;
        let is_new = self
            .change_item(id, |item| {
                change(item);
                let cycle_error = CycleError {
                    code: format!("{:?}", error.kind),
                    message: error.message.clone(),
                    remedy: error.remedy.clone(),
                    is_transient: is_mild,
                };
                // What is away says so in many words.
                let is_known = |last: &CycleError| {
                    *last == cycle_error || is_interruption && last.code == cycle_error.code
                };
                let is_new = !item.replication.last_error.as_ref().is_some_and(is_known);
                item.replication.last_error = Some(cycle_error);
                Ok(is_new)
            })
            .await?;
        if is_new {
            let item = self.item(id).await?;
            let severity = if is_mild { Health::Warning } else { Health::Critical };
            let text = format!("replication of '{}' failed: {error} {}", item.vm_name, error.remedy);
            self.record_event(self.item_event(&item, "ReplicationFailed", severity, text)).await?;
        }
        Ok(())
    }
}

/// How often it is tried again when a site is full or somebody else works on the VM.
const WAITING_RETRY_SECONDS: u32 = 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capture_was_taken_during_its_cycle_whatever_the_hosts_clock_says() {
        assert_eq!(captured_ms(15, 10, 20), 15);
        assert_eq!(captured_ms(5, 10, 20), 10);
        assert_eq!(captured_ms(25, 10, 20), 20);
        // The server's clock was set back during the cycle.
        assert_eq!(captured_ms(15, 20, 10), 10);
    }

    #[test]
    fn pauses_after_interruptions_grow_to_the_longest() {
        let seconds: Vec<_> = (0..6).map(|times| interrupted_pause(times).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 10, 10]);
        assert_eq!(interrupted_pause(u32::MAX), INTERRUPTED_PAUSE_MAX);
    }

    #[test]
    fn no_pause_is_longer_than_the_longest() {
        let longest = (0..100).map(retry_delay_seconds).max().unwrap_or_default();
        assert_eq!(PAUSE_MS_MAX, i64::from(longest.max(WAITING_RETRY_SECONDS)) * 1000);
    }
}
