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
        let known: Vec<_> = self.sites.iter().map(|site| site.name.as_str()).collect();
        self.sites
            .iter()
            .find(|site| site.name == name)
            .with_context(|| format!("the lab has no site '{name}'; its sites are: {}", known.join(", ")))
    }
}
