//! A session with a server: where it is, and what every verb needs of it.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use mainstay_api::{
    Client, Connection,
    arm::{FabricProperties, ItemProperties, List, ProtectableItemProperties},
    encode_segment,
    v1::Vault,
};

use crate::exit::{NotFoundError, UsageError};

/// Where the server is. Flags win over the environment.
#[derive(Args)]
pub(crate) struct ConnectArguments {
    /// The server's API, `https://HOST:PORT`.
    #[arg(long, global = true, env = "MAINSTAY_URL", value_name = "URL", help_heading = "Connection")]
    url: Option<String>,
    /// The certificate authority's certificate (PEM file).
    #[arg(long, global = true, env = "MAINSTAY_CA_FILE", value_name = "FILE", help_heading = "Connection")]
    ca_file: Option<PathBuf>,
    /// The access token.
    #[arg(long, global = true, env = "MAINSTAY_TOKEN", hide_env_values = true, help_heading = "Connection")]
    token: Option<String>,
    /// The vault, as NAME or GROUP/NAME; the server's first without it.
    #[arg(
        id = "in_vault",
        long = "in-vault",
        global = true,
        env = "MAINSTAY_VAULT",
        value_name = "VAULT",
        help_heading = "Connection"
    )]
    vault: Option<String>,
    /// A lab's directory: connects to the lab's server.
    #[arg(
        long = "lab",
        global = true,
        env = "MAINSTAY_LAB",
        value_name = "DIR",
        help_heading = "Connection"
    )]
    lab: Option<PathBuf>,
}

impl ConnectArguments {
    /// Opens a session.
    pub(crate) async fn open(&self) -> anyhow::Result<Session> {
        let connection = match (&self.lab, &self.url) {
            (Some(dir), None) => mainstay_lab::LabFile::read(dir)?.connection()?,
            (_, Some(url)) => {
                let ca_file =
                    self.ca_file.as_ref().ok_or_else(|| UsageError("--ca-file is missing".to_owned()))?;
                let authority_pem = std::fs::read_to_string(ca_file)
                    .with_context(|| format!("read {}", ca_file.display()))?;
                let token = self.token.clone().ok_or_else(|| UsageError("--token is missing".to_owned()))?;
                Connection { url: url.clone(), authority_pem, token }
            }
            (None, None) => {
                return Err(UsageError(
                    "which server? Give --url, --ca-file and --token (or MAINSTAY_URL, MAINSTAY_CA_FILE, MAINSTAY_TOKEN), or --lab DIR"
                        .to_owned(),
                )
                .into());
            }
        };
        let client = Client::new(&connection)?;
        let query =
            self.vault.as_ref().map_or_else(String::new, |vault| format!("?vault={}", encode_segment(vault)));
        let vault: Vault = client.get(&format!("/api/v1/vault{query}")).await?;
        let path = vault.path();
        Ok(Session { client, vault: path, query })
    }
}

/// A session with a server.
pub(crate) struct Session {
    pub(crate) client: Client,
    /// Path of the vault.
    pub(crate) vault: String,
    /// What names the vault in a query; empty = the server's first.
    query: String,
}

/// A resource as it came, so that `--json` prints it unchanged.
pub(crate) type Resource<P> = mainstay_api::Received<mainstay_api::arm::Resource<P>>;

pub(crate) type Item = Resource<ItemProperties>;

impl Session {
    /// A path of `/api/v1` that is about the vault.
    pub(crate) fn v1(&self, path: &str) -> String {
        format!("/api/v1{path}{}", self.query)
    }

    /// All resources of a listing.
    pub(crate) async fn list<P: serde::de::DeserializeOwned>(
        &self,
        path: &str,
    ) -> anyhow::Result<Vec<Resource<P>>> {
        Ok(self.client.list(&format!("{}{path}", self.vault)).await?)
    }

    /// A replicated item by its name, its VM's name, or its ARM id.
    pub(crate) async fn item(&self, name: &str) -> anyhow::Result<Item> {
        let items: Vec<Item> = self.list("/replicationProtectedItems").await?;
        let mut found: Vec<_> = items
            .into_iter()
            .filter(|item| {
                item.id.eq_ignore_ascii_case(name)
                    || item.name.eq_ignore_ascii_case(name)
                    || item.properties.friendly_name.eq_ignore_ascii_case(name)
            })
            .collect();
        match found.len() {
            0 => {
                Err(NotFoundError(format!("there is no replicated item '{name}'; see `mainstay item list`"))
                    .into())
            }
            1 => Ok(found.remove(0)),
            _ => {
                let ids: Vec<_> = found.iter().map(|item| item.id.as_str()).collect();
                Err(UsageError(format!("'{name}' is ambiguous; use one of the ids: {}", ids.join(", ")))
                    .into())
            }
        }
    }

    /// All discovered VMs.
    pub(crate) async fn protectable_items(&self) -> anyhow::Result<Vec<Resource<ProtectableItemProperties>>> {
        let mut all = Vec::new();
        for container in self.containers().await? {
            let path = format!("{container}/replicationProtectableItems");
            let found: Vec<Resource<ProtectableItemProperties>> = self.client.list(&path).await?;
            all.extend(found);
        }
        Ok(all)
    }

    /// Paths of all protection containers.
    async fn containers(&self) -> anyhow::Result<Vec<String>> {
        let containers: Vec<Resource<serde_json::Value>> =
            self.list("/replicationProtectionContainers").await?;
        Ok(containers.into_iter().map(|container| container.id.clone()).collect())
    }

    /// The container of a fabric.
    pub(crate) async fn container(&self, fabric: &Resource<FabricProperties>) -> anyhow::Result<String> {
        let path = format!("{}/replicationProtectionContainers", fabric.id);
        let list: List<Resource<serde_json::Value>> = self.client.get(&path).await?;
        let container = list.value.into_iter().next();
        container
            .map(|container| container.id.clone())
            .ok_or_else(|| NotFoundError(format!("fabric '{}' has no container", fabric.name)).into())
    }
}
