//! Replicated items: `replicationFabrics/{F}/replicationProtectionContainers/{C}/replicationProtectedItems/{I}/…`.

use std::time::Duration;

use axum::response::Response;
use hyper::Method;
use mainstay_api::arm::{
    ApplyRecoveryPointInput, CommentsInput, EnableProtectionInput, FailoverDetails, FailoverInput,
    HYPERV_REPLICA_AZURE, ItemProperties, Request, Resource, UpdateItemInput,
};
use mainstay_control::{
    ControlError,
    app::{EnableRequest, FabricRecord, PolicyRecord},
    db::{ItemRecord, JobRecord, TargetRecord},
    workflows::{FailbackParams, FailoverParams, PointChoice, TestFailoverParams},
};
use mainstay_model::{PointId, ProviderId, projection};
use mainstay_provider::{MacPolicy, NicPlan};

use super::{
    Call, PAGE_LENGTH,
    convert::{self, Ids, ItemView, last_segment},
    error::ApiError,
    json, list, page,
};

pub(super) async fn dispatch(call: &Call) -> Result<Response, ApiError> {
    let path = call.path();
    let path: Vec<&str> = path.iter().skip(4).map(String::as_str).collect();
    let fabric = call.control().fabric(&call.segments[1]).await?;
    if !fabric.container().eq_ignore_ascii_case(&call.segments[3]) {
        return Err(ControlError::not_found("protection container", call.segments[3].as_str()).into());
    }
    let name = call.segments.get(5).map_or("", String::as_str);
    match (&call.method, path.as_slice()) {
        (&Method::GET, [_]) => show_page(call, Some(&fabric)).await,
        (&Method::PUT, [_, _]) => enable(call, &fabric, name).await,
        _ => {
            let item = call.control().item_named(&fabric.name, name).await?;
            on_item(call, &fabric, &item, &path[2..]).await
        }
    }
}

/// All items of the vault.
pub(super) async fn list_all(call: &Call) -> Result<Response, ApiError> {
    if call.method != Method::GET || call.segments.len() != 1 {
        return Err(ApiError::no_such_path());
    }
    show_page(call, None).await
}

/// A page of items: those of a fabric, or all, that pass the filter, after the one that the page's token names.
async fn show_page(call: &Call, fabric: Option<&FabricRecord>) -> Result<Response, ApiError> {
    let filter = call.filter()?;
    // Where the page before ended: also found again when that item is gone.
    let mut place = match call.query("skiptoken").map(|token| token.split_once('/')) {
        None => None,
        Some(Some((fabric, name))) => Some((fabric.to_owned(), name.to_owned())),
        Some(None) => return Err(ApiError::invalid_page()),
    };
    let around = Around::read(call).await?;
    let mut shown = Vec::new();
    loop {
        let items =
            call.control().db.items_after(place.as_ref(), PAGE_LENGTH).await.map_err(ControlError::from)?;
        if items.is_empty() {
            return page(shown, None);
        }
        for item in &items {
            if shown.len() == PAGE_LENGTH {
                let next = place.map(|(fabric, name)| call.next_page(&format!("{fabric}%2F{name}")));
                return page(shown, next);
            }
            place = Some((item.fabric.to_lowercase(), item.name.to_lowercase()));
            let is_here = fabric.is_none_or(|fabric| fabric.name.eq_ignore_ascii_case(&item.fabric));
            let passes = filter.as_ref().map(|filter| filter.matches(&|field| item_field(item, field)));
            if is_here && passes.transpose()?.unwrap_or(true) {
                shown.push(show_with(call, item, &around).await?);
            }
        }
    }
}

/// What items can be filtered by: the names of the service's query parameters.
fn item_field(item: &ItemRecord, field: &str) -> Option<String> {
    Some(match field {
        "sourcefabricname" => item.fabric.clone(),
        "recoveryfabricname" => item.recovery_fabric.clone(),
        "instancetype" => HYPERV_REPLICA_AZURE.to_owned(),
        "friendlyname" => item.vm_name.clone(),
        "policyname" => item.policy.clone(),
        "protectionstate" => projection::protection_state(&item.state).0.to_owned(),
        "activelocation" => projection::active_location(item.state.phase.active_location()).to_owned(),
        _ => return None,
    })
}

async fn on_item(
    call: &Call,
    fabric: &FabricRecord,
    item: &ItemRecord,
    rest: &[&str],
) -> Result<Response, ApiError> {
    let control = call.control();
    let by = call.who.clone();
    let id = Ids(&call.api.vault).item(fabric, &item.name);
    let job = match (&call.method, rest) {
        (&Method::GET, []) => return json(&show(call, item).await?),
        (&Method::PATCH, []) => {
            let update: UpdateItemInput = call.properties()?;
            control.update_item_target(item, updated_target(item, update)?, by).await?
        }
        (&Method::DELETE, []) => control.disable_protection(item, true, by).await?,
        (&Method::POST, ["remove"]) => control.disable_protection(item, false, by).await?,
        (&Method::GET, ["recoverypoints"]) => {
            let points = control.recovery_points(item).await?;
            return list(points.iter().rev().map(|point| convert::recovery_point(&id, point)).collect());
        }
        (&Method::GET, ["recoverypoints", name]) => {
            let points = control.recovery_points(item).await?;
            let point = points.iter().find(|point| point.id.to_string() == *name);
            let point = point.ok_or_else(|| ControlError::not_found("recovery point", *name))?;
            return json(&convert::recovery_point(&id, point));
        }
        (&Method::POST, ["testfailover"]) => {
            let input: FailoverInput = call.properties()?;
            let network = input.network_id.filter(|network| !network.is_empty());
            let params = TestFailoverParams {
                point: point_choice(&input.provider_specific_details, PointChoice::LatestProcessed)?,
                network: network.map(|network| last_segment(&network).to_owned()),
            };
            control.test_failover(item, params, by).await?
        }
        (&Method::POST, ["testfailovercleanup"]) => {
            let input: CommentsInput = call.properties()?;
            control.test_failover_cleanup(item, &input.comments.unwrap_or_default(), by).await?
        }
        (&Method::POST, ["unplannedfailover"]) => {
            let input: FailoverInput = call.properties()?;
            expect_direction(&input, "PrimaryToRecovery")?;
            control.unplanned_failover(item, failover_params(&input, call.api.shutdown_timeout)?, by).await?
        }
        (&Method::POST, ["plannedfailover"]) => {
            let input: FailoverInput = call.properties()?;
            match input.failover_direction.as_deref() {
                Some("RecoveryToPrimary") => {
                    control.failback(item, failback_params(&input, call.api.shutdown_timeout)?, by).await?
                }
                _ => {
                    expect_direction(&input, "PrimaryToRecovery")?;
                    control
                        .planned_failover(item, failover_params(&input, call.api.shutdown_timeout)?, by)
                        .await?
                }
            }
        }
        (&Method::POST, ["failovercommit"]) => control.commit(item, by).await?,
        (&Method::POST, ["applyrecoverypoint"]) => {
            let input: ApplyRecoveryPointInput = call.properties()?;
            let point = parse_point(&input.recovery_point_id)?;
            control.change_recovery_point(item, point, by).await?
        }
        (&Method::POST, ["reprotect"]) => {
            let input: FailoverInput = call.properties()?;
            expect_direction(&input, "PrimaryToRecovery")?;
            control.reverse_replicate(item, by).await?
        }
        (&Method::POST, ["repairreplication"]) => control.resynchronize(item, by).await?,
        _ => return Err(ApiError::no_such_path()),
    };
    Ok(call.accepted(job.id, &id))
}

async fn enable(call: &Call, fabric: &FabricRecord, name: &str) -> Result<Response, ApiError> {
    let input: Request<EnableProtectionInput> = call.body()?;
    let input = input.properties;
    let vm = last_segment(&input.protectable_item_id).parse().map_err(|_| {
        ApiError::bad_request(
            "InvalidProtectableItem",
            format!("'{}' is not the id of a protectable item", input.protectable_item_id),
            "List the protectable items and use an id from there.",
        )
    })?;
    let control = call.control();
    let mut excluded_disks = Vec::new();
    if let Some(included) = &input.provider_specific_details.disks_to_include {
        let found = control.protectable_items(&fabric.name).await?;
        if let Some(found) = found.iter().find(|found| found.vm.id == vm) {
            if let Some(unknown) =
                included.iter().find(|key| !found.vm.disks.iter().any(|disk| disk.key == **key))
            {
                return Err(ApiError::bad_request(
                    "DiskNotFound",
                    format!("'{}' has no disk '{unknown}'", found.vm.name),
                    "Use the disk ids of the protectable item.",
                ));
            }
            let missing = found.vm.disks.iter().filter(|disk| !included.contains(&disk.key));
            excluded_disks = missing.map(|disk| disk.key.clone()).collect();
        }
    }
    let details = input.provider_specific_details;
    let request = EnableRequest {
        name: name.to_owned(),
        fabric: fabric.name.clone(),
        vm,
        policy: last_segment(&input.policy_id).to_owned(),
        excluded_disks,
        target: TargetRecord {
            name: details.target_azure_vm_name.unwrap_or_default(),
            network: details.target_azure_network_id.map(|network| last_segment(&network).to_owned()),
            ..TargetRecord::default()
        },
    };
    let job = control.enable_protection(request, call.who.clone()).await?;
    Ok(call.accepted(job.id, &Ids(&call.api.vault).item(fabric, name)))
}

/// What is read once for a whole page of items.
struct Around {
    fabrics: Vec<FabricRecord>,
    policies: Vec<PolicyRecord>,
}

impl Around {
    async fn read(call: &Call) -> Result<Self, ApiError> {
        Ok(Self { fabrics: call.control().fabrics().await?, policies: call.control().policies().await? })
    }

    fn fabric(&self, name: &str) -> Result<&FabricRecord, ControlError> {
        let found = self.fabrics.iter().find(|fabric| fabric.name.eq_ignore_ascii_case(name));
        found.ok_or_else(|| ControlError::not_found("fabric", name))
    }

    fn policy(&self, name: &str) -> Result<&PolicyRecord, ControlError> {
        let found = self.policies.iter().find(|policy| policy.name.eq_ignore_ascii_case(name));
        found.ok_or_else(|| ControlError::not_found("policy", name))
    }
}

/// The resource of an item, as of now.
async fn show(call: &Call, item: &ItemRecord) -> Result<Resource<ItemProperties>, ApiError> {
    show_with(call, item, &Around::read(call).await?).await
}

async fn show_with(
    call: &Call,
    item: &ItemRecord,
    around: &Around,
) -> Result<Resource<ItemProperties>, ApiError> {
    let control = call.control();
    let policy = around.policy(&item.policy)?;
    let (health, errors, rpo_seconds) = control.item_health_under(item, &policy.policy);
    let job: Option<JobRecord> = match item.state.running {
        Some(running) => Some(control.job(running.job).await?),
        None => None,
    };
    let initial_percent = match control.cycles.progress(item.id) {
        Some(progress) if item.replication.last_point.is_none() && progress.bytes_total > 0 => {
            u32::try_from(progress.bytes_done.saturating_mul(100) / progress.bytes_total).unwrap_or(100)
        }
        _ => item.replication.initial_percent,
    };
    let view = ItemView {
        record: item,
        fabric: around.fabric(&item.fabric)?,
        recovery_fabric: around.fabric(&item.recovery_fabric)?,
        health,
        errors: &errors,
        rpo_seconds,
        initial_percent,
        job: job.as_ref(),
        now_ms: control.clock.now_ms(),
    };
    Ok(convert::item(&Ids(&call.api.vault), &view))
}

pub(super) fn expect_direction(input: &FailoverInput, wanted: &str) -> Result<(), ApiError> {
    match input.failover_direction.as_deref() {
        None => Ok(()),
        Some(direction) if direction.eq_ignore_ascii_case(wanted) => Ok(()),
        Some(_) => Err(ApiError::bad_request(
            "InvalidFailoverDirection",
            "Invalid failover direction was specified. Verify input and try operation again.",
            format!("The direction here is {wanted}."),
        )),
    }
}

pub(super) fn point_choice(details: &FailoverDetails, default: PointChoice) -> Result<PointChoice, ApiError> {
    match details.recovery_point_id.as_deref() {
        None | Some("") => Ok(default),
        Some(id) => parse_point(id),
    }
}

fn parse_point(id: &str) -> Result<PointChoice, ApiError> {
    match last_segment(id).to_lowercase().as_str() {
        "latest" => Ok(PointChoice::Latest),
        "latestprocessed" => Ok(PointChoice::LatestProcessed),
        "latestapplicationconsistent" => Ok(PointChoice::LatestAppConsistent),
        name => name.parse().map(|id| PointChoice::Point(PointId(id))).map_err(|_| {
            ApiError::bad_request(
                "InvalidRecoveryPoint",
                format!("'{id}' is not the id of a recovery point"),
                "Use an id from the item's recovery points, or Latest, LatestProcessed, LatestApplicationConsistent.",
            )
        }),
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn failover_params(
    input: &FailoverInput,
    shutdown_timeout: Duration,
) -> Result<FailoverParams, ApiError> {
    Ok(FailoverParams {
        point: point_choice(&input.provider_specific_details, PointChoice::Latest)?,
        shutdown_source: input
            .source_site_operations
            .as_deref()
            .is_none_or(|word| !word.eq_ignore_ascii_case("NotRequired")),
        shutdown_timeout_ms: milliseconds(shutdown_timeout),
    })
}

pub(super) fn failback_params(
    input: &FailoverInput,
    shutdown_timeout: Duration,
) -> Result<FailbackParams, ApiError> {
    let details = &input.provider_specific_details;
    let synchronize_before = match details.data_sync_option.as_deref() {
        None | Some("ForDownTime") => true,
        Some("ForSynchronization") => false,
        Some(other) => {
            return Err(ApiError::bad_request(
                "InvalidDataSyncOption",
                format!("'{other}' is not a data synchronisation option"),
                "Use ForDownTime or ForSynchronization.",
            ));
        }
    };
    let host = match details.provider_id_for_alternate_recovery.as_deref() {
        None | Some("") => None,
        Some(id) => Some(last_segment(id).parse::<ProviderId>().map_err(|_| {
            ApiError::bad_request(
                "InvalidProvider",
                format!("'{id}' is not the id of a registered host"),
                "List the hosts.",
            )
        })?),
    };
    Ok(FailbackParams {
        synchronize_before,
        create_vm: details.recovery_vm_creation_option.as_deref() == Some("CreateVmIfNotFound"),
        host,
        shutdown_timeout_ms: milliseconds(shutdown_timeout),
    })
}

/// The item's target with what the request changes. An empty text takes a setting back.
fn updated_target(item: &ItemRecord, update: UpdateItemInput) -> Result<TargetRecord, ApiError> {
    let mut target = item.target.clone();
    let network = |id: String| Some(last_segment(&id).to_owned()).filter(|name| !name.is_empty());
    if let Some(name) = update.recovery_azure_vm_name {
        target.name = name;
    }
    if let Some(size) = update.recovery_azure_vm_size {
        (target.vcpus, target.memory_bytes) = parse_size(&size)?;
    }
    if let Some(id) = update.selected_recovery_azure_network_id {
        target.network = network(id);
    }
    if let Some(id) = update.selected_tfo_azure_network_id {
        target.test_network = network(id);
    }
    for nic in update.vm_nics.unwrap_or_default() {
        let mac = nic.nic_id.to_lowercase();
        let position = target.nics.iter().position(|plan| plan.mac == mac);
        let mut plan = match position {
            Some(position) => target.nics.remove(position),
            // Refused by the control plane, with the adapters that there are.
            None => NicPlan { mac: mac.clone(), network: None, mac_policy: MacPolicy::Keep, address: None },
        };
        if let Some(id) = nic.recovery_vm_network_id {
            plan.network = network(id);
        }
        if let Some(address) =
            nic.ip_configs.first().and_then(|config| config.recovery_static_ip_address.clone())
        {
            plan.address = Some(address).filter(|address| !address.is_empty());
        }
        match nic.mac_policy.as_deref() {
            None => {}
            Some("Keep") => plan.mac_policy = MacPolicy::Keep,
            Some("Generate") => plan.mac_policy = MacPolicy::Generate,
            Some(other) => {
                return Err(ApiError::bad_request(
                    "InvalidMacPolicy",
                    format!("'{other}' is not a MAC address policy"),
                    "Use Keep or Generate.",
                ));
            }
        }
        target.nics.insert(position.unwrap_or(target.nics.len()), plan);
    }
    Ok(target)
}

/// Reads `VCPUS` or `VCPUSxMEMORY_MIB`; an empty text means as at home.
fn parse_size(size: &str) -> Result<(Option<u32>, Option<u64>), ApiError> {
    let bad = || {
        ApiError::bad_request(
            "InvalidSize",
            format!("'{size}' is not a size"),
            "Write it as VCPUSxMEMORY_MIB, for example 2x1024.",
        )
    };
    if size.is_empty() {
        return Ok((None, None));
    }
    let (vcpus, memory) = match size.split_once('x') {
        Some((vcpus, memory)) => (vcpus, Some(memory.parse::<u64>().map_err(|_| bad())?)),
        None => (size, None),
    };
    let memory = memory.map(|mebibytes| mebibytes.checked_mul(1 << 20).ok_or_else(bad)).transpose()?;
    Ok((Some(vcpus.parse().map_err(|_| bad())?), memory))
}
