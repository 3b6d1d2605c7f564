//! Which recovery points are kept.
//!
//! Everybody wants the newest points close together and the old ones far apart: all points of the last
//! `DENSE_MS`, then one every `MIDDLE_STEP_MS` up to `MIDDLE_MS`, then one an hour to the end of the
//! retention. Of the points in a slot the oldest stays, so that a kept point does not change its mind;
//! application-consistent points are thinned separately, so that one never loses to a crash-consistent
//! neighbour. The latest point, and the latest application-consistent one within the retention, always stay.

use std::collections::HashSet;

use crate::{PointId, ReplicationPolicy};

/// Age up to which every point is kept: 15 minutes.
const DENSE_MS: i64 = 15 * 60_000;
/// Age up to which one point a `MIDDLE_STEP_MS` is kept: 2 hours.
const MIDDLE_MS: i64 = 2 * 3_600_000;
/// Distance of points between `DENSE_MS` and `MIDDLE_MS`: 5 minutes.
const MIDDLE_STEP_MS: i64 = 5 * 60_000;
/// Distance of older points: an hour, as Site Recovery keeps them.
const SPARSE_STEP_MS: i64 = 3_600_000;

/// What retention needs to know of a recovery point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PointAge {
    /// The point.
    pub point: PointId,
    /// The moment it shows, milliseconds since the Unix epoch.
    pub taken_at_ms: i64,
    /// Whether applications took part.
    pub is_app_consistent: bool,
    /// Whether it must stay whatever its age (a test copy or a failed-over VM reads it).
    pub is_held: bool,
}

/// The points that the policy no longer keeps. `points` in any order.
pub fn expired_points(points: &[PointAge], policy: &ReplicationPolicy, now_ms: i64) -> Vec<PointId> {
    let mut sorted = points.to_vec();
    sorted.sort_by_key(|point| point.taken_at_ms);
    let retention_ms = i64::from(policy.retention_hours) * 3_600_000;
    let latest = sorted.last().map(|point| point.point);
    let latest_app = sorted
        .iter()
        .rev()
        .find(|point| point.is_app_consistent && now_ms - point.taken_at_ms <= retention_ms)
        .map(|point| point.point);
    let mut slots = HashSet::new();
    let mut expired = Vec::new();
    for point in &sorted {
        let age_ms = now_ms - point.taken_at_ms;
        let keeps_slot = age_ms <= retention_ms
            && match slot(point.taken_at_ms, age_ms) {
                None => true,
                Some(slot) => slots.insert((slot, point.is_app_consistent)),
            };
        let must_stay = point.is_held || Some(point.point) == latest || Some(point.point) == latest_app;
        if !keeps_slot && !must_stay {
            expired.push(point.point);
        }
    }
    expired
}

/// The slot a point competes for, aligned to the clock so that it does not move as the point grows older.
/// `None` = no competition.
fn slot(taken_at_ms: i64, age_ms: i64) -> Option<(i64, i64)> {
    let step_ms = match age_ms {
        age_ms if age_ms <= DENSE_MS => return None,
        age_ms if age_ms <= MIDDLE_MS => MIDDLE_STEP_MS,
        _ => SPARSE_STEP_MS,
    };
    Some((step_ms, taken_at_ms.div_euclid(step_ms)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    fn policy(retention_hours: u32) -> ReplicationPolicy {
        ReplicationPolicy {
            copy_frequency_seconds: 30,
            retention_hours,
            app_consistent_frequency_hours: 0,
            bytes_per_second_max: None,
        }
    }

    fn point(number: usize, taken_at_ms: i64, is_app_consistent: bool, is_held: bool) -> PointAge {
        PointAge { point: PointId(Uuid::from_u128(number as u128)), taken_at_ms, is_app_consistent, is_held }
    }

    #[test]
    fn a_day_at_five_seconds_leaves_a_few_hundred_points() {
        let now_ms = 100 * 3_600_000;
        let count = 24 * 720;
        let points: Vec<_> = (0..count).map(|i| point(i, now_ms - i as i64 * 5000, false, false)).collect();
        let kept = count - expired_points(&points, &policy(24), now_ms).len();
        // 181 dense, 21 or 22 five-minute ones, 22 or 23 hourly ones.
        assert!((222..=228).contains(&kept), "{kept}");
    }

    proptest! {
        /// The oracle looks at every pair: a point may go only if it is too old, or if an older one shares its
        /// slot; and nothing that must stay goes.
        #[test]
        fn agrees_with_the_pairwise_oracle(
            ages in prop::collection::vec((0..60 * 3_600_000_i64, any::<bool>(), any::<bool>()), 0..60),
            hours in 0..48_u32,
        ) {
            let now_ms = 1_000 * 3_600_000;
            let mut points: Vec<_> = ages
                .iter()
                .enumerate()
                .map(|(i, (age_ms, app, held))| point(i, now_ms - age_ms, *app, *held))
                .collect();
            points.sort_by_key(|p| p.taken_at_ms);
            points.dedup_by_key(|p| p.taken_at_ms);
            let expired: HashSet<_> = expired_points(&points, &policy(hours), now_ms).into_iter().collect();
            let retention_ms = i64::from(hours) * 3_600_000;
            for p in &points {
                let age_ms = now_ms - p.taken_at_ms;
                let too_old = age_ms > retention_ms;
                let beaten = points.iter().any(|other| {
                    other.taken_at_ms < p.taken_at_ms
                        && other.is_app_consistent == p.is_app_consistent
                        && now_ms - other.taken_at_ms <= retention_ms
                        && slot(p.taken_at_ms, age_ms).is_some()
                        && slot(other.taken_at_ms, now_ms - other.taken_at_ms) == slot(p.taken_at_ms, age_ms)
                });
                let is_latest = points.iter().all(|other| other.taken_at_ms <= p.taken_at_ms);
                let is_latest_app = p.is_app_consistent && !too_old
                    && points.iter().all(|other| !other.is_app_consistent || other.taken_at_ms <= p.taken_at_ms);
                let stays = p.is_held || is_latest || is_latest_app || !(too_old || beaten);
                prop_assert_eq!(expired.contains(&p.point), !stays);
            }
        }
    }
}
