//! `ledger run`: the order of writes that makes the disks provable.
//!
//! A boot record goes to disk 0, then disk 1. Then, for every number: the record to disk 0 with fsync, the
//! same record to disk 1 with fsync, and only then the line `A <boot id> <number> <crc>` to the virtio
//! port `ledger`. At every moment disk 1 is therefore equal to disk 0 or one record behind, and whatever
//! the host has read is on both.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::boots::{self, Boot};
use crate::crc::seal_line;
use crate::record::{BootId, Noise, RECORD_BYTES, boot_text, encode};
use crate::ring::Ring;
use crate::settings::Settings;
use crate::verify::{DISKS, DiskState, disks_agree};

/// Held by the writer for the length of one record, and by `ledger status` while it reads.
pub(crate) const LOCK_PATH: &str = "/run/ledger.lock";
/// What the start found and repaired, for `ledger status`.
pub(crate) const FOUND_PATH: &str = "/run/ledger.found";
/// When this file appears the writer ends between two records.
const STOP_PATH: &str = "/run/ledger.stop";
/// How long the writer sleeps at most before it looks for the stop file again.
const STOP_POLL: Duration = Duration::from_millis(50);

/// Runs until it is told to stop.
pub(crate) fn run() -> io::Result<()> {
    let settings = Settings::parse(&fs::read_to_string("/proc/cmdline")?);
    let disks: Vec<PathBuf> = DISKS.iter().map(PathBuf::from).filter(|disk| is_mounted(disk)).collect();
    if disks.is_empty() {
        return Err(io::Error::other("no ledger disk is mounted"));
    }
    let capacity = match settings.ring_mib {
        Some(mib) => mib * 1024 * 1024 / RECORD_BYTES as u64,
        None => default_capacity()?,
    };
    let mut rings = Vec::new();
    for disk in &disks {
        rings.push(Ring::open_or_create(&disk.join("ledger"), capacity)?);
    }
    let first = recover(&disks, &rings)?;
    let boot = random_boot()?;
    for disk in &disks {
        let path = disk.join("boots");
        let mut chain = boots::read(&path)?;
        chain.push(Boot::new(&boot, first));
        boots::write(&path, &chain)?;
    }
    let mut port = open_port()?;
    say(&mut port, &Boot::new(&boot, first).line())?;
    append_for_ever(&settings, &rings, &disks, boot, first, &mut port)
}

/// Compares the disks as the last run left them, makes disk 1 equal to disk 0, and says which number is next.
fn recover(disks: &[PathBuf], rings: &[Ring]) -> io::Result<u64> {
    let first = DiskState::read(&disks[0])?;
    let (mut agree, mut repaired) = (true, 0);
    if let [_, second_path, ..] = disks {
        let second = DiskState::read(second_path)?;
        agree = disks_agree(&first, &second);
        boots::write(&second_path.join("boots"), &first.boots)?;
        for slot in 0..rings[0].capacity().min(rings[1].capacity()) {
            let wanted = rings[0].read_slot(slot)?;
            if rings[1].read_slot(slot)? != wanted {
                rings[1].write_slot(slot, &wanted)?;
                repaired += 1;
            }
        }
        rings[1].sync()?;
    }
    let found = serde_json::json!({
        "disks_agree": agree, "repaired": repaired, "last": first.last(),
        "corrupt": first.corrupt(), "gaps": first.gaps(),
    });
    fs::write(FOUND_PATH, found.to_string())?;
    Ok(first.last() + 1)
}

fn append_for_ever(
    settings: &Settings,
    rings: &[Ring],
    disks: &[PathBuf],
    boot: BootId,
    first: u64,
    port: &mut Option<File>,
) -> io::Result<()> {
    let lock = File::create(LOCK_PATH)?;
    let mut churn = Churn::open(settings, &disks[0])?;
    let (boot_text, period) = (boot_text(&boot), Duration::from_secs(1) / settings.rate as u32);
    let mut due = Instant::now();
    for number in first.. {
        while let Some(pause) = due.checked_duration_since(Instant::now()).filter(|pause| !pause.is_zero()) {
            std::thread::sleep(pause.min(STOP_POLL));
            if Path::new(STOP_PATH).exists() {
                return Ok(());
            }
        }
        if Path::new(STOP_PATH).exists() {
            return Ok(());
        }
        // A guest that was paused does not catch up with a burst.
        due = (due + period).max(Instant::now());
        let record = encode(number, &boot, now_ns());
        lock.lock()?;
        for ring in rings {
            ring.append(number, &record)?;
        }
        lock.unlock()?;
        say(port, &seal_line(&format!("A {boot_text} {number}")))?;
        churn.write(period)?;
    }
    Ok(())
}

/// Extra writes at random places, to give capture something to do.
struct Churn {
    file: Option<File>,
    blocks: u64,
    bytes_per_second: u64,
    owed_bytes: u64,
    noise: Noise,
}

impl Churn {
    fn open(settings: &Settings, disk: &Path) -> io::Result<Self> {
        let mut churn = Self {
            file: None,
            blocks: default_capacity()?,
            bytes_per_second: settings.churn_kib * 1024,
            owed_bytes: 0,
            noise: Noise::new(now_ns()),
        };
        if churn.bytes_per_second > 0 {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(disk.join("churn"))?;
            file.set_len(churn.blocks * RECORD_BYTES as u64)?;
            churn.file = Some(file);
        }
        Ok(churn)
    }

    fn write(&mut self, elapsed: Duration) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        self.owed_bytes += self.bytes_per_second * elapsed.as_micros() as u64 / 1_000_000;
        while self.owed_bytes >= RECORD_BYTES as u64 {
            self.owed_bytes -= RECORD_BYTES as u64;
            let block = self.noise.next() % self.blocks;
            let bytes: Vec<u8> =
                (0..RECORD_BYTES / 8).flat_map(|_| self.noise.next().to_le_bytes()).collect();
            file.write_all_at(&bytes, block * RECORD_BYTES as u64)?;
        }
        Ok(())
    }
}

/// A quarter of the smaller disk, in records.
fn default_capacity() -> io::Result<u64> {
    let sectors = |disk: &str| -> Option<u64> {
        fs::read_to_string(format!("/sys/block/{disk}/size")).ok()?.trim().parse().ok()
    };
    let smallest = ["vda", "vdb"].into_iter().filter_map(sectors).min();
    let sectors = smallest.ok_or_else(|| io::Error::other("there is no disk vda"))?;
    Ok((sectors * 512 / 4 / RECORD_BYTES as u64).max(1))
}

fn is_mounted(directory: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    mounts.lines().filter_map(|line| line.split(' ').nth(1)).any(|mounted| Path::new(mounted) == directory)
}

/// The port to the host, if the machine has one.
fn open_port() -> io::Result<Option<File>> {
    match OpenOptions::new().write(true).open("/dev/virtio-ports/ledger") {
        Ok(port) => Ok(Some(port)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn say(port: &mut Option<File>, line: &str) -> io::Result<()> {
    match port {
        Some(port) => port.write_all(line.as_bytes()),
        None => Ok(()),
    }
}

fn random_boot() -> io::Result<BootId> {
    let mut boot = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut boot)?;
    Ok(boot)
}

fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}
