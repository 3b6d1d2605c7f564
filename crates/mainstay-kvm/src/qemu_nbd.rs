//! `qemu-nbd` as a child process: an image of a VM that is off, as a block device.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use mainstay_nbd::{Client, ClientOptions, Endpoint, NbdError};
use mainstay_provider::SiteError;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, Command};

use crate::command::{argument, kind_of};
use crate::error::failed;

const START_TIMEOUT: Duration = Duration::from_secs(30);
const END_TIMEOUT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);
/// The export's name; each process serves one.
const EXPORT: &str = "disk";

/// How to serve an image.
#[derive(Clone, Debug, Default)]
pub(crate) struct Serving {
    pub(crate) format: String,
    pub(crate) is_writable: bool,
    /// Show the map of this bitmap.
    pub(crate) bitmap: Option<String>,
    /// Show the depth of allocation.
    pub(crate) depth: bool,
}

/// A running `qemu-nbd`. It ends with this object.
#[derive(Debug)]
pub(crate) struct QemuNbd {
    child: Child,
    socket: PathBuf,
}

impl QemuNbd {
    /// Starts serving and waits until somebody can connect.
    pub(crate) async fn start(image: &Path, socket: &Path, serving: &Serving) -> Result<Self, SiteError> {
        crate::files::remove_file(socket)?;
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--shared=8", "--export-name", EXPORT, "--format", &serving.format]);
        command.args(["--socket", argument(socket)?]);
        if serving.is_writable {
            command.args(["--cache=writeback", "--discard=unmap"]);
        } else {
            command.arg("--read-only");
        }
        if let Some(bitmap) = &serving.bitmap {
            command.args(["--bitmap", bitmap]);
        }
        if serving.depth {
            command.arg("--allocation-depth");
        }
        command.arg(argument(image)?);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let child = command.spawn().map_err(|error| failed(format!("starting qemu-nbd: {error}")))?;
        let mut server = Self { child, socket: socket.to_owned() };
        server.wait_until_up(image).await?;
        Ok(server)
    }

    async fn wait_until_up(&mut self, image: &Path) -> Result<(), SiteError> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            if let Some(status) = self.child.try_wait()? {
                let mut text = String::new();
                if let Some(errors) = &mut self.child.stderr {
                    errors.read_to_string(&mut text).await?;
                }
                let message =
                    format!("qemu-nbd cannot serve {} ({status}): {}", image.display(), text.trim());
                return Err(SiteError::new(kind_of(&text), message));
            }
            if tokio::net::UnixStream::connect(&self.socket).await.is_ok() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(failed(format!("qemu-nbd does not serve {}", image.display())));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Connects to what is served.
    pub(crate) async fn connect(&self, contexts: &[String]) -> Result<Client, NbdError> {
        let mut options = ClientOptions::new(EXPORT);
        options.contexts.extend_from_slice(contexts);
        Client::connect(&Endpoint::Unix(self.socket.clone()), &options).await
    }

    /// Ends it in an orderly way, so that the image is closed clean.
    pub(crate) async fn end(mut self) -> Result<(), SiteError> {
        if let Some(pid) = self.child.id() {
            // It may have ended by itself in between.
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM);
        }
        match tokio::time::timeout(END_TIMEOUT, self.child.wait()).await {
            Ok(status) => {
                status.map(drop).map_err(|error| failed(format!("waiting for qemu-nbd: {error}")))?;
            }
            Err(_elapsed) => {
                self.child.kill().await.map_err(|error| failed(format!("ending qemu-nbd: {error}")))?;
            }
        }
        crate::files::remove_file(&self.socket)
    }
}

/// Ends every `qemu-nbd` that an agent before us left behind: those that work with a file beneath `directory`.
pub(crate) async fn end_strays(directory: &Path) -> Result<(), SiteError> {
    let prefix = format!("{}/", directory.display());
    let strays = || -> std::io::Result<Vec<Pid>> {
        let mut pids = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let entry = entry?;
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // A process that ended meanwhile has none.
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let mut words = command.split(|byte| *byte == 0);
            let is_nbd = words.next().is_some_and(|name| name.ends_with(b"qemu-nbd"));
            if is_nbd && words.any(|word| word.starts_with(prefix.as_bytes())) {
                pids.push(Pid::from_raw(pid));
            }
        }
        Ok(pids)
    };
    for pid in strays()? {
        let _ = kill(pid, Signal::SIGTERM);
    }
    let deadline = Instant::now() + END_TIMEOUT;
    loop {
        let left = strays()?;
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            for pid in left {
                let _ = kill(pid, Signal::SIGKILL);
            }
            return Ok(());
        }
        tokio::time::sleep(POLL).await;
    }
}
