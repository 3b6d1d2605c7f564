//! Distance costs round trips, which must not depend on the amount of data. Time here is virtual: it passes only
//! while everybody waits, so elapsed time counts round trips.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use mainstay_block::BlockDevice as _;
use mainstay_replication::{
    BoxStream, Connect, Mount, MountOptions, SendOptions, replicate, serve_connection,
};
use mainstay_store::{Store, StoreOptions};
use object_store::memory::InMemory;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::bench::{REPLICA, Source, noise};

const ONE_WAY: Duration = Duration::from_millis(75);

struct Far(Store);

#[async_trait]
impl Connect for Far {
    async fn connect(&self) -> io::Result<BoxStream> {
        let (client, near) = tokio::io::duplex(1 << 20);
        let (far, server) = tokio::io::duplex(1 << 20);
        let (near_read, near_write) = tokio::io::split(near);
        let (far_read, far_write) = tokio::io::split(far);
        tokio::spawn(carry(near_read, far_write));
        tokio::spawn(carry(far_read, near_write));
        let store = self.0.clone();
        tokio::spawn(async move {
            serve_connection(Box::new(server), &store, &|_| Box::pin(std::future::ready(Ok(())))).await
        });
        Ok(Box::new(client))
    }
}

/// Delivers every byte `ONE_WAY` after it was written; any number may be on the way.
async fn carry<T>(mut from: ReadHalf<T>, mut to: WriteHalf<T>)
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + 'static,
{
    let (sink, mut source) = mpsc::channel::<(Instant, Vec<u8>)>(4096);
    tokio::spawn(async move {
        while let Some((at, bytes)) = source.recv().await {
            tokio::time::sleep_until(at).await;
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
    });
    let mut buffer = vec![0; 1 << 18];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if sink.send((Instant::now() + ONE_WAY, buffer[..count].to_vec())).await.is_err() {
            return;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn round_trips_do_not_depend_on_the_amount() {
    let mut trips = Vec::new();
    for megabytes in [1usize, 24] {
        let store = Store::open(Arc::new(InMemory::new()), StoreOptions::default());
        let mut source = Source::new(&[(megabytes as u64) << 20]);
        source.write(0, 0, noise(3, megabytes << 20)).await;
        let job = source.job();
        let (progress, cancel) = (watch::Sender::default(), CancellationToken::new());
        let started = Instant::now();
        let far = Far(store.clone());
        let outcome = replicate(&far, &job, &SendOptions::default(), &progress, &cancel).await.unwrap();
        let sent = started.elapsed();
        let started = Instant::now();
        let options = MountOptions::default();
        let mount =
            Mount::open(Arc::new(Far(store)), REPLICA, outcome.point, &options, cancel).await.unwrap();
        let disk = mount.disk(0).unwrap();
        let data = disk.read(0, 1 << 20).await.unwrap();
        assert!(data == source.contents()[0][..1 << 20]);
        let read = started.elapsed();
        trips.push((sent.as_millis() / 150, read.as_millis() / 150));
    }
    // Replicate: hello, then frames and commit together. Mount: hello, then all pieces together.
    assert!(trips.iter().all(|(sent, read)| *sent <= 3 && *read <= 3), "{trips:?}");
}
