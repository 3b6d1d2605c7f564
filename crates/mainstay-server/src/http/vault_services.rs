//! What surrounds replication in the vault: settings that clients keep there, counts, credentials, names.

use axum::response::Response;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use hyper::{Method, StatusCode};
use mainstay_api::arm::{
    CertificateInput, ExtendedInfoProperties, HYPERV_REPLICA_AZURE, NAMESPACE, NameQuestion, Resource,
    VaultSettingProperties,
};
use mainstay_control::{
    ControlError,
    app::{ExtendedInfo, VaultSettingRecord},
    db::{Comparison, JobColumn, JobCondition},
};
use mainstay_model::Health;
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use serde_json::{Value, json};
use uuid::Uuid;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{Call, body, convert::time_text, error::ApiError, json as answer, list};

/// Milliseconds of a day.
const DAY_MS: i64 = 24 * 3_600_000;

/// Paths below the vault.
pub(super) async fn dispatch(call: &Call, path: &[&str]) -> Result<Response, ApiError> {
    let control = call.control();
    match (&call.method, path) {
        (&Method::GET, ["replicationvaultsettings"]) => {
            list(vec![setting(call, control.vault_settings().await?)])
        }
        (method, ["replicationvaultsettings", name]) if *name == "default" => {
            let settings = match *method {
                Method::GET => control.vault_settings().await?,
                Method::PUT => {
                    let input: VaultSettingProperties = call.properties(body::VAULT_SETTING)?;
                    let change = |settings: &mut VaultSettingRecord| {
                        settings.migration_solution = input.migration_solution_id;
                        settings.vmware_provider = input.vmware_to_azure_provider_type;
                    };
                    control.change_vault_settings(change).await?
                }
                _ => return Err(ApiError::no_such_path()),
            };
            answer(&setting(call, settings))
        }
        (&Method::GET, ["replicationvaultsettings", name]) => {
            Err(ControlError::not_found("vault setting", *name).into())
        }
        (&Method::GET, ["replicationsupportedoperatingsystems"]) => supported_systems(call),
        (&Method::GET, ["usages"]) => usages(call).await,
        (&Method::GET, ["replicationusages"]) => replication_usages(call).await,
        (&Method::PUT, ["certificates", _]) => certificate(call, &call.segments[1]),
        (_, ["extendedinformation", "vaultextendedinfo"]) => extended_information(call).await,
        _ => Err(ApiError::no_such_path()),
    }
}

fn setting(call: &Call, record: VaultSettingRecord) -> Resource<VaultSettingProperties> {
    Resource {
        id: format!("{}/replicationVaultSettings/default", call.vault.id()),
        name: "default".to_owned(),
        kind: format!("{NAMESPACE}/vaults/replicationVaultSettings"),
        location: None,
        properties: VaultSettingProperties {
            migration_solution_id: record.migration_solution,
            vmware_to_azure_provider_type: record.vmware_provider,
        },
    }
}

/// Replication works beneath the guest, so that no system is excluded and no version is told.
fn supported_systems(call: &Call) -> Result<Response, ApiError> {
    let is_asked =
        call.query("instancetype").is_none_or(|kind| kind.eq_ignore_ascii_case(HYPERV_REPLICA_AZURE));
    let systems =
        ["Windows", "Linux", "Other"].map(|name| json!({ "osName": name, "osType": name, "osVersions": [] }));
    let supported = json!({ "instanceType": HYPERV_REPLICA_AZURE, "supportedOs": systems });
    answer(&json!({
        "id": format!("{}/replicationSupportedOperatingSystems/Default", call.vault.id()),
        "name": "Default",
        "type": format!("{NAMESPACE}/vaults/replicationSupportedOperatingSystems"),
        "properties": { "supportedOsList": if is_asked { vec![supported] } else { Vec::new() } },
    }))
}

fn in_state(state: &str) -> JobCondition {
    JobCondition::Text(JobColumn::State, Comparison::Equal, state.to_owned())
}

fn since(condition: JobCondition, time_ms: i64) -> JobCondition {
    JobCondition::All(vec![
        condition,
        JobCondition::Time(JobColumn::Created, Comparison::GreaterOrEqual, time_ms),
    ])
}

/// What is counted in the vault at all, under the service's names; there are no limits (-1).
async fn usages(call: &Call) -> Result<Response, ApiError> {
    let control = call.control();
    let db = |error| ApiError::from(ControlError::from(error));
    let day_ago_ms = control.clock.now_ms() - DAY_MS;
    let items = control.db.items().await.map_err(db)?;
    let running = control.db.count_jobs(&in_state("InProgress")).await.map_err(db)?;
    let failed = control.db.count_jobs(&since(in_state("Failed"), day_ago_ms)).await.map_err(db)?;
    let usage = |name: &str, text: &str, value: i64, period: Option<&str>| {
        let mut usage = json!({
            "unit": "Count",
            "currentValue": value,
            "limit": -1,
            "name": { "value": name, "localizedValue": text },
        });
        if let Some(period) = period {
            usage["quotaPeriod"] = json!(period);
        }
        usage
    };
    answer(&json!({ "value": [
        usage("ProtectedItemCount", "Replicated items", items.len() as i64, None),
        usage("ManagedInstances", "Protected instances", items.len() as i64, None),
        usage("InProgressJobsCount", "In progress", running, None),
        usage("FailedJobsCount", "Failed", failed, Some("P1D")),
    ] }))
}

async fn replication_usages(call: &Call) -> Result<Response, ApiError> {
    let control = call.control();
    let db = |error| ApiError::from(ControlError::from(error));
    let day_ago_ms = control.clock.now_ms() - DAY_MS;
    let items = control.db.items().await.map_err(db)?;
    let providers = control.providers().await?;
    let mut unhealthy_vms = 0;
    for item in items.iter() {
        unhealthy_vms += i64::from(control.item_health(item).await?.0 != Health::Normal);
    }
    let away = providers.iter().filter(|provider| !control.sites.is_connected(provider.id)).count();
    answer(&json!({ "value": [{
        "monitoringSummary": {
            "unHealthyVmCount": unhealthy_vms,
            "unHealthyProviderCount": away,
            "eventsCount": control.db.count_events(day_ago_ms).await.map_err(db)?,
            "deprecatedProviderCount": 0,
            "supportedProviderCount": providers.len(),
            "unsupportedProviderCount": 0,
        },
        "jobsSummary": {
            "failedJobs": control.db.count_jobs(&since(in_state("Failed"), day_ago_ms)).await.map_err(db)?,
            "suspendedJobs": control.db.count_jobs(&in_state("Suspended")).await.map_err(db)?,
            "inProgressJobs": control.db.count_jobs(&in_state("InProgress")).await.map_err(db)?,
        },
        "protectedItemCount": items.len(),
        "recoveryPlanCount": control.recovery_plans().await?.len(),
        "registeredServersCount": providers.len(),
        // 1 = not with certificates of the old kind.
        "recoveryServicesProviderAuthType": 1,
    }] }))
}

/// Vault credentials for a certificate. Nothing is signed in with the certificate: hosts register with keys and programs
/// with service principals. It is examined, and told back as the service would.
fn certificate(call: &Call, name: &str) -> Result<Response, ApiError> {
    let input: CertificateInput = call.properties(body::CERTIFICATE)?;
    let invalid = |what: String| {
        ApiError::bad_request(
            "InvalidCertificate",
            format!("properties.certificate cannot be used: {what}"),
            "Send an X.509 certificate that is valid now, as DER in Base64.",
        )
    };
    let decoded = STANDARD.decode(input.certificate.trim()).map_err(|error| invalid(error.to_string()))?;
    // Some clients encode the text of a certificate file, which is Base64 itself.
    let der = STANDARD.decode(decoded.trim_ascii()).unwrap_or(decoded);
    let (rest, parsed) = X509Certificate::from_der(&der).map_err(|error| invalid(error.to_string()))?;
    if !rest.is_empty() {
        return Err(invalid("something follows its end".to_owned()));
    }
    let time = |time: x509_parser::time::ASN1Time| time_text(time.timestamp().saturating_mul(1000));
    let (from, to) = (parsed.validity().not_before, parsed.validity().not_after);
    let now_seconds = call.control().clock.now_ms() / 1000;
    if now_seconds < from.timestamp() || to.timestamp() < now_seconds {
        return Err(invalid(format!("it is valid from {} until {}", time(from), time(to))));
    }
    let vault = &call.vault;
    let thumbprint = digest(&SHA1_FOR_LEGACY_USE_ONLY, &der);
    let thumbprint: String = thumbprint.as_ref().iter().map(|byte| format!("{byte:02X}")).collect();
    let nobody = Uuid::nil().to_string();
    answer(&json!({
        "id": format!("{}/certificates/{name}", vault.id()),
        "name": name,
        "type": format!("{NAMESPACE}/vaults/certificates"),
        "properties": {
            "authType": "AzureActiveDirectory",
            "certificate": input.certificate.trim(),
            "friendlyName": name,
            "subject": parsed.subject().to_string(),
            "issuer": parsed.issuer().to_string(),
            "thumbprint": thumbprint,
            "validFrom": time(from),
            "validTo": time(to),
            "resourceId": resource_number(&vault.subscription),
            "aadAuthority": call.base_url,
            "aadTenantId": vault.subscription,
            "servicePrincipalClientId": nobody,
            "servicePrincipalObjectId": nobody,
            "azureManagementEndpointAudience": call.base_url,
            "serviceResourceId": vault.id(),
            "aadAudience": call.base_url,
        },
    }))
}

/// A number that is always the same for a vault; the service counts its vaults.
fn resource_number(subscription: &str) -> i64 {
    let number = subscription.parse::<Uuid>().map_or(0, |id| id.as_u128());
    // Exact in every client's numbers.
    (number & ((1 << 53) - 1)) as i64
}

async fn extended_information(call: &Call) -> Result<Response, ApiError> {
    let control = call.control();
    let info = match call.method {
        Method::GET => control.vault_settings().await?.extended,
        Method::PUT | Method::PATCH => {
            let input: ExtendedInfoProperties = call.properties(body::EXTENDED_INFO)?;
            let keeps = call.method == Method::PATCH;
            let etag = Uuid::new_v4().to_string();
            let change = |settings: &mut VaultSettingRecord| {
                let present = settings.extended.take().filter(|_| keeps).unwrap_or_default();
                settings.extended = Some(ExtendedInfo {
                    integrity_key: input.integrity_key.or(present.integrity_key),
                    encryption_key: input.encryption_key.or(present.encryption_key),
                    encryption_key_thumbprint: input
                        .encryption_key_thumbprint
                        .or(present.encryption_key_thumbprint),
                    algorithm: input.algorithm.or(present.algorithm),
                    etag,
                });
            };
            control.change_vault_settings(change).await?.extended
        }
        _ => return Err(ApiError::no_such_path()),
    };
    let info = info.ok_or_else(|| {
        ApiError::new(
            StatusCode::NOT_FOUND,
            "ResourceExtendedInfoNotFound",
            "nobody has written extended information into this vault",
            "Write it with PUT.",
        )
    })?;
    let properties = ExtendedInfoProperties {
        integrity_key: info.integrity_key,
        encryption_key: info.encryption_key,
        encryption_key_thumbprint: info.encryption_key_thumbprint,
        algorithm: info.algorithm,
    };
    answer(&json!({
        "id": format!("{}/extendedInformation/vaultExtendedInfo", call.vault.id()),
        "name": "vaultExtendedInfo",
        "type": format!("{NAMESPACE}/vaults/extendedInformation"),
        "etag": info.etag,
        "properties": properties,
    }))
}

/// Paths above the vault, as segments in lower case; `None` = none of these.
pub(super) fn above_vault(call: &Call, path: &[&str]) -> Option<Result<Response, ApiError>> {
    match path {
        ["providers", "microsoft.recoveryservices", "operations"] if call.method == Method::GET => {
            Some(operations())
        }
        [
            "subscriptions",
            subscription,
            "resourcegroups",
            group,
            "providers",
            "microsoft.recoveryservices",
            below @ ..,
        ] if call.api.tenant.eq_ignore_ascii_case(subscription) => match (&call.method, below) {
            (&Method::GET, ["operations"]) => Some(operations()),
            (&Method::POST, ["locations", _, "checknameavailability"]) => Some(check_name(call, group)),
            _ => None,
        },
        _ => None,
    }
}

fn check_name(call: &Call, group: &str) -> Result<Response, ApiError> {
    let question: NameQuestion = call.body(body::CHECK_NAME)?;
    if call.api.vaults.find(group, &question.name).is_some() {
        let message = "Resource already exists with the same name.";
        return answer(&json!({ "nameAvailable": false, "reason": "AlreadyExists", "message": message }));
    }
    answer(&json!({ "nameAvailable": true }))
}

/// What can be done to what: path below the namespace, name for people, verbs.
const OPERATIONS: &[(&str, &str, &[&str])] = &[
    ("vaults", "Vault", &["read", "write"]),
    ("vaults/usages", "Vault Usage", &["read"]),
    ("vaults/replicationUsages", "Replication Usages", &["read"]),
    ("vaults/certificates", "Vault Certificate", &["write"]),
    ("vaults/extendedInformation", "Vault Extended Information", &["read", "write"]),
    ("vaults/replicationAlertSettings", "Alert Settings", &["read", "write"]),
    ("vaults/replicationVaultSettings", "Vault Settings", &["read", "write"]),
    ("vaults/replicationSupportedOperatingSystems", "Supported Operating Systems", &["read"]),
    ("vaults/replicationVaultHealth", "Vault Health", &["read", "refresh/action"]),
    ("vaults/replicationEvents", "Events", &["read"]),
    (
        "vaults/replicationJobs",
        "Jobs",
        &["read", "cancel/action", "restart/action", "resume/action", "export/action"],
    ),
    (
        "vaults/replicationRecoveryPlans",
        "Recovery Plans",
        &[
            "read",
            "write",
            "delete",
            "testFailover/action",
            "testFailoverCleanup/action",
            "plannedFailover/action",
            "unplannedFailover/action",
            "failoverCommit/action",
            "failoverCancel/action",
            "reProtect/action",
        ],
    ),
    ("vaults/replicationPolicies", "Policies", &["read", "write", "delete"]),
    (
        "vaults/replicationFabrics",
        "Fabrics",
        &["read", "write", "delete", "remove/action", "checkConsistency/action"],
    ),
    (
        "vaults/replicationFabrics/replicationRecoveryServicesProviders",
        "Recovery Services Providers",
        &["read", "write", "delete", "remove/action", "refreshProvider/action"],
    ),
    ("vaults/replicationFabrics/replicationNetworks", "Networks", &["read"]),
    (
        "vaults/replicationFabrics/replicationNetworks/replicationNetworkMappings",
        "Network Mappings",
        &["read", "write", "delete"],
    ),
    ("vaults/replicationFabrics/replicationLogicalNetworks", "Logical Networks", &["read"]),
    (
        "vaults/replicationFabrics/replicationProtectionContainers",
        "Protection Containers",
        &["read", "discoverProtectableItem/action"],
    ),
    (
        "vaults/replicationFabrics/replicationProtectionContainers/replicationProtectableItems",
        "Protectable Items",
        &["read"],
    ),
    (
        "vaults/replicationFabrics/replicationProtectionContainers/replicationProtectionContainerMappings",
        "Protection Container Mappings",
        &["read", "write", "delete", "remove/action"],
    ),
    (
        "vaults/replicationFabrics/replicationProtectionContainers/replicationProtectedItems",
        "Protected Items",
        &[
            "read",
            "write",
            "delete",
            "remove/action",
            "testFailover/action",
            "testFailoverCleanup/action",
            "plannedFailover/action",
            "unplannedFailover/action",
            "failoverCommit/action",
            "failoverCancel/action",
            "applyRecoveryPoint/action",
            "reProtect/action",
            "repairReplication/action",
            "resolveHealthErrors/action",
        ],
    ),
    (
        "vaults/replicationFabrics/replicationProtectionContainers/replicationProtectedItems/recoveryPoints",
        "Recovery Points",
        &["read"],
    ),
    (
        "vaults/replicationFabrics/replicationProtectionContainers/replicationProtectedItems/targetComputeSizes",
        "Target Compute Sizes",
        &["read"],
    ),
];

fn operations() -> Result<Response, ApiError> {
    let shown = |(path, resource, verbs): &(&str, &str, &[&str])| -> Vec<Value> {
        let one = |verb: &&str| {
            json!({
                "name": format!("{NAMESPACE}/{path}/{verb}"),
                "display": {
                    "provider": "Microsoft Recovery Services",
                    "resource": resource,
                    "operation": verb.trim_end_matches("/action"),
                    "description": format!("{} of {resource}", verb.trim_end_matches("/action")),
                },
                "origin": "user",
            })
        };
        verbs.iter().map(one).collect()
    };
    list(OPERATIONS.iter().flat_map(shown).collect::<Vec<_>>())
}
