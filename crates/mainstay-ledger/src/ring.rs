//! The ledger file: a ring of records. Record `n` lies at slot `n % capacity`, so the file keeps the last
//! `capacity` records and a small disk lasts for ever. The capacity is the file's length, fixed when the
//! file was made: a disk that grows later must not move the records.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::record::{RECORD_BYTES, Slot, decode};

/// The ledger file of one disk.
pub(crate) struct Ring {
    file: File,
    capacity: u64,
}

impl Ring {
    /// Opens the ring, making it with `capacity` slots when there is none.
    pub(crate) fn open_or_create(path: &Path, capacity: u64) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        if file.metadata()?.len() < RECORD_BYTES as u64 {
            file.set_len(capacity * RECORD_BYTES as u64)?;
            file.sync_all()?;
        }
        Self::new(file)
    }

    /// Opens an existing ring for reading.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::new(File::open(path)?)
    }

    fn new(file: File) -> io::Result<Self> {
        let capacity = file.metadata()?.len() / RECORD_BYTES as u64;
        if capacity == 0 {
            return Err(io::Error::other("the ledger file is empty"));
        }
        Ok(Self { file, capacity })
    }

    /// The number of slots.
    pub(crate) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Writes a record to its slot and returns once the disk has it.
    pub(crate) fn append(&self, number: u64, record: &[u8]) -> io::Result<()> {
        self.write_slot(number % self.capacity, record)?;
        self.file.sync_data()
    }

    /// Writes a slot; durable after [`Ring::sync`].
    pub(crate) fn write_slot(&self, slot: u64, record: &[u8]) -> io::Result<()> {
        self.file.write_all_at(record, slot * RECORD_BYTES as u64)
    }

    /// Makes everything written durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    /// The bytes of a slot.
    pub(crate) fn read_slot(&self, slot: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; RECORD_BYTES];
        self.file.read_exact_at(&mut bytes, slot * RECORD_BYTES as u64)?;
        Ok(bytes)
    }

    /// What every slot holds. A record in a slot that is not its own is corrupt.
    pub(crate) fn slots(&self) -> io::Result<Vec<Slot>> {
        let mut slots = Vec::new();
        for index in 0..self.capacity {
            slots.push(match decode(&self.read_slot(index)?) {
                Slot::Record { number, .. } if number % self.capacity != index => Slot::Corrupt,
                slot => slot,
            });
        }
        Ok(slots)
    }
}

/// The highest number among the slots, zero when there is none.
pub(crate) fn last_number(slots: &[Slot]) -> u64 {
    let number = |slot: &Slot| if let Slot::Record { number, .. } = slot { Some(*number) } else { None };
    slots.iter().filter_map(number).max().unwrap_or(0)
}
