//! The block device trait and its in-memory implementation.

use std::sync::RwLock;

use async_trait::async_trait;
use bytes::Bytes;

/// What a range of a device holds, as far as it is known without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Bytes that must be read to be known.
    Data,
    /// Reads as zeros; need not be read.
    Zero,
}

/// A range of bytes and what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Length in bytes, never zero.
    pub length: u64,
    /// What the range holds.
    pub kind: ExtentKind,
}

/// Why a block device refused.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The range does not lie inside the device.
    #[error("range {offset}+{length} lies outside a device of {size} bytes")]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        length: u64,
        /// Size of the device.
        size: u64,
    },
    /// The device cannot be written.
    #[error("the device is read-only")]
    ReadOnly,
    /// The medium, or the connection to it, failed. After a failed write the range is undefined.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// A device of fixed size, addressed in bytes.
///
/// Callers may issue any number of requests at once. A write is durable only after a later `flush`
/// returned. When a future is dropped or an error returned, a write may have happened in part; reads
/// change nothing. Implementations must answer out-of-range requests with [`BlockError::OutOfRange`].
#[async_trait]
pub trait BlockDevice: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Reads `length` bytes at `offset`.
    async fn read(&self, offset: u64, length: u64) -> Result<Bytes, BlockError>;

    /// Writes `data` at `offset`.
    async fn write(&self, offset: u64, data: Bytes) -> Result<(), BlockError>;

    /// Makes a range read as zeros, without sending zeros where the medium can do better.
    async fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), BlockError>;

    /// Returns once all completed writes are durable.
    async fn flush(&self) -> Result<(), BlockError>;

    /// Describes a range as sorted, adjoining extents that cover exactly `offset..offset + length`.
    /// A device that knows nothing about itself answers one `Data` extent.
    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>, BlockError>;
}

/// Checks a range against a size; every implementation starts with it.
pub fn check_range(offset: u64, length: u64, size: u64) -> Result<(), BlockError> {
    match offset.checked_add(length) {
        Some(end) if end <= size => Ok(()),
        _ => Err(BlockError::OutOfRange { offset, length, size }),
    }
}

/// A device in memory: the oracle of tests and the disk of the simulated site.
#[derive(Debug)]
pub struct MemoryDevice {
    bytes: RwLock<Vec<u8>>,
}

impl MemoryDevice {
    /// A device of `size` zero bytes.
    pub fn new(size: u64) -> Self {
        Self { bytes: RwLock::new(vec![0; size as usize]) }
    }

    /// A copy of all bytes.
    pub fn snapshot(&self) -> Vec<u8> {
        self.bytes.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}

#[async_trait]
impl BlockDevice for MemoryDevice {
    fn size(&self) -> u64 {
        self.bytes.read().unwrap_or_else(std::sync::PoisonError::into_inner).len() as u64
    }

    async fn read(&self, offset: u64, length: u64) -> Result<Bytes, BlockError> {
        check_range(offset, length, self.size())?;
        let bytes = self.bytes.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        Ok(Bytes::copy_from_slice(&bytes[offset as usize..(offset + length) as usize]))
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), BlockError> {
        check_range(offset, data.len() as u64, self.size())?;
        let mut bytes = self.bytes.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        bytes[offset as usize..offset as usize + data.len()].copy_from_slice(&data);
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        check_range(offset, length, self.size())?;
        let mut bytes = self.bytes.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        bytes[offset as usize..(offset + length) as usize].fill(0);
        Ok(())
    }

    async fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>, BlockError> {
        check_range(offset, length, self.size())?;
        if length == 0 {
            return Ok(Vec::new());
        }
        Ok(vec![Extent { offset, length, kind: ExtentKind::Data }])
    }
}
