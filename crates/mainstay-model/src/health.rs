//! RPO and replication health of an item, computed from evidence alone.

use serde::{Deserialize, Serialize};

use crate::{ItemState, ReplicationPolicy};

/// How well an item is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Health {
    /// As promised.
    Normal,
    /// Protected, but worse than promised.
    Warning,
    /// Not protected any more as the policy asks; a person must look.
    Critical,
}

/// What is known about an item's replication.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// The moment that the newest durable recovery point shows.
    pub last_point_ms: Option<i64>,
    /// When replication of the item began.
    pub replicating_since_ms: Option<i64>,
    /// The error of the last cycle, if it failed: what happened, what to do, and whether it goes away by itself.
    pub last_error: Option<CycleError>,
    /// Whether the source's agent is connected.
    pub is_agent_connected: bool,
    /// Recovery points that a scrub found damaged and nothing has healed since.
    pub damaged_points: usize,
    /// Whether the newest recovery point is one of them.
    pub is_newest_damaged: bool,
    /// Whether a copy runs that is not the active one.
    pub is_old_copy_running: bool,
    /// Why the active copy, off since its host's boot, could not be started.
    pub not_started: Option<String>,
}

/// Why a replication cycle failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CycleError {
    /// Stable name of the kind of error.
    pub code: String,
    /// What happened, to what.
    pub message: String,
    /// What to do next.
    pub remedy: String,
    /// Whether it is retried without anybody changing anything.
    pub is_transient: bool,
}

/// A health error, as shown with the item.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthError {
    /// Stable name.
    pub code: String,
    /// How bad it is.
    pub level: Health,
    /// What is wrong.
    pub message: String,
    /// What usually causes it.
    pub possible_causes: String,
    /// What to do.
    pub recommended_action: String,
}

/// The age of the newest durable recovery point, in seconds: what would be lost now.
pub fn rpo_seconds(last_point_ms: Option<i64>, now_ms: i64) -> Option<i64> {
    last_point_ms.map(|last_ms| ((now_ms - last_ms).max(0) + 999) / 1000)
}

/// Slack on top of three copy frequencies before the RPO counts as missed: one capture, its transfer and a
/// retry or two fit in it.
const RPO_WARNING_SLACK_SECONDS: i64 = 30;
/// Factor over the warning limit from which a missed RPO is critical.
const RPO_CRITICAL_FACTOR: i64 = 10;

/// Health of an item while it replicates, with all reasons; the worst reason decides.
pub fn replication_health(
    state: &ItemState,
    policy: &ReplicationPolicy,
    evidence: &Evidence,
    now_ms: i64,
) -> (Health, Vec<HealthError>) {
    let mut errors = Vec::new();
    if evidence.is_old_copy_running {
        errors.push(HealthError {
            code: "OldCopyRuns".to_owned(),
            level: Health::Critical,
            message: "A copy of the VM runs that is not the active one; what is written there will be lost."
                .to_owned(),
            possible_causes: "Somebody, or the host's cluster software, started the VM after a failover."
                .to_owned(),
            recommended_action:
                "Shut that copy down; with `old_copies = \"stop\"` the server does it itself.".to_owned(),
        });
    }
    if let Some(why) = &evidence.not_started {
        errors.push(HealthError {
            code: "StartAfterBootFailed".to_owned(),
            level: Health::Critical,
            message: format!("The VM is off since its host's boot: {why}"),
            possible_causes:
                "What it needs is not there: a network, a disk, memory; or it runs on another host."
                    .to_owned(),
            recommended_action:
                "Put that right: it is tried again every half minute. Or start the VM by hand.".to_owned(),
        });
    }
    if !state.phase.is_replicating() {
        return with_worst(errors);
    }
    if !evidence.is_agent_connected {
        errors.push(HealthError {
            code: "AgentDisconnected".to_owned(),
            level: Health::Critical,
            message: "The agent of the protected site is not connected; nothing is replicated.".to_owned(),
            possible_causes: "The host or its agent is down, or the network to the server is cut.".to_owned(),
            recommended_action: "Check the host and the network. If the site is lost, fail over.".to_owned(),
        });
    }
    if let Some(error) = &evidence.last_error {
        errors.push(HealthError {
            code: error.code.clone(),
            level: if error.is_transient { Health::Warning } else { Health::Critical },
            message: error.message.clone(),
            possible_causes: causes(&error.code).to_owned(),
            recommended_action: if error.remedy.is_empty() {
                "It is retried. See the item's events.".to_owned()
            } else {
                error.remedy.clone()
            },
        });
    }
    if evidence.damaged_points > 0 {
        let message = match evidence.damaged_points {
            1 => "1 recovery point has blocks that the store cannot read any more.".to_owned(),
            count => format!("{count} recovery points have blocks that the store cannot read any more."),
        };
        errors.push(HealthError {
            code: "ReplicaDamaged".to_owned(),
            level: if evidence.is_newest_damaged { Health::Critical } else { Health::Warning },
            message,
            possible_causes:
                "The medium of the store returns other bytes than were written, or loses objects.".to_owned(),
            recommended_action:
                "Check the store's medium. The next cycle sends again what the source still has; \
                                 older points that stay damaged are passed over until they expire."
                    .to_owned(),
        });
    }
    let reference_ms = evidence.last_point_ms.or(evidence.replicating_since_ms);
    let limit_seconds = i64::from(policy.copy_frequency_seconds) * 3 + RPO_WARNING_SLACK_SECONDS;
    // Initial replication takes as long as the disks are large; only deltas promise an RPO.
    if let (Some(_), Some(rpo_seconds)) = (evidence.last_point_ms, rpo_seconds(reference_ms, now_ms))
        && rpo_seconds > limit_seconds
    {
        let is_critical = rpo_seconds > limit_seconds * RPO_CRITICAL_FACTOR;
        errors.push(HealthError {
            code: "RpoExceeded".to_owned(),
            level: if is_critical { Health::Critical } else { Health::Warning },
            message: format!(
                "The newest recovery point is {rpo_seconds} s old; the policy copies every {} s.",
                policy.copy_frequency_seconds
            ),
            possible_causes: "The VM writes faster than the link carries, or cycles fail.".to_owned(),
            recommended_action: "Compare the VM's write rate with the link, or raise the copy frequency."
                .to_owned(),
        });
    }
    with_worst(errors)
}

fn with_worst(errors: Vec<HealthError>) -> (Health, Vec<HealthError>) {
    let worst = errors.iter().map(|error| error.level).max().unwrap_or(Health::Normal);
    (worst, errors)
}

/// What usually is behind a failed cycle, by the name of its error.
fn causes(code: &str) -> &'static str {
    match code {
        "NoSpace" => {
            "A file system is full: that of the recovery site's store, or of the run directory of the protected host's agent."
        }
        "Busy" => "Somebody else works on the VM or its images: a backup, a snapshot, a migration.",
        "TimedOut" => "The host or the guest is overloaded, or hangs.",
        "NotFound" => "The VM, or a disk of it, was removed or replaced on its host.",
        _ => "The last replication cycle failed.",
    }
}

/// Delay before the next try after `failures` failed ones in a row: Site Recovery's ladder of 1, 2, 4, 8 and 10
/// minutes, then every 30 minutes. Connections are retried faster, by those who hold them.
pub fn retry_delay_seconds(failures: u32) -> u32 {
    match failures {
        0 => 0,
        1 => 60,
        2 => 120,
        3 => 240,
        4 => 480,
        5 => 600,
        _ => 1800,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Phase;

    const POLICY: ReplicationPolicy = ReplicationPolicy {
        copy_frequency_seconds: 30,
        retention_hours: 24,
        app_consistent_frequency_hours: 0,
        bytes_per_second_max: None,
    };

    fn health_at(seconds: i64) -> Health {
        let state = ItemState { phase: Phase::Protected, ..ItemState::new() };
        let evidence = Evidence { last_point_ms: Some(0), is_agent_connected: true, ..Evidence::default() };
        replication_health(&state, &POLICY, &evidence, seconds * 1000).0
    }

    #[test]
    fn a_growing_rpo_warns_and_then_is_critical() {
        assert_eq!(health_at(120), Health::Normal);
        assert_eq!(health_at(121), Health::Warning);
        assert_eq!(health_at(1201), Health::Critical);
    }

    #[test]
    fn damage_is_critical_while_the_newest_point_has_it() {
        let state = ItemState { phase: Phase::Protected, ..ItemState::new() };
        let sound = Evidence { last_point_ms: Some(0), is_agent_connected: true, ..Evidence::default() };
        let old = Evidence { damaged_points: 2, ..sound.clone() };
        let newest = Evidence { is_newest_damaged: true, ..old.clone() };
        for (evidence, expected) in
            [(sound, Health::Normal), (old, Health::Warning), (newest, Health::Critical)]
        {
            assert_eq!(replication_health(&state, &POLICY, &evidence, 0).0, expected);
        }
    }

    #[test]
    fn a_lost_agent_is_critical_only_while_replicating() {
        let evidence = Evidence::default();
        let mut state = ItemState { phase: Phase::Protected, ..ItemState::new() };
        let (health, errors) = replication_health(&state, &POLICY, &evidence, 0);
        assert_eq!((health, errors[0].code.as_str()), (Health::Critical, "AgentDisconnected"));
        state.phase = Phase::UnplannedFailoverCommitted;
        assert_eq!(replication_health(&state, &POLICY, &evidence, 0).0, Health::Normal);
    }

    #[test]
    fn rpo_is_rounded_up_and_never_negative() {
        assert_eq!(rpo_seconds(None, 5), None);
        assert_eq!(rpo_seconds(Some(1000), 1001), Some(1));
        assert_eq!(rpo_seconds(Some(5000), 1000), Some(0));
    }
}
