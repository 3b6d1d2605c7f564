//! The client's side of the fixed newstyle handshake.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::ClientOptions;
use crate::endpoint::{Endpoint, Sink, Source};
use crate::error::NbdError;
use crate::wire::{
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, Fields, INFO_EXPORT, INIT_MAGIC, OPT_ABORT, OPT_GO, OPT_LIST,
    OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY, OPTION_BYTES_MAX, OPTION_MAGIC, OPTION_REPLY_MAGIC,
    OPTIONS_MAX, REP_ACK, REP_ERROR_BIT, REP_INFO, REP_META_CONTEXT, REP_SERVER, put_string,
};

/// What both ends agreed on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Agreed {
    pub(crate) size: u64,
    pub(crate) flags: u16,
    pub(crate) structured: bool,
    /// The contexts we have, with the numbers by which replies name them.
    pub(crate) contexts: Vec<(String, u32)>,
}

/// Carries out the handshake.
pub(crate) async fn negotiate(
    source: &mut Source,
    sink: &mut Sink,
    options: &ClientOptions,
) -> Result<Agreed, NbdError> {
    greet(source, sink).await?;
    let mut agreed = Agreed::default();
    let answer = ask(source, sink, OPT_STRUCTURED_REPLY, &[]).await?;
    agreed.structured = answer.error.is_none();
    if agreed.structured && !options.contexts.is_empty() {
        agreed.contexts = set_contexts(source, sink, options).await?;
    }
    let mut payload = Vec::new();
    put_string(&mut payload, &options.export);
    // No information requests: a server then has to accept any alignment.
    payload.extend_from_slice(&0_u16.to_be_bytes());
    let answer = ask(source, sink, OPT_GO, &payload).await?;
    if let Some(reason) = answer.error {
        return Err(NbdError::Refused { export: options.export.clone(), reason });
    }
    let mut export = None;
    for (kind, bytes) in &answer.replies {
        let mut fields = Fields(bytes);
        if *kind == REP_INFO && fields.u16()? == INFO_EXPORT {
            export = Some((fields.u64()?, fields.u16()?));
        }
    }
    (agreed.size, agreed.flags) = export.ok_or_else(|| NbdError::protocol("the export has no size"))?;
    Ok(agreed)
}

/// The names of all exports of a server.
pub async fn list_exports(endpoint: &Endpoint, timeout: Duration) -> Result<Vec<String>, NbdError> {
    let list = async {
        let (mut source, mut sink) = endpoint.connect().await?;
        greet(&mut source, &mut sink).await?;
        let answer = ask(&mut source, &mut sink, OPT_LIST, &[]).await?;
        if let Some(reason) = answer.error {
            return Err(NbdError::Refused { export: String::new(), reason });
        }
        let mut names = Vec::new();
        for (kind, bytes) in &answer.replies {
            if *kind == REP_SERVER {
                names.push(Fields(bytes).string()?);
            }
        }
        // Politeness; the list is complete whether or not the server answers.
        let _ = send_option(&mut sink, OPT_ABORT, &[]).await;
        Ok(names)
    };
    tokio::time::timeout(timeout, list).await.map_err(|_elapsed| NbdError::Timeout(endpoint.to_string()))?
}

async fn greet(source: &mut Source, sink: &mut Sink) -> Result<(), NbdError> {
    if source.read_u64().await? != INIT_MAGIC || source.read_u64().await? != OPTION_MAGIC {
        return Err(NbdError::protocol("the peer is not a newstyle NBD server"));
    }
    let server_flags = source.read_u16().await?;
    if server_flags & FLAG_FIXED_NEWSTYLE == 0 {
        return Err(NbdError::protocol("the server does not speak the fixed newstyle handshake"));
    }
    let client_flags = u32::from(server_flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES));
    sink.write_all(&client_flags.to_be_bytes()).await?;
    Ok(())
}

async fn set_contexts(
    source: &mut Source,
    sink: &mut Sink,
    options: &ClientOptions,
) -> Result<Vec<(String, u32)>, NbdError> {
    let mut payload = Vec::new();
    put_string(&mut payload, &options.export);
    payload.extend_from_slice(&(options.contexts.len() as u32).to_be_bytes());
    for context in &options.contexts {
        put_string(&mut payload, context);
    }
    let answer = ask(source, sink, OPT_SET_META_CONTEXT, &payload).await?;
    if answer.error.is_some() {
        return Ok(Vec::new());
    }
    let mut contexts = Vec::new();
    for (kind, bytes) in &answer.replies {
        if *kind == REP_META_CONTEXT {
            let mut fields = Fields(bytes);
            let id = fields.u32()?;
            contexts.push((fields.rest(), id));
        }
    }
    Ok(contexts)
}

/// Everything a server said to one option.
struct Answer {
    replies: Vec<(u32, Vec<u8>)>,
    error: Option<String>,
}

async fn send_option(sink: &mut Sink, option: u32, payload: &[u8]) -> Result<(), NbdError> {
    let mut bytes = Vec::with_capacity(16 + payload.len());
    bytes.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    bytes.extend_from_slice(payload);
    sink.write_all(&bytes).await?;
    sink.flush().await?;
    Ok(())
}

async fn ask(source: &mut Source, sink: &mut Sink, option: u32, payload: &[u8]) -> Result<Answer, NbdError> {
    send_option(sink, option, payload).await?;
    let mut replies = Vec::new();
    for _ in 0..OPTIONS_MAX {
        if source.read_u64().await? != OPTION_REPLY_MAGIC || source.read_u32().await? != option {
            return Err(NbdError::protocol("an answer to another question"));
        }
        let kind = source.read_u32().await?;
        let length = source.read_u32().await?;
        if length > OPTION_BYTES_MAX {
            return Err(NbdError::protocol(format!("an answer of {length} bytes")));
        }
        let mut bytes = vec![0; length as usize];
        source.read_exact(&mut bytes).await?;
        match kind {
            REP_ACK => return Ok(Answer { replies, error: None }),
            kind if kind & REP_ERROR_BIT != 0 => {
                let text = String::from_utf8_lossy(&bytes).into_owned();
                let error =
                    if text.is_empty() { format!("error {:#x}", kind & !REP_ERROR_BIT) } else { text };
                return Ok(Answer { replies, error: Some(error) });
            }
            kind => replies.push((kind, bytes)),
        }
    }
    Err(NbdError::protocol("the server does not come to an end"))
}
