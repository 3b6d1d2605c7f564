//! The server process: the API, the agents' endpoint, the certificate authority and what holds them together.
//!
//! HTTP is known only here (module [`http`]) and in `mainstay-api`. Nothing here decides: handlers parse, authenticate,
//! convert, and ask the control plane.

mod agents;
mod authority;
mod config;
#[doc(hidden)]
pub mod fuzzing;
mod http;
mod listener;
mod rescue;
mod server;
mod smtp;
mod token_key;
mod vault_key;
mod vaults;

pub use authority::{Authority, AuthorityError};
pub use config::ServerConfig;
pub use http::document_text as openapi_document;
pub use rescue::{Rebuilt, RebuiltVault, back_up, rebuild, restore};
pub use server::{Initialized, Running, initialize, run, run_with_clock};
pub use smtp::{SmtpConfig, SmtpTls};
pub use vault_key::create_vault_key;
