//! Replication policies: how often, how long, how consistent.

use serde::{Deserialize, Serialize};

/// How a set of VMs is replicated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicationPolicy {
    /// Seconds between the starts of two deltas.
    pub copy_frequency_seconds: u32,
    /// Hours for which recovery points are kept; 0 = only the latest.
    pub retention_hours: u32,
    /// Hours between two application-consistent recovery points; 0 = none.
    pub app_consistent_frequency_hours: u32,
    /// Bytes per second on the wire at most, for each VM; `None` = as fast as it goes.
    #[serde(default)]
    pub bytes_per_second_max: Option<u64>,
}

/// Shortest copy frequency: below it a capture's own cost (about 0.1 s of the host's processor) would show.
pub const COPY_FREQUENCY_SECONDS_MIN: u32 = 5;
/// Longest copy frequency; Site Recovery's longest is 15 minutes.
pub const COPY_FREQUENCY_SECONDS_MAX: u32 = 3600;
/// Longest retention: 30 days, as the best journals of the field keep.
pub const RETENTION_HOURS_MAX: u32 = 720;

/// A value that a policy cannot have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPolicy {
    /// The copy frequency is out of range.
    #[error(
        "a copy frequency of {0} s is not possible: choose {COPY_FREQUENCY_SECONDS_MIN} to {COPY_FREQUENCY_SECONDS_MAX} s (30 and 300 are usual)"
    )]
    CopyFrequency(u32),
    /// The retention is out of range.
    #[error("a retention of {0} h is not possible: choose 0 (only the latest) to {RETENTION_HOURS_MAX} h")]
    Retention(u32),
    /// Application-consistent points would be thrown away before the next one is made.
    #[error(
        "an application-consistent point every {frequency} h does not fit a retention of {retention} h: it must not be longer"
    )]
    AppConsistentFrequency {
        /// Hours between two points.
        frequency: u32,
        /// Hours for which they are kept.
        retention: u32,
    },
    /// A throttle of zero would stop replication.
    #[error(
        "a limit of 0 bytes per second would stop replication: leave the limit out, or disable replication"
    )]
    Throttle,
}

impl ReplicationPolicy {
    /// Checks all values.
    pub fn validate(&self) -> Result<(), InvalidPolicy> {
        if !(COPY_FREQUENCY_SECONDS_MIN..=COPY_FREQUENCY_SECONDS_MAX).contains(&self.copy_frequency_seconds) {
            return Err(InvalidPolicy::CopyFrequency(self.copy_frequency_seconds));
        }
        if self.retention_hours > RETENTION_HOURS_MAX {
            return Err(InvalidPolicy::Retention(self.retention_hours));
        }
        if self.app_consistent_frequency_hours > 0
            && self.app_consistent_frequency_hours > self.retention_hours
        {
            return Err(InvalidPolicy::AppConsistentFrequency {
                frequency: self.app_consistent_frequency_hours,
                retention: self.retention_hours,
            });
        }
        if self.bytes_per_second_max == Some(0) {
            return Err(InvalidPolicy::Throttle);
        }
        Ok(())
    }

    /// Whether the next delta should be application-consistent, given when the last such point was taken.
    pub fn wants_app_consistent(&self, last_ms: Option<i64>, now_ms: i64) -> bool {
        let interval_ms = i64::from(self.app_consistent_frequency_hours) * 3_600_000;
        interval_ms > 0 && last_ms.is_none_or(|last_ms| now_ms - last_ms >= interval_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: ReplicationPolicy = ReplicationPolicy {
        copy_frequency_seconds: 30,
        retention_hours: 24,
        app_consistent_frequency_hours: 1,
        bytes_per_second_max: None,
    };

    #[test]
    fn limits_are_inclusive_and_named_in_the_error() {
        assert_eq!(GOOD.validate(), Ok(()));
        for seconds in [5, 3600] {
            assert_eq!(ReplicationPolicy { copy_frequency_seconds: seconds, ..GOOD }.validate(), Ok(()));
        }
        let error = ReplicationPolicy { copy_frequency_seconds: 4, ..GOOD }.validate().unwrap_err();
        assert!(error.to_string().contains("5 to 3600"), "{error}");
        assert!(ReplicationPolicy { retention_hours: 721, ..GOOD }.validate().is_err());
        assert!(ReplicationPolicy { retention_hours: 0, ..GOOD }.validate().is_err());
        assert!(ReplicationPolicy { bytes_per_second_max: Some(0), ..GOOD }.validate().is_err());
    }

    #[test]
    fn app_consistent_points_are_due_after_their_interval() {
        assert!(GOOD.wants_app_consistent(None, 0));
        assert!(!GOOD.wants_app_consistent(Some(0), 3_599_999));
        assert!(GOOD.wants_app_consistent(Some(0), 3_600_000));
        assert!(
            !ReplicationPolicy { app_consistent_frequency_hours: 0, ..GOOD }.wants_app_consistent(None, 0)
        );
    }
}
