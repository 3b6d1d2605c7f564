//! Time and chance of a simulation's thread. What libc has for them, and by what a runtime waits, is defined here in its place:
//! on a thread that [`begin`] was called on, it answers from the seed and from a clock that stands still until
//! [`advance_to`]; on all others it does what libc does.
//!
//! The standard library and all crates ask these functions in the end: for the keys of hash maps, identifiers, keys and
//! nonces, instants and times, and what a runtime does next.

#![expect(
    unsafe_code,
    reason = "these functions have the signatures of libc's, and ask the system in its place"
)]

use std::{
    cell::{Cell, RefCell},
    task::{Context, Poll, Waker},
};

/// Where clocks begin: a plausible day, so that differences of times make sense.
pub(crate) const BEGIN_MS: u64 = 1_750_000_000_000;
/// How often a runtime looks for events within a turn before others have theirs: tasks that wake each other for ever must not
/// stop the world.
const LOOKS_MAX: u32 = 1_000;

thread_local! {
    static IS_ON: Cell<bool> = const { Cell::new(false) };
    static NOW_MS: Cell<u64> = const { Cell::new(0) };
    static RANDOM: Cell<u64> = const { Cell::new(0) };
    static TURN: Turn = const { Turn::new() };
}

/// What a runtime waits for when it has nothing left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rest {
    /// When its next timer is due, in milliseconds of this clock.
    pub(crate) due_ms: Option<u64>,
    /// What tells that it has something to do before that.
    pub(crate) epoll: i32,
}

struct Turn {
    waker: RefCell<Option<Waker>>,
    rest: Cell<Option<Rest>>,
    looks: Cell<u32>,
}

impl Turn {
    const fn new() -> Self {
        Self { waker: RefCell::new(None), rest: Cell::new(None), looks: Cell::new(0) }
    }

    /// Has the runtime's main task look again.
    fn end(&self, rest: Rest) {
        self.rest.set(Some(rest));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// From now on this thread's time and chance follow from the seed.
pub(crate) fn begin(seed: u64) {
    RANDOM.set(seed);
    IS_ON.set(true);
}

/// The time since the beginning, in milliseconds.
pub(crate) fn now_ms() -> u64 {
    NOW_MS.get()
}

pub(crate) fn advance_to(now_ms: u64) {
    NOW_MS.set(now_ms);
}

/// Within the main task of a runtime: ready as soon as the runtime has nothing left to do now.
pub(crate) fn rest(context: &Context<'_>) -> Poll<Rest> {
    TURN.with(|turn| match turn.rest.take() {
        Some(rest) => {
            turn.looks.set(0);
            Poll::Ready(rest)
        }
        None => {
            turn.waker.replace(Some(context.waker().clone()));
            Poll::Pending
        }
    })
}

/// A number that follows from the seed (SplitMix64).
fn random() -> u64 {
    let state = RANDOM.get().wrapping_add(0x9E37_79B9_7F4A_7C15);
    RANDOM.set(state);
    let mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

/// Which of these have something to do.
pub(crate) fn awake(epolls: &[i32]) -> Vec<bool> {
    let asked = |fd: &i32| libc::pollfd { fd: *fd, events: libc::POLLIN, revents: 0 };
    let mut asked: Vec<_> = epolls.iter().map(asked).collect();
    // SAFETY: the pointer and the length are the vector's, which outlives the call.
    let found = unsafe { libc::poll(asked.as_mut_ptr(), asked.len() as libc::nfds_t, 0) };
    assert!(found >= 0, "poll: {}", std::io::Error::last_os_error());
    asked.iter().map(|asked| asked.revents != 0).collect()
}

fn look(epoll: i32, events: *mut libc::epoll_event, events_max: i32, timeout_ms: i32) -> i32 {
    let no_mask = std::ptr::null::<libc::sigset_t>();
    // SAFETY: the arguments are those of `epoll_wait`, whose caller vouches for them; without a mask its size is not looked at.
    unsafe { libc::syscall(libc::SYS_epoll_pwait, epoll, events, events_max, timeout_ms, no_mask, 8) as i32 }
}

/// As libc's; on a simulation's thread it does not wait, but ends the turn of the runtime that has nothing left to do.
///
/// # Safety
///
/// As for libc's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn epoll_wait(
    epoll: i32,
    events: *mut libc::epoll_event,
    events_max: i32,
    timeout_ms: i32,
) -> i32 {
    if !IS_ON.get() {
        return look(epoll, events, events_max, timeout_ms);
    }
    let found = look(epoll, events, events_max, 0);
    TURN.with(|turn| {
        turn.looks.set(turn.looks.get() + 1);
        let is_idle = found == 0 && timeout_ms != 0;
        if !is_idle && turn.looks.get() < LOOKS_MAX {
            return found;
        }
        let due_ms = match (is_idle, u64::try_from(timeout_ms)) {
            (false, _) => Some(now_ms()),
            (true, timeout_ms) => timeout_ms.ok().map(|timeout_ms| now_ms() + timeout_ms),
        };
        turn.end(Rest { due_ms, epoll });
        // Takes what waking has left, which would otherwise look like something to do.
        if found == 0 { look(epoll, events, events_max, 0) } else { found }
    })
}

/// As libc's; on a simulation's thread all clocks are its own.
///
/// # Safety
///
/// As for libc's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> i32 {
    if !IS_ON.get() {
        // SAFETY: the arguments are the caller's, who vouches for them.
        return unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) as i32 };
    }
    let since_ms = if clock == libc::CLOCK_REALTIME { BEGIN_MS } else { 0 };
    let ms = since_ms + now_ms();
    // SAFETY: the caller vouches for the pointer.
    unsafe {
        (*time).tv_sec = (ms / 1_000) as libc::time_t;
        (*time).tv_nsec = (ms % 1_000 * 1_000_000) as libc::c_long;
    }
    0
}

/// As libc's; on a simulation's thread what it answers follows from the seed.
///
/// # Safety
///
/// As for libc's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn getrandom(buffer: *mut libc::c_void, length: usize, flags: u32) -> isize {
    if !IS_ON.get() {
        // SAFETY: the arguments are the caller's, who vouches for them.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) as isize };
    }
    crate::trace::note(format_args!("random {length}"));
    for at in 0..length {
        // SAFETY: the caller vouches for as many bytes.
        unsafe { buffer.cast::<u8>().add(at).write((random() >> 32) as u8) };
    }
    length as isize
}
