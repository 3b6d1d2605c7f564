//! The agent's configuration: a TOML file, unknown keys refused.

use std::{net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

/// The agent's settings. Every key can be left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AgentConfig {
    /// Where the agent keeps what it knows: certificate, records, hash tables.
    pub data_dir: PathBuf,
    /// Where the disks of recovery VMs and of staging areas lie, and the scratch files of captures: it needs room, must
    /// outlive a boot, and QEMU's account must be able to pass through its parents. At most 60 bytes, for sockets lie there,
    /// too. Empty = `kvm` in `data_dir`.
    pub vm_dir: PathBuf,
    /// Where the sockets lie over which recovery VMs read the store; short, because a socket's path ends at 107 bytes.
    pub run_dir: PathBuf,
    /// The hypervisor: a libvirt URI.
    pub libvirt_uri: String,
    /// Networks that libvirt has no object for and that reach other machines: `bridge:NAME`, `mcast:ADDRESS:PORT`.
    pub networks: Vec<String>,
    /// Networks that reach nothing but their own members, so that test copies may be attached to them. Nobody but the
    /// administrator knows that of a bridge or a group. libvirt's own networks need not be named: it knows whether
    /// they forward.
    pub isolated_networks: Vec<String>,
    /// Bytes per second at which a recovery VM's disk is copied out of the store while the VM runs; 0 = as fast as it
    /// goes.
    pub hydration_bytes_per_second: u64,
    /// Seconds for which a capture looks at new ranges before the transfer goes on with a capture of its own: an open
    /// capture blocks the administrator's snapshots and fills scratch space.
    pub capture_seconds_max: u64,
    /// How much the agent's threads stand back behind the host's guests when both want the processor: 0 not at all, 19 wholly
    /// (`nice`). Where the processor is idle it makes no difference.
    pub nice: u8,
    /// A file that names the host's present boot.
    pub boot_id_file: PathBuf,
    /// Address of the server's agent endpoint, `HOST:PORT`; empty = what registration answered.
    pub server: String,
    /// Where `/metrics` and `/readyz` are answered, in plain HTTP and to whoever asks: an address that only this host has.
    /// Nowhere without it.
    pub metrics_listen: Option<SocketAddr>,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("/var/lib/mainstay/agent"),
            vm_dir: PathBuf::new(),
            run_dir: PathBuf::from("/run/mainstay"),
            libvirt_uri: "qemu:///system".to_owned(),
            networks: Vec::new(),
            isolated_networks: Vec::new(),
            hydration_bytes_per_second: 0,
            capture_seconds_max: 60,
            nice: 10,
            boot_id_file: PathBuf::from("/proc/sys/kernel/random/boot_id"),
            server: String::new(),
            metrics_listen: None,
        }
    }
}

impl AgentConfig {
    /// Reads a configuration text.
    pub fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }

    /// Where the disks of recovery VMs lie.
    pub fn vm_dir(&self) -> PathBuf {
        if self.vm_dir.as_os_str().is_empty() { self.data_dir.join("kvm") } else { self.vm_dir.clone() }
    }

    /// Says what is wrong with the settings although each can be read.
    pub fn check(&self) -> Result<(), String> {
        if self.nice > 19 {
            return Err(format!("nice is {}, but 19 is the most", self.nice));
        }
        if let Some(address) = self.metrics_listen.filter(|address| !address.ip().is_loopback()) {
            return Err(format!(
                "metrics_listen is {address}, but what is answered there is open to all: say an address that only this host \
                 has, such as 127.0.0.1:9464"
            ));
        }
        for name in self.networks.iter().chain(&self.isolated_networks) {
            check_network(name)?;
        }
        match self.isolated_networks.iter().find(|name| self.networks.contains(name)) {
            Some(both) => Err(format!(
                "'{both}' is in networks and in isolated_networks: it either reaches other machines or it does not"
            )),
            None => Ok(()),
        }
    }
}

/// Whether a name is one of those that are for networks without an object of libvirt's.
fn check_network(name: &str) -> Result<(), String> {
    let is_group = |group: &str| {
        group
            .parse::<std::net::SocketAddrV4>()
            .is_ok_and(|group| group.ip().is_multicast() && group.port() > 0)
    };
    let is_good = match name.split_once(':') {
        // Linux's names of interfaces.
        Some(("bridge", bridge)) => {
            (1..=15).contains(&bridge.len()) && !bridge.contains(['/', ':', ' ', '\'', '"', '<'])
        }
        Some(("mcast", group)) => is_group(group),
        _ => false,
    };
    if is_good {
        return Ok(());
    }
    Err(format!(
        "'{name}' is not a network: write bridge:NAME, or mcast:ADDRESS:PORT with a multicast address"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_must_outlive_a_boot_is_never_kept_in_run() {
        let with = |text: &str| AgentConfig::parse(text).unwrap().vm_dir();
        assert_eq!(with(""), PathBuf::from("/var/lib/mainstay/agent/kvm"));
        assert_eq!(with("data_dir = '/srv/a'\nrun_dir = '/run/a'"), PathBuf::from("/srv/a/kvm"));
        assert_eq!(with("data_dir = '/srv/a'\nvm_dir = '/vms'"), PathBuf::from("/vms"));
    }

    #[test]
    fn values_are_checked() {
        let check = |text: &str| AgentConfig::parse(text).unwrap().check();
        let good = "networks = ['bridge:br0']\nisolated_networks = ['bridge:lab', 'mcast:239.1.2.3:4000']";
        assert_eq!(check(good), Ok(()));
        for wrong in
            ["lab", "bridge:", "bridge:a/b", "mcast:10.0.0.1:4000", "mcast:239.1.2.3", "mcast:239.1.2.3:0"]
        {
            assert!(check(&format!("isolated_networks = ['{wrong}']")).unwrap_err().contains(wrong));
        }
        let both = check("networks = ['bridge:lab']\nisolated_networks = ['bridge:lab']").unwrap_err();
        assert!(both.contains("bridge:lab"), "{both}");
        assert!(AgentConfig::parse("isolated = []").is_err());
        assert_eq!(check("nice = 19"), Ok(()));
        assert!(check("nice = 20").unwrap_err().contains("20"));
        assert!(AgentConfig::parse("nice = -1").is_err());
        for own in ["127.0.0.1:9464", "127.8.0.1:1", "[::1]:9464"] {
            assert_eq!(check(&format!("metrics_listen = '{own}'")), Ok(()));
        }
        for other in ["0.0.0.0:9464", "[::]:9464", "10.0.0.1:9464"] {
            assert!(check(&format!("metrics_listen = '{other}'")).unwrap_err().contains(other));
        }
    }
}
