//! The life of a replicated item, as one table.
//!
//! ```text
//!                    EnableProtection          first recovery point         FinalizeProtection
//!  EnablingProtection ───────────────► InitialReplication ─────► FinalizingProtection ─────► Protected ◄────────────┐
//!                                                                                             │  │ ▲                │
//!                                                        TestFailover, TestFailoverCleanup ───┘  │ └ (test copy)    │
//!                            ┌──────────────── UnplannedFailover / PlannedFailover ──────────────┘                  │
//!                            ▼                                                                                      │
//!             ┌► (Un)PlannedFailoverCommitPending ──Commit──► (Un)PlannedFailoverCommitted                          │
//!             └── ChangeRecoveryPoint                              │ Failback                                       │
//!                                                                  ▼                                                │
//!                         FailbackCommitted ◄──Commit── FailbackCommitPending                                       │
//!                              └───────────────────────── ReverseReplicate ─────────────────────────────────────────┘
//! ```
//!
//! `DisableProtection` leads out of every phase. An item carries at most one operation at a time; its
//! phase moves when the operation succeeds and stays when it fails or is cancelled, because a failed
//! operation has been undone. What clients of the API see is a projection: [`crate::projection`].

use serde::{Deserialize, Serialize};

use crate::{Generation, JobId};

/// Where an item stands when nothing is under way. Each line says what it waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// The enable job; fails back to nothing.
    EnablingProtection,
    /// The first recovery point.
    InitialReplication,
    /// The finalize job that follows the first recovery point.
    FinalizingProtection,
    /// Anything: deltas flow.
    Protected,
    /// Commit, or a change of the recovery point; the VM runs at the recovery site.
    UnplannedFailoverCommitPending,
    /// The same after a failover without loss.
    PlannedFailoverCommitPending,
    /// A failback; the VM runs at the recovery site and its recovery points are gone.
    UnplannedFailoverCommitted,
    /// The same after a failover without loss.
    PlannedFailoverCommitted,
    /// Commit; the VM runs at home again, the recovery VM is kept, stopped.
    FailbackCommitPending,
    /// Reverse replication.
    FailbackCommitted,
}

impl Phase {
    /// All phases, in the order of the diagram.
    pub const ALL: [Self; 10] = [
        Self::EnablingProtection,
        Self::InitialReplication,
        Self::FinalizingProtection,
        Self::Protected,
        Self::UnplannedFailoverCommitPending,
        Self::PlannedFailoverCommitPending,
        Self::UnplannedFailoverCommitted,
        Self::PlannedFailoverCommitted,
        Self::FailbackCommitPending,
        Self::FailbackCommitted,
    ];

    /// Which site runs the VM.
    pub fn active_location(self) -> Location {
        match self {
            Self::EnablingProtection
            | Self::InitialReplication
            | Self::FinalizingProtection
            | Self::Protected
            | Self::FailbackCommitPending
            | Self::FailbackCommitted => Location::Primary,
            Self::UnplannedFailoverCommitPending
            | Self::PlannedFailoverCommitPending
            | Self::UnplannedFailoverCommitted
            | Self::PlannedFailoverCommitted => Location::Recovery,
        }
    }

    /// Whether deltas flow from the primary site to the store when no operation forbids it.
    pub fn is_replicating(self) -> bool {
        matches!(self, Self::InitialReplication | Self::FinalizingProtection | Self::Protected)
    }
}

/// One of the two sites of an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Location {
    /// Where the VM was protected.
    Primary,
    /// Where it is recovered.
    Recovery,
}

/// What can be done to an item; each is carried out by a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Operation {
    /// Begin to replicate a VM.
    EnableProtection,
    /// Complete protection after the first recovery point.
    FinalizeProtection,
    /// Boot a copy in an isolated network.
    TestFailover,
    /// Remove the copy.
    TestFailoverCleanup,
    /// Run the VM at the recovery site from a recovery point.
    UnplannedFailover,
    /// Stop the VM at home, ship the rest, run it at the recovery site.
    PlannedFailover,
    /// Run another recovery point instead.
    ChangeRecoveryPoint,
    /// Make the failover or failback final.
    Commit,
    /// Bring the VM home with what changed.
    Failback,
    /// Replicate to the recovery site again.
    ReverseReplicate,
    /// Compare everything and ship what differs.
    Resynchronize,
    /// Change target name, size, networks.
    UpdateProperties,
    /// Stop replicating.
    DisableProtection,
}

impl Operation {
    /// All operations.
    pub const ALL: [Self; 13] = [
        Self::EnableProtection,
        Self::FinalizeProtection,
        Self::TestFailover,
        Self::TestFailoverCleanup,
        Self::UnplannedFailover,
        Self::PlannedFailover,
        Self::ChangeRecoveryPoint,
        Self::Commit,
        Self::Failback,
        Self::ReverseReplicate,
        Self::Resynchronize,
        Self::UpdateProperties,
        Self::DisableProtection,
    ];

    /// Whether deltas may flow while it is under way.
    pub fn lets_replication_run(self) -> bool {
        matches!(
            self,
            Self::FinalizeProtection
                | Self::TestFailover
                | Self::TestFailoverCleanup
                | Self::Resynchronize
                | Self::UpdateProperties
        )
    }
}

/// Where the rehearsal stands; independent of the phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TestFailoverState {
    /// Never rehearsed, or the last rehearsal belongs to an earlier replication.
    #[default]
    None,
    /// A test copy runs and waits for its clean-up.
    WaitingForCleanup,
    /// The last test copy is cleaned up.
    CleanedUp,
}

/// An operation under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Running {
    /// What is done.
    pub operation: Operation,
    /// The job that does it.
    pub job: JobId,
}

/// The state of an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ItemState {
    /// Where it stands.
    pub phase: Phase,
    /// Where the rehearsal stands.
    pub test_failover: TestFailoverState,
    /// What is under way.
    pub running: Option<Running>,
    /// The fencing number of the active side.
    pub generation: Generation,
}

/// What happens to an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A job begins an operation.
    Begin(Running),
    /// The operation's job succeeded.
    Succeed(JobId),
    /// The operation's job failed or was cancelled, and was undone.
    Abandon(JobId),
    /// A recovery point became durable.
    PointReached,
    /// The operation under way takes the right to write away from whoever has it.
    Fence(JobId),
}

/// What becomes of an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It lives on in this state.
    State(ItemState),
    /// It is no longer protected: the item is removed.
    Removed,
}

/// A refused event, with what would be allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    /// Why, in a sentence.
    pub reason: String,
    /// What the item allows now.
    pub allowed: Vec<Operation>,
}

/// The transition table: from, operation, to. Every legal move of an operation is a line here and nowhere else
/// (`UpdateProperties` and `DisableProtection`, which are legal everywhere, are added by [`target`]).
const TRANSITIONS: &[(Phase, Operation, Phase)] = &[
    (Phase::EnablingProtection, Operation::EnableProtection, Phase::InitialReplication),
    (Phase::InitialReplication, Operation::Resynchronize, Phase::InitialReplication),
    (Phase::FinalizingProtection, Operation::FinalizeProtection, Phase::Protected),
    (Phase::Protected, Operation::PlannedFailover, Phase::PlannedFailoverCommitPending),
    (Phase::Protected, Operation::UnplannedFailover, Phase::UnplannedFailoverCommitPending),
    (Phase::Protected, Operation::TestFailover, Phase::Protected),
    (Phase::Protected, Operation::TestFailoverCleanup, Phase::Protected),
    (Phase::Protected, Operation::Resynchronize, Phase::Protected),
    (Phase::UnplannedFailoverCommitPending, Operation::Commit, Phase::UnplannedFailoverCommitted),
    (
        Phase::UnplannedFailoverCommitPending,
        Operation::ChangeRecoveryPoint,
        Phase::UnplannedFailoverCommitPending,
    ),
    (Phase::PlannedFailoverCommitPending, Operation::Commit, Phase::PlannedFailoverCommitted),
    (
        Phase::PlannedFailoverCommitPending,
        Operation::ChangeRecoveryPoint,
        Phase::PlannedFailoverCommitPending,
    ),
    (Phase::UnplannedFailoverCommitted, Operation::Failback, Phase::FailbackCommitPending),
    (Phase::PlannedFailoverCommitted, Operation::Failback, Phase::FailbackCommitPending),
    (Phase::FailbackCommitPending, Operation::Commit, Phase::FailbackCommitted),
    (Phase::FailbackCommitted, Operation::ReverseReplicate, Phase::Protected),
];

/// Where an operation leads from a phase; `None` = not legal there; `Some(None)` = the item ends.
fn target(phase: Phase, operation: Operation) -> Option<Option<Phase>> {
    match operation {
        Operation::DisableProtection if phase != Phase::EnablingProtection => Some(None),
        Operation::UpdateProperties if phase != Phase::EnablingProtection => Some(Some(phase)),
        _ => TRANSITIONS
            .iter()
            .find(|(from, by, _)| *from == phase && *by == operation)
            .map(|(_, _, to)| Some(*to)),
    }
}

impl ItemState {
    /// The state of an item whose enable job is about to begin.
    pub fn new() -> Self {
        Self {
            phase: Phase::EnablingProtection,
            test_failover: TestFailoverState::None,
            running: None,
            generation: Generation(1),
        }
    }

    /// What may be begun now, in the order of [`Operation::ALL`]. While an operation is under way: nothing.
    pub fn allowed_operations(&self) -> Vec<Operation> {
        if self.running.is_some() {
            return Vec::new();
        }
        Operation::ALL.into_iter().filter(|operation| self.why_not(*operation).is_none()).collect()
    }

    /// Whether an operation may begin; else why not, and what may.
    pub fn check(&self, operation: Operation) -> Result<(), Refusal> {
        match self.why_not(operation) {
            Some(reason) => Err(Refusal { reason, allowed: self.allowed_operations() }),
            None => Ok(()),
        }
    }

    /// Whether deltas flow from the primary site now.
    pub fn is_replicating(&self) -> bool {
        self.phase.is_replicating()
            && self.running.is_none_or(|running| running.operation.lets_replication_run())
    }

    /// Why an operation may not begin; `None` = it may.
    fn why_not(&self, operation: Operation) -> Option<String> {
        if let Some(running) = self.running {
            return Some(format!("{:?} is under way (job {})", running.operation, running.job));
        }
        if target(self.phase, operation).is_none() {
            return Some(format!("{operation:?} is not possible in state {:?}", self.phase));
        }
        let is_testing = self.test_failover == TestFailoverState::WaitingForCleanup;
        match operation {
            Operation::TestFailoverCleanup if !is_testing => {
                Some("there is no test failover to clean up".to_owned())
            }
            // The test copy holds names, addresses and space; it goes first, as in Site Recovery.
            _ if is_testing
                && !matches!(operation, Operation::TestFailoverCleanup | Operation::UpdateProperties) =>
            {
                Some("a test failover is waiting for its clean-up".to_owned())
            }
            _ => None,
        }
    }

    /// Applies an event. The only way in which an item's state changes.
    pub fn apply(&self, event: Event) -> Result<Outcome, Refusal> {
        let refuse = |reason: String| Refusal { reason, allowed: self.allowed_operations() };
        match event {
            Event::Begin(running) => {
                self.check(running.operation)?;
                Ok(Outcome::State(Self { running: Some(running), ..*self }))
            }
            Event::Succeed(job) => {
                let running = self.running_as(job).map_err(refuse)?;
                let phase = match target(self.phase, running.operation) {
                    Some(Some(phase)) => phase,
                    Some(None) => return Ok(Outcome::Removed),
                    // The first recovery point moved the phase on while the operation was under way.
                    None => self.phase,
                };
                let test_failover = match running.operation {
                    Operation::TestFailover => TestFailoverState::WaitingForCleanup,
                    Operation::TestFailoverCleanup => TestFailoverState::CleanedUp,
                    _ => self.test_failover,
                };
                Ok(Outcome::State(Self { phase, test_failover, running: None, generation: self.generation }))
            }
            Event::Abandon(job) => {
                let running = self.running_as(job).map_err(refuse)?;
                if running.operation == Operation::EnableProtection {
                    return Ok(Outcome::Removed);
                }
                Ok(Outcome::State(Self { running: None, ..*self }))
            }
            Event::PointReached if self.phase == Phase::InitialReplication => {
                Ok(Outcome::State(Self { phase: Phase::FinalizingProtection, ..*self }))
            }
            Event::PointReached => Ok(Outcome::State(*self)),
            Event::Fence(job) => {
                self.running_as(job).map_err(refuse)?;
                Ok(Outcome::State(Self { generation: self.generation.next(), ..*self }))
            }
        }
    }

    fn running_as(&self, job: JobId) -> Result<Running, String> {
        match self.running {
            Some(running) if running.job == job => Ok(running),
            Some(running) => Err(format!("the item belongs to job {}, not to job {job}", running.job)),
            None => Err(format!("job {job} is not under way on this item")),
        }
    }
}

impl Default for ItemState {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    fn job(number: u128) -> JobId {
        JobId(Uuid::from_u128(number))
    }

    fn run(state: ItemState, operation: Operation) -> ItemState {
        let Ok(Outcome::State(begun)) = state.apply(Event::Begin(Running { operation, job: job(1) })) else {
            panic!("{operation:?} refused in {state:?}")
        };
        let Ok(Outcome::State(done)) = begun.apply(Event::Succeed(job(1))) else {
            panic!("{operation:?} ended the item")
        };
        done
    }

    #[test]
    fn the_tutorials_journey_is_legal() {
        let mut state = run(ItemState::new(), Operation::EnableProtection);
        let Ok(Outcome::State(reached)) = state.apply(Event::PointReached) else { panic!("no point") };
        state = run(reached, Operation::FinalizeProtection);
        assert_eq!(state.phase, Phase::Protected);
        for operation in [
            Operation::TestFailover,
            Operation::TestFailoverCleanup,
            Operation::UnplannedFailover,
            Operation::ChangeRecoveryPoint,
            Operation::Commit,
            Operation::Failback,
            Operation::Commit,
            Operation::ReverseReplicate,
            Operation::PlannedFailover,
            Operation::Commit,
        ] {
            state = run(state, operation);
        }
        assert_eq!(state.phase, Phase::PlannedFailoverCommitted);
        assert_eq!(state.phase.active_location(), Location::Recovery);
    }

    #[test]
    fn a_refusal_says_what_is_allowed() {
        let state = ItemState { phase: Phase::FailbackCommitted, ..ItemState::new() };
        let refusal = state
            .apply(Event::Begin(Running { operation: Operation::TestFailover, job: job(1) }))
            .unwrap_err();
        assert!(refusal.reason.contains("FailbackCommitted"), "{refusal}");
        assert_eq!(
            refusal.allowed,
            [Operation::ReverseReplicate, Operation::UpdateProperties, Operation::DisableProtection]
        );
    }

    #[test]
    fn a_first_point_during_a_resynchronization_does_not_cost_the_item() {
        let initial = ItemState { phase: Phase::InitialReplication, ..ItemState::new() };
        let running = Running { operation: Operation::Resynchronize, job: job(1) };
        let mut state = initial;
        for event in [Event::Begin(running), Event::PointReached, Event::Succeed(job(1))] {
            let Ok(Outcome::State(next)) = state.apply(event) else { panic!("{event:?} in {state:?}") };
            state = next;
        }
        assert_eq!((state.phase, state.running), (Phase::FinalizingProtection, None));
    }

    fn any_event() -> impl Strategy<Value = Event> {
        let a_job = (0..3_u128).prop_map(job);
        let operation = prop::sample::select(Operation::ALL.to_vec());
        prop_oneof![
            (operation, a_job.clone()).prop_map(|(operation, job)| Event::Begin(Running { operation, job })),
            a_job.clone().prop_map(Event::Succeed),
            a_job.clone().prop_map(Event::Abandon),
            Just(Event::PointReached),
            a_job.prop_map(Event::Fence),
        ]
    }

    proptest! {
        #[test]
        fn random_events_keep_the_invariants(events in prop::collection::vec(any_event(), 0..200)) {
            let mut state = ItemState::new();
            for event in events {
                let allowed = state.allowed_operations();
                let before = state;
                match state.apply(event) {
                    Err(refusal) => prop_assert_eq!(refusal.allowed, allowed),
                    Ok(Outcome::Removed) => {
                        let operation = before.running.unwrap().operation;
                        prop_assert!(matches!(operation, Operation::DisableProtection | Operation::EnableProtection));
                        state = ItemState::new();
                        continue;
                    }
                    Ok(Outcome::State(next)) => {
                        // Fencing numbers never go back, and only Fence raises them.
                        prop_assert_eq!(
                            next.generation.0 - before.generation.0,
                            u64::from(matches!(event, Event::Fence(_)))
                        );
                        // Only what was announced as allowed begins, and never two at once.
                        if let Event::Begin(running) = event {
                            prop_assert!(allowed.contains(&running.operation));
                            prop_assert!(before.running.is_none());
                        }
                        // The phase moves only when an operation succeeds or the first point is there.
                        if before.phase != next.phase {
                            prop_assert!(matches!(event, Event::Succeed(_) | Event::PointReached));
                        }
                        // Deltas never flow from a site that is not active.
                        if next.is_replicating() {
                            prop_assert_eq!(next.phase.active_location(), Location::Primary);
                        }
                        state = next;
                    }
                }
                // There is always a way on: nothing under way means something is allowed, except while enabling.
                if state.running.is_none() {
                    prop_assert!(!state.allowed_operations().is_empty());
                }
            }
        }
    }
}
