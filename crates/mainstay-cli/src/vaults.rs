//! Vaults: what belongs together, with a database and a replica store of its own.

use std::collections::BTreeMap;

use clap::Subcommand;
use mainstay_api::{
    arm::{List, NAMESPACE},
    v1::Vault,
};
use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    exit::{Exit, UsageError},
    output,
    session::Session,
};

#[derive(Subcommand)]
pub(crate) enum VaultCommand {
    /// Lists the vaults of the server.
    List {
        #[arg(long)]
        json: bool,
    },
    /// Shows the vault (of --in-vault).
    Show {
        #[arg(long)]
        json: bool,
    },
    /// Makes a vault. Sites, hosts, policies and items of one vault are not seen from another; who may sign in is the same.
    Create {
        /// Its name.
        name: String,
        /// Its resource group; that of the server's first vault by default.
        #[arg(long)]
        resource_group: Option<String>,
        /// Where it says that it is.
        #[arg(long, default_value = "mainstay")]
        location: String,
        /// A tag, NAME=VALUE; can be given several times.
        #[arg(long, value_name = "NAME=VALUE")]
        tag: Vec<String>,
    },
    /// Writes other tags on the vault (of --in-vault); those that are not named are removed.
    Tag {
        /// The tags, NAME=VALUE.
        tag: Vec<String>,
    },
    /// Deletes a vault in which there is nothing any more.
    Delete {
        /// Its name.
        name: String,
        /// Its resource group; that of the server's first vault by default.
        #[arg(long)]
        resource_group: Option<String>,
    },
}

pub(crate) async fn run(session: &Session, command: VaultCommand) -> anyhow::Result<Exit> {
    match command {
        VaultCommand::List { json } => {
            let all: List<Vault> = session.client.get("/api/v1/vaults").await?;
            let first = all
                .value
                .first()
                .ok_or_else(|| anyhow::anyhow!("the server has no vault"))?
                .subscription
                .clone();
            let path = format!("/subscriptions/{first}/providers/{NAMESPACE}/vaults");
            let vaults: List<Value> = session.client.get(&path).await?;
            if json {
                output::json(&vaults.value)?;
                return Ok(Exit::Done);
            }
            let rows = vaults.value.iter().map(|vault| {
                let id = vault["id"].as_str().unwrap_or_default();
                let group = id.split('/').nth(4).unwrap_or_default().to_owned();
                vec![group, text(&vault["name"]), text(&vault["location"]), tags_text(vault)]
            });
            output::table(&["GROUP", "NAME", "LOCATION", "TAGS"], rows.collect());
        }
        VaultCommand::Show { json } => {
            let vault: Value = session.client.get(&session.vault).await?;
            if json {
                output::json(&vault)?;
                return Ok(Exit::Done);
            }
            output::line(&format!("id:       {}", text(&vault["id"])));
            output::line(&format!("location: {}", text(&vault["location"])));
            output::line(&format!("tags:     {}", tags_text(&vault)));
        }
        VaultCommand::Create { name, resource_group, location, tag } => {
            let path = path(session, &name, resource_group.as_deref()).await?;
            let body = json!({ "location": location, "sku": { "name": "Standard" }, "tags": tags(&tag)? });
            session.client.begin(Method::PUT, &path, Some(&body)).await?;
            output::note(&format!("the vault '{name}' is there; name it with --in-vault or MAINSTAY_VAULT"));
        }
        VaultCommand::Tag { tag } => {
            let body = json!({ "tags": tags(&tag)? });
            session.client.begin(Method::PATCH, &session.vault, Some(&body)).await?;
        }
        VaultCommand::Delete { name, resource_group } => {
            session.client.delete(&path(session, &name, resource_group.as_deref()).await?).await?;
        }
    }
    Ok(Exit::Done)
}

/// Path of a vault by its name.
async fn path(session: &Session, name: &str, resource_group: Option<&str>) -> anyhow::Result<String> {
    let first: Vault = session.client.get("/api/v1/vault").await?;
    let resource_group = resource_group.map_or(first.resource_group.as_str(), |group| group).to_owned();
    Ok(Vault { name: name.to_owned(), resource_group, ..first }.path())
}

fn tags(given: &[String]) -> Result<BTreeMap<&str, &str>, UsageError> {
    let wrong = |tag: &str| UsageError(format!("a tag is NAME=VALUE, not '{tag}'"));
    given.iter().map(|tag| tag.split_once('=').ok_or_else(|| wrong(tag))).collect()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn tags_text(vault: &Value) -> String {
    let tags = vault["tags"].as_object().into_iter().flatten();
    tags.map(|(name, value)| format!("{name}={}", text(value))).collect::<Vec<_>>().join(", ")
}
