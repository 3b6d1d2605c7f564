//! A device that fails on purpose, for tests.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;

use crate::{BlockDevice, BlockError, Extent};

/// When a [`FaultyDevice`] fails: a budget of requests shared by all clones. When it is used up every
/// request fails until [`FaultPlan::heal`].
#[derive(Clone, Debug)]
pub struct FaultPlan {
    left: Arc<AtomicI64>,
}

impl FaultPlan {
    /// Fails from the request after `requests` on.
    pub fn after(requests: u32) -> Self {
        Self { left: Arc::new(AtomicI64::new(i64::from(requests))) }
    }

    /// Lets every later request pass.
    pub fn heal(&self) {
        self.left.store(i64::MAX, Ordering::SeqCst);
    }

    fn spend(&self) -> Result<(), BlockError> {
        if self.left.fetch_sub(1, Ordering::SeqCst) > 0 {
            return Ok(());
        }
        self.left.store(0, Ordering::SeqCst);
        Err(BlockError::Io(std::io::Error::other("injected fault")))
    }
}

/// Decorates a device with failures. A failed write leaves the device untouched or, on odd offsets of
/// the block number, half written: the trait allows both, so tests must see both.
pub struct FaultyDevice<D> {
    inner: D,
    plan: FaultPlan,
}

impl<D: BlockDevice> FaultyDevice<D> {
    /// Decorates `inner`.
    pub fn new(inner: D, plan: FaultPlan) -> Self {
        Self { inner, plan }
    }

    /// The decorated device.
    pub fn inner(&self) -> &D {
        &self.inner
    }
}

#[async_trait]
impl<D: BlockDevice> BlockDevice for FaultyDevice<D> {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    async fn read(&self, offset: u64, length: u64) -> Result<Bytes, BlockError> {
        self.plan.spend()?;
        self.inner.read(offset, length).await
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), BlockError> {
        if let Err(error) = self.plan.spend() {
            if (offset / crate::BLOCK_BYTES) % 2 == 1 {
                self.inner.write(offset, data.slice(..data.len() / 2)).await?;
            }
            return Err(error);
        }
        self.inner.write(offset, data).await
    }

    async fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        self.plan.spend()?;
        self.inner.write_zeroes(offset, length).await
    }

    async fn flush(&self) -> Result<(), BlockError> {
        self.plan.spend()?;
        self.inner.flush().await
    }

    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>, BlockError> {
        self.plan.spend()?;
        self.inner.extents(offset, length).await
    }
}
