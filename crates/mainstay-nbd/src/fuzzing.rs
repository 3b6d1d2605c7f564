//! What fuzzing (`fuzz/`) gives its bytes to.

use std::io::Cursor;
use std::sync::Arc;

use mainstay_block::{BlockDevice as _, MemoryDevice};
use tokio::io::BufReader;

use crate::endpoint::Source;
use crate::server::{Exports, handshake, session};
use crate::{BASE_ALLOCATION, Client, ClientOptions, client};

/// All that a peer says: the first byte tells whether it is a client (even) or a server.
///
/// # Panics
/// When something is wrong with this crate.
pub fn nbd(data: &[u8]) {
    let Some((side, said)) = data.split_first() else { return };
    let source: Source = BufReader::new(Box::new(Cursor::new(said.to_vec())));
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime without drivers");
    runtime.block_on(async {
        // An error is what nonsense deserves.
        let _ = if side % 2 == 0 { from_client(source).await } else { from_server(source).await };
    });
}

async fn from_client(mut source: Source) -> Result<(), crate::NbdError> {
    let exports = Exports::new();
    let disk = Arc::new(MemoryDevice::new(1 << 20));
    exports.insert("disk", disk.clone(), false);
    exports.insert("fixed", disk, true);
    let mut sink: crate::endpoint::Sink = Box::new(tokio::io::sink());
    match handshake::negotiate(&mut source, &mut sink, &exports).await? {
        Some(agreed) => session::serve(source, sink, agreed).await,
        None => Ok(()),
    }
}

async fn from_server(mut source: Source) -> Result<(), crate::NbdError> {
    let options = ClientOptions::new("disk").with_context(BASE_ALLOCATION);
    let mut sink: crate::endpoint::Sink = Box::new(tokio::io::sink());
    let agreed = client::handshake::negotiate(&mut source, &mut sink, &options).await?;
    let client = Client::start(agreed, source, sink);
    let length = client.size().min(8192);
    let (read, status) =
        tokio::join!(client.read(0, length), client.block_status(BASE_ALLOCATION, 0, length));
    if let Ok(read) = read {
        assert_eq!(read.len() as u64, length, "a read is answered whole or not at all");
    }
    status.map(|_| ())
}
