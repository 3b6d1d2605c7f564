//! The pure domain of site recovery.
