//! The client and the server against other people's.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use mainstay_block::{BlockDevice, ExtentKind, MemoryDevice};
use mainstay_nbd::{Client, ClientOptions, Endpoint, Exports, Server};

const MIB: u64 = 1024 * 1024;

fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    output
}

fn installed(program: &str) -> bool {
    let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output().unwrap();
    found.status.success()
}

/// Whether somebody listens on a socket. Its file is there a moment earlier, and connecting to find out would take the
/// only place that some servers have.
fn is_listening(socket: &Path) -> bool {
    // The fourth field has the flags (proc(5)): 00010000 is a listening socket.
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    let path = text(socket);
    sockets.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields.get(3) == Some(&"00010000") && fields.get(7) == Some(&path.as_str())
    })
}

/// A foreign server that ends with the test.
struct Foreign(Child);

impl Foreign {
    async fn start(program: &str, arguments: &[&str], socket: &Path) -> Self {
        let child = Command::new(program).args(arguments).stdout(Stdio::null()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while !is_listening(socket) {
            assert!(Instant::now() < deadline, "{program} does not listen");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Self(child)
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn qemu_nbd_serves_our_client() {
    let directory = tempfile::tempdir().unwrap();
    let (image, socket) = (text(&directory.path().join("d.qcow2")), directory.path().join("s"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "64M"]);
    run("qemu-io", &["-c", "write -P 7 1M 1M", &image]);
    run("qemu-img", &["bitmap", "--add", "-g", "4096", &image, "ms-1"]);
    run("qemu-io", &["-c", "write -P 9 8M 4k", "-c", "write -P 9 9M 8k", &image]);
    let _server = Foreign::start(
        "qemu-nbd",
        &["-t", "-x", "vda", "-B", "ms-1", "-A", "-f", "qcow2", "-k", &text(&socket), &image],
        &socket,
    )
    .await;
    let context = "qemu:dirty-bitmap:ms-1";
    let options = ClientOptions::new("vda").with_context(context).with_context("qemu:allocation-depth");
    let client = Client::connect(&Endpoint::Unix(socket), &options).await.unwrap();
    assert_eq!(client.size(), 64 * MIB);
    let dirty: Vec<(u64, u64)> = client
        .block_status(context, 0, 64 * MIB)
        .await
        .unwrap()
        .iter()
        .filter(|extent| extent.flags & 1 != 0)
        .map(|extent| (extent.offset, extent.length))
        .collect();
    assert_eq!(dirty, [(8 * MIB, 4096), (9 * MIB, 8192)]);
    let depth = client.block_status("qemu:allocation-depth", 0, 64 * MIB).await.unwrap();
    assert_eq!(depth.iter().map(|extent| extent.length).sum::<u64>(), 64 * MIB);
    assert!(depth.iter().any(|extent| extent.flags == 1 && extent.offset == MIB));
    let extents = client.extents(0, 64 * MIB).await.unwrap();
    assert_eq!((extents[0].kind, extents[0].length), (ExtentKind::Zero, MIB));
    assert_eq!(client.read(MIB, 4 * MIB).await.unwrap()[..MIB as usize], vec![7; MIB as usize]);
    client.write(20 * MIB + 1, Bytes::from(vec![3; 5 * MIB as usize])).await.unwrap();
    client.write_zeroes(21 * MIB, MIB).await.unwrap();
    client.flush().await.unwrap();
    let back = client.read(20 * MIB, 6 * MIB).await.unwrap();
    assert_eq!((back[0], back[1], back[MIB as usize], back[2 * MIB as usize]), (0, 3, 0, 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_clients_read_and_write_our_server() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let disk = Arc::new(MemoryDevice::new(32 * MIB));
    for index in (0..32).step_by(3) {
        disk.write(index * MIB, Bytes::from(vec![index as u8 + 1; 70_000])).await.unwrap();
    }
    let exports = Exports::new();
    exports.insert("vda", disk.clone(), false);
    let _server = Server::bind_unix(&socket, exports).unwrap();
    let uri = format!("nbd+unix:///vda?socket={}", text(&socket));
    let copy = text(&directory.path().join("copy"));
    let off_thread = |program: &'static str, arguments: Vec<String>| async move {
        tokio::task::spawn_blocking(move || {
            run(program, &arguments.iter().map(String::as_str).collect::<Vec<_>>())
        })
        .await
        .unwrap()
    };
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    off_thread("qemu-img", words(&["convert", "-f", "raw", "-O", "raw", &uri, &copy])).await;
    assert!(std::fs::read(&copy).unwrap() == disk.snapshot());
    off_thread("qemu-img", words(&["compare", "-f", "raw", "-F", "raw", &uri, &copy])).await;
    off_thread("qemu-img", words(&["map", "-f", "raw", "--output=json", &uri])).await;
    let script = [
        "-f",
        "raw",
        "-c",
        "write -P 5 5M 3M",
        "-c",
        "write -z 6M 1M",
        "-c",
        "discard 1M 64k",
        "-c",
        "flush",
    ];
    off_thread("qemu-io", words(&[&script[..], &[&uri]].concat())).await;
    let bytes = disk.snapshot();
    assert_eq!((bytes[5 * MIB as usize], bytes[6 * MIB as usize], bytes[7 * MIB as usize]), (5, 0, 5));
    if installed("nbdinfo") {
        let info = off_thread("nbdinfo", words(&["--json", &uri])).await;
        let info = String::from_utf8_lossy(&info.stdout).into_owned();
        assert!(info.contains("base:allocation") && info.contains("\"structured\": true"), "{info}");
        off_thread("nbdinfo", words(&["--map", &uri])).await;
    }
    if installed("nbdcopy") {
        off_thread("nbdcopy", words(&[&uri, &copy])).await;
        assert!(std::fs::read(&copy).unwrap() == disk.snapshot());
        std::fs::write(&copy, vec![0x5a; 32 * MIB as usize]).unwrap();
        off_thread("nbdcopy", words(&["--flush", &copy, &uri])).await;
        assert!(disk.snapshot().iter().all(|byte| *byte == 0x5a));
    }
}

#[tokio::test]
async fn nbdkit_serves_our_client() {
    if !installed("nbdkit") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let socket: PathBuf = directory.path().join("s");
    let arguments = ["-f", "-U", &text(&socket), "memory", "16M"];
    let _server = Foreign::start("nbdkit", &arguments, &socket).await;
    let client = Client::connect(&Endpoint::Unix(socket), &ClientOptions::new("")).await.unwrap();
    client.write(MIB + 5, Bytes::from_static(b"mainstay")).await.unwrap();
    client.flush().await.unwrap();
    assert_eq!(client.read(MIB + 5, 8).await.unwrap(), "mainstay");
    let extents = client.extents(0, 16 * MIB).await.unwrap();
    assert_eq!(extents.iter().map(|extent| extent.length).sum::<u64>(), 16 * MIB);
    assert!(extents.iter().any(|extent| extent.kind == ExtentKind::Zero));
}
