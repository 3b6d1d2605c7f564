//! A site with a ledger guest, on a real libvirt.

use std::time::Duration;

use mainstay_lab::{DiskImage, GuestImages, LedgerVm, Site, ledger};

const PATIENCE: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_guest_runs_survives_the_daemon_and_a_power_cut() {
    let directory = tempfile::tempdir().unwrap();
    let site = Site::open(directory.path(), "home").await.unwrap();
    site.start().await.unwrap();
    let mut vm = LedgerVm::new("web");
    vm.disks = vec![DiskImage::Qcow2, DiskImage::Raw];
    vm.network = Some("230.77.1.1:5701".to_owned());
    vm.options = "ledger.ip=10.77.0.5/24 ledger.rate=50 ledger.churn_kib=64".to_owned();
    vm.create(&site, &GuestImages::find().unwrap()).await.unwrap();
    site.libvirt().start(vm.id, false).await.unwrap();
    ledger::wait_for_acknowledgements(&site.acks().join("web"), 20, PATIENCE).await.unwrap();
    let status = ledger::wait_until_up(&site, vm.id, PATIENCE).await.unwrap();
    assert_eq!(status.addresses, ["10.77.0.5/24"]);

    // The daemon dies and comes back; the guest does not notice.
    site.kill().await.unwrap();
    site.start().await.unwrap();
    let before = ledger::query(&site, vm.id).await.unwrap();
    assert!(before.is_whole() && before.acknowledged >= 20, "{before:?}");

    // A power cut of the guest, and the next boot.
    site.libvirt().destroy(vm.id).await.unwrap();
    site.libvirt().start(vm.id, false).await.unwrap();
    ledger::wait_until_up(&site, vm.id, PATIENCE).await.unwrap();
    let after = ledger::query(&site, vm.id).await.unwrap();
    assert!(after.is_whole() && after.last >= before.acknowledged, "{after:?}");

    // The host loses its power and boots at once, over and over: what is still ending keeps nobody from starting.
    for _ in 0..4 {
        site.cut_power();
        site.start().await.unwrap();
    }
    site.power_off().await.unwrap();
    site.forget().unwrap();
}
