//! Tests of the whole system in one process.

#![expect(clippy::unwrap_used, reason = "a test may end at what it does not expect")]

mod clock;
mod copies;
mod disks;
mod engine;
mod journeys;
mod network;
mod operations;
mod plans;
mod random;
mod rot;
mod seeds;
mod steps;
mod storage;
mod support;
mod workflows;
