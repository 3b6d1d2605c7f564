//! Block devices, extents and the frame codec: what capture, transport, store and NBD have in common.
//!
//! Nothing here knows where bytes come from. A [`BlockDevice`] is anything that can be read and
//! perhaps written at byte offsets: a file, an NBD export, a recovery point, a simulated disk.

mod device;

pub use device::{BlockDevice, BlockError, Extent, ExtentKind, MemoryDevice, check_range};

/// The unit in which changes are detected, hashed and shipped: the page size of every guest we
/// protect and the subcluster size of the overlays we boot from.
pub const BLOCK_BYTES: u64 = 4096;
