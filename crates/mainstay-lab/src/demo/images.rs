//! Comparing images block by block: how many bytes really changed, whatever our own counters say.

use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow};
use mainstay_agent::{Identity, ServerLink};
use mainstay_block::{BLOCK_BYTES, BlockDevice as _};
use mainstay_replication::{Connect, Mount, MountOptions};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{Lab, RECOVERY};

/// Bytes compared at once.
const PIECE_BYTES: u64 = 4 << 20;

/// Reads recovery points as the recovery site's agent does.
pub(super) struct Images {
    link: Arc<dyn Connect>,
    replica: Uuid,
    stop: CancellationToken,
}

impl Images {
    pub(super) fn open(lab: &Lab, replica: Uuid) -> Result<Self> {
        let identity = Identity::load(&lab.dir().join(RECOVERY).join("agent"))?;
        let link = ServerLink::new(&identity, &identity.endpoint)?;
        Ok(Self { link: Arc::new(link), replica, stop: CancellationToken::new() })
    }

    async fn mount(&self, point: Uuid) -> Result<Mount> {
        Mount::open(self.link.clone(), self.replica, point, &MountOptions::default(), self.stop.child_token())
            .await
            .map_err(|error| anyhow!("recovery point {point} cannot be opened: {}", error.with_causes()))
    }

    /// Bytes of the 4 KiB blocks that differ between two points; without the first: that are not zero.
    pub(super) async fn difference(&self, from: Option<Uuid>, to: Uuid) -> Result<u64> {
        let to = self.mount(to).await?;
        let from = match from {
            Some(from) => Some(self.mount(from).await?),
            None => None,
        };
        let mut blocks = 0;
        for spec in to.disks() {
            let new = to.disk(spec.index).context("a disk of the point")?;
            let old = from.as_ref().and_then(|from| from.disk(spec.index));
            let mut offset = 0;
            while offset < new.size() {
                let length = PIECE_BYTES.min(new.size() - offset);
                let after = new.read(offset, length).await?;
                let known = old.as_ref().map_or(0, |old| old.size()).saturating_sub(offset).min(length);
                let mut before = match &old {
                    Some(old) if known > 0 => old.read(offset, known).await?.to_vec(),
                    _ => Vec::new(),
                };
                before.resize(after.len(), 0);
                let size = usize::try_from(BLOCK_BYTES)?;
                blocks += after
                    .chunks(size)
                    .zip(before.chunks(size))
                    .filter(|(after, before)| after != before)
                    .count() as u64;
                offset += length;
            }
        }
        Ok(blocks * BLOCK_BYTES)
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
