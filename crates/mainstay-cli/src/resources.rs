//! Fabrics, hosts, VMs, policies, tokens, events.

use clap::{Args, Subcommand};
use mainstay_api::{
    arm::{
        EventProperties, FabricProperties, HYPERV_REPLICA_AZURE, PolicyInput, PolicyProperties,
        PolicySettings, ProviderProperties, Request, WITHOUT,
    },
    v1::{RegistrationKey, Token, TokenRequest},
};
use reqwest::Method;
use serde_json::json;

use crate::{
    exit::{Exit, NotFoundError},
    output,
    session::{Resource, Session},
};

#[derive(Subcommand)]
pub(crate) enum FabricCommand {
    /// Makes a site.
    Create {
        /// Its name.
        name: String,
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Lists the sites.
    List {
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Removes a site that nothing depends on.
    Delete {
        /// Its name.
        name: String,
    },
}

pub(crate) async fn fabric(session: &Session, command: FabricCommand) -> anyhow::Result<Exit> {
    match command {
        FabricCommand::Create { name, json } => {
            let path = format!("{}/replicationFabrics/{name}", session.vault);
            let body = json!({ "properties": { "customDetails": { "instanceType": "FabricSpecificCreationInput" } } });
            session.client.begin(Method::PUT, &path, Some(&body)).await?;
            let fabric: Resource<FabricProperties> = session.client.get(&path).await?;
            if json {
                output::json(&fabric)?;
            } else {
                output::note(&format!(
                    "fabric '{}' is there; register hosts with `mainstay host key --fabric {0}`",
                    fabric.name
                ));
            }
        }
        FabricCommand::List { json } => {
            let fabrics: Vec<Resource<FabricProperties>> = session.list("/replicationFabrics").await?;
            if json {
                output::json(&fabrics)?;
            } else {
                let rows = fabrics
                    .into_iter()
                    .map(Resource::into_known)
                    .map(|it| vec![it.name, it.properties.health])
                    .collect();
                output::table(&["FABRIC", "HEALTH"], rows);
            }
        }
        FabricCommand::Delete { name } => {
            session.client.delete(&format!("{}/replicationFabrics/{name}", session.vault)).await?;
        }
    }
    Ok(Exit::Done)
}

#[derive(Subcommand)]
pub(crate) enum HostCommand {
    /// Makes a key that registers hosts in a fabric; valid for five days.
    Key {
        /// The fabric.
        #[arg(long)]
        fabric: String,
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Lists the registered hosts.
    List {
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Reads a host anew.
    Refresh {
        /// The host's name or id.
        host: String,
    },
    /// Removes a registered host; its certificate stops to work.
    Remove {
        /// The host's name or id.
        host: String,
    },
}

/// A registered host by name or id.
pub(crate) async fn find_host(session: &Session, name: &str) -> anyhow::Result<Resource<ProviderProperties>> {
    let hosts: Vec<Resource<ProviderProperties>> =
        session.list("/replicationRecoveryServicesProviders").await?;
    hosts
        .into_iter()
        .find(|host| {
            host.id.eq_ignore_ascii_case(name)
                || host.name.eq_ignore_ascii_case(name)
                || host.properties.friendly_name.eq_ignore_ascii_case(name)
        })
        .ok_or_else(|| {
            NotFoundError(format!("there is no registered host '{name}'; see `mainstay host list`")).into()
        })
}

pub(crate) async fn host(session: &Session, command: HostCommand) -> anyhow::Result<Exit> {
    match command {
        HostCommand::Key { fabric, json } => {
            let path = session.v1(&format!("/fabrics/{fabric}/registrationKeys"));
            let key: RegistrationKey = session.client.post(&path, &json!({})).await?;
            if json {
                output::json(&key)?;
            } else {
                output::line(&key.key);
                output::note(&format!(
                    "valid until {}; on the host: mainstay agent register --key KEY",
                    key.expires
                ));
            }
        }
        HostCommand::List { json } => {
            let hosts: Vec<Resource<ProviderProperties>> =
                session.list("/replicationRecoveryServicesProviders").await?;
            if json {
                output::json(&hosts)?;
            } else {
                let row = |host: &Resource<ProviderProperties>| {
                    let it = host.properties.clone();
                    vec![
                        it.friendly_name,
                        it.fabric_friendly_name,
                        it.connection_status,
                        it.provider_version,
                        host.name.clone(),
                    ]
                };
                let rows = hosts.iter().map(row).collect();
                output::table(&["HOST", "FABRIC", "CONNECTION", "VERSION", "ID"], rows);
                for host in hosts.iter().map(|host| &host.properties) {
                    for error in &host.health_error_details {
                        let (level, message) = (&error.error_level, &error.error_message);
                        output::line(&format!("{}: {level}: {message}", host.friendly_name));
                        output::line(&format!("  → {}", error.recommended_action));
                    }
                }
            }
        }
        HostCommand::Refresh { host } => {
            let host = find_host(session, &host).await?;
            let path = format!("{}/refreshProvider", host.id);
            session.client.begin(Method::POST, &path, None::<&()>).await?;
        }
        HostCommand::Remove { host } => {
            let host = find_host(session, &host).await?;
            session.client.delete(&host.id).await?;
        }
    }
    Ok(Exit::Done)
}

#[derive(Subcommand)]
pub(crate) enum VmCommand {
    /// Lists the discovered VMs: protectable, or why not.
    List {
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
}

pub(crate) async fn vm(session: &Session, VmCommand::List { json }: VmCommand) -> anyhow::Result<Exit> {
    let found = session.protectable_items().await?;
    if json {
        output::json(&found)?;
        return Ok(Exit::Done);
    }
    let rows = found
        .into_iter()
        .map(|vm| {
            let vm = vm.into_known();
            let it = vm.properties;
            let mebibytes: i64 = it.custom_details.disk_details.iter().map(|disk| disk.max_size_mb).sum();
            let protectable = protectable(&it.protection_readiness_errors);
            let disks = format!("{} ({mebibytes} MiB)", it.custom_details.disk_details.len());
            vec![it.friendly_name, it.protection_status, protectable, disks, vm.name]
        })
        .collect();
    output::table(&["VM", "STATUS", "PROTECTABLE", "DISKS", "ID"], rows);
    Ok(Exit::Done)
}

/// Whether a VM can be protected, and what stands in the way.
fn protectable(errors: &[String]) -> String {
    if errors.is_empty() {
        return "yes".to_owned();
    }
    let can_be_left_out = errors.iter().all(|error| error.starts_with(WITHOUT));
    format!("{} {}", if can_be_left_out { "yes," } else { "no:" }, errors.join(" "))
}

/// Values of a policy.
#[derive(Args)]
pub(crate) struct PolicyValues {
    /// Time between two deltas: seconds from 5 up, or a preset.
    #[arg(long, value_name = "SECONDS|30s|5m", value_parser = parse_frequency)]
    copy_frequency: Option<u32>,
    /// Hours for which recovery points are kept, counted back from the newest one; 0 = only the newest.
    #[arg(long, value_name = "HOURS")]
    retention: Option<u32>,
    /// Hours between two application-consistent recovery points; 0 = none.
    #[arg(long, value_name = "HOURS")]
    app_consistent_frequency: Option<u32>,
}

fn parse_frequency(text: &str) -> Result<u32, String> {
    let (number, factor) = match (text.strip_suffix('m'), text.strip_suffix('s')) {
        (Some(minutes), _) => (minutes, 60),
        (_, Some(seconds)) => (seconds, 1),
        _ => (text, 1),
    };
    let number: u32 = number.parse().map_err(|_| format!("'{text}' is not a time; write 30, 30s or 5m"))?;
    number.checked_mul(factor).ok_or_else(|| format!("'{text}' is too long"))
}

impl PolicyValues {
    fn body(self) -> Request<PolicyInput> {
        Request {
            properties: PolicyInput {
                provider_specific_input: PolicySettings {
                    instance_type: HYPERV_REPLICA_AZURE.to_owned(),
                    recovery_point_history_duration: self.retention,
                    application_consistent_snapshot_frequency_in_hours: self.app_consistent_frequency,
                    replication_interval: self.copy_frequency,
                },
                provider_specific_details: PolicySettings::default(),
            },
        }
    }
}

#[derive(Subcommand)]
pub(crate) enum PolicyCommand {
    /// Makes a policy (by default every 5 minutes, kept for 24 hours).
    Create {
        /// Its name.
        name: String,
        #[command(flatten)]
        values: PolicyValues,
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Lists the policies.
    List {
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Shows a policy.
    Show {
        /// Its name.
        name: String,
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Changes a policy; items that use it follow at once.
    Update {
        /// Its name.
        name: String,
        #[command(flatten)]
        values: PolicyValues,
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Removes a policy that nothing uses.
    Delete {
        /// Its name.
        name: String,
    },
}

pub(crate) async fn policy(session: &Session, command: PolicyCommand) -> anyhow::Result<Exit> {
    let path = |name: &str| format!("{}/replicationPolicies/{name}", session.vault);
    let (policies, json) = match command {
        PolicyCommand::Create { name, values, json } => {
            session.client.begin(Method::PUT, &path(&name), Some(&values.body())).await?;
            (vec![session.client.get(&path(&name)).await?], json)
        }
        PolicyCommand::Update { name, values, json } => {
            session.client.begin(Method::PATCH, &path(&name), Some(&values.body())).await?;
            (vec![session.client.get(&path(&name)).await?], json)
        }
        PolicyCommand::Show { name, json } => (vec![session.client.get(&path(&name)).await?], json),
        PolicyCommand::List { json } => {
            let policies: Vec<Resource<PolicyProperties>> = session.list("/replicationPolicies").await?;
            if json {
                output::json(&policies)?;
                return Ok(Exit::Done);
            }
            (policies, false)
        }
        PolicyCommand::Delete { name } => {
            session.client.delete(&path(&name)).await?;
            return Ok(Exit::Done);
        }
    };
    if json {
        for policy in &policies {
            output::json(policy)?;
        }
        return Ok(Exit::Done);
    }
    let rows = policies
        .into_iter()
        .map(|policy| {
            let policy = policy.into_known();
            let values = policy.properties.provider_specific_details;
            vec![
                policy.name,
                format!("{} s", values.replication_interval),
                format!("{} h", values.recovery_point_history_duration_in_hours),
                format!("{} h", values.application_consistent_snapshot_frequency_in_hours),
            ]
        })
        .collect();
    output::table(&["POLICY", "COPY FREQUENCY", "RETENTION", "APP-CONSISTENT"], rows);
    Ok(Exit::Done)
}

#[derive(Subcommand)]
pub(crate) enum TokenCommand {
    /// Makes a token; its secret is shown once.
    Create {
        /// Whose it is.
        label: String,
        /// What it allows.
        #[arg(long, default_value = "Reader", value_parser = ["Reader", "Operator", "Contributor"])]
        role: String,
        /// Days until it stops to work; never by default.
        #[arg(long)]
        days: Option<u32>,
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Lists the tokens, without their secrets.
    List {
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Makes a token stop to work.
    Revoke {
        /// Its digest, as listed.
        digest: String,
    },
}

pub(crate) async fn token(session: &Session, command: TokenCommand) -> anyhow::Result<Exit> {
    match command {
        TokenCommand::Create { label, role, days, json } => {
            let token: Token =
                session.client.post("/api/v1/tokens", &TokenRequest { label, role, days }).await?;
            if json {
                output::json(&token)?;
            } else {
                output::line(token.secret.as_deref().unwrap_or_default());
                output::note("The secret is shown only now.");
            }
        }
        TokenCommand::List { json } => {
            let tokens: mainstay_api::arm::List<Token> = session.client.get("/api/v1/tokens").await?;
            if json {
                output::json(&tokens.value)?;
            } else {
                let rows = tokens
                    .value
                    .into_iter()
                    .map(|token| {
                        vec![
                            token.label,
                            token.role,
                            token.expires.unwrap_or_else(|| "never".to_owned()),
                            token.digest,
                        ]
                    })
                    .collect();
                output::table(&["LABEL", "ROLE", "EXPIRES", "DIGEST"], rows);
            }
        }
        TokenCommand::Revoke { digest } => session.client.delete(&format!("/api/v1/tokens/{digest}")).await?,
    }
    Ok(Exit::Done)
}

#[derive(Subcommand)]
pub(crate) enum EventCommand {
    /// Lists the newest events.
    List {
        /// How many.
        #[arg(long, default_value_t = 50)]
        limit: usize,
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
}

pub(crate) async fn event(
    session: &Session,
    EventCommand::List { limit, json }: EventCommand,
) -> anyhow::Result<Exit> {
    let path = format!("{}/replicationEvents", session.vault);
    let events: Vec<Resource<EventProperties>> = session.client.list_first(&path, limit).await?;
    if json {
        output::json(&events)?;
        return Ok(Exit::Done);
    }
    let rows = events
        .into_iter()
        .map(|event| {
            let it = event.into_known().properties;
            vec![it.time_of_occurrence, it.severity, it.affected_object_friendly_name, it.description]
        })
        .collect();
    output::table(&["TIME", "SEVERITY", "OBJECT", "WHAT"], rows);
    Ok(Exit::Done)
}

/// Finds the fabric of a name.
pub(crate) async fn find_fabric(session: &Session, name: &str) -> anyhow::Result<Resource<FabricProperties>> {
    let fabrics: Vec<Resource<FabricProperties>> = session.list("/replicationFabrics").await?;
    let known: Vec<_> = fabrics.iter().map(|fabric| fabric.name.clone()).collect();
    fabrics.into_iter().find(|fabric| fabric.name.eq_ignore_ascii_case(name)).ok_or_else(|| {
        NotFoundError(format!("there is no fabric '{name}'; there are: {}", known.join(", "))).into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_protectable_without_a_disk_or_not_at_all() {
        let told =
            |errors: &[&str]| protectable(&errors.iter().map(|&error| error.to_owned()).collect::<Vec<_>>());
        assert_eq!(told(&[]), "yes");
        let shared = "without vdb: disk vdb is shared with other VMs. Leave it out.";
        assert_eq!(told(&[shared]), format!("yes, {shared}"));
        assert_eq!(told(&["It is away.", shared]), format!("no: It is away. {shared}"));
    }

    #[test]
    fn frequencies_are_seconds_or_presets() {
        assert_eq!(parse_frequency("30"), Ok(30));
        assert_eq!(parse_frequency("30s"), Ok(30));
        assert_eq!(parse_frequency("5m"), Ok(300));
        assert!(parse_frequency("5h").is_err());
    }
}
