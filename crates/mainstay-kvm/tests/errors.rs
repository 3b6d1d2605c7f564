//! The contract of captures when something fails: after an error no capture is open, and the guest never pays for good.

mod rig;

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use mainstay_lab::{DiskImage, LedgerVm, Mounted};
use mainstay_model::VmId;
use mainstay_provider::{ErrorKind, Hypervisor as _};
use rig::{PATIENCE, Rig, read_capture, request};

const MIB: u64 = 1 << 20;

fn busy_vm() -> LedgerVm {
    let mut vm = LedgerVm::new("web");
    vm.disks = vec![DiskImage::Qcow2, DiskImage::Raw];
    vm.options = "ledger.rate=100 ledger.churn_kib=512".to_owned();
    vm
}

/// Whether a capture is open, by the words of libvirt and by what lies in the driver's directory.
fn remains(rig: &Rig) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let job = Command::new("virsh").args(["-q", "-c", rig.site.uri(), "domjobinfo", "web"]).output()?;
    let job = String::from_utf8_lossy(&job.stdout).into_owned();
    if !job.contains("None") {
        found.push(format!("a job: {job}"));
    }
    for directory in ["captures", "run"] {
        for entry in std::fs::read_dir(rig.site.driver_directory().join(directory))? {
            found.push(entry?.path().display().to_string());
        }
    }
    Ok(found)
}

async fn wait_until_nothing_is_open(rig: &Rig) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = remains(rig)?;
        if found.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "a capture stays open: {found:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The disk's top node that has a bitmap.
async fn node_with(rig: &Rig, vm: VmId, bitmap: &str) -> Result<String> {
    let nodes =
        rig.host.libvirt().qmp(vm, "query-named-block-nodes", serde_json::json!({"flat": true})).await?;
    let has = |node: &&serde_json::Value| {
        let bitmaps = node["dirty-bitmaps"].as_array().map(Vec::as_slice).unwrap_or_default();
        node["ro"] == false && bitmaps.iter().any(|found| found["name"] == bitmap)
    };
    let node = nodes.as_array().context("a list")?.iter().find(has).context("no node has the bitmap")?;
    Ok(node["node-name"].as_str().context("a name")?.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_an_error_no_capture_is_open() -> Result<()> {
    let lab = tempfile::tempdir()?;
    let rig = Rig::start(lab.path(), "home").await?;
    let vm = busy_vm();
    rig.boot(&vm, 20).await?;
    let first = rig.host.begin_capture(vm.id, request(None)).await?;
    let tracker = first.tracker().clone();
    first.close().await?;
    assert_eq!(remains(&rig)?, [] as [String; 0]);

    // Refused before anything is done.
    let mut wanted = request(None);
    wanted.disks.push("vdz".to_owned());
    let error = rig.host.begin_capture(vm.id, wanted).await.err().context("a disk that is not there")?;
    assert_eq!(error.kind, ErrorKind::NotFound, "{error}");
    assert_eq!(remains(&rig)?, [] as [String; 0]);

    // Fails after the view has begun: the name that the copy of the old tracker gets is taken. It is copied because it lies in two
    // images.
    let snapshot = ["snapshot-create-as", "web", "theirs", "--disk-only", "--no-metadata"];
    rig.virsh(&[&snapshot[..], &["--diskspec", "vdb,snapshot=no"]].concat())?;
    let wanted = request(Some(&tracker));
    let copy = format!("ms-{}-map", wanted.capture.0.simple());
    let node = node_with(&rig, vm.id, &tracker.0).await?;
    let bitmap = serde_json::json!({"node": node, "name": copy});
    rig.host.libvirt().qmp(vm.id, "block-dirty-bitmap-add", bitmap).await?;
    let error = rig.host.begin_capture(vm.id, wanted).await.err().context("a name that is taken")?;
    assert!(error.message.contains("freezing the old tracker"), "{error}");
    assert_eq!(remains(&rig)?, [] as [String; 0]);
    rig.virsh(&["blockcommit", "web", "vda", "--active", "--pivot", "--wait"])?;
    rig.let_write(&vm, 20).await?;

    // libvirt dies while a capture is open: it cannot be closed, and is as soon as libvirt is back, with nobody asking.
    let open = rig.host.begin_capture(vm.id, request(Some(&tracker))).await?;
    rig.site.kill().await?;
    let error = open.close().await.err().context("libvirt is away")?;
    assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
    rig.let_write(&vm, 20).await?;
    rig.site.start().await?;
    wait_until_nothing_is_open(&rig).await?;

    // The same for what an agent before us left open, when libvirt comes up after us.
    let open = rig.host.begin_capture(vm.id, request(Some(&tracker))).await?;
    drop(open);
    rig.site.kill().await?;
    let restarted = rig.restarted_driver()?;
    let error = restarted.abandon_stale_captures().await.err().context("libvirt is away")?;
    assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
    rig.site.start().await?;
    wait_until_nothing_is_open(&rig).await?;

    // And all of it left the trackers usable.
    let next = restarted.begin_capture(vm.id, request(Some(&tracker))).await?;
    for disk in next.disks() {
        assert!(matches!(disk.changed, mainstay_provider::Changed::Since(_)), "{:?}", disk.changed);
    }
    read_capture(next.as_ref()).await?;
    next.close().await?;
    assert_eq!(remains(&rig)?, [] as [String; 0]);
    rig.let_write(&vm, 20).await
}

#[test]
fn a_guest_is_not_paused_for_good_when_scratch_space_runs_out() {
    mainstay_lab::run_in_own_mounts("scratch_space_runs_out").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs within a_guest_is_not_paused_for_good_when_scratch_space_runs_out"]
async fn scratch_space_runs_out() -> Result<()> {
    let lab = tempfile::tempdir()?;
    let rig = Rig::start(lab.path(), "home").await?;
    let run = rig.site.driver_directory().join("run");
    let mounted = Mounted::tmpfs(&run, 96 * MIB)?;
    rig.site.account().give(&run)?;
    let host = rig.restarted_driver()?;
    let vm = busy_vm();
    rig.boot(&vm, 20).await?;

    // Hardly any space: no capture is begun, and it is said where space is wanted.
    let ballast = run.join("ballast");
    mounted.fill(&ballast, 24 * MIB)?;
    let error = host.begin_capture(vm.id, request(None)).await.err().context("there is no room")?;
    assert_eq!(error.kind, ErrorKind::NoSpace, "{error}");
    assert!(error.message.contains("bytes are free in") && error.remedy.contains("Make space"), "{error:?}");
    std::fs::remove_file(&ballast)?;
    assert_eq!(remains(&rig)?, [] as [String; 0]);

    // Space runs out while a capture is open: the guest stands still for a moment, the capture ends, the guest goes on.
    let capture = host.begin_capture(vm.id, request(None)).await?;
    mounted.fill(&ballast, 0)?;
    let device = capture.disks()[0].device.clone();
    let ended = tokio::time::timeout(PATIENCE, async {
        loop {
            if let Err(error) = device.read(0, 4096).await {
                return error.to_string();
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    let reason = ended.await?;
    assert!(reason.contains("scratch"), "{reason}");
    capture.close().await?;
    rig.let_write(&vm, 40).await?;
    std::fs::remove_file(&ballast)?;
    assert_eq!(remains(&rig)?, [] as [String; 0]);
    let capture = host.begin_capture(vm.id, request(None)).await?;
    read_capture(capture.as_ref()).await?;
    capture.close().await?;
    rig.let_write(&vm, 20).await
}
