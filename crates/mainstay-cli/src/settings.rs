//! Who is told by mail, and which networks belong together.

use clap::Subcommand;
use mainstay_api::{
    arm::{AlertProperties, List, NetworkMappingInput, NetworkMappingProperties, NetworkProperties, Request},
    encode_segment,
};
use reqwest::Method;

use crate::{
    exit::{Exit, NotFoundError},
    output,
    resources::find_fabric,
    session::{Resource, Session},
};

#[derive(Subcommand)]
pub(crate) enum AlertCommand {
    /// Shows who is told by mail of what goes wrong.
    Show {
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Sets who is told; whoever is not named is not told any more.
    Set {
        /// Tell the owners, whom the server's configuration names.
        #[arg(long)]
        owners: bool,
        /// Tell this address; can be given several times.
        #[arg(long, value_name = "ADDRESS")]
        address: Vec<String>,
    },
}

pub(crate) async fn alert(session: &Session, command: AlertCommand) -> anyhow::Result<Exit> {
    let path = format!("{}/replicationAlertSettings/defaultAlertSetting", session.vault);
    match command {
        AlertCommand::Show { json } => {
            let setting: Resource<AlertProperties> = session.client.get(&path).await?;
            if json {
                output::json(&setting)?;
                return Ok(Exit::Done);
            }
            let it = setting.into_known().properties;
            output::line(&format!("owners:    {}", it.send_to_owners.unwrap_or_default()));
            let addresses = it.custom_email_addresses.unwrap_or_default();
            output::line(&format!("addresses: {}", addresses.join(", ")));
        }
        AlertCommand::Set { owners, address } => {
            let properties = AlertProperties {
                send_to_owners: Some(if owners { "Send" } else { "DoNotSend" }.to_owned()),
                custom_email_addresses: Some(address),
                locale: None,
            };
            session.client.begin(Method::PUT, &path, Some(&Request { properties })).await?;
        }
    }
    Ok(Exit::Done)
}

#[derive(Subcommand)]
pub(crate) enum NetworkCommand {
    /// Lists the networks of all sites, and what they are mapped to.
    List {
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Maps a network to one of a recovery site: adapters without a choice of their own continue there.
    Map {
        /// The network.
        network: String,
        /// The recovery network: its name or ARM id.
        recovery_network: String,
        /// The network's fabric.
        #[arg(long)]
        fabric: String,
        /// The recovery fabric; the only other one by default.
        #[arg(long)]
        recovery_fabric: Option<String>,
        /// Name of the mapping.
        #[arg(long, default_value = "mapping")]
        name: String,
    },
    /// Removes a mapping.
    Unmap {
        /// The network.
        network: String,
        /// The network's fabric.
        #[arg(long)]
        fabric: String,
        /// Name of the mapping.
        #[arg(long, default_value = "mapping")]
        name: String,
    },
}

pub(crate) async fn network(session: &Session, command: NetworkCommand) -> anyhow::Result<Exit> {
    match command {
        NetworkCommand::List { json } => {
            let networks: Vec<Resource<NetworkProperties>> = session.list("/replicationNetworks").await?;
            if json {
                output::json(&networks)?;
                return Ok(Exit::Done);
            }
            let mappings: Vec<Resource<NetworkMappingProperties>> =
                session.list("/replicationNetworkMappings").await?;
            let rows = networks
                .into_iter()
                .map(|network| {
                    let of_this = mappings.iter().filter(|mapping| {
                        mapping.properties.primary_network_id.eq_ignore_ascii_case(&network.id)
                    });
                    let targets: Vec<_> = of_this
                        .map(|mapping| {
                            let it = &mapping.properties;
                            let (network, fabric) =
                                (&it.recovery_network_friendly_name, &it.recovery_fabric_friendly_name);
                            format!("{network} at {fabric} ({})", mapping.name)
                        })
                        .collect();
                    let fabric = network.id.split("/replicationFabrics/").nth(1).unwrap_or_default();
                    let fabric = fabric.split('/').next().unwrap_or_default().to_owned();
                    let it = network.into_known().properties;
                    vec![fabric, it.friendly_name, it.network_type, targets.join(", ")]
                })
                .collect();
            output::table(&["FABRIC", "NETWORK", "TYPE", "MAPPED TO"], rows);
        }
        NetworkCommand::Map { network, recovery_network, fabric, recovery_fabric, name } => {
            let path = mapping_path(session, &fabric, &network, &name).await?;
            let properties = NetworkMappingInput {
                recovery_fabric_name: recovery_fabric,
                recovery_network_id: Some(recovery_network),
            };
            session.client.begin(Method::PUT, &path, Some(&Request { properties })).await?;
        }
        NetworkCommand::Unmap { network, fabric, name } => {
            session.client.delete(&mapping_path(session, &fabric, &network, &name).await?).await?;
        }
    }
    Ok(Exit::Done)
}

async fn mapping_path(session: &Session, fabric: &str, network: &str, name: &str) -> anyhow::Result<String> {
    let fabric = find_fabric(session, fabric).await?;
    let path = format!("{}/replicationNetworks", fabric.id);
    let known: List<Resource<NetworkProperties>> = session.client.get(&path).await?;
    if !known.value.iter().any(|known| known.properties.friendly_name.eq_ignore_ascii_case(network)) {
        let names: Vec<_> = known.value.iter().map(|known| known.properties.friendly_name.as_str()).collect();
        let message =
            format!("fabric '{}' has no network '{network}'; it has: {}", fabric.name, names.join(", "));
        return Err(NotFoundError(message).into());
    }
    Ok(format!("{path}/{}/replicationNetworkMappings/{}", encode_segment(network), encode_segment(name)))
}
