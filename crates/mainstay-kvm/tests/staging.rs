//! The way home: nothing changes until it is meant to, and then everything does.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

mod rig;

use std::collections::BTreeMap;

use anyhow::Result;
use bytes::Bytes;
use mainstay_lab::{DiskImage, LedgerVm, ledger};
use mainstay_model::{ItemId, VmId};
use mainstay_provider::{ErrorKind, Hypervisor as _, PowerState, Staging, StagingDisk, StagingSpec};
use rig::{PATIENCE, Rig, assert_same, read_all, read_capture, request};

fn spec(vm: VmId, size_bytes: u64) -> StagingSpec {
    let disk = |key: &str| StagingDisk { key: key.to_owned(), size_bytes };
    StagingSpec { vm, item: ItemId(uuid::Uuid::new_v4()), disks: vec![disk("vda"), disk("vdb")] }
}

async fn stage(staging: &dyn Staging, wanted: &[Vec<u8>]) -> Result<()> {
    for (device, wanted) in staging.devices().iter().zip(wanted) {
        let now = read_all(device.as_ref()).await?;
        let blocks = now.chunks(4096).zip(wanted.chunks(4096)).enumerate();
        for (block, (_, wanted)) in blocks.filter(|(_, (now, wanted))| now != wanted) {
            device.write(block as u64 * 4096, Bytes::copy_from_slice(wanted)).await?;
        }
        device.flush().await?;
    }
    Ok(())
}

/// The image files, byte by byte.
fn images(rig: &Rig, vm: &LedgerVm) -> Vec<Vec<u8>> {
    (0..2).map(|index| std::fs::read(vm.disk_path(&rig.site, index)).unwrap()).collect()
}

async fn read_off(rig: &Rig, vm: &LedgerVm) -> Result<Vec<Vec<u8>>> {
    let capture = rig.host.begin_capture(vm.id, request(None)).await?;
    let copies = read_capture(capture.as_ref()).await?;
    capture.close().await?;
    rig.host.remove_trackers(vm.id).await?;
    Ok(copies)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn staged_changes_come_home_or_leave_no_trace() -> Result<()> {
    let lab = tempfile::tempdir()?;
    let rig = Rig::start(lab.path(), "home").await?;
    let mut vm = LedgerVm::new("web");
    vm.disks = vec![DiskImage::Qcow2, DiskImage::Raw];
    rig.boot(&vm, 20).await?;
    let running = rig.host.open_staging(&spec(vm.id, 64 << 20)).await.err().unwrap();
    assert_eq!(running.kind, ErrorKind::Refused);
    rig.host.power_off(vm.id).await?;
    let old = read_off(&rig, &vm).await?;
    // What the disks will be after the failback: a later state of the same guest.
    rig.host.start(vm.id).await?;
    rig.let_write(&vm, 60).await?;
    rig.host.power_off(vm.id).await?;
    let new = read_off(&rig, &vm).await?;
    // Back to the old state, by staging as well.
    let staging = rig.host.open_staging(&spec(vm.id, 64 << 20)).await?;
    stage(staging.as_ref(), &old).await?;
    staging.close().await?;
    rig.host.commit_staging(vm.id).await?;
    rig.host.commit_staging(vm.id).await?;
    assert_same(&read_off(&rig, &vm).await?, &old);

    // Staged and thrown away.
    let before = images(&rig, &vm);
    let staging = rig.host.open_staging(&spec(vm.id, 64 << 20)).await?;
    stage(staging.as_ref(), &new).await?;
    assert!(!staging.is_base_changed().await?);
    for key in ["vda", "vdb"] {
        // Neither disk can be used by a VM meanwhile: QEMU itself refuses.
        let refused = rig.host.start(vm.id).await.unwrap_err();
        assert!(refused.message.contains("lock"), "{key}: {refused}");
    }
    staging.close().await?;
    let refused = rig.host.start(vm.id).await.unwrap_err();
    assert!(refused.message.contains("lock"), "{refused}");
    rig.host.discard_staging(vm.id).await?;
    rig.host.discard_staging(vm.id).await?;
    assert_eq!(images(&rig, &vm), before);

    // Staged by an agent that dies, finished by the next.
    let staging = rig.host.open_staging(&spec(vm.id, 64 << 20)).await?;
    stage(staging.as_ref(), &new).await?;
    drop(staging);
    let restarted = rig.restarted_driver()?;
    let staging = restarted.open_staging(&spec(vm.id, 64 << 20)).await?;
    let staged =
        [read_all(staging.devices()[0].as_ref()).await?, read_all(staging.devices()[1].as_ref()).await?];
    assert_same(&staged, &new);
    staging.close().await?;
    // The first driver still holds its lock, as a process that died would not.
    rig.host.discard_staging(VmId(uuid::Uuid::new_v4())).await?;
    drop(rig.host.commit_staging(vm.id).await);
    restarted.commit_staging(vm.id).await?;
    assert_same(&read_off(&rig, &vm).await?, &new);
    rig.host.start(vm.id).await?;
    ledger::wait_until_up(&rig.site, vm.id, PATIENCE).await?;
    let verdict = ledger::query(&rig.site, vm.id).await?;
    assert!(verdict.is_whole(), "{verdict:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_home_that_is_gone_is_made_anew() -> Result<()> {
    let lab = tempfile::tempdir()?;
    let rig = Rig::start(lab.path(), "home").await?;
    let vm = LedgerVm::new("web");
    rig.boot(&vm, 20).await?;
    let definition = rig.host.definition(vm.id).await?;
    assert_eq!(rig.host.shut_down(vm.id, PATIENCE).await?, mainstay_provider::ShutdownOutcome::Off);
    let copies = read_off(&rig, &vm).await?;
    rig.host.libvirt().undefine(vm.id).await?;
    for index in 0..2 {
        std::fs::remove_file(vm.disk_path(&rig.site, index))?;
    }
    rig.host.create_home_vm(vm.id, &definition, &spec(vm.id, 64 << 20)).await?;
    rig.host.create_home_vm(vm.id, &definition, &spec(vm.id, 64 << 20)).await?;
    assert_eq!(rig.host.power(vm.id).await?, PowerState::Off);
    let staging = rig.host.open_staging(&spec(vm.id, 64 << 20)).await?;
    stage(staging.as_ref(), &copies).await?;
    staging.close().await?;
    rig.host.commit_staging(vm.id).await?;
    rig.host.start(vm.id).await?;
    ledger::wait_until_up(&rig.site, vm.id, PATIENCE).await?;
    assert!(ledger::query(&rig.site, vm.id).await?.is_whole());
    let paths: BTreeMap<_, _> =
        rig.host.vm(vm.id).await?.disks.into_iter().map(|disk| (disk.key, disk.path)).collect();
    assert_eq!(paths["vda"], vm.disk_path(&rig.site, 0).display().to_string());
    Ok(())
}
