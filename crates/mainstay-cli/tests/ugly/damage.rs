//! The medium of the store flips bits: what is damaged is found, marked and sent again, and the VM is recovered whole.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use mainstay_lab::{HOME, LabAction, LedgerCopy, RECOVERY};

use crate::support::{World, eventually};

const MIB: u64 = 1 << 20;
/// Incompressible bytes that are replicated before anything is damaged: a full copy moves them again.
const CONTENT_MIB: u64 = 24;

/// Flips a bit in the middle of every object of the store; answers how many there are of each kind.
fn flip_all(store: &Path) -> Result<Vec<(String, usize)>> {
    let mut kinds: Vec<(String, usize)> = Vec::new();
    let mut directories = vec![store.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory)? {
            let path = entry?.path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            flip(&path)?;
            let kind = kind_of(&path);
            match kinds.iter_mut().find(|(known, _)| *known == kind) {
                Some((_, count)) => *count += 1,
                None => kinds.push((kind, 1)),
            }
        }
    }
    Ok(kinds)
}

fn kind_of(path: &Path) -> String {
    let kinds = ["segment", "map", "definition", "manifest", "catalogue"];
    let parts: Vec<_> =
        path.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
    kinds.into_iter().find(|kind| parts.iter().any(|part| part == kind)).unwrap_or("other").to_owned()
}

fn flip(path: &Path) -> Result<()> {
    let mut bytes = std::fs::read(path)?;
    let middle = bytes.len() / 2;
    if let Some(byte) = bytes.get_mut(middle) {
        *byte ^= 0x40;
    }
    // In place, as a medium does it.
    std::fs::write(path, bytes).with_context(|| format!("writing {}", path.display()))
}

fn store(world: &World) -> PathBuf {
    world.lab.dir().join("server").join("store")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flipped_bits_are_found_and_what_the_source_has_is_sent_again() -> Result<()> {
    let mut world = World::up("damage").await?;
    let mut vm = world.guest("vm1", "ledger.rate=20")?;
    vm.disk_mib = 128;
    world.protect(&vm).await?;
    world.write_random("vm1", "content", CONTENT_MIB).await?;
    let digest = world.in_guest("vm1", LedgerCopy::Active, "md5sum /ledger1/content").await?;
    world.wait_point("vm1").await?;

    // What the server has read is in its memory; it has to read anew.
    world.lab.act(LabAction::Stop, "server").await?;
    let kinds = flip_all(&store(&world))?;
    for kind in ["segment", "map", "definition", "manifest", "catalogue"] {
        ensure!(kinds.iter().any(|(found, _)| found == kind), "no {kind} in {kinds:?}");
    }
    let segments = kinds.iter().find(|(kind, _)| kind == "segment").map_or(0, |(_, count)| *count);
    ensure!(segments > 1, "{kinds:?}");
    world.lab.act(LabAction::Start, "server").await?;
    for site in [HOME, RECOVERY] {
        world.lab.wait_connected(site).await?;
    }
    let moved = world.status("vm1").await?.bytes_moved;

    let told = world.cli(&["scrub", "start", "vm1", "--json"]);
    ensure!([0, 1].contains(&told.code), "{told:?}");
    let scrub = told.json()?;
    ensure!(scrub["mended"].as_u64() > Some(0), "nothing was mended: {scrub}");
    let event = world.wait_event("ReplicaDamaged", "vm1").await?;
    ensure!(["Critical", "Warning"].contains(&event["severity"].as_str().unwrap_or_default()), "{event}");

    // Whatever is still marked is older than what was sent again.
    let newest = eventually("the newest recovery point is whole", async || {
        let scrub = world.cli(&["scrub", "show", "vm1", "--json"]).expect(0).json()?;
        ensure!(scrub["isRepairPending"] == false && scrub["state"] == "Idle", "{scrub}");
        let newest = world.points("vm1")?.first().cloned().context("a recovery point")?;
        let marked = scrub["damagedPoints"].as_array().context("a list")?;
        ensure!(marked.iter().all(|point| *point != newest.as_str()), "{scrub}");
        Ok(newest)
    })
    .await?;
    let again = world.status("vm1").await?.bytes_moved - moved;
    ensure!(again < CONTENT_MIB * MIB / 2, "{again} bytes were moved for {segments} flips in segments");
    world.wait_item("vm1", "is not critical", |item| item["replicationHealth"] != "Critical").await?;

    // The source is lost: every byte comes from the store.
    world.lab.site(HOME)?.lose_power().await?;
    world.lab.act(LabAction::Kill, "agent:home").await?;
    world.cli(&["failover", "vm1", "--recovery-point", &newest, "--no-shutdown-source"]).expect(0);
    world.whole("vm1", RECOVERY).await?;
    let recovered = world.in_guest("vm1", LedgerCopy::Active, "md5sum /ledger1/content").await?;
    assert_eq!(recovered, digest, "the recovered VM reads something else");
    world.proved()
}
