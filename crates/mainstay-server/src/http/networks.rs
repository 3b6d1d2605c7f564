//! Networks of fabrics, logical networks, and mappings of networks to those of a recovery site.

use axum::response::Response;
use hyper::Method;
use mainstay_api::arm::{
    AZURE, LogicalNetworkProperties, NetworkMappingInput, NetworkMappingProperties, NetworkMappingSettings,
    NetworkProperties, Resource,
};
use mainstay_control::{
    ControlError,
    app::{FabricRecord, NetworkMappingRecord},
};
use mainstay_provider::{Network, NetworkKind};

use super::{
    Call, body,
    convert::{self, Ids, last_segment, segment_after},
    error::ApiError,
    json, list,
};

/// `…/replicationNetworks/…` and `…/replicationLogicalNetworks/…` of a fabric.
pub(super) async fn of_fabric(
    call: &Call,
    fabric: &FabricRecord,
    rest: &[&str],
) -> Result<Response, ApiError> {
    match (&call.method, rest) {
        (&Method::GET, ["replicationnetworks"]) => list_networks(call, Some(fabric)).await,
        (&Method::GET, ["replicationnetworks", name]) => json(&network(call, fabric, name).await?),
        (_, ["replicationnetworks", _, "replicationnetworkmappings", rest @ ..]) => {
            mapping(call, fabric, rest).await
        }
        (&Method::GET, ["replicationlogicalnetworks", rest @ ..]) => {
            logical_networks(call, fabric, rest).await
        }
        _ => Err(ApiError::no_such_path()),
    }
}

async fn network(
    call: &Call,
    fabric: &FabricRecord,
    name: &str,
) -> Result<Resource<NetworkProperties>, ApiError> {
    let found = networks_of(call, Some(fabric)).await?;
    let found = found.into_iter().find(|(_, network)| network.name.eq_ignore_ascii_case(name));
    let (fabric, network) = found.ok_or_else(|| ControlError::not_found("network", name))?;
    Ok(convert::network(&Ids(&call.vault), &fabric, &network))
}

/// The networks of a fabric, or all.
pub(super) async fn list_networks(call: &Call, fabric: Option<&FabricRecord>) -> Result<Response, ApiError> {
    let ids = Ids(&call.vault);
    let found = networks_of(call, fabric).await?;
    list(found.iter().map(|(fabric, network)| convert::network(&ids, fabric, network)).collect())
}

/// Networks with their fabrics, in order; hosts of a fabric that have the same network have one.
async fn networks_of(call: &Call, fabric: Option<&FabricRecord>) -> Result<Vec<(String, Network)>, ApiError> {
    let mut found = Vec::new();
    for provider in call.control().providers().await?.iter() {
        if fabric.is_some_and(|fabric| !provider.fabric.eq_ignore_ascii_case(&fabric.name)) {
            continue;
        }
        let networks = provider.discovery.iter().flat_map(|discovery| &discovery.inventory.networks);
        found.extend(networks.map(|network| (provider.fabric.clone(), network.clone())));
    }
    found.sort_by(|a, b| (&a.0, &a.1.name).cmp(&(&b.0, &b.1.name)));
    found.dedup_by(|a, b| a.0 == b.0 && a.1.name == b.1.name);
    Ok(found)
}

/// A host's network is its own logical network: there is nothing above it that could be shared.
async fn logical_networks(call: &Call, fabric: &FabricRecord, rest: &[&str]) -> Result<Response, ApiError> {
    let ids = Ids(&call.vault);
    let found = networks_of(call, Some(fabric)).await?;
    let mut shown = found.into_iter().map(|(fabric, network)| {
        let isolation = if network.kind == NetworkKind::Isolated { "Isolated" } else { "NotIsolated" };
        convert::resource(
            format!("{}/replicationLogicalNetworks/{}", ids.fabric(&fabric), network.name),
            "replicationFabrics/replicationLogicalNetworks",
            LogicalNetworkProperties {
                friendly_name: network.name,
                network_virtualization_status: "NetworkVirtualizationNotEnabled".to_owned(),
                logical_network_usage: "NotUsedAsPrivateNetworkForTestFailover".to_owned(),
                logical_network_definitions_status: format!("LogicalNetworkDefinitions{isolation}"),
            },
        )
    });
    match rest {
        [] => list(shown.collect()),
        [name] => match shown.find(|network| network.name.eq_ignore_ascii_case(name)) {
            Some(network) => json(&network),
            None => Err(ControlError::not_found("logical network", *name).into()),
        },
        _ => Err(ApiError::no_such_path()),
    }
}

/// All mappings of the vault.
pub(super) async fn list_mappings(call: &Call) -> Result<Response, ApiError> {
    let mappings = call.control().network_mappings().await?;
    list(mappings.iter().map(|mapping| shown(call, mapping)).collect())
}

async fn mapping(call: &Call, fabric: &FabricRecord, rest: &[&str]) -> Result<Response, ApiError> {
    let control = call.control();
    let network = call.segments[3].as_str();
    let [_] = rest else {
        if call.method != Method::GET || !rest.is_empty() {
            return Err(ApiError::no_such_path());
        }
        let mut mappings = control.network_mappings().await?;
        mappings.retain(|mapping| {
            mapping.fabric.eq_ignore_ascii_case(&fabric.name) && mapping.network.eq_ignore_ascii_case(network)
        });
        return list(mappings.iter().map(|mapping| shown(call, mapping)).collect());
    };
    let name = call.segments[5].as_str();
    let by = call.who.clone();
    let id = format!("{}/replicationNetworkMappings/{name}", Ids(&call.vault).network(&fabric.name, network));
    let job = match call.method {
        Method::GET => {
            return json(&shown(call, &control.network_mapping(&fabric.name, network, name).await?));
        }
        Method::PUT | Method::PATCH => {
            let is_new = call.method == Method::PUT;
            let fields = if is_new { body::CREATE_NETWORK_MAPPING } else { body::UPDATE_NETWORK_MAPPING };
            let input: NetworkMappingInput = call.properties(fields)?;
            let present =
                if is_new { None } else { Some(control.network_mapping(&fabric.name, network, name).await?) };
            let (recovery_fabric, recovery_network) = recovery(&input, present)?;
            let recovery = (recovery_fabric.as_deref(), recovery_network.as_str());
            control.put_network_mapping(&fabric.name, network, name, recovery, by).await?
        }
        Method::DELETE => control.remove_network_mapping(&fabric.name, network, name, by).await?,
        _ => return Err(ApiError::no_such_path()),
    };
    Ok(call.accepted(job.id, &id))
}

/// The recovery fabric, if one is named, and the recovery network. What an update leaves out is kept.
fn recovery(
    input: &NetworkMappingInput,
    present: Option<NetworkMappingRecord>,
) -> Result<(Option<String>, String), ApiError> {
    let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let (fabric, network) = (given(&input.recovery_fabric_name), given(&input.recovery_network_id));
    let of_network = network.as_deref().and_then(|id| segment_after(id, "replicationFabrics"));
    let named = fabric.as_deref().filter(|name| !name.eq_ignore_ascii_case(AZURE)).map(last_segment);
    if let (Some(named), Some(of_network)) = (named, of_network)
        && !named.eq_ignore_ascii_case(of_network)
    {
        return Err(ApiError::bad_request(
            "InvalidParameter",
            format!(
                "properties.recoveryFabricName cannot be \"{named}\": the recovery network is of fabric '{of_network}'"
            ),
            "Correct one of them and try again; nothing was changed.",
        ));
    }
    let recovery_fabric = of_network.or(named).map(str::to_owned);
    let recovery_network = network.as_deref().map(|id| last_segment(id).to_owned());
    Ok(match present {
        Some(present) => (
            recovery_fabric.or(Some(present.recovery_fabric)),
            recovery_network.unwrap_or(present.recovery_network),
        ),
        // The table requires it.
        None => (recovery_fabric, recovery_network.unwrap_or_default()),
    })
}

fn shown(call: &Call, mapping: &NetworkMappingRecord) -> Resource<NetworkMappingProperties> {
    let ids = Ids(&call.vault);
    let network = ids.network(&mapping.fabric, &mapping.network);
    convert::resource(
        format!("{network}/replicationNetworkMappings/{}", mapping.name),
        "replicationFabrics/replicationNetworks/replicationNetworkMappings",
        NetworkMappingProperties {
            state: "Paired".to_owned(),
            primary_network_friendly_name: mapping.network.clone(),
            primary_network_id: network,
            primary_fabric_friendly_name: mapping.fabric.clone(),
            recovery_network_friendly_name: mapping.recovery_network.clone(),
            recovery_network_id: ids.network(&mapping.recovery_fabric, &mapping.recovery_network),
            recovery_fabric_arm_id: ids.fabric(&mapping.recovery_fabric),
            recovery_fabric_friendly_name: mapping.recovery_fabric.clone(),
            fabric_specific_settings: NetworkMappingSettings { instance_type: "VmmToAzure".to_owned() },
        },
    )
}
