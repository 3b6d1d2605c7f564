//! Jobs: the engine, and what a workflow's step is.

mod engine;
mod step;

pub use engine::{Engine, Fault, Faults, JobRequest, job_log, tasks};
pub use step::{Done, ItemChange, Patience, Step, StepAction, StepContext, Task, Undone};
pub(crate) use step::{Retry, SILENCE_MAX, call_heard};
