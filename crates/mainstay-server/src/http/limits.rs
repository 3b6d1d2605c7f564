//! How often an address may try: brakes on guessing and on filling the audit trail.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Mutex, PoisonError},
};

/// The time over which attempts are counted.
const WINDOW_MS: i64 = 60_000;
/// Addresses that are remembered at once. When more come within a window all are forgotten: a brake that gives way is
/// better than memory that does not.
const ADDRESSES_MAX: usize = 10_000;

/// Counts attempts by address.
pub(crate) struct Limit {
    attempts_max: u32,
    windows: Mutex<HashMap<IpAddr, Window>>,
}

struct Window {
    began_ms: i64,
    attempts: u32,
}

/// Who has one IPv6 address has the 2^64 around it too.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        address => address,
    }
}

impl Limit {
    /// So many attempts in a minute.
    pub(crate) fn new(attempts_max: u32) -> Self {
        Self { attempts_max, windows: Mutex::default() }
    }

    /// Counts an attempt. If it is one too many: the seconds until the next may be made.
    pub(super) fn attempt(&self, address: IpAddr, now_ms: i64) -> Result<(), i64> {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let address = network(address);
        // A window that begins in the future was counted before the clock was set back.
        let is_over = |window: &Window| !(0..WINDOW_MS).contains(&(now_ms - window.began_ms));
        if windows.len() >= ADDRESSES_MAX && !windows.contains_key(&address) {
            windows.retain(|_, window| !is_over(window));
            if windows.len() >= ADDRESSES_MAX {
                windows.clear();
            }
        }
        let window = windows.entry(address).or_insert(Window { began_ms: now_ms, attempts: 0 });
        if is_over(window) {
            *window = Window { began_ms: now_ms, attempts: 0 };
        }
        if window.attempts >= self.attempts_max {
            let left_ms = window.began_ms + WINDOW_MS - now_ms;
            return Err((left_ms + 999) / 1000);
        }
        window.attempts += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_waits_until_its_minute_is_over_and_others_do_not() {
        let limit = Limit::new(2);
        let (one, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        assert_eq!(limit.attempt(one, 0), Ok(()));
        assert_eq!(limit.attempt(one, 30_000), Ok(()));
        assert_eq!(limit.attempt(one, 30_001), Err(30));
        assert_eq!(limit.attempt(other, 30_001), Ok(()));
        assert_eq!(limit.attempt(one, 60_000), Ok(()));
        // A clock that is set back locks nobody out.
        assert_eq!(limit.attempt(one, -1_000_000), Ok(()));
    }

    #[test]
    fn addresses_of_one_network_count_together_and_memory_is_bounded() {
        let limit = Limit::new(1);
        assert_eq!(limit.attempt("2001:db8::1".parse().unwrap(), 0), Ok(()));
        assert!(limit.attempt("2001:db8::2".parse().unwrap(), 0).is_err());
        for number in 0..30_000_u32 {
            let address = IpAddr::from(number.to_be_bytes());
            assert_eq!(limit.attempt(address, 0), Ok(()));
        }
        assert!(limit.windows.lock().unwrap().len() <= ADDRESSES_MAX);
    }
}
