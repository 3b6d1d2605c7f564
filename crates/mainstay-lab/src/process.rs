//! Processes of a lab that outlive the command that started them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::process::Command;

const STOP_TIMEOUT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// A process that a file remembers: its number and when it began, so that a number used anew is not mistaken for it.
#[derive(Clone, Debug)]
pub struct Process {
    file: PathBuf,
    log: PathBuf,
}

impl Process {
    /// The process `name` of the lab in `dir`.
    pub fn new(dir: &Path, name: &str) -> Self {
        Self { file: dir.join("processes").join(name), log: dir.join("logs").join(format!("{name}.log")) }
    }

    /// Its log file.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Its number, if it lives.
    pub fn pid(&self) -> Option<i32> {
        let text = fs::read_to_string(&self.file).ok()?;
        let (pid, began) = text.trim().split_once(' ')?;
        let pid: i32 = pid.parse().ok()?;
        (began_at(pid)? == began).then_some(pid)
    }

    /// Starts it unless it runs. Its output is appended to its log.
    pub fn start(&self, mut command: Command) -> Result<i32> {
        if let Some(pid) = self.pid() {
            return Ok(pid);
        }
        for path in [&self.file, &self.log] {
            fs::create_dir_all(path.parent().context("a file in a directory")?)?;
        }
        let log = fs::OpenOptions::new().create(true).append(true).open(&self.log)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // Out of reach of the terminal's interrupt key.
        command.process_group(0);
        let mut child =
            command.spawn().with_context(|| format!("start {:?}", command.as_std().get_program()))?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).context("the process ended at once")?;
        let began = began_at(pid).context("the process ended at once")?;
        fs::write(&self.file, format!("{pid} {began}"))?;
        // Collects its end, should it end before we do.
        tokio::spawn(async move { child.wait().await });
        Ok(pid)
    }

    /// Sends it a signal; nothing if it does not live.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        if let Some(pid) = self.pid() {
            kill(Pid::from_raw(pid), signal).with_context(|| format!("signal process {pid}"))?;
        }
        Ok(())
    }

    /// Ends it with a signal and waits until it is gone.
    pub async fn end(&self, signal: Signal) -> Result<()> {
        // A stopped process does not act on SIGTERM.
        self.signal(Signal::SIGCONT)?;
        self.signal(signal)?;
        let deadline = Instant::now() + STOP_TIMEOUT;
        while let Some(pid) = self.pid() {
            if Instant::now() > deadline {
                bail!("process {pid} does not end; see {}", self.log.display());
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }
}

/// Whether a process lives.
pub(crate) fn lives(pid: i32) -> bool {
    began_at(pid).is_some()
}

/// When a living process began, in the kernel's own unit; `None` for one that ended, collected or not.
fn began_at(pid: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may contain anything; the fields after it are numbered from 3 (proc(5)).
    let fields: Vec<_> = stat.rsplit(')').next()?.split_whitespace().collect();
    match *fields.first()? {
        // Killed, it holds its files and locks until the last of its threads is gone.
        "Z" | "X" if fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count) < 2 => None,
        _ => fields.get(19).map(|began| (*began).to_owned()),
    }
}
