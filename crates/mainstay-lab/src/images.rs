//! Comparing images block by block: how many bytes really changed, whatever our own counters say.

use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow};
use mainstay_agent::{Identity, ServerLink};
use mainstay_block::{BLOCK_BYTES, BlockDevice as _, BlockHash, BlockHasher, HashKey};
use mainstay_replication::{Connect, Mount, MountOptions};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{Lab, RECOVERY};

/// Bytes read at once.
const PIECE_BYTES: u64 = 4 << 20;

/// Reads recovery points as the recovery site's agent does.
pub struct Images {
    link: Arc<dyn Connect>,
    replica: Uuid,
    stop: CancellationToken,
    key: HashKey,
}

impl Images {
    pub fn open(lab: &Lab, replica: Uuid) -> Result<Self> {
        let identity = Identity::load(&lab.dir().join(RECOVERY).join("agent"))?;
        let link = ServerLink::new(&identity, &identity.endpoint)?;
        Ok(Self {
            link: Arc::new(link),
            replica,
            stop: CancellationToken::new(),
            key: HashKey(rand::random()),
        })
    }

    async fn mount(&self, point: Uuid) -> Result<Mount> {
        Mount::open(self.link.clone(), self.replica, point, &MountOptions::default(), self.stop.child_token())
            .await
            .map_err(|error| anyhow!("recovery point {point} cannot be opened: {}", error.with_causes()))
    }

    /// What a point's disks hold now, block by block.
    pub async fn read(&self, point: Uuid) -> Result<Image> {
        let mount = self.mount(point).await?;
        let hasher = BlockHasher::new(self.key);
        let mut disks = Vec::new();
        for spec in mount.disks() {
            let disk = mount.disk(spec.index).context("a disk of the point")?;
            let mut hashes = Vec::new();
            let mut offset = 0;
            while offset < disk.size() {
                let length = PIECE_BYTES.min(disk.size() - offset);
                hashes.extend(hasher.hash_all(&disk.read(offset, length).await?));
                offset += length;
            }
            disks.push(hashes);
        }
        Ok(Image { disks })
    }
}

/// What the disks of a VM hold at a moment: a keyed hash for each 4 KiB block. Read whole, so that it can be compared also
/// when the point is long gone.
pub struct Image {
    disks: Vec<Vec<BlockHash>>,
}

impl Image {
    /// Bytes of the blocks that differ from an earlier image; without one: that are not zero.
    pub fn bytes_changed_since(&self, earlier: Option<&Self>) -> u64 {
        let mut blocks = 0;
        for (index, hashes) in self.disks.iter().enumerate() {
            let before = earlier.and_then(|earlier| earlier.disks.get(index));
            for (block, hash) in hashes.iter().enumerate() {
                let before = before.and_then(|before| before.get(block)).copied().unwrap_or(BlockHash::ZERO);
                blocks += u64::from(*hash != before);
            }
        }
        blocks * BLOCK_BYTES
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
