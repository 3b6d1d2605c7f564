//! How hard to compress: as the link and the processors have room for.

use std::time::{Duration, Instant};

use mainstay_block::frame::Effort;
use nix::time::{ClockId, clock_gettime};

/// Bytes of a transfer after which its compression gives way to its speed: what is small is over before it matters.
const SMALL_BYTES: u64 = 16 << 20;
/// Of an hour that compression takes, the processor's part below which others are held to want the processors too.
const SHARE_MIN: f64 = 0.8;
/// Saved part of the bytes below which compression gains little. By its cost in processor time alone it would have to save
/// more than half of them on a link that is faster than it (measured: docs/benchmarks.md), but space counts as well.
const GAIN_MIN: f64 = 0.2;
/// While compression gains little, one read of so many tries whether it still does, and whether the processors are still
/// wanted: five a second on two busy cores.
const TRIAL_EVERY: u32 = 128;
/// Weight of the newest frame in the averages: a few dozen frames, some tens of milliseconds, tell.
const WEIGHT: f64 = 1.0 / 32.0;

/// What compressing one frame took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    wall: Duration,
    cpu: Duration,
}

impl Cost {
    /// Runs something and says what it took.
    pub(crate) fn of<T>(work: impl FnOnce() -> T) -> (T, Self) {
        let (begun, cpu) = (Instant::now(), thread_time());
        let done = work();
        // A clock that cannot be read says that nothing was waited for.
        let wall = begun.elapsed();
        let cpu = thread_time().zip(cpu).map_or(wall, |(now, before)| now.saturating_sub(before));
        (done, Self { wall, cpu })
    }
}

fn thread_time() -> Option<Duration> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).ok().map(Duration::from)
}

/// What a transfer has seen of the link, the processors and its own content.
#[derive(Debug)]
pub(crate) struct Pace {
    sent_bytes: u64,
    wall: f64,
    cpu: f64,
    /// Part of the bytes that compression saved, where it was tried.
    gain: f64,
    untried: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Self { sent_bytes: 0, wall: 0.0, cpu: 0.0, gain: 1.0, untried: 0 }
    }
}

/// A frame that was made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Made {
    pub(crate) effort: Effort,
    /// Bytes of its data, and of the frame.
    pub(crate) plain_bytes: u64,
    pub(crate) frame_bytes: u64,
    pub(crate) cost: Cost,
}

impl Pace {
    /// Takes note of a frame.
    pub(crate) fn record(&mut self, made: Made) {
        self.sent_bytes += made.frame_bytes;
        // What is not compressed is made in a few microseconds, in which nobody else comes to want the processor: it would say
        // that there is time for compression, until the next frame that is compressed says that there is none.
        if made.effort == Effort::None {
            return;
        }
        self.wall += WEIGHT * (made.cost.wall.as_secs_f64() - self.wall);
        self.cpu += WEIGHT * (made.cost.cpu.as_secs_f64() - self.cpu);
        if made.plain_bytes > 0 {
            let gain = 1.0 - made.frame_bytes as f64 / made.plain_bytes as f64;
            self.gain += WEIGHT * (gain - self.gain);
        }
    }

    /// How hard to compress the next frame. `is_held_up` says that frames wait for the link. A limited or slow link waits
    /// for nothing but its turn, and small frames shorten it; but when the processors are wanted by others, the link may
    /// wait for them at its other end, on the same machine or another one as busy, and compression only takes more from
    /// them.
    pub(crate) fn effort(&mut self, is_limited: bool, is_held_up: bool) -> Effort {
        let is_contended = self.cpu < self.wall * SHARE_MIN;
        if is_limited || self.sent_bytes <= SMALL_BYTES || (is_held_up && !is_contended) {
            return Effort::Small;
        }
        if is_contended && self.gain < GAIN_MIN {
            self.untried = (self.untried + 1) % TRIAL_EVERY;
            if self.untried > 0 {
                return Effort::None;
            }
        }
        Effort::Fast
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is seen after so many frames of a MiB, each of this size.
    fn pace(frames: u32, wall_us: u64, cpu_us: u64, frame_bytes: u64) -> Pace {
        let mut pace = Pace::default();
        for _ in 0..frames {
            let cost = Cost { wall: Duration::from_micros(wall_us), cpu: Duration::from_micros(cpu_us) };
            pace.record(Made { effort: Effort::Fast, plain_bytes: 1 << 20, frame_bytes, cost });
        }
        pace
    }

    const HALF: u64 = 1 << 19;
    const MOST: u64 = 900 << 10;

    #[test]
    fn what_is_small_is_made_small() {
        for is_held_up in [false, true] {
            assert_eq!(pace(10, 1000, 100, HALF).effort(false, is_held_up), Effort::Small);
        }
    }

    #[test]
    fn a_link_that_waits_gets_speed_and_a_slow_link_gets_small_frames() {
        let mut idle = pace(200, 1000, 990, HALF);
        assert_eq!(idle.effort(false, false), Effort::Fast);
        assert_eq!(idle.effort(false, true), Effort::Small);
        assert_eq!(idle.effort(true, false), Effort::Small);
    }

    #[test]
    fn busy_processors_are_not_made_busier() {
        let mut busy = pace(200, 1000, 500, HALF);
        assert_eq!(busy.effort(false, true), Effort::Fast);
        assert_eq!(busy.effort(true, true), Effort::Small);
    }

    #[test]
    fn what_compression_does_not_shorten_is_left_alone_but_tried_now_and_then() {
        let mut busy = pace(200, 1000, 500, MOST);
        let efforts: Vec<Effort> = (0..2 * TRIAL_EVERY).map(|_| busy.effort(false, false)).collect();
        let tried = efforts.iter().filter(|effort| **effort == Effort::Fast).count();
        assert_eq!((tried, efforts.len()), (2, 2 * TRIAL_EVERY as usize));
        assert!(efforts.iter().all(|effort| *effort != Effort::Small));
        // However short the others take.
        for _ in 0..1000 {
            let cost = Cost { wall: Duration::from_micros(9), cpu: Duration::from_micros(9) };
            busy.record(Made { effort: Effort::None, plain_bytes: 1 << 20, frame_bytes: 1 << 20, cost });
        }
        let tried = (0..2 * TRIAL_EVERY).filter(|_| busy.effort(false, false) == Effort::Fast).count();
        assert_eq!(tried, 2);
        // With time for it, or content that gains, it compresses again.
        assert_eq!(pace(200, 1000, 990, MOST).effort(false, false), Effort::Fast);
        for _ in 0..100 {
            let cost = Cost { wall: Duration::from_millis(2), cpu: Duration::from_millis(1) };
            busy.record(Made { effort: Effort::Fast, plain_bytes: 1 << 20, frame_bytes: HALF, cost });
        }
        assert!((0..64).all(|_| busy.effort(false, false) == Effort::Fast));
    }

    #[test]
    fn what_is_computed_takes_processor_time_and_what_is_waited_for_does_not() {
        let (sum, cost) = Cost::of(|| (0..20_000_000_u64).fold(0, |sum, at| std::hint::black_box(sum ^ at)));
        assert!(std::hint::black_box(sum) < u64::MAX);
        assert!(cost.cpu > Duration::ZERO);
        let ((), slept) = Cost::of(|| std::thread::sleep(Duration::from_millis(50)));
        assert!(slept.wall >= Duration::from_millis(50) && slept.cpu < slept.wall / 2, "{slept:?}");
    }
}
