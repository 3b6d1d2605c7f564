//! Work that leaves the thread of its task: what blocks, what takes a processor for long, and what other threads answer.
//!
//! All of it goes through here, so that a simulation can have it done by the one thread on which its processes take turns. A
//! seed repeats what is decided, and what threads make of that is different each time.

use std::{
    cell::Cell,
    future::Future,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    thread::Thread,
};

use tokio::task::JoinHandle;

/// How a simulation lets time go by before and after a piece of such work; it is told of what kind the work is.
pub type Pause = fn(&'static str) -> Pin<Box<dyn Future<Output = ()> + Send>>;

thread_local! {
    static PAUSE: Cell<Option<Pause>> = const { Cell::new(None) };
}

/// From now on this thread is a simulation's: whatever a task on it hands to other threads is done on it.
pub fn simulate(pause: Pause) {
    PAUSE.set(Some(pause));
}

/// As [`tokio::task::spawn_blocking`]: the work goes on also when nobody waits for it any more.
pub fn spawn_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let Some(pause) = PAUSE.get() else { return tokio::task::spawn_blocking(work) };
    tokio::spawn(async move {
        pause("work").await;
        let done = work();
        pause("work done").await;
        done
    })
}

/// Waits for what threads answer that are not the runtime's, such as a database's. Nothing that is waited for may need this
/// thread: in a simulation it does nothing else meanwhile.
pub async fn answer<F: Future>(asked: F) -> F::Output {
    let Some(pause) = PAUSE.get() else { return asked.await };
    pause("question").await;
    let answered = wait(asked);
    pause("answer").await;
    answered
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn wait<F: Future>(asked: F) -> F::Output {
    // A task's budget of polls would never come back while it is in this one.
    let mut asked = pin!(tokio::task::unconstrained(asked));
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    loop {
        match asked.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(answer) => return answer,
            Poll::Pending => std::thread::park(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_a_simulation_other_threads_work() {
        let here = std::thread::current().id();
        assert_ne!(spawn_blocking(|| std::thread::current().id()).await.unwrap(), here);
        assert_eq!(answer(async { 7 }).await, 7);
    }

    #[test]
    fn a_simulation_works_on_its_own_thread_and_waits_for_others() {
        // Of its own, so that nothing is left switched on.
        let thread = std::thread::spawn(|| {
            simulate(|_| Box::pin(tokio::task::yield_now()));
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let here = std::thread::current().id();
                assert_eq!(spawn_blocking(|| std::thread::current().id()).await.unwrap(), here);
                let (send, receive) = tokio::sync::oneshot::channel();
                std::thread::spawn(move || send.send(7));
                assert_eq!(answer(receive).await, Ok(7));
            });
        });
        thread.join().unwrap();
    }
}
