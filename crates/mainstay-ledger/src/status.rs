//! `ledger status`: one JSON object about the disks, for the host to read through the guest agent.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::verify::{DISKS, DiskState, disks_agree};
use crate::writer::{FOUND_PATH, LOCK_PATH};

/// Reads and judges everything, and prints it.
pub(crate) fn print() -> io::Result<()> {
    let found: Value = serde_json::from_str(&fs::read_to_string(FOUND_PATH)?)?;
    let lock = File::open(LOCK_PATH)?;
    lock.lock()?;
    // The point is what the disks hold, not what the page cache remembers.
    fs::write("/proc/sys/vm/drop_caches", "1")?;
    let first = DiskState::read(Path::new(DISKS[0]))?;
    let second_path = PathBuf::from(DISKS[1]);
    let second =
        if second_path.join("ledger").exists() { Some(DiskState::read(&second_path)?) } else { None };
    lock.unlock()?;
    let agree_now = second.as_ref().is_none_or(|second| disks_agree(&first, second));
    let agreed_at_boot = found["disks_agree"].as_bool().unwrap_or(false);
    let boots: Vec<Value> =
        first.boots.iter().map(|boot| json!({"id": boot.id, "first": boot.first})).collect();
    // The writer's standard error: empty as long as it runs.
    let failure = fs::read_to_string("/run/ledger.failure").ok().filter(|text| !text.trim().is_empty());
    let answer = json!({
        "boot_id": first.boots.last().map(|boot| boot.id.as_str()),
        "boots": boots,
        "last": first.last(),
        "corrupt": first.corrupt() + second.as_ref().map_or(0, DiskState::corrupt),
        "gaps": first.gaps(),
        "disks": if second.is_some() { 2 } else { 1 },
        "disks_agree": agree_now && agreed_at_boot,
        "found_at_boot": found,
        "failure": failure,
        "addresses": addresses(),
    });
    writeln!(io::stdout(), "{answer}")
}

/// The IPv4 addresses of eth0 as `address/prefix`.
fn addresses() -> Vec<String> {
    let arguments = ["ip", "-4", "-o", "addr", "show", "dev", "eth0"];
    let Ok(output) = Command::new("/bin/busybox").args(arguments).output() else { return Vec::new() };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut words = text.split_whitespace();
    let mut addresses = Vec::new();
    while let Some(word) = words.next() {
        if word == "inet" {
            addresses.extend(words.next().map(str::to_owned));
        }
    }
    addresses
}
