//! Tests of the whole system in one process.

mod journeys;
mod steps;
mod support;
mod workflows;
