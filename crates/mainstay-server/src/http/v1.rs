//! What Azure has no word for: `/api/v1`.

mod openapi;
mod routes;
mod scrubs;

use std::sync::{Arc, LazyLock};

use axum::response::{IntoResponse as _, Response};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hyper::{Method, StatusCode, header};
use mainstay_api::v1::{
    AuditEntry, Console, DiskStatus, ItemStatus, RegisterAnswer, RegisterRequest, RegistrationKey,
    ServicePrincipal, ServicePrincipalRequest, Token, TokenRequest, Vault,
};
use mainstay_control::{
    ControlError,
    app::{HostRegistration, Role, ServicePrincipalRecord, TokenRecord, VaultRecord},
    db::{AuditRecord, DiskRecord, ItemRecord},
};
use mainstay_model::ItemId;
use mainstay_provider::{NicPlan, NoProgress, ReadConsole, call as call_site};
use serde_json::json as value;

use crate::{Authority, AuthorityError, vaults::HostedVault};

use super::{
    Api, Call, body,
    convert::{self, time_text},
    error::ApiError,
    jobs, json, list,
};
use routes::{Found, OpenRoute, Route, SignedRoute};

/// Milliseconds of a day.
const DAY_MS: i64 = 24 * 3_600_000;

/// The OpenAPI document, as it is checked in and answered.
static DOCUMENT: LazyLock<String> = LazyLock::new(|| format!("{:#}\n", openapi::document()));

/// The OpenAPI document of `/api/v1`, as text.
pub fn document_text() -> &'static str {
    &DOCUMENT
}

/// Which vault a request is about: a query parameter of the operations in a vault.
pub(super) const VAULT_PARAMETER: &str = "vault";

/// The role that a request needs.
pub(super) fn required_role(method: &Method, path: &[&str]) -> Role {
    routes::required_role(method, path)
}

/// Answers requests that need no sign-in; the path below `/api/v1` in lower case.
pub(super) async fn dispatch_open(
    api: &Api,
    method: &Method,
    path: &[&str],
    body: &[u8],
) -> Option<Result<Response, ApiError>> {
    let Found::Operation(operation) = routes::find(method, path) else { return None };
    let Route::Open(route) = operation.route else { return None };
    Some(match route {
        OpenRoute::Document => {
            Ok(([(header::CONTENT_TYPE, "application/json")], document_text()).into_response())
        }
        OpenRoute::Register => register(api, body).await,
    })
}

pub(super) async fn dispatch(call: &Call) -> Result<Response, ApiError> {
    let path: Vec<&str> = call.segments.iter().map(String::as_str).collect();
    let operation = match routes::find(&call.method, &path) {
        Found::Operation(operation) => operation,
        Found::OtherMethods(allowed) => return Err(ApiError::method_not_allowed(&allowed)),
        Found::Nothing => return Err(ApiError::no_such_path()),
    };
    // Answered before anybody signs in.
    let Route::Signed(_, route) = operation.route else { return Err(ApiError::no_such_path()) };
    // Every path has one parameter at most, in this place.
    let name = path.get(1).copied().unwrap_or_default();
    let (control, directory) = (call.control(), &call.api.directory);
    match route {
        SignedRoute::Vault => json(&shown_vault(&call.vault)),
        SignedRoute::Vaults => {
            list(call.api.vaults.all().iter().map(|vault| shown_vault(&vault.record())).collect())
        }
        SignedRoute::CreateRegistrationKey => registration_key(call, name).await,
        SignedRoute::Item => json(&item_status(call, name).await?),
        SignedRoute::ItemConsole => {
            let item = find_item(call, name).await?;
            let vm = item
                .active_vm()
                .ok_or_else(|| ControlError::not_found("active copy of", item.vm_name.as_str()))?;
            let site = control.sites.get(item.active_provider()).map_err(ControlError::from)?;
            let command =
                call_site(&*site, ReadConsole { vm }, &NoProgress).await.map_err(ControlError::from)?;
            json(&Console { command })
        }
        SignedRoute::ItemScrub => json(&scrubs::shown(control, &find_item(call, name).await?)),
        SignedRoute::RequestScrub => {
            let item = find_item(call, name).await?;
            json(&scrubs::shown(control, &control.request_scrub(item.id).await?))
        }
        SignedRoute::Scrubs => {
            let items = control.db.items().await.map_err(ControlError::from)?;
            list(items.iter().map(|item| scrubs::shown(control, item)).collect())
        }
        SignedRoute::Job => json(&convert::job_status(&jobs::find(call, name).await?)),
        SignedRoute::Tokens => {
            list(directory.tokens().await?.into_iter().map(|token| shown(token, None)).collect())
        }
        SignedRoute::CreateToken => {
            let request: TokenRequest = call.body(body::TOKEN)?;
            let role = parse_role(&request.role)?;
            let (record, secret) =
                directory.create_token(&request.label, role, expires_ms(call, request.days)).await?;
            json(&shown(record, Some(secret.0)))
        }
        SignedRoute::RevokeToken => {
            directory.revoke_token(&name.to_lowercase()).await?;
            Ok(StatusCode::NO_CONTENT.into_response())
        }
        SignedRoute::ServicePrincipals => {
            let principals = directory.service_principals().await?;
            list(principals.into_iter().map(|principal| shown_principal(call, principal, None)).collect())
        }
        SignedRoute::CreateServicePrincipal => {
            let request: ServicePrincipalRequest = call.body(body::SERVICE_PRINCIPAL)?;
            let role = parse_role(&request.role)?;
            let expires_ms = expires_ms(call, request.days);
            let (record, secret) =
                directory.create_service_principal(&request.name, role, expires_ms).await?;
            json(&shown_principal(call, record, Some(secret.0)))
        }
        SignedRoute::RemoveServicePrincipal => {
            directory.remove_service_principal(&name.to_lowercase()).await?;
            Ok(StatusCode::NO_CONTENT.into_response())
        }
        SignedRoute::Audit => {
            let records = directory.db.audit_trail().await.map_err(ControlError::from)?;
            list(records.into_iter().map(audit_entry).collect())
        }
    }
}

fn shown_vault(vault: &VaultRecord) -> Vault {
    Vault {
        subscription: vault.subscription.clone(),
        resource_group: vault.resource_group.clone(),
        name: vault.name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

fn audit_entry(record: AuditRecord) -> AuditEntry {
    let AuditRecord { id, time_ms, who, from, action, target, is_allowed } = record;
    AuditEntry { id, time_ms, who, from, action, target, is_allowed }
}

fn shown(record: TokenRecord, secret: Option<String>) -> Token {
    Token {
        digest: record.digest,
        label: record.label,
        role: format!("{:?}", record.role),
        expires: record.expires_ms.map(time_text),
        secret,
    }
}

fn shown_principal(call: &Call, record: ServicePrincipalRecord, secret: Option<String>) -> ServicePrincipal {
    ServicePrincipal {
        client_id: record.client_id.to_string(),
        tenant_id: call.api.tenant.clone(),
        name: record.name,
        role: format!("{:?}", record.role),
        created: time_text(record.created_ms),
        expires: record.expires_ms.map(time_text),
        secret,
    }
}

fn expires_ms(call: &Call, days: Option<u32>) -> Option<i64> {
    days.map(|days| call.control().clock.now_ms() + i64::from(days) * DAY_MS)
}

fn parse_role(role: &str) -> Result<Role, ApiError> {
    [Role::Reader, Role::Operator, Role::Contributor]
        .into_iter()
        .find(|known| format!("{known:?}").eq_ignore_ascii_case(role))
        .ok_or_else(|| {
            ApiError::bad_request(
                "InvalidRole",
                format!("'{role}' is not a role"),
                "Use Reader, Operator or Contributor.",
            )
        })
}

async fn registration_key(call: &Call, fabric: &str) -> Result<Response, ApiError> {
    let (record, secret) = call.control().create_registration_key(fabric).await?;
    let key = value!({ "url": call.base_url, "secret": secret.0, "authority": call.api.authority.certificate_pem() });
    json(&RegistrationKey {
        key: URL_SAFE_NO_PAD.encode(key.to_string()),
        fabric: record.fabric,
        expires: time_text(record.expires_ms),
    })
}

/// Exchanges a registration key for a certificate. No token is needed: the key is the proof.
async fn register(api: &Api, body: &[u8]) -> Result<Response, ApiError> {
    let request: RegisterRequest = body::read(body, body::REGISTER)?;
    let vault = vault_of_key(api, &request.secret).await.map_err(unproven)?;
    let Some(_in_use) = vault.in_use().await else {
        return Err(ControlError::not_found("vault", vault.record().name.as_str()).into());
    };
    let unsignable = |error: AuthorityError| {
        ApiError::bad_request(
            "InvalidCertificateRequest",
            error.to_string(),
            "Register with the agent of this version.",
        )
    };
    // Before anything is written.
    let public_key = Authority::request_key(&request.certificate_request).map_err(unsignable)?;
    let host =
        HostRegistration { name: &request.host, version: &request.version, public_key: Some(public_key) };
    let provider = vault.control.register_host(&request.secret, host).await.map_err(unproven)?;
    let certificate =
        api.authority.sign_agent(&request.certificate_request, provider.id).map_err(unsignable)?;
    tracing::info!(provider = %provider.id, host = provider.name, fabric = provider.fabric, "a host was registered");
    json(&RegisterAnswer {
        provider: provider.id.to_string(),
        fabric: provider.fabric,
        certificate,
        authority: api.authority.certificate_pem().to_owned(),
        endpoint: api.agent_endpoint.clone(),
    })
}

/// A key that does not prove what it should is a failed sign-in.
fn unproven(error: ControlError) -> ApiError {
    match error {
        ControlError::Invalid {
            code: code @ ("RegistrationKeyInvalid" | "RegistrationKeyExpired" | "RegistrationKeyUsed"),
            message,
            remedy,
        } => ApiError::new(StatusCode::UNAUTHORIZED, code, message, remedy),
        error => error.into(),
    }
}

/// The vault that made a registration key.
async fn vault_of_key(api: &Api, secret: &str) -> Result<Arc<HostedVault>, ControlError> {
    let mut refusal = None;
    for vault in api.vaults.all() {
        match vault.control.registration_key(secret).await {
            Ok(_) => return Ok(vault),
            // One that has expired is known better than one that is nobody's.
            Err(error) if refusal.is_none() || !is_unknown_key(&error) => refusal = Some(error),
            Err(_) => {}
        }
    }
    Err(refusal.unwrap_or_else(|| ControlError::not_found("vault", "")))
}

fn is_unknown_key(error: &ControlError) -> bool {
    matches!(error, ControlError::Invalid { code: "RegistrationKeyInvalid", .. })
}

async fn find_item(call: &Call, id: &str) -> Result<ItemRecord, ApiError> {
    if let Ok(id) = id.parse::<ItemId>() {
        return Ok(call.control().item(id).await?);
    }
    let items = call.control().db.items().await.map_err(ControlError::from)?;
    let found = items.iter().find(|item| item.name.eq_ignore_ascii_case(id));
    found
        .map(|item| ItemRecord::clone(item))
        .ok_or_else(|| ControlError::not_found("replicated item", id).into())
}

fn disk_status(disk: &DiskRecord) -> DiskStatus {
    DiskStatus { key: disk.key.clone(), format: disk.format.clone(), is_replicated: disk.is_included }
}

async fn item_status(call: &Call, id: &str) -> Result<ItemStatus, ApiError> {
    let item = find_item(call, id).await?;
    let (_, _, rpo_seconds) = call.control().item_health(&item).await?;
    let cycle = call.control().cycles.progress(item.id).map(convert::progress);
    let mac_policy = |nic: &NicPlan| (nic.mac.clone(), format!("{:?}", nic.mac_policy));
    Ok(ItemStatus {
        id: item.id.to_string(),
        generation: item.state.generation.0,
        vm: item.vm.to_string(),
        recovery_vm: item.recovery_vm.map(|copy| copy.vm.to_string()),
        test_vm: item.test_vm.map(|copy| copy.vm.to_string()),
        is_hydrated: item.recovery_vm.map(|copy| copy.is_hydrated),
        bytes_changed: item.replication.bytes_changed,
        bytes_moved: item.replication.bytes_moved,
        rpo_seconds,
        cycle,
        loss_seconds: item.failover.map(|failover| failover.loss_seconds),
        mac_policies: item.target.nics.iter().map(mac_policy).collect(),
        disks: item.disks.iter().map(disk_status).collect(),
    })
}
