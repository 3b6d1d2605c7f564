//! `mainstay principal`: who signs in with a client id and a secret.

use clap::Subcommand;
use mainstay_api::v1::{ServicePrincipal, ServicePrincipalRequest};

use crate::{
    exit::{Exit, NotFoundError, UsageError},
    output,
    session::Session,
};

const PATH: &str = "/api/v1/servicePrincipals";

#[derive(Subcommand)]
pub(crate) enum PrincipalCommand {
    /// Makes a service principal; its secret is shown once.
    Create {
        /// What it is for.
        name: String,
        /// What it may do.
        #[arg(long, default_value = "Reader", value_parser = ["Reader", "Operator", "Contributor"])]
        role: String,
        /// Days until it stops to work; never by default.
        #[arg(long)]
        days: Option<u32>,
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Lists the service principals, without their secrets.
    List {
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Removes a service principal; its access tokens stop to work at once.
    Remove {
        /// Its client id, or its name if no other has it.
        principal: String,
    },
}

pub(crate) async fn principal(session: &Session, command: PrincipalCommand) -> anyhow::Result<Exit> {
    match command {
        PrincipalCommand::Create { name, role, days, json } => {
            let request = ServicePrincipalRequest { name, role, days };
            let made: ServicePrincipal = session.client.post(PATH, &request).await?;
            if json {
                output::json(&made)?;
            } else {
                output::line(&format!("tenant id:     {}", made.tenant_id));
                output::line(&format!("client id:     {}", made.client_id));
                output::line(&format!("client secret: {}", made.secret.as_deref().unwrap_or_default()));
                output::note("The secret is shown only now.");
            }
        }
        PrincipalCommand::List { json } => {
            let principals: Vec<ServicePrincipal> = session.client.list(PATH).await?;
            if json {
                output::json(&principals)?;
            } else {
                let rows = principals
                    .into_iter()
                    .map(|it| {
                        let expires = it.expires.unwrap_or_else(|| "never".to_owned());
                        vec![it.name, it.role, it.created, expires, it.client_id]
                    })
                    .collect();
                output::table(&["NAME", "ROLE", "CREATED", "EXPIRES", "CLIENT ID"], rows);
            }
        }
        PrincipalCommand::Remove { principal } => {
            let client_id = find(session, &principal).await?;
            session.client.delete(&format!("{PATH}/{client_id}")).await?;
        }
    }
    Ok(Exit::Done)
}

/// The client id of a service principal that was named by it or by its name.
async fn find(session: &Session, name: &str) -> anyhow::Result<String> {
    let principals: Vec<ServicePrincipal> = session.client.list(PATH).await?;
    let is_meant =
        |it: &ServicePrincipal| it.client_id.eq_ignore_ascii_case(name) || it.name.eq_ignore_ascii_case(name);
    let mut ids: Vec<String> =
        principals.into_iter().filter(is_meant).map(|principal| principal.client_id).collect();
    match ids.len() {
        0 => Err(NotFoundError(format!(
            "there is no service principal '{name}'; see `mainstay principal list`"
        ))
        .into()),
        1 => Ok(ids.remove(0)),
        _ => Err(UsageError(format!("'{name}' is ambiguous; use one of the ids: {}", ids.join(", "))).into()),
    }
}
