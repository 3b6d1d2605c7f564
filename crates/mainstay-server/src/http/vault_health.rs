//! `replicationVaultHealth`: what is wrong in the vault, counted and grouped by cause.

use std::collections::BTreeMap;

use axum::response::Response;
use hyper::Method;
use mainstay_api::arm::{
    HealthErrorSummary, NAMESPACE, Resource, ResourceHealthSummary, VaultHealthProperties,
};
use mainstay_control::ControlError;
use mainstay_model::{ConfigurationChange, Health};

use super::{Call, error::ApiError, json};

/// Name of the only one.
const NAME: &str = "default";

pub(super) async fn dispatch(call: &Call, rest: &[&str]) -> Result<Response, ApiError> {
    let id = format!("{}/replicationVaultHealth/{NAME}", call.vault.id());
    match (&call.method, rest) {
        (&Method::GET, [] | ["default"]) => json(&Resource {
            id,
            name: NAME.to_owned(),
            kind: format!("{NAMESPACE}/vaults/replicationVaultHealth"),
            location: None,
            properties: health(call).await?,
        }),
        (&Method::POST, ["default", "refresh"]) => {
            let by = call.who.clone();
            let job =
                call.control().refresh_providers(None, ConfigurationChange::RefreshVaultHealth, by).await?;
            Ok(call.accepted(job.id, &id))
        }
        _ => Err(ApiError::no_such_path()),
    }
}

/// Counts resources by health and their errors by code.
struct Summary {
    kind: &'static str,
    count: i64,
    by_health: BTreeMap<String, i64>,
    issues: BTreeMap<String, HealthErrorSummary>,
}

impl Summary {
    fn new(kind: &'static str) -> Self {
        Self { kind, count: 0, by_health: BTreeMap::new(), issues: BTreeMap::new() }
    }

    fn add(&mut self, health: Health) {
        self.count += 1;
        *self.by_health.entry(format!("{health:?}")).or_default() += 1;
    }

    fn issue(&mut self, code: &str, category: &str, level: Health, message: &str, resource: &str) {
        let issue = self.issues.entry(code.to_owned()).or_insert_with(|| HealthErrorSummary {
            summary_code: code.to_owned(),
            category: category.to_owned(),
            severity: if level == Health::Critical { "Error" } else { "Warning" }.to_owned(),
            summary_message: message.to_owned(),
            affected_resource_type: self.kind.to_owned(),
            affected_resource_subtype: "HyperVSite".to_owned(),
            affected_resource_correlation_ids: Vec::new(),
        });
        issue.affected_resource_correlation_ids.push(resource.to_owned());
    }

    fn finish(self) -> ResourceHealthSummary {
        ResourceHealthSummary {
            resource_count: self.count,
            issues: self.issues.into_values().collect(),
            categorized_resource_counts: self.by_health,
        }
    }
}

async fn health(call: &Call) -> Result<VaultHealthProperties, ApiError> {
    let control = call.control();
    let mut items = Summary::new("ProtectedItems");
    for item in control.db.items().await.map_err(ControlError::from)?.iter() {
        let (health, errors, _) = control.item_health(item).await?;
        items.add(health);
        for error in &errors {
            items.issue(&error.code, "Replication", error.level, &error.message, &item.id.to_string());
        }
    }
    let providers = control.providers().await?;
    let mut fabrics = Summary::new("Fabric");
    let mut containers = Summary::new("ProtectionContainer");
    for fabric in control.fabrics().await? {
        let away: Vec<_> = providers
            .iter()
            .filter(|provider| provider.fabric.eq_ignore_ascii_case(&fabric.name))
            .filter(|provider| !control.sites.is_connected(provider.id))
            .collect();
        let health = if away.is_empty() { Health::Normal } else { Health::Critical };
        fabrics.add(health);
        containers.add(health);
        for provider in away {
            let message = format!("the agent of host '{}' is not connected", provider.name);
            fabrics.issue(
                "AgentNotConnected",
                "FabricInfrastructure",
                health,
                &message,
                &fabric.id.to_string(),
            );
        }
    }
    Ok(VaultHealthProperties {
        vault_errors: Vec::new(),
        protected_items_health: items.finish(),
        fabrics_health: fabrics.finish(),
        containers_health: containers.finish(),
    })
}
