//! Replicated items: `replicationFabrics/{F}/replicationProtectionContainers/{C}/replicationProtectedItems/{I}/…`.

use std::time::Duration;

use axum::response::Response;
use hyper::Method;
use mainstay_api::arm::{
    ApplyRecoveryPointInput, CommentsInput, EnableDetails, EnableProtectionInput, FailoverDetails,
    FailoverInput, HYPERV_REPLICA_AZURE, HYPERV_REPLICA_AZURE_FAILBACK, ItemProperties, Request, Resource,
    UpdateItemInput,
};
use mainstay_control::{
    ControlError,
    app::{EnableRequest, FabricRecord, MEMORY_BYTES_MIN, PolicyRecord},
    db::{ItemRecord, JobRecord, TargetRecord, item_place},
    workflows::{FailbackParams, FailoverParams, PointChoice, TestFailoverParams},
};
use mainstay_model::{PointId, ProviderId, projection};
use mainstay_provider::{MacPolicy, NicPlan, VirtualMachine};
use serde_json::Value;

use super::{
    Call, PAGE_LENGTH, body,
    convert::{self, Ids, ItemView, last_segment},
    error::ApiError,
    item_extras, json, list, page,
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
    let items = call.control().db.items().await.map_err(ControlError::from)?;
    let begin = place.as_ref().map_or(0, |place| items.partition_point(|item| item_place(item) <= *place));
    let mut shown = Vec::new();
    for item in &items[begin..] {
        let is_here = fabric.is_none_or(|fabric| fabric.name.eq_ignore_ascii_case(&item.fabric));
        let passes = filter.as_ref().map(|filter| filter.matches(&|field| item_field(item, field)));
        if !is_here || !passes.transpose()?.unwrap_or(true) {
            continue;
        }
        if shown.len() == PAGE_LENGTH {
            let next = place.map(|(fabric, name)| call.next_page(&format!("{fabric}%2F{name}")));
            return page(shown, next);
        }
        place = Some(item_place(item));
        shown.push(show_with(call, item, &around).await?);
    }
    page(shown, None)
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
    let id = Ids(&call.vault).item(fabric, &item.name);
    let job = match (&call.method, rest) {
        (&Method::GET, []) => return json(&show(call, item).await?),
        (&Method::PATCH, []) => {
            let update: UpdateItemInput = call.properties(body::UPDATE_ITEM)?;
            control.update_item_target(item, updated_target(item, update)?, by).await?
        }
        (&Method::DELETE, []) => control.disable_protection(item, true, by).await?,
        (&Method::POST, ["remove"]) => {
            let _: Value = call.body(body::DISABLE)?;
            control.disable_protection(item, false, by).await?
        }
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
            let input: FailoverInput = call.properties(body::TEST_FAILOVER)?;
            expect_direction(&input, PRIMARY_TO_RECOVERY)?;
            let params = TestFailoverParams {
                point: point_choice(&input.provider_specific_details, PointChoice::LatestProcessed)?,
                network: test_network(&input)?,
            };
            control.test_failover(item, params, by).await?
        }
        (&Method::POST, ["testfailovercleanup"]) => {
            let input: CommentsInput = call.properties(body::COMMENTS)?;
            control.test_failover_cleanup(item, &input.comments.unwrap_or_default(), by).await?
        }
        (&Method::POST, ["unplannedfailover"]) => {
            let input: FailoverInput = call.properties(body::UNPLANNED_FAILOVER)?;
            expect_direction(&input, PRIMARY_TO_RECOVERY)?;
            control.unplanned_failover(item, failover_params(&input, call.api.shutdown_timeout)?, by).await?
        }
        (&Method::POST, ["plannedfailover"]) => {
            let input: FailoverInput = call.properties(body::PLANNED_FAILOVER)?;
            let timeout = call.api.shutdown_timeout;
            if is(input.failover_direction.as_deref(), RECOVERY_TO_PRIMARY) {
                control.failback(item, failback_params(&input, timeout)?, by).await?
            } else {
                expect_type(&input, HYPERV_REPLICA_AZURE)?;
                control.planned_failover(item, failover_params(&input, timeout)?, by).await?
            }
        }
        (&Method::POST, ["failovercommit"]) => control.commit(item, by).await?,
        (&Method::POST, ["applyrecoverypoint"]) => {
            let input: ApplyRecoveryPointInput = call.properties(body::APPLY_RECOVERY_POINT)?;
            let point = parse_point(&input.recovery_point_id)?;
            control.change_recovery_point(item, point, by).await?
        }
        (&Method::POST, ["reprotect"]) => {
            let input: FailoverInput = call.properties(body::REPROTECT)?;
            expect_direction(&input, PRIMARY_TO_RECOVERY)?;
            control.reverse_replicate(item, by).await?
        }
        (&Method::POST, ["repairreplication"]) => control.resynchronize(item, by).await?,
        (&Method::POST, ["failovercancel"]) => control.cancel_failover(item).await?,
        (&Method::POST, ["resolvehealtherrors"]) => return item_extras::resolve(call, item, &id).await,
        (&Method::GET, ["targetcomputesizes"]) => return item_extras::sizes(call, item, &id).await,
        _ => return Err(ApiError::no_such_path()),
    };
    Ok(call.accepted(job.id, &id))
}

async fn enable(call: &Call, fabric: &FabricRecord, name: &str) -> Result<Response, ApiError> {
    let input: Request<EnableProtectionInput> = call.body(body::ENABLE)?;
    let input = input.properties;
    match call.control().item_named(&fabric.name, name).await {
        Ok(item) => return item_extras::put_again(call, fabric, &item, input).await,
        Err(ControlError::NotFound { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let vm = last_segment(&input.protectable_item_id).parse().map_err(|_| {
        ApiError::bad_request(
            "InvalidProtectableItem",
            format!("'{}' is not the id of a protectable item", input.protectable_item_id),
            "List the protectable items and use an id from there.",
        )
    })?;
    let control = call.control();
    let details = &input.provider_specific_details;
    let mut excluded_disks = Vec::new();
    let found = control.protectable_items(&fabric.name).await?;
    if let Some(found) = found.iter().find(|found| found.vm.id == vm) {
        expect_vm(details, &found.vm)?;
        if let Some(included) = &details.disks_to_include {
            let missing = found.vm.disks.iter().filter(|disk| !included.contains(&disk.key));
            excluded_disks = missing.map(|disk| disk.key.clone()).collect();
        }
    }
    let size = details.target_vm_size.as_deref().unwrap_or_default();
    let (vcpus, memory_bytes) = parse_size(size)?;
    let details = input.provider_specific_details;
    let request = EnableRequest {
        name: name.to_owned(),
        fabric: fabric.name.clone(),
        vm,
        policy: last_segment(&input.policy_id).to_owned(),
        excluded_disks,
        target: TargetRecord {
            name: details.target_azure_vm_name.unwrap_or_default(),
            vcpus,
            memory_bytes,
            network: network_name(details.target_azure_network_id),
            ..TargetRecord::default()
        },
    };
    let job = control.enable_protection(request, call.who.clone()).await?;
    Ok(call.accepted(job.id, &Ids(&call.vault).item(fabric, name)))
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

    /// Of a single item.
    async fn of(call: &Call, item: &ItemRecord) -> Result<Self, ApiError> {
        let control = call.control();
        let fabrics = vec![control.fabric(&item.fabric).await?, control.fabric(&item.recovery_fabric).await?];
        Ok(Self { fabrics, policies: vec![control.policy(&item.policy).await?] })
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
pub(super) async fn show(call: &Call, item: &ItemRecord) -> Result<Resource<ItemProperties>, ApiError> {
    show_with(call, item, &Around::of(call, item).await?).await
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
    Ok(convert::item(&Ids(&call.vault), &view))
}

const PRIMARY_TO_RECOVERY: &str = "PrimaryToRecovery";
const RECOVERY_TO_PRIMARY: &str = "RecoveryToPrimary";

/// Whether a field has a word. Words are what the operation's table says; case does not count.
fn is(field: Option<&str>, word: &str) -> bool {
    field.is_some_and(|found| found.eq_ignore_ascii_case(word))
}

/// A request of the other direction's type asks for something else than its direction says.
pub(super) fn expect_type(input: &FailoverInput, wanted: &str) -> Result<(), ApiError> {
    let found = &input.provider_specific_details.instance_type;
    if found.is_empty() || found.eq_ignore_ascii_case(wanted) {
        return Ok(());
    }
    Err(ApiError::bad_request(
        "InvalidParameter",
        format!(
            "properties.providerSpecificDetails.instanceType cannot be \"{found}\" in this direction: expected is {wanted}"
        ),
        "Correct the direction or the type and try again; nothing was changed.",
    ))
}

/// The network that a test failover asks for. `NoNetworkAttachAsInput` means none, whatever the item's settings say.
pub(super) fn test_network(input: &FailoverInput) -> Result<Option<String>, ApiError> {
    let network = input.network_id.as_deref().filter(|network| !network.is_empty());
    if !is(input.network_type.as_deref(), "NoNetworkAttachAsInput") {
        return Ok(network.map(|network| last_segment(network).to_owned()));
    }
    match network {
        None => Ok(Some(String::new())),
        Some(network) => Err(ApiError::bad_request(
            "InvalidParameter",
            format!(
                "properties.networkId cannot be \"{network}\" when properties.networkType is NoNetworkAttachAsInput"
            ),
            "Leave one of them out and try again; nothing was changed.",
        )),
    }
}

pub(super) fn expect_direction(input: &FailoverInput, wanted: &str) -> Result<(), ApiError> {
    match input.failover_direction.as_deref() {
        None | Some("") => Ok(()),
        direction if is(direction, wanted) => Ok(()),
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
        shutdown_source: !is(input.source_site_operations.as_deref(), "NotRequired"),
        shutdown_timeout_ms: milliseconds(shutdown_timeout),
    })
}

pub(super) fn failback_params(
    input: &FailoverInput,
    shutdown_timeout: Duration,
) -> Result<FailbackParams, ApiError> {
    let details = &input.provider_specific_details;
    expect_type(input, HYPERV_REPLICA_AZURE_FAILBACK)?;
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
        synchronize_before: !is(details.data_sync_option.as_deref(), "ForSynchronization"),
        create_vm: is(details.recovery_vm_creation_option.as_deref(), "CreateVmIfNotFound"),
        host,
        shutdown_timeout_ms: milliseconds(shutdown_timeout),
    })
}

/// The name of a network that an id ends with; an empty text names none.
fn network_name(id: Option<String>) -> Option<String> {
    id.map(|id| last_segment(&id).to_owned()).filter(|name| !name.is_empty())
}

/// What a request tells of the VM a second time must be true of it.
fn expect_vm(details: &EnableDetails, vm: &VirtualMachine) -> Result<(), ApiError> {
    let told = details.hv_host_vm_id.as_deref().unwrap_or_default();
    if !told.is_empty() && !told.eq_ignore_ascii_case(&vm.id.to_string()) {
        return Err(ApiError::bad_request(
            "InvalidParameter",
            format!(
                "properties.providerSpecificDetails.hvHostVmId cannot be \"{told}\": the protectable item is {}",
                vm.id
            ),
            "Leave it out, or name the VM that the protectable item is.",
        ));
    }
    let told = details.vhd_id.iter().filter(|key| !key.is_empty());
    let mut keys = told.chain(details.disks_to_include.iter().flatten());
    match keys.find(|key| !vm.disks.iter().any(|disk| disk.key == **key)) {
        None => Ok(()),
        Some(unknown) => {
            let known: Vec<_> = vm.disks.iter().map(|disk| disk.key.as_str()).collect();
            Err(ApiError::bad_request(
                "DiskNotFound",
                format!("'{}' has no disk '{unknown}'", vm.name),
                format!("Use the disk ids of the protectable item: {}.", known.join(", ")),
            ))
        }
    }
}

/// The item's target with what the request changes. An empty text takes a setting back.
pub(super) fn updated_target(item: &ItemRecord, update: UpdateItemInput) -> Result<TargetRecord, ApiError> {
    let mut target = item.target.clone();
    if let Some(name) = update.recovery_azure_vm_name {
        target.name = name;
    }
    if let Some(size) = update.recovery_azure_vm_size {
        (target.vcpus, target.memory_bytes) = parse_size(&size)?;
    }
    if let Some(id) = update.selected_recovery_azure_network_id {
        target.network = network_name(Some(id));
    }
    if let Some(id) = update.selected_tfo_azure_network_id {
        target.test_network = network_name(Some(id));
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
            plan.network = network_name(Some(id));
        }
        if let Some(address) =
            nic.ip_configs.first().and_then(|config| config.recovery_static_ip_address.clone())
        {
            plan.address = Some(address).filter(|address| !address.is_empty());
        }
        for (word, policy) in [("Keep", MacPolicy::Keep), ("Generate", MacPolicy::Generate)] {
            if is(nic.mac_policy.as_deref(), word) {
                plan.mac_policy = policy;
            }
        }
        target.nics.insert(position.unwrap_or(target.nics.len()), plan);
    }
    Ok(target)
}

/// More processors than any hypervisor gives a VM.
const VCPUS_MAX: u32 = 4096;
/// More memory than any host has: 64 TiB.
const MEMORY_BYTES_MAX: u64 = 64 << 40;

/// Reads `VCPUS` or `VCPUSxMEMORY_MIB`; an empty text means as at home.
pub(super) fn parse_size(size: &str) -> Result<(Option<u32>, Option<u64>), ApiError> {
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
    let vcpus: u32 = vcpus.parse().map_err(|_| bad())?;
    let is_possible = (1..=VCPUS_MAX).contains(&vcpus)
        && memory.is_none_or(|bytes| (MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&bytes));
    if is_possible { Ok((Some(vcpus), memory)) } else { Err(bad()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_items_test_network_counts_unless_the_request_says_something_else() {
        let read = |kind: Option<&str>, network: Option<&str>| {
            let input = FailoverInput {
                network_type: kind.map(str::to_owned),
                network_id: network.map(str::to_owned),
                ..FailoverInput::default()
            };
            test_network(&input).map_err(|error| error.message().to_owned())
        };
        // None = the item's setting; empty = no network.
        for (kind, network, meant) in [
            (None, None, None),
            (None, Some(""), None),
            (Some("VmNetworkAsInput"), None, None),
            (None, Some("/x/replicationNetworks/lan"), Some("lan")),
            (Some("VmNetworkAsInput"), Some("lan"), Some("lan")),
            (Some("NoNetworkAttachAsInput"), None, Some("")),
        ] {
            assert_eq!(read(kind, network), Ok(meant.map(str::to_owned)), "{kind:?} {network:?}");
        }
        assert!(
            read(Some("NoNetworkAttachAsInput"), Some("lan")).unwrap_err().contains("properties.networkId")
        );
    }
}
