//! The server's side of the fixed newstyle handshake.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{Export, Exports};
use crate::client::BASE_ALLOCATION;
use crate::endpoint::{Sink, Source};
use crate::error::NbdError;
use crate::wire::{
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, Fields, INFO_BLOCK_SIZE, INFO_EXPORT, INIT_MAGIC, NAME_BYTES_MAX,
    OPT_ABORT, OPT_EXPORT_NAME, OPT_GO, OPT_INFO, OPT_LIST, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY, OPTION_BYTES_MAX, OPTION_MAGIC, OPTION_REPLY_MAGIC, OPTIONS_MAX, PAYLOAD_BYTES_MAX,
    REP_ACK, REP_ERR_INVALID, REP_ERR_UNKNOWN, REP_ERR_UNSUP, REP_INFO, REP_META_CONTEXT, REP_SERVER,
    TRANSMISSION_CAN_MULTI_CONN, TRANSMISSION_HAS_FLAGS, TRANSMISSION_READ_ONLY, TRANSMISSION_SEND_DF,
    TRANSMISSION_SEND_FLUSH, TRANSMISSION_SEND_FUA, TRANSMISSION_SEND_TRIM, TRANSMISSION_SEND_WRITE_ZEROES,
    put_string,
};

/// The number by which replies name `base:allocation`.
pub(crate) const ALLOCATION_ID: u32 = 1;

/// What both ends agreed on.
pub(crate) struct Agreed {
    pub(crate) export: Export,
    pub(crate) structured: bool,
    /// Whether the client asked for the allocation map of this export.
    pub(crate) allocation: bool,
}

/// What the client has asked for so far.
#[derive(Default)]
struct Progress {
    structured: bool,
    /// The export for which the allocation map was asked.
    allocation_of: Option<String>,
    no_zeroes: bool,
}

/// Carries out the handshake. `None`: the client only wanted to look.
pub(crate) async fn negotiate(
    source: &mut Source,
    sink: &mut Sink,
    exports: &Exports,
) -> Result<Option<Agreed>, NbdError> {
    let mut hello = Vec::new();
    hello.extend_from_slice(&INIT_MAGIC.to_be_bytes());
    hello.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    hello.extend_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    sink.write_all(&hello).await?;
    let client_flags = source.read_u32().await?;
    if client_flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
        return Err(NbdError::protocol(format!("unknown client flags {client_flags:#x}")));
    }
    let no_zeroes = client_flags & u32::from(FLAG_NO_ZEROES) != 0;
    let mut progress = Progress { no_zeroes, ..Progress::default() };
    for _ in 0..OPTIONS_MAX {
        if source.read_u64().await? != OPTION_MAGIC {
            return Err(NbdError::protocol("an option without its magic"));
        }
        let option = source.read_u32().await?;
        let length = source.read_u32().await?;
        if length > OPTION_BYTES_MAX {
            return Err(NbdError::protocol(format!("an option of {length} bytes")));
        }
        let mut payload = vec![0; length as usize];
        source.read_exact(&mut payload).await?;
        match answer(sink, option, &payload, &mut progress, exports).await? {
            Next::Option => {}
            Next::End => return Ok(None),
            Next::Transmission(agreed) => return Ok(Some(agreed)),
        }
    }
    Err(NbdError::protocol("the client does not come to an end"))
}

enum Next {
    Option,
    End,
    Transmission(Agreed),
}

async fn answer(
    sink: &mut Sink,
    option: u32,
    payload: &[u8],
    progress: &mut Progress,
    exports: &Exports,
) -> Result<Next, NbdError> {
    match option {
        OPT_ABORT => {
            reply(sink, option, REP_ACK, &[]).await?;
            return Ok(Next::End);
        }
        OPT_EXPORT_NAME => return export_name(sink, payload, progress, exports).await,
        OPT_LIST if payload.is_empty() => {
            for name in exports.names() {
                let mut bytes = Vec::new();
                put_string(&mut bytes, &name);
                reply(sink, option, REP_SERVER, &bytes).await?;
            }
            reply(sink, option, REP_ACK, &[]).await?;
        }
        OPT_STRUCTURED_REPLY if payload.is_empty() => {
            progress.structured = true;
            reply(sink, option, REP_ACK, &[]).await?;
        }
        OPT_INFO | OPT_GO => return info(sink, option, payload, progress, exports).await,
        OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => {
            match read_contexts(payload, option == OPT_LIST_META_CONTEXT) {
                Ok((name, _)) if exports.get(&name).is_none() => unknown(sink, option, &name).await?,
                Ok((name, wants_allocation)) => {
                    if wants_allocation {
                        let mut bytes = ALLOCATION_ID.to_be_bytes().to_vec();
                        bytes.extend_from_slice(BASE_ALLOCATION.as_bytes());
                        reply(sink, option, REP_META_CONTEXT, &bytes).await?;
                    }
                    if option == OPT_SET_META_CONTEXT {
                        progress.allocation_of = wants_allocation.then_some(name);
                    }
                    reply(sink, option, REP_ACK, &[]).await?;
                }
                Err(error) => reply(sink, option, REP_ERR_INVALID, error.to_string().as_bytes()).await?,
            }
        }
        OPT_LIST | OPT_STRUCTURED_REPLY => {
            reply(sink, option, REP_ERR_INVALID, b"unexpected payload").await?;
        }
        _ => reply(sink, option, REP_ERR_UNSUP, b"not supported").await?,
    }
    Ok(Next::Option)
}

/// The export's name and whether `base:allocation` is among the queries.
fn read_contexts(payload: &[u8], listing: bool) -> Result<(String, bool), NbdError> {
    let mut fields = Fields(payload);
    let name = fields.string()?;
    let count = fields.u32()?;
    let mut wants_allocation = listing && count == 0;
    // Each query takes at least four bytes, so a false count ends with the payload.
    for _ in 0..count {
        let query = fields.string()?;
        wants_allocation |= query == BASE_ALLOCATION || (listing && query == "base:");
    }
    Ok((name, wants_allocation))
}

async fn info(
    sink: &mut Sink,
    option: u32,
    payload: &[u8],
    progress: &Progress,
    exports: &Exports,
) -> Result<Next, NbdError> {
    let mut fields = Fields(payload);
    let Ok(name) = fields.string() else {
        reply(sink, option, REP_ERR_INVALID, b"no export name").await?;
        return Ok(Next::Option);
    };
    let Some(export) = exports.get(&name) else {
        unknown(sink, option, &name).await?;
        return Ok(Next::Option);
    };
    let mut bytes = INFO_EXPORT.to_be_bytes().to_vec();
    bytes.extend_from_slice(&export.device.size().to_be_bytes());
    bytes.extend_from_slice(&transmission_flags(&export, progress.structured).to_be_bytes());
    reply(sink, option, REP_INFO, &bytes).await?;
    let mut bytes = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
    // Any alignment works; whole blocks are best.
    for size in [1, mainstay_block::BLOCK_BYTES as u32, PAYLOAD_BYTES_MAX] {
        bytes.extend_from_slice(&size.to_be_bytes());
    }
    reply(sink, option, REP_INFO, &bytes).await?;
    reply(sink, option, REP_ACK, &[]).await?;
    Ok(if option == OPT_GO { Next::Transmission(agree(export, &name, progress)) } else { Next::Option })
}

/// The oldest way to begin; it has no way to refuse but to hang up.
async fn export_name(
    sink: &mut Sink,
    payload: &[u8],
    progress: &Progress,
    exports: &Exports,
) -> Result<Next, NbdError> {
    let name = String::from_utf8_lossy(payload).into_owned();
    let Some(export) = exports.get(&name).filter(|_| payload.len() <= NAME_BYTES_MAX) else {
        return Err(NbdError::protocol("the client asked for an export that does not exist"));
    };
    let mut bytes = export.device.size().to_be_bytes().to_vec();
    bytes.extend_from_slice(&transmission_flags(&export, progress.structured).to_be_bytes());
    if !progress.no_zeroes {
        bytes.resize(bytes.len() + 124, 0);
    }
    sink.write_all(&bytes).await?;
    sink.flush().await?;
    Ok(Next::Transmission(agree(export, &name, progress)))
}

fn agree(export: Export, name: &str, progress: &Progress) -> Agreed {
    let allocation = progress.structured && progress.allocation_of.as_deref() == Some(name);
    Agreed { export, structured: progress.structured, allocation }
}

fn transmission_flags(export: &Export, structured: bool) -> u16 {
    let mut flags = TRANSMISSION_HAS_FLAGS | TRANSMISSION_SEND_FLUSH | TRANSMISSION_CAN_MULTI_CONN;
    if export.read_only {
        flags |= TRANSMISSION_READ_ONLY;
    } else {
        flags |= TRANSMISSION_SEND_FUA | TRANSMISSION_SEND_TRIM | TRANSMISSION_SEND_WRITE_ZEROES;
    }
    if structured { flags | TRANSMISSION_SEND_DF } else { flags }
}

async fn unknown(sink: &mut Sink, option: u32, name: &str) -> Result<(), NbdError> {
    reply(sink, option, REP_ERR_UNKNOWN, format!("there is no export '{name}'").as_bytes()).await
}

async fn reply(sink: &mut Sink, option: u32, kind: u32, payload: &[u8]) -> Result<(), NbdError> {
    let mut bytes = Vec::with_capacity(20 + payload.len());
    bytes.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    bytes.extend_from_slice(payload);
    sink.write_all(&bytes).await?;
    sink.flush().await?;
    Ok(())
}
