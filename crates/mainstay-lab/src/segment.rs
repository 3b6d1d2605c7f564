//! A network of a lab as seen on the wire: every frame that goes over it, and frames of our own.
//!
//! QEMU's multicast networks carry each Ethernet frame as one UDP datagram to the group, so whoever joins the group sees
//! what a machine on that network would see.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, setsockopt, socket, sockopt};

/// Frames that are remembered. A guest at rest sends a few per minute; more is a loop.
const FRAMES_MAX: usize = 100_000;
/// The longest datagram.
const FRAME_BYTES_MAX: usize = 65_536;
/// How often the receiver looks whether it shall end.
const RECEIVE_TIMEOUT: Duration = Duration::from_millis(100);
const POLL: Duration = Duration::from_millis(20);

/// A hardware address.
pub type Mac = [u8; 6];

/// A station on a network.
pub struct Segment {
    socket: Arc<UdpSocket>,
    group: SocketAddrV4,
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    receiver: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Seen {
    frames: Vec<Vec<u8>>,
    /// Why not everything was seen.
    failure: Option<String>,
    held: Vec<(Ipv4Addr, Mac)>,
}

fn lock(seen: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Segment {
    /// Joins a network by the name that the agent has for it, `mcast:ADDRESS:PORT`.
    pub fn join(network: &str) -> Result<Self> {
        let group = network.strip_prefix("mcast:").unwrap_or(network);
        let group: SocketAddrV4 = group.parse().with_context(|| format!("'{network}' is no group"))?;
        let fd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        // The machines have the same port.
        setsockopt(&fd, sockopt::ReuseAddr, &true)?;
        bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &SockaddrIn::from(group))?;
        let socket = UdpSocket::from(fd);
        socket.join_multicast_v4(group.ip(), &Ipv4Addr::UNSPECIFIED)?;
        socket.set_read_timeout(Some(RECEIVE_TIMEOUT))?;
        let (socket, stop) = (Arc::new(socket), Arc::new(AtomicBool::new(false)));
        let seen: Arc<Mutex<Seen>> = Arc::default();
        let receiver = {
            let (socket, seen, stop) = (socket.clone(), seen.clone(), stop.clone());
            std::thread::spawn(move || receive(&socket, group, &seen, &stop))
        };
        Ok(Self { socket, group, seen, stop, receiver: Some(receiver) })
    }

    /// Sends a frame.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        self.socket.send_to(frame, self.group).context("sending a frame")?;
        Ok(())
    }

    /// Answers from now on to whoever asks for an address: a machine that has it.
    pub fn hold_address(&self, address: Ipv4Addr, mac: Mac) {
        lock(&self.seen).held.push((address, mac));
    }

    /// Whether a frame was seen. An error if some were not remembered: then nothing can be said.
    pub fn has_seen(&self, wanted: impl Fn(&[u8]) -> bool) -> Result<bool> {
        let seen = lock(&self.seen);
        let found = seen.frames.iter().any(|frame| wanted(frame));
        match &seen.failure {
            Some(failure) if !found => bail!("not everything on {} was seen: {failure}", self.group),
            _ => Ok(found),
        }
    }

    /// Waits for a frame that was sent before or is sent yet.
    pub async fn wait_for(
        &self,
        what: &str,
        timeout: Duration,
        wanted: impl Fn(&[u8]) -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + timeout;
        while !self.has_seen(&wanted)? {
            if Instant::now() > deadline {
                bail!("{what} was not seen on {}", self.group);
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(receiver) = self.receiver.take() {
            // It can only have panicked, and then it has said so.
            let _ = receiver.join();
        }
    }
}

fn receive(socket: &UdpSocket, group: SocketAddrV4, seen: &Mutex<Seen>, stop: &AtomicBool) {
    let mut buffer = vec![0; FRAME_BYTES_MAX];
    while !stop.load(Ordering::Relaxed) {
        let length = match socket.recv(&mut buffer) {
            Ok(length) => length,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                continue;
            }
            Err(error) => {
                lock(seen).failure = Some(error.to_string());
                return;
            }
        };
        let frame = &buffer[..length];
        let answer = {
            let mut seen = lock(seen);
            if seen.frames.len() < FRAMES_MAX {
                seen.frames.push(frame.to_vec());
            } else {
                seen.failure = Some(format!("more than {FRAMES_MAX} frames came"));
            }
            Arp::parse(frame).filter(|arp| arp.is_request).and_then(|asked| {
                let (address, mac) = seen.held.iter().find(|(address, _)| *address == asked.to)?;
                Some(Arp { is_request: false, mac: *mac, from: *address, to: asked.from }.frame(asked.mac))
            })
        };
        if let Some(answer) = answer
            && let Err(error) = socket.send_to(&answer, group)
        {
            lock(seen).failure = Some(format!("an answer could not be sent: {error}"));
        }
    }
}

/// A question who has an IPv4 address, or the answer (RFC 826).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    /// Whether it is the question.
    pub is_request: bool,
    /// Who sends it.
    pub mac: Mac,
    /// The sender's address.
    pub from: Ipv4Addr,
    /// The address asked for; in an answer, who asked.
    pub to: Ipv4Addr,
}

const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
/// Ethernet, IPv4, and the lengths of their addresses.
const ARP_KIND: [u8; 6] = [0, 1, 0x08, 0, 6, 4];
const BROADCAST: Mac = [0xff; 6];

impl Arp {
    /// The Ethernet frame to a station.
    pub fn frame(&self, to: Mac) -> Vec<u8> {
        let operation = if self.is_request { [0, 1] } else { [0, 2] };
        let asked = if self.is_request { [0; 6] } else { to };
        let mut frame = Vec::with_capacity(60);
        for part in [&to[..], &self.mac, &ETHERTYPE_ARP, &ARP_KIND, &operation, &self.mac] {
            frame.extend_from_slice(part);
        }
        frame.extend_from_slice(&self.from.octets());
        frame.extend_from_slice(&asked);
        frame.extend_from_slice(&self.to.octets());
        // Ethernet's shortest frame.
        frame.resize(60, 0);
        frame
    }

    /// The Ethernet frame to everybody.
    pub fn broadcast(&self) -> Vec<u8> {
        self.frame(BROADCAST)
    }

    /// Reads a frame; `None` if it is something else.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(frame.get(at..at + 4)?).ok()?));
        if frame.get(12..14)? != ETHERTYPE_ARP || frame.get(14..20)? != ARP_KIND {
            return None;
        }
        Some(Self {
            is_request: match frame.get(20..22)? {
                [0, 1] => true,
                [0, 2] => false,
                _ => return None,
            },
            mac: frame.get(22..28)?.try_into().ok()?,
            from: address(28)?,
            to: address(38)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question() -> Arp {
        Arp {
            is_request: true,
            mac: [0x52, 0x54, 0, 0, 0, 1],
            from: Ipv4Addr::new(10, 77, 0, 1),
            to: Ipv4Addr::new(10, 77, 0, 2),
        }
    }

    #[test]
    fn a_frame_reads_as_it_was_written() {
        let answer = Arp { is_request: false, ..question() };
        assert_eq!(Arp::parse(&question().broadcast()), Some(question()));
        assert_eq!(Arp::parse(&answer.frame([1; 6])), Some(answer));
        assert_eq!(Arp::parse(&[0; 60]), None);
        assert_eq!(Arp::parse(&question().broadcast()[..30]), None);
    }

    #[tokio::test]
    async fn stations_hear_each_other_and_a_held_address_is_answered_for() {
        let port = UdpSocket::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let group = format!("mcast:230.77.83.2:{port}");
        let (asking, holding) = (Segment::join(&group).unwrap(), Segment::join(&group).unwrap());
        holding.hold_address(question().to, [7; 6]);
        asking.send(&question().broadcast()).unwrap();
        let is_answer =
            |frame: &[u8]| Arp::parse(frame).is_some_and(|arp| !arp.is_request && arp.mac == [7; 6]);
        asking.wait_for("the answer", Duration::from_secs(60), is_answer).await.unwrap();
        assert!(!asking.has_seen(|frame| frame.is_empty()).unwrap());
    }
}
