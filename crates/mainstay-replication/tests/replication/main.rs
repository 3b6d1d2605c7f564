//! The data plane over streams that break, are slow, or lie.

#[cfg(test)]
mod bench;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod journeys;
#[cfg(test)]
mod latency;
