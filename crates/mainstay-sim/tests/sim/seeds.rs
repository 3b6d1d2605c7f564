//! Which random worlds are run, and each in a process of its own.

use std::{
    fs::File,
    io::Write as _,
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Seeds of every run of the tests. One that has failed is not kept: it is another world as soon as anything has changed, and what it
/// found has a test of its own.
const SEEDS: u64 = 16;
/// How long new worlds are begun after that in an ordinary run, counted from its beginning. `cargo xtask ci` runs its own hundreds
/// beside the other suites.
const FRESH_SECONDS: u64 = 60;

/// Which worlds are run.
pub(crate) struct Seeds {
    /// In any case.
    pub(crate) fixed: Vec<u64>,
    /// And then, from this one on, as many as can be begun within some time.
    pub(crate) fresh: Option<(u64, Duration)>,
}

pub(crate) fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

impl Seeds {
    pub(crate) fn of_environment() -> Self {
        let first = number("SIM_FIRST_SEED").unwrap_or(0);
        if let Some(seeds) = number("SIM_SEEDS") {
            return Self { fixed: (first..first + seeds).collect(), fresh: None };
        }
        // Different ones each time, and far from those that people count.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = Duration::from_secs(number("SIM_SECONDS").unwrap_or(FRESH_SECONDS));
        let fixed = (first..first + SEEDS).collect();
        Self { fixed, fresh: (!time.is_zero()).then_some((now.as_secs() << 16, time)) }
    }
}

/// Past the harness, which shows what a test prints only if it fails.
pub(crate) fn tell(text: &str) {
    // Nobody may be there to read it.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// What a world's process says last.
pub(crate) const CAME_TO: &str = "came to ";

/// A world in a process of its own.
struct Running {
    seed: u64,
    process: Child,
    output: File,
    began: Instant,
}

/// A world did not come to a good end.
struct Failed;

/// Worlds that may fail before no more are begun: of a soak's thousands each that fails is worth knowing, but when most do, one is
/// enough.
const FAILURES_MAX: usize = 8;

/// Real time that a world may take, also where it gets only what others leave; one takes a second.
const REAL_MAX: Duration = Duration::from_secs(900);

impl Running {
    fn start(seed: u64) -> Self {
        let output = tempfile::tempfile().unwrap();
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["random::random_worlds_keep_every_promise", "--exact", "--nocapture", "--test-threads=1"])
            .env("SIM_SEED", seed.to_string())
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output.try_clone().unwrap())
            .spawn()
            .unwrap();
        Self { seed, process, output, began: Instant::now() }
    }

    /// What it said, once it has ended; an error has been told.
    fn poll(&mut self) -> Option<Result<String, Failed>> {
        let is_late = self.began.elapsed() > REAL_MAX;
        if is_late {
            self.process.kill().unwrap();
        }
        let status = if is_late { self.process.wait().unwrap() } else { self.process.try_wait().unwrap()? };
        let mut said = String::new();
        std::io::Seek::rewind(&mut self.output).unwrap();
        std::io::Read::read_to_string(&mut self.output, &mut said).unwrap();
        if !status.success() {
            tell(&said);
            let seed = self.seed;
            let how = if is_late { "did not end" } else { "failed" };
            tell(&format!(
                "seed {seed} {how}: `SIM_SEED={seed} cargo test --workspace --test sim random` repeats it"
            ));
            return Some(Err(Failed));
        }
        Some(Ok(said))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Those beside one that failed; one that has ended is not there any more.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Worlds at a time for each processor: one waits for its database's threads for a third of its time.
const WORLDS_PER_PROCESSOR: usize = 2;

/// Runs worlds side by side, as long as there are seeds.
pub(crate) fn run_all(mut seeds: impl Iterator<Item = u64>, mut ended: impl FnMut(u64, String)) {
    let at_once = WORLDS_PER_PROCESSOR * std::thread::available_parallelism().map_or(1, usize::from);
    let mut running: Vec<Running> = Vec::new();
    let mut failed = Vec::new();
    loop {
        while running.len() < at_once
            && failed.len() < FAILURES_MAX
            && let Some(seed) = seeds.next()
        {
            running.push(Running::start(seed));
        }
        if running.is_empty() {
            break;
        }
        running.retain_mut(|world| match world.poll() {
            Some(Ok(said)) => {
                ended(world.seed, said);
                false
            }
            Some(Err(Failed)) => {
                failed.push(world.seed);
                false
            }
            None => true,
        });
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(failed.is_empty(), "these seeds failed: {failed:?}");
}
