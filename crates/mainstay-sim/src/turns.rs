//! A world on one thread: its processes and the test take turns.
//!
//! Each process is a runtime with one thread, and that thread is the same for all. A process has its turn until it has nothing
//! left to do; which of those that have something to do is next is drawn. When none has, the clock goes to the next
//! timer of any. What leaves a process's thread takes a drawn time before and after it is done
//! ([`mainstay_block::elsewhere`]), so that others have their turns, a wire breaks or the process is killed in between.
//! With time and chance from [`crate::chance`] nothing is left that could differ between two runs of a seed.

use std::{
    cell::RefCell,
    fs::File,
    future::{Future, poll_fn},
    pin::Pin,
    rc::Rc,
    task::Poll,
    time::Duration,
};

use futures::{StreamExt as _, stream::FuturesUnordered};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use tokio::{
    runtime::{Builder, Handle, Runtime},
    sync::oneshot,
};

use crate::{
    chance::{self, Rest},
    trace::{self, Digest},
};

/// Turns without the clock going on after which the world is held to stand still.
const TURNS_MAX: u64 = 1_000_000;

struct Slot {
    id: u64,
    name: &'static str,
    runtime: Rc<Runtime>,
    /// What it waits for; `None` = it has not had a turn.
    rest: Option<Rest>,
}

struct Schedule {
    slots: Vec<Slot>,
    /// Processes that have been killed, and who waits for their end.
    killed: Vec<(Rc<Runtime>, Option<oneshot::Sender<()>>)>,
    rng: StdRng,
    next_id: u64,
}

thread_local! {
    static SCHEDULE: RefCell<Option<Schedule>> = const { RefCell::new(None) };
}

fn scheduled<R>(work: impl FnOnce(&mut Schedule) -> R) -> R {
    SCHEDULE.with_borrow_mut(|schedule| work(schedule.as_mut().expect("a simulation runs on this thread")))
}

fn runtime() -> Rc<Runtime> {
    Rc::new(Builder::new_current_thread().enable_io().enable_time().build().expect("a runtime"))
}

impl Schedule {
    fn add(&mut self, name: &'static str) -> (u64, Handle) {
        let runtime = runtime();
        let (id, handle) = (self.next_id, runtime.handle().clone());
        self.next_id += 1;
        self.slots.push(Slot { id, name, runtime, rest: None });
        (id, handle)
    }

    /// The next to have a turn, when somebody has something to do now.
    fn choose(&mut self) -> Option<(u64, Rc<Runtime>)> {
        let epolls: Vec<_> = self.slots.iter().map(|slot| slot.rest.map_or(-1, |rest| rest.epoll)).collect();
        let awake = chance::awake(&epolls);
        let now_ms = chance::now_ms();
        let is_ready = |slot: &Slot, is_awake: bool| match slot.rest {
            None => true,
            Some(rest) => is_awake || rest.due_ms.is_some_and(|due_ms| due_ms <= now_ms),
        };
        let ready = self.slots.iter().zip(awake).filter(|(slot, is_awake)| is_ready(slot, *is_awake));
        let ready: Vec<_> = ready.map(|(slot, _)| slot).collect();
        ready.choose(&mut self.rng).map(|slot| (slot.id, slot.runtime.clone()))
    }

    fn next_due_ms(&self) -> Option<u64> {
        self.slots.iter().filter_map(|slot| slot.rest?.due_ms).min()
    }
}

/// A process of the world. Dropping it is a crash.
pub(crate) struct Process {
    id: u64,
    name: &'static str,
    handle: Handle,
}

impl Process {
    pub(crate) fn start(name: &'static str) -> Self {
        let (id, handle) = scheduled(|schedule| schedule.add(name));
        trace::note(format_args!("{name} {id} starts"));
        Self { id, name, handle }
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Ends it where it is; returns when nothing of it is left.
    pub(crate) async fn kill(self) {
        let (ended, has_ended) = oneshot::channel();
        self.give_up(Some(ended));
        has_ended.await.expect("what is killed ends");
    }

    fn give_up(&self, ended: Option<oneshot::Sender<()>>) {
        // Not within a turn, which is another runtime's.
        SCHEDULE.with_borrow_mut(|schedule| {
            let Some(schedule) = schedule else { return };
            let Some(at) = schedule.slots.iter().position(|slot| slot.id == self.id) else { return };
            let slot = schedule.slots.remove(at);
            trace::note(format_args!("{} {} is killed", self.name, self.id));
            schedule.killed.push((slot.runtime, ended));
        });
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.give_up(None);
    }
}

/// Draws from what the seed gives.
pub(crate) fn draw(range: std::ops::Range<u64>) -> u64 {
    scheduled(|schedule| schedule.rng.random_range(range))
}

/// Time that something takes: mostly none or a few milliseconds, sometimes long against everything else. None for a simulated host
/// that somebody uses without a simulation.
pub(crate) fn pause(what: &'static str) -> Pin<Box<dyn Future<Output = ()> + Send>> {
    if SCHEDULE.with_borrow(Option::is_none) {
        return Box::pin(std::future::ready(()));
    }
    let ms = match draw(0..64) {
        0 => draw(5..30),
        1..24 => draw(1..4),
        _ => 0,
    };
    trace::note(format_args!("{what} {ms}"));
    Box::pin(async move {
        match ms {
            0 => tokio::task::yield_now().await,
            ms => tokio::time::sleep(Duration::from_millis(ms)).await,
        }
    })
}

/// Ends everything when a world ends, in whatever way.
struct Cleared;

impl Drop for Cleared {
    fn drop(&mut self) {
        let schedule = SCHEDULE.take();
        drop(schedule);
    }
}

fn end_killed() {
    loop {
        let killed = scheduled(|schedule| std::mem::take(&mut schedule.killed));
        if killed.is_empty() {
            return;
        }
        for (runtime, ended) in killed {
            drop(runtime);
            if let Some(ended) = ended {
                // Whoever waited may be gone.
                let _ = ended.send(());
            }
        }
    }
}

fn take_turns<T>(test: impl Future<Output = T>) -> T {
    let (test_id, _) = scheduled(|schedule| schedule.add("test"));
    // Polled only when it was woken, not at the beginning of each turn.
    let mut test = FuturesUnordered::from_iter([test]);
    let (mut turns, mut turned_ms) = (0, 0);
    loop {
        end_killed();
        let Some((id, runtime)) = scheduled(Schedule::choose) else {
            let due_ms = scheduled(|schedule| schedule.next_due_ms());
            chance::advance_to(due_ms.expect("somebody waits for something that comes"));
            continue;
        };
        if turned_ms != chance::now_ms() {
            (turns, turned_ms) = (0, chance::now_ms());
        }
        turns += 1;
        assert!(
            turns < TURNS_MAX,
            "the world stands still at {turned_ms} ms: process {id} has turns for ever"
        );
        let mut ended = None;
        let rest = runtime.block_on(poll_fn(|context| {
            if id == test_id
                && ended.is_none()
                && let Poll::Ready(Some(end)) = test.poll_next_unpin(context)
            {
                ended = Some(end);
                return Poll::Ready(None);
            }
            chance::rest(context).map(Some)
        }));
        if let Some(ended) = ended {
            return ended;
        }
        scheduled(|schedule| {
            if let Some(slot) = schedule.slots.iter_mut().find(|slot| slot.id == id) {
                trace::note(format_args!("turn of {}", slot.name));
                slot.rest = rest;
            }
        });
    }
}

/// Runs a test with everything in it on a thread of its own, in turns that follow from the seed; answers what it came to.
/// `trace` is given a line for everything that happened.
///
/// # Panics
///
/// As the test does.
pub fn simulate_traced<F: Future<Output = ()>>(
    seed: u64,
    trace: Option<File>,
    test: impl FnOnce() -> F + Send + 'static,
) -> Digest {
    let run = move || {
        chance::begin(seed);
        // What maps and logs draw when a thread first has any is drawn before the world begins, whether it is logged or not.
        drop(std::hash::RandomState::new());
        tracing::info!(seed, "a world begins");
        chance::begin(seed);
        trace::begin(trace);
        mainstay_block::elsewhere::simulate(pause);
        let rng = StdRng::seed_from_u64(seed);
        SCHEDULE.set(Some(Schedule { slots: Vec::new(), killed: Vec::new(), rng, next_id: 0 }));
        let _cleared = Cleared;
        take_turns(test());
        trace::digest()
    };
    // A new thread's hash maps and random numbers begin alike.
    let thread = std::thread::Builder::new().name(format!("seed {seed}")).spawn(run).expect("a thread");
    match thread.join() {
        Ok(digest) => digest,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// As [`simulate_traced`], for tests whose seed does not matter.
///
/// # Panics
///
/// As the test does.
pub fn simulate<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    simulate_traced(0, None, test);
}
