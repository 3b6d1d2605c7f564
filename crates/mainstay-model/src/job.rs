//! A job as a log of steps, and what follows from the log.
//!
//! The log is the truth: what a job does next is a pure function of its step log and of what people asked
//! for ([`JobLog::next`]). The engine writes an entry before it acts and another after; after a crash it asks
//! the same function again, and a step that was begun is run again.
//!
//! ```text
//!  NotStarted ─► Running ─► Suspended (a person continues) ─► Running ─► Succeeded
//!                   │ a step failed, or cancel before the point of no return
//!                   ▼
//!                Unwinding (undo, newest first) ─► Failed | Cancelled
//!                   │ an undo failed
//!                   ▼
//!                 Stuck ── restart ─► Unwinding
//! ```

use serde::{Deserialize, Serialize};

/// How far a step is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum StepState {
    /// Not begun.
    NotStarted,
    /// Begun; it may have happened in part.
    Started,
    /// Waits for a person.
    Waiting,
    /// Done.
    Succeeded,
    /// Not needed this time.
    Skipped,
    /// Failed; it may have happened in part.
    Failed,
    /// Its undo was begun.
    UndoStarted,
    /// Undone (or had nothing to undo).
    Undone,
    /// Its undo failed.
    UndoFailed,
}

/// What the engine needs to know of a step beforehand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepPlan {
    /// From the moment this step begins the job cannot be cancelled or undone, only completed.
    pub is_point_of_no_return: bool,
}

/// What a job does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Run (or run again) this step.
    Run(usize),
    /// Wait for a person at this step.
    Wait(usize),
    /// Undo this step.
    Undo(usize),
    /// The job is over.
    End(Ending),
}

/// How a job ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Ending {
    /// All steps are done.
    Succeeded,
    /// A step failed; what was done is undone.
    Failed,
    /// Cancelled; what was done is undone.
    Cancelled,
    /// An undo failed, or a step beyond the point of no return: a person must look, then restart.
    Stuck,
}

/// A job's steps and where each stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobLog {
    /// One per step, in order.
    pub steps: Vec<(StepPlan, StepState)>,
    /// Whether somebody asked to cancel (and was not refused).
    pub is_cancel_requested: bool,
}

impl JobLog {
    /// Whether the job has begun something that cannot be undone.
    pub fn is_past_return(&self) -> bool {
        self.steps.iter().any(|(plan, state)| plan.is_point_of_no_return && *state != StepState::NotStarted)
    }

    /// Whether a step failed or cancellation began, so that the job now unwinds.
    fn is_unwinding(&self) -> bool {
        let has_failed = self.steps.iter().any(|(_, state)| {
            matches!(
                state,
                StepState::Failed | StepState::UndoStarted | StepState::Undone | StepState::UndoFailed
            )
        });
        !self.is_past_return() && (has_failed || self.is_cancel_requested)
    }

    /// What the job does next.
    pub fn next(&self) -> Next {
        if self.steps.iter().any(|(_, state)| *state == StepState::UndoFailed) {
            return Next::End(Ending::Stuck);
        }
        if self.is_unwinding() {
            let undo = self.steps.iter().rposition(|(_, state)| {
                !matches!(state, StepState::NotStarted | StepState::Skipped | StepState::Undone)
            });
            return match undo {
                Some(step) => Next::Undo(step),
                None if self.is_cancel_requested => Next::End(Ending::Cancelled),
                None => Next::End(Ending::Failed),
            };
        }
        for (step, (_, state)) in self.steps.iter().enumerate() {
            match state {
                StepState::Succeeded | StepState::Skipped => {}
                StepState::Waiting => return Next::Wait(step),
                // Only beyond the point of no return: there is no way back, and the way on failed.
                StepState::Failed => return Next::End(Ending::Stuck),
                _ => return Next::Run(step),
            }
        }
        Next::End(Ending::Succeeded)
    }

    /// Whether a cancel request is accepted now; the error says why not.
    pub fn check_cancel(&self) -> Result<(), &'static str> {
        match self.next() {
            Next::End(_) => Err("the job is over"),
            Next::Undo(_) => Err("the job is being undone already"),
            _ if self.is_past_return() => {
                Err("the job has passed its point of no return and can only be completed")
            }
            _ => Ok(()),
        }
    }

    /// Prepares a stuck job for another try: failed undos are undone again, and a step that failed beyond
    /// the point of no return is run again.
    pub fn restart(&mut self) {
        let is_past_return = self.is_past_return();
        for (_, state) in &mut self.steps {
            match state {
                StepState::UndoFailed => *state = StepState::UndoStarted,
                StepState::Failed if is_past_return => *state = StepState::Started,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn log(count: usize, point_of_no_return: Option<usize>) -> JobLog {
        let steps = (0..count)
            .map(|i| {
                (StepPlan { is_point_of_no_return: Some(i) == point_of_no_return }, StepState::NotStarted)
            })
            .collect();
        JobLog { steps, is_cancel_requested: false }
    }

    proptest! {
        /// Runs a job whose steps fail, wait, crash and are cancelled at random: it always ends, each step is undone
        /// at most once and only if it was begun, newest first, and nothing is undone beyond the point of no return.
        #[test]
        fn every_job_ends_well(
            count in 1..8_usize,
            point_of_no_return in prop::option::of(0..8_usize),
            fates in prop::collection::vec(0..6_u8, 64),
            cancel_at in prop::option::of(0..20_usize),
        ) {
            let mut log = log(count, point_of_no_return);
            let mut undone: Vec<usize> = Vec::new();
            let mut restarts = 0;
            let mut ending = None;
            for round in 0..200_usize {
                let fate = fates[round % fates.len()];
                if cancel_at == Some(round) && log.check_cancel().is_ok() {
                    prop_assert!(!log.is_past_return());
                    log.is_cancel_requested = true;
                }
                match log.next() {
                    Next::Run(step) => {
                        prop_assert!(log.steps[..step].iter().all(|(_, s)| matches!(s, StepState::Succeeded | StepState::Skipped)));
                        log.steps[step].1 = match fate {
                            0 => StepState::Started, // a crash in the middle
                            1 if round < 60 => StepState::Failed,
                            2 if !log.steps[step].0.is_point_of_no_return => StepState::Waiting,
                            3 => StepState::Skipped,
                            _ => StepState::Succeeded,
                        };
                    }
                    Next::Wait(step) => log.steps[step].1 = StepState::Succeeded,
                    Next::Undo(step) => {
                        prop_assert!(!log.is_past_return());
                        prop_assert!(undone.last().is_none_or(|last| *last > step), "undone in order");
                        log.steps[step].1 = match fate {
                            0 => StepState::UndoStarted,
                            1 if round < 60 => StepState::UndoFailed,
                            _ => {
                                undone.push(step);
                                StepState::Undone
                            }
                        };
                    }
                    Next::End(Ending::Stuck) if restarts < 50 => {
                        restarts += 1;
                        log.restart();
                    }
                    Next::End(end) => {
                        ending = Some(end);
                        break;
                    }
                }
            }
            let states: Vec<_> = log.steps.iter().map(|(_, s)| *s).collect();
            match ending {
                Some(Ending::Succeeded) => {
                    prop_assert!(states.iter().all(|s| matches!(s, StepState::Succeeded | StepState::Skipped)));
                    prop_assert!(undone.is_empty());
                }
                Some(Ending::Failed | Ending::Cancelled) => {
                    prop_assert!(states.iter().all(|s| matches!(s, StepState::NotStarted | StepState::Skipped | StepState::Undone)));
                    prop_assert_eq!(ending == Some(Ending::Cancelled), log.is_cancel_requested);
                }
                Some(Ending::Stuck) | None => prop_assert!(restarts == 50 || fates.iter().all(|f| *f == 0), "{:?}", states),
            }
        }
    }
}
