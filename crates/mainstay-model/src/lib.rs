//! The pure domain of site recovery: what the states are, which moves are legal and how the numbers
//! are computed. No I/O, no clock, no randomness: time and identifiers are arguments.

mod ids;

pub use ids::{CaptureId, Generation, ItemId, JobId, PointId, ProviderId, SessionId, VmId};
