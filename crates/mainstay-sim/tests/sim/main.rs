//! Tests of the whole system in one process.

mod journeys;
mod random;
mod steps;
mod support;
mod workflows;
