//! The server's configuration: a TOML file, unknown keys refused.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use mainstay_control::{
    reconcilers::{OldCopies, ScrubPace},
    workflows::SHUTDOWN_TIMEOUT,
};
use serde::{Deserialize, Serialize};

use crate::smtp::SmtpConfig;

/// The server's settings. Every key can be left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerConfig {
    /// Where everything is kept: database, certificates, recovery points.
    pub data_dir: PathBuf,
    /// Where the API listens (HTTPS).
    pub listen: SocketAddr,
    /// Where agents are let in (mTLS).
    pub agent_listen: SocketAddr,
    /// Names and addresses under which clients and agents reach the server; they stand in its certificate.
    pub names: Vec<String>,
    /// Address that agents are told, `HOST:PORT`; empty = the first name with the agents' port.
    pub agent_endpoint: String,
    /// Where recovery points are kept; empty = under the data directory.
    pub store_dir: Option<PathBuf>,
    /// File of the vault key (`mainstay server key FILE`): what is written into the replica store is encrypted. Without the key
    /// nobody can read the store, so a copy of it belongs in a safe place, apart from the store.
    pub vault_key_file: Option<PathBuf>,
    /// Files of vault keys that the one above has replaced. A store that is locked with one of them is locked with the new one
    /// at the next start; then they can go.
    pub former_vault_key_files: Vec<PathBuf>,
    /// Space in MiB that recovery points leave free on their file system: for the database, whose jobs and events must be
    /// written also when the site is full, and for what makes space again.
    pub store_reserve_mib: u64,
    /// Hours between two complete readings of each replica, in which every stored byte is verified and what is damaged is put
    /// right; 0 = only when somebody asks (`mainstay scrub start`).
    pub scrub_interval_hours: u32,
    /// Bytes per second that such a reading takes at most, in MiB; 0 = as fast as it goes.
    pub scrub_mib_per_second: u32,
    /// What becomes of a copy of a VM that is found running although another copy is the active one: `stop` or `report`.
    pub old_copies: OldCopies,
    /// Directory of the programs that recovery plans may run; empty = they run none.
    pub script_dir: Option<PathBuf>,
    /// How long a guest may take to shut down in a failover or failback, in seconds.
    pub shutdown_timeout_seconds: u32,
    /// How long a request's head, and its body, may take, in seconds; whoever needs longer for so little holds a place that
    /// others want.
    pub request_timeout_seconds: u32,
    /// Failed sign-ins of one address in a minute; more are answered without being looked at, and not written down.
    pub failed_sign_ins_per_minute: u32,
    /// Where alerts go; nobody is told by mail without it.
    pub smtp: Option<SmtpConfig>,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("/var/lib/mainstay/server"),
            listen: SocketAddr::from(([0, 0, 0, 0], 8443)),
            agent_listen: SocketAddr::from(([0, 0, 0, 0], 8444)),
            names: vec!["localhost".to_owned(), "127.0.0.1".to_owned()],
            agent_endpoint: String::new(),
            store_dir: None,
            vault_key_file: None,
            former_vault_key_files: Vec::new(),
            store_reserve_mib: 1024,
            scrub_interval_hours: 7 * 24,
            scrub_mib_per_second: 64,
            old_copies: OldCopies::Stop,
            script_dir: None,
            smtp: None,
            request_timeout_seconds: 60,
            failed_sign_ins_per_minute: 20,
            shutdown_timeout_seconds: u32::try_from(SHUTDOWN_TIMEOUT.as_secs()).unwrap_or(u32::MAX),
        }
    }
}

impl ServerConfig {
    /// Reads a configuration text.
    pub fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }

    /// How replicas are read through.
    pub fn scrub_pace(&self) -> ScrubPace {
        let hours = u64::from(self.scrub_interval_hours);
        let bytes = u64::from(self.scrub_mib_per_second) << 20;
        ScrubPace {
            interval: (hours > 0).then(|| Duration::from_secs(hours * 3600)),
            bytes_per_second: (bytes > 0).then_some(bytes),
        }
    }

    /// Where recovery points are kept.
    pub fn store_dir(&self) -> PathBuf {
        self.store_dir.clone().unwrap_or_else(|| self.data_dir.join("store"))
    }
}
