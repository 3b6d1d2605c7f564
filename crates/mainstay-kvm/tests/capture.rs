//! Captures of real virtual machines: what is said to have changed is enough, always.

mod rig;

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use mainstay_lab::{DiskImage, GuestImages, LedgerVm, ledger};
use mainstay_provider::{
    Changed, Consistency, ErrorKind, Hypervisor as _, PowerState, ShutdownOutcome, TrackerId,
};
use rig::{PATIENCE, Rig, apply, apply_all, assert_same, read_capture, request};

fn busy_vm(name: &str) -> LedgerVm {
    let mut vm = LedgerVm::new(name);
    // One of each kind, in the same capture.
    vm.disks = vec![DiskImage::Qcow2, DiskImage::Raw];
    vm.options = "ledger.rate=100 ledger.churn_kib=512".to_owned();
    vm
}

/// A busy VM with a recovery point: what that holds, and what is tracked since.
async fn tracked(rig: &Rig) -> Result<(LedgerVm, Vec<Vec<u8>>, TrackerId)> {
    let vm = busy_vm("web");
    rig.boot(&vm, 20).await?;
    let first = rig.host.begin_capture(vm.id, request(None)).await?;
    let copies = read_capture(first.as_ref()).await?;
    let tracker = first.tracker().clone();
    first.close().await?;
    rig.host.confirm_tracker(vm.id, &tracker).await?;
    Ok((vm, copies, tracker))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deltas_rebuild_every_moment_under_load() -> Result<()> {
    let lab = tempfile::tempdir()?;
    let rig = Rig::start(lab.path(), "home").await?;
    let vm = busy_vm("web");
    rig.boot(&vm, 50).await?;

    let first = rig.host.begin_capture(vm.id, request(None)).await?;
    assert!(first.disks().iter().all(|disk| matches!(disk.changed, Changed::Unknown { .. })));
    let mut copies = read_capture(first.as_ref()).await?;
    let mut tracker = first.tracker().clone();
    first.close().await?;

    for round in 0..4 {
        rig.let_write(&vm, 50).await?;
        let mut wanted = request(Some(&tracker));
        if round == 2 {
            wanted.freeze_timeout = Some(Duration::from_secs(10));
        }
        let next = rig.host.begin_capture(vm.id, wanted).await?;
        let consistency = if round == 2 { Consistency::Application } else { Consistency::Crash };
        assert_eq!((next.consistency(), next.note()), (consistency, ""));
        // The old tracker was read where it is: making a copy would hold up the guest.
        assert!(rig.bitmaps(vm.id).await?.iter().all(|name| !name.ends_with("-map")));
        let bytes = apply(next.as_ref(), &mut copies).await?;
        let size: u64 = next.disks().iter().map(|disk| disk.device.size()).sum();
        assert!(bytes > 0 && bytes < size / 2, "{bytes} of {size} bytes changed");
        assert_same(&copies, &read_capture(next.as_ref()).await?);
        let new_tracker = next.tracker().clone();
        next.close().await?;
        // In the second round the recovery point never becomes durable: the old tracker goes on.
        if round != 1 {
            rig.host.confirm_tracker(vm.id, &new_tracker).await?;
            assert_eq!(rig.bitmaps(vm.id).await?, [new_tracker.0.clone(), new_tracker.0.clone()]);
            tracker = new_tracker;
        }
    }
    rig.let_write(&vm, 10).await?;
    let verdict = ledger::query(&rig.site, vm.id).await?;
    assert!(verdict.is_whole(), "{verdict:?}");
    rig.host.remove_trackers(vm.id).await?;
    assert!(rig.bitmaps(vm.id).await?.is_empty());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_and_a_daemon_that_die_in_a_capture_leave_nothing_behind() -> Result<()> {
    let lab = tempfile::tempdir()?;
    let rig = Rig::start(lab.path(), "home").await?;
    let vm = busy_vm("web");
    rig.boot(&vm, 20).await?;
    let first = rig.host.begin_capture(vm.id, request(None)).await?;
    let mut copies = read_capture(first.as_ref()).await?;
    let tracker = first.tracker().clone();
    let second = rig.host.begin_capture(vm.id, request(None)).await.err().map(|error| error.kind);
    assert_eq!(second, Some(ErrorKind::Busy));
    first.close().await?;

    rig.let_write(&vm, 20).await?;
    let open = rig.host.begin_capture(vm.id, request(Some(&tracker))).await?;
    rig.site.kill().await?;
    // The data goes on flowing without libvirt.
    open.disks()[0].device.read(0, 4096).await?;
    drop(open);
    rig.site.start().await?;
    let restarted = rig.restarted_driver()?;
    assert_eq!(restarted.abandon_stale_captures().await?, [vm.id]);
    assert_eq!(restarted.abandon_stale_captures().await?, []);
    rig.let_write(&vm, 20).await?;

    let next = restarted.begin_capture(vm.id, request(Some(&tracker))).await?;
    apply(next.as_ref(), &mut copies).await?;
    assert_same(&copies, &read_capture(next.as_ref()).await?);
    next.close().await?;
    assert_eq!(std::fs::read_dir(rig.site.driver_directory().join("run"))?.count(), 0);

    // Somebody else's backup is waited for, not ended.
    let uri = rig.site.uri();
    let begun = Command::new("virsh").args(["-q", "-c", uri, "backup-begin", "web"]).status()?;
    assert!(begun.success());
    let foreign = restarted.begin_capture(vm.id, request(None)).await.err().map(|error| error.kind);
    // A push backup of small disks may have ended by then; what matters is that it was not aborted by us.
    assert!(matches!(foreign, None | Some(ErrorKind::Busy)), "{foreign:?}");
    Ok(())
}

/// Whether there are scratch images in any capture's directory.
fn has_scratch(rig: &Rig) -> Result<bool> {
    for capture in std::fs::read_dir(rig.site.driver_directory().join("run"))? {
        for file in std::fs::read_dir(capture?.path())? {
            if file?.path().extension().is_some_and(|extension| extension == "scratch") {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_capture_ends_by_itself_before_it_harms_the_guest() -> Result<()> {
    let lab = tempfile::tempdir()?;
    let rig = Rig::start(lab.path(), "home").await?;
    let vm = busy_vm("web");
    rig.boot(&vm, 20).await?;
    let mut wanted = request(None);
    // The ledger's own files are rewritten all the time, so scratch grows at once.
    wanted.limits.scratch_bytes_max = 64 * 1024;
    let capture = rig.host.begin_capture(vm.id, wanted).await?;
    assert!(has_scratch(&rig)?);
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
    assert!(reason.contains("overwrote more than"), "{reason}");
    // The space is free again also where nobody closes the capture.
    let deadline = Instant::now() + PATIENCE;
    while has_scratch(&rig)? {
        anyhow::ensure!(Instant::now() < deadline, "scratch images stay");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    capture.close().await?;
    rig.let_write(&vm, 20).await?;
    let mut wanted = request(None);
    wanted.limits.age_max = Duration::from_secs(1);
    let capture = rig.host.begin_capture(vm.id, wanted).await?;
    let device = capture.disks()[1].device.clone();
    let aged = tokio::time::timeout(PATIENCE, async {
        while device.read(0, 4096).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    aged.await?;
    capture.close().await?;
    rig.let_write(&vm, 20).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_is_off_is_captured_and_a_dead_tracker_is_noticed() -> Result<()> {
    let lab = tempfile::tempdir()?;
    let rig = Rig::start(lab.path(), "home").await?;
    let vm = busy_vm("web");
    rig.boot(&vm, 20).await?;
    let live = rig.host.begin_capture(vm.id, request(None)).await?;
    let mut copies = read_capture(live.as_ref()).await?;
    let tracker = live.tracker().clone();
    live.close().await?;
    rig.let_write(&vm, 20).await?;

    // A clean end: the qcow2 disk's tracker is in the file, the raw disk's is gone.
    assert_eq!(rig.host.shut_down(vm.id, PATIENCE).await?, ShutdownOutcome::Off);
    let off = rig.host.begin_capture(vm.id, request(Some(&tracker))).await?;
    let refused = rig.host.start(vm.id).await.err().map(|error| error.kind);
    assert_eq!(refused, Some(ErrorKind::Busy));
    let now = read_capture(off.as_ref()).await?;
    let Changed::Since(ranges) = &off.disks()[0].changed else { panic!("{:?}", off.disks()[0].changed) };
    for range in ranges {
        let range = range.start as usize..range.end as usize;
        copies[0][range.clone()].copy_from_slice(&now[0][range]);
    }
    assert_same(&copies[..1], &now[..1]);
    assert!(matches!(off.disks()[1].changed, Changed::Unknown { .. }));
    let tracker = off.tracker().clone();
    off.close().await?;
    rig.host.confirm_tracker(vm.id, &tracker).await?;
    let mut copies = now;

    // The tracker set while it was off works after the start, on qcow2.
    rig.host.start(vm.id).await?;
    rig.let_write(&vm, 20).await?;
    let live = rig.host.begin_capture(vm.id, request(Some(&tracker))).await?;
    let now = read_capture(live.as_ref()).await?;
    let Changed::Since(ranges) = &live.disks()[0].changed else { panic!("{:?}", live.disks()[0].changed) };
    for range in ranges {
        let range = range.start as usize..range.end as usize;
        copies[0][range.clone()].copy_from_slice(&now[0][range]);
    }
    assert_same(&copies[..1], &now[..1]);
    let tracker = live.tracker().clone();
    live.close().await?;
    rig.host.confirm_tracker(vm.id, &tracker).await?;

    // QEMU dies, and with it both trackers.
    rig.kill_qemu(vm.id).await?;
    for is_running in [false, true] {
        if is_running {
            rig.host.start(vm.id).await?;
            rig.let_write(&vm, 5).await?;
        }
        let after = rig.host.begin_capture(vm.id, request(Some(&tracker))).await?;
        for disk in after.disks() {
            assert!(matches!(disk.changed, Changed::Unknown { .. }), "{:?}", disk.changed);
        }
        after.close().await?;
    }
    let tracked = vec!["vda".to_owned(), "vdb".to_owned()];
    rig.host.power_off(vm.id).await?;
    rig.host.start_tracked(vm.id, &tracked, &tracker).await?;
    assert_eq!(rig.host.power(vm.id).await?, PowerState::Running);
    rig.let_write(&vm, 5).await?;
    let after = rig.host.begin_capture(vm.id, request(Some(&tracker))).await?;
    assert!(after.disks().iter().all(|disk| matches!(disk.changed, Changed::Since(_))));
    after.close().await?;
    rig.host.remove_trackers(vm.id).await?;
    rig.host.power_off(vm.id).await?;
    rig.host.remove_trackers(vm.id).await?;
    let info = Command::new("qemu-img").arg("info").arg(vm.disk_path(&rig.site, 0)).output()?;
    assert!(!String::from_utf8_lossy(&info.stdout).contains("ms-"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_boots_while_a_capture_is_open_keeps_its_agent() -> Result<()> {
    let lab = tempfile::tempdir()?;
    let rig = Rig::start(lab.path(), "home").await?;
    let vm = busy_vm("web");
    vm.create(&rig.site, &GuestImages::find()?).await?;
    rig.host.start(vm.id).await?;
    // Long before the guest has an agent: libvirt does not hear of it as long as the capture is open.
    let capture = rig.host.begin_capture(vm.id, request(None)).await?;
    ledger::wait_until_up(&rig.site, vm.id, PATIENCE).await?;
    let findings = rig.host.vm(vm.id).await?.findings;
    assert!(findings.iter().all(|finding| finding.code != "GuestAgentSilent"), "{findings:?}");
    capture.close().await?;
    let mut wanted = request(None);
    wanted.freeze_timeout = Some(Duration::from_secs(30));
    let capture = rig.host.begin_capture(vm.id, wanted).await?;
    assert_eq!((capture.consistency(), capture.note()), (Consistency::Application, ""));
    capture.close().await?;
    rig.let_write(&vm, 20).await
}

/// A daemon that dies after it has noted that a backup begins, and before it has noted which, takes it for running ever after.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_dies_when_a_capture_begins_stops_no_further_one() -> Result<()> {
    let lab = tempfile::tempdir()?;
    let rig = Rig::start(lab.path(), "home").await?;
    let (vm, mut copies, tracker) = tracked(&rig).await?;
    rig.let_write(&vm, 30).await?;
    let lost = rig.host.begin_capture(vm.id, request(Some(&tracker))).await?;
    rig.site.kill().await?;
    let status = rig.site.status("web");
    let text = std::fs::read_to_string(&status)?;
    let (before, rest) = text.split_once("<domainbackup").context("the backup is noted")?;
    let (_, after) = rest.split_once("</domainbackup>").context("its end")?;
    std::fs::write(&status, format!("{before}{after}"))?;

    rig.site.start_unmended().await?;
    // That ends what QEMU has gone on doing for it.
    lost.close().await?;
    let jobs = rig.site.libvirt().qmp(vm.id, "query-block-jobs", serde_json::Value::Null).await?;
    assert_eq!(jobs, serde_json::json!([]));
    let error = rig.host.begin_capture(vm.id, request(Some(&tracker))).await.err().context("no error")?;
    assert_eq!(error.kind, ErrorKind::Refused, "{error}");
    assert!(error.message.contains("does not exist") && error.remedy.contains("mend-libvirt"), "{error}");
    assert_eq!(rig.host.abandon_stale_captures().await?, []);

    rig.site.kill().await?;
    rig.site.start().await?;
    let next = rig.host.begin_capture(vm.id, request(Some(&tracker))).await?;
    apply_all(next.as_ref(), &mut copies).await?;
    assert_same(&read_capture(next.as_ref()).await?, &copies);
    next.close().await?;
    rig.let_write(&vm, 20).await
}

/// Whatever libvirt and QEMU then say: it passes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_dies_while_a_capture_is_begun_is_captured_next_time() -> Result<()> {
    let lab = tempfile::tempdir()?;
    let rig = Rig::start(lab.path(), "home").await?;
    let vm = busy_vm("web");
    vm.create(&rig.site, &GuestImages::find()?).await?;
    for wait_ms in [0, 15, 30, 45, 60, 80, 100, 120] {
        rig.host.start(vm.id).await?;
        let host = rig.host.clone();
        let beginning = tokio::spawn(async move { host.begin_capture(vm.id, request(None)).await });
        tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        rig.kill_qemu(vm.id).await?;
        match beginning.await? {
            Ok(begun) => begun.close().await?,
            Err(error) => assert_eq!(error.kind, ErrorKind::Unavailable, "after {wait_ms} ms: {error}"),
        }
        let deadline = Instant::now() + PATIENCE;
        let next = loop {
            match rig.host.begin_capture(vm.id, request(None)).await {
                // The first is still being ended.
                Err(error) if error.kind == ErrorKind::Busy && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                begun => break begun?,
            }
        };
        next.close().await?;
    }
    Ok(())
}

/// A snapshot leaves the tracker with what was noted so far in the image beneath, and an empty one of the same name on top.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_of_somebodys_hides_no_change() -> Result<()> {
    let lab = tempfile::tempdir()?;
    let rig = Rig::start(lab.path(), "home").await?;
    let (vm, mut copies, mut tracker) = tracked(&rig).await?;

    let snapshot =
        |name: &str| rig.virsh(&["snapshot-create-as", "web", name, "--disk-only", "--no-metadata"]);
    for round in 0..6 {
        rig.let_write(&vm, 30).await?;
        match round {
            0 | 3 => snapshot(&format!("theirs{round}"))?,
            // Two between two captures.
            1 => ["more", "and-more"].into_iter().try_for_each(snapshot)?,
            2 | 4 => {
                for disk in ["vda", "vdb"] {
                    rig.virsh(&["blockcommit", "web", disk, "--active", "--pivot", "--wait"])?;
                }
            }
            _ => {}
        }
        rig.let_write(&vm, 10).await?;
        let next = rig.host.begin_capture(vm.id, request(Some(&tracker))).await?;
        apply_all(next.as_ref(), &mut copies).await?;
        assert_same(&copies, &read_capture(next.as_ref()).await?);
        tracker = next.tracker().clone();
        next.close().await?;
        rig.host.confirm_tracker(vm.id, &tracker).await?;
    }

    // The same with a VM that is off by then.
    rig.let_write(&vm, 30).await?;
    snapshot("last")?;
    rig.let_write(&vm, 10).await?;
    let stopped = rig.host.shut_down(vm.id, PATIENCE).await?;
    assert_eq!(stopped, ShutdownOutcome::Off);
    let off = rig.host.begin_capture(vm.id, request(Some(&tracker))).await?;
    apply_all(off.as_ref(), &mut copies).await?;
    assert_same(&copies, &read_capture(off.as_ref()).await?);
    off.close().await.map_err(Into::into)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_freezes_late_is_thawed() -> Result<()> {
    let lab = tempfile::tempdir()?;
    let rig = Rig::start(lab.path(), "home").await?;
    let vm = busy_vm("web");
    rig.boot(&vm, 20).await?;
    // The agent hangs, and wakes after the freeze has timed out.
    let script = "(sleep 12; killall -CONT qemu-ga) & sleep 1; killall -STOP qemu-ga";
    let command = serde_json::json!({"path": "/bin/sh", "arg": ["-c", script]});
    rig.host.libvirt().agent(vm.id, "guest-exec", command, PATIENCE).await?;
    let ping =
        || rig.host.libvirt().agent(vm.id, "guest-ping", serde_json::Value::Null, Duration::from_secs(1));
    while ping().await.is_ok() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut wanted = request(None);
    wanted.freeze_timeout = Some(Duration::from_secs(3));
    let capture = rig.host.begin_capture(vm.id, wanted).await?;
    assert_eq!(capture.consistency(), Consistency::Crash);
    assert!(!capture.note().is_empty());
    capture.close().await?;
    let marker = rig.site.driver_directory().join(format!("captures/{}.frozen", vm.id));
    let deadline = Instant::now() + PATIENCE;
    while marker.exists() {
        assert!(Instant::now() < deadline, "the guest is never seen thawed");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    rig.let_write(&vm, 50).await?;
    let mut wanted = request(None);
    wanted.freeze_timeout = Some(Duration::from_secs(10));
    let capture = rig.host.begin_capture(vm.id, wanted).await?;
    assert_eq!((capture.consistency(), capture.note()), (Consistency::Application, ""));
    capture.close().await?;
    rig.let_write(&vm, 20).await
}
