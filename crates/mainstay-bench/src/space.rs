//! The space that recovery points take, against the changes in them.
//!
//! In this process: a disk in memory, the data plane over a pipe, and the store in a directory with fsync, as the server
//! has it. Needs no VM, because nothing here depends on one.

use std::{path::Path, sync::Arc};

use anyhow::{Context as _, Result, anyhow};
use bytes::Bytes;
use mainstay_block::{
    BLOCK_BYTES, BlockDevice as _, HashKey, MemoryDevice,
    hash_table::{Fill, HashTable},
};
use mainstay_replication::{
    BoxStream, SendDisk, SendJob, SendOptions, SendProgress, replicate, serve_connection,
};
use mainstay_store::{Consistency, PointMeta, Store, StoreOptions, local_storage};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    data::Random,
    figure::{Figure, short},
    stand::{Scale, now_ms},
    tool::bytes_in,
};

const POINTS: u64 = 48;
/// Share of the disk's blocks that each point changes: 1 %.
const CHURN_DIVISOR: u64 = 100;
/// Between two points in the store's time, so that what a pass leaves behind is collected by a later one, as in service.
const INTERVAL_MS: u64 = 300_000;
/// How hard the change is compressed that is compared with: as hard as frames are, but each point as one stream.
const ZSTD_LEVEL: i32 = 1;

pub(crate) async fn measure(dir: &Path, scale: Scale) -> Result<Vec<Figure>> {
    let disk_bytes = scale.pick(1 << 30, 128 << 20);
    std::fs::create_dir_all(dir)?;
    let mut replica = Replica::new(dir, disk_bytes)?;
    let mut random = Random::new(1);
    for offset in (0..disk_bytes).step_by(1 << 20) {
        let mut piece = vec![0; 1 << 20];
        random.mixed(&mut piece);
        replica.device.write(offset, piece.into()).await?;
    }
    replica.point(std::iter::once(0..disk_bytes).collect()).await?;
    let before = bytes_in(&replica.directory)?;
    let mut unique = 0;
    for _ in 0..POINTS {
        unique += replica.churn(&mut random).await?;
    }
    let value = (bytes_in(&replica.directory)? - before) as f64;
    std::fs::remove_dir_all(dir)?;
    let ratio = value / unique as f64;
    Ok(vec![Figure {
        name: "space-48-points".to_owned(),
        value: value / 1e6,
        unit: "MB",
        peer: Some(unique as f64 / 1e6),
        ratio,
        aim: 1.15,
        accept: 1.3,
        note: format!(
            "{POINTS} points, 1 % of {} GiB each, half of the blocks compressible; peer: the changed blocks, compressed",
            short(disk_bytes as f64 / f64::from(1 << 30))
        ),
    }])
}

struct Replica {
    directory: std::path::PathBuf,
    store: Store,
    device: Arc<MemoryDevice>,
    table: Arc<HashTable>,
    id: Uuid,
    head: Option<Uuid>,
    time_ms: u64,
}

impl Replica {
    fn new(dir: &Path, disk_bytes: u64) -> Result<Self> {
        let directory = dir.join("store");
        Ok(Self {
            store: Store::open(local_storage(&directory)?, StoreOptions::default()),
            directory,
            device: Arc::new(MemoryDevice::new(disk_bytes)),
            table: Arc::new(HashTable::create(
                &dir.join("table"),
                disk_bytes,
                HashKey([7; 32]),
                Fill::Zeros,
            )?),
            id: Uuid::new_v4(),
            head: None,
            time_ms: now_ms().unsigned_abs(),
        })
    }

    /// Changes a share of the blocks, makes a point of it, and answers how many bytes that is when compressed.
    async fn churn(&mut self, random: &mut Random) -> Result<u64> {
        let blocks = self.device.size() / BLOCK_BYTES;
        let mut places: Vec<u64> = (0..blocks / CHURN_DIVISOR).map(|_| random.next() % blocks).collect();
        places.sort_unstable();
        places.dedup();
        let (mut changed, mut ranges) = (Vec::new(), Vec::new());
        for place in places {
            let mut block = vec![0; BLOCK_BYTES as usize];
            random.mixed(&mut block);
            changed.extend_from_slice(&block);
            let offset = place * BLOCK_BYTES;
            self.device.write(offset, Bytes::from(block)).await?;
            ranges.push(offset..offset + BLOCK_BYTES);
        }
        self.point(ranges).await?;
        Ok(zstd::bulk::compress(&changed, ZSTD_LEVEL)?.len() as u64)
    }

    /// Sends what the ranges hold and makes it a point, then keeps the store in order, as the server does.
    async fn point(&mut self, ranges: Vec<std::ops::Range<u64>>) -> Result<()> {
        let job = SendJob {
            replica: self.id,
            session: Uuid::new_v4(),
            generation: 1,
            parent: self.head,
            fork: false,
            disks: vec![SendDisk {
                index: 0,
                key: "vda".to_owned(),
                device: self.device.clone(),
                ranges,
                resend: Vec::new(),
                table: self.table.clone(),
            }],
            meta: PointMeta {
                time_ms: self.time_ms,
                consistency: Consistency::Crash,
                definition: Some(Bytes::from_static(b"<domain/>")),
            },
            before_partial: None,
        };
        let store = self.store.clone();
        let connect = move || {
            let store = store.clone();
            async move {
                let (near, far) = tokio::io::duplex(1 << 20);
                tokio::spawn(async move {
                    serve_connection(Box::new(far), &store, &|_| Box::pin(std::future::ready(Ok(())))).await
                });
                Ok(Box::new(near) as BoxStream)
            }
        };
        let progress = watch::Sender::new(SendProgress::default());
        let outcome =
            replicate(&connect, &job, &SendOptions::default(), &progress, &CancellationToken::new()).await;
        let outcome =
            outcome.map_err(|error| anyhow!("a point could not be made: {}", error.with_causes()))?;
        self.head = Some(outcome.point);
        self.time_ms += INTERVAL_MS;
        self.store.maintain(self.id, self.time_ms).await.context("maintenance")?;
        Ok(())
    }
}
