//! The sending end of a replicate session: a numbered stream of frames over connections that break.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use mainstay_store::Consistency;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::connect::Backoff;
use crate::message::{CommitRequest, Hello, Welcome};
use crate::scan::{Output, Sent};
use crate::wire::{FLAG_RESENT, Kind, Message, Receiver, Traffic, Transmitter, split};
use crate::{Connect, RefusalKind, ReplicationError, SendJob};

pub(crate) struct Link<'a> {
    connect: &'a dyn Connect,
    job: &'a SendJob,
    hello: Hello,
    commit: CommitRequest,
    window_bytes: usize,
    traffic: Arc<Traffic>,
    /// Frames that are not known to be durable, with their numbers.
    buffer: VecDeque<(u64, Sent)>,
    buffer_bytes: usize,
    /// Number of the last frame taken from the scan.
    last: u64,
    durable: u64,
    ended: bool,
    /// What was not looked at.
    pub(crate) left: Vec<Vec<Range<u64>>>,
    /// The highest number that was ever written to a connection.
    written: u64,
    pub(crate) resent: u64,
    pub(crate) commit_sent: bool,
}

impl<'a> Link<'a> {
    pub(crate) fn new(
        connect: &'a dyn Connect,
        job: &'a SendJob,
        window_bytes: usize,
        traffic: &Arc<Traffic>,
    ) -> Self {
        Self {
            connect,
            job,
            hello: job.hello(),
            commit: job.commit_request(),
            window_bytes,
            traffic: Arc::clone(traffic),
            buffer: VecDeque::new(),
            buffer_bytes: 0,
            last: 0,
            durable: 0,
            ended: false,
            left: Vec::new(),
            written: 0,
            resent: 0,
            commit_sent: false,
        }
    }

    /// Sends all frames and commits; connects as often as it takes.
    pub(crate) async fn run(
        &mut self,
        mut frames: mpsc::Receiver<Output>,
        cancel: &CancellationToken,
    ) -> Result<Uuid, ReplicationError> {
        let mut backoff = Backoff::new();
        loop {
            match self.connection(&mut frames, &mut backoff).await {
                Err(error) if error.is_transient() => {
                    tracing::debug!(session = %self.job.session, %error, "connection broke, will go on");
                    backoff.pause(cancel).await?;
                }
                done => return done,
            }
        }
    }

    async fn connection(
        &mut self,
        frames: &mut mpsc::Receiver<Output>,
        backoff: &mut Backoff,
    ) -> Result<Uuid, ReplicationError> {
        let (mut receiver, transmitter) = split(self.connect.connect().await?, &self.traffic);
        transmitter.send(&Message::control(Kind::Hello, 0, &self.hello)?).await?;
        let (received, durable) = match receiver.expect(Kind::Welcome).await?.body()? {
            // Only after we asked for it can the hash tables be complete.
            Welcome::Committed { point } if self.commit_sent => return Ok(point),
            Welcome::Committed { .. } => {
                return Err(ReplicationError::Protocol("the session was committed before: settle it first"));
            }
            Welcome::Session { received, durable, .. } => (received, durable),
            _ => return Err(ReplicationError::Protocol("unexpected welcome")),
        };
        if received < self.durable || received > self.last || durable > received {
            let message = format!("the server has {received} frames, {} were durable", self.durable);
            return Err(ReplicationError::Refused { kind: RefusalKind::SessionLost, message });
        }
        backoff.reset();
        self.acknowledge(durable);
        self.converse(received, frames, receiver, &transmitter).await
    }

    async fn converse(
        &mut self,
        received: u64,
        frames: &mut mpsc::Receiver<Output>,
        receiver: Receiver,
        transmitter: &Transmitter,
    ) -> Result<Uuid, ReplicationError> {
        let incoming = stream::unfold(receiver, |mut receiver| async move {
            let message = receiver.receive().await;
            Some((message, receiver))
        });
        let mut incoming = Box::pin(incoming);
        let mut ping = Box::pin(transmitter.ping_forever());
        let mut backlog: VecDeque<(u64, Sent)> =
            self.buffer.iter().filter(|(number, _)| *number > received).cloned().collect();
        // Whether the server was asked to make durable what it has, since it last did.
        let mut flushed = false;
        let mut committing = false;
        loop {
            if let Some((number, sent)) = backlog.pop_front() {
                if number <= self.written {
                    self.resent += 1;
                }
                self.written = self.written.max(number);
                let flags = if sent.is_resent { FLAG_RESENT } else { 0 };
                transmitter.send_frame(flags, number, &sent.frame).await?;
                continue;
            }
            if self.ended && !committing {
                // The order rule: hashes are durable before the server is asked, and count only after its answer.
                self.prepare_tables().await?;
                let mut commit = self.commit.clone();
                commit.frames = self.last;
                if self.left.iter().any(|left| !left.is_empty()) {
                    commit.consistency = Consistency::Partial;
                    if let Some(remember) = &self.job.before_partial {
                        remember(&self.left).map_err(|error| ReplicationError::internal(&error))?;
                    }
                }
                self.commit_sent = true;
                transmitter.send(&Message::control(Kind::Commit, 0, &commit)?).await?;
                committing = true;
            }
            let room = self.buffer_bytes < self.window_bytes;
            if !room && !flushed {
                transmitter.send(&Message::new(Kind::Flush, 0, Bytes::new())).await?;
                flushed = true;
            }
            tokio::select! {
                message = incoming.next() => {
                    let message = message.ok_or(ReplicationError::Protocol("stream ended"))??;
                    match message.kind {
                        Kind::Ack if message.tag <= self.last => {
                            flushed &= message.tag <= self.durable;
                            self.acknowledge(message.tag);
                        }
                        Kind::Committed if committing => return message.body(),
                        _ => return Err(ReplicationError::Protocol("unexpected message")),
                    }
                }
                error = &mut ping => return Err(error),
                output = frames.recv(), if room && !self.ended => match output {
                    Some(Output::Frame(sent)) => {
                        self.last += 1;
                        self.buffer_bytes += sent.frame.len();
                        self.buffer.push_back((self.last, sent.clone()));
                        backlog.push_back((self.last, sent));
                    }
                    Some(Output::End { left }) => {
                        self.left = left;
                        self.ended = true;
                    }
                    // The scan has failed, and tells why whoever waits for both.
                    None => std::future::pending().await,
                },
            }
        }
    }

    fn acknowledge(&mut self, durable: u64) {
        self.durable = self.durable.max(durable);
        while let Some((_, sent)) = self.buffer.pop_front_if(|(number, _)| *number <= self.durable) {
            self.buffer_bytes -= sent.frame.len();
        }
    }

    async fn prepare_tables(&self) -> Result<(), ReplicationError> {
        let tables: Vec<_> = self.job.disks.iter().map(|disk| Arc::clone(&disk.table)).collect();
        let session = self.job.session;
        let task = mainstay_block::elsewhere::spawn_blocking(move || {
            tables.iter().try_for_each(|table| table.prepare(session))
        });
        Ok(task.await.map_err(|error| ReplicationError::internal(&error))??)
    }
}
