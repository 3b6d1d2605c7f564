//! Bytes over the wire for each changed byte, with random writes of 4 KiB that cannot be compressed; beside the bytes that
//! an incremental `virtnbdbackup` of the same writes copies.

use std::{path::Path, time::Duration};

use anyhow::{Result, ensure};
use mainstay_lab::{HOME, Images, Lab};

use crate::{
    figure::Figure,
    stand::{Scale, Stand, bytes_moved, now_ms, point_after, protect},
    tool,
};

const VM: &str = "written";
/// Long enough that virtnbdbackup, which the VM can serve only while no capture is open, ends between two cycles.
const COPY_FREQUENCY_SECONDS: u32 = 60;

pub(crate) async fn measure(dir: &Path, scale: Scale) -> Result<Vec<Figure>> {
    // One block of sixteen is written: neither side can profit from neighbours that happen to be written too.
    let (file_mib, blocks) = scale.pick((256, 4096), (32, 512));
    Stand::with(dir, async |stand| {
        stand.filled_guest(VM, 1, file_mib, file_mib * 2).await?;
        let item = protect(&stand.lab, VM, COPY_FREQUENCY_SECONDS).await?;
        let images = Images::open(&stand.lab, item.status().await?.id.parse()?)?;

        let full = item.points().await?.last().copied();
        backup(&stand.lab, stand.beside("backup")?.as_path(), "full").await?;
        let before = point_after(&item, full.map_or(0, |point| point.time_ms)).await?;
        let moved_before = bytes_moved(&item).await?;
        let peer_before = tool::bytes_in(&stand.beside("backup")?)?;

        stand.load(VM, &format!("scatter {blocks}"), Duration::from_millis(500)).await?;
        let written_ms = now_ms();
        backup(&stand.lab, stand.beside("backup")?.as_path(), "inc").await?;
        let after = point_after(&item, written_ms).await?;
        let moved = (bytes_moved(&item).await? - moved_before) as f64;
        let peer = (tool::bytes_in(&stand.beside("backup")?)? - peer_before) as f64;

        let image = images.read(before.id).await?;
        let changed = images.read(after.id).await?.bytes_changed_since(Some(&image)) as f64;
        ensure!(changed >= f64::from(blocks) * 4096.0 * 0.9, "only {changed} bytes changed");
        Ok(vec![Figure {
            name: "wire-per-changed-byte".to_owned(),
            value: moved / changed,
            unit: "bytes",
            peer: Some(peer / changed),
            ratio: moved / changed,
            aim: 1.05,
            accept: 1.3,
            note: format!(
                "{blocks} random writes of 4 KiB in {file_mib} MiB, {:.1} MB of distinct blocks changed; peer: virtnbdbackup, incremental",
                changed / 1e6
            ),
        }])
    })
    .await
}

/// Runs virtnbdbackup. It makes libvirt checkpoints, which live beside our trackers.
async fn backup(lab: &Lab, to: &Path, level: &str) -> Result<()> {
    let site = lab.site(HOME)?;
    let (scratch, socket) = (site.driver_directory(), site.driver_directory_short().join("peer.sock"));
    tool::run(
        "virtnbdbackup",
        &[
            "-U",
            site.uri(),
            "-d",
            VM,
            "-l",
            level,
            "-o",
            tool::text(to)?,
            "-S",
            tool::text(&scratch)?,
            "-f",
            tool::text(&socket)?,
            "--noprogress",
        ],
    )
    .await
    .map(drop)
}
