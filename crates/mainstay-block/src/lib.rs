//! Block devices, extents, the frame codec and the hash table: what capture, transport, store and
//! NBD have in common.
//!
//! Nothing here knows where bytes come from. A [`BlockDevice`] is anything that can be read and
//! perhaps written at byte offsets: a file, an NBD export, a recovery point, a simulated disk.
//! Changed blocks travel and rest in *frames* ([`frame`]): encoded once by the sending agent, sent
//! and stored verbatim. What a replica holds is known to its agent by a [`hash_table::HashTable`].

mod device;
pub mod durable;
pub mod elsewhere;
mod faulty;
mod file;
pub mod frame;
#[doc(hidden)]
pub mod fuzzing;
mod hash;
mod hash_log;
pub mod hash_table;
pub mod varint;

pub use device::{BlockDevice, BlockError, Extent, ExtentKind, MemoryDevice, check_range};
pub use faulty::{FaultPlan, FaultyDevice};
pub use file::FileDevice;
pub use hash::{BlockHash, BlockHasher, HashKey};

/// The unit in which changes are detected, hashed and shipped: the page size of every guest we
/// protect and the subcluster size of the overlays we boot from.
pub const BLOCK_BYTES: u64 = 4096;

/// The same as an in-memory length.
pub(crate) const BLOCK_LENGTH: usize = BLOCK_BYTES as usize;

/// Number of blocks that cover `bytes` bytes; the last one may be partial.
pub fn blocks_of(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES)
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Whole 128-byte groups let the compiler use vector instructions; random data leaves at the first group.
    let mut groups = bytes.chunks_exact(128);
    groups.all(|group| group.iter().fold(0u8, |sum, byte| sum | byte) == 0)
        && bytes.chunks_exact(128).remainder().iter().all(|byte| *byte == 0)
}
