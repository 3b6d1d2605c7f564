//! Fabrics, providers, containers, mappings, protectable items, networks, policies: what is configured once.

use std::sync::Arc;

use axum::response::Response;
use hyper::Method;
use mainstay_api::arm::{
    AZURE, ContainerMappingInput, FabricProperties, PolicyInput, PolicySettings, ProtectableItemProperties,
    Request, Resource,
};
use mainstay_control::{
    ControlError,
    app::{FabricRecord, ProtectableItem, ProviderRecord},
};
use mainstay_model::{ConfigurationChange, ProviderId, ReplicationPolicy, VmId};
use serde_json::Value;

use super::{
    Call, PAGE_LENGTH, body,
    convert::{self, Ids, last_segment, segment_after},
    error::ApiError,
    json, list, networks, page,
};

pub(super) async fn dispatch(call: &Call) -> Result<Response, ApiError> {
    let path = call.path();
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    match path.as_slice() {
        ["replicationfabrics"] if call.method == Method::GET => {
            let mut shown = Vec::new();
            let hosts = call.control().providers().await?;
            for fabric in call.control().fabrics().await? {
                shown.push(shown_fabric(call, &fabric, &hosts));
            }
            list(shown)
        }
        ["replicationfabrics", _, rest @ ..] => fabric(call, &call.segments[1], rest).await,
        ["replicationrecoveryservicesproviders"] if call.method == Method::GET => providers(call, None).await,
        ["replicationprotectioncontainers"] if call.method == Method::GET => {
            let mut shown = Vec::new();
            for fabric in call.control().fabrics().await? {
                shown.push(container(call, &fabric).await?);
            }
            list(shown)
        }
        ["replicationprotectioncontainermappings"] if call.method == Method::GET => {
            mappings(call, None).await
        }
        ["replicationnetworks"] if call.method == Method::GET => networks::list_networks(call, None).await,
        ["replicationnetworkmappings"] if call.method == Method::GET => networks::list_mappings(call).await,
        ["replicationpolicies", rest @ ..] => policies(call, rest).await,
        _ => Err(ApiError::no_such_path()),
    }
}

/// A fabric's resource, with those of all hosts that are its.
fn shown_fabric(
    call: &Call,
    fabric: &FabricRecord,
    hosts: &[Arc<ProviderRecord>],
) -> Resource<FabricProperties> {
    let is_here = |host: &&ProviderRecord| host.fabric.eq_ignore_ascii_case(&fabric.name);
    let hosts: Vec<&ProviderRecord> = hosts.iter().map(|host| &**host).filter(is_here).collect();
    let is_healthy = hosts.iter().all(|host| call.control().sites.is_connected(host.id));
    convert::fabric(&Ids(&call.vault), fabric, &hosts, is_healthy)
}

async fn fabric(call: &Call, name: &str, rest: &[&str]) -> Result<Response, ApiError> {
    let control = call.control();
    let ids = Ids(&call.vault);
    match (&call.method, rest) {
        (&Method::PUT, []) => {
            let _: Value = call.body(body::FABRIC)?;
            let job = control.create_fabric(name, call.who.clone()).await?;
            return Ok(call.accepted(job.id, &ids.fabric(name)));
        }
        (&Method::DELETE, []) | (&Method::POST, ["remove"]) => {
            let job = control.remove_fabric(name, call.who.clone()).await?;
            return Ok(call.accepted(job.id, &ids.fabric(name)));
        }
        _ => {}
    }
    let fabric = control.fabric(name).await?;
    match (&call.method, rest) {
        (&Method::GET, []) => json(&shown_fabric(call, &fabric, &control.providers().await?)),
        (&Method::POST, ["checkconsistency"]) => {
            let change = ConfigurationChange::CheckConsistency;
            let job = control.refresh_providers(Some(&fabric.name), change, call.who.clone()).await?;
            Ok(call.accepted(job.id, &ids.fabric(&fabric.name)))
        }
        (&Method::GET, ["replicationrecoveryservicesproviders"]) => providers(call, Some(&fabric)).await,
        (_, ["replicationrecoveryservicesproviders", id, rest @ ..]) => {
            provider(call, &fabric, id, rest).await
        }
        (&Method::GET, ["replicationprotectioncontainers"]) => list(vec![container(call, &fabric).await?]),
        (_, ["replicationprotectioncontainers", name, rest @ ..]) => {
            if !fabric.container().eq_ignore_ascii_case(name) {
                return Err(ControlError::not_found("protection container", *name).into());
            }
            in_container(call, &fabric, rest).await
        }
        (_, ["replicationnetworks" | "replicationlogicalnetworks", ..]) => {
            networks::of_fabric(call, &fabric, rest).await
        }
        _ => Err(ApiError::no_such_path()),
    }
}

async fn in_container(call: &Call, fabric: &FabricRecord, rest: &[&str]) -> Result<Response, ApiError> {
    match (&call.method, rest) {
        (&Method::GET, []) => json(&container(call, fabric).await?),
        (&Method::POST, ["discoverprotectableitem"]) => {
            let _: Value = call.body(body::DISCOVER)?;
            let change = ConfigurationChange::DiscoverProtectableItem;
            let by = call.who.clone();
            let job = call.control().refresh_providers(Some(&fabric.name), change, by).await?;
            Ok(call.accepted(job.id, &Ids(&call.vault).container(fabric)))
        }
        (&Method::GET, ["replicationprotectableitems", rest @ ..]) => {
            protectable_items(call, fabric, rest).await
        }
        (&Method::GET, ["replicationprotectioncontainermappings"]) => mappings(call, Some(fabric)).await,
        (_, ["replicationprotectioncontainermappings", _, rest @ ..]) => {
            mapping(call, fabric, &call.segments[5], rest).await
        }
        _ => Err(ApiError::no_such_path()),
    }
}

async fn providers(call: &Call, fabric: Option<&FabricRecord>) -> Result<Response, ApiError> {
    let control = call.control();
    let items = control.db.items().await.map_err(ControlError::from)?;
    let providers = control.providers().await?;
    let shown = providers
        .iter()
        .filter(|provider| fabric.is_none_or(|fabric| provider.fabric.eq_ignore_ascii_case(&fabric.name)))
        .map(|provider| {
            let count = items.iter().filter(|item| item.primary_provider == provider.id).count();
            convert::provider(&Ids(&call.vault), provider, control.sites.is_connected(provider.id), count)
        });
    list(shown.collect())
}

async fn provider(call: &Call, fabric: &FabricRecord, id: &str, rest: &[&str]) -> Result<Response, ApiError> {
    let control = call.control();
    let not_found = || ControlError::not_found("registered host", id);
    if call.method == Method::PUT && rest.is_empty() {
        let _: Value = call.body(body::PROVIDER)?;
    }
    let known = id.parse::<ProviderId>().ok();
    if call.method == Method::PUT && !is_registered(call, fabric, known).await? {
        return Err(ApiError::bad_request(
            "ProviderRegistersItself",
            format!(
                "'{id}' is not a registered host of fabric '{}', and cannot be made one from outside",
                fabric.name
            ),
            "Make a key with `mainstay host key` and run `mainstay agent register` on the host: its certificate is its identity.",
        ));
    }
    let id: ProviderId = id.parse().map_err(|_| not_found())?;
    let provider = control.provider(id).await?;
    if !provider.fabric.eq_ignore_ascii_case(&fabric.name) {
        return Err(not_found().into());
    }
    match (&call.method, rest) {
        (&Method::GET, []) => {}
        // What a host says of itself is changed by the host alone: a PUT of what is there asks it anew, if it can be asked.
        (&Method::PUT, []) => {
            let change = ConfigurationChange::RefreshProvider;
            let job = control.refresh_providers(Some(&fabric.name), change, call.who.clone()).await?;
            return Ok(call.accepted(job.id, &Ids(&call.vault).provider(&fabric.name, id)));
        }
        (&Method::POST, ["refreshprovider"]) => {
            let job = control.refresh_provider_for(id, call.who.clone()).await?;
            return Ok(call.accepted(job.id, &Ids(&call.vault).provider(&fabric.name, id)));
        }
        (&Method::DELETE, []) | (&Method::POST, ["remove"]) => {
            let job = control.remove_provider(id, call.who.clone()).await?;
            return Ok(call.accepted(job.id, &Ids(&call.vault).provider(&fabric.name, id)));
        }
        _ => return Err(ApiError::no_such_path()),
    }
    let items = control.db.items().await.map_err(ControlError::from)?;
    let count = items.iter().filter(|item| item.primary_provider == id).count();
    json(&convert::provider(&Ids(&call.vault), &provider, control.sites.is_connected(id), count))
}

async fn is_registered(call: &Call, fabric: &FabricRecord, id: Option<ProviderId>) -> Result<bool, ApiError> {
    let providers = call.control().providers().await?;
    Ok(providers
        .iter()
        .any(|provider| Some(provider.id) == id && provider.fabric.eq_ignore_ascii_case(&fabric.name)))
}

async fn container(
    call: &Call,
    fabric: &FabricRecord,
) -> Result<Resource<mainstay_api::arm::ContainerProperties>, ApiError> {
    let control = call.control();
    let items = control.db.items().await.map_err(ControlError::from)?;
    let count = items.iter().filter(|item| item.fabric.eq_ignore_ascii_case(&fabric.name)).count();
    let mappings = control.container_mappings().await?;
    let is_paired = mappings.iter().any(|mapping| mapping.fabric.eq_ignore_ascii_case(&fabric.name));
    Ok(convert::container(&Ids(&call.vault), fabric, count, is_paired))
}

async fn protectable_items(call: &Call, fabric: &FabricRecord, rest: &[&str]) -> Result<Response, ApiError> {
    let control = call.control();
    let items = control.db.items().await.map_err(ControlError::from)?;
    let mut found = control.protectable_items(&fabric.name).await?;
    let show = |found: &ProtectableItem| {
        let name = items.iter().find(|item| Some(item.id) == found.item).map(|item| item.name.as_str());
        convert::protectable_item(&Ids(&call.vault), fabric, found, name)
    };
    match rest {
        [] => {}
        [name] => {
            let found = found.iter().find(|found| found.vm.id.to_string().eq_ignore_ascii_case(name));
            let found = found.ok_or_else(|| ControlError::not_found("protectable item", *name))?;
            return json(&show(found));
        }
        _ => return Err(ApiError::no_such_path()),
    }
    let filter = call.filter()?;
    let take = call.query("take").map(|take| {
        take.parse::<usize>().ok().filter(|take| *take > 0).ok_or_else(|| {
            ApiError::bad_request(
                "InvalidParameter",
                format!("$take cannot be '{take}': expected is a whole number from 1"),
                "Correct it, or leave it out.",
            )
        })
    });
    let take = take.transpose()?.unwrap_or(PAGE_LENGTH).min(PROTECTABLE_ITEMS_MAX);
    let after = call.query("skiptoken").map(|token| {
        let (id, name) = token.split_once('.')?;
        Some((name.to_owned(), id.parse::<VmId>().ok()?))
    });
    let after = after.map(|after| after.ok_or_else(ApiError::invalid_page)).transpose()?;
    // An order that lasts whatever comes and goes between two pages.
    let place = |found: &ProtectableItem| (found.vm.name.clone(), found.vm.id);
    found.sort_by_key(place);
    found.retain(|found| after.as_ref().is_none_or(|after| place(found) > *after));
    let mut shown = Vec::new();
    let mut last = None;
    for found in &found {
        let item = show(found);
        let passes = filter.as_ref().map(|filter| filter.matches(&|field| protectable_field(&item, field)));
        if !passes.transpose()?.unwrap_or(true) {
            continue;
        }
        if shown.len() == take {
            let token = last.map(|(name, id)| mainstay_api::encode_segment(&format!("{id}.{name}")));
            return page(shown, token.map(|token| call.next_page(&token)));
        }
        last = Some(place(found));
        shown.push(item);
    }
    page(shown, None)
}

/// Protectable items of a page at most.
const PROTECTABLE_ITEMS_MAX: usize = 1000;

/// What protectable items can be filtered by.
fn protectable_field(item: &Resource<ProtectableItemProperties>, field: &str) -> Option<String> {
    Some(match field {
        "friendlyname" => item.properties.friendly_name.clone(),
        "protectionstatus" => item.properties.protection_status.clone(),
        _ => return None,
    })
}

async fn mappings(call: &Call, fabric: Option<&FabricRecord>) -> Result<Response, ApiError> {
    let control = call.control();
    let mut shown = Vec::new();
    for mapping in control.container_mappings().await? {
        if fabric.is_some_and(|fabric| !mapping.fabric.eq_ignore_ascii_case(&fabric.name)) {
            continue;
        }
        let source = control.fabric(&mapping.fabric).await?;
        let target = control.fabric(&mapping.recovery_fabric).await?;
        shown.push(convert::container_mapping(&Ids(&call.vault), &source, &target, &mapping));
    }
    list(shown)
}

async fn mapping(
    call: &Call,
    fabric: &FabricRecord,
    name: &str,
    rest: &[&str],
) -> Result<Response, ApiError> {
    let control = call.control();
    let id = Ids(&call.vault).container_mapping(fabric, name);
    let job = match (&call.method, rest) {
        (&Method::PUT, []) => {
            let input: Request<ContainerMappingInput> = call.body(body::CONTAINER_MAPPING)?;
            let input = input.properties;
            let target = input.target_protection_container_id;
            let recovery_fabric = if target.eq_ignore_ascii_case(AZURE) {
                None
            } else {
                Some(segment_after(&target, "replicationFabrics").ok_or_else(|| {
                    ApiError::bad_request(
                        "InvalidTargetContainer",
                        format!("'{target}' is not the id of a protection container"),
                        format!("Use a container's id, or '{AZURE}' for the only other site."),
                    )
                })?)
            };
            let policy = last_segment(&input.policy_id);
            control
                .put_container_mapping(&fabric.name, name, policy, recovery_fabric, call.who.clone())
                .await?
        }
        (&Method::GET, []) => {
            let mapping = control.container_mapping(&fabric.name, name).await?;
            let target = control.fabric(&mapping.recovery_fabric).await?;
            return json(&convert::container_mapping(&Ids(&call.vault), fabric, &target, &mapping));
        }
        (&Method::DELETE, []) | (&Method::POST, ["remove"]) => {
            if call.method == Method::POST {
                let _: Value = call.body(body::REMOVE_CONTAINER_MAPPING)?;
            }
            control.remove_container_mapping(&fabric.name, name, call.who.clone()).await?
        }
        _ => return Err(ApiError::no_such_path()),
    };
    Ok(call.accepted(job.id, &id))
}

/// Defaults of a new policy: Site Recovery's own.
const DEFAULT_POLICY: ReplicationPolicy = ReplicationPolicy {
    copy_frequency_seconds: 300,
    retention_hours: 24,
    app_consistent_frequency_hours: 0,
    bytes_per_second_max: None,
};

async fn policies(call: &Call, rest: &[&str]) -> Result<Response, ApiError> {
    let control = call.control();
    let ids = Ids(&call.vault);
    let name = call.segments.get(1).map_or("", String::as_str);
    let by = call.who.clone();
    let job = match (&call.method, rest) {
        (&Method::GET, []) => {
            return list(
                control.policies().await?.iter().map(|record| convert::policy(&ids, record)).collect(),
            );
        }
        (&Method::GET, [_]) => return json(&convert::policy(&ids, &control.policy(name).await?)),
        (&Method::PUT | &Method::PATCH, [_]) => {
            let input: Request<PolicyInput> = call.body(body::POLICY)?;
            let base = if call.method == Method::PATCH {
                control.policy(name).await?.policy
            } else {
                DEFAULT_POLICY
            };
            control.put_policy(name, with_input(base, &input.properties), by).await?
        }
        (&Method::DELETE, [_]) => control.remove_policy(name, by).await?,
        _ => return Err(ApiError::no_such_path()),
    };
    Ok(call.accepted(job.id, &ids.policy(name)))
}

/// A policy as it was answered is a base for what is asked for with it.
fn with_input(policy: ReplicationPolicy, input: &PolicyInput) -> ReplicationPolicy {
    let policy = with_settings(policy, &input.provider_specific_details);
    with_settings(policy, &input.provider_specific_input)
}

fn with_settings(policy: ReplicationPolicy, settings: &PolicySettings) -> ReplicationPolicy {
    ReplicationPolicy {
        copy_frequency_seconds: settings.replication_interval.unwrap_or(policy.copy_frequency_seconds),
        retention_hours: settings.recovery_point_history_duration.unwrap_or(policy.retention_hours),
        app_consistent_frequency_hours: settings
            .application_consistent_snapshot_frequency_in_hours
            .unwrap_or(policy.app_consistent_frequency_hours),
        ..policy
    }
}
