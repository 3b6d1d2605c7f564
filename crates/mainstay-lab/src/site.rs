//! One site: a private libvirt daemon.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use mainstay_kvm::libvirt::{Libvirt, lock_holder, mend_statuses};
use mainstay_model::VmId;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest as _, Sha256};

use crate::account::Account;
use crate::process;

/// How long a daemon may take until it answers. The first start of a site probes QEMU, a few seconds.
const START_TIMEOUT: Duration = Duration::from_secs(60);
const STOP_TIMEOUT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);

/// A site of a lab.
///
/// Everything lies in the lab's directory. libvirt's sockets lie beneath it too, but are named through a
/// short link in `/tmp`, because the name of a socket ends at 107 bytes. The virtual machines outlive the
/// daemon, and the daemon outlives this object: a lab is stopped with [`Site::stop`], not by forgetting it.
#[derive(Debug)]
pub struct Site {
    name: String,
    directory: PathBuf,
    short: PathBuf,
    account: Account,
    libvirt: Libvirt,
}

impl Site {
    /// The site `name` of the lab in `lab_directory`; its directories are made if they are not there.
    pub async fn open(lab_directory: &Path, name: &str) -> Result<Self> {
        // Part of socket names; see above.
        if name.is_empty() || name.len() > 8 || !name.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            bail!("a site's name is one to eight letters and digits, not '{name}'");
        }
        let account = Account::choose()?;
        fs::create_dir_all(lab_directory)?;
        let lab_directory = lab_directory.canonicalize()?;
        // Virtual machines of another account pass through it.
        fs::set_permissions(&lab_directory, fs::Permissions::from_mode(0o755))?;
        let directory = lab_directory.join(name);
        for path in
            ["", "run", "conf", "conf/libvirt", "cache", "data", "home", "images", "driver", "consoles"]
        {
            let path = directory.join(path);
            fs::create_dir_all(&path)?;
            account.give(&path)?;
        }
        let acks = lab_directory.join("acks");
        fs::create_dir_all(&acks)?;
        account.give(&acks)?;
        fs::set_permissions(directory.join("run"), fs::Permissions::from_mode(0o700))?;
        // Without it libvirt hands the console to another daemon, virtlogd.
        fs::write(directory.join("conf/libvirt/qemu.conf"), "stdio_handler = \"file\"\n")?;
        account.check_reach(&directory).await?;
        let short = short_link(&lab_directory)?.join(name);
        let socket = short.join("run/libvirt/libvirt-sock");
        let libvirt = Libvirt::new(format!("qemu:///session?socket={}", socket.display()));
        Ok(Self { name: name.to_owned(), directory, short, account, libvirt })
    }

    /// The site's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The URI of the site's libvirt, for the driver and for `virsh -c`.
    pub fn uri(&self) -> &str {
        self.libvirt.uri()
    }

    /// A connection to the site's libvirt.
    pub fn libvirt(&self) -> &Libvirt {
        &self.libvirt
    }

    /// Where the site's disk images lie.
    pub fn images(&self) -> PathBuf {
        self.directory.join("images")
    }

    /// A directory for the site's driver: its state, its overlays.
    pub fn driver_directory(&self) -> PathBuf {
        self.directory.join("driver")
    }

    /// A name of at most 30 bytes for the driver's directory, for the sockets in it.
    pub fn driver_directory_short(&self) -> PathBuf {
        self.short.join("driver")
    }

    /// Where the guests' acknowledgements of all sites of the lab are collected.
    pub fn acks(&self) -> PathBuf {
        // Two levels always exist: the lab and the site.
        self.directory.parent().unwrap_or(&self.directory).join("acks")
    }

    /// Where what a guest of this site prints on its console is kept.
    pub fn console(&self, name: &str) -> PathBuf {
        self.directory.join("consoles").join(format!("{name}.log"))
    }

    /// Where the daemon keeps notes of its running virtual machines.
    fn statuses(&self) -> PathBuf {
        self.directory.join("run/libvirt/qemu/run")
    }

    /// What the daemon has noted of a running virtual machine.
    pub fn status(&self, name: &str) -> PathBuf {
        self.statuses().join(format!("{name}.xml"))
    }

    /// Who runs the virtual machines.
    pub fn account(&self) -> &Account {
        &self.account
    }

    /// Starts the daemon unless it runs, and waits until it answers. One that was just killed is waited for.
    pub async fn start(&self) -> Result<()> {
        self.start_with(true).await
    }

    /// As [`Self::start`], on a host that does not run `mainstay agent mend-libvirt` before.
    pub async fn start_unmended(&self) -> Result<()> {
        self.start_with(false).await
    }

    async fn start_with(&self, is_mended: bool) -> Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        let mut started = false;
        loop {
            if !started && self.daemon().is_none() {
                if is_mended {
                    mend_statuses(&self.statuses())?;
                }
                self.spawn()?;
                started = true;
            }
            match self.libvirt.ping().await {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    let log = fs::read_to_string(self.directory.join("libvirtd.log")).unwrap_or_default();
                    bail!(
                        "libvirtd of site {} does not answer: {error}; its log ends: {}",
                        self.name,
                        tail(&log)
                    );
                }
                Err(_) => tokio::time::sleep(POLL).await,
            }
        }
    }

    fn spawn(&self) -> Result<()> {
        let log = fs::File::create(self.directory.join("libvirtd.log"))?;
        let path = std::env::var("PATH").unwrap_or_default();
        // Ordinary users' paths leave out the directory in which Debian keeps the daemon.
        let path = format!("{path}:/usr/sbin:/sbin");
        let mut command = self.account.command("libvirtd");
        command.env_clear().env("PATH", path).current_dir("/");
        for (variable, name) in [
            ("HOME", "home"),
            ("XDG_RUNTIME_DIR", "run"),
            ("XDG_CONFIG_HOME", "conf"),
            ("XDG_CACHE_HOME", "cache"),
            ("XDG_DATA_HOME", "data"),
        ] {
            command.env(variable, self.short.join(name));
        }
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // Out of reach of the terminal's interrupt key.
        command.process_group(0);
        let mut child = command.spawn().context("starting libvirtd")?;
        // Collects the daemon's end, should it end before we do.
        tokio::spawn(async move { child.wait().await });
        Ok(())
    }

    /// Ends the daemon. Its virtual machines go on.
    pub async fn stop(&self) -> Result<()> {
        self.end(Signal::SIGTERM).await
    }

    /// Ends the daemon as a crash would. Its virtual machines go on.
    pub async fn kill(&self) -> Result<()> {
        self.end(Signal::SIGKILL).await
    }

    /// Ends all virtual machines, then the daemon: the site as after a power cut.
    pub async fn power_off(&self) -> Result<()> {
        self.start().await?;
        for vm in self.libvirt.domains().await? {
            if self.libvirt.state(vm).await?.power != mainstay_provider::PowerState::Off {
                // One that has just ended by itself is off as well.
                let _ = self.libvirt.destroy(vm).await;
            }
        }
        self.stop().await
    }

    /// A power cut of the site: every virtual machine and the daemon are killed at once, without asking libvirt. Waits
    /// until they are gone, as a host that boots finds no process of its former life.
    pub async fn lose_power(&self) -> Result<()> {
        let machines = self.cut_power();
        let deadline = Instant::now() + STOP_TIMEOUT;
        while self.daemon().is_some() || machines.iter().any(|pid| process::lives(pid.as_raw())) {
            if Instant::now() > deadline {
                bail!("the processes of site {} do not end", self.name);
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Cuts the power and does not wait, so that it can be used where nothing can be awaited. Answers the virtual
    /// machines' processes.
    pub fn cut_power(&self) -> Vec<Pid> {
        let mut killed = Vec::new();
        let machines = fs::read_dir(self.statuses()).into_iter().flatten();
        let paths = machines.filter_map(Result::ok).map(|entry| entry.path());
        // The daemon first, or it would see its machines die one by one.
        if let Some(pid) = self.daemon() {
            let _ = kill(pid, Signal::SIGKILL);
        }
        for path in paths.filter(|path| path.extension().is_some_and(|extension| extension == "pid")) {
            let pid = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<i32>().ok());
            let Some(pid) = pid.filter(|pid| *pid > 1) else { continue };
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if command.starts_with(b"/usr/bin/qemu-system") {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                killed.push(Pid::from_raw(pid));
            }
        }
        killed
    }

    /// Whether the daemon lives.
    pub fn is_alive(&self) -> bool {
        self.daemon().is_some()
    }

    /// Sends the daemon a signal and does not wait; nothing if it does not live.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        if let Some(pid) = self.daemon() {
            kill(pid, signal).context("signalling libvirtd")?;
        }
        Ok(())
    }

    /// Kills a virtual machine's process, without asking libvirt, and waits until it is gone.
    pub async fn kill_vm(&self, vm: VmId) -> Result<()> {
        let name = self.libvirt.name(vm).await?;
        let file = self.statuses().join(format!("{name}.pid"));
        let text = fs::read_to_string(&file).with_context(|| format!("the VM '{name}' does not run"))?;
        let pid = Pid::from_raw(text.trim().parse()?);
        kill(pid, Signal::SIGKILL).context("killing the VM's process")?;
        let deadline = Instant::now() + STOP_TIMEOUT;
        // Somebody may start it again as soon as it is off.
        let is_another = || fs::read_to_string(&file).is_ok_and(|now| now != text);
        while self.libvirt.state(vm).await?.power != mainstay_provider::PowerState::Off && !is_another() {
            if Instant::now() > deadline {
                bail!("the VM '{name}' does not end");
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Removes the short link in `/tmp`, when the lab goes.
    pub fn forget(&self) -> Result<()> {
        let link = self.short.parent().unwrap_or(&self.short);
        match fs::remove_file(link) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    async fn end(&self, signal: Signal) -> Result<()> {
        let Some(pid) = self.daemon() else { return Ok(()) };
        kill(pid, signal).context("signalling libvirtd")?;
        let deadline = Instant::now() + STOP_TIMEOUT;
        while self.daemon() == Some(pid) {
            if Instant::now() > deadline {
                bail!("libvirtd of site {} does not end", self.name);
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// The daemon's process, if it lives: whoever holds the lock on its file. No other daemon can start before that is released.
    fn daemon(&self) -> Option<Pid> {
        // The second is the driver's, which may be released a moment later.
        let locks = [self.directory.join("run/libvirt/libvirtd.pid"), self.statuses().join("driver.pid")];
        locks.iter().find_map(|lock| lock_holder(lock).ok().flatten())
    }
}

/// The link in `/tmp` to a lab's directory.
fn short_link(lab_directory: &Path) -> Result<PathBuf> {
    let digest = Sha256::digest(lab_directory.as_os_str().as_encoded_bytes());
    let short: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let link = PathBuf::from(format!("/tmp/ml-{short}"));
    match symlink(lab_directory, &link) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            if fs::read_link(&link).ok().as_deref() != Some(lab_directory) {
                bail!("{} exists and is not the link to {}", link.display(), lab_directory.display());
            }
        }
        Err(error) => return Err(error.into()),
    }
    Ok(link)
}

/// The last lines of a log.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(3)..].join(" | ")
}
