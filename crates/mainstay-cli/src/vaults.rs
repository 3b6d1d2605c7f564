//! Vaults: what belongs together, with a database and a replica store of its own.

use std::{collections::BTreeMap, path::PathBuf};

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
    server::ServerArguments,
    session::Session,
};

#[derive(Subcommand)]
pub(crate) enum VaultCommand {
    /// Lists the vaults of the server.
    List {
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Shows the vault (of --in-vault).
    Show {
        /// Print JSON, for programs.
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
    /// Makes a lost server anew from its replica store alone: vaults, sites, policies, items, and the jobs that were under way.
    /// Run it where the new server will run, before its first start.
    Rebuild {
        #[command(flatten)]
        server: ServerArguments,
        /// Directory of the replica store; that of the configuration by default.
        #[arg(long, value_name = "DIR")]
        store: Option<PathBuf>,
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
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
        // It has no server to ask.
        VaultCommand::Rebuild { server, store, json } => return rebuild(&server, store, json).await,
        VaultCommand::Delete { name, resource_group } => {
            session.client.delete(&path(session, &name, resource_group.as_deref()).await?).await?;
        }
    }
    Ok(Exit::Done)
}

/// `vault rebuild`, which is done without a server.
pub(crate) async fn rebuild(
    server: &ServerArguments,
    store: Option<PathBuf>,
    json: bool,
) -> anyhow::Result<Exit> {
    let mut config = server.config()?;
    let is_elsewhere = store.as_ref().is_some_and(|store| *store != config.store_dir());
    if store.is_some() {
        config.store_dir = store;
    }
    let rebuilt = mainstay_server::rebuild(&config).await?;
    let token = rebuilt.token.map(|token| token.0);
    let ca_file = config.data_dir.join("pki/ca.pem");
    if json {
        let vaults = rebuilt.vaults.iter().map(|one| {
            json!({
                "id": one.vault.id(),
                "hosts": one.hosts.iter().map(|(name, fabric)| json!({ "name": name, "fabric": fabric })).collect::<Vec<_>>(),
                "items": one.items.iter().map(|(name, points, newest_ms)| json!({
                    "name": name, "recovery_points": points, "newest_point_ms": newest_ms
                })).collect::<Vec<_>>(),
                "damaged": one.adoption.damaged,
            })
        });
        output::json(&json!({ "vaults": vaults.collect::<Vec<_>>(), "token": token, "ca_file": ca_file }))?;
        return Ok(Exit::Done);
    }
    for one in &rebuilt.vaults {
        output::line(&format!("vault:  {}", one.vault.id()));
        let rows = one.items.iter().map(|(name, points, _)| vec![name.clone(), points.to_string()]).collect();
        output::table(&["ITEM", "RECOVERY POINTS"], rows);
        for what in &one.adoption.damaged {
            output::note(&format!("could not be read: {what}"));
        }
        for (name, fabric) in &one.hosts {
            output::note(&format!(
                "register host '{name}' again: `mainstay host key --fabric {fabric}`, then on the host `mainstay agent register \
                 --name {name}` and a restart of its agent"
            ));
        }
    }
    output::line(&format!("CA:     {}", ca_file.display()));
    if let Some(token) = token {
        output::line(&format!("token:  {token}"));
        output::note("The token is shown only now. Start the server with `mainstay server run`.");
    }
    if is_elsewhere {
        output::note(
            "Write the store's directory into the server's configuration as store_dir before you start it.",
        );
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
