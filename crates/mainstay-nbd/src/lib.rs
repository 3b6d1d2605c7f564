//! The Network Block Device protocol, as far as site recovery needs it.
//!
//! A running QEMU shows a capture as an NBD export, and boots a recovered machine from one. This crate is
//! both ends: [`Client`] reads captures (with the dirty bitmaps that QEMU attaches to them) and [`Server`]
//! shows any [`mainstay_block::BlockDevice`] to QEMU, `qemu-img`, `nbdcopy` and the rest.
//!
//! Spoken: the fixed newstyle handshake, structured replies, block status with several contexts, reads,
//! writes, write-zeroes, trim and flush. Not spoken: TLS (sockets are local, or carried inside the agents'
//! own TLS), extended headers, resize. The peer may be hostile: everything it sends is checked, every
//! buffer has a bound ([`wire`]), and the answer to nonsense is an error, never a panic.

mod client;
mod endpoint;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod server;
mod wire;

pub use client::{BASE_ALLOCATION, Client, ClientOptions, StatusExtent, list_exports};
pub use endpoint::Endpoint;
pub use error::NbdError;
pub use server::{Export, Exports, Server};
