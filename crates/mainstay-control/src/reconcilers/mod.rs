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

use std::{sync::Arc, time::Duration};

use futures::future::BoxFuture;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{Control, ControlError};

pub use old_copies::OldCopies;
pub use replication::Cycles;
pub(crate) use scrub::note_replicated;
pub use scrub::{ScrubPace, Scrubs};

/// How often the reconcilers look when nothing wakes them. Short against the shortest copy frequency (5 s), long against
/// the cost of reading a few thousand items.
const TICK: Duration = Duration::from_millis(500);
/// How often retention and the store's maintenance run.
const MAINTENANCE_TICK: Duration = Duration::from_secs(30);

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
        loop {
            let woken = self.changed.notified();
            tokio::select! {
                () = stop.cancelled() => return,
                result = reconcile(self.clone()) => if let Err(error) = result {
                    // The next pass sees the same difference and tries again.
                    tracing::warn!(reconciler = name, %error, "a pass failed");
                },
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = woken => {}
                () = tokio::time::sleep(tick) => {}
            }
        }
    }
}
