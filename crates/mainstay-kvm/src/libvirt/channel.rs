//! The guest agent's channel, where libvirt has lost sight of it.
//!
//! When the agent in a guest opens its channel, QEMU says so once, and libvirt asks for the domain's job lock before it connects.
//! A backup holds that lock (seen with libvirt 11.3: "cannot acquire state change lock … qemu-event"); after 30 s libvirt gives
//! up, and holds the channel for closed until the VM starts anew. A VM that boots while a capture is open, after a crash for
//! instance, would so lose its agent: no frozen file systems, no addresses, no shutdown. The channel's socket is there, and
//! nobody is connected to it; so the question is put to it directly, and the connection given up at once, for libvirt to have.
//!
//! Protocol: one JSON object a line, as QEMU's documentation of the guest agent describes it (`guest-sync-delimited`).

use std::path::{Path, PathBuf};
use std::time::Duration;

use mainstay_provider::{ErrorKind, SiteError};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

use crate::error::failed;
use crate::xml::AgentChannel;

/// The most that is read of a guest, which may send without end; libvirt has the same limit.
const ANSWER_BYTES_MAX: u64 = 10 << 20;
/// Begins an answer to `guest-sync-delimited`, and cannot occur in JSON.
const DELIMITER: u8 = 0xff;

/// The channel's socket, if the guest has opened the channel and nobody is connected to it. `devices` is what QEMU answers to
/// `query-chardev`.
pub(super) fn forgotten(channel: &AgentChannel, devices: &Value) -> Option<PathBuf> {
    if channel.is_connected {
        return None;
    }
    let label = format!("char{}", channel.alias.as_deref()?);
    let device = devices.as_array()?.iter().find(|device| device["label"] == label.as_str())?;
    let is_alone = device["filename"].as_str()?.starts_with("disconnected:");
    (is_alone && device["frontend-open"] == true).then(|| channel.socket.clone()).flatten()
}

/// Puts a request to the agent; answers its line.
pub(super) async fn ask(socket: &Path, request: &str, timeout: Duration) -> Result<String, SiteError> {
    let asked = async {
        let mut stream = BufReader::new(UnixStream::connect(socket).await?.take(ANSWER_BYTES_MAX));
        // What somebody else left unread or half written is before the delimiter.
        let id: u32 = rand::random();
        let hello = json!({"execute": "guest-sync-delimited", "arguments": {"id": id}});
        let mut bytes = vec![DELIMITER];
        bytes.extend_from_slice(format!("{hello}\n").as_bytes());
        stream.get_mut().get_mut().write_all(&bytes).await?;
        loop {
            let mut skipped = Vec::new();
            if stream.read_until(DELIMITER, &mut skipped).await? == 0 {
                return Ok(None);
            }
            let mut line = String::new();
            stream.read_line(&mut line).await?;
            if serde_json::from_str::<Value>(&line).is_ok_and(|answer| answer["return"] == id) {
                break;
            }
        }
        stream.get_mut().get_mut().write_all(format!("{request}\n").as_bytes()).await?;
        let mut line = String::new();
        let read = stream.read_line(&mut line).await?;
        Ok::<_, std::io::Error>((read > 0).then_some(line))
    };
    match tokio::time::timeout(timeout, asked).await {
        Ok(Ok(Some(line))) => Ok(line),
        Ok(Ok(None)) => Err(failed("the guest agent's channel was closed before it answered")),
        Ok(Err(error)) => Err(failed(format!("asking the guest agent through its channel: {error}"))),
        Err(_elapsed) => {
            let text = format!("the guest agent did not answer in {} s", timeout.as_secs());
            Err(SiteError::new(ErrorKind::Unavailable, text))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_channel_that_nobody_listens_to_is_forgotten() {
        let channel = AgentChannel {
            is_connected: false,
            alias: Some("channel1".to_owned()),
            socket: Some("/run/ga".into()),
        };
        let device = |filename: &str, is_open: bool| {
            json!([{"label": "charserial0", "filename": "pty", "frontend-open": true},
                {"label": "charchannel1", "filename": filename, "frontend-open": is_open}])
        };
        let alone = "disconnected:unix:/run/ga,server=on";
        assert_eq!(forgotten(&channel, &device(alone, true)), Some("/run/ga".into()));
        assert_eq!(forgotten(&channel, &device(alone, false)), None);
        assert_eq!(forgotten(&channel, &device("unix:/run/ga,server=on", true)), None);
        assert_eq!(forgotten(&channel, &json!([])), None);
        assert_eq!(forgotten(&AgentChannel { is_connected: true, ..channel }, &device(alone, true)), None);
    }

    #[tokio::test]
    async fn an_answer_is_found_behind_what_others_left_and_silence_ends() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("ga");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let agent = tokio::spawn(async move {
            let mut stream = BufReader::new(listener.accept().await.unwrap().0);
            let mut hello = Vec::new();
            stream.read_until(b'\n', &mut hello).await.unwrap();
            let hello: Value = serde_json::from_slice(&hello[1..]).unwrap();
            let id = &hello["arguments"]["id"];
            let old = format!("{{\"return\": 1}}\n\u{0}{{\"return\": {id}");
            stream.get_mut().write_all(old.as_bytes()).await.unwrap();
            stream.get_mut().write_all(b"\xff{\"return\": -7}\n\xff").await.unwrap();
            stream.get_mut().write_all(format!("{{\"return\": {id}}}\n").as_bytes()).await.unwrap();
            let mut request = String::new();
            stream.read_line(&mut request).await.unwrap();
            stream.get_mut().write_all(b"{\"return\": {}}\n").await.unwrap();
            // Holds the next one up.
            (request, listener.accept().await.unwrap())
        });
        let answer = ask(&socket, "{\"execute\": \"guest-ping\"}", Duration::from_secs(60)).await.unwrap();
        assert_eq!(answer, "{\"return\": {}}\n");
        let silent = ask(&socket, "{}", Duration::from_millis(50)).await.err().map(|error| error.kind);
        assert_eq!(silent, Some(ErrorKind::Unavailable));
        assert_eq!(agent.await.unwrap().0, "{\"execute\": \"guest-ping\"}\n");
    }
}
