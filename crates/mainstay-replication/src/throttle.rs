//! A limit on bytes per second.

use std::time::Duration;

use tokio::time::Instant;

/// Paces a stream of bytes: after each piece it waits until the average rate is kept. Idle time is credited for at
/// most a quarter of a second, so that a pause is not followed by a long burst.
#[derive(Debug)]
pub(crate) struct Throttle {
    bytes_per_second: Option<u64>,
    free_at: Option<Instant>,
}

const CREDIT: Duration = Duration::from_millis(250);

impl Throttle {
    pub(crate) fn new(bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second: bytes_per_second.filter(|rate| *rate > 0), free_at: None }
    }

    pub(crate) async fn spend(&mut self, bytes: u64) {
        let Some(rate) = self.bytes_per_second else { return };
        let now = Instant::now();
        let earliest = now.checked_sub(CREDIT).unwrap_or(now);
        let free_at = self.free_at.map_or(now, |at| at.max(earliest));
        tokio::time::sleep_until(free_at).await;
        self.free_at = Some(free_at + Duration::from_secs_f64(bytes as f64 / rate as f64));
    }
}
