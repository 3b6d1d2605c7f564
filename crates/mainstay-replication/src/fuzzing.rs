//! What fuzzing (`fuzz/`) gives its bytes to.

use bytes::BytesMut;

use crate::message::{CommitRequest, ExtentList, Hello, Query, Refusal, Welcome};
use crate::wire::{Incoming, Kind, read_incoming};
use crate::{ReplicationError, wire::Message};

/// What a peer sends on a connection, in either direction.
///
/// # Panics
/// When something is wrong with this crate.
pub fn wire(mut data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime without drivers");
    runtime.block_on(async {
        // Every other frame finds room, perhaps too little of it.
        let room = |bytes: usize| (bytes % 2 == 1).then(|| BytesMut::with_capacity(bytes / 2));
        while let Ok(incoming) = read_incoming(&mut data, &room).await {
            let Incoming::Message(message) = incoming else { continue };
            // Whether it can be read is for the peer to say; what can be read can be written.
            let _ = match message.kind {
                Kind::Hello => again::<Hello>(&message),
                Kind::Welcome => again::<Welcome>(&message),
                Kind::Refusal => again::<Refusal>(&message),
                Kind::Commit => again::<CommitRequest>(&message),
                Kind::Query => again::<Query>(&message),
                Kind::Answer => again::<ExtentList>(&message),
                Kind::Committed => again::<uuid::Uuid>(&message),
                Kind::Ping | Kind::Frame | Kind::Ack | Kind::Flush | Kind::Done => Ok(()),
            };
        }
    });
}

fn again<T: serde::Serialize + serde::de::DeserializeOwned>(
    message: &Message,
) -> Result<(), ReplicationError> {
    let body: T = message.body()?;
    let written = Message::control(message.kind, message.tag, &body).expect("what was read can be written");
    assert!(written.body::<T>().is_ok(), "what was written can be read");
    Ok(())
}
