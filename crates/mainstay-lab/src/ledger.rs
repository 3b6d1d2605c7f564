//! Asking a ledger guest what it holds, and comparing it with what it acknowledged.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mainstay_model::VmId;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::site::Site;

/// The guest agent answers within milliseconds; under emulation and load within seconds.
const AGENT_TIMEOUT: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(100);

/// A start of the ledger, as the disks remember it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// Its random identity.
    pub id: String,
    /// The first number it was going to write.
    pub first: u64,
}

/// What the guest says about its disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The boot that runs now.
    pub boot_id: String,
    /// All boots of this timeline, oldest first.
    pub boots: Vec<Boot>,
    /// The highest number on disk.
    pub last: u64,
    /// Damaged or foreign records, over both disks.
    pub corrupt: u64,
    /// Missing numbers.
    pub gaps: u64,
    /// Whether the disks are of the same moment.
    pub disks_agree: bool,
    /// Why the ledger ended, if it did.
    pub failure: Option<String>,
    /// Addresses of the first adapter, `ADDRESS/PREFIX`.
    pub addresses: Vec<String>,
}

/// The verdict on a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// The site it runs at.
    pub site: String,
    /// The highest number on disk.
    pub last: u64,
    /// The highest number that was acknowledged on the timeline that runs now.
    pub acknowledged: u64,
    /// Damaged or foreign records.
    pub corrupt: u64,
    /// Missing numbers.
    pub gaps: u64,
    /// Whether the disks are of the same moment.
    pub disks_agree: bool,
}

impl Ledger {
    /// Whether everything acknowledged is there, whole and in order.
    pub fn is_whole(&self) -> bool {
        self.corrupt == 0 && self.gaps == 0 && self.disks_agree && self.last >= self.acknowledged
    }
}

/// Reads the acknowledgements, then asks the guest.
pub async fn query(site: &Site, vm: VmId) -> Result<Ledger> {
    let name = acknowledgements_of(site, vm).await?;
    // Read before the guest is asked: what is acknowledged later cannot be missing from the answer.
    let text = fs::read_to_string(site.acks().join(&name)).unwrap_or_default();
    let status = status(site, vm).await?;
    Ok(Ledger {
        site: site.name().to_owned(),
        last: status.last,
        acknowledged: acknowledged(&text, &status.boots),
        corrupt: status.corrupt,
        gaps: status.gaps,
        disks_agree: status.disks_agree,
    })
}

/// Waits until the guest has acknowledged `count` records in all since its file was begun.
pub async fn wait_for_acknowledgements(file: &Path, count: usize, timeout: Duration) -> Result<()> {
    let deadline = Instant::now() + timeout;
    loop {
        let text = fs::read_to_string(file).unwrap_or_default();
        let found = text.lines().filter(|line| line.starts_with("A ")).count();
        if found >= count {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("the guest acknowledged {found} records, not {count}, in {} s", timeout.as_secs());
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Waits until the guest's agent answers and its ledger runs.
pub async fn wait_until_up(site: &Site, vm: VmId, timeout: Duration) -> Result<Status> {
    let deadline = Instant::now() + timeout;
    loop {
        match status(site, vm).await {
            Ok(status) => return Ok(status),
            Err(error) if Instant::now() > deadline => {
                return Err(error.context("the guest does not come up"));
            }
            Err(_) => tokio::time::sleep(POLL).await,
        }
    }
}

/// Runs `ledger status` in the guest.
pub async fn status(site: &Site, vm: VmId) -> Result<Status> {
    let output = run_in_guest(site, vm, "/usr/bin/ledger", &["status"]).await?;
    serde_json::from_str(&output).context("reading the ledger's status")
}

/// Runs a program in the guest and answers its standard output.
pub async fn run_in_guest(site: &Site, vm: VmId, program: &str, arguments: &[&str]) -> Result<String> {
    run_in_guest_for(site, vm, program, arguments, Duration::ZERO).await
}

/// Has the guest write random bytes to a file on its second disk: nothing compresses them.
pub async fn write_random(site: &Site, vm: VmId, file: &str, mib: u64) -> Result<()> {
    let script = format!("dd if=/dev/urandom of=/ledger1/{file} bs=1M count={mib} conv=fsync 2>&1");
    run_in_guest(site, vm, "/bin/sh", &["-c", &script]).await.map(drop)
}

/// As [`run_in_guest`], for a program that runs so long: the guest is left alone meanwhile.
pub async fn run_in_guest_for(
    site: &Site,
    vm: VmId,
    program: &str,
    arguments: &[&str],
    time: Duration,
) -> Result<String> {
    let command = json!({"path": program, "arg": arguments, "capture-output": true});
    let started = site.libvirt().agent(vm, "guest-exec", command, AGENT_TIMEOUT).await?;
    tokio::time::sleep(time).await;
    let deadline = Instant::now() + AGENT_TIMEOUT;
    loop {
        let question = json!({"pid": started["pid"]});
        let answer = site.libvirt().agent(vm, "guest-exec-status", question, AGENT_TIMEOUT).await?;
        if answer["exited"].as_bool() == Some(true) {
            let text = |name: &str| -> Result<String> {
                let bytes = STANDARD.decode(answer[name].as_str().unwrap_or_default())?;
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            };
            if answer["exitcode"] != 0 {
                bail!("{program} ended with {}: {}", answer["exitcode"], text("err-data")?.trim());
            }
            return text("out-data");
        }
        if Instant::now() > deadline {
            bail!("{program} does not end");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The highest number acknowledged on the timeline that these boots form. An acknowledgement of boot `b` counts if
/// `b` is among them and the number lies before the next boot's first: what `b` wrote beyond that is on
/// another branch.
pub fn acknowledged(text: &str, boots: &[Boot]) -> u64 {
    let end_of = |id: &str| {
        let at = boots.iter().position(|boot| boot.id == id)?;
        Some(boots.get(at + 1).map_or(u64::MAX, |next| next.first))
    };
    let number = |line: &str| {
        let mut words = line.split(' ');
        let ("A", id, number) = (words.next()?, words.next()?, words.next()?.parse::<u64>().ok()?) else {
            return None;
        };
        (number < end_of(id)?).then_some(number)
    };
    text.lines().filter_map(number).max().unwrap_or(0)
}

/// The name of the file of acknowledgements: every copy of a guest has the one it was defined with.
async fn acknowledgements_of(site: &Site, vm: VmId) -> Result<String> {
    let xml = site.libvirt().xml(vm, mainstay_kvm::libvirt::XmlKind::Live).await?;
    acknowledgements_in(site, &xml).context("the machine acknowledges nothing")
}

/// The same in a description.
pub(crate) fn acknowledgements_in(site: &Site, xml: &str) -> Option<String> {
    let prefix = format!("{}/", site.acks().display());
    let start = xml.find(&prefix)? + prefix.len();
    let end = xml[start..].find(['\'', '"'])?;
    Some(xml[start..start + end].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot(id: &str, first: u64) -> Boot {
        Boot { id: id.to_owned(), first }
    }

    #[test]
    fn only_the_running_timeline_counts() {
        // Boot a reached 9; the recovery point held 6; b went on from there; c is a test copy of its own.
        let text = "B a 1 x\nA a 5 x\nA a 6 x\nA a 9 x\nB c 4 x\nA c 40 x\nB b 7 x\nA b 7 x\nA b 8 x\nA b";
        assert_eq!(acknowledged(text, &[boot("a", 1)]), 9);
        assert_eq!(acknowledged(text, &[boot("a", 1), boot("b", 7)]), 8);
        assert_eq!(acknowledged(text, &[boot("a", 1), boot("d", 7)]), 6);
        assert_eq!(acknowledged("", &[boot("a", 1)]), 0);
    }
}
