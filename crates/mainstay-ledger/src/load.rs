//! `ledger load …`: writes on the first disk, besides the ledger's own, for measurements from outside. All go to one
//! file, `load`, in blocks of 4 KiB that cannot be compressed; `fill` makes it, the others overwrite it in place, so that
//! what changes on the disk is what was asked for and next to nothing of the file system's.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::record::{Noise, RECORD_BYTES};
use crate::verify::DISKS;

/// What `churn` writes at one place: what an application's page or a file system's extent comes to. Blocks of 4 KiB would
/// measure the emulated processor, not replication.
const CHURN_BYTES: usize = 64 << 10;
/// How much `churn` writes between two syncs: a database's group of commits, not its every page.
const CHURN_SYNC_BYTES: u64 = 1 << 20;

/// Carries out what the words after `ledger load` ask for, and prints one line of JSON about it.
pub(crate) fn run(words: &[String]) -> io::Result<()> {
    let usage = "usage: ledger load fill MIB | scatter BLOCKS | churn KIB_PER_SECOND SECONDS | latency PER_SECOND SECONDS";
    let numbers = words.iter().skip(1).map(|word| word.parse::<u64>());
    let numbers: Vec<u64> = numbers.collect::<Result<_, _>>().map_err(|_| io::Error::other(usage))?;
    let mut load = Load::open(&PathBuf::from(DISKS[0]))?;
    let answer = match (words.first().map(String::as_str), numbers.as_slice()) {
        (Some("fill"), [mib]) => load.fill(mib * 256)?,
        (Some("scatter"), [blocks]) => load.scatter(*blocks)?,
        (Some("churn"), [kib, seconds]) => load.churn(kib * 1024, Duration::from_secs(*seconds))?,
        (Some("latency"), [rate, seconds]) => load.latency(*rate, Duration::from_secs(*seconds))?,
        _ => return Err(io::Error::other(usage)),
    };
    writeln!(io::stdout(), "{answer}")
}

struct Load {
    file: File,
    /// Blocks of the file.
    blocks: u64,
    noise: Noise,
}

impl Load {
    fn open(directory: &Path) -> io::Result<Self> {
        let path = directory.join("load");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let blocks = file.metadata()?.len() / RECORD_BYTES as u64;
        let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64);
        Ok(Self { file, blocks, noise: Noise::new(seed) })
    }

    fn block(&mut self) -> Vec<u8> {
        (0..RECORD_BYTES / 8).flat_map(|_| self.noise.next().to_le_bytes()).collect()
    }

    fn place(&mut self) -> io::Result<u64> {
        if self.blocks == 0 {
            return Err(io::Error::other("there is no load file yet; make it with `ledger load fill`"));
        }
        Ok(self.noise.next() % self.blocks * RECORD_BYTES as u64)
    }

    /// Writes the whole file.
    fn fill(&mut self, blocks: u64) -> io::Result<serde_json::Value> {
        self.file.set_len(blocks * RECORD_BYTES as u64)?;
        for index in 0..blocks {
            let block = self.block();
            self.file.write_all_at(&block, index * RECORD_BYTES as u64)?;
        }
        self.file.sync_all()?;
        Ok(json!({ "blocks": blocks }))
    }

    /// Writes that many blocks at random places, then syncs.
    fn scatter(&mut self, blocks: u64) -> io::Result<serde_json::Value> {
        for _ in 0..blocks {
            let (block, at) = (self.block(), self.place()?);
            self.file.write_all_at(&block, at)?;
        }
        self.file.sync_data()?;
        Ok(json!({ "blocks": blocks }))
    }

    /// Writes pieces at random places at a rate, for some time; all of them reach the disk.
    fn churn(&mut self, bytes_per_second: u64, time: Duration) -> io::Result<serde_json::Value> {
        let begun = Instant::now();
        let (mut written, mut synced) = (0u64, 0u64);
        let pieces = self.blocks * RECORD_BYTES as u64 / CHURN_BYTES as u64;
        if pieces == 0 {
            return Err(io::Error::other("the load file is too small for churn"));
        }
        let mut piece = vec![0; CHURN_BYTES];
        while begun.elapsed() < time {
            let due = (bytes_per_second as f64 * begun.elapsed().as_secs_f64()) as u64;
            if written >= due {
                std::thread::sleep(Duration::from_millis(2));
                continue;
            }
            for word in piece.chunks_exact_mut(8) {
                word.copy_from_slice(&self.noise.next().to_le_bytes());
            }
            self.file.write_all_at(&piece, self.noise.next() % pieces * CHURN_BYTES as u64)?;
            written += CHURN_BYTES as u64;
            if written - synced >= CHURN_SYNC_BYTES {
                self.file.sync_data()?;
                synced = written;
            }
        }
        self.file.sync_data()?;
        Ok(json!({ "bytes": written, "seconds": begun.elapsed().as_secs_f64() }))
    }

    /// Writes and syncs one block after the other at a rate, and answers how long each took, in microseconds.
    fn latency(&mut self, rate: u64, time: Duration) -> io::Result<serde_json::Value> {
        let period = Duration::from_secs(1) / u32::try_from(rate.clamp(1, 1000)).unwrap_or(1000);
        let begun = Instant::now();
        let mut due = begun;
        let mut micros = Vec::new();
        while begun.elapsed() < time {
            if let Some(pause) = due.checked_duration_since(Instant::now()) {
                std::thread::sleep(pause);
            }
            due += period;
            let (block, at) = (self.block(), self.place()?);
            let started = Instant::now();
            self.file.write_all_at(&block, at)?;
            self.file.sync_data()?;
            micros.push(u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX));
        }
        Ok(json!({ "micros": micros }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_stays_in_its_file_and_says_what_it_did() {
        let directory = tempfile::tempdir().unwrap();
        let mut load = Load::open(directory.path()).unwrap();
        assert!(load.scatter(1).is_err());
        load.blocks = 32;
        load.fill(32).unwrap();
        assert_eq!(load.scatter(9).unwrap()["blocks"], 9);
        let churned = load.churn(1 << 20, Duration::from_millis(100)).unwrap();
        assert!(churned["bytes"].as_u64().unwrap() > 0);
        let timed = load.latency(100, Duration::from_millis(100)).unwrap();
        assert!(!timed["micros"].as_array().unwrap().is_empty());
        assert_eq!(std::fs::metadata(directory.path().join("load")).unwrap().len(), 32 * 4096);
    }
}
