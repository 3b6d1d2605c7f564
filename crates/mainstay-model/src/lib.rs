//! The pure domain of site recovery: what the states are, which moves are legal and how the numbers
//! are computed. No I/O, no clock, no randomness: time and identifiers are arguments.

mod configuration;
mod health;
mod ids;
mod job;
pub mod projection;
mod protected_item;
pub mod recovery_plan;
mod replication_policy;
mod retention;

pub use configuration::ConfigurationChange;
pub use health::{
    CycleError, Evidence, Health, HealthError, replication_health, retry_delay_seconds, rpo_seconds,
};
pub use ids::{CaptureId, Generation, ItemId, JobId, PointId, ProviderId, SessionId, VmId};
pub use job::{Ending, JobLog, Next, StepPlan, StepState};
pub use protected_item::{
    Event, ItemState, Location, Operation, Outcome, Phase, Refusal, Running, TestFailoverState,
};
pub use recovery_plan::RecoveryPlan;
pub use replication_policy::{
    COPY_FREQUENCY_SECONDS_MAX, COPY_FREQUENCY_SECONDS_MIN, InvalidPolicy, RETENTION_HOURS_MAX,
    ReplicationPolicy,
};
pub use retention::{PointAge, expired_points};
