//! What a host says about itself, and power.

mod rig;

use std::time::Duration;

use anyhow::Result;
use mainstay_lab::{DiskImage, GuestImages, LedgerVm, ledger};
use mainstay_model::VmId;
use mainstay_provider::{DiskFormat, ErrorKind, Hypervisor as _, NetworkKind, PowerState, ShutdownOutcome};
use rig::{PATIENCE, Rig};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inventory_power_and_a_guest_that_will_not_stop() -> Result<()> {
    let lab = tempfile::tempdir()?;
    let rig = Rig::start(lab.path(), "home").await?;
    let facts = rig.host.host().await?;
    assert!(facts.hypervisor.starts_with("QEMU ") && facts.manager.starts_with("libvirt "), "{facts:?}");
    assert!(facts.free_bytes > 0);
    assert!(facts.capabilities.iter().any(|capability| capability.name == "InstantRecovery"));

    let mut vm = LedgerVm::new("web");
    vm.disks = vec![DiskImage::Qcow2, DiskImage::Raw];
    vm.network = Some("230.77.3.1:5703".to_owned());
    vm.options = "ledger.stubborn=1 ledger.ip=10.77.0.5/24".to_owned();
    vm.create(&rig.site, &GuestImages::find()?).await?;
    let inventory = rig.host.inventory().await?;
    assert_eq!(inventory.vms.len(), 1);
    let found = &inventory.vms[0];
    assert_eq!((found.id, found.name.as_str(), found.power), (vm.id, "web", PowerState::Off));
    assert_eq!(
        found.disks.iter().map(|disk| disk.format).collect::<Vec<_>>(),
        [DiskFormat::Qcow2, DiskFormat::Raw]
    );
    assert_eq!(found.disks.iter().map(|disk| disk.size_bytes).collect::<Vec<_>>(), [64 << 20; 2]);
    assert!(found.disks[0].is_os_disk && found.disks.iter().all(|disk| disk.is_replicable));
    let codes: Vec<&str> = found.findings.iter().map(|finding| finding.code.as_str()).collect();
    assert_eq!(codes, ["DiskTrackingVolatile"]);
    assert_eq!(inventory.networks[0].name, "mcast:230.77.3.1:5703");
    assert_eq!(inventory.networks[0].kind, NetworkKind::Production);

    rig.host.set_autostart(vm.id, true).await?;
    assert!(rig.host.vm(vm.id).await?.autostart);
    rig.host.set_autostart(vm.id, false).await?;
    rig.host.start(vm.id).await?;
    rig.host.start(vm.id).await?;
    ledger::wait_until_up(&rig.site, vm.id, PATIENCE).await?;
    assert_eq!(rig.host.vm(vm.id).await?.nics[0].addresses, ["10.77.0.5/24"]);
    let mac = rig.host.vm(vm.id).await?.nics[0].mac.clone();
    rig.host.set_guest_address(vm.id, &mac, "10.77.0.6/24").await?;
    assert_eq!(rig.host.vm(vm.id).await?.nics[0].addresses, ["10.77.0.6/24"]);
    assert!(rig.host.console(vm.id).await?.ends_with("console 'web'"));

    let outcome = rig.host.shut_down(vm.id, Duration::from_secs(6)).await?;
    assert_eq!((outcome, rig.host.power(vm.id).await?), (ShutdownOutcome::Refused, PowerState::Running));
    rig.host.libvirt().suspend(vm.id).await?;
    assert_eq!(rig.host.power(vm.id).await?, PowerState::Paused);
    rig.host.start(vm.id).await?;
    assert_eq!(rig.host.power(vm.id).await?, PowerState::Running);
    rig.host.power_off(vm.id).await?;
    rig.host.power_off(vm.id).await?;
    assert_eq!(rig.host.power(vm.id).await?, PowerState::Off);

    let nobody = VmId(uuid::Uuid::new_v4());
    assert_eq!(rig.host.power(nobody).await.unwrap_err().kind, ErrorKind::NotFound);
    assert_eq!(rig.host.start(nobody).await.unwrap_err().kind, ErrorKind::NotFound);
    // The daemon dies: said as it is, and mended when it is back.
    rig.site.kill().await?;
    assert_eq!(rig.host.power(vm.id).await.unwrap_err().kind, ErrorKind::Unavailable);
    rig.site.start().await?;
    assert_eq!(rig.host.power(vm.id).await?, PowerState::Off);
    Ok(())
}
