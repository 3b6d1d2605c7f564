//! What the replica holds, block by block: the agent's memory of one disk.
//!
//! QEMU's bitmap is lost when QEMU dies; this table is not. After any doubt the agent hashes the disk
//! and sends only what the table contradicts. It also cuts dirty 64 KiB clusters down to the 4 KiB blocks
//! that really changed.
//!
//! File (`docs/formats/hash-table.md`): a 4096-byte header, then one u64 per block ([`BlockHash`]); sparse: a hole
//! means what the table was created with, so that a table of any size is made at once. A session's new hashes are *staged* in a log beside the table and applied once
//! its recovery point is committed, so the table never names content that no recovery point holds:
//!
//! 1. [`HashTable::stage`] while sending; 2. [`HashTable::prepare`] *before* asking the server to commit;
//! 3. [`HashTable::commit`] after its answer, or [`HashTable::abandon`].
//!
//! After a crash between 2 and 3 [`HashTable::pending`] names the session: ask the server whether it committed
//! it, then commit or abandon. A crash before 2 abandons by itself; a crash in 3 finishes at the next open, or, when the
//! host lost its power before the answer was on disk, as after 2. The log's file stays, empty: what is written down for
//! each cycle of each disk is two syncs.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use uuid::Uuid;

use crate::durable::sync_parent;
use crate::file::{read_exact_at, write_all_at};
use crate::hash_log::{LogState, LogWriter, Record, clear, log_path, read_log, word};
use crate::{BLOCK_LENGTH, BlockHash, BlockHasher, HashKey, blocks_of, is_zero};

const MAGIC: &[u8; 8] = b"MSHASHT1";
const HEADER_BYTES: u64 = 4096;
const CHECKED_BYTES: usize = 72;
/// Hashes handled at once when a range is scanned or filled: 512 KiB of table, 256 MiB of disk.
const CHUNK_HASHES: u64 = 65536;

/// Why a hash table could not be used.
#[derive(Debug, thiserror::Error)]
pub enum HashTableError {
    /// The file system failed.
    #[error("hash table file")]
    Io(#[from] io::Error),
    /// The header is damaged or of another version: create a new table, all unknown.
    #[error("not a hash table, or damaged: {0}")]
    Damaged(&'static str),
    /// Another session's hashes are still pending: commit or abandon it first.
    #[error("hashes of session {0} are pending")]
    Pending(Uuid),
    /// The session has nothing staged here.
    #[error("nothing is pending for session {0}")]
    NotPending(Uuid),
    /// Blocks outside the disk.
    #[error("block {0} lies outside the disk")]
    OutOfRange(u64),
    /// A table cannot shrink: create a new one, all unknown.
    #[error("a hash table cannot shrink")]
    Shrink,
}

/// What a new table says about every block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// The replica is empty, so it holds zeros: nothing was ever sent.
    Zeros,
    /// Nothing is known.
    Unknown,
}

impl Fill {
    /// What each value is combined with (exclusive or) on its way to the file and back: what a hole means.
    fn mask(self) -> u64 {
        match self {
            Self::Zeros => BlockHash::ZERO.0,
            Self::Unknown => BlockHash::UNKNOWN.0,
        }
    }

    /// The version of the format that has it.
    fn version(self) -> u32 {
        match self {
            Self::Zeros => 1,
            Self::Unknown => 2,
        }
    }
}

/// How a block compares with what the replica holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The replica holds this content.
    Same,
    /// Now zeros, and the replica does not hold zeros.
    Zero,
    /// Other content, with this hash, and the replica does not hold it.
    Data(BlockHash),
}

struct Described {
    size: u64,
    point: Option<Uuid>,
}

/// The table of one disk. All methods block on the file; `compare` may run on any number of threads.
pub struct HashTable {
    path: PathBuf,
    file: File,
    key: HashKey,
    hasher: BlockHasher,
    /// What a hole in the file means.
    hole: Fill,
    described: Mutex<Described>,
    log: Mutex<Option<LogWriter>>,
}

impl HashTable {
    /// Creates a table, replacing any that was there.
    ///
    /// # Errors
    /// [`HashTableError::Io`].
    pub fn create(path: &Path, disk_bytes: u64, key: HashKey, fill: Fill) -> Result<Self, HashTableError> {
        // Its log's name becomes durable with its own.
        File::create(log_path(path))?;
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
        file.set_len(HEADER_BYTES + blocks_of(disk_bytes) * 8)?;
        let table = Self {
            path: path.to_owned(),
            file,
            key,
            hasher: BlockHasher::new(key),
            hole: fill,
            described: Mutex::new(Described { size: disk_bytes, point: None }),
            log: Mutex::new(None),
        };
        table.file.sync_all()?;
        table.write_header()?;
        sync_parent(path)?;
        Ok(table)
    }

    /// Opens a table and finishes a commit that a crash interrupted.
    ///
    /// # Errors
    /// [`HashTableError::Damaged`] when it must be created anew.
    pub fn open(path: &Path) -> Result<Self, HashTableError> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut header = [0u8; CHECKED_BYTES + 16];
        if file.metadata()?.len() < HEADER_BYTES {
            return Err(HashTableError::Damaged("too short"));
        }
        read_exact_at(&file, &mut header, 0)?;
        if &header[..8] != MAGIC {
            return Err(HashTableError::Damaged("magic"));
        }
        let check = blake3::hash(&header[..CHECKED_BYTES]);
        if check.as_bytes()[..16] != header[CHECKED_BYTES..] {
            return Err(HashTableError::Damaged("header checksum"));
        }
        let version = |fill: &Fill| header[8..12] == fill.version().to_le_bytes();
        let hole = [Fill::Zeros, Fill::Unknown].into_iter().find(version);
        let hole = hole.ok_or(HashTableError::Damaged("version"))?;
        let size = word(&header[16..24]);
        let mut key = [0; 32];
        key.copy_from_slice(&header[24..56]);
        let point = (header[12] & 1 == 1).then(|| Uuid::from_slice(&header[56..72]).unwrap_or_default());
        if file.metadata()?.len() < HEADER_BYTES + blocks_of(size) * 8 {
            return Err(HashTableError::Damaged("shorter than its disk"));
        }
        let table = Self {
            path: path.to_owned(),
            file,
            key: HashKey(key),
            hasher: BlockHasher::new(HashKey(key)),
            hole,
            described: Mutex::new(Described { size, point }),
            log: Mutex::new(None),
        };
        match read_log(&log_path(path), |_| Ok(()))? {
            LogState::Nothing => clear(&log_path(path))?,
            LogState::Prepared(session) => {
                *lock(&table.log) = Some(LogWriter::reopen(&log_path(path), session)?);
            }
            LogState::Committed(point) => table.apply(point)?,
        }
        Ok(table)
    }

    /// The disk's key.
    pub fn key(&self) -> HashKey {
        self.key
    }

    /// Size of the disk in bytes.
    pub fn disk_bytes(&self) -> u64 {
        lock(&self.described).size
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u64 {
        blocks_of(self.disk_bytes())
    }

    /// The recovery point whose content the table describes; `None` while it describes an empty replica
    /// or nothing.
    pub fn point(&self) -> Option<Uuid> {
        lock(&self.described).point
    }

    /// The session that was prepared but neither committed nor abandoned before a crash, or that is
    /// being staged now.
    pub fn pending(&self) -> Option<Uuid> {
        lock(&self.log).as_ref().map(|log| log.session)
    }

    /// Follows a disk that grew; the new blocks are zeros, as in the replica.
    ///
    /// # Errors
    /// [`HashTableError::Shrink`].
    pub fn grow(&self, disk_bytes: u64) -> Result<(), HashTableError> {
        if disk_bytes < self.disk_bytes() {
            return Err(HashTableError::Shrink);
        }
        let blocks = self.blocks();
        self.file.set_len(HEADER_BYTES + blocks_of(disk_bytes) * 8)?;
        if self.hole != Fill::Zeros {
            self.fill(blocks, blocks_of(disk_bytes) - blocks, BlockHash::ZERO)?;
        }
        self.file.sync_all()?;
        lock(&self.described).size = disk_bytes;
        self.write_header()
    }

    /// The known hashes of `count` blocks from `first` on.
    ///
    /// # Errors
    /// [`HashTableError::OutOfRange`].
    pub fn hashes(&self, first: u64, count: u64) -> Result<Vec<BlockHash>, HashTableError> {
        self.check(first, count)?;
        let mut bytes = vec![0; count as usize * 8];
        read_exact_at(&self.file, &mut bytes, HEADER_BYTES + first * 8)?;
        Ok(bytes.chunks_exact(8).map(|hash| BlockHash(word(hash) ^ self.hole.mask())).collect())
    }

    /// Compares contiguous blocks, the first of which is `first`, with what the replica holds. A partial
    /// last block (the end of the disk) counts as padded with zeros. One read of the table per call:
    /// 256 KiB or more of data at once is fast.
    ///
    /// # Errors
    /// [`HashTableError::OutOfRange`].
    pub fn compare(&self, first: u64, data: &[u8]) -> Result<Vec<Verdict>, HashTableError> {
        let known = self.hashes(first, data.len().div_ceil(BLOCK_LENGTH) as u64)?;
        let blocks = data.chunks(BLOCK_LENGTH).zip(known);
        Ok(blocks
            .map(|(block, known)| {
                if is_zero(block) {
                    return if known == BlockHash::ZERO { Verdict::Same } else { Verdict::Zero };
                }
                let hash = self.hasher.hash(block);
                if hash == known { Verdict::Same } else { Verdict::Data(hash) }
            })
            .collect())
    }

    /// The parts `(first block, blocks)` of a range where the replica does not surely hold zeros: what
    /// must be sent for a range that now reads as zeros.
    ///
    /// # Errors
    /// [`HashTableError::OutOfRange`].
    pub fn not_zero(&self, first: u64, count: u64) -> Result<Vec<(u64, u64)>, HashTableError> {
        self.check(first, count)?;
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let end = first + count;
        let mut at = first;
        while at < end {
            let step = CHUNK_HASHES.min(end - at);
            let hashes = self.hashes(at, step)?;
            for (block, _) in (at..).zip(hashes).filter(|(_, hash)| *hash != BlockHash::ZERO) {
                match runs.last_mut() {
                    Some((start, length)) if *start + *length == block => *length += 1,
                    _ => runs.push((block, 1)),
                }
            }
            at += step;
        }
        Ok(runs)
    }

    /// Remembers that the session sent contiguous blocks with these hashes. Not durable before
    /// [`Self::prepare`], not visible to `compare` before [`Self::commit`].
    ///
    /// # Errors
    /// [`HashTableError::Pending`] when another session is staged, or this one is already prepared.
    pub fn stage(&self, session: Uuid, first: u64, hashes: &[BlockHash]) -> Result<(), HashTableError> {
        self.check(first, hashes.len() as u64)?;
        self.with_log(session, |log| log.hashes(first, hashes))
    }

    /// Remembers that the session sent zeros for a range of blocks; as [`Self::stage`].
    ///
    /// # Errors
    /// As [`Self::stage`].
    pub fn stage_zeros(&self, session: Uuid, first: u64, count: u64) -> Result<(), HashTableError> {
        self.check(first, count)?;
        self.with_log(session, |log| log.zeros(first, count))
    }

    fn with_log(
        &self,
        session: Uuid,
        write: impl FnOnce(&mut LogWriter) -> io::Result<()>,
    ) -> Result<(), HashTableError> {
        let mut log = lock(&self.log);
        match log.as_ref() {
            Some(open) if open.session != session || open.prepared => {
                return Err(HashTableError::Pending(open.session));
            }
            Some(_) => {}
            None => *log = Some(LogWriter::create(&log_path(&self.path), session)?),
        }
        if let Some(log) = log.as_mut() {
            write(log)?;
        }
        Ok(())
    }

    /// Makes everything the session staged durable. Must return before the server is asked to commit.
    /// A session that staged nothing may be prepared too.
    ///
    /// # Errors
    /// [`HashTableError::Pending`] when another session is staged.
    pub fn prepare(&self, session: Uuid) -> Result<(), HashTableError> {
        let mut log = lock(&self.log);
        match log.as_ref() {
            Some(open) if open.session != session => return Err(HashTableError::Pending(open.session)),
            Some(_) => {}
            None => *log = Some(LogWriter::create(&log_path(&self.path), session)?),
        }
        if let Some(log) = log.as_mut() {
            log.prepare()?;
        }
        Ok(())
    }

    /// The session's recovery point is committed as `point`: applies its hashes. After an error open the
    /// table anew; the application is then finished or asked for again, and repeating it does no harm.
    ///
    /// # Errors
    /// [`HashTableError::NotPending`] when the session is not staged, unless the table already describes
    /// `point`.
    pub fn commit(&self, session: Uuid, point: Uuid) -> Result<(), HashTableError> {
        let mut log = lock(&self.log);
        match log.as_mut() {
            Some(open) if open.session == session => {
                open.prepare()?;
                open.committed(point)?;
            }
            Some(open) => return Err(HashTableError::Pending(open.session)),
            None if self.point() == Some(point) => return Ok(()),
            None => return Err(HashTableError::NotPending(session)),
        }
        self.apply(point)?;
        *log = None;
        Ok(())
    }

    /// Forgets what the session staged; does nothing when it is not pending.
    ///
    /// # Errors
    /// [`HashTableError::Io`].
    pub fn abandon(&self, session: Uuid) -> Result<(), HashTableError> {
        let mut log = lock(&self.log);
        let Some(open) = log.as_ref().filter(|open| open.session == session) else { return Ok(()) };
        if open.is_found {
            // The table may have taken some of it before a loss of power, on the word of a server that has forgotten its
            // commit since (restored from a backup): nothing is known of these blocks.
            self.replay(|first, count| self.fill(first, count, BlockHash::UNKNOWN))?;
            self.file.sync_all()?;
        }
        *log = None;
        clear(&log_path(&self.path))?;
        Ok(())
    }

    /// Hands the block ranges of the log's records to `each`.
    fn replay(&self, each: impl Fn(u64, u64) -> io::Result<()>) -> Result<(), HashTableError> {
        read_log(&log_path(&self.path), |record| {
            let (first, count) = match record {
                Record::Hashes(first, hashes) => (first, hashes.len() as u64),
                Record::Zeros(first, count) => (first, count),
                Record::Prepared(_) | Record::Committed(_) => return Ok(()),
            };
            self.inside(first, count)?;
            each(first, count)
        })?;
        Ok(())
    }

    fn inside(&self, first: u64, count: u64) -> io::Result<()> {
        let end = first.checked_add(count).filter(|end| *end <= self.blocks());
        end.map(|_| ()).ok_or_else(|| io::Error::other("staged block outside the disk"))
    }

    /// Replays the log into the table, then the header, then empties the log.
    fn apply(&self, point: Uuid) -> Result<(), HashTableError> {
        let path = log_path(&self.path);
        read_log(&path, |record| match record {
            Record::Hashes(first, hashes) => {
                self.inside(first, hashes.len() as u64)?;
                let mask = self.hole.mask();
                let bytes: Vec<u8> = hashes.iter().flat_map(|hash| (hash.0 ^ mask).to_le_bytes()).collect();
                write_all_at(&self.file, &bytes, HEADER_BYTES + first * 8)
            }
            Record::Zeros(first, count) => {
                self.inside(first, count)?;
                self.fill(first, count, BlockHash::ZERO)
            }
            Record::Prepared(_) | Record::Committed(_) => Ok(()),
        })?;
        lock(&self.described).point = Some(point);
        // Hashes and header become durable together: whatever a crash leaves of them, the log still says all of it.
        self.write_header()?;
        clear(&path)?;
        Ok(())
    }

    fn fill(&self, first: u64, count: u64, hash: BlockHash) -> io::Result<()> {
        let bytes = (hash.0 ^ self.hole.mask()).to_le_bytes().repeat(CHUNK_HASHES.min(count) as usize);
        let end = first + count;
        let mut at = first;
        while at < end {
            let step = CHUNK_HASHES.min(end - at);
            write_all_at(&self.file, &bytes[..step as usize * 8], HEADER_BYTES + at * 8)?;
            at += step;
        }
        Ok(())
    }

    /// The header fits one sector, which disks write whole.
    fn write_header(&self) -> Result<(), HashTableError> {
        let mut header = [0u8; CHECKED_BYTES + 16];
        {
            let described = lock(&self.described);
            header[..8].copy_from_slice(MAGIC);
            header[8..12].copy_from_slice(&self.hole.version().to_le_bytes());
            header[12] = u8::from(described.point.is_some());
            header[16..24].copy_from_slice(&described.size.to_le_bytes());
            header[24..56].copy_from_slice(&self.key.0);
            header[56..72].copy_from_slice(described.point.unwrap_or_default().as_bytes());
        }
        let check = blake3::hash(&header[..CHECKED_BYTES]);
        header[CHECKED_BYTES..].copy_from_slice(&check.as_bytes()[..16]);
        write_all_at(&self.file, &header, 0)?;
        self.file.sync_all()?;
        Ok(())
    }

    fn check(&self, first: u64, count: u64) -> Result<(), HashTableError> {
        match first.checked_add(count) {
            Some(end) if end <= self.blocks() => Ok(()),
            _ => Err(HashTableError::OutOfRange(first.saturating_add(count).saturating_sub(1))),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "hash_table_tests.rs"]
mod tests;
