//! The client against our own server.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use mainstay_block::{BlockDevice, BlockError, ExtentKind, MemoryDevice};
use mainstay_nbd::{
    BASE_ALLOCATION, Client, ClientOptions, Endpoint, Exports, NbdError, Server, list_exports,
};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

struct Rig {
    _directory: tempfile::TempDir,
    server: Server,
    exports: Exports,
    endpoint: Endpoint,
    disk: Arc<MemoryDevice>,
}

fn rig(size: u64) -> Rig {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nbd.sock");
    let exports = Exports::new();
    let disk = Arc::new(MemoryDevice::new(size));
    exports.insert("disk", disk.clone(), false);
    exports.insert("fixed", disk.clone(), true);
    let server = Server::bind_unix(&path, exports.clone()).unwrap();
    Rig { _directory: directory, server, exports, endpoint: Endpoint::Unix(path), disk }
}

#[tokio::test]
async fn requests_run_side_by_side_and_arrive_whole() {
    let rig = rig(64 * 1024 * 1024);
    let client = Client::connect(&rig.endpoint, &ClientOptions::new("disk")).await.unwrap();
    let writes = (0..500_u64).map(|index| client.write(index * 4096, Bytes::from(vec![index as u8; 4096])));
    for result in join_all(writes).await {
        result.unwrap();
    }
    client.flush().await.unwrap();
    let reads = (0..500_u64).map(|index| client.read(index * 4096, 4096));
    for (index, data) in join_all(reads).await.into_iter().enumerate() {
        assert_eq!(data.unwrap(), vec![index as u8; 4096]);
    }
    // Larger than any one request may be.
    let whole = client.read(0, client.size()).await.unwrap();
    assert!(whole == rig.disk.snapshot());
    client.write(3, whole.slice(0..50_000_000)).await.unwrap();
    assert_eq!(rig.disk.snapshot()[3..50_000_003], whole[..50_000_000]);
    client.write_zeroes(5, 40_000_000).await.unwrap();
    client.trim(0, 4096).await.unwrap();
    assert!(rig.disk.snapshot()[5..40_000_005].iter().all(|byte| *byte == 0));
}

#[tokio::test]
async fn refusals_have_reasons() {
    let rig = rig(8192);
    let missing = Client::connect(&rig.endpoint, &ClientOptions::new("none")).await.unwrap_err();
    assert!(matches!(missing, NbdError::Refused { .. }), "{missing}");
    let fixed = Client::connect(&rig.endpoint, &ClientOptions::new("fixed")).await.unwrap();
    assert!(fixed.is_read_only());
    assert!(matches!(fixed.write(0, Bytes::from_static(b"x")).await, Err(BlockError::ReadOnly)));
    assert!(matches!(fixed.read(8000, 400).await, Err(BlockError::OutOfRange { .. })));
    let none = fixed.block_status("qemu:dirty-bitmap:none", 0, 4096).await;
    assert!(matches!(none, Err(NbdError::NoContext(_))));
    let extents = fixed.extents(0, 8192).await.unwrap();
    assert_eq!((extents.len(), extents[0].kind), (1, ExtentKind::Data));
    assert_eq!(fixed.block_status(BASE_ALLOCATION, 10, 100).await.unwrap()[0].length, 100);
    let names = list_exports(&rig.endpoint, Duration::from_secs(5)).await.unwrap();
    assert_eq!(names, ["disk", "fixed"]);
}

#[tokio::test]
async fn removing_an_export_ends_its_connections_only() {
    let rig = rig(8192);
    let first = Client::connect(&rig.endpoint, &ClientOptions::new("disk")).await.unwrap();
    let second = Client::connect(&rig.endpoint, &ClientOptions::new("fixed")).await.unwrap();
    assert!(rig.exports.remove("disk"));
    assert!(!rig.exports.remove("disk"));
    // The connection ends a moment after the removal; until then reads are still answered.
    let closed = tokio::time::timeout(Duration::from_secs(10), async {
        loop {
            if let Err(error) = first.read(0, 1).await {
                return error;
            }
            tokio::task::yield_now().await;
        }
    });
    assert!(matches!(closed.await.unwrap(), BlockError::Io(_)));
    second.read(0, 8192).await.unwrap();
    rig.server.shutdown().await;
    assert!(second.read(0, 8192).await.is_err());
}

#[tokio::test]
async fn a_server_that_disappears_fails_what_waits() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("silent.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    let mut options = ClientOptions::new("x");
    options.connect_timeout = Duration::from_millis(200);
    let silent = Client::connect(&Endpoint::Unix(path), &options).await.unwrap_err();
    assert!(matches!(silent, NbdError::Timeout(_)), "{silent}");
    let nobody = Client::connect(&Endpoint::Unix(directory.path().join("none")), &options).await.unwrap_err();
    assert!(matches!(nobody, NbdError::Connect { .. }));
}

/// A conversation that reaches the transmission phase: greeting, structured replies, contexts, GO, requests.
fn good_client_bytes() -> Vec<u8> {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    let mut option = |number: u32, payload: &[u8]| {
        bytes.extend_from_slice(b"IHAVEOPT");
        bytes.extend_from_slice(&number.to_be_bytes());
        bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        bytes.extend_from_slice(payload);
    };
    option(8, &[]);
    option(10, b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation");
    option(7, b"\0\0\0\x04disk\0\0");
    for (command, offset, length) in
        [(0_u16, 0_u64, 512_u32), (7, 0, 8192), (6, 0, 4096), (1, 10, 4), (3, 0, 0)]
    {
        bytes.extend_from_slice(&0x2560_9513_u32.to_be_bytes());
        bytes.extend_from_slice(&0_u16.to_be_bytes());
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&7_u64.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        if command == 1 {
            bytes.extend_from_slice(b"abcd");
        }
    }
    bytes
}

/// What a server says to our client up to and into the transmission phase.
fn good_server_bytes() -> Vec<u8> {
    let mut bytes = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    let mut reply = |option: u32, kind: u32, payload: &[u8]| {
        bytes.extend_from_slice(&0x0003_e889_0455_65a9_u64.to_be_bytes());
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        bytes.extend_from_slice(payload);
    };
    reply(8, 1, &[]);
    reply(10, 4, b"\0\0\0\x01base:allocation");
    reply(10, 1, &[]);
    reply(7, 3, b"\0\0\0\0\0\0\0\0\x20\0\x01\x6d");
    reply(7, 1, &[]);
    for (kind, payload) in
        [(1_u16, &b"\0\0\0\0\0\0\0\0datadatadata"[..]), (5, b"\0\0\0\x01\0\0\x20\0\0\0\0\x03"), (0, b"")]
    {
        bytes.extend_from_slice(&0x668e_33ef_u32.to_be_bytes());
        bytes.extend_from_slice(&1_u16.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&u64::from(kind % 4 + 1).to_be_bytes());
        bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        bytes.extend_from_slice(payload);
    }
    bytes
}

fn mutated(bytes: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let length = bytes.len();
    let edits = proptest::collection::vec((0..length, any::<u8>()), 0..4);
    (edits, 0..=length, proptest::collection::vec(any::<u8>(), 0..64)).prop_map(move |(edits, cut, tail)| {
        let mut bytes = bytes.clone();
        for (at, byte) in edits {
            bytes[at] = byte;
        }
        // Half of the time the conversation goes on as it should after the edits.
        if cut % 2 == 0 {
            bytes.truncate(cut);
            bytes.extend_from_slice(&tail);
        }
        bytes
    })
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn the_server_survives_any_client(bytes in mutated(good_client_bytes())) {
        runtime().block_on(async {
            let rig = rig(8192);
            let Endpoint::Unix(path) = &rig.endpoint else { unreachable!() };
            let mut stream = UnixStream::connect(path).await.unwrap();
            // The server may hang up in the middle.
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
            let mut answer = Vec::new();
            let _ = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await.unwrap();
            // It still serves others.
            let client = Client::connect(&rig.endpoint, &ClientOptions::new("disk")).await.unwrap();
            client.read(0, 8192).await.unwrap();
        });
    }

    #[test]
    fn the_client_survives_any_server(bytes in mutated(good_server_bytes())) {
        runtime().block_on(async {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("s");
            let listener = UnixListener::bind(&path).unwrap();
            tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.write_all(&bytes).await;
                let _ = stream.shutdown().await;
                let mut rest = Vec::new();
                let _ = stream.read_to_end(&mut rest).await;
            });
            let work = async {
                let client = Client::connect(&Endpoint::Unix(path), &ClientOptions::new("disk")).await?;
                let length = client.size().min(12);
                let _ = client.read(0, length).await;
                let _ = client.block_status(BASE_ALLOCATION, 0, client.size()).await;
                client.flush().await?;
                Ok::<_, Box<dyn std::error::Error>>(())
            };
            // Any answer will do, as long as there is one.
            let _ = tokio::time::timeout(Duration::from_secs(5), work).await.unwrap();
        });
    }
}
