//! The vault as a resource, and what surrounds it: subscription, resource group, tenant.

use axum::response::{IntoResponse as _, Response};
use hyper::{Method, StatusCode};
use mainstay_api::arm::NAMESPACE;
use mainstay_control::app::VaultRecord;
use serde_json::{Value, json};

use super::{Call, error::ApiError, json as answer, list};

/// Paths above the vault, as segments in lower case.
pub(super) fn dispatch(call: &Call, path: &[&str]) -> Result<Response, ApiError> {
    let vault = &call.api.vault;
    let is_subscription = |name: &str| vault.subscription.eq_ignore_ascii_case(name);
    let is_group = |name: &str| vault.resource_group.eq_ignore_ascii_case(name);
    if call.method != Method::GET {
        return Err(ApiError::no_such_path());
    }
    match path {
        ["subscriptions"] => list(vec![subscription(vault)]),
        ["subscriptions", name] if is_subscription(name) => answer(&subscription(vault)),
        ["tenants"] => list(vec![json!({
            "id": format!("/tenants/{}", vault.subscription),
            "tenantId": vault.subscription,
            "displayName": "Mainstay",
        })]),
        ["subscriptions", name, "resourcegroups"] if is_subscription(name) => {
            list(vec![resource_group(vault)])
        }
        ["subscriptions", name, "resourcegroups", group] if is_subscription(name) && is_group(group) => {
            answer(&resource_group(vault))
        }
        ["subscriptions", name, "providers", "microsoft.recoveryservices", "vaults"]
            if is_subscription(name) =>
        {
            list(vec![resource(vault)])
        }
        [
            "subscriptions",
            name,
            "resourcegroups",
            group,
            "providers",
            "microsoft.recoveryservices",
            "vaults",
        ] if is_subscription(name) && is_group(group) => list(vec![resource(vault)]),
        _ => Err(ApiError::no_such_path()),
    }
}

/// The vault itself: `…/vaults/{V}`.
pub(super) fn vault(call: &Call) -> Result<Response, ApiError> {
    match call.method {
        Method::GET => answer(&resource(&call.api.vault)),
        // Creating what is there changes nothing that a client may set: what the body says of alerts and networks belongs
        // to Azure.
        Method::PUT | Method::PATCH => {
            let _: Value = call.body(super::body::VAULT)?;
            answer(&resource(&call.api.vault))
        }
        Method::DELETE => Err(ApiError::new(
            StatusCode::CONFLICT,
            "VaultInUse",
            format!("'{}' is the vault of this server and lives as long as it", call.api.vault.name),
            "Remove the replicated items and registered hosts instead, then stop the server.",
        )),
        _ => Ok(StatusCode::METHOD_NOT_ALLOWED.into_response()),
    }
}

fn subscription(vault: &VaultRecord) -> Value {
    json!({
        "id": format!("/subscriptions/{}", vault.subscription),
        "subscriptionId": vault.subscription,
        "tenantId": vault.subscription,
        "displayName": "Mainstay",
        "state": "Enabled",
        "authorizationSource": "RoleBased",
        "managedByTenants": [],
    })
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

/// Words and shape as recorded; ids of vaults have `subscriptions` in lower case there, unlike all that is in them.
fn resource(vault: &VaultRecord) -> Value {
    json!({
        "id": format!(
            "/subscriptions/{}/resourceGroups/{}/providers/{NAMESPACE}/vaults/{}",
            vault.subscription, vault.resource_group, vault.name
        ),
        "name": vault.name,
        "type": format!("{NAMESPACE}/vaults"),
        "location": vault.location,
        "etag": format!("W/\"{}\"", vault.subscription),
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
    })
}
