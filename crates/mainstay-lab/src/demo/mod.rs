//! The demonstration: the whole journey on real VMs, every step proved by data that the guest itself wrote.

mod acknowledgements;
mod journey;

use serde::{Deserialize, Serialize};

use crate::ledger::Ledger;

pub use journey::run;

/// What a demonstration showed. Scripts outside the project rely on the words.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct DemoReport {
    /// Whether every phase was proved.
    pub ok: bool,
    /// The phases in order.
    pub phases: Vec<PhaseReport>,
}

/// What a phase showed; unknown is null.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PhaseReport {
    /// Its name.
    pub name: String,
    /// How long it took.
    pub seconds: f64,
    /// Bytes of distinct 4 KiB blocks that differ between the images before and after, found by comparing them.
    pub bytes_changed: Option<u64>,
    /// Bytes that went over the data connections between the sites (towards the site that receives the state).
    pub bytes_moved: Option<u64>,
    /// Age of the recovery point that was used, at the moment of the request.
    pub rpo_seconds: Option<f64>,
    /// From the accepted request to the guest's answer.
    pub rto_seconds: Option<f64>,
    /// Whether everything that the phase promises was seen.
    pub proved: bool,
    /// What the guest's ledger says afterwards.
    pub ledger: Option<Ledger>,
    /// What was seen, or what was missing.
    pub notes: String,
}

/// How far something is, as the server tells it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// What is being done; empty if nothing is.
    pub task: String,
    /// Bytes dealt with.
    pub bytes_done: u64,
    /// Bytes to deal with; 0 = not known.
    pub bytes_total: u64,
    /// Bytes that went over the data connection.
    pub bytes_moved: u64,
    /// Age of the newest recovery point.
    pub rpo_seconds: Option<i64>,
}

/// Tells a person what goes on.
pub trait Narrator: Send + Sync {
    /// A phase begins.
    fn begin(&self, name: &str);
    /// What goes on within the phase.
    fn say(&self, text: &str);
    /// How far it is.
    fn progress(&self, progress: &Progress);
    /// A phase ended.
    fn end(&self, report: &PhaseReport);
}
