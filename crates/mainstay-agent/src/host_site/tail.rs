//! The end of a home disk that is larger than the recovery point's disk, because it has grown since: it becomes zeros,
//! as if it had grown only now.

use std::sync::Arc;

use mainstay_block::{BLOCK_BYTES, BlockDevice, ExtentKind, blocks_of, hash_table::HashTable, is_zero};
use mainstay_provider::{ErrorKind, SiteError};
use uuid::Uuid;

use super::{
    compare::{block_error, pieces},
    tables::table_error,
};

/// Clears a staged disk behind the point's `point_bytes`, and says so in its table under the fetch's session.
pub(super) async fn clear(
    key: &str,
    device: &dyn BlockDevice,
    table: &Arc<HashTable>,
    session: Uuid,
    point_bytes: u64,
) -> Result<(), SiteError> {
    let first = blocks_of(point_bytes);
    let blocks = blocks_of(device.size()).saturating_sub(first);
    if blocks == 0 {
        return Ok(());
    }
    let start = first * BLOCK_BYTES;
    device.write_zeroes(start, device.size() - start).await.map_err(block_error(key))?;
    let table = table.clone();
    mainstay_block::elsewhere::spawn_blocking(move || table.stage_zeros(session, first, blocks))
        .await
        .map_err(|error| SiteError::new(ErrorKind::Failed, error.to_string()))?
        .map_err(|error| table_error(&error))
}

/// Blocks of a range that are not zeros. Reads only what the device does not know to be zeros.
pub(super) async fn blocks_not_zero(
    key: &str,
    device: &dyn BlockDevice,
    first: u64,
    end: u64,
) -> Result<u64, SiteError> {
    let (start, size) = (first * BLOCK_BYTES, device.size());
    let length = (end * BLOCK_BYTES).min(size) - start;
    let mut found = 0;
    for extent in device.extents(start, length).await.map_err(block_error(key))? {
        if extent.kind == ExtentKind::Zero {
            continue;
        }
        for piece in pieces(extent.offset / BLOCK_BYTES, blocks_of(extent.offset + extent.length)) {
            let offset = piece.start * BLOCK_BYTES;
            let bytes = (piece.end * BLOCK_BYTES).min(size) - offset;
            let data = device.read(offset, bytes).await.map_err(block_error(key))?;
            found += data.chunks(BLOCK_BYTES as usize).filter(|block| !is_zero(block)).count() as u64;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use mainstay_block::{HashKey, MemoryDevice, hash_table::Fill};

    use super::*;

    const BLOCK: usize = BLOCK_BYTES as usize;

    #[tokio::test]
    async fn only_what_lies_behind_the_points_disk_is_cleared() {
        let directory = tempfile::tempdir().unwrap();
        // Two and a half blocks of the point's disk, five blocks and a sector at home.
        let (point_bytes, size) = (2 * BLOCK + BLOCK / 2, 5 * BLOCK + 512);
        let device = MemoryDevice::new(size as u64);
        device.write(0, Bytes::from(vec![7; size])).await.unwrap();
        let path = directory.path().join("table");
        let table = HashTable::create(&path, size as u64, HashKey([1; 32]), Fill::Unknown).unwrap();
        let table = Arc::new(table);
        let (session, point) = (Uuid::from_u128(1), Uuid::from_u128(2));
        clear("vda", &device, &table, session, point_bytes as u64).await.unwrap();
        let bytes = device.snapshot();
        // The block in which the point's disk ends comes with the difference, padded.
        assert!(bytes[..3 * BLOCK].iter().all(|byte| *byte == 7));
        assert!(is_zero(&bytes[3 * BLOCK..]));
        assert_eq!(blocks_not_zero("vda", &device, 3, 6).await.unwrap(), 0);
        assert_eq!(blocks_not_zero("vda", &device, 1, 6).await.unwrap(), 2);
        table.prepare(session).unwrap();
        table.commit(session, point).unwrap();
        assert_eq!(table.not_zero(0, 6).unwrap(), [(0, 3)]);
    }

    #[tokio::test]
    async fn a_disk_of_the_points_size_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let device = MemoryDevice::new(2 * BLOCK_BYTES);
        device.write(0, Bytes::from(vec![7; 2 * BLOCK])).await.unwrap();
        let path = directory.path().join("table");
        let table = HashTable::create(&path, 2 * BLOCK_BYTES, HashKey([1; 32]), Fill::Unknown).unwrap();
        let table = Arc::new(table);
        clear("vda", &device, &table, Uuid::from_u128(1), 2 * BLOCK_BYTES).await.unwrap();
        assert!(device.snapshot().iter().all(|byte| *byte == 7));
        assert_eq!(table.pending(), None);
    }
}
