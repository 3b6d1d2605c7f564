//! The data plane between agents and server: how changed blocks get to the recovery site, and back.
//!
//! The agent dials; the stream it gets (TLS is the caller's business) carries one session:
//!
//! * **Replicate** ([`replicate`]): a capture becomes a recovery point. Reads the changed ranges, drops blocks the
//!   replica already holds (hash tables), sends frames, commits. Goes on after a broken connection without
//!   resending what the server has; starts over by itself when the server lost the session.
//! * **Mount** ([`Mount`]): the disks of a recovery point as block devices, for booting from; also keyed hashes.
//! * **Fetch** ([`fetch`]): what differs between two recovery points, applied to local disks: failback.
//! * **Outcome** ([`session_outcome`], [`settle`]): whether a session was committed, asked after a crash.
//!
//! The server side is one function, [`serve_connection`], directly over [`mainstay_store::Store`]. Every message and
//! limit is specified in `docs/formats/wire.md`. Nothing waits for a round trip per block: requests and frames are
//! pipelined, bounded by a window.

mod connect;
mod effort;
mod error;
mod fetch;
#[doc(hidden)]
pub mod fuzzing;
mod link;
mod message;
mod mount;
mod outcome;
mod scan;
mod send;
mod serve;
mod serve_fetch;
mod throttle;
mod wire;

pub use connect::{BoxStream, Connect, Stream};
pub use error::{RefusalKind, ReplicationError};
pub use fetch::{FetchJob, FetchReport, FetchTarget, fetch};
pub use mount::{Mount, MountOptions, RemoteDisk};
pub use outcome::{rebuild_table, session_outcome, settle};
pub use send::{
    BeforePartial, DiskProgress, SendDisk, SendJob, SendOptions, SendOutcome, SendProgress, replicate,
};
pub use serve::{Access, Authorize, ServeReport, SessionKind, serve_connection};
pub use wire::Traffic;
