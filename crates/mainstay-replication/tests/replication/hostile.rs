//! Bytes that no client of ours would send.

use std::sync::Arc;
use std::time::Duration;

use mainstay_replication::{RefusalKind, serve_connection};
use mainstay_store::Store;
use object_store::memory::InMemory;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::bench::store_options;

/// Whether the server ended well, and what it said.
fn serve(bytes: &[u8]) -> (bool, Vec<u8>) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let store = Store::open(Arc::new(InMemory::new()), store_options());
        let (mut client, server) = tokio::io::duplex(1 << 20);
        let write = async {
            client.write_all(bytes).await.unwrap();
            client.shutdown().await.unwrap();
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            answer
        };
        let (served, answer) = tokio::join!(
            serve_connection(Box::new(server), &store, &|_| Box::pin(std::future::ready(Ok(())))),
            write
        );
        (served.is_ok(), answer)
    })
}

/// A message header with these fields.
fn message(kind: u8, tag: u64, length: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"MSDP".to_vec();
    bytes.extend_from_slice(&[kind, 0, 0, 0]);
    bytes.extend_from_slice(&tag.to_le_bytes());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// A hello for a new replica with one disk of 1 MiB.
fn hello() -> Vec<u8> {
    let id = |value: u8| [[16].as_slice(), &[value; 16]].concat();
    let payload =
        [[1, 1].as_slice(), &id(1), &[0], &id(2), &[1, 0, 1, 0], &[0x80, 0x80, 0x40], &[1, b'x', 0]].concat();
    message(1, 0, payload.len() as u32, &payload)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_end_the_connection(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(!serve(&bytes).0);
    }

    #[test]
    fn random_messages_end_the_connection(
        messages in proptest::collection::vec(
            (0u8..14, any::<u64>(), proptest::collection::vec(any::<u8>(), 0..200)), 1..6),
    ) {
        let mut bytes = hello();
        for (kind, tag, payload) in &messages {
            bytes.extend(message(*kind, *tag % 3, payload.len() as u32, payload));
        }
        prop_assert!(!serve(&bytes).0);
    }

    #[test]
    fn damaged_hellos_never_panic(at in 0usize..80, value in any::<u8>()) {
        let mut bytes = hello();
        let at = at % bytes.len();
        bytes[at] = value;
        serve(&bytes);
    }
}

#[test]
fn lengths_are_limited_before_anything_is_allocated() {
    assert!(!serve(&message(1, 0, u32::MAX, &[])).0);
    assert!(!serve(&message(5, 0, 400_000, &[])).0);
}

/// Whether the server ends a connection on which these bytes come one at a time, with pauses, again and again. The clock jumps
/// over pauses: what is tried is that there is an end, and that it is not put off.
fn is_ended(bytes: &[u8], pause: Duration, at_once: usize) -> Duration {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let store = Store::open(Arc::new(InMemory::new()), store_options());
        let (mut client, server) = tokio::io::duplex(1 << 20);
        let began = tokio::time::Instant::now();
        let drip = async {
            for part in bytes.chunks(at_once).cycle() {
                if client.write_all(part).await.is_err() {
                    break;
                }
                tokio::time::sleep(pause).await;
            }
        };
        let allow = |_| -> futures::future::BoxFuture<'_, Result<(), RefusalKind>> {
            Box::pin(std::future::ready(Ok(())))
        };
        tokio::select! {
            served = serve_connection(Box::new(server), &store, &allow) => assert!(served.is_err()),
            () = drip => {}
        }
        began.elapsed()
    })
}

#[test]
fn whoever_is_slow_without_end_is_hung_up_on() {
    let bound = Duration::from_secs(60);
    // Nothing, a hello byte by byte, and pings, each of which is whole and in time.
    assert!(is_ended(&hello(), Duration::from_secs(3600), 1) < bound);
    assert!(is_ended(&hello(), Duration::from_secs(1), 1) < bound);
    assert!(is_ended(&message(4, 0, 0, &[]), Duration::from_secs(1), 20) < bound);
    // After a good hello: a message that never ends.
    let begun = [hello(), message(5, 1, 250_000, &[])].concat();
    assert!(is_ended(&[begun.as_slice(), &[0; 4096]].concat(), Duration::from_secs(1), begun.len()) < bound);
}

/// It says that it lives, and takes nothing of what it is sent.
#[test]
fn whoever_does_not_read_is_hung_up_on_in_the_end() {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let store = Store::open(Arc::new(InMemory::new()), store_options());
        let (client, server) = tokio::io::duplex(64);
        // What it is sent stays where it is.
        let (_unread, mut write) = tokio::io::split(client);
        let began = tokio::time::Instant::now();
        let talk = async {
            write.write_all(&hello()).await.unwrap();
            while write.write_all(&message(4, 0, 0, &[])).await.is_ok() {
                tokio::time::sleep(Duration::from_secs(5)).await;
            }
        };
        let allow = |_| -> futures::future::BoxFuture<'_, Result<(), RefusalKind>> {
            Box::pin(std::future::ready(Ok(())))
        };
        let (served, ()) = tokio::join!(serve_connection(Box::new(server), &store, &allow), talk);
        assert!(served.is_err());
        let took = began.elapsed();
        assert!((Duration::from_secs(60)..Duration::from_secs(1200)).contains(&took), "{took:?}");
    });
}

/// The other tests stand on this hello being a good one.
#[test]
fn the_sound_hello_is_welcome() {
    let (_, answer) = serve(&hello());
    assert_eq!(&answer[..5], b"MSDP\x02");
}

#[test]
fn who_speaks_newer_versions_alone_is_told_which_are_spoken_here() {
    let of_versions = |from: u8, to: u8| {
        let mut bytes = hello();
        // After the header of 20 bytes.
        bytes[20..22].copy_from_slice(&[from, to]);
        serve(&bytes).1
    };
    assert_eq!(&of_versions(1, 3)[..5], b"MSDP\x02", "one that speaks both is welcome");
    for (from, to) in [(2, 3), (0, 0)] {
        let answer = of_versions(from, to);
        assert_ne!(&answer[..5], b"MSDP\x02");
        let said = String::from_utf8_lossy(&answer);
        assert!(said.contains("this server speaks version 1"), "{said}");
    }
}
