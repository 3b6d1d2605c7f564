//! Replicated items: target sizes, health errors out of sight, and a PUT on an item that exists.

use axum::response::Response;
use mainstay_api::arm::{
    EnableDetails, EnableProtectionInput, ItemNic, ItemProperties, Request, ResolveHealthInput, Resource,
    TargetComputeSizeProperties, UpdateItemInput,
};
use mainstay_control::{ControlError, app::FabricRecord, db::ItemRecord};
use serde::Deserialize;

use super::{
    Call, body,
    convert::{self, Ids, last_segment},
    error::ApiError,
    items, list,
};

/// Processors of a VM at most in what is told, whatever the host has; more can be asked for all the same.
const VCPUS_MAX: u32 = 256;
/// Disks of a VM besides the first: a virtio bus has room for more, nobody's VM has.
const DATA_DISKS_MAX: i64 = 63;
/// Adapters of a VM.
const NICS_MAX: i64 = 8;
const GIBIBYTE: u64 = 1 << 30;

/// Sizes that fit the recovery host.
pub(super) async fn sizes(call: &Call, item: &ItemRecord, id: &str) -> Result<Response, ApiError> {
    let host = call.control().provider(item.recovery_provider).await?.discovery.map(|found| found.host);
    let (processors, memory_bytes) = host.map_or((0, 0), |host| (host.processors, host.memory_bytes));
    let shown = size_table(processors, memory_bytes).into_iter().map(|(vcpus, memory_bytes)| {
        let name = format!("{vcpus}x{}", memory_bytes >> 20);
        convert::resource(
            format!("{id}/targetComputeSizes/{name}"),
            "replicationFabrics/replicationProtectionContainers/replicationProtectedItems/targetComputeSizes",
            TargetComputeSizeProperties {
                friendly_name: format!("{vcpus} processors, {} MiB", memory_bytes >> 20),
                name,
                cpu_cores_count: i64::from(vcpus),
                vcpus_available: i64::from(vcpus),
                memory_in_gb: memory_bytes as f64 / GIBIBYTE as f64,
                max_data_disk_count: DATA_DISKS_MAX,
                max_nics_count: NICS_MAX,
                errors: Vec::new(),
                high_iops_supported: "Supported".to_owned(),
                hyper_v_generations: vec!["V1".to_owned(), "V2".to_owned()],
            },
        )
    });
    list(shown.collect())
}

/// Powers of two of processors, each with half a GiB to eight GiB for a processor: what people choose. A host that is not known
/// has none.
fn size_table(processors: u32, memory_bytes: u64) -> Vec<(u32, u64)> {
    let vcpus = std::iter::successors(Some(1_u32), |vcpus| vcpus.checked_mul(2))
        .take_while(|vcpus| *vcpus <= processors.min(VCPUS_MAX));
    let sizes = vcpus.flat_map(|vcpus| {
        let halves = [1, 2, 4, 8, 16];
        halves.map(|halves| (vcpus, u64::from(vcpus) * halves * (GIBIBYTE / 2)))
    });
    sizes.filter(|(_, memory)| *memory <= memory_bytes).collect()
}

/// `resolveHealthErrors`.
pub(super) async fn resolve(call: &Call, item: &ItemRecord, id: &str) -> Result<Response, ApiError> {
    let input: ResolveHealthInput = call.properties(body::RESOLVE_HEALTH)?;
    if input.health_errors.is_empty() {
        return Err(ApiError::bad_request(
            "InvalidParameter",
            "properties.healthErrors cannot be []: expected is at least one health error",
            "Name errors of the item's healthErrors by their errorId.",
        ));
    }
    let codes: Vec<_> = input.health_errors.into_iter().map(|error| error.health_error_id).collect();
    let job = call.control().resolve_health_errors(item, &codes, call.who.clone()).await?;
    Ok(call.accepted(job.id, id))
}

/// What a client may have changed in an item as it was answered.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Echo {
    #[serde(alias = "recoveryAzureVMName")]
    recovery_azure_vm_name: Option<String>,
    #[serde(rename = "recoveryAzureVMSize")]
    recovery_azure_vm_size: Option<String>,
    selected_recovery_azure_network_id: Option<String>,
    vm_nics: Option<Vec<ItemNic>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct EchoProperties {
    provider_specific_details: Option<Echo>,
}

/// A PUT on an item that exists changes what can be changed of it: with the fields of a creation, or with those of the item as
/// it is answered. Fields that are as they were answered are no wish.
pub(super) async fn put_again(
    call: &Call,
    fabric: &FabricRecord,
    item: &ItemRecord,
    input: EnableProtectionInput,
) -> Result<Response, ApiError> {
    let is_same = |id: &str, name: &str| last_segment(id).eq_ignore_ascii_case(name);
    if !is_same(&input.protectable_item_id, &item.vm.to_string()) {
        return Err(ControlError::Conflict(format!(
            "the replicated item '{}' protects another VM: {}",
            item.name, item.vm
        ))
        .into());
    }
    if !is_same(&input.policy_id, &item.policy) {
        return Err(ControlError::Conflict(format!(
            "'{}' is replicated under policy '{}', which stays with it until replication is disabled",
            item.name, item.policy
        ))
        .into());
    }
    let echo: Request<EchoProperties> = call.body(body::PUT_ITEM_AGAIN)?;
    let echo = echo.properties.provider_specific_details.unwrap_or_default();
    let shown = items::show(call, item).await?;
    let update = wishes(input.provider_specific_details, echo, &shown);
    let target = items::updated_target(item, update)?;
    let job = call.control().update_item_target(item, target, call.who.clone()).await?;
    Ok(call.accepted(job.id, &Ids(&call.vault).item(fabric, &item.name)))
}

fn wishes(created: EnableDetails, echo: Echo, shown: &Resource<ItemProperties>) -> UpdateItemInput {
    let shown = &shown.properties.provider_specific_details;
    let changed =
        |wish: Option<String>, shown: Option<&str>| wish.filter(|wish| Some(wish.as_str()) != shown);
    let nics = echo.vm_nics.unwrap_or_default().into_iter().filter_map(|mut nic| {
        let known = shown.vm_nics.iter().find(|known| known.nic_id.eq_ignore_ascii_case(&nic.nic_id));
        if let Some(known) = known {
            // The item's network is shown with each adapter; the adapter has none of its own by that.
            nic.recovery_vm_network_id =
                changed(nic.recovery_vm_network_id, known.recovery_vm_network_id.as_deref());
            if nic.ip_configs == known.ip_configs {
                nic.ip_configs = Vec::new();
            }
        }
        let is_wish = nic.recovery_vm_network_id.is_some()
            || !nic.ip_configs.is_empty()
            || nic.mac_policy.is_some()
            || known.is_none();
        is_wish.then_some(nic)
    });
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    UpdateItemInput {
        recovery_azure_vm_name: changed(echo.recovery_azure_vm_name, Some(&shown.recovery_azure_vm_name))
            .or_else(|| given(created.target_azure_vm_name)),
        recovery_azure_vm_size: changed(echo.recovery_azure_vm_size, shown.recovery_azure_vm_size.as_deref())
            .or_else(|| given(created.target_vm_size)),
        selected_recovery_azure_network_id: changed(
            echo.selected_recovery_azure_network_id,
            shown.selected_recovery_azure_network_id.as_deref(),
        )
        .or_else(|| given(created.target_azure_network_id)),
        selected_tfo_azure_network_id: None,
        vm_nics: Some(nics.collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_fit_the_host() {
        assert_eq!(size_table(0, 0), []);
        assert_eq!(size_table(1, GIBIBYTE), [(1, GIBIBYTE / 2), (1, GIBIBYTE)]);
        let sizes = size_table(6, 16 * GIBIBYTE);
        assert_eq!(sizes.iter().map(|(vcpus, _)| *vcpus).max(), Some(4));
        assert!(sizes.contains(&(4, 16 * GIBIBYTE)));
        assert!(size_table(u32::MAX, u64::MAX).iter().all(|(vcpus, _)| *vcpus <= VCPUS_MAX));
    }
}
