//! Initial replication of a VM's disk, against tools that copy the same disk from the same kind of view.
//!
//! Ours is the whole product: request, capture, compare, compress, mutual TLS, store, durable, recovery point listed. The
//! peers read a libvirt pull-mode backup of the same running VM over NBD and write a raw file on the same file system;
//! their time begins when the view is open and ends when the file is synced. The source is in the page cache for all.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use mainstay_lab::{DiskImage, HOME, Item, LedgerCopy, LedgerVm};
use reqwest::Method;
use serde_json::json;

use crate::{
    data::Random,
    figure::{Figure, median, short, spread},
    output::note,
    stand::{GUEST_TIMEOUT, Scale, Stand, bytes_moved},
    tool,
};

const VM: &str = "copied";
/// The guest's own file system; all behind it is data.
const FILE_SYSTEM_MIB: u64 = 64;
/// Bytes written at once when the disk is filled.
const PIECE_BYTES: usize = 1 << 20;
const LOOK: Duration = Duration::from_millis(20);

pub(crate) async fn measure(dir: &Path, scale: Scale) -> Result<Vec<Figure>> {
    let disk_mib = scale.pick(3072, 512);
    let rounds = scale.pick(3, 1);
    Stand::with(dir, async |stand| {
        let vm = LedgerVm {
            disks: vec![DiskImage::Qcow2],
            disk_mib,
            file_system_mib: Some(FILE_SYSTEM_MIB),
            options: "ledger.rate=1 ledger.ring_mib=4".to_owned(),
            network: Some(stand.lab.network(HOME)?),
            ..LedgerVm::new(VM)
        };
        let image = vm.disk_path(stand.lab.site(HOME)?, 0);
        stand
            .lab
            .add(&vm, &|_, file| {
                use std::os::unix::fs::FileExt as _;
                let mut random = Random::new(2);
                let mut piece = vec![0; PIECE_BYTES];
                for at in FILE_SYSTEM_MIB..disk_mib {
                    random.mixed(&mut piece);
                    file.write_all_at(&piece, at << 20)?;
                }
                Ok(())
            })
            .await?;
        stand.lab.ledger(VM, LedgerCopy::Active, GUEST_TIMEOUT).await?;
        let bytes = ((disk_mib - FILE_SYSTEM_MIB) << 20) as f64;
        let mut rates = [Vec::new(), Vec::new(), Vec::new()];
        let mut compressed = 0.0;
        for round in 1..=rounds {
            warm(&image)?;
            let (seconds, moved) = ours(stand).await?;
            compressed = moved as f64 / bytes;
            let mut times = vec![seconds];
            for peer in ["nbdcopy", "qemu-img"] {
                warm(&image)?;
                times.push(copy(stand, peer).await?);
            }
            note(&format!("round {round}: ours, nbdcopy, qemu-img convert: {times:.1?} s"));
            for (rates, seconds) in rates.iter_mut().zip(times) {
                rates.push(bytes / seconds / 1e6);
            }
        }
        let [ours, peers @ ..] = &rates;
        let middle = |rates: &[f64]| median(rates).unwrap_or(f64::NAN);
        let figure = |name: &str, peer: &[f64]| Figure {
            name: format!("initial-replication-vs-{name}"),
            value: middle(ours),
            unit: "MB/s",
            peer: Some(middle(peer)),
            ratio: middle(ours) / middle(peer),
            aim: 0.8,
            accept: 0.5,
            note: format!(
                "medians of {rounds}, ours {}, peer {} MB/s; {} GiB of which {} went over the wire",
                spread(ours),
                spread(peer),
                short(bytes / f64::from(1 << 30)),
                short(compressed)
            ),
        };
        Ok(vec![figure("nbdcopy", &peers[0]), figure("qemu-img", &peers[1])])
    })
    .await
}

/// Brings the source into the page cache, and what was written before onto the disk: neither is to be part of what is
/// measured next.
fn warm(image: &Path) -> Result<()> {
    std::io::copy(&mut std::fs::File::open(image)?, &mut std::io::sink())?;
    nix::unistd::sync();
    Ok(())
}

/// Protects the VM; from the request to the first recovery point. Then forgets it again.
async fn ours(stand: &Stand) -> Result<(f64, u64)> {
    let begun = Instant::now();
    let item = Item::protect_under(&stand.lab, VM, "initial", 3600, 0).await?;
    while item.points().await?.is_empty() {
        tokio::time::sleep(LOOK).await;
        if begun.elapsed() > GUEST_TIMEOUT * 4 {
            bail!("no recovery point came: {:?}", item.show().await?.health_errors);
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    item.wait("protection", |item| item.protection_state == "Protected").await?;
    let moved = bytes_moved(&item).await?;
    let body = json!({ "properties": { "disableProtectionReason": "NotSpecified" } });
    item.run(Method::POST, "remove", &body).await?;
    Ok((seconds, moved))
}

/// Has a peer copy the disk, to the end of the sync.
async fn copy(stand: &Stand, peer: &str) -> Result<f64> {
    let view = View::open(stand).await?;
    let target = stand.beside("copies")?.join("copy.raw");
    let (uri, to) = (format!("nbd+unix:///vda?socket={}", view.socket.display()), tool::text(&target)?);
    let begun = Instant::now();
    match peer {
        "nbdcopy" => tool::run("nbdcopy", &["--flush", &uri, to]).await?,
        _ => tool::run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, to]).await?,
    };
    let file = std::fs::OpenOptions::new().write(true).open(&target)?;
    file.sync_all()?;
    let seconds = begun.elapsed().as_secs_f64();
    ensure!(file.metadata()?.len() >= 1 << 20, "{peer} copied nothing");
    view.close(stand).await?;
    std::fs::remove_file(&target)?;
    Ok(seconds)
}

/// A libvirt pull-mode backup of the VM's disk.
struct View {
    socket: PathBuf,
}

impl View {
    async fn open(stand: &Stand) -> Result<Self> {
        let site = stand.lab.site(HOME)?;
        // Short: the name of a socket ends at 107 bytes.
        let socket = site.driver_directory_short().join("peer.sock");
        let scratch = site.driver_directory().join("peer.scratch");
        let description = stand.beside("views")?.join("backup.xml");
        std::fs::write(
            &description,
            format!(
                "<domainbackup mode='pull'><server transport='unix' socket='{}'/><disks><disk name='vda' backup='yes' \
                 type='file'><driver type='qcow2'/><scratch file='{}'/></disk></disks></domainbackup>",
                socket.display(),
                scratch.display()
            ),
        )?;
        tool::run("virsh", &["-c", site.uri(), "backup-begin", VM, tool::text(&description)?]).await?;
        Ok(Self { socket })
    }

    async fn close(self, stand: &Stand) -> Result<()> {
        let site = stand.lab.site(HOME)?;
        tool::run("virsh", &["-c", site.uri(), "domjobabort", VM]).await?;
        // The job ends a moment after it was told to.
        let deadline = Instant::now() + GUEST_TIMEOUT;
        while !tool::run("virsh", &["-c", site.uri(), "domjobinfo", VM]).await?.contains("None") {
            ensure!(Instant::now() < deadline, "the backup does not end");
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }
}
