//! The ledger guest as a virtual machine.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use mainstay_kvm::hardware_acceleration;
use mainstay_model::VmId;
use tokio::process::Command;

use crate::site::Site;

/// What the kernel need not do in a guest that boots hundreds of times under emulation: patch itself against the leaks of
/// processors that are not there, try its own ciphers, clear memory before its use, and measure clocks.
const QUICK_BOOT: &str =
    "quiet mitigations=off cryptomgr.notests init_on_alloc=0 tsc=reliable no_timer_check random.trust_cpu=on";

/// The processor of emulated guests: the usual one, which has no random numbers, so that a guest takes two seconds to find some, and those.
const EMULATED: &str =
    "<cpu mode='custom'><model>qemu64</model><feature policy='require' name='rdrand'/></cpu>";

/// Kernel and initramfs of the ledger guest, as `cargo xtask guest` makes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestImages {
    kernel: PathBuf,
    initrd: PathBuf,
}

impl GuestImages {
    /// The images in a directory.
    pub fn in_directory(directory: &Path) -> Result<Self> {
        let images = Self { kernel: directory.join("vmlinuz"), initrd: directory.join("initrd.img") };
        for path in [&images.kernel, &images.initrd] {
            if !path.exists() {
                bail!("{} is missing; make it with `cargo xtask guest`", path.display());
            }
        }
        Ok(images)
    }

    /// Copies of the images in another directory, readable for everybody.
    pub fn install(&self, directory: &Path) -> Result<Self> {
        use std::os::unix::fs::PermissionsExt as _;
        fs::create_dir_all(directory)?;
        for (from, name) in [(&self.kernel, "vmlinuz"), (&self.initrd, "initrd.img")] {
            let to = directory.join(name);
            fs::copy(from, &to).with_context(|| format!("copy {}", from.display()))?;
            fs::set_permissions(&to, fs::Permissions::from_mode(0o644))?;
        }
        Self::in_directory(directory)
    }

    /// The images in `$MAINSTAY_GUEST_DIR`, or in the repository this was built from.
    pub fn find() -> Result<Self> {
        if let Some(directory) = std::env::var_os("MAINSTAY_GUEST_DIR") {
            return Self::in_directory(Path::new(&directory));
        }
        let crate_directory = Path::new(env!("CARGO_MANIFEST_DIR"));
        let repository = crate_directory.ancestors().nth(2).context("the crate lies outside a repository")?;
        Self::in_directory(&repository.join(".cache/guest"))
    }
}

/// The format of a ledger disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskImage {
    /// A sparse file.
    Raw,
    /// QEMU's format.
    Qcow2,
}

impl DiskImage {
    fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Writes to the raw image of a new disk, by the disk's index.
pub type Fill<'a> = &'a (dyn Fn(usize, &fs::File) -> io::Result<()> + Sync);

/// A ledger guest to be made.
#[derive(Clone, Debug)]
pub struct LedgerVm {
    /// Its name, also that of its file of acknowledgements.
    pub name: String,
    /// Its identity.
    pub id: VmId,
    /// One or two disks; the ledger keeps a copy on each.
    pub disks: Vec<DiskImage>,
    /// Size of each disk.
    pub disk_mib: u64,
    /// Size of the file system in it, when it shall not fill the disk. The guest never touches what lies behind it.
    pub file_system_mib: Option<u64>,
    /// More words for the kernel's command line, such as `ledger.rate=50 ledger.churn_kib=256`.
    pub options: String,
    /// The multicast group (`address:port`) that stands for the site's production network.
    pub network: Option<String>,
    /// Boot with UEFI firmware, and have a TPM.
    pub has_uefi_and_tpm: bool,
}

impl LedgerVm {
    /// A guest with two qcow2 disks of 64 MiB and no network.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            id: VmId(uuid::Uuid::new_v4()),
            disks: vec![DiskImage::Qcow2; 2],
            disk_mib: 64,
            file_system_mib: None,
            options: String::new(),
            network: None,
            has_uefi_and_tpm: false,
        }
    }

    /// Makes the disks and defines the machine, without starting it.
    pub async fn create(&self, site: &Site, images: &GuestImages) -> Result<()> {
        self.create_with(site, images, &|_, _| Ok(())).await
    }

    /// As [`Self::create`]; `fill` may write to the raw image of each disk, by index, behind its file system.
    pub async fn create_with(&self, site: &Site, images: &GuestImages, fill: Fill<'_>) -> Result<()> {
        let mut disks = String::new();
        for (index, format) in self.disks.iter().enumerate() {
            let key = ["vda", "vdb"].get(index).context("the ledger guest has at most two disks")?;
            let path = self.disk_path(site, index);
            self.make_disk(*format, &path, &|file| fill(index, file)).await?;
            site.account().give(&path)?;
            disks.push_str(&format!(
                "<disk type='file' device='disk'><driver name='qemu' type='{}' discard='unmap'/>\
                 <source file='{}'/><target dev='{key}' bus='virtio'/></disk>",
                format.name(),
                path.display(),
            ));
        }
        let xml = self.xml(site, images, &disks).await?;
        site.libvirt().define(xml).await?;
        Ok(())
    }

    /// Where a disk lies.
    pub fn disk_path(&self, site: &Site, index: usize) -> PathBuf {
        let format = self.disks.get(index).map_or("none", |format| format.name());
        site.images().join(format!("{}-{index}.{format}", self.name))
    }

    async fn make_disk(
        &self,
        format: DiskImage,
        path: &Path,
        fill: &(dyn Fn(&fs::File) -> io::Result<()> + Sync),
    ) -> Result<()> {
        let raw = path.with_extension("new");
        let file = fs::File::create(&raw)?;
        file.set_len(self.disk_mib * 1024 * 1024)?;
        // Not in an ordinary user's path.
        let mut mke2fs = Command::new("/usr/sbin/mke2fs");
        mke2fs.args(["-q", "-F", "-t", "ext4"]).arg(&raw);
        if let Some(mib) = self.file_system_mib {
            mke2fs.arg(format!("{mib}M"));
        }
        run(&mut mke2fs).await?;
        fill(&file).with_context(|| format!("filling {}", raw.display()))?;
        if format == DiskImage::Raw {
            fs::rename(&raw, path)?;
        } else {
            run(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&raw).arg(path))
                .await?;
            fs::remove_file(&raw)?;
        }
        Ok(())
    }

    async fn xml(&self, site: &Site, images: &GuestImages, disks: &str) -> Result<String> {
        let (domain_type, processor) = match hardware_acceleration().await {
            // libvirt's choice: not every host can run the model below.
            Ok(_) => ("kvm", ""),
            Err(_) => ("qemu", EMULATED),
        };
        let interface = match &self.network {
            Some(group) => {
                let (address, port) = group.split_once(':').context("a group is ADDRESS:PORT")?;
                format!(
                    "<interface type='mcast'><source address='{address}' port='{port}'/>\
                     <model type='virtio'/></interface>"
                )
            }
            None => String::new(),
        };
        // UEFI firmware keeps tens of MiB for itself, and needs room for kernel and initramfs twice while it loads them.
        let (memory_mib, firmware, secure_boot, tpm) = if self.has_uefi_and_tpm {
            (
                512,
                " firmware='efi'",
                "<firmware><feature enabled='no' name='secure-boot'/></firmware>",
                "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>",
            )
        } else {
            (192, "", "", "")
        };
        Ok(format!(
            "<domain type='{domain_type}'><name>{name}</name><uuid>{id}</uuid>\
             <memory unit='MiB'>{memory_mib}</memory><vcpu>1</vcpu>\
             <os{firmware}><type arch='x86_64' machine='q35'>hvm</type>{secure_boot}<kernel>{kernel}</kernel><initrd>{initrd}</initrd>\
             <cmdline>console=ttyS0 panic=1 {QUICK_BOOT} {options}</cmdline></os>\
             {processor}\
             <features><acpi/></features><clock offset='utc'/><on_reboot>restart</on_reboot><devices>{disks}{interface}{tpm}\
             <channel type='file'><source path='{acks}' append='on'/><target type='virtio' name='ledger'/></channel>\
             <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
             <serial type='pty'><log file='{console}' append='on'/><target port='0'/></serial>\
             <controller type='usb' model='none'/><memballoon model='none'/></devices></domain>",
            name = self.name,
            id = self.id,
            kernel = images.kernel.display(),
            initrd = images.initrd.display(),
            options = self.options,
            acks = site.acks().join(&self.name).display(),
            console = site.console(&self.name).display(),
        ))
    }
}

async fn run(command: &mut Command) -> Result<()> {
    let name = command.as_std().get_program().to_string_lossy().into_owned();
    let output = command.output().await.with_context(|| format!("starting {name}"))?;
    if !output.status.success() {
        bail!("{name} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
