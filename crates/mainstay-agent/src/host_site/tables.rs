//! Hash tables of an item's disks: what the replica holds, block by block.

use std::sync::Arc;

use mainstay_block::{
    BlockDevice, HashKey,
    hash_table::{Fill, HashTable, HashTableError},
};
use mainstay_model::PointId;
use mainstay_provider::{ErrorKind, SiteError};
use mainstay_replication::{Mount, MountOptions, rebuild_table, settle};
use uuid::Uuid;

use super::{Inner, Work, data_error};
use crate::records::ItemFile;

pub(super) fn table_error(error: &HashTableError) -> SiteError {
    SiteError::new(ErrorKind::Failed, format!("hash table: {error}"))
}

impl Inner {
    /// The tables of an item's disks, describing `point` (or an empty replica). Tables that do not are made to: decided
    /// if a transfer's end is unclear, else rebuilt from the server's hashes. Answers also whether all tables described
    /// the point without being rebuilt.
    pub(super) async fn tables_at(
        &self,
        record: &ItemFile,
        sizes: &[u64],
        point: Option<PointId>,
        work: &Work,
    ) -> Result<(Vec<Arc<HashTable>>, bool), SiteError> {
        let mut tables = Vec::new();
        for (index, size) in sizes.iter().enumerate() {
            let table = self.open_table(record, index, *size)?;
            if table.disk_bytes() < *size {
                table.grow(*size).map_err(|error| table_error(&error))?;
            }
            tables.push(Arc::new(table));
        }
        settle(&*self.server, record.item.0, &tables, &work.cancel)
            .await
            .map_err(|error| data_error(&error))?;
        let wanted = point.map(|point| point.0);
        if tables.iter().all(|table| table.point() == wanted) {
            return Ok((tables, true));
        }
        let tables = match wanted {
            None => self.blank_tables(record, sizes)?,
            Some(point) => self.rebuilt_tables(record, sizes, point, work).await?,
        };
        Ok((tables, false))
    }

    fn open_table(&self, record: &ItemFile, index: usize, size: u64) -> Result<HashTable, SiteError> {
        let path = self.records.table_path(record.item, index);
        match HashTable::open(&path) {
            Ok(table) if table.disk_bytes() <= size => Ok(table),
            // Gone, damaged, or of a disk that shrank: known to describe nothing.
            _ => HashTable::create(&path, size, new_key(), Fill::Zeros).map_err(|error| table_error(&error)),
        }
    }

    fn blank_tables(&self, record: &ItemFile, sizes: &[u64]) -> Result<Vec<Arc<HashTable>>, SiteError> {
        self.created_tables(record, sizes, Fill::Zeros)
    }

    /// Tables that know nothing: every block that is looked at is sent.
    pub(super) fn created_tables(
        &self,
        record: &ItemFile,
        sizes: &[u64],
        fill: Fill,
    ) -> Result<Vec<Arc<HashTable>>, SiteError> {
        let create = |(index, size): (usize, &u64)| {
            HashTable::create(&self.records.table_path(record.item, index), *size, new_key(), fill)
                .map(Arc::new)
                .map_err(|error| table_error(&error))
        };
        sizes.iter().enumerate().map(create).collect()
    }

    async fn rebuilt_tables(
        &self,
        record: &ItemFile,
        sizes: &[u64],
        point: Uuid,
        work: &Work,
    ) -> Result<Vec<Arc<HashTable>>, SiteError> {
        tracing::info!(item = %record.item, %point, "hash tables are rebuilt from the recovery point");
        work.report("Reading the recovery point's hashes", 0, 0, 0);
        let tables = self.created_tables(record, sizes, Fill::Zeros)?;
        let stop = work.cancel.child_token();
        let _stop_on_drop = stop.clone().drop_guard();
        let mount = Mount::open(self.server.clone(), record.item.0, point, &MountOptions::default(), stop)
            .await
            .map_err(|error| data_error(&error))?;
        let session = Uuid::new_v4();
        for (index, table) in tables.iter().enumerate() {
            let Some(disk) = u16::try_from(index).ok().and_then(|index| mount.disk(index)) else {
                // The point is older than the disk: nothing of it is in the replica.
                table
                    .prepare(session)
                    .and_then(|()| table.commit(session, point))
                    .map_err(|error| table_error(&error))?;
                continue;
            };
            let bytes = disk.size().min(table.disk_bytes());
            rebuild_table(&disk, bytes, table, session, point).await.map_err(|error| data_error(&error))?;
        }
        Ok(tables)
    }
}

/// A secret of its own for each disk: with a known hash function a guest could make two blocks of one hash.
fn new_key() -> HashKey {
    HashKey(rand::random())
}
