//! Replicated items: every verb.

use clap::{Args, Subcommand, ValueEnum};
use mainstay_api::{
    arm::{
        AZURE, ApplyRecoveryPointInput, CommentsInput, ContainerMappingInput, ContainerMappingProperties,
        EnableDetails, EnableProtectionInput, FailoverDetails, FailoverInput, HYPERV_REPLICA_AZURE,
        HYPERV_REPLICA_AZURE_FAILBACK, ItemIpConfig, ItemNic, List, RecoveryPointProperties, Request,
        UpdateItemInput,
    },
    v1::{Console, ItemStatus},
};
use reqwest::Method;
use serde_json::json;

use crate::{
    exit::{Exit, NotFoundError, RefusedError, UsageError},
    jobs::{self, WaitArguments},
    output, progress,
    resources::{find_fabric, find_host},
    scrubs,
    session::{Item, Resource, Session},
};

#[derive(Args)]
pub(crate) struct ItemArguments {
    /// The replicated item: its name, its VM's name, or its ARM id.
    vm: String,
    /// Print JSON, for programs.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(crate) struct OperationArguments {
    /// The replicated item: its name, its VM's name, or its ARM id.
    vm: String,
    #[command(flatten)]
    wait: WaitArguments,
}

#[derive(Subcommand)]
pub(crate) enum ItemCommand {
    /// Lists the replicated items.
    List {
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Shows an item: state, health, RPO, recovery points, compute and network, disks.
    Show(ItemArguments),
    /// Changes what the recovery VM shall be.
    Set(SetArguments),
}

/// What the recovery VM shall be; an empty value takes a setting back.
#[derive(Args)]
#[command(
    group(clap::ArgGroup::new("adapter").args(["nic_network", "ip", "mac_policy"]).multiple(true)),
    after_help = "\
Two processors, 4 GiB of memory and another name after a failover:
  mainstay item set web01 --size 2x4096 --target-name web01-dr

An address for an adapter, and none of its own again (the network gives one then):
  mainstay item set web01 --nic 52:54:00:12:34:56 --ip 10.0.0.7/24
  mainstay item set web01 --nic 52:54:00:12:34:56 --ip \"\"

A network for rehearsals:
  mainstay item set web01 --test-network island"
)]
pub(crate) struct SetArguments {
    /// The replicated item: its name, its VM's name, or its ARM id.
    vm: String,
    /// The name at the recovery site.
    #[arg(long)]
    target_name: Option<String>,
    /// Processors and memory at the recovery site.
    #[arg(long, value_name = "VCPUS[xMEMORY_MIB]")]
    size: Option<String>,
    /// The network after a failover.
    #[arg(long)]
    network: Option<String>,
    /// The network of test copies, unless a test failover names another; without it they are isolated.
    #[arg(long)]
    test_network: Option<String>,
    /// The adapter that the following options are about: its MAC address (the first one by default).
    #[arg(long, value_name = "MAC", requires = "adapter")]
    nic: Option<String>,
    /// The adapter's network after a failover.
    #[arg(long)]
    nic_network: Option<String>,
    /// The adapter's IPv4 address after a failover.
    #[arg(long, value_name = "ADDRESS/PREFIX")]
    ip: Option<String>,
    /// Whether the adapter keeps its MAC address.
    #[arg(long, value_enum)]
    mac_policy: Option<MacPolicy>,
    #[command(flatten)]
    wait: WaitArguments,
}

#[derive(Clone, Copy, ValueEnum)]
enum MacPolicy {
    /// The same as at home.
    Keep,
    /// A new one.
    Generate,
}

pub(crate) async fn item(session: &Session, command: ItemCommand) -> anyhow::Result<Exit> {
    match command {
        ItemCommand::List { json } => {
            let items: Vec<Item> = session.list("/replicationProtectedItems").await?;
            if json {
                output::json(&items)?;
                return Ok(Exit::Done);
            }
            let rows = items
                .into_iter()
                .map(|item| {
                    let item = item.into_known();
                    let it = item.properties;
                    let rpo = it.provider_specific_details.rpo_in_seconds;
                    vec![
                        item.name,
                        it.friendly_name,
                        it.protection_state_description,
                        it.active_location,
                        it.replication_health,
                        rpo.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds} s")),
                        it.current_scenario.scenario_name,
                    ]
                })
                .collect();
            output::table(&["ITEM", "VM", "STATE", "ACTIVE", "HEALTH", "RPO", "UNDER WAY"], rows);
            Ok(Exit::Done)
        }
        ItemCommand::Show(ItemArguments { vm, json }) => {
            let item = session.item(&vm).await?;
            if json {
                output::json(&item)?;
            } else {
                show(session, &item).await?;
            }
            Ok(Exit::Done)
        }
        ItemCommand::Set(arguments) => set(session, arguments).await,
    }
}

async fn show(session: &Session, item: &Item) -> anyhow::Result<()> {
    let it = &item.properties;
    let details = &it.provider_specific_details;
    let or_dash = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_owned());
    output::line(&format!("item:              {}", item.name));
    output::line(&format!("VM:                {} ({})", it.friendly_name, details.vm_id));
    output::line(&format!(
        "from, to:          {} → {}",
        it.primary_fabric_friendly_name, it.recovery_fabric_friendly_name
    ));
    output::line(&format!(
        "state:             {} ({})",
        it.protection_state_description, it.protection_state
    ));
    output::line(&format!("active at:         {}", it.active_location));
    output::line(&format!("health:            {} (failover: {})", it.replication_health, it.failover_health));
    for error in &it.health_errors {
        output::line(&format!("                   {}: {}", error.error_level, error.error_message));
        output::line(&format!("                   → {}", error.recommended_action));
    }
    let status: ItemStatus = session.client.get(&session.v1(&format!("/items/{}", item.name))).await?;
    if it.protection_state == "InitialReplicationInProgress" {
        let initial = &details.initial_replication_details;
        output::line(&format!("initial copy:      {} %", initial.initial_replication_progress_percentage));
    }
    if let Some(told) = status.cycle.as_ref().map(progress::text).filter(|told| !told.is_empty()) {
        output::line(&format!("under way:         {told}"));
    }
    let rpo = details.rpo_in_seconds.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds} s"));
    output::line(&format!("RPO:               {rpo}"));
    output::line(&format!("policy:            {}", it.policy_friendly_name));
    let points: List<Resource<RecoveryPointProperties>> =
        session.client.get(&format!("{}/recoveryPoints", item.id)).await?;
    for (label, kind) in [("latest crash:     ", "CrashConsistent"), ("latest app:       ", "AppConsistent")]
    {
        let latest = points.value.iter().find(|point| point.properties.recovery_point_type == kind);
        let text = latest.map_or_else(
            || "-".to_owned(),
            |point| format!("{}  {}", point.properties.recovery_point_time, point.name),
        );
        output::line(&format!("{label} {text}"));
    }
    output::line(&format!("recovery points:   {}", points.value.len()));
    output::line(&format!("allowed now:       {}", it.allowed_operations.join(", ")));
    output::line("");
    output::line("Compute and network");
    output::line(&format!("  target name:     {}", details.recovery_azure_vm_name));
    output::line(&format!(
        "  target size:     {}",
        details.recovery_azure_vm_size.clone().unwrap_or_else(|| "as at home".to_owned())
    ));
    for nic in &details.vm_nics {
        let network = nic.recovery_vm_network_id.as_deref().map_or("not connected", last_segment);
        let address = nic.ip_configs.first().and_then(|config| config.recovery_static_ip_address.clone());
        output::line(&format!(
            "  adapter {}: network {network}, address {}, MAC {}",
            nic.nic_id,
            address.filter(|text| !text.is_empty()).unwrap_or_else(|| "as the network gives".to_owned()),
            or_dash(&status.mac_policies.get(&nic.nic_id).cloned()),
        ));
    }
    // One for all adapters, told with each of them.
    let test_network = details.vm_nics.first().and_then(|nic| nic.tfo_vm_network_id.as_deref());
    output::line(&format!("  test network:    {}", test_network.map_or("isolated", last_segment)));
    output::line("");
    output::line("Disks");
    // Nothing from a server of before formats were told.
    let format = |key: &str| {
        let found = status.disks.iter().find(|disk| disk.key == key && !disk.format.is_empty());
        found.map_or_else(String::new, |disk| format!("{}, ", disk.format.to_lowercase()))
    };
    for disk in &details.azure_vm_disk_details {
        output::line(&format!(
            "  {}: {}, {}{} MiB, replicated{}",
            disk.vhd_name,
            disk.vhd_type,
            format(&disk.vhd_id),
            disk.max_size_mb,
            status
                .cycle
                .as_ref()
                .and_then(|cycle| progress::of_disk(cycle, &disk.vhd_id))
                .map_or_else(String::new, |share| format!("; under way: {share}"))
        ));
    }
    let protectable: Resource<mainstay_api::arm::ProtectableItemProperties> =
        match session.client.get(&it.protectable_item_id).await {
            Ok(found) => found,
            Err(error) if error.status() == Some(404) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
    for disk in protectable.into_known().properties.custom_details.disk_details {
        if !details.azure_vm_disk_details.iter().any(|included| included.vhd_id == disk.vhd_id) {
            output::line(&format!(
                "  {}: {}, {}{} MiB, excluded",
                disk.vhd_name,
                disk.vhd_type,
                format(&disk.vhd_id),
                disk.max_size_mb
            ));
        }
    }
    Ok(())
}

fn last_segment(id: &str) -> &str {
    id.rsplit('/').next().unwrap_or(id)
}

async fn set(session: &Session, arguments: SetArguments) -> anyhow::Result<Exit> {
    let item = session.item(&arguments.vm).await?;
    let mut update = UpdateItemInput {
        recovery_azure_vm_name: arguments.target_name,
        recovery_azure_vm_size: arguments.size,
        selected_recovery_azure_network_id: arguments.network,
        selected_tfo_azure_network_id: arguments.test_network,
        vm_nics: None,
    };
    if arguments.nic_network.is_some() || arguments.ip.is_some() || arguments.mac_policy.is_some() {
        let first = item.properties.provider_specific_details.vm_nics.first().map(|nic| nic.nic_id.clone());
        let nic_id =
            arguments.nic.or(first).ok_or_else(|| UsageError("the VM has no network adapter".to_owned()))?;
        let config =
            ItemIpConfig { recovery_static_ip_address: arguments.ip.clone(), ..ItemIpConfig::default() };
        update.vm_nics = Some(vec![ItemNic {
            nic_id,
            recovery_vm_network_id: arguments.nic_network,
            ip_configs: if arguments.ip.is_some() { vec![config] } else { Vec::new() },
            mac_policy: arguments.mac_policy.map(|policy| match policy {
                MacPolicy::Keep => "Keep".to_owned(),
                MacPolicy::Generate => "Generate".to_owned(),
            }),
            ..ItemNic::default()
        }]);
    }
    jobs::begin(
        session,
        Method::PATCH,
        &item.id,
        Some(&Request { properties: update }),
        &arguments.wait,
        &item.id,
    )
    .await
}

#[derive(Args)]
#[command(after_help = "\
A policy first, then the VM; `mainstay vm list` says which VMs there are and what stands in their way:
  mainstay policy create often --copy-frequency 30s --retention 24 --app-consistent-frequency 1
  mainstay protect web01 --policy often

Without a disk that need not, or cannot, be replicated:
  mainstay protect web01 --policy often --exclude-disk vdb

The job ends when replication has begun. To wait until the VM can be failed over, or to look how far it is:
  mainstay protect web01 --policy often --until-protected
  mainstay item show web01")]
pub(crate) struct ProtectArguments {
    /// The VM: its name, or its protectable item's ARM id.
    vm: String,
    /// The replication policy.
    #[arg(long)]
    policy: String,
    /// Name of the replicated item; the VM's name by default.
    #[arg(long)]
    name: Option<String>,
    /// The recovery fabric; the only other one by default.
    #[arg(long)]
    recovery_fabric: Option<String>,
    /// A disk that is not replicated (`vdb`); can be given several times.
    #[arg(long, value_name = "DISK")]
    exclude_disk: Vec<String>,
    /// Wait until initial replication is complete and the VM is protected, and show how far it is.
    #[arg(long, conflicts_with = "no_wait")]
    until_protected: bool,
    #[command(flatten)]
    wait: WaitArguments,
}

pub(crate) async fn protect(session: &Session, arguments: ProtectArguments) -> anyhow::Result<Exit> {
    let found = session.protectable_items().await?;
    let mut matching: Vec<_> = found
        .into_iter()
        .filter(|vm| {
            vm.id.eq_ignore_ascii_case(&arguments.vm)
                || vm.name.eq_ignore_ascii_case(&arguments.vm)
                || vm.properties.friendly_name.eq_ignore_ascii_case(&arguments.vm)
        })
        .collect();
    let vm = match matching.len() {
        0 => {
            return Err(
                NotFoundError(format!("there is no VM '{}'; see `mainstay vm list`", arguments.vm)).into()
            );
        }
        1 => matching.remove(0),
        _ => {
            let ids: Vec<_> = matching.iter().map(|vm| vm.id.as_str()).collect();
            return Err(UsageError(format!(
                "'{}' is ambiguous; use one of the ids: {}",
                arguments.vm,
                ids.join(", ")
            ))
            .into());
        }
    };
    let container = vm.id.split("/replicationProtectableItems/").next().unwrap_or_default().to_owned();
    let policy_id = format!("{}/replicationPolicies/{}", session.vault, arguments.policy);
    let _: serde_json::Value = session.client.get(&policy_id).await?;
    ensure_mapping(session, &container, &policy_id, &arguments).await?;
    let disks: Vec<_> =
        vm.properties.custom_details.disk_details.iter().map(|disk| disk.vhd_id.clone()).collect();
    if let Some(unknown) = arguments.exclude_disk.iter().find(|key| !disks.contains(key)) {
        return Err(
            UsageError(format!("the VM has no disk '{unknown}'; it has: {}", disks.join(", "))).into()
        );
    }
    let included: Vec<_> = disks.into_iter().filter(|key| !arguments.exclude_disk.contains(key)).collect();
    let body = Request {
        properties: EnableProtectionInput {
            policy_id,
            protectable_item_id: vm.id.clone(),
            provider_specific_details: EnableDetails {
                instance_type: HYPERV_REPLICA_AZURE.to_owned(),
                disks_to_include: (!arguments.exclude_disk.is_empty()).then_some(included),
                ..EnableDetails::default()
            },
        },
    };
    let name = arguments.name.unwrap_or_else(|| resource_name(&vm.properties.friendly_name, &vm.name));
    let path = format!("{container}/replicationProtectedItems/{name}");
    if !arguments.until_protected {
        return jobs::begin(session, Method::PUT, &path, Some(&body), &arguments.wait, &path).await;
    }
    // The item is printed when it is what is waited for.
    let wait = arguments.wait.silent();
    let exit = jobs::begin(session, Method::PUT, &path, Some(&body), &wait, &path).await?;
    if exit != Exit::Done {
        return Ok(exit);
    }
    let item = progress::until_protected(session, &path).await?;
    if arguments.wait.json {
        output::json(&item)?;
    }
    Ok(Exit::Done)
}

/// The VM's name if it can name a resource, else its id.
fn resource_name(vm_name: &str, id: &str) -> String {
    let is_good = vm_name.len() <= 63
        && vm_name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && vm_name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    if is_good { vm_name } else { id }.to_owned()
}

async fn ensure_mapping(
    session: &Session,
    container: &str,
    policy_id: &str,
    arguments: &ProtectArguments,
) -> anyhow::Result<()> {
    let path = format!("{container}/replicationProtectionContainerMappings");
    let target = match &arguments.recovery_fabric {
        Some(name) => Some(session.container(&find_fabric(session, name).await?).await?),
        None => None,
    };
    let mappings: List<Resource<ContainerMappingProperties>> = session.client.get(&path).await?;
    let is_there = mappings.value.iter().any(|mapping| {
        let it = &mapping.properties;
        it.policy_id.eq_ignore_ascii_case(policy_id)
            && target
                .as_ref()
                .is_none_or(|target| it.target_protection_container_id.eq_ignore_ascii_case(target))
    });
    if is_there {
        return Ok(());
    }
    let body = Request {
        properties: ContainerMappingInput {
            policy_id: policy_id.to_owned(),
            target_protection_container_id: target.unwrap_or_else(|| AZURE.to_owned()),
        },
    };
    let name = format!("{path}/{}-mapping", arguments.policy);
    session.client.begin(Method::PUT, &name, Some(&body)).await?;
    Ok(())
}

pub(crate) async fn recovery_points(session: &Session, arguments: ItemArguments) -> anyhow::Result<Exit> {
    let item = session.item(&arguments.vm).await?;
    let points: List<Resource<RecoveryPointProperties>> =
        session.client.get(&format!("{}/recoveryPoints", item.id)).await?;
    if arguments.json {
        output::json(&points.value)?;
        return Ok(Exit::Done);
    }
    let damaged = scrubs::of_item(session, &item.name).await?.damaged_points;
    let rows = points.value.into_iter().map(|point| {
        let state = if damaged.contains(&point.name) { "Damaged" } else { "" };
        let point = point.into_known();
        let properties = point.properties;
        vec![properties.recovery_point_time, properties.recovery_point_type, point.name, state.to_owned()]
    });
    output::table(&["TIME", "TYPE", "ID", "STATE"], rows.collect());
    Ok(Exit::Done)
}

/// Which recovery point.
fn point_id(choice: &str) -> String {
    match choice {
        "latest" => "Latest".to_owned(),
        "latest-processed" => "LatestProcessed".to_owned(),
        "latest-app-consistent" => "LatestApplicationConsistent".to_owned(),
        id => id.to_owned(),
    }
}

fn details(point: &str) -> FailoverDetails {
    FailoverDetails {
        instance_type: HYPERV_REPLICA_AZURE.to_owned(),
        recovery_point_id: Some(point_id(point)),
        ..FailoverDetails::default()
    }
}

async fn post<B: serde::Serialize + Sync>(
    session: &Session,
    vm: &str,
    verb: &str,
    body: Option<&Request<B>>,
    wait: &WaitArguments,
) -> anyhow::Result<Exit> {
    let item = session.item(vm).await?;
    jobs::begin(session, Method::POST, &format!("{}/{verb}", item.id), body, wait, &item.id).await
}

/// What test copies are attached to.
#[derive(Args)]
pub(crate) struct TestNetworkArguments {
    /// A network to attach the copy to, instead of what `mainstay item set --test-network` says; without either it is isolated.
    #[arg(long)]
    network: Option<String>,
    /// Isolate the copy, whatever the item's settings say.
    #[arg(long, conflicts_with = "network")]
    no_network: bool,
}

impl TestNetworkArguments {
    /// `networkType` and `networkId` of the request. Without a type the server looks at the item's settings.
    pub(crate) fn input(self) -> (Option<String>, Option<String>) {
        let kind = if self.no_network {
            Some("NoNetworkAttachAsInput")
        } else {
            self.network.as_ref().map(|_| "VmNetworkAsInput")
        };
        (kind.map(str::to_owned), self.network)
    }
}

#[derive(Args)]
#[command(after_help = "\
A rehearsal and its end:
  mainstay test-failover web01
  mainstay cleanup-test-failover web01 --notes \"booted, checked\"

A state of before something went wrong:
  mainstay recovery-points web01
  mainstay test-failover web01 --recovery-point 0198f2b4-6a1e-7c33-9d55-3a1c3f0a9b77")]
pub(crate) struct TestFailoverArguments {
    /// The replicated item: its name, its VM's name, or its ARM id.
    vm: String,
    /// The recovery point: the newest (`latest`, `latest-processed`: nothing is shipped for a rehearsal), the newest that the
    /// guest's agent has prepared (`latest-app-consistent`), or the ID of one that `mainstay recovery-points` lists.
    #[arg(
        long,
        default_value = "latest-processed",
        value_name = "latest|latest-processed|latest-app-consistent|ID"
    )]
    recovery_point: String,
    #[command(flatten)]
    network: TestNetworkArguments,
    #[command(flatten)]
    wait: WaitArguments,
}

pub(crate) async fn test_failover(
    session: &Session,
    arguments: TestFailoverArguments,
) -> anyhow::Result<Exit> {
    let (network_type, network_id) = arguments.network.input();
    let properties = FailoverInput {
        failover_direction: Some("PrimaryToRecovery".to_owned()),
        network_type,
        network_id,
        provider_specific_details: details(&arguments.recovery_point),
        ..FailoverInput::default()
    };
    post(session, &arguments.vm, "testFailover", Some(&Request { properties }), &arguments.wait).await
}

#[derive(Args)]
pub(crate) struct CleanupArguments {
    /// The replicated item: its name, its VM's name, or its ARM id.
    vm: String,
    /// What the rehearsal showed; kept with the job.
    #[arg(long, default_value = "")]
    notes: String,
    #[command(flatten)]
    wait: WaitArguments,
}

pub(crate) async fn cleanup(session: &Session, arguments: CleanupArguments) -> anyhow::Result<Exit> {
    let properties = CommentsInput { comments: Some(arguments.notes) };
    post(session, &arguments.vm, "testFailoverCleanup", Some(&Request { properties }), &arguments.wait).await
}

#[derive(Args)]
#[command(after_help = "\
The protected site may be lost: what can be had is shipped first, and the VM runs in any case:
  mainstay failover web01

The protected site must not be touched, or is known to be gone:
  mainstay failover web01 --recovery-point latest-processed --no-shutdown-source

Afterwards another recovery point can be tried (`mainstay change-recovery-point`) until one is made final:
  mainstay commit web01")]
pub(crate) struct FailoverArguments {
    /// The replicated item: its name, its VM's name, or its ARM id.
    vm: String,
    /// The recovery point: what the source still has, shipped after it was stopped, or the newest if that cannot be (`latest`);
    /// the newest that the recovery site has already, without waiting for anything (`latest-processed`); the newest that the
    /// guest's agent has prepared (`latest-app-consistent`); or the ID of one that `mainstay recovery-points` lists.
    #[arg(long, default_value = "latest", value_name = "latest|latest-processed|latest-app-consistent|ID")]
    recovery_point: String,
    /// Shut the source down first and ship its last changes; the failover goes on if that fails (default).
    #[arg(long, overrides_with = "no_shutdown_source")]
    shutdown_source: bool,
    /// Do not touch the source.
    #[arg(long)]
    no_shutdown_source: bool,
    #[command(flatten)]
    wait: WaitArguments,
}

pub(crate) async fn failover(session: &Session, arguments: FailoverArguments) -> anyhow::Result<Exit> {
    let operations = if arguments.no_shutdown_source { "NotRequired" } else { "Required" };
    let properties = FailoverInput {
        failover_direction: Some("PrimaryToRecovery".to_owned()),
        source_site_operations: Some(operations.to_owned()),
        provider_specific_details: details(&arguments.recovery_point),
        ..FailoverInput::default()
    };
    post(session, &arguments.vm, "unplannedFailover", Some(&Request { properties }), &arguments.wait).await
}

#[derive(Args)]
#[command(after_help = "\
All that the VM has written since its failover is discarded. Points can be changed until `mainstay commit`:
  mainstay recovery-points web01
  mainstay change-recovery-point web01 --recovery-point 0198f2b4-6a1e-7c33-9d55-3a1c3f0a9b77")]
pub(crate) struct ChangePointArguments {
    /// The replicated item: its name, its VM's name, or its ARM id.
    vm: String,
    /// The recovery point to run instead: the newest (`latest`, `latest-processed`), the newest that the guest's agent had
    /// prepared (`latest-app-consistent`), or the ID of one that `mainstay recovery-points` lists.
    #[arg(long, value_name = "latest|latest-processed|latest-app-consistent|ID")]
    recovery_point: String,
    #[command(flatten)]
    wait: WaitArguments,
}

pub(crate) async fn change_point(session: &Session, arguments: ChangePointArguments) -> anyhow::Result<Exit> {
    let properties = ApplyRecoveryPointInput {
        recovery_point_id: point_id(&arguments.recovery_point),
        provider_specific_details: FailoverDetails {
            instance_type: HYPERV_REPLICA_AZURE.to_owned(),
            ..FailoverDetails::default()
        },
    };
    post(session, &arguments.vm, "applyRecoveryPoint", Some(&Request { properties }), &arguments.wait).await
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Direction {
    /// To the recovery site.
    #[value(name = "PrimaryToRecovery")]
    PrimaryToRecovery,
    /// Home.
    #[value(name = "RecoveryToPrimary")]
    RecoveryToPrimary,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SyncOption {
    /// Ship the changes while the VM runs, then wait for `complete-failover` (least downtime).
    BeforeFailover,
    /// Stop the VM at once and download everything.
    DuringFailover,
}

#[derive(Args)]
#[command(after_help = "\
To the recovery site, without loss; both sites must be there:
  mainstay planned-failover web01 --direction PrimaryToRecovery
  mainstay commit web01

And home again; the VM runs on until `complete-failover`:
  mainstay planned-failover web01 --direction RecoveryToPrimary
  mainstay complete-failover web01
  mainstay commit web01
  mainstay reverse-replicate web01")]
pub(crate) struct PlannedFailoverArguments {
    /// The replicated item: its name, its VM's name, or its ARM id.
    vm: String,
    /// Where to.
    #[arg(long, value_enum)]
    direction: Direction,
    /// When to synchronise, on the way home.
    #[arg(long, value_enum, default_value = "before-failover")]
    sync: SyncOption,
    /// Make the home VM if it does not exist.
    #[arg(long)]
    create_vm: bool,
    /// Another host of the protected site to return to.
    #[arg(long)]
    host: Option<String>,
    #[command(flatten)]
    wait: WaitArguments,
}

pub(crate) async fn planned_failover(
    session: &Session,
    arguments: PlannedFailoverArguments,
) -> anyhow::Result<Exit> {
    let properties = match arguments.direction {
        Direction::PrimaryToRecovery => {
            if arguments.create_vm || arguments.host.is_some() {
                return Err(UsageError(
                    "--create-vm and --host are for the way home (RecoveryToPrimary)".to_owned(),
                )
                .into());
            }
            FailoverInput {
                failover_direction: Some("PrimaryToRecovery".to_owned()),
                provider_specific_details: details("latest"),
                ..FailoverInput::default()
            }
        }
        Direction::RecoveryToPrimary => {
            let host = match &arguments.host {
                Some(name) => Some(find_host(session, name).await?.into_known().id),
                None => None,
            };
            let sync = match arguments.sync {
                SyncOption::BeforeFailover => "ForDownTime",
                SyncOption::DuringFailover => "ForSynchronization",
            };
            let creation = if arguments.create_vm { "CreateVmIfNotFound" } else { "NoAction" };
            FailoverInput {
                failover_direction: Some("RecoveryToPrimary".to_owned()),
                provider_specific_details: FailoverDetails {
                    instance_type: HYPERV_REPLICA_AZURE_FAILBACK.to_owned(),
                    data_sync_option: Some(sync.to_owned()),
                    recovery_vm_creation_option: Some(creation.to_owned()),
                    provider_id_for_alternate_recovery: host,
                    ..FailoverDetails::default()
                },
                ..FailoverInput::default()
            }
        }
    };
    post(session, &arguments.vm, "plannedFailover", Some(&Request { properties }), &arguments.wait).await
}

pub(crate) async fn complete(session: &Session, arguments: OperationArguments) -> anyhow::Result<Exit> {
    let item = session.item(&arguments.vm).await?;
    let scenario = &item.properties.current_scenario;
    if scenario.scenario_name != "Failback" {
        let reason = format!("no failback of '{}' is under way", item.name);
        return Err(RefusedError { reason, allowed: item.into_known().properties.allowed_operations }.into());
    }
    jobs::resume(session, last_segment(&scenario.job_id), &arguments.wait).await
}

pub(crate) async fn operation(
    session: &Session,
    arguments: OperationArguments,
    verb: &str,
) -> anyhow::Result<Exit> {
    post::<()>(session, &arguments.vm, verb, None, &arguments.wait).await
}

pub(crate) async fn reverse(session: &Session, arguments: OperationArguments) -> anyhow::Result<Exit> {
    let properties = FailoverInput {
        failover_direction: Some("PrimaryToRecovery".to_owned()),
        provider_specific_details: FailoverDetails {
            instance_type: HYPERV_REPLICA_AZURE.to_owned(),
            ..FailoverDetails::default()
        },
        ..FailoverInput::default()
    };
    post(session, &arguments.vm, "reProtect", Some(&Request { properties }), &arguments.wait).await
}

#[derive(Args)]
pub(crate) struct DisableArguments {
    /// The replicated item: its name, its VM's name, or its ARM id.
    vm: String,
    /// Do not wait for sites that are away; what is left there must be removed by hand.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    wait: WaitArguments,
}

pub(crate) async fn disable(session: &Session, arguments: DisableArguments) -> anyhow::Result<Exit> {
    let item = session.item(&arguments.vm).await?;
    if arguments.force {
        return jobs::begin(session, Method::DELETE, &item.id, None::<&()>, &arguments.wait, &item.id).await;
    }
    let body = json!({ "properties": { "disableProtectionReason": "NotSpecified" } });
    jobs::begin(session, Method::POST, &format!("{}/remove", item.id), Some(&body), &arguments.wait, &item.id)
        .await
}

pub(crate) async fn console(session: &Session, arguments: ItemArguments) -> anyhow::Result<Exit> {
    let item = session.item(&arguments.vm).await?;
    let console: Console = session.client.get(&session.v1(&format!("/items/{}/console", item.name))).await?;
    if arguments.json {
        let status: ItemStatus = session.client.get(&session.v1(&format!("/items/{}", item.name))).await?;
        output::json(&json!({ "command": console.command, "status": status }))?;
    } else {
        output::line(&console.command);
    }
    Ok(Exit::Done)
}
