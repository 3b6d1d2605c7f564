//! A long, bad line on one machine: packets are late and some never arrive. Traffic control of the kernel could do this too,
//! where it is built in; a TUN device is everywhere.
//!
//! What is sent to [`FAR`] comes back as if it had been sent from there to this machine: source and destination change
//! places, which leaves all checksums right. So a connection to `FAR` reaches a listener on [`NEAR`], and every
//! packet of it crosses the line: real TCP meets real delay and loss.

#![expect(unsafe_code, reason = "attaching to a TUN device is an ioctl that no library here wraps")]

use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Write as _},
    net::Ipv4Addr,
    os::fd::AsRawFd as _,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::libc;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

/// This machine's end of the line.
pub const NEAR: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
/// Connections to this address cross the line and arrive at this machine.
pub const FAR: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);

const TUN: &str = "/dev/net/tun";
const DEVICE: &str = "wan0";
/// Longest packet; the device's MTU is below.
const PACKET_BYTES: usize = 2048;

/// How bad the line is, in each direction.
#[derive(Clone, Copy, Debug)]
pub struct Badness {
    /// How late every packet is.
    pub delay: Duration,
    /// Packets of a hundred that are lost.
    pub loss_percent: u32,
    /// Decides which.
    pub seed: u64,
}

/// A line that is up as long as the process lives.
#[derive(Debug)]
pub struct Wan {
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    passed: AtomicU64,
    lost: AtomicU64,
}

mod ioctl {
    use nix::libc;

    // TUNSETIFF of linux/if_tun.h: declared with an int, called with a struct ifreq.
    nix::ioctl_write_ptr_bad!(
        set_interface,
        nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
        libc::ifreq
    );
}

impl Wan {
    /// Makes the line. Only within [`crate::run_in_own_network`]: elsewhere all would see it.
    pub fn open(badness: Badness) -> Result<Self> {
        ensure!(crate::mounts::is_inside(), "this test is run by another one, in its own network");
        bring_up_loopback()?;
        let device = attach()?;
        let address = format!("{NEAR}/24");
        ip(&["address", "add", &address, "dev", DEVICE])?;
        ip(&["link", "set", DEVICE, "mtu", "1500", "up"])?;
        let counts = Arc::new(Counts::default());
        let (sender, receiver) = mpsc::channel::<(Instant, Vec<u8>)>();
        let (mut reading, mut writing) = (device.try_clone()?, device);
        let counted = Arc::clone(&counts);
        thread::spawn(move || {
            let mut random = StdRng::seed_from_u64(badness.seed);
            let mut buffer = [0; PACKET_BYTES];
            while let Ok(length) = reading.read(&mut buffer) {
                let Some(packet) = turned_round(&buffer[..length]) else { continue };
                if random.random_range(0..100) < badness.loss_percent {
                    counted.lost.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                counted.passed.fetch_add(1, Ordering::Relaxed);
                if sender.send((Instant::now() + badness.delay, packet)).is_err() {
                    return;
                }
            }
        });
        thread::spawn(move || {
            for (due, packet) in receiver {
                thread::sleep(due.saturating_duration_since(Instant::now()));
                // A packet that the kernel does not take is lost, as on any line.
                let _ = writing.write(&packet);
            }
        });
        Ok(Self { counts })
    }

    /// Packets that have passed, and packets that were lost.
    pub fn packets(&self) -> (u64, u64) {
        (self.counts.passed.load(Ordering::Relaxed), self.counts.lost.load(Ordering::Relaxed))
    }
}

/// A packet with source and destination exchanged; `None` unless it is IPv4.
fn turned_round(packet: &[u8]) -> Option<Vec<u8>> {
    if packet.len() < 20 || packet[0] >> 4 != 4 {
        return None;
    }
    let mut packet = packet.to_vec();
    let (source, destination) = packet[12..20].split_at_mut(4);
    source.swap_with_slice(destination);
    Some(packet)
}

fn attach() -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(TUN).with_context(|| format!("open {TUN}"))?;
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(DEVICE.bytes()) {
        *to = from.cast_signed();
    }
    let flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    let request =
        libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } };
    // SAFETY: the descriptor is open, and the kernel reads one `ifreq`, which lives for the call.
    unsafe { ioctl::set_interface(file.as_raw_fd(), &raw const request) }
        .context("attach to a TUN device")?;
    Ok(file)
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output().context("start ip")?;
    ensure!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Whether this machine lets a line be made.
pub fn is_possible() -> bool {
    OpenOptions::new().read(true).write(true).open(TUN).is_ok()
}

/// The network that a new namespace lacks: its own loopback, also for the groups that stand for guests' networks.
fn bring_up_loopback() -> Result<()> {
    ip(&["link", "set", "lo", "up"])?;
    ip(&["route", "add", "224.0.0.0/4", "dev", "lo"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_comes_back_as_if_it_came_from_where_it_went() {
        let mut packet = vec![0x45, 0, 0, 20, 0, 0, 0, 0, 64, 6, 0, 0, 10, 99, 0, 1, 10, 99, 0, 2];
        packet.extend([7; 12]);
        let turned = turned_round(&packet).unwrap();
        assert_eq!(turned[12..20], [10, 99, 0, 2, 10, 99, 0, 1]);
        assert_eq!((&turned[..12], &turned[20..]), (&packet[..12], &packet[20..]));
        assert_eq!(turned_round(&[0x60; 40]), None);
        assert_eq!(turned_round(&packet[..19]), None);
    }
}
