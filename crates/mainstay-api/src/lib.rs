//! The published API.
//!
//! [`arm`] has the resources of Microsoft.RecoveryServices site recovery as its official OpenAPI documents
//! (2024-04-01) and recorded traffic show them; [`v1`] has what Azure has no word for; [`Client`] speaks both. Shapes
//! only: this crate depends on nothing of Mainstay's.

pub mod arm;
mod client;
mod received;
pub mod v1;

pub use client::{Client, ClientError, Connection, encode_segment};
pub use received::Received;
