//! A disk of a capture: reads that say why they fail once the capture has been given up.

use std::io;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use bytes::Bytes;
use mainstay_block::{BlockDevice, BlockError, Extent};
use mainstay_nbd::Client;

/// Why a capture was given up, once it was.
#[derive(Clone, Debug, Default)]
pub(crate) struct GivenUp(Arc<OnceLock<(io::ErrorKind, String)>>);

impl GivenUp {
    /// `kind` is `StorageFull` when it was for want of scratch space, else `TimedOut`.
    pub(crate) fn because(&self, kind: io::ErrorKind, reason: String) {
        // The first reason is the one that counts.
        let _ = self.0.set((kind, reason));
    }

    fn check(&self) -> Result<(), BlockError> {
        match self.0.get() {
            Some((kind, reason)) => Err(io::Error::new(*kind, reason.clone()).into()),
            None => Ok(()),
        }
    }
}

/// A read-only device over an NBD export.
#[derive(Debug)]
pub(crate) struct CaptureDevice {
    client: Client,
    given_up: GivenUp,
}

impl CaptureDevice {
    pub(crate) fn new(client: Client, given_up: GivenUp) -> Self {
        Self { client, given_up }
    }

    /// Data read after the end is not of the captured moment, and an error then has the capture's reason.
    fn judge<T>(&self, result: Result<T, BlockError>) -> Result<T, BlockError> {
        self.given_up.check()?;
        result
    }
}

#[async_trait]
impl BlockDevice for CaptureDevice {
    fn size(&self) -> u64 {
        self.client.size()
    }

    async fn read(&self, offset: u64, length: u64) -> Result<Bytes, BlockError> {
        self.judge(self.client.read(offset, length).await)
    }

    async fn write(&self, _offset: u64, _data: Bytes) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }

    async fn write_zeroes(&self, _offset: u64, _length: u64) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }

    async fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>, BlockError> {
        self.judge(self.client.extents(offset, length).await)
    }
}
