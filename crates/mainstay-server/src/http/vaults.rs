//! Vaults as resources, and what surrounds them: subscription, resource group, tenant.

use std::{collections::BTreeMap, sync::Arc};

use axum::response::{IntoResponse as _, Response};
use hyper::{Method, StatusCode};
use mainstay_api::arm::NAMESPACE;
use mainstay_control::{ControlError, app::VaultRecord};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Call, VAULT_PLACE, body, error::ApiError, json as answer, list};
use crate::vaults::HostedVault;

/// Paths above the vaults, as segments in lower case.
pub(super) fn dispatch(call: &Call, path: &[&str]) -> Result<Response, ApiError> {
    let tenant = call.api.tenant.as_str();
    let is_subscription = |name: &str| tenant.eq_ignore_ascii_case(name);
    let vaults: Vec<_> = call.api.vaults.all().iter().map(|vault| vault.record()).collect();
    if call.method != Method::GET {
        return Err(ApiError::no_such_path());
    }
    match path {
        ["subscriptions"] => list(vec![subscription(tenant)]),
        ["subscriptions", name] if is_subscription(name) => answer(&subscription(tenant)),
        ["tenants"] => list(vec![json!({
            "id": format!("/tenants/{tenant}"),
            "tenantId": tenant,
            "displayName": "Mainstay",
        })]),
        ["subscriptions", name, "resourcegroups"] if is_subscription(name) => {
            list(resource_groups(&vaults).into_values().collect())
        }
        ["subscriptions", name, "resourcegroups", group] if is_subscription(name) => {
            let found = resource_groups(&vaults).remove(*group);
            answer(&found.ok_or_else(|| ControlError::not_found("resource group", *group))?)
        }
        ["subscriptions", name, "providers", "microsoft.recoveryservices", "vaults"]
            if is_subscription(name) =>
        {
            list(vaults.iter().map(|vault| resource(vault)).collect())
        }
        [
            "subscriptions",
            name,
            "resourcegroups",
            group,
            "providers",
            "microsoft.recoveryservices",
            "vaults",
        ] if is_subscription(name) => {
            let in_group = vaults.iter().filter(|vault| vault.resource_group.eq_ignore_ascii_case(group));
            let shown: Vec<_> = in_group.map(|vault| resource(vault)).collect();
            if shown.is_empty() {
                return Err(ControlError::not_found("resource group", *group).into());
            }
            list(shown)
        }
        _ => Err(ApiError::no_such_path()),
    }
}

/// A vault itself: `…/vaults/{V}`; `found` is what has this name.
pub(super) async fn vault(call: &Call, found: Option<&HostedVault>) -> Result<Response, ApiError> {
    let name = &call.segments[VAULT_PLACE];
    let not_found = || ControlError::not_found("vault", name.as_str());
    match (&call.method, found) {
        (&Method::GET, Some(vault)) => answer(&resource(&vault.record())),
        (&Method::PUT, None) => create(call, name).await,
        // What the body says of alerts, keys and networks belongs to Azure.
        (&Method::PUT | &Method::PATCH, Some(vault)) => {
            let input: VaultInput = call.body(body::VAULT)?;
            let record = vault.record();
            if let Some(location) = &input.location
                && call.method == Method::PUT
                && !is_same_location(location, &record.location)
            {
                return Err(ApiError::new(
                    StatusCode::CONFLICT,
                    "InvalidResourceLocation",
                    format!(
                        "location cannot be \"{location}\": the vault '{}' is in '{}' and stays there",
                        record.name, record.location
                    ),
                    "Leave the location as it is; nothing was changed.",
                ));
            }
            // PUT says what the vault is, PATCH what is different.
            let tags = match (tags(input.tags)?, call.method == Method::PATCH) {
                (None, true) => return answer(&resource(&record)),
                (tags, _) => tags.unwrap_or_default(),
            };
            answer(&resource(&*vault.tag(tags).await?))
        }
        (&Method::DELETE, None) => Ok(StatusCode::NO_CONTENT.into_response()),
        (&Method::DELETE, Some(vault)) => match call.api.vaults.delete(vault).await? {
            Ok(()) => Ok(StatusCode::NO_CONTENT.into_response()),
            Err(contents) => Err(ApiError::new(
                StatusCode::CONFLICT,
                "ServiceResourceNotEmptyWithBackendMessage",
                format!("the vault '{name}' is still in use: {}", in_short(&contents)),
                "Disable replication, remove the hosts and the fabrics, and delete it then.",
            )),
        },
        (&Method::GET | &Method::PATCH, None) => Err(not_found().into()),
        _ => Ok(StatusCode::METHOD_NOT_ALLOWED.into_response()),
    }
}

async fn create(call: &Call, name: &str) -> Result<Response, ApiError> {
    let (subscription, resource_group) = (&call.segments[1], &call.segments[3]);
    if !call.api.tenant.eq_ignore_ascii_case(subscription) {
        return Err(ControlError::not_found("subscription", subscription.as_str()).into());
    }
    let input: VaultInput = call.body(body::NEW_VAULT)?;
    // A group is what its vaults say: written as the first of them was.
    let known = call.api.vaults.all().into_iter().map(|vault| vault.record().resource_group.clone());
    let group = known.into_iter().find(|known| known.eq_ignore_ascii_case(resource_group));
    let record = VaultRecord {
        subscription: call.api.tenant.clone(),
        resource_group: group.unwrap_or_else(|| resource_group.clone()),
        name: name.to_owned(),
        location: input.location.unwrap_or_default(),
        tags: tags(input.tags)?.unwrap_or_default(),
        etag: None,
    };
    let made =
        call.api.vaults.create(record).await.map_err(|error| match error.downcast::<ControlError>() {
            Ok(error) => error.into(),
            Err(error) => ApiError::internal(format!("the vault '{name}' could not be made: {error:#}")),
        })?;
    tracing::info!(vault = name, "a vault was made");
    let mut response = answer(&resource(&made.record()))?;
    *response.status_mut() = StatusCode::CREATED;
    Ok(response)
}

/// What a client can say of a vault.
#[derive(Deserialize)]
struct VaultInput {
    location: Option<String>,
    tags: Option<BTreeMap<String, Value>>,
}

/// Azure's limits.
const TAGS_MAX: usize = 50;
const TAG_NAME_CHARACTERS_MAX: usize = 512;
const TAG_VALUE_CHARACTERS_MAX: usize = 256;

fn tags(input: Option<BTreeMap<String, Value>>) -> Result<Option<BTreeMap<String, String>>, ApiError> {
    let Some(input) = input else { return Ok(None) };
    let refused = |message: String| {
        ApiError::bad_request("InvalidTag", message, "Correct it and try again; nothing was changed.")
    };
    if input.len() > TAGS_MAX {
        return Err(refused(format!("tags are {}: expected are {TAGS_MAX} at most", input.len())));
    }
    let checked = input.into_iter().map(|(name, value)| match value {
        Value::String(value)
            if (1..=TAG_NAME_CHARACTERS_MAX).contains(&name.chars().count())
                && value.chars().count() <= TAG_VALUE_CHARACTERS_MAX =>
        {
            Ok((name, value))
        }
        value => Err(refused(format!(
            "tags.{name} cannot be {value}: expected is a text of at most {TAG_VALUE_CHARACTERS_MAX} characters under \
             a name of 1 to {TAG_NAME_CHARACTERS_MAX}"
        ))),
    });
    checked.collect::<Result<_, _>>().map(Some)
}

/// `West Europe` is `westeurope`.
fn is_same_location(one: &str, other: &str) -> bool {
    let plain = |text: &str| text.replace(' ', "").to_lowercase();
    plain(one) == plain(other)
}

/// Things that a message names before it counts the rest.
const NAMED_MAX: usize = 5;

fn in_short(things: &[String]) -> String {
    let named = things.iter().take(NAMED_MAX).map(String::as_str).collect::<Vec<_>>().join(", ");
    match things.len().saturating_sub(NAMED_MAX) {
        0 => named,
        more => format!("{named}, and {more} more"),
    }
}

fn subscription(tenant: &str) -> Value {
    json!({
        "id": format!("/subscriptions/{tenant}"),
        "subscriptionId": tenant,
        "tenantId": tenant,
        "displayName": "Mainstay",
        "state": "Enabled",
        "authorizationSource": "RoleBased",
        "managedByTenants": [],
    })
}

/// The resource groups, by name in lower case: a group is there as long as there is a vault in it.
fn resource_groups(vaults: &[Arc<VaultRecord>]) -> BTreeMap<String, Value> {
    // The oldest vault of a group comes first and gives the location.
    let groups =
        vaults.iter().rev().map(|vault| (vault.resource_group.to_lowercase(), resource_group(vault)));
    groups.collect()
}

fn resource_group(vault: &VaultRecord) -> Value {
    json!({
        "id": format!("/subscriptions/{}/resourceGroups/{}", vault.subscription, vault.resource_group),
        "name": vault.resource_group,
        "type": "Microsoft.Resources/resourceGroups",
        "location": vault.location,
        "properties": { "provisioningState": "Succeeded" },
    })
}

/// Words and shape as recorded, without tags where nobody has written any; ids of vaults have `subscriptions` in lower case there, unlike all that is in them.
fn resource(vault: &VaultRecord) -> Value {
    let mut shown = json!({
        "id": format!(
            "/subscriptions/{}/resourceGroups/{}/providers/{NAMESPACE}/vaults/{}",
            vault.subscription, vault.resource_group, vault.name
        ),
        "name": vault.name,
        "type": format!("{NAMESPACE}/vaults"),
        "location": vault.location,
        "etag": format!("W/\"{}\"", vault.etag.map_or_else(|| vault.subscription.clone(), |etag| etag.to_string())),
        "sku": { "name": "Standard" },
        "properties": {
            "provisioningState": "Succeeded",
            "privateEndpointStateForBackup": "None",
            "privateEndpointStateForSiteRecovery": "None",
            "backupStorageVersion": "Unassigned",
            "publicNetworkAccess": "Enabled",
            "monitoringSettings": {
                "azureMonitorAlertSettings": { "alertsForAllJobFailures": "Enabled" },
                "classicAlertSettings": { "alertsForCriticalOperations": "Enabled" },
            },
            "securitySettings": {
                "immutabilitySettings": null,
                "softDeleteSettings": {
                    "softDeleteRetentionPeriodInDays": 14,
                    "softDeleteState": "Enabled",
                },
                "multiUserAuthorization": "Disabled",
            },
            "restoreSettings": {
                "crossSubscriptionRestoreSettings": { "crossSubscriptionRestoreState": "Enabled" },
            },
        },
    });
    if !vault.tags.is_empty() {
        shown["tags"] = json!(vault.tags);
    }
    shown
}
