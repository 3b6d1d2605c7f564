//! Recovery points are kept as long as the policy says, and the store is kept in order.

use std::sync::Arc;

use futures::future::BoxFuture;
use mainstay_model::{PointAge, PointId, expired_points};
use mainstay_store::{Consistency, PointInfo};
use uuid::Uuid;

use crate::{Control, ControlError, db::ItemRecord, workflows::point_time_ms};

/// How long events and audit records are kept: three months.
const HISTORY_MS: i64 = 90 * 24 * 3_600_000;

impl Control {
    /// Deletes the recovery points that the policies no longer keep, and puts the store in order.
    pub async fn reconcile_retention(self: Arc<Self>) -> Result<(), ControlError> {
        let now_ms = self.clock.now_ms();
        let mut trouble = Ok(());
        for item in self.db.items().await?.iter() {
            // One replica that cannot be read must not keep the others from getting their space back.
            if let Err(error) = self.keep_points(item, now_ms).await {
                tracing::debug!(item = %item.id, %error, "an item's recovery points could not be looked after");
                trouble = Err(error);
            }
        }
        self.maintain_store(now_ms).await?;
        let mut transaction = self.db.begin().await?;
        transaction.trim_history(now_ms - HISTORY_MS).await?;
        transaction.commit().await?;
        trouble
    }

    async fn keep_points(&self, item: &ItemRecord, now_ms: i64) -> Result<(), ControlError> {
        if item.state.is_replicating() {
            self.expire_points(item, now_ms).await?;
        }
        self.forget_gone_points(item).await
    }

    // Boxed, as `maintain_store`: the compiler cannot prove the unboxed futures `Send` (rust-lang/rust#102211).
    fn expire_points<'a>(
        &'a self,
        item: &'a ItemRecord,
        now_ms: i64,
    ) -> BoxFuture<'a, Result<(), ControlError>> {
        Box::pin(async move {
            let policy = self.policy(&item.policy).await?.policy;
            let points = self.recovery_points(item).await?;
            // By the order in which they were made: clocks are set, and an older point may show a later moment.
            let newest = points.iter().max_by_key(|point| point.sequence).map(|point| point.id);
            let ages: Vec<_> = points.iter().map(|point| point_age(point, newest)).collect();
            let expired: Vec<_> =
                expired_points(&ages, &policy, now_ms).into_iter().map(|point| point.0).collect();
            if !expired.is_empty() {
                tracing::info!(item = %item.id, count = expired.len(), "recovery points have expired");
                self.store.delete_points(item.id.0, &expired).await?;
            }
            Ok(())
        })
    }

    fn maintain_store(&self, now_ms: i64) -> BoxFuture<'_, Result<(), ControlError>> {
        Box::pin(async move {
            for replica in self.store.replicas().await? {
                let report = match self.store.maintain(replica, now_ms.unsigned_abs()).await {
                    Ok(report) => report,
                    Err(error) => {
                        // The others' space must come back all the same.
                        tracing::warn!(%replica, %error, "a replica could not be kept in order");
                        continue;
                    }
                };
                if report.bytes_deleted > 0 {
                    tracing::info!(%replica, bytes = report.bytes_deleted, "space came back in the store");
                }
            }
            Ok(())
        })
    }
}

fn point_age(point: &PointInfo, newest: Option<Uuid>) -> PointAge {
    PointAge {
        point: PointId(point.id),
        sequence: point.sequence,
        taken_at_ms: point_time_ms(point),
        is_app_consistent: point.consistency == Consistency::App,
        is_held: point.pins > 0 || newest == Some(point.id),
    }
}
