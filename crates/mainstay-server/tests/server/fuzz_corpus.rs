//! What fuzzing has kept (`fuzz/corpus`), without a fuzzer: whatever once was a problem, or leads far, is tried with every change.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use mainstay_block::{
    BlockDevice as _, HashKey, MemoryDevice,
    frame::{Effort, FrameBuilder},
};
use mainstay_nbd::{BASE_ALLOCATION, Client, ClientOptions, Endpoint, Exports, Server};
use mainstay_replication::{BoxStream, Mount, MountOptions, serve_connection, session_outcome};
use mainstay_store::{
    Consistency, DiskSpec, FrameUse, PointMeta, SessionSpec, Store, StoreOptions, VaultKey, local_storage,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

type Target = fn(&[u8]);

const TARGETS: &[(&str, Target)] = &[
    ("wire", mainstay_replication::fuzzing::wire),
    ("nbd", mainstay_nbd::fuzzing::nbd),
    ("segment", mainstay_store::fuzzing::segment),
    ("layer", mainstay_store::fuzzing::layer),
    ("manifest", mainstay_store::fuzzing::manifest),
    ("catalogue", mainstay_control::fuzzing::catalogue),
    ("sealed", mainstay_store::fuzzing::sealed),
    ("frame", mainstay_block::fuzzing::frame),
    ("arm_bodies", mainstay_server::fuzzing::arm_body),
];

fn fuzz_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz")
}

#[test]
fn every_target_survives_what_was_kept() {
    for (name, target) in TARGETS {
        assert!(fuzz_dir().join(format!("fuzz_targets/{name}.rs")).exists(), "{name} is fuzzed");
        let mut count = 0;
        for entry in std::fs::read_dir(fuzz_dir().join("corpus").join(name)).unwrap() {
            let bytes = std::fs::read(entry.unwrap().path()).unwrap();
            target(&bytes);
            // Half of it, as from a connection that broke.
            target(&bytes[..bytes.len() / 2]);
            count += 1;
        }
        assert!(count > 0, "{name} has a corpus");
    }
    let known = std::fs::read_dir(fuzz_dir().join("fuzz_targets")).unwrap().count();
    assert_eq!(known, TARGETS.len(), "each target is here");
}

fn seed(target: &str, name: &str, bytes: &[u8]) {
    let directory = fuzz_dir().join("corpus").join(target);
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join(name), bytes).unwrap();
}

fn frames() -> Vec<(&'static str, Bytes)> {
    let text: Vec<u8> = (0..8192_u32).map(|at| (at % 251) as u8).collect();
    let frame = |effort| {
        let mut frame = FrameBuilder::new();
        frame.push_data(0, 3, &text).unwrap();
        frame.push_zero(0, 9, 1000).unwrap();
        frame.push_data(1, 0, &[7; 100]).unwrap();
        frame.push_zero(2, 1 << 40, 1).unwrap();
        frame.finish(effort).unwrap()
    };
    let mut zeros = FrameBuilder::new();
    zeros.push_zero(0, 0, 256).unwrap();
    let mut raw = FrameBuilder::new();
    raw.push_data(0, 0, &text[..4096]).unwrap();
    vec![
        ("zstd", frame(Effort::Small)),
        ("lz4", frame(Effort::Fast)),
        ("raw", raw.finish(Effort::None).unwrap()),
        ("zeros", zeros.finish(Effort::Small).unwrap()),
    ]
}

/// What a client and a server have said.
type Recorded = (Vec<u8>, Vec<u8>);

/// A connection between two streams, and what went over it in either direction.
async fn between(
    client: impl AsyncRead + AsyncWrite + Unpin,
    server: impl AsyncRead + AsyncWrite + Unpin,
) -> Recorded {
    async fn copy(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> Vec<u8> {
        let (mut all, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            all.extend_from_slice(&buffer[..length]);
            if to.write_all(&buffer[..length]).await.is_err() {
                break;
            }
        }
        // The other end may be gone.
        let _ = to.shutdown().await;
        all
    }
    let (from_client, to_client) = tokio::io::split(client);
    let (from_server, to_server) = tokio::io::split(server);
    tokio::join!(copy(from_client, to_server), copy(from_server, to_client))
}

/// Writes the first inputs anew, by what really encodes them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "writes into the repository: run by whoever changes a format"]
async fn seeds_are_written() {
    for (name, frame) in frames() {
        seed("frame", name, &frame);
    }
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(local_storage(dir.path()).unwrap(), StoreOptions::default());
    let replica = Uuid::from_u128(1);
    let disks = vec![DiskSpec { index: 0, bytes: 1 << 20, key: "vda".to_owned() }];
    let mut parent = None;
    for round in 0..2_u128 {
        let spec = SessionSpec {
            session: Uuid::from_u128(10 + round),
            replica,
            generation: 1,
            parent,
            disks: disks.clone(),
            fork: false,
        };
        let session = store.begin(spec).await.unwrap();
        let mut frame = FrameBuilder::new();
        frame.push_data(0, 1 + round as u64, &[round as u8 + 1; 8192]).unwrap();
        frame.push_zero(0, 40, 8).unwrap();
        session.append(1, frame.finish(Effort::Small).unwrap(), FrameUse::Changed).await.unwrap();
        let definition = Some(Bytes::from_static(b"<domain/>"));
        let meta = PointMeta { time_ms: 1, consistency: Consistency::Crash, definition };
        parent = Some(session.commit(meta).await.unwrap());
    }
    let document = br#"{"id":"6e7a3f0c-3c0e-4c53-9d8f-0d3c5d6f1a2b"}"#;
    store.put_document("fuzz", document).await.unwrap();
    seed("catalogue", "server", document);
    seed("catalogue", "resources", br#"{"writes":3,"resources":[],"plan_jobs":[]}"#);
    for (folder, target) in [("segment", "segment"), ("map", "layer"), ("manifest", "manifest")] {
        let directory = dir.path().join(format!("v1/{replica}/{folder}"));
        for (number, entry) in std::fs::read_dir(directory).unwrap().enumerate() {
            seed(target, &format!("{folder}-{number}"), &std::fs::read(entry.unwrap().path()).unwrap());
        }
    }
    let locked = tempfile::tempdir().unwrap();
    let sealing = Store::open(local_storage(locked.path()).unwrap(), StoreOptions::default());
    sealing.unlock(Some(&VaultKey::generate().unwrap()), &[]).await.unwrap();
    sealing.put_document("fuzz", document).await.unwrap();
    seed("sealed", "document", &std::fs::read(locked.path().join("v1/catalogue/fuzz")).unwrap());
    seed("catalogue", "envelope", &std::fs::read(dir.path().join("v1/catalogue/fuzz")).unwrap());

    wire(&store, replica, parent.unwrap()).await;
    nbd().await;

    for (number, body) in [
        r#"{"properties":{"customDetails":{"instanceType":"HyperVSite"}}}"#,
        r#"{"properties":{"machineName":"kvm-1","authenticationIdentityInput":{},"resourceAccessIdentityInput":{}}}"#,
        r#"{"properties":{"providerSpecificInput":{"instanceType":"HyperVReplicaAzure","replicationInterval":300}}}"#,
        r#"{"properties":{"policyId":"policy","targetProtectionContainerId":"Microsoft Azure"}}"#,
    ]
    .into_iter()
    .enumerate()
    {
        seed("arm_bodies", &format!("body-{number}"), &[&[number as u8], body.as_bytes()].concat());
    }
    seed(
        "arm_bodies",
        "filter",
        b"(JobStatus eq 'InProgress' or JobName eq 'it''s') and StartTime gt '2026-01-31T23:59:59Z'",
    );
    seed("arm_bodies", "query", b"api-version=2024-04-01&$filter=a%20eq+'b'&$skipToken=7");
}

async fn wire(store: &Store, replica: Uuid, point: Uuid) {
    let said: Arc<Mutex<Vec<Recorded>>> = Arc::default();
    let recorders = tokio_util::task::TaskTracker::new();
    let connect = {
        let (store, said, recorders) = (store.clone(), said.clone(), recorders.clone());
        move || {
            let (store, said) = (store.clone(), said.clone());
            let (ours, client) = tokio::io::duplex(1 << 16);
            let (server, theirs) = tokio::io::duplex(1 << 16);
            recorders.spawn(async move {
                let serve =
                    serve_connection(Box::new(server), &store, &|_| Box::pin(std::future::ready(Ok(()))));
                // How it ended is in what was said.
                let (_, recorded) = tokio::join!(serve, between(client, theirs));
                said.lock().unwrap().push(recorded);
            });
            async { Ok::<BoxStream, io::Error>(Box::new(ours)) }
        }
    };
    let cancel = CancellationToken::new();
    let committed = session_outcome(&connect, replica, Uuid::from_u128(10), &cancel).await.unwrap();
    assert!(committed.is_some());
    let options = MountOptions::default();
    let mount = Mount::open(Arc::new(connect), replica, point, &options, cancel.clone()).await.unwrap();
    let disk = mount.disk(0).unwrap();
    disk.read(0, 12_288).await.unwrap();
    disk.extents(0, 1 << 20).await.unwrap();
    disk.hashes(HashKey([7; 32]), 0, 16).await.unwrap();
    drop((disk, mount));
    cancel.cancel();
    recorders.close();
    recorders.wait().await;
    for (number, (client, server)) in said.lock().unwrap().iter().enumerate() {
        seed("wire", &format!("client-{number}"), client);
        seed("wire", &format!("server-{number}"), server);
    }
    let message = |kind: u8, payload: &[u8]| {
        let mut bytes = b"MSDP".to_vec();
        bytes.extend_from_slice(&[kind, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        bytes.extend_from_slice(payload);
        bytes
    };
    let id = |value: u8| [[16].as_slice(), &[value; 16]].concat();
    // A session with one disk of 1 MiB and the key `x`, a frame, a commit (1 frame, time 1, crash-consistent, no definition).
    let hello =
        [[1, 1].as_slice(), &id(1), &[0], &id(2), &[1, 0, 1, 0], &[0x80, 0x80, 0x40], &[1, b'x', 0]].concat();
    let frame = &frames()[3].1;
    let all = [message(1, &hello), message(5, frame), message(7, &[]), message(8, &[1, 1, 0, 0])].concat();
    seed("wire", "replicate", &all);
}

async fn nbd() {
    let dir = tempfile::tempdir().unwrap();
    let (behind, front) = (dir.path().join("behind"), dir.path().join("front"));
    let exports = Exports::new();
    exports.insert("disk", Arc::new(MemoryDevice::new(1 << 20)), false);
    let server = Server::bind_unix(&behind, exports).unwrap();
    let listener = UnixListener::bind(&front).unwrap();
    let recorded = tokio::spawn(async move {
        let (client, _) = listener.accept().await.unwrap();
        between(client, UnixStream::connect(behind).await.unwrap()).await
    });
    let options = ClientOptions::new("disk").with_context(BASE_ALLOCATION);
    let client = Client::connect(&Endpoint::Unix(front), &options).await.unwrap();
    client.read(0, 8192).await.unwrap();
    client.block_status(BASE_ALLOCATION, 0, 8192).await.unwrap();
    client.write(4096, Bytes::from_static(&[7; 512])).await.unwrap();
    client.flush().await.unwrap();
    client.trim(0, 4096).await.unwrap();
    drop(client);
    let (said, answered) = recorded.await.unwrap();
    seed("nbd", "client", &[&[0], said.as_slice()].concat());
    seed("nbd", "server", &[&[1], answered.as_slice()].concat());
    server.shutdown().await;
}
