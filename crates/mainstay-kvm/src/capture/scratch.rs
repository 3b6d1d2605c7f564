//! Scratch images of a live capture: what the guest overwrites goes there first.
//!
//! libvirt could have QEMU make them, but then QEMU flushes each five times and is asked three questions more, while its guest
//! waits; and the first write to each half GiB of a disk waits for three flushes more, because a table is added to the image for it. So
//! they are made here, with all tables in them: qcow2 images of version 3, as described by QEMU's `docs/interop/qcow2.rst`. Tables are
//! holes in the file until they are used.
//!
//! ```text
//! cluster 0     the header
//!         1     the table of refcount blocks: one cluster is enough for an image of 16 TiB, and QEMU makes it longer
//!         2…    refcount blocks, as many as what follows needs
//!               the first-level table
//!               second-level tables, each for 512 MiB of the disk: empty
//! ```

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use mainstay_provider::SiteError;

use crate::error::While as _;
use crate::files::{give, remove_file};
use crate::host::Host;

const CLUSTER_BITS: u32 = 16;
const CLUSTER_BYTES: u64 = 1 << CLUSTER_BITS;
/// Each refcount has 2^this bits.
const REFCOUNT_ORDER: u32 = 4;
/// Clusters that one refcount block counts.
const REFCOUNTS: u64 = CLUSTER_BYTES / 2;
/// Entries of a table.
const ENTRIES: u64 = CLUSTER_BYTES / 8;
/// Bytes of the disk to which one second-level table leads.
const TABLE_BYTES: u64 = ENTRIES * CLUSTER_BYTES;
/// In an entry: the refcount of what it leads to is one.
const COPIED: u64 = 1 << 63;
const HEADER_BYTES: u32 = 104;

const EXTENSION: &str = "scratch";

/// Where a disk's scratch image lies in the directory of a capture.
pub(super) fn path(run: &Path, key: &str) -> PathBuf {
    run.join(format!("{key}.{EXTENSION}"))
}

/// Frees the space of a capture whose view has ended: libvirt leaves images alone that it has not made. A guest that was paused
/// for want of space must not go on before.
pub(super) fn remove_all(run: &Path) -> Result<(), SiteError> {
    let entries = match std::fs::read_dir(run) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.doing(&format!("looking into {}", run.display()))?,
    };
    for entry in entries {
        let path = entry.doing(&format!("looking into {}", run.display()))?.path();
        if path.extension().is_some_and(|extension| extension == EXTENSION) {
            remove_file(&path)?;
        }
    }
    Ok(())
}

/// Makes an empty image for a disk of that size.
pub(super) async fn make(host: &Host, image: &Path, size_bytes: u64) -> Result<(), SiteError> {
    write_empty(image, size_bytes).doing(&format!("making {}", image.display()))?;
    give(image, host.owner().await?)
}

/// A few writes into a new file: a thread of its own would take longer.
fn write_empty(image: &Path, size_bytes: u64) -> io::Result<()> {
    let tables = size_bytes.div_ceil(TABLE_BYTES);
    let first_level = tables.div_ceil(ENTRIES);
    // Blocks count themselves, too.
    let mut blocks = 1;
    while blocks * REFCOUNTS < 2 + blocks + first_level + tables {
        blocks += 1;
    }
    let clusters = 2 + blocks + first_level + tables;
    if blocks > ENTRIES {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the disk is too large for an image"));
    }
    let at = |cluster: u64| cluster * CLUSTER_BYTES;

    let mut header = Vec::with_capacity(HEADER_BYTES as usize);
    header.extend_from_slice(b"QFI\xfb");
    header.extend_from_slice(&3_u32.to_be_bytes());
    // No backing file: who opens the image says what lies beneath it.
    header.extend_from_slice(&[0; 12]);
    header.extend_from_slice(&CLUSTER_BITS.to_be_bytes());
    header.extend_from_slice(&size_bytes.to_be_bytes());
    // Not encrypted.
    header.extend_from_slice(&0_u32.to_be_bytes());
    let tables_u32 = u32::try_from(tables).map_err(io::Error::other)?;
    header.extend_from_slice(&tables_u32.to_be_bytes());
    header.extend_from_slice(&at(2 + blocks).to_be_bytes());
    header.extend_from_slice(&at(1).to_be_bytes());
    header.extend_from_slice(&1_u32.to_be_bytes());
    // No snapshots, no features.
    header.extend_from_slice(&[0; 12 + 24]);
    header.extend_from_slice(&REFCOUNT_ORDER.to_be_bytes());
    header.extend_from_slice(&HEADER_BYTES.to_be_bytes());

    let block_table: Vec<u8> = (2..2 + blocks).flat_map(|cluster| at(cluster).to_be_bytes()).collect();
    let refcounts: Vec<u8> = (0..clusters).flat_map(|_| 1_u16.to_be_bytes()).collect();
    let first_table = clusters - tables;
    let entries: Vec<u8> =
        (first_table..clusters).flat_map(|cluster| (at(cluster) | COPIED).to_be_bytes()).collect();

    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(image)?;
    file.set_len(at(clusters))?;
    file.write_all_at(&header, 0)?;
    file.write_all_at(&block_table, at(1))?;
    file.write_all_at(&refcounts, at(2))?;
    file.write_all_at(&entries, at(2 + blocks))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn qemu(program: &str, arguments: &[&str]) -> String {
        let output = Command::new(program).args(arguments).output().expect("QEMU's tools");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{program} {arguments:?}: {text}{output:?}");
        text
    }

    #[test]
    fn qemu_takes_the_images_for_whole_and_empty() {
        let directory = tempfile::tempdir().unwrap();
        // The last one needs two refcount blocks and five clusters of first-level table.
        for size in [0, 512, 1 << 20, TABLE_BYTES, TABLE_BYTES + 512, 17 << 40] {
            let image = directory.path().join(format!("{size}.qcow2"));
            write_empty(&image, size).unwrap();
            let image = image.to_str().unwrap();
            qemu("qemu-img", &["check", "-q", "-f", "qcow2", image]);
            let info: serde_json::Value =
                serde_json::from_str(&qemu("qemu-img", &["info", "--output=json", image])).unwrap();
            assert_eq!((&info["format"], &info["virtual-size"]), (&"qcow2".into(), &size.into()));
            // A map of the largest takes a minute.
            if size < 1 << 40 {
                let map: serde_json::Value =
                    serde_json::from_str(&qemu("qemu-img", &["map", "--output=json", image])).unwrap();
                assert!(map.as_array().unwrap().iter().all(|range| range["present"] == false), "{map}");
            }
            // Of its tables nothing is on the disk yet.
            assert!(info["actual-size"].as_u64().unwrap() < 2 << 20, "{info}");
        }
    }

    /// What is not written is read from what QEMU is told lies beneath, on both sides of the end of a table.
    #[test]
    fn what_is_written_lies_over_what_is_beneath() {
        let directory = tempfile::tempdir().unwrap();
        let text = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let (beneath, scratch) = (text("beneath"), text("scratch"));
        let size = TABLE_BYTES * 2;
        qemu("qemu-img", &["create", "-q", "-f", "qcow2", &beneath, &size.to_string()]);
        qemu(
            "qemu-io",
            &["-f", "qcow2", "-c", &format!("write -P 1 {} 1M", TABLE_BYTES - (512 << 10)), &beneath],
        );
        write_empty(Path::new(&scratch), size).unwrap();
        let options = format!(
            "driver=qcow2,file.filename={scratch},backing.driver=qcow2,backing.file.filename={beneath}"
        );
        let io = |command: String| qemu("qemu-io", &["--image-opts", "-c", &command, &options]);
        for offset in [TABLE_BYTES - 65536, TABLE_BYTES] {
            io(format!("write -P 2 {offset} 4096"));
        }
        let reads = [
            (0, 4096, 0),
            (TABLE_BYTES - (512 << 10), (512 << 10) - 65536, 1),
            (TABLE_BYTES - 65536, 4096, 2),
            (TABLE_BYTES - 65536 + 4096, 65536 - 4096, 1),
            (TABLE_BYTES, 4096, 2),
            (TABLE_BYTES + 4096, 65536, 1),
        ];
        for (offset, length, pattern) in reads {
            let told = io(format!("read -P {pattern} {offset} {length}"));
            assert!(!told.contains("verification failed"), "{offset}: {told}");
        }
        qemu("qemu-img", &["check", "-q", "-f", "qcow2", &scratch]);
    }
}
