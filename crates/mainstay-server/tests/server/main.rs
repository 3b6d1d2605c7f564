//! The server over the wire, in the test's process. One program: each further one would be linked with everything again.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod access;
mod agent_port;
mod alerts;
mod encryption;
mod fuzz;
mod fuzz_corpus;
mod keys;
mod limits;
mod openapi;
mod operations;
mod replay;
mod roles;
mod support;
mod vaults;
