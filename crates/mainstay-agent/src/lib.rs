//! The agent of a registered host.
//!
//! [`HostSite`] carries out the control plane's operations over any [`mainstay_provider::Hypervisor`] and the data plane;
//! [`run`] keeps a connection to the server and serves it there. Everything the agent must know after a crash is in
//! its data directory, one file per item ([`records`]).

mod config;
mod connection;
mod host_site;
mod identity;
mod priority;
pub mod records;

pub use config::AgentConfig;
pub use connection::{ServerLink, run};
pub use host_site::{HostOptions, HostSite};
pub use identity::{Identity, RegistrationKey, register};
pub use priority::stand_back;
