//! Recovery plans: `replicationRecoveryPlans/{P}/…`.

use axum::response::Response;
use hyper::Method;
use mainstay_api::arm::{
    AZURE, CommentsInput, FailoverDetails, FailoverInput, HYPERV_REPLICA_AZURE, JobTask, RecoveryPlanAction,
    RecoveryPlanActionDetails, RecoveryPlanFailoverInput, RecoveryPlanGroup, RecoveryPlanInput,
    RecoveryPlanProperties, RecoveryPlanProtectedItem, Resource,
};
use mainstay_control::{
    ControlError,
    app::{FabricRecord, RecoveryPlanRecord},
    db::{ItemRecord, JobRecord},
    workflows::{PointChoice, TestFailoverParams, child_job},
};
use mainstay_model::{
    ItemId, Operation, RecoveryPlan, projection,
    recovery_plan::{
        self, ActionKind, Actions, Direction, FailoverKind, PlanAction, PlanGroup, PlanTask,
        SCRIPT_SECONDS_MAX,
    },
};

use super::{
    Call, body,
    convert::{self, Ids, last_segment, segment_after, time_text},
    error::ApiError,
    items::{expect_direction, expect_type, failback_params, failover_params, point_choice, test_network},
    json, list,
};

/// How long a script may run that says nothing of it.
const SCRIPT_SECONDS: u32 = 600;

pub(super) async fn dispatch(call: &Call) -> Result<Response, ApiError> {
    let path = call.path();
    let path: Vec<&str> = path.iter().skip(1).map(String::as_str).collect();
    let control = call.control();
    let by = call.who.clone();
    let name = call.segments.get(1).map_or("", String::as_str);
    let job = match (&call.method, path.as_slice()) {
        (&Method::GET, []) => {
            let mut shown = Vec::new();
            for record in control.recovery_plans().await? {
                let mut plan = show(call, &record).await?;
                // As recorded: groups are shown with one plan only.
                plan.properties.groups.clear();
                shown.push(plan);
            }
            return list(shown);
        }
        (&Method::GET, [_]) => return json(&show(call, &control.recovery_plan(name).await?).await?),
        (&Method::PUT, [_]) => {
            let input: RecoveryPlanInput = call.properties(body::CREATE_RECOVERY_PLAN)?;
            let fabric = required("primaryFabricId", input.primary_fabric_id.as_deref())?;
            let fabric = control.fabric(last_segment(fabric)).await?;
            let plan = read_plan(call, input.groups.as_deref(), "groups").await?;
            let recovery = required("recoveryFabricId", input.recovery_fabric_id.as_deref())?;
            let recovery = recovery_fabric(call, recovery, &plan).await?;
            control.put_recovery_plan(name, &fabric.name, &recovery, plan, by).await?.id
        }
        (&Method::PATCH, [_]) => {
            let input: RecoveryPlanInput = call.properties(body::UPDATE_RECOVERY_PLAN)?;
            let record = control.recovery_plan(name).await?;
            let plan = match &input.groups {
                Some(groups) => read_plan(call, Some(groups), "groups").await?,
                None => record.plan.clone(),
            };
            control
                .put_recovery_plan(&record.name, &record.fabric, &record.recovery_fabric, plan, by)
                .await?
                .id
        }
        (&Method::DELETE, [_]) => control.remove_recovery_plan(name, by).await?.id,
        (&Method::POST, [_, verb]) => begin(call, name, verb).await?,
        _ => return Err(ApiError::no_such_path()),
    };
    Ok(call.accepted(job, &Ids(&call.vault).recovery_plan(name)))
}

async fn begin(call: &Call, name: &str, verb: &str) -> Result<mainstay_model::JobId, ApiError> {
    let control = call.control();
    let by = call.who.clone();
    let timeout = call.api.shutdown_timeout;
    let job = match verb {
        "testfailover" => {
            let input = failover_input(call.properties(body::PLAN_FAILOVER)?);
            expect_direction(&input, "PrimaryToRecovery")?;
            expect_type(&input, HYPERV_REPLICA_AZURE)?;
            let params = TestFailoverParams {
                point: point_choice(&input.provider_specific_details, PointChoice::LatestProcessed)?,
                network: test_network(&input)?,
            };
            control.start_recovery_plan(name, Operation::TestFailover, params, by).await?
        }
        "testfailovercleanup" => {
            let input: CommentsInput = call.properties(body::COMMENTS)?;
            let params = serde_json::json!({ "notes": input.comments.unwrap_or_default() });
            control.start_recovery_plan(name, Operation::TestFailoverCleanup, params, by).await?
        }
        "unplannedfailover" => {
            let input = failover_input(call.properties(body::PLAN_FAILOVER)?);
            expect_direction(&input, "PrimaryToRecovery")?;
            let params = failover_params(&input, timeout)?;
            control.start_recovery_plan(name, Operation::UnplannedFailover, params, by).await?
        }
        "plannedfailover" => {
            let input = failover_input(call.properties(body::PLAN_FAILOVER)?);
            if input.failover_direction.as_deref().and_then(Direction::parse)
                == Some(Direction::RecoveryToPrimary)
            {
                let params = failback_params(&input, timeout)?;
                control.start_recovery_plan(name, Operation::Failback, params, by).await?
            } else {
                expect_direction(&input, "PrimaryToRecovery")?;
                let mut params = failover_params(&input, timeout)?;
                params.shutdown_source = true;
                control.start_recovery_plan(name, Operation::PlannedFailover, params, by).await?
            }
        }
        "failovercommit" => control.start_recovery_plan(name, Operation::Commit, (), by).await?,
        "failovercancel" => control.cancel_recovery_plan(name).await?,
        "reprotect" => control.start_recovery_plan(name, Operation::ReverseReplicate, (), by).await?,
        _ => return Err(ApiError::no_such_path()),
    };
    Ok(job.id)
}

/// A plan's failover request as one of a machine.
fn failover_input(input: RecoveryPlanFailoverInput) -> FailoverInput {
    let details = input.provider_specific_details.unwrap_or_default().into_iter().next().unwrap_or_default();
    FailoverInput {
        failover_direction: input.failover_direction,
        source_site_operations: input.source_site_operations,
        network_type: input.network_type,
        network_id: input.network_id,
        provider_specific_details: FailoverDetails {
            instance_type: details.instance_type,
            recovery_point_id: details.recovery_point_type,
            data_sync_option: details.data_sync_option,
            recovery_vm_creation_option: details.recovery_vm_creation_option,
            provider_id_for_alternate_recovery: None,
        },
    }
}

fn required<'a>(field: &str, value: Option<&'a str>) -> Result<&'a str, ApiError> {
    value.filter(|value| !value.is_empty()).ok_or_else(|| invalid(field, "nothing", "the id of a fabric"))
}

fn invalid(field: &str, value: &str, expected: &str) -> ApiError {
    ApiError::bad_request(
        "InvalidRequestBody",
        format!("properties.{field}: '{value}' is not {expected}"),
        format!("Send {expected}."),
    )
}

/// The recovery site of a plan: the one named, or that of its machines.
async fn recovery_fabric(call: &Call, id: &str, plan: &RecoveryPlan) -> Result<String, ApiError> {
    if !id.eq_ignore_ascii_case(AZURE) {
        return Ok(call.control().fabric(last_segment(id)).await?.name);
    }
    let first = plan.items().next().ok_or_else(|| invalid("groups", "[]", "a list with machines"))?;
    Ok(call.control().item(first).await?.recovery_fabric)
}

async fn read_plan(
    call: &Call,
    groups: Option<&[RecoveryPlanGroup]>,
    field: &str,
) -> Result<RecoveryPlan, ApiError> {
    let mut plan = RecoveryPlan::default();
    for (index, group) in groups.unwrap_or_default().iter().enumerate() {
        let field = format!("{field}[{index}]");
        let actions = Actions {
            start: read_actions(group.start_group_actions.as_deref(), &format!("{field}.startGroupActions"))?,
            end: read_actions(group.end_group_actions.as_deref(), &format!("{field}.endGroupActions"))?,
        };
        let machines = group.replication_protected_items.as_deref().unwrap_or_default();
        match group.group_type.to_lowercase().as_str() {
            "boot" => {
                let mut items = Vec::new();
                for (index, machine) in machines.iter().enumerate() {
                    let field = format!("{field}.replicationProtectedItems[{index}].id");
                    items.push(find_item(call, machine, &field).await?);
                }
                plan.groups.push(PlanGroup { items, actions });
            }
            kind @ ("shutdown" | "failover") => {
                if !machines.is_empty() {
                    let told = format!("{} machines", machines.len());
                    let field = format!("{field}.replicationProtectedItems");
                    return Err(invalid(&field, &told, "empty, as only Boot groups have machines"));
                }
                if kind == "shutdown" {
                    plan.shutdown = actions;
                } else {
                    plan.failover = actions;
                }
            }
            _ => {
                let field = format!("{field}.groupType");
                return Err(invalid(&field, &group.group_type, "Shutdown, Failover or Boot"));
            }
        }
    }
    Ok(plan)
}

/// The item that a machine of a plan is, by its ARM id.
async fn find_item(
    call: &Call,
    machine: &RecoveryPlanProtectedItem,
    field: &str,
) -> Result<ItemId, ApiError> {
    let id = machine.id.as_deref().unwrap_or_default();
    let wrong = || invalid(field, id, "the id of a replicated item of this vault");
    let fabric = segment_after(id, "replicationFabrics").ok_or_else(wrong)?;
    let name = segment_after(id, "replicationProtectedItems").ok_or_else(wrong)?;
    match call.control().item_named(fabric, name).await {
        Ok(item) => Ok(item.id),
        Err(ControlError::NotFound { .. }) => Err(wrong()),
        Err(error) => Err(error.into()),
    }
}

fn read_actions(actions: Option<&[RecoveryPlanAction]>, field: &str) -> Result<Vec<PlanAction>, ApiError> {
    let read = |(index, action)| read_action(action, &format!("{field}[{index}]"));
    actions.unwrap_or_default().iter().enumerate().map(read).collect()
}

fn read_action(action: &RecoveryPlanAction, field: &str) -> Result<PlanAction, ApiError> {
    let mut failovers = Vec::new();
    for text in &action.failover_types {
        failovers.push(match text.to_lowercase().as_str() {
            "testfailover" => FailoverKind::TestFailover,
            "plannedfailover" => FailoverKind::PlannedFailover,
            "unplannedfailover" => FailoverKind::UnplannedFailover,
            _ => {
                let field = format!("{field}.failoverTypes");
                return Err(invalid(&field, text, "TestFailover, PlannedFailover or UnplannedFailover"));
            }
        });
    }
    let mut directions = Vec::new();
    for text in &action.failover_directions {
        let field = format!("{field}.failoverDirections");
        let direction = Direction::parse(text);
        directions
            .push(direction.ok_or_else(|| invalid(&field, text, "PrimaryToRecovery or RecoveryToPrimary"))?);
    }
    let details = &action.custom_details;
    let kind = match details.instance_type.as_str() {
        "ManualActionDetails" => {
            ActionKind::Manual { instructions: details.description.clone().unwrap_or_default() }
        }
        "ScriptActionDetails" => {
            let timeout = details.timeout.as_deref().filter(|timeout| !timeout.is_empty());
            let is_primary = match details.fabric_location.as_deref() {
                Some(text) if text.eq_ignore_ascii_case("Primary") => true,
                Some(text) if text.eq_ignore_ascii_case("Recovery") => false,
                other => {
                    let field = format!("{field}.customDetails.fabricLocation");
                    return Err(invalid(&field, other.unwrap_or_default(), "Primary or Recovery"));
                }
            };
            ActionKind::Script {
                path: details.path.clone().unwrap_or_default(),
                timeout_seconds: timeout.map_or(Ok(SCRIPT_SECONDS), |timeout| {
                    read_seconds(timeout).ok_or_else(|| {
                        let field = format!("{field}.customDetails.timeout");
                        let expected = format!("a duration of 1 to {SCRIPT_SECONDS_MAX} s, such as PT10M");
                        invalid(&field, timeout, &expected)
                    })
                })?,
                is_primary,
            }
        }
        other => {
            let field = format!("{field}.customDetails.instanceType");
            return Err(invalid(
                &field,
                other,
                "ManualActionDetails or ScriptActionDetails (runbooks are Azure's)",
            ));
        }
    };
    Ok(PlanAction { name: action.action_name.clone(), failovers, directions, kind })
}

/// Seconds of an ISO 8601 duration, or a number of seconds.
fn read_seconds(text: &str) -> Option<u32> {
    if let Ok(seconds) = text.parse() {
        return Some(seconds);
    }
    let span: jiff::Span = text.parse().ok()?;
    let seconds = span.total((jiff::Unit::Second, jiff::SpanRelativeTo::days_are_24_hours())).ok()?;
    // Beyond a day the plan refuses it by name.
    (seconds >= 0.0 && seconds <= f64::from(u32::MAX)).then_some(seconds as u32)
}

fn show_actions(actions: &[PlanAction]) -> Vec<RecoveryPlanAction> {
    let show = |action: &PlanAction| RecoveryPlanAction {
        action_name: action.name.clone(),
        failover_types: action.failovers.iter().map(|kind| format!("{kind:?}")).collect(),
        failover_directions: action.directions.iter().map(|direction| format!("{direction:?}")).collect(),
        custom_details: match &action.kind {
            ActionKind::Manual { instructions } => RecoveryPlanActionDetails {
                instance_type: "ManualActionDetails".to_owned(),
                description: Some(instructions.clone()),
                ..RecoveryPlanActionDetails::default()
            },
            ActionKind::Script { path, timeout_seconds, is_primary } => RecoveryPlanActionDetails {
                instance_type: "ScriptActionDetails".to_owned(),
                path: Some(path.clone()),
                timeout: Some(format!("PT{timeout_seconds}S")),
                fabric_location: Some(if *is_primary { "Primary" } else { "Recovery" }.to_owned()),
                ..RecoveryPlanActionDetails::default()
            },
        },
    };
    actions.iter().map(show).collect()
}

fn show_group(kind: &str, machines: Vec<RecoveryPlanProtectedItem>, actions: &Actions) -> RecoveryPlanGroup {
    RecoveryPlanGroup {
        group_type: kind.to_owned(),
        replication_protected_items: Some(machines),
        start_group_actions: Some(show_actions(&actions.start)),
        end_group_actions: Some(show_actions(&actions.end)),
    }
}

async fn show(
    call: &Call,
    record: &RecoveryPlanRecord,
) -> Result<Resource<RecoveryPlanProperties>, ApiError> {
    let control = call.control();
    let ids = Ids(&call.vault);
    let items = control.plan_items(&record.plan).await?;
    let last = match record.last_job {
        Some(job) => control.db.job(job).await.map_err(ControlError::from)?,
        None => None,
    };
    let fabric = control.fabric(&record.fabric).await?;
    let machine = |fabric: &FabricRecord, item: &ItemRecord| RecoveryPlanProtectedItem {
        id: Some(ids.item(fabric, &item.name)),
        virtual_machine_id: Some(item.vm.to_string()),
    };
    let mut groups = vec![
        show_group("Shutdown", Vec::new(), &record.plan.shutdown),
        show_group("Failover", Vec::new(), &record.plan.failover),
    ];
    for group in &record.plan.groups {
        let members = group.items.iter().filter_map(|id| items.iter().find(|item| item.id == *id));
        groups.push(show_group("Boot", members.map(|item| machine(&fabric, item)).collect(), &group.actions));
    }
    let allowed = record.allowed_operations(&items).into_iter().filter_map(projection::operation_name);
    let (status, description) = last.as_ref().map(convert::job_state).unzip();
    Ok(convert::resource(
        ids.recovery_plan(&record.name),
        "replicationRecoveryPlans",
        RecoveryPlanProperties {
            friendly_name: record.name.clone(),
            primary_fabric_id: ids.fabric(&record.fabric),
            primary_fabric_friendly_name: record.fabric.clone(),
            recovery_fabric_id: ids.fabric(&record.recovery_fabric),
            recovery_fabric_friendly_name: record.recovery_fabric.clone(),
            failover_deployment_model: "ResourceManager".to_owned(),
            replication_providers: vec![HYPERV_REPLICA_AZURE.to_owned()],
            allowed_operations: allowed.map(str::to_owned).collect(),
            last_planned_failover_time: record.last_planned_failover_ms.map(time_text),
            last_unplanned_failover_time: record.last_unplanned_failover_ms.map(time_text),
            last_test_failover_time: record.last_test_failover_ms.map(time_text),
            current_scenario: last.as_ref().map(|job| convert::current_scenario(&ids, Some(job))),
            current_scenario_status: status.map(str::to_owned),
            current_scenario_status_description: description.map(str::to_owned),
            groups,
            provider_specific_details: Vec::new(),
        },
    ))
}

/// Completes the tasks of a recovery plan's job: what actions are, and which machines' jobs belong to a group.
pub(super) fn complete_tasks(
    ids: &Ids<'_>,
    record: &JobRecord,
    plan: &RecoveryPlan,
    children: &convert::Children,
    tasks: &mut [JobTask],
) {
    let kinds = recovery_plan::tasks(plan, record.operation);
    for ((task, kind), step) in tasks.iter_mut().zip(kinds).zip(&record.steps) {
        let machines: Vec<ItemId> = match kind {
            PlanTask::Group(index) => {
                plan.groups.get(index).map(|group| group.items.clone()).unwrap_or_default()
            }
            PlanTask::All | PlanTask::SynchronizeAll => plan.items().collect(),
            PlanTask::Action(place, side, index) => {
                let Some(action) = plan.action(place, side, index) else { continue };
                let details = match &action.kind {
                    ActionKind::Manual { instructions } => serde_json::json!({
                        "instanceType": "ManualActionTaskDetails",
                        "name": action.name,
                        "instructions": instructions,
                        "observation": "",
                    }),
                    ActionKind::Script { path, is_primary, .. } => serde_json::json!({
                        "instanceType": "ScriptActionTaskDetails",
                        "name": action.name,
                        "path": path,
                        "output": step.output["output"].as_str().unwrap_or_default(),
                        "isPrimarySideScript": is_primary,
                    }),
                };
                task.task_type = details["instanceType"].as_str().unwrap_or_default().to_owned();
                task.custom_details = Some(details);
                continue;
            }
            _ => continue,
        };
        let group_type = match kind {
            PlanTask::Group(_) => "BootGroup",
            PlanTask::SynchronizeAll => "RpFailbackDataSyncTask",
            _ => "AllMachines",
        };
        let child_tasks = machines.iter().filter_map(|item| children.get(&child_job(record.id, *item)));
        let child_tasks: Vec<_> = child_tasks.map(|child| machine_task(ids, child)).collect();
        task.task_type = "RecoveryPlanGroupTaskDetails".to_owned();
        task.group_task_custom_details = Some(serde_json::json!({
            "instanceType": "RecoveryPlanGroupTaskDetails",
            "name": task.friendly_name,
            "groupId": task.name,
            "rpGroupType": group_type,
            "childTasks": child_tasks,
        }));
    }
}

/// A machine's job as a task of its plan's job.
fn machine_task(ids: &Ids<'_>, child: &JobRecord) -> JobTask {
    let (state, description) = convert::job_state(child);
    let all = child
        .steps
        .iter()
        .flat_map(|step| step.errors.iter().map(|error| convert::job_error(child, step, error)));
    JobTask {
        task_id: child.id.to_string(),
        name: child.item_name.clone(),
        start_time: Some(time_text(child.created_ms)),
        end_time: Some(child.ended_ms.map_or_else(convert::no_time, time_text)),
        allowed_actions: Vec::new(),
        friendly_name: child.vm_name.clone(),
        state: state.to_owned(),
        state_description: description.to_owned(),
        task_type: "VirtualMachineTaskDetails".to_owned(),
        custom_details: Some(serde_json::json!({
            "instanceType": "VirtualMachineTaskDetails",
            "skippedReason": "None",
            "skippedReasonString": null,
            "jobTask": {
                "jobId": ids.job(child.id),
                "jobFriendlyName": projection::friendly_name(child.operation),
                "targetObjectId": child.item.to_string(),
                "targetObjectName": child.vm_name,
                "targetInstanceType": "Vm",
                "jobScenarioName": projection::scenario_name(child.operation),
            },
        })),
        group_task_custom_details: None,
        errors: all.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_iso_8601_or_seconds() {
        let good = [("90", 90), ("PT10M", 600), ("P0Y0M0DT0H10M0S", 600), ("P1D", 86_400), ("PT1H30M", 5400)];
        for (text, seconds) in good {
            assert_eq!(read_seconds(text), Some(seconds), "{text}");
        }
        for text in ["", "soon", "-5", "-PT1M", "P1Y", "PT", "99999999999"] {
            assert_eq!(read_seconds(text), None, "{text}");
        }
    }
}
