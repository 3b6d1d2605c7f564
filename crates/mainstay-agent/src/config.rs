//! The agent's configuration: a TOML file, unknown keys refused.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The agent's settings. Every key can be left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AgentConfig {
    /// Where everything is kept: certificate, records, hash tables, recovery VMs' disks.
    pub data_dir: PathBuf,
    /// Where sockets and scratch files go; short, because a socket's path ends at 107 bytes. The hypervisor
    /// must be able to write here.
    pub run_dir: PathBuf,
    /// The hypervisor: a libvirt URI.
    pub libvirt_uri: String,
    /// Networks that libvirt has no object for: `bridge:NAME`, `mcast:ADDRESS:PORT`.
    pub networks: Vec<String>,
    /// Bytes per second at which a recovery VM's disk is copied out of the store while the VM runs; 0 = as fast as it
    /// goes.
    pub hydration_bytes_per_second: u64,
    /// Seconds for which a capture looks at new ranges before the transfer goes on with a capture of its own: an open
    /// capture blocks the administrator's snapshots and fills scratch space.
    pub capture_seconds_max: u64,
    /// A file that names the host's present boot.
    pub boot_id_file: PathBuf,
    /// Address of the server's agent endpoint, `HOST:PORT`; empty = what registration answered.
    pub server: String,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("/var/lib/mainstay/agent"),
            run_dir: PathBuf::from("/run/mainstay"),
            libvirt_uri: "qemu:///system".to_owned(),
            networks: Vec::new(),
            hydration_bytes_per_second: 0,
            capture_seconds_max: 60,
            boot_id_file: PathBuf::from("/proc/sys/kernel/random/boot_id"),
            server: String::new(),
        }
    }
}

impl AgentConfig {
    /// Reads a configuration text.
    pub fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }
}
