//! The control channel: operations from the server to an agent over one connection that the agent
//! dialled.
//!
//! Format: each message is a 4-byte big-endian length followed by that many bytes of JSON. JSON because
//! server and agents are updated at different times: unknown fields and unknown messages are ignored, and an operation or an
//! answer that the other side cannot read is an error of that operation alone. The largest message is bounded by
//! [`MESSAGE_BYTES_MAX`].

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::{mpsc, oneshot, watch},
    task::{AbortHandle, JoinSet},
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;

use crate::{ErrorKind, Progress, ProgressSink, Site, SiteError, SiteOperation, site::SAME_VERSION};

/// Largest message: a definition with UEFI variables (a few MiB at most, as base64) and room to spare.
const MESSAGE_BYTES_MAX: u32 = 64 << 20;
/// Operations under way at once on one agent; more wait at the server.
const OPERATIONS_MAX: usize = 256;
/// Messages queued for a slow peer before the sender waits.
const QUEUE_MAX: usize = 1024;
/// How often each side says that it is there.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Silence after which the peer counts as gone.
const SILENCE_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, Serialize, Deserialize)]
enum ToAgent {
    /// A [`SiteOperation`], read when it is begun: who sends it may be newer.
    Start {
        id: u64,
        operation: Value,
    },
    Cancel {
        id: u64,
    },
    Heartbeat,
}

#[derive(Debug, Serialize, Deserialize)]
enum ToServer {
    Progress {
        id: u64,
        progress: Progress,
    },
    /// A `Result<Value, SiteError>`, likewise.
    Done {
        id: u64,
        result: Value,
    },
    Heartbeat,
}

/// A message of the other side; `None` for one that a newer version has brought.
fn known<M: DeserializeOwned>(message: Value) -> Option<M> {
    serde_json::from_value(message)
        .inspect_err(|error| tracing::debug!(%error, "a message that this version does not know"))
        .ok()
}

fn done(id: u64, result: &Result<Value, SiteError>) -> ToServer {
    let result = serde_json::to_value(result).unwrap_or_else(|error| {
        // Strings and numbers: there is nothing in it that JSON cannot hold.
        Value::String(error.to_string())
    });
    ToServer::Done { id, result }
}

async fn write_message<W: AsyncWrite + Unpin>(
    writer: &mut W,
    message: &impl Serialize,
) -> std::io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let length =
        u32::try_from(body.len()).ok().filter(|length| *length <= MESSAGE_BYTES_MAX).ok_or_else(|| {
            std::io::Error::new(
                std::io::ErrorKind::InvalidData,
                format!("a message of {} bytes is too large", body.len()),
            )
        })?;
    writer.write_all(&length.to_be_bytes()).await?;
    writer.write_all(&body).await?;
    writer.flush().await
}

async fn read_message<R: AsyncRead + Unpin, M: DeserializeOwned>(reader: &mut R) -> std::io::Result<M> {
    let length = timeout(SILENCE_MAX, reader.read_u32())
        .await
        .map_err(|_| {
            std::io::Error::new(std::io::ErrorKind::TimedOut, "the peer has been silent for too long")
        })?
        // A peer that was killed sends no farewell, and TLS has words for that which help nobody.
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                std::io::Error::new(error.kind(), "the peer closed the connection")
            }
            _ => error,
        })?;
    if length > MESSAGE_BYTES_MAX {
        let text = format!("a message of {length} bytes is too large");
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, text));
    }
    // Grows with what really arrives, so that a lying length costs nothing.
    let mut body = Vec::new();
    timeout(SILENCE_MAX, (&mut *reader).take(u64::from(length)).read_to_end(&mut body)).await.map_err(
        |_| std::io::Error::new(std::io::ErrorKind::TimedOut, "the peer stopped within a message"),
    )??;
    if body.len() != length as usize {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&body)?)
}

/// Writes queued messages, and a heartbeat when there is nothing else to say.
async fn write_loop<W: AsyncWrite + Unpin, M: Serialize>(
    mut writer: W,
    mut queue: mpsc::Receiver<M>,
    heartbeat: impl Fn() -> M,
) -> std::io::Result<()> {
    loop {
        match timeout(HEARTBEAT, queue.recv()).await {
            Ok(Some(message)) => write_message(&mut writer, &message).await?,
            Ok(None) => return Ok(()),
            Err(_) => write_message(&mut writer, &heartbeat()).await?,
        }
    }
}

/// Serves a site over a connection until it breaks. All operations under way are dropped then: the
/// server repeats what it still wants on the next connection.
pub async fn serve_site<S>(stream: S, site: Arc<dyn Site>) -> std::io::Result<()>
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (mut reader, writer) = tokio::io::split(stream);
    let (replies, queue) = mpsc::channel(QUEUE_MAX);
    let mut writing = AbortOnDropHandle::new(tokio::spawn(write_loop(writer, queue, || ToServer::Heartbeat)));
    // Dropping the set aborts what is still under way.
    let mut operations = JoinSet::new();
    let mut running: HashMap<u64, AbortHandle> = HashMap::new();
    loop {
        let message = tokio::select! {
            // Reading is not cancel-safe, so it is only ever abandoned together with the connection.
            message = read_message::<_, Value>(&mut reader) => message?,
            ended = &mut writing => return ended.unwrap_or_else(|error| Err(std::io::Error::other(error))),
        };
        let Some(message) = known(message) else { continue };
        match message {
            ToAgent::Start { id, operation } => {
                let operation = match serde_json::from_value::<SiteOperation>(operation) {
                    Ok(operation) => operation,
                    Err(error) => {
                        let error = SiteError::new(
                            ErrorKind::Failed,
                            format!("the agent does not know what the server asks for: {error}"),
                        );
                        let _ = replies.send(done(id, &Err(error.with_remedy(SAME_VERSION)))).await;
                        continue;
                    }
                };
                while operations.try_join_next().is_some() {}
                running.retain(|_, task| !task.is_finished());
                if running.len() >= OPERATIONS_MAX {
                    let error =
                        SiteError::new(ErrorKind::Busy, "the agent has too many operations under way");
                    // A closed queue means that the connection is gone, and with it who asked; so below.
                    let _ = replies.send(done(id, &Err(error))).await;
                    continue;
                }
                let task = operations.spawn(run_operation(site.clone(), id, operation, replies.clone()));
                running.insert(id, task);
            }
            ToAgent::Cancel { id } => {
                if let Some(task) = running.remove(&id) {
                    task.abort();
                }
            }
            ToAgent::Heartbeat => {}
        }
    }
}

async fn run_operation(
    site: Arc<dyn Site>,
    id: u64,
    operation: SiteOperation,
    replies: mpsc::Sender<ToServer>,
) {
    let name = operation.name();
    let sink = QueueProgress { id, replies: replies.clone() };
    // A task of its own, so that a panic in a driver becomes an answer and not an endless wait.
    let work = AbortOnDropHandle::new(tokio::spawn(async move { site.perform(operation, &sink).await }));
    let result = work.await.unwrap_or_else(|error| {
        Err(SiteError::new(ErrorKind::Failed, format!("{name} ended in a bug of the agent: {error}"))
            .with_remedy("See the agent's log; please report it."))
    });
    let _ = replies.send(done(id, &result)).await;
}

struct QueueProgress {
    id: u64,
    replies: mpsc::Sender<ToServer>,
}

impl ProgressSink for QueueProgress {
    fn report(&self, progress: Progress) {
        // Progress is a courtesy: when the queue is full, a newer one will follow.
        let _ = self.replies.try_send(ToServer::Progress { id: self.id, progress });
    }
}

struct Waiting {
    progress: watch::Sender<Progress>,
    done: oneshot::Sender<Result<Value, SiteError>>,
}

type WaitingTable = Arc<Mutex<HashMap<u64, Waiting>>>;

/// The server's end of a control channel: a [`Site`] as long as the connection lives.
pub struct RemoteSite {
    requests: mpsc::Sender<ToAgent>,
    waiting: WaitingTable,
    next_id: AtomicU64,
    closed: watch::Receiver<bool>,
}

impl RemoteSite {
    /// Takes over a connection that an agent dialled. The returned future runs the connection and ends when it
    /// breaks; operations under way then fail with `Unavailable`.
    pub fn connect<S>(stream: S) -> (Arc<Self>, impl Future<Output = std::io::Result<()>> + Send)
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (reader, writer) = tokio::io::split(stream);
        let (requests, queue) = mpsc::channel(QUEUE_MAX);
        let waiting = WaitingTable::default();
        let (closing, closed) = watch::channel(false);
        let site = Arc::new(Self { requests, waiting: waiting.clone(), next_id: AtomicU64::new(1), closed });
        let run = async move {
            let closing = Closing { closing, waiting };
            tokio::select! {
                result = write_loop(writer, queue, || ToAgent::Heartbeat) => result,
                result = read_replies(reader, &closing.waiting) => result,
            }
        };
        (site, run)
    }
}

/// Fails what is under way when the connection ends, also when the task that runs it is dropped.
struct Closing {
    closing: watch::Sender<bool>,
    waiting: WaitingTable,
}

impl Drop for Closing {
    fn drop(&mut self) {
        self.closing.send_replace(true);
        lock(&self.waiting).clear();
    }
}

async fn read_replies<R: AsyncRead + Unpin>(mut reader: R, waiting: &WaitingTable) -> std::io::Result<()> {
    loop {
        let Some(message) = known(read_message(&mut reader).await?) else { continue };
        match message {
            ToServer::Progress { id, progress } => {
                if let Some(waiting) = lock(waiting).get(&id) {
                    waiting.progress.send_replace(progress);
                }
            }
            ToServer::Done { id, result } => {
                let result = serde_json::from_value(result).unwrap_or_else(|error| {
                    let text = format!("the agent's answer cannot be read: {error}");
                    Err(SiteError::new(ErrorKind::Failed, text).with_remedy(SAME_VERSION))
                });
                if let Some(waiting) = lock(waiting).remove(&id) {
                    // Nobody waits any more when the operation was cancelled in this moment.
                    let _ = waiting.done.send(result);
                }
            }
            ToServer::Heartbeat => {}
        }
    }
}

fn lock(waiting: &WaitingTable) -> std::sync::MutexGuard<'_, HashMap<u64, Waiting>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells the agent to stop when whoever asked has gone.
struct CancelOnDrop<'a> {
    id: u64,
    site: &'a RemoteSite,
}

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        if lock(&self.site.waiting).remove(&self.id).is_some() {
            // If the queue is full the operation runs to its end; the next one on the item waits for it.
            let _ = self.site.requests.try_send(ToAgent::Cancel { id: self.id });
        }
    }
}

#[async_trait]
impl Site for RemoteSite {
    async fn perform(&self, operation: SiteOperation, sink: &dyn ProgressSink) -> Result<Value, SiteError> {
        let gone = || SiteError::new(ErrorKind::Unavailable, "the connection to the agent is broken");
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (progress, mut progressed) = watch::channel(Progress::default());
        let (done, mut answer) = oneshot::channel();
        lock(&self.waiting).insert(id, Waiting { progress, done });
        let _cancel = CancelOnDrop { id, site: self };
        // Checked after the entry was made: the end of the connection clears the table after saying so.
        if *self.closed.borrow() {
            return Err(gone());
        }
        let operation = serde_json::to_value(operation).map_err(|error| {
            SiteError::new(ErrorKind::Failed, format!("the operation cannot be written: {error}"))
        })?;
        let start = ToAgent::Start { id, operation };
        self.requests.send(start).await.map_err(|_| gone())?;
        loop {
            tokio::select! {
                biased;
                answer = &mut answer => return answer.unwrap_or_else(|_| Err(gone())),
                changed = progressed.changed() => match changed {
                    Ok(()) => sink.report(progressed.borrow_and_update().clone()),
                    // The entry is gone, so the answer is there or never will be.
                    Err(_) => return answer.await.unwrap_or_else(|_| Err(gone())),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PowerState, ReadPower, call};
    use mainstay_model::VmId;
    use serde_json::json;

    /// Answers `ReadPower` at once for one VM, panics for another and hangs for the rest.
    struct Odd {
        started: mpsc::Sender<()>,
        dropped: mpsc::Sender<()>,
    }

    struct Tell(mpsc::Sender<()>);

    impl Drop for Tell {
        fn drop(&mut self) {
            let _ = self.0.try_send(());
        }
    }

    #[async_trait]
    impl Site for Odd {
        async fn perform(
            &self,
            operation: SiteOperation,
            progress: &dyn ProgressSink,
        ) -> Result<Value, SiteError> {
            let SiteOperation::ReadPower(read) = operation else { panic!("unexpected operation") };
            match read.vm.0.as_u128() {
                1 => {
                    progress.report(Progress { bytes_done: 7, ..Progress::default() });
                    Ok(serde_json::to_value(PowerState::Running).unwrap())
                }
                2 => panic!("a bug in the driver"),
                _ => {
                    let _tell = Tell(self.dropped.clone());
                    self.started.send(()).await.unwrap();
                    std::future::pending().await
                }
            }
        }
    }

    fn read_power(number: u128) -> ReadPower {
        ReadPower { vm: VmId(uuid::Uuid::from_u128(number)) }
    }

    fn odd() -> (Arc<Odd>, mpsc::Receiver<()>, mpsc::Receiver<()>) {
        let (started, starts) = mpsc::channel(8);
        let (dropped, drops) = mpsc::channel(8);
        (Arc::new(Odd { started, dropped }), starts, drops)
    }

    #[tokio::test]
    async fn answers_travel_back_and_a_panic_becomes_an_error() {
        let (agent_end, server_end) = tokio::io::duplex(4096);
        let (site, _starts, _drops) = odd();
        tokio::spawn(serve_site(agent_end, site));
        let (remote, run) = RemoteSite::connect(server_end);
        tokio::spawn(run);
        assert_eq!(call(&*remote, read_power(1), &crate::NoProgress).await, Ok(PowerState::Running));
        let error = call(&*remote, read_power(2), &crate::NoProgress).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Failed);
        assert!(error.message.contains("ReadPower"), "{error}");
    }

    #[tokio::test]
    async fn dropping_the_request_cancels_it_at_the_agent() {
        let (agent_end, server_end) = tokio::io::duplex(4096);
        let (site, mut starts, mut drops) = odd();
        tokio::spawn(serve_site(agent_end, site));
        let (remote, run) = RemoteSite::connect(server_end);
        tokio::spawn(run);
        let request = tokio::spawn(async move { call(&*remote, read_power(3), &crate::NoProgress).await });
        starts.recv().await.unwrap();
        request.abort();
        drops.recv().await.unwrap();
    }

    #[tokio::test]
    async fn a_broken_connection_fails_the_request_and_drops_the_operation() {
        let (agent_end, server_end) = tokio::io::duplex(4096);
        let (site, mut starts, mut drops) = odd();
        let serving = tokio::spawn(serve_site(agent_end, site));
        let (remote, run) = RemoteSite::connect(server_end);
        let running = tokio::spawn(run);
        let waiting = {
            let remote = remote.clone();
            tokio::spawn(async move { call(&*remote, read_power(3), &crate::NoProgress).await })
        };
        starts.recv().await.unwrap();
        running.abort();
        assert!(running.await.unwrap_err().is_cancelled());
        drops.recv().await.unwrap();
        assert!(serving.await.unwrap().is_err());
        let error = waiting.await.unwrap().unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unavailable);
        let (agent_end, server_end) = tokio::io::duplex(4096);
        let (remote, run) = RemoteSite::connect(server_end);
        drop(agent_end);
        assert!(run.await.is_err());
        let error = call(&*remote, read_power(1), &crate::NoProgress).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unavailable);
    }

    async fn say<W: AsyncWrite + Unpin>(peer: &mut W, message: Value) {
        write_message(peer, &message).await.unwrap();
    }

    #[tokio::test]
    async fn an_agent_refuses_what_a_newer_server_asks_for_and_goes_on() {
        let (agent_end, mut server) = tokio::io::duplex(4096);
        let (site, _starts, _drops) = odd();
        tokio::spawn(serve_site(agent_end, site));
        let vm = uuid::Uuid::from_u128(1);
        let unknown = [
            json!({ "Gossip": { "about": "the weather" } }),
            json!({ "Start": { "id": 1, "operation": { "TeleportVm": { "vm": vm } } } }),
            json!({ "Start": { "id": 2, "operation": { "ReadPower": { "machine": vm } } } }),
            json!({ "Start": { "id": 3, "operation": { "ReadPower": { "vm": vm, "since": 7 } }, "urgent": true } }),
        ];
        for message in unknown {
            say(&mut server, message).await;
        }
        let mut answers = Vec::new();
        while answers.len() < 3 {
            if let ToServer::Done { id, result } = read_message(&mut server).await.unwrap() {
                answers.push((id, result));
            }
        }
        answers.sort_by_key(|(id, _)| *id);
        assert_eq!(answers[2], (3, json!({ "Ok": "Running" })));
        for (_, result) in &answers[..2] {
            let error: Result<Value, SiteError> = serde_json::from_value(result.clone()).unwrap();
            assert_eq!(error.unwrap_err().remedy, SAME_VERSION);
        }
    }

    #[tokio::test]
    async fn a_server_bears_what_a_newer_agent_answers() {
        let (mut agent, server_end) = tokio::io::duplex(4096);
        let (remote, run) = RemoteSite::connect(server_end);
        tokio::spawn(run);
        let ask = tokio::spawn(async move { call(&*remote, read_power(1), &crate::NoProgress).await });
        while !matches!(read_message(&mut agent).await.unwrap(), ToAgent::Start { id: 1, .. }) {}
        say(&mut agent, json!({ "Gossip": {} })).await;
        let error = json!({ "kind": "Bewitched", "message": "so it is", "remedy": "" });
        say(&mut agent, json!({ "Done": { "id": 1, "result": { "Err": error } } })).await;
        let error = ask.await.unwrap().unwrap_err();
        assert_eq!((error.kind, error.remedy.as_str()), (ErrorKind::Failed, SAME_VERSION));
    }

    #[tokio::test]
    async fn a_lying_length_is_refused() {
        let (mut peer, server_end) = tokio::io::duplex(4096);
        let (_remote, run) = RemoteSite::connect(server_end);
        peer.write_all(&u32::MAX.to_be_bytes()).await.unwrap();
        assert_eq!(run.await.unwrap_err().kind(), std::io::ErrorKind::InvalidData);
    }
}
