//! Recovery VMs: started from a served recovery point, made independent, and asked what changed since.

mod rig;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use mainstay_lab::{DiskImage, LedgerVm, ledger};
use mainstay_model::{ItemId, VmId};
use mainstay_nbd::{Exports, Server};
use mainstay_provider::{
    ErrorKind, Hypervisor as _, MacPolicy, NicPlan, PowerState, RecoveryDisk, RecoveryVmSpec,
    ShutdownOutcome, VmDefinition, WhenOff,
};
use rig::{PATIENCE, Rig, apply, assert_same, memory, read_capture, request};

const GROUP: &str = "230.77.2.1:5702";

/// A recovery point: what the disks held, the definition, and how far the ledger was.
struct Point {
    copies: Vec<Vec<u8>>,
    definition: VmDefinition,
    acknowledged: usize,
    mac: String,
}

async fn take_point(home: &Rig, vm: &LedgerVm) -> Result<Point> {
    let acknowledged = home.records(vm);
    let capture = home.host.begin_capture(vm.id, request(None)).await?;
    let copies = read_capture(capture.as_ref()).await?;
    capture.close().await?;
    let mac = home.host.vm(vm.id).await?.nics[0].mac.clone();
    Ok(Point { copies, definition: home.host.definition(vm.id).await?, acknowledged, mac })
}

/// Serves the disks of a point read-only, as an agent does.
async fn serve(socket: &std::path::Path, point: &Point) -> Result<Server> {
    let exports = Exports::new();
    for (index, copy) in point.copies.iter().enumerate() {
        exports.insert(format!("disk{index}"), memory(copy).await?, true);
    }
    Ok(Server::bind_unix(socket, exports)?)
}

fn spec(point: &Point, name: &str, socket: &std::path::Path) -> RecoveryVmSpec {
    let disk = |(index, key): (usize, &str)| RecoveryDisk {
        key: key.to_owned(),
        size_bytes: point.copies[index].len() as u64,
        nbd_socket: socket.to_owned(),
        nbd_export: format!("disk{index}"),
    };
    RecoveryVmSpec {
        vm: VmId(uuid::Uuid::new_v4()),
        item: ItemId(uuid::Uuid::new_v4()),
        name: name.to_owned(),
        is_test: false,
        definition: point.definition.clone(),
        disks: ["vda", "vdb"].into_iter().enumerate().map(disk).collect(),
        vcpus: None,
        memory_bytes: Some(256 << 20),
        nics: vec![NicPlan {
            mac: point.mac.clone(),
            network: Some(format!("mcast:{GROUP}")),
            mac_policy: MacPolicy::Keep,
            address: Some("10.78.0.9/24".to_owned()),
        }],
    }
}

fn ledger_vm() -> LedgerVm {
    let mut vm = LedgerVm::new("web");
    vm.disks = vec![DiskImage::Qcow2, DiskImage::Raw];
    vm.options = "ledger.rate=50 ledger.churn_kib=64 ledger.ip=10.77.0.5/24".to_owned();
    vm.network = Some(GROUP.to_owned());
    vm
}

fn socket_of(rig: &Rig, name: &str) -> PathBuf {
    rig.site.driver_directory_short().join("run").join(name)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recovery_vm_boots_hydrates_and_knows_what_changed() -> Result<()> {
    let lab = tempfile::tempdir()?;
    let home = Rig::start(lab.path(), "home").await?;
    let away = Rig::start(lab.path(), "away").await?;
    let vm = ledger_vm();
    home.boot(&vm, 60).await?;
    let mut point = take_point(&home, &vm).await?;
    // An unplanned failover: the source is gone, with what it wrote since.
    home.kill_qemu(vm.id).await?;

    let socket = socket_of(&away, "store");
    let server = serve(&socket, &point).await?;
    let spec = spec(&point, "web-recovered", &socket);
    away.host.create_recovery_vm(&spec).await?;
    away.host.create_recovery_vm(&spec).await?;
    let foreign = RecoveryVmSpec { vm: VmId(uuid::Uuid::new_v4()), ..spec.clone() };
    let refused = away.host.create_recovery_vm(&foreign).await.unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Refused, "{refused}");
    away.host.start(spec.vm).await?;
    ledger::wait_until_up(&away.site, spec.vm, PATIENCE).await?;
    let verdict = ledger::query(&away.site, spec.vm).await?;
    assert!(verdict.is_whole() && verdict.last >= point.acknowledged as u64, "{verdict:?}");
    let machine = away.host.vm(spec.vm).await?;
    assert_eq!((machine.memory_bytes, machine.nics[0].mac.as_str()), (256 << 20, point.mac.as_str()));
    assert_eq!(machine.nics[0].network, format!("mcast:{GROUP}"));

    // The guest gets its address there.
    away.host.set_guest_address(spec.vm, &point.mac, "10.78.0.9/24").await?;
    let addresses = away.host.guest_addresses(spec.vm).await?;
    assert!(addresses.iter().any(|address| address.address == "10.78.0.9/24"), "{addresses:?}");

    // What changed since the failover, from the allocation of the overlay, before there is any bitmap.
    let creation = away.host.creation_tracker();
    let capture = away.host.begin_capture(spec.vm, request(Some(&creation))).await?;
    let bytes = apply(capture.as_ref(), &mut point.copies).await?;
    assert!(bytes > 0 && bytes < point.copies[0].len() as u64, "{bytes} bytes changed");
    assert_same(&point.copies, &read_capture(capture.as_ref()).await?);
    let tracker = capture.tracker().clone();
    capture.close().await?;
    away.host.confirm_tracker(spec.vm, &tracker).await?;

    // Out of the store, and the store goes.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let hydration = away.host.hydrate(spec.vm, WhenOff::Wait).await?;
        if hydration.is_complete {
            assert_eq!(hydration.bytes_done, hydration.bytes_total);
            break;
        }
        ensure!(Instant::now() < deadline, "hydration does not end: {hydration:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    server.shutdown().await;
    assert!(!socket.exists());
    let verdict = ledger::query(&away.site, spec.vm).await?;
    assert!(verdict.is_whole(), "{verdict:?}");
    // A delta from the tracker, with a crash of QEMU in between: the overlay still knows.
    away.kill_qemu(spec.vm).await?;
    let capture = away.host.begin_capture(spec.vm, request(Some(&tracker))).await?;
    apply(capture.as_ref(), &mut point.copies).await?;
    assert_same(&point.copies, &read_capture(capture.as_ref()).await?);
    capture.close().await?;
    away.host.start(spec.vm).await?;
    ledger::wait_until_up(&away.site, spec.vm, PATIENCE).await?;
    let verdict = ledger::query(&away.site, spec.vm).await?;
    assert!(verdict.is_whole(), "{verdict:?}");
    assert_eq!(away.host.shut_down(spec.vm, PATIENCE).await?, ShutdownOutcome::Off);
    let capture = away.host.begin_capture(spec.vm, request(Some(&creation))).await?;
    apply(capture.as_ref(), &mut point.copies).await?;
    assert_same(&point.copies, &read_capture(capture.as_ref()).await?);
    capture.close().await?;

    // Only what Mainstay made is removed, and all of it.
    let refused = home.host.remove_recovery_vm(vm.id).await.unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Refused);
    away.host.remove_recovery_vm(spec.vm).await?;
    away.host.remove_recovery_vm(spec.vm).await?;
    let gone = away.host.power(spec.vm).await.unwrap_err();
    assert_eq!(gone.kind, ErrorKind::NotFound);
    assert_eq!(std::fs::read_dir(away.site.driver_directory().join("recovery"))?.count(), 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_waits_for_a_store_that_comes_back() -> Result<()> {
    let lab = tempfile::tempdir()?;
    let home = Rig::start(lab.path(), "home").await?;
    let vm = ledger_vm();
    home.boot(&vm, 30).await?;
    let point = take_point(&home, &vm).await?;
    home.host.power_off(vm.id).await?;
    let socket = socket_of(&home, "store");
    let server = serve(&socket, &point).await?;
    let mut spec = spec(&point, "web-test", &socket);
    spec.is_test = true;
    // A test copy does not reach the production network.
    let refused = home.host.create_recovery_vm(&spec).await.unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Refused, "{refused}");
    spec.nics[0].network = None;
    spec.nics[0].mac_policy = MacPolicy::Generate;
    home.host.create_recovery_vm(&spec).await?;
    let machine = home.host.vm(spec.vm).await?;
    assert_ne!(machine.nics[0].mac, point.mac);
    assert!(machine.nics[0].network.starts_with("mcast:239."), "{:?}", machine.nics);
    home.host.start(spec.vm).await?;
    ledger::wait_until_up(&home.site, spec.vm, PATIENCE).await?;

    server.shutdown().await;
    // The test reads everything from the store that the guest has not read yet: it has to wait.
    let waiting = ledger::query(&home.site, spec.vm);
    let back = async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        let server = serve(&socket, &point).await?;
        // What the agent does whenever it serves again.
        home.host.start(spec.vm).await?;
        home.host.hydrate(spec.vm, WhenOff::Wait).await?;
        Ok::<_, anyhow::Error>(server)
    };
    let (verdict, server) = tokio::join!(waiting, back);
    let _server = server?;
    if let Ok(verdict) = verdict {
        assert!(verdict.is_whole(), "{verdict:?}");
    }
    ledger::wait_until_up(&home.site, spec.vm, PATIENCE).await?;
    let verdict = ledger::query(&home.site, spec.vm).await?;
    assert!(verdict.is_whole() && verdict.last >= point.acknowledged as u64, "{verdict:?}");
    assert_eq!(home.host.power(spec.vm).await?, PowerState::Running);

    // Hydration that is cut off by a crash goes on after it.
    home.host.hydrate(spec.vm, WhenOff::Wait).await?;
    home.kill_qemu(spec.vm).await?;
    home.host.start(spec.vm).await?;
    let deadline = Instant::now() + PATIENCE;
    while !home.host.hydrate(spec.vm, WhenOff::Wait).await?.is_complete {
        ensure!(Instant::now() < deadline, "hydration does not end");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    ledger::wait_until_up(&home.site, spec.vm, PATIENCE).await?;
    assert!(ledger::query(&home.site, spec.vm).await?.is_whole());
    home.host.remove_recovery_vm(spec.vm).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn captures_go_on_while_a_vm_hydrates() -> Result<()> {
    let lab = tempfile::tempdir()?;
    let home = Rig::start(lab.path(), "home").await?;
    let vm = ledger_vm();
    home.boot(&vm, 30).await?;
    let mut point = take_point(&home, &vm).await?;
    home.host.power_off(vm.id).await?;
    let socket = socket_of(&home, "store");
    let server = serve(&socket, &point).await?;
    let spec = spec(&point, "web-recovered", &socket);
    // Slower than that it cannot be made: every capture's pause of the disks lets the job run ahead of its limit.
    let host = home.slow_driver(1 << 20)?;
    host.create_recovery_vm(&spec).await?;
    let mut tracker = host.creation_tracker();
    host.start_tracked(spec.vm, &["vda".to_owned(), "vdb".to_owned()], &tracker).await?;
    assert!(!host.hydrate(spec.vm, WhenOff::Wait).await?.is_complete);
    let deadline = Instant::now() + PATIENCE;
    let mut captures_while_hydrating = 0;
    loop {
        let is_complete = host.hydrate(spec.vm, WhenOff::Wait).await?.is_complete;
        let capture = host.begin_capture(spec.vm, request(Some(&tracker))).await?;
        apply(capture.as_ref(), &mut point.copies).await?;
        assert_same(&point.copies, &read_capture(capture.as_ref()).await?);
        tracker = capture.tracker().clone();
        capture.close().await?;
        host.confirm_tracker(spec.vm, &tracker).await?;
        if is_complete {
            break;
        }
        captures_while_hydrating += 1;
        if captures_while_hydrating == 1 {
            home.site.kill().await?;
            home.site.start().await?;
        }
        ensure!(Instant::now() < deadline, "hydration does not end");
    }
    assert!(captures_while_hydrating > 0, "hydration was too fast to prove anything");
    server.shutdown().await;
    ledger::wait_until_up(&home.site, spec.vm, PATIENCE).await?;
    let verdict = ledger::query(&home.site, spec.vm).await?;
    assert!(verdict.is_whole(), "{verdict:?}");
    // A restart needs the store no more.
    host.power_off(spec.vm).await?;
    host.start(spec.vm).await?;
    ledger::wait_until_up(&home.site, spec.vm, PATIENCE).await?;
    assert!(ledger::query(&home.site, spec.vm).await?.is_whole());
    Ok(())
}
