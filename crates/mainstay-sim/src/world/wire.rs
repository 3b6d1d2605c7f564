//! A connection between an agent and the server, byte by byte as TCP and TLS carry it.
//!
//! Within one connection nothing is reordered, doubled or left out: the sequence numbers of TCP and the records of TLS see to
//! that. What can happen is that bytes are late, that they stop arriving in one direction while the other still works, and
//! that the connection breaks anywhere, also within a message. What a cut holds up TCP sends again and again: it arrives when
//! the cut ends before either side has given the connection up. What can be doubled are requests: an order whose
//! answer was lost is given again on the next connection.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf},
    sync::watch,
};

use crate::turns;

/// Bytes in flight in each direction.
const STREAM_BYTES: usize = 32 << 10;
/// Bytes that travel together: less than most messages, so that a break falls into one.
const CHUNK_BYTES: usize = 4 << 10;
/// Longest delay of a chunk, in milliseconds.
const DELAY_MS_MAX: u64 = 3;

/// A direction of travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From an agent.
    ToServer,
    /// To an agent.
    ToAgent,
}

/// How bytes travel between a host and the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Weather {
    /// Nothing arrives in this direction.
    pub(super) stalls: Option<Direction>,
    /// Everything is late.
    pub(super) is_slow: bool,
    /// The next bytes in this direction arrive in part, and the connection breaks.
    pub(super) breaks: Option<Direction>,
}

/// The wires of a host.
pub(super) struct Wires {
    weather: watch::Sender<Weather>,
    rng: Mutex<StdRng>,
}

impl Wires {
    pub(super) fn new(seed: u64) -> Self {
        Self { weather: watch::Sender::default(), rng: Mutex::new(StdRng::seed_from_u64(seed)) }
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut Weather)) {
        self.weather.send_modify(change);
    }

    pub(super) fn weather(&self) -> Weather {
        *self.weather.borrow()
    }

    fn draw(&self, range: std::ops::Range<u64>) -> u64 {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner).random_range(range)
    }

    /// Whether the connection is to break now; only one does.
    fn takes_break(&self, direction: Direction) -> bool {
        self.weather.send_if_modified(|weather| {
            let strikes = weather.breaks == Some(direction);
            if strikes {
                weather.breaks = None;
            }
            strikes
        })
    }

    async fn carry(
        &self,
        direction: Direction,
        mut from: ReadHalf<DuplexStream>,
        mut to: WriteHalf<DuplexStream>,
    ) -> io::Result<()> {
        let mut weather = self.weather.subscribe();
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let count = from.read(&mut chunk).await?;
            // The sender is as near as we are.
            if weather.wait_for(|weather| weather.stalls != Some(direction)).await.is_err() {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            if count == 0 {
                return to.shutdown().await;
            }
            if self.takes_break(direction) {
                let arrived = self.draw(0..count as u64) as usize;
                to.write_all(&chunk[..arrived]).await?;
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            let is_slow = weather.borrow().is_slow;
            if is_slow {
                tokio::time::sleep(Duration::from_millis(self.draw(0..DELAY_MS_MAX + 1))).await;
            }
            turns::pause("wire").await;
            to.write_all(&chunk[..count]).await?;
        }
    }
}

/// A new connection: the agent's end, the server's end, and what carries bytes between them until it breaks or both have hung
/// up.
pub(super) fn connect(wires: Arc<Wires>) -> (DuplexStream, DuplexStream, impl Future<Output = ()>) {
    let (agent, near) = tokio::io::duplex(STREAM_BYTES);
    let (far, server) = tokio::io::duplex(STREAM_BYTES);
    let carry = async move {
        let (near_read, near_write) = tokio::io::split(near);
        let (far_read, far_write) = tokio::io::split(far);
        let ended = tokio::try_join!(
            wires.carry(Direction::ToServer, near_read, far_write),
            wires.carry(Direction::ToAgent, far_read, near_write),
        );
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection broke");
        }
    };
    (agent, server, carry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_arrive_in_order_however_slowly_and_a_hang_up_is_seen() {
        crate::simulate(|| async {
            let wires = Arc::new(Wires::new(1));
            wires.change(|weather| weather.is_slow = true);
            let (mut agent, mut server, carry) = connect(wires);
            let carrying = tokio::spawn(carry);
            let sent: Vec<u8> = (0..100_000_u32).map(|number| number as u8).collect();
            let expected = sent.clone();
            let sending = tokio::spawn(async move {
                agent.write_all(&sent).await.expect("bytes are taken");
                agent.shutdown().await.expect("a hang-up");
                let mut answer = Vec::new();
                agent.read_to_end(&mut answer).await.expect("an answer");
                answer
            });
            let mut arrived = Vec::new();
            server.read_to_end(&mut arrived).await.expect("bytes arrive");
            assert!(arrived == expected);
            server.write_all(b"thanks").await.expect("the other direction is open");
            drop(server);
            assert_eq!(sending.await.expect("the agent ends"), b"thanks");
            carrying.await.expect("the wire ends");
        });
    }

    #[test]
    fn a_cut_in_one_direction_holds_bytes_up_and_the_other_direction_works() {
        crate::simulate(|| async {
            let wires = Arc::new(Wires::new(1));
            let (mut agent, mut server, carry) = connect(wires.clone());
            tokio::spawn(carry);
            wires.change(|weather| weather.stalls = Some(Direction::ToServer));
            agent.write_all(b"late").await.expect("bytes are taken");
            server.write_all(b"here").await.expect("bytes are taken");
            let mut word = [0; 4];
            agent.read_exact(&mut word).await.expect("this direction works");
            assert_eq!(&word, b"here");
            let mut arrives = tokio::spawn(async move {
                let mut word = [0; 4];
                server.read_exact(&mut word).await.expect("the cut ends");
                word
            });
            tokio::select! {
                _ = &mut arrives => panic!("something came through the cut"),
                () = async { for _ in 0..100 { tokio::task::yield_now().await } } => {}
            }
            wires.change(|weather| weather.stalls = None);
            assert_eq!(&arrives.await.expect("bytes arrive"), b"late");
        });
    }

    #[test]
    fn a_connection_breaks_within_a_message_and_only_one_does() {
        crate::simulate(|| async {
            let wires = Arc::new(Wires::new(1));
            let (mut agent, mut server, carry) = connect(wires.clone());
            tokio::spawn(carry);
            wires.change(|weather| weather.breaks = Some(Direction::ToServer));
            agent.write_all(b"a message").await.expect("bytes are taken");
            let mut arrived = Vec::new();
            // In memory a reset is an end.
            server.read_to_end(&mut arrived).await.expect("the connection ends");
            assert!(arrived.len() < 9 && b"a message".starts_with(&arrived));
            assert_eq!(wires.weather().breaks, None);
        });
    }
}
