//! A server, breakable connections to it, and disks with hash tables.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use async_trait::async_trait;
use bytes::Bytes;
use mainstay_block::hash_table::{Fill, HashTable};
use mainstay_block::{BlockDevice as _, HashKey, MemoryDevice};
use mainstay_replication::{
    BoxStream, Connect, Mount, MountOptions, RefusalKind, ReplicationError, SendDisk, SendJob, SendOptions,
    SendOutcome, SendProgress, replicate, serve_connection,
};
use mainstay_store::{Consistency, PointMeta, Store, StoreOptions};
use object_store::memory::InMemory;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub(crate) const REPLICA: Uuid = Uuid::from_u128(0xabc);
/// Small, so that little is in flight when a connection breaks.
pub(crate) const PIPE_BYTES: usize = 2048;

/// A stream that breaks after so many bytes in both directions together.
pub(crate) struct Breaking {
    inner: DuplexStream,
    left: usize,
}

impl Breaking {
    fn broken() -> io::Error {
        io::Error::new(io::ErrorKind::ConnectionReset, "injected")
    }
}

impl AsyncRead for Breaking {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.left == 0 {
            return Poll::Ready(Err(Self::broken()));
        }
        let mut part = buffer.take(self.left);
        let poll = Pin::new(&mut self.inner).poll_read(context, &mut part);
        let read = part.filled().len();
        // `take` shares the memory; what was read into it counts as initialised.
        let filled = part.filled().to_vec();
        buffer.put_slice(&filled);
        self.left -= read;
        poll
    }
}

impl AsyncWrite for Breaking {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.left == 0 {
            return Poll::Ready(Err(Self::broken()));
        }
        let part = &data[..data.len().min(self.left)];
        let poll = Pin::new(&mut self.inner).poll_write(context, part);
        if let Poll::Ready(Ok(written)) = poll {
            self.left -= written;
        }
        poll
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

/// The server and the way to it.
pub(crate) struct Bench {
    pub(crate) storage: Arc<InMemory>,
    pub(crate) store: Mutex<Store>,
    /// Bytes after which the next connections break; none left: they hold.
    pub(crate) budgets: Mutex<VecDeque<usize>>,
    /// The server restarts when this many more connections were made.
    pub(crate) restart_in: Mutex<Option<usize>>,
    pub(crate) allowed: Mutex<bool>,
}

pub(crate) fn store_options() -> StoreOptions {
    StoreOptions { segment_bytes: 40_000, ..StoreOptions::default() }
}

impl Bench {
    pub(crate) fn new() -> Arc<Self> {
        let storage = Arc::new(InMemory::new());
        Arc::new(Self {
            store: Mutex::new(Store::open(storage.clone(), store_options())),
            storage,
            budgets: Mutex::default(),
            restart_in: Mutex::default(),
            allowed: Mutex::new(true),
        })
    }

    pub(crate) fn store(&self) -> Store {
        self.store.lock().unwrap().clone()
    }

    pub(crate) fn restart(&self) {
        *self.store.lock().unwrap() = Store::open(self.storage.clone(), store_options());
    }
}

pub(crate) struct Dial(pub(crate) Arc<Bench>);

#[async_trait]
impl Connect for Dial {
    async fn connect(&self) -> io::Result<BoxStream> {
        let restart = {
            let mut restart = self.0.restart_in.lock().unwrap();
            let now = *restart == Some(0);
            *restart = restart.and_then(|left| left.checked_sub(1));
            now
        };
        if restart {
            self.0.restart();
        }
        let (client, server) = tokio::io::duplex(PIPE_BYTES);
        let store = self.0.store();
        let allowed = if *self.0.allowed.lock().unwrap() { Ok(()) } else { Err(RefusalKind::NotAuthorized) };
        tokio::spawn(async move {
            serve_connection(Box::new(server), &store, &move |_| {
                Box::pin(std::future::ready(allowed.clone()))
            })
            .await
        });
        let left = self.0.budgets.lock().unwrap().pop_front().unwrap_or(usize::MAX);
        Ok(Box::new(Breaking { inner: client, left }))
    }
}

/// The protected side: disks, tables, and what it remembers.
pub(crate) struct Source {
    pub(crate) _dir: tempfile::TempDir,
    pub(crate) disks: Vec<(Arc<MemoryDevice>, Arc<HashTable>)>,
    pub(crate) parent: Option<Uuid>,
    pub(crate) sessions: u128,
}

impl Source {
    pub(crate) fn new(sizes: &[u64]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = |(index, size): (usize, &u64)| {
            let path = dir.path().join(format!("{index}"));
            let table = HashTable::create(&path, *size, HashKey([index as u8; 32]), Fill::Zeros).unwrap();
            (Arc::new(MemoryDevice::new(*size)), Arc::new(table))
        };
        let disks = sizes.iter().enumerate().map(disk).collect();
        Self { _dir: dir, disks, parent: None, sessions: 0 }
    }

    pub(crate) async fn write(&self, disk: usize, offset: u64, data: Vec<u8>) {
        let device = &self.disks[disk].0;
        let end = device.size().min(offset + data.len() as u64);
        if offset < end {
            device.write(offset, Bytes::from(data).slice(..(end - offset) as usize)).await.unwrap();
        }
    }

    /// A job that looks at everything.
    pub(crate) fn job(&mut self) -> SendJob {
        self.sessions += 1;
        let disk = |(index, (device, table)): (usize, &(Arc<MemoryDevice>, Arc<HashTable>))| SendDisk {
            index: index as u16,
            key: format!("vd{index}"),
            device: device.clone(),
            ranges: vec![0..100, 0..device.size() + 5],
            resend: Vec::new(),
            table: table.clone(),
        };
        SendJob {
            replica: REPLICA,
            session: Uuid::from_u128(self.sessions),
            generation: 1,
            parent: self.parent,
            fork: false,
            disks: self.disks.iter().enumerate().map(disk).collect(),
            meta: PointMeta {
                time_ms: 1000 + self.sessions as u64,
                consistency: Consistency::App,
                definition: Some(Bytes::from_static(b"<domain/>")),
            },
            before_partial: None,
        }
    }

    pub(crate) async fn send(
        &mut self,
        bench: &Arc<Bench>,
        options: &SendOptions,
    ) -> Result<(SendOutcome, SendProgress), ReplicationError> {
        let job = self.job();
        let progress = watch::Sender::default();
        let cancel = CancellationToken::new();
        let outcome = replicate(&Dial(bench.clone()), &job, options, &progress, &cancel).await?;
        self.parent = Some(outcome.point);
        let progress = progress.borrow().clone();
        Ok((outcome, progress))
    }

    /// Sends a job of this source.
    pub(crate) async fn send_job(
        &mut self,
        bench: &Arc<Bench>,
        job: &SendJob,
        options: &SendOptions,
    ) -> Result<SendOutcome, ReplicationError> {
        let (progress, cancel) = (watch::Sender::default(), CancellationToken::new());
        let outcome = replicate(&Dial(bench.clone()), job, options, &progress, &cancel).await?;
        self.parent = Some(outcome.point);
        Ok(outcome)
    }

    pub(crate) fn contents(&self) -> Vec<Vec<u8>> {
        self.disks.iter().map(|(device, _)| device.snapshot()).collect()
    }
}

/// Reads all disks of a point through a mount.
pub(crate) async fn read_point(bench: &Arc<Bench>, point: Uuid) -> Vec<Vec<u8>> {
    let connect = Arc::new(Dial(bench.clone()));
    let cancel = CancellationToken::new();
    let mount = Mount::open(connect, REPLICA, point, &MountOptions::default(), cancel).await.unwrap();
    let mut disks = Vec::new();
    for disk in mount.disks() {
        let device = mount.disk(disk.index).unwrap();
        disks.push(device.read(0, disk.bytes).await.unwrap().to_vec());
    }
    disks
}

/// Bytes that do not compress.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..length.div_ceil(8)).flat_map(|_| next().to_le_bytes()).take(length).collect()
}
