//! What the tests with real virtual machines stand on.

#![expect(dead_code, reason = "every test program uses its own part of it")]

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use mainstay_block::{BlockDevice, MemoryDevice};
use mainstay_kvm::{KvmHost, KvmOptions};
use mainstay_lab::{GuestImages, LedgerVm, Site, ledger};
use mainstay_model::{CaptureId, VmId};
use mainstay_provider::{
    Capture, CaptureLimits, CaptureRequest, Changed, Hypervisor as _, PowerState, TrackerId,
};

/// How long anything may take. Far more than it does: the machine may be busy with other things.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);
const PIECE_BYTES: u64 = 1 << 20;

/// A site with its driver. Its machines end with it, also when a test fails.
pub(crate) struct Rig {
    pub(crate) site: Site,
    pub(crate) host: KvmHost,
}

impl Rig {
    pub(crate) async fn start(lab: &std::path::Path, name: &str) -> Result<Self> {
        let site = Site::open(lab, name).await?;
        site.start().await?;
        let options = KvmOptions {
            uri: site.uri().to_owned(),
            directory: site.driver_directory_short(),
            socket_directory: None,
            networks: Vec::new(),
            hydration_bytes_per_second: None,
        };
        Ok(Self { host: KvmHost::open(options)?, site })
    }

    /// A driver as after a restart of the agent.
    pub(crate) fn restarted_driver(&self) -> Result<KvmHost> {
        let options = KvmOptions {
            uri: self.site.uri().to_owned(),
            directory: self.site.driver_directory_short(),
            socket_directory: None,
            networks: Vec::new(),
            hydration_bytes_per_second: None,
        };
        Ok(KvmHost::open(options)?)
    }

    /// A driver that copies recovery VMs' disks out of the store slowly.
    pub(crate) fn slow_driver(&self, bytes_per_second: u64) -> Result<KvmHost> {
        let options = KvmOptions {
            uri: self.site.uri().to_owned(),
            directory: self.site.driver_directory_short(),
            socket_directory: None,
            networks: Vec::new(),
            hydration_bytes_per_second: Some(bytes_per_second),
        };
        Ok(KvmHost::open(options)?)
    }

    /// Makes a guest, starts it and waits until it has written `records`.
    pub(crate) async fn boot(&self, vm: &LedgerVm, records: usize) -> Result<()> {
        vm.create(&self.site, &GuestImages::find()?).await?;
        self.host.start(vm.id).await?;
        self.wait_for_records(vm, records).await?;
        ledger::wait_until_up(&self.site, vm.id, PATIENCE).await?;
        Ok(())
    }

    pub(crate) fn records(&self, vm: &LedgerVm) -> usize {
        let text = std::fs::read_to_string(self.site.acks().join(&vm.name)).unwrap_or_default();
        text.lines().filter(|line| line.starts_with("A ")).count()
    }

    pub(crate) async fn wait_for_records(&self, vm: &LedgerVm, count: usize) -> Result<()> {
        ledger::wait_for_acknowledgements(&self.site.acks().join(&vm.name), count, PATIENCE).await
    }

    /// Waits until the guest has written some more.
    pub(crate) async fn let_write(&self, vm: &LedgerVm, more: usize) -> Result<()> {
        self.wait_for_records(vm, self.records(vm) + more).await
    }

    /// Ends the machine's process as a crash of the host would.
    pub(crate) async fn kill_qemu(&self, vm: VmId) -> Result<()> {
        self.site.kill_vm(vm).await
    }

    pub(crate) async fn wait_for_power(&self, vm: VmId, power: PowerState) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.host.power(vm).await? != power {
            ensure!(Instant::now() < deadline, "the VM does not become {power:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// What an administrator does with the site's libvirt.
    pub(crate) fn virsh(&self, arguments: &[&str]) -> Result<()> {
        let output = Command::new("virsh").args(["-q", "-c", self.site.uri()]).args(arguments).output()?;
        ensure!(output.status.success(), "virsh {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Our bitmaps on all of a running VM's nodes.
    pub(crate) async fn bitmaps(&self, vm: VmId) -> Result<Vec<String>> {
        let nodes =
            self.host.libvirt().qmp(vm, "query-named-block-nodes", serde_json::json!({"flat": true})).await?;
        let mut names = Vec::new();
        for node in nodes.as_array().context("no nodes")? {
            for bitmap in node["dirty-bitmaps"].as_array().map(Vec::as_slice).unwrap_or_default() {
                names.push(bitmap["name"].as_str().unwrap_or_default().to_owned());
            }
        }
        names.sort();
        Ok(names)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.site.cut_power();
        // A link that stays is no reason to fail a test that has passed.
        let _ = self.site.forget();
    }
}

/// Asks for a capture of both disks.
pub(crate) fn request(since: Option<&TrackerId>) -> CaptureRequest {
    CaptureRequest {
        capture: CaptureId(uuid::Uuid::new_v4()),
        disks: vec!["vda".to_owned(), "vdb".to_owned()],
        since: since.cloned(),
        freeze_timeout: None,
        limits: CaptureLimits { scratch_bytes_max: 1 << 30, age_max: PATIENCE },
    }
}

/// All bytes of a device.
pub(crate) async fn read_all(device: &dyn BlockDevice) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(device.size() as usize);
    while (bytes.len() as u64) < device.size() {
        let at = bytes.len() as u64;
        bytes.extend_from_slice(&device.read(at, PIECE_BYTES.min(device.size() - at)).await?);
    }
    Ok(bytes)
}

/// Reads every disk of a capture in full.
pub(crate) async fn read_capture(capture: &dyn Capture) -> Result<Vec<Vec<u8>>> {
    let mut disks = Vec::new();
    for disk in capture.disks() {
        disks.push(read_all(disk.device.as_ref()).await?);
    }
    Ok(disks)
}

/// Brings older copies of the disks up to date by reading only what the capture says has changed. Answers the bytes read.
pub(crate) async fn apply(capture: &dyn Capture, copies: &mut [Vec<u8>]) -> Result<u64> {
    let unknown = capture.disks().iter().find(|disk| !matches!(disk.changed, Changed::Since(_)));
    if let Some(disk) = unknown {
        bail!("disk {}: {:?}", disk.key, disk.changed);
    }
    apply_all(capture, copies).await
}

/// As [`apply`]; a disk of which it is not known what changed is read whole.
pub(crate) async fn apply_all(capture: &dyn Capture, copies: &mut [Vec<u8>]) -> Result<u64> {
    let mut total = 0;
    for (disk, copy) in capture.disks().iter().zip(copies) {
        let whole = 0..disk.device.size();
        let ranges = match &disk.changed {
            Changed::Since(ranges) => ranges.clone(),
            Changed::Unknown { .. } => vec![whole],
        };
        for range in ranges {
            let bytes = disk.device.read(range.start, range.end - range.start).await?;
            copy[range.start as usize..range.end as usize].copy_from_slice(&bytes);
            total += bytes.len() as u64;
        }
    }
    Ok(total)
}

/// A device in memory that holds these bytes.
pub(crate) async fn memory(bytes: &[u8]) -> Result<Arc<MemoryDevice>> {
    let device = Arc::new(MemoryDevice::new(bytes.len() as u64));
    device.write(0, Bytes::copy_from_slice(bytes)).await?;
    Ok(device)
}

/// Whether copies are the same; the disks are too large to be printed.
pub(crate) fn assert_same(found: &[Vec<u8>], wanted: &[Vec<u8>]) {
    assert_eq!(found.len(), wanted.len());
    for (index, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let blocks = found.chunks(4096).zip(wanted.chunks(4096)).enumerate();
        let different: Vec<usize> = blocks.filter(|(_, (a, b))| a != b).map(|(block, _)| block).collect();
        assert!(different.is_empty(), "disk {index} differs in blocks {different:?}");
    }
}
