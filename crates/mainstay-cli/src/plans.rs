//! `mainstay plan`: recovery plans.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Subcommand, ValueEnum};
use mainstay_api::arm::{
    AZURE, CommentsInput, HYPERV_REPLICA_AZURE, HYPERV_REPLICA_AZURE_FAILBACK, RecoveryPlanFailoverDetails,
    RecoveryPlanFailoverInput, RecoveryPlanGroup, RecoveryPlanInput, RecoveryPlanProperties,
    RecoveryPlanProtectedItem, Request,
};
use reqwest::Method;

use crate::{
    exit::{Exit, UsageError},
    items::TestNetworkArguments,
    jobs::{WaitArguments, begin},
    output,
    session::{Resource, Session},
};

#[derive(Subcommand)]
pub(crate) enum PlanCommand {
    /// Makes a plan, or replaces one.
    #[command(after_help = "\
Machines of a group run at the same time, groups in the order given:
  mainstay plan create shop --group db1,db2 --group web1,web2,web3

Manual and script actions are written to a file, as `mainstay plan show --json` prints them:
  mainstay plan show shop --json > shop.json; $EDITOR shop.json; mainstay plan create shop --file shop.json")]
    Create {
        /// The plan's name.
        name: String,
        /// Replicated items of a group, separated by commas; once for each group.
        #[arg(long = "group", value_name = "VM,…", required_unless_present = "file")]
        groups: Vec<String>,
        /// A file with the plan as ARM resource (JSON).
        #[arg(long, conflicts_with = "groups")]
        file: Option<PathBuf>,
        #[command(flatten)]
        wait: WaitArguments,
    },
    /// Lists the plans.
    List {
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Shows a plan: groups, machines, actions.
    Show {
        /// The plan's name.
        name: String,
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Removes a plan; its machines stay as they are.
    Delete {
        /// The plan's name.
        name: String,
        #[command(flatten)]
        wait: WaitArguments,
    },
    /// Boots copies of all machines, group by group, in isolated networks or in the items' test networks.
    TestFailover {
        /// The plan's name.
        name: String,
        /// The recovery points.
        #[arg(long, value_enum, default_value = "latest-processed")]
        recovery_points: Points,
        #[command(flatten)]
        network: TestNetworkArguments,
        #[command(flatten)]
        wait: WaitArguments,
    },
    /// Removes the copies of a test failover.
    CleanupTestFailover {
        /// The plan's name.
        name: String,
        /// Kept with the job.
        #[arg(long, default_value = "")]
        notes: String,
        #[command(flatten)]
        wait: WaitArguments,
    },
    /// Runs all machines at the recovery site (disaster: something may be lost). Goes on with the others if one fails.
    Failover {
        /// The plan's name.
        name: String,
        /// The recovery points.
        #[arg(long, value_enum, default_value = "latest")]
        recovery_points: Points,
        /// Do not try to stop the machines at the protected site first.
        #[arg(long)]
        no_shutdown: bool,
        #[command(flatten)]
        wait: WaitArguments,
    },
    /// Moves all machines without loss: to the recovery site, or back home. Stops at the first failure.
    PlannedFailover {
        /// The plan's name.
        name: String,
        /// Where to.
        #[arg(long, value_parser = ["PrimaryToRecovery", "RecoveryToPrimary"])]
        direction: String,
        /// On the way home: stop the machines at once and download everything, instead of synchronising while they run.
        #[arg(long)]
        sync_during_failover: bool,
        /// On the way home: make home VMs that do not exist.
        #[arg(long)]
        create_vm: bool,
        #[command(flatten)]
        wait: WaitArguments,
    },
    /// Makes the failover or failback of all machines final.
    Commit {
        /// The plan's name.
        name: String,
        #[command(flatten)]
        wait: WaitArguments,
    },
    /// Replicates all machines to the recovery site again after a failback.
    ReverseReplicate {
        /// The plan's name.
        name: String,
        #[command(flatten)]
        wait: WaitArguments,
    },
}

/// Kinds of recovery points, for machines that each have their own.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Points {
    /// The newest; of a source that is there, after a last transfer.
    Latest,
    /// The newest that the recovery site has.
    LatestProcessed,
    /// The newest that a guest agent has prepared.
    LatestAppConsistent,
}

impl Points {
    fn details(self) -> Vec<RecoveryPlanFailoverDetails> {
        let word = match self {
            Self::Latest => "Latest",
            Self::LatestProcessed => "LatestProcessed",
            Self::LatestAppConsistent => "LatestApplicationConsistent",
        };
        vec![RecoveryPlanFailoverDetails {
            instance_type: HYPERV_REPLICA_AZURE.to_owned(),
            recovery_point_type: Some(word.to_owned()),
            ..RecoveryPlanFailoverDetails::default()
        }]
    }
}

type Plan = Resource<RecoveryPlanProperties>;

pub(crate) async fn run(session: &Session, command: PlanCommand) -> anyhow::Result<Exit> {
    let path = |name: &str| {
        format!("{}/replicationRecoveryPlans/{}", session.vault, mainstay_api::encode_segment(name))
    };
    let to_recovery = Some("PrimaryToRecovery".to_owned());
    match command {
        PlanCommand::Create { name, groups, file, wait } => {
            let properties = match file {
                Some(file) => read_file(&file)?,
                None => of_groups(session, &groups).await?,
            };
            let body = Request { properties };
            begin(session, Method::PUT, &path(&name), Some(&body), &wait, &path(&name)).await
        }
        PlanCommand::List { json } => {
            let plans: Vec<Plan> = session.list("/replicationRecoveryPlans").await?;
            if json {
                output::json(&plans)?;
                return Ok(Exit::Done);
            }
            let rows = plans.into_iter().map(|plan| {
                let plan = plan.into_known();
                let it = plan.properties;
                let last = last_of(&it);
                vec![
                    plan.name,
                    it.primary_fabric_friendly_name,
                    it.recovery_fabric_friendly_name,
                    last,
                    it.last_test_failover_time.unwrap_or_else(|| "never".to_owned()),
                ]
            });
            output::table(&["PLAN", "FROM", "TO", "LAST", "LAST TEST"], rows.collect());
            Ok(Exit::Done)
        }
        PlanCommand::Show { name, json } => {
            let plan: Plan = session.client.get(&path(&name)).await?;
            if json {
                output::json(&plan)?;
            } else {
                show(session, &plan).await?;
            }
            Ok(Exit::Done)
        }
        PlanCommand::Delete { name, wait } => {
            begin(session, Method::DELETE, &path(&name), None::<&()>, &wait, &path(&name)).await
        }
        PlanCommand::TestFailover { name, recovery_points, network, wait } => {
            let (network_type, network_id) = network.input();
            let properties = RecoveryPlanFailoverInput {
                failover_direction: to_recovery,
                network_type,
                network_id,
                provider_specific_details: Some(recovery_points.details()),
                ..RecoveryPlanFailoverInput::default()
            };
            post(session, &path(&name), "testFailover", properties, &wait).await
        }
        PlanCommand::CleanupTestFailover { name, notes, wait } => {
            let properties = CommentsInput { comments: Some(notes) };
            post(session, &path(&name), "testFailoverCleanup", properties, &wait).await
        }
        PlanCommand::Failover { name, recovery_points, no_shutdown, wait } => {
            let sources = if no_shutdown { "NotRequired" } else { "Required" };
            let properties = RecoveryPlanFailoverInput {
                failover_direction: to_recovery,
                source_site_operations: Some(sources.to_owned()),
                provider_specific_details: Some(recovery_points.details()),
                ..RecoveryPlanFailoverInput::default()
            };
            post(session, &path(&name), "unplannedFailover", properties, &wait).await
        }
        PlanCommand::PlannedFailover { name, direction, sync_during_failover, create_vm, wait } => {
            let details = if direction == "PrimaryToRecovery" {
                if create_vm || sync_during_failover {
                    let text =
                        "--create-vm and --sync-during-failover are for the way home (RecoveryToPrimary)";
                    return Err(UsageError(text.to_owned()).into());
                }
                Points::Latest.details()
            } else {
                let sync = if sync_during_failover { "ForSynchronization" } else { "ForDownTime" };
                let creation = if create_vm { "CreateVmIfNotFound" } else { "NoAction" };
                vec![RecoveryPlanFailoverDetails {
                    instance_type: HYPERV_REPLICA_AZURE_FAILBACK.to_owned(),
                    data_sync_option: Some(sync.to_owned()),
                    recovery_vm_creation_option: Some(creation.to_owned()),
                    ..RecoveryPlanFailoverDetails::default()
                }]
            };
            let properties = RecoveryPlanFailoverInput {
                failover_direction: Some(direction),
                provider_specific_details: Some(details),
                ..RecoveryPlanFailoverInput::default()
            };
            post(session, &path(&name), "plannedFailover", properties, &wait).await
        }
        PlanCommand::Commit { name, wait } => {
            let verb = format!("{}/failoverCommit", path(&name));
            begin(session, Method::POST, &verb, None::<&()>, &wait, &path(&name)).await
        }
        PlanCommand::ReverseReplicate { name, wait } => {
            let verb = format!("{}/reProtect", path(&name));
            begin(session, Method::POST, &verb, None::<&()>, &wait, &path(&name)).await
        }
    }
}

async fn post(
    session: &Session,
    plan: &str,
    verb: &str,
    properties: impl serde::Serialize,
    wait: &WaitArguments,
) -> anyhow::Result<Exit> {
    let body = Request { properties };
    begin(session, Method::POST, &format!("{plan}/{verb}"), Some(&body), wait, plan).await
}

fn read_file(file: &Path) -> anyhow::Result<RecoveryPlanInput> {
    let text = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    let plan: Request<RecoveryPlanInput> = serde_json::from_slice(&text)
        .map_err(|error| UsageError(format!("{} is not a recovery plan: {error}", file.display())))?;
    Ok(plan.properties)
}

/// A plan of groups whose machines are named; it is for the site of the first.
async fn of_groups(session: &Session, groups: &[String]) -> anyhow::Result<RecoveryPlanInput> {
    let mut plan =
        RecoveryPlanInput { recovery_fabric_id: Some(AZURE.to_owned()), ..RecoveryPlanInput::default() };
    let mut read = Vec::new();
    for group in groups {
        let mut machines = Vec::new();
        for name in group.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            let item = session.item(name).await?;
            if plan.primary_fabric_id.is_none() {
                plan.primary_fabric_id =
                    item.id.split("/replicationProtectionContainers/").next().map(str::to_owned);
            }
            machines
                .push(RecoveryPlanProtectedItem { id: Some(item.into_known().id), virtual_machine_id: None });
        }
        read.push(RecoveryPlanGroup {
            group_type: "Boot".to_owned(),
            replication_protected_items: Some(machines),
            ..RecoveryPlanGroup::default()
        });
    }
    plan.groups = Some(read);
    Ok(plan)
}

/// What a plan is carrying out, or carried out last, and how that stands.
fn last_of(plan: &RecoveryPlanProperties) -> String {
    match &plan.current_scenario {
        Some(scenario) => {
            format!(
                "{} {}",
                scenario.scenario_name,
                plan.current_scenario_status.as_deref().unwrap_or_default()
            )
        }
        None => "-".to_owned(),
    }
}

async fn show(session: &Session, plan: &Plan) -> anyhow::Result<()> {
    let it = &plan.properties;
    output::line(&format!("plan:     {}", plan.name));
    output::line(&format!(
        "sites:    {} → {}",
        it.primary_fabric_friendly_name, it.recovery_fabric_friendly_name
    ));
    output::line(&format!("last:     {}", last_of(it)));
    output::line(&format!("possible: {}", it.allowed_operations.join(", ")));
    let items: Vec<Resource<mainstay_api::arm::ItemProperties>> =
        session.list("/replicationProtectedItems").await?;
    let name_of = |id: &str| {
        let item = items.iter().find(|item| item.id.eq_ignore_ascii_case(id));
        item.map_or_else(|| id.to_owned(), |item| item.properties.friendly_name.clone())
    };
    let mut rows = Vec::new();
    let mut number = 0;
    for group in &it.groups {
        let title = if group.group_type == "Boot" {
            number += 1;
            format!("Group {number}")
        } else {
            group.group_type.clone()
        };
        let actions = |actions: &Option<Vec<_>>| {
            let names = actions.iter().flatten().map(|action: &mainstay_api::arm::RecoveryPlanAction| {
                let kind =
                    action.custom_details.instance_type.trim_end_matches("ActionDetails").to_lowercase();
                format!("{} ({kind})", action.action_name)
            });
            names.collect::<Vec<_>>().join(", ")
        };
        let machines = group.replication_protected_items.iter().flatten();
        let machines: Vec<_> = machines.filter_map(|item| item.id.as_deref()).map(name_of).collect();
        let row = vec![
            title,
            actions(&group.start_group_actions),
            machines.join(", "),
            actions(&group.end_group_actions),
        ];
        if group.group_type == "Boot" || row[1..].iter().any(|cell| !cell.is_empty()) {
            rows.push(row);
        }
    }
    output::table(&["GROUP", "BEFORE", "MACHINES", "AFTER"], rows);
    Ok(())
}
