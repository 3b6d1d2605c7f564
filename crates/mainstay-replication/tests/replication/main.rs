//! The data plane over streams that break, are slow, or lie.

mod bench;
mod hostile;
mod journeys;
mod latency;
