//! The agent's place among what runs on its host.

use std::io;

use rustix::process::{Pid, setpriority_process};

/// Has all threads of this process stand back behind other processes; threads that they start do the same. On Linux a
/// priority is a thread's own.
///
/// # Errors
/// Those of reading the threads and of changing one; the others have been changed then.
pub fn stand_back(nice: u8) -> io::Result<()> {
    let mut outcome = Ok(());
    for entry in std::fs::read_dir("/proc/self/task")? {
        let name = entry?.file_name();
        let thread = name.to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        let Some(thread) = thread else { continue };
        match setpriority_process(Some(thread), i32::from(nice)) {
            // It has ended since the list was made.
            Err(error) if error == rustix::io::Errno::SRCH => {}
            Err(error) => outcome = Err(error.into()),
            Ok(()) => {}
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nice_of_this_thread() -> i32 {
        let thread = rustix::thread::gettid();
        rustix::process::getpriority_process(Some(thread)).unwrap()
    }

    #[test]
    fn threads_that_run_already_stand_back() {
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let other = std::thread::spawn(move || {
            ready.send(()).unwrap();
            receiver.recv().unwrap();
            nice_of_this_thread()
        });
        is_ready.recv().unwrap();
        stand_back(7).unwrap();
        sender.send(()).unwrap();
        assert_eq!((nice_of_this_thread(), other.join().unwrap()), (7, 7));
    }
}
