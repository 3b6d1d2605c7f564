//! Which recovery points are kept.
//!
//! Everybody wants the newest points close together and the old ones far apart: all points of the last
//! `DENSE_MS`, then one every `MIDDLE_STEP_MS` up to `MIDDLE_MS`, then one an hour to the end of the
//! retention. Of the points in a slot the one that was made first stays, so that a kept point does not change its mind, and no
//! host can drive out what is there by what it says of new ones;
//! application-consistent points are thinned separately, so that one never loses to a crash-consistent
//! neighbour. The latest point, and the latest application-consistent one within the retention, always stay.
//!
//! Ages count back from the newest moment that a point shows. While a source is dead or out of reach nothing takes the place of what there
//! is, and its points do not run out before anybody has come to use them; nor does a server's clock that leaps ahead delete them.

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
    /// Points made later have a higher number.
    pub sequence: u64,
    /// The moment it shows, milliseconds since the Unix epoch.
    pub taken_at_ms: i64,
    /// Whether applications took part.
    pub is_app_consistent: bool,
    /// Whether it must stay whatever its age (a test copy or a failed-over VM reads it).
    pub is_held: bool,
}

/// The points that the policy no longer keeps. `points` in any order.
pub fn expired_points(points: &[PointAge], policy: &ReplicationPolicy, now_ms: i64) -> Vec<PointId> {
    let by_time = |point: &&PointAge| (point.taken_at_ms, point.sequence);
    let latest = points.iter().max_by_key(by_time);
    // Not later than now: a point of a host whose clock is ahead would let all others go.
    let now_ms = latest.map_or(now_ms, |point| point.taken_at_ms.min(now_ms));
    let retention_ms = i64::from(policy.retention_hours) * 3_600_000;
    let age_ms = |point: &PointAge| now_ms.saturating_sub(point.taken_at_ms);
    let is_young = |point: &&PointAge| age_ms(point) <= retention_ms;
    let latest_app =
        points.iter().filter(is_young).filter(|point| point.is_app_consistent).max_by_key(by_time);
    let mut sorted: Vec<_> = points.iter().collect();
    sorted.sort_by_key(|point| point.sequence);
    let mut slots = HashSet::new();
    let mut expired = Vec::new();
    for point in sorted {
        let keeps_slot = is_young(&point)
            && match slot(point.taken_at_ms, age_ms(point)) {
                None => true,
                Some(slot) => slots.insert((slot, point.is_app_consistent)),
            };
        let must_stay = point.is_held || Some(point) == latest || Some(point) == latest_app;
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
        let sequence = number as u64;
        PointAge {
            point: PointId(Uuid::from_u128(number as u128)),
            sequence,
            taken_at_ms,
            is_app_consistent,
            is_held,
        }
    }

    #[test]
    fn a_day_at_five_seconds_leaves_a_few_hundred_points() {
        let now_ms = 100 * 3_600_000;
        let count = 24 * 720;
        let points: Vec<_> =
            (0..count).map(|i| point(i, now_ms - (count - 1 - i) as i64 * 5000, false, false)).collect();
        let kept = count - expired_points(&points, &policy(24), now_ms).len();
        // 181 dense, 21 or 22 five-minute ones, 22 or 23 hourly ones.
        assert!((222..=228).contains(&kept), "{kept}");
    }

    #[test]
    fn nothing_expires_while_nothing_new_comes() {
        let hour_ms = 3_600_000;
        let points: Vec<_> = (0..24).map(|i| point(i, i as i64 * hour_ms, false, false)).collect();
        let a_year_later_ms = 365 * 24 * hour_ms;
        assert_eq!(expired_points(&points, &policy(24), a_year_later_ms), []);
        // With the first new one the old ones go, as if it had been there all the time.
        let with_new: Vec<_> =
            points.iter().copied().chain([point(24, a_year_later_ms, false, false)]).collect();
        assert_eq!(expired_points(&with_new, &policy(24), a_year_later_ms).len(), points.len());
    }

    #[test]
    fn a_point_of_a_clock_that_is_ahead_takes_no_others_with_it() {
        let now_ms = 100 * 3_600_000;
        let points =
            [point(0, now_ms - 60_000, false, false), point(1, now_ms + 365 * 24 * 3_600_000, false, false)];
        assert_eq!(expired_points(&points, &policy(24), now_ms), []);
    }

    /// Points in the order in which they were made, taken so long before `now_ms` as `ages` say.
    fn points_of(ages: &[(i64, bool, bool)], now_ms: i64) -> Vec<PointAge> {
        ages.iter()
            .enumerate()
            .map(|(i, (age_ms, app, held))| point(i, now_ms - age_ms, *app, *held))
            .collect()
    }

    /// Ages from an hour ahead of the clock to 60 hours; whether applications took part; whether it is held.
    fn ages() -> impl Strategy<Value = Vec<(i64, bool, bool)>> {
        prop::collection::vec((-3_600_000..60 * 3_600_000_i64, any::<bool>(), any::<bool>()), 0..60)
    }

    const NOW_MS: i64 = 1_000 * 3_600_000;

    proptest! {
        /// The oracle looks at every pair: a point may go only if it is too old, or if one that was made before shares its
        /// slot; and nothing that must stay goes.
        #[test]
        fn agrees_with_the_pairwise_oracle(ages in ages(), hours in 0..48_u32) {
            let points = points_of(&ages, NOW_MS);
            let expired: HashSet<_> = expired_points(&points, &policy(hours), NOW_MS).into_iter().collect();
            let now_ms = points.iter().fold(i64::MIN, |newest, p| newest.max(p.taken_at_ms)).min(NOW_MS);
            let retention_ms = i64::from(hours) * 3_600_000;
            let is_later = |p: &PointAge, other: &PointAge| (other.taken_at_ms, other.sequence) > (p.taken_at_ms, p.sequence);
            for p in &points {
                let age_ms = now_ms - p.taken_at_ms;
                let too_old = age_ms > retention_ms;
                let beaten = points.iter().any(|other| {
                    other.sequence < p.sequence
                        && other.is_app_consistent == p.is_app_consistent
                        && now_ms - other.taken_at_ms <= retention_ms
                        && slot(p.taken_at_ms, age_ms).is_some()
                        && slot(other.taken_at_ms, now_ms - other.taken_at_ms) == slot(p.taken_at_ms, age_ms)
                });
                let is_latest = !points.iter().any(|other| is_later(p, other));
                let is_latest_app = p.is_app_consistent && !too_old
                    && !points.iter().any(|other| other.is_app_consistent && is_later(p, other));
                let stays = p.is_held || is_latest || is_latest_app || !(too_old || beaten);
                prop_assert_eq!(expired.contains(&p.point), !stays);
            }
        }

        /// Whatever a host says of the points that it makes, no earlier point goes before its time by the server's clock.
        #[test]
        fn no_later_point_drives_out_an_earlier_one(
            before in ages(),
            times in prop::collection::vec((any::<i64>(), any::<bool>()), 0..20),
        ) {
            // There was one of this moment: ages counted from it before, as they do now.
            let before = points_of(&[before, vec![(0, false, false)]].concat(), NOW_MS);
            let later = times.iter().enumerate().map(|(i, (at, app))| point(before.len() + i, *at, *app, false));
            let all: Vec<_> = before.iter().copied().chain(later).collect();
            // That it was the latest was no promise.
            let must_stay = |p: &PointAge| {
                let is_later = |other: &&PointAge| (other.taken_at_ms, other.sequence) > (p.taken_at_ms, p.sequence);
                !before.iter().any(|other| is_later(&other))
                    || p.is_app_consistent && !before.iter().filter(|other| other.is_app_consistent).any(|other| is_later(&other))
            };
            let expired: HashSet<_> = expired_points(&before, &policy(24), NOW_MS).into_iter().collect();
            for gone in expired_points(&all, &policy(24), NOW_MS) {
                let was_kept = before.iter().find(|p| p.point == gone).is_some_and(|p| !expired.contains(&gone) && !must_stay(p));
                prop_assert!(!was_kept, "{gone:?}");
            }
        }
    }
}
