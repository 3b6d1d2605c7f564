//! `lab.json`: where everything of a lab is. Scripts outside the project rely on its words.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use mainstay_api::Connection;
use mainstay_block::durable::write_private;
use serde::{Deserialize, Serialize};

/// A lab as written down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabFile {
    /// The server's API.
    pub url: String,
    /// The certificate authority's certificate.
    pub ca_file: PathBuf,
    /// An ARM bearer token with all rights.
    pub token: String,
    /// Subscription id of the vault.
    pub subscription: String,
    /// Resource group of the vault.
    pub resource_group: String,
    /// The vault.
    pub vault: String,
    /// The server's process; 0 = not running.
    pub server_pid: i32,
    /// The sites.
    pub sites: Vec<LabSite>,
    /// The guests that the lab was made with.
    pub vms: Vec<LabVm>,
}

/// A site of a lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabSite {
    /// Its name.
    pub name: String,
    /// Its fabric in the vault.
    pub fabric: String,
    /// Its libvirt.
    pub libvirt_uri: String,
    /// Its agent's process; 0 = not running.
    pub agent_pid: i32,
    /// Its production network, as its agent names it.
    pub network: String,
}

/// A guest of a lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabVm {
    /// Its name.
    pub name: String,
    /// The site it was made at.
    pub site: String,
    /// ARM id of the protectable item.
    pub protectable_item_id: String,
}

const FILE: &str = "lab.json";

impl LabFile {
    /// Reads the file of a lab.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        let text = fs::read_to_string(&path).with_context(|| {
            format!(
                "there is no lab in {} ({FILE} is missing); make one with `mainstay lab up`",
                dir.display()
            )
        })?;
        serde_json::from_str(&text).with_context(|| format!("read {}", path.display()))
    }

    /// Writes the file, whole or not at all. Only its owner can read it: it has a token in it.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(FILE);
        write_private(&path, &serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("write {}", path.display()))
    }

    /// How to connect to the lab's server.
    pub fn connection(&self) -> Result<Connection> {
        let authority_pem =
            fs::read_to_string(&self.ca_file).with_context(|| format!("read {}", self.ca_file.display()))?;
        Ok(Connection { url: self.url.clone(), authority_pem, token: self.token.clone() })
    }

    /// A site by name.
    pub fn site(&self, name: &str) -> Result<&LabSite> {
        let known = || self.sites.iter().map(|site| site.name.as_str()).collect::<Vec<_>>().join(", ");
        let found = self.sites.iter().find(|site| site.name == name);
        found.ok_or_else(|| NotThere::site(name, &known()).into())
    }
}

/// Something was named that the lab does not have.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotThere(pub(crate) String);

impl NotThere {
    pub(crate) fn site(name: &str, known: &str) -> Self {
        Self(format!("the lab has no site '{name}'; its sites are: {known}"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Scripts read what is here by these words: a change of this test is a change for them.
    #[test]
    fn the_words_of_lab_json_are_a_contract() {
        let dir = tempfile::tempdir().unwrap();
        let file = LabFile {
            url: "https://127.0.0.1:1".to_owned(),
            ca_file: "/lab/ca.pem".into(),
            token: "secret".to_owned(),
            subscription: "s".to_owned(),
            resource_group: "g".to_owned(),
            vault: "v".to_owned(),
            server_pid: 7,
            sites: vec![LabSite {
                name: "home".to_owned(),
                fabric: "home".to_owned(),
                libvirt_uri: "qemu:///session".to_owned(),
                agent_pid: 8,
                network: "mcast:1".to_owned(),
            }],
            vms: vec![LabVm {
                name: "vm1".to_owned(),
                site: "home".to_owned(),
                protectable_item_id: "/subscriptions/s".to_owned(),
            }],
        };
        file.write(dir.path()).unwrap();
        let written: Value = serde_json::from_slice(&fs::read(dir.path().join(FILE)).unwrap()).unwrap();
        let expected = json!({
            "url": "https://127.0.0.1:1", "ca_file": "/lab/ca.pem", "token": "secret",
            "subscription": "s", "resource_group": "g", "vault": "v", "server_pid": 7,
            "sites": [{
                "name": "home", "fabric": "home", "libvirt_uri": "qemu:///session", "agent_pid": 8,
                "network": "mcast:1",
            }],
            "vms": [{ "name": "vm1", "site": "home", "protectable_item_id": "/subscriptions/s" }],
        });
        assert_eq!(written, expected);
        assert_eq!(LabFile::read(dir.path()).unwrap(), file);
    }
}
