//! What must stay true without anybody asking. Each reconciler takes no input, reads what is wanted and what is
//! there, and acts on the difference; however it was woken, it does the same.

mod health;
mod hydration;
mod inventory;
mod old_copies;
mod replication;
mod retention;
mod scrub;
mod stand_down;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{Control, ControlError, caught};

pub use old_copies::OldCopies;
pub use replication::Cycles;
pub(crate) use scrub::note_replicated;
pub use scrub::{ScrubPace, Scrubs};

/// How often the reconcilers look when nothing wakes them. Short against the shortest copy frequency (5 s), long against
/// the cost of reading a few thousand items.
const TICK: Duration = Duration::from_millis(500);
/// How often retention and the store's maintenance run.
const MAINTENANCE_TICK: Duration = Duration::from_secs(30);

/// How long a host may take to answer one of the questions and orders that belong to no job.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// How often a reconciler that goes on failing says so.
const REMINDER: Duration = Duration::from_secs(60);

/// A pass of a reconciler.
type Reconcile = fn(Arc<Control>) -> Pass;
type Pass = BoxFuture<'static, Result<(), ControlError>>;

impl Control {
    /// Runs all reconcilers until `stop`.
    pub async fn run_reconcilers(self: Arc<Self>, stop: CancellationToken) {
        let reconcilers: [(&'static str, Duration, Reconcile); 9] = [
            ("replication", TICK, |control| Box::pin(control.reconcile_replication())),
            ("hydration", TICK, |control| Box::pin(control.reconcile_hydration())),
            ("catalogue", TICK, |control| Box::pin(async move { control.reconcile_catalogue().await })),
            ("stand-down", TICK, |control| Box::pin(control.reconcile_stand_down())),
            ("inventory", TICK, |control| Box::pin(control.reconcile_inventory())),
            ("health", TICK, |control| Box::pin(control.reconcile_health())),
            ("scrub", TICK, |control| Box::pin(control.reconcile_scrub())),
            ("scrub recheck", TICK, |control| Box::pin(control.reconcile_scrub_recheck())),
            ("retention", MAINTENANCE_TICK, |control| Box::pin(control.reconcile_retention())),
        ];
        let tasks = TaskTracker::new();
        for (name, tick, reconcile) in reconcilers {
            tasks.spawn(self.clone().every(tick, stop.clone(), name, reconcile));
        }
        tasks.close();
        tasks.wait().await;
        self.cycles.stop_all().await;
    }

    async fn every(
        self: Arc<Self>,
        tick: Duration,
        stop: CancellationToken,
        name: &'static str,
        reconcile: Reconcile,
    ) {
        let mut complaint = Complaint::default();
        loop {
            let woken = self.changed.notified();
            let result = tokio::select! {
                () = stop.cancelled() => return,
                result = caught(reconcile(self.clone())) => result,
            };
            // The next pass sees the same difference and tries again.
            match result.and_then(|result| result.map_err(|error| error.to_string())) {
                Err(error) if complaint.is_due(error.clone(), Instant::now()) => {
                    tracing::warn!(reconciler = name, error, "a pass failed");
                }
                Err(_) => {}
                Ok(()) if complaint.ends() => tracing::info!(reconciler = name, "passes succeed again"),
                Ok(()) => {}
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = woken => {}
                () = tokio::time::sleep(tick) => {}
            }
        }
    }
}

/// What a reconciler last said that it cannot do. Two passes a second would fill a log with what one line tells.
#[derive(Default)]
struct Complaint {
    said: Option<(String, Instant)>,
}

impl Complaint {
    /// Whether to say this now: it is new, or was said a while ago.
    fn is_due(&mut self, text: String, now: Instant) -> bool {
        if self.said.as_ref().is_some_and(|(said, when)| *said == text && now < *when + REMINDER) {
            return false;
        }
        self.said = Some((text, now));
        true
    }

    /// All is well; whether it was not before.
    fn ends(&mut self) -> bool {
        self.said.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_on_failing_is_said_when_it_changes_and_once_a_minute() {
        let (mut complaint, begun) = (Complaint::default(), Instant::now());
        assert!(!complaint.ends());
        let said = (0..240).filter(|pass| complaint.is_due("it is full".to_owned(), begun + TICK * *pass));
        assert_eq!(said.count(), 2);
        let later = begun + TICK * 240;
        assert!(complaint.is_due("it refuses access".to_owned(), later));
        assert!(complaint.ends() && !complaint.ends());
        assert!(complaint.is_due("it refuses access".to_owned(), later));
    }
}
