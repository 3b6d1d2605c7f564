//! Recovery plans: machines in groups, failed over in one job.

use std::collections::HashMap;
use std::sync::Arc;

use mainstay_model::{
    ConfigurationChange, Ending, JobId, Operation, RecoveryPlan,
    recovery_plan::{ActionKind, OPERATIONS, Place, kind_of},
};
use serde::{Deserialize, Serialize};

use super::{Requester, check_name};
use crate::{
    Control, ControlError,
    db::{ConfigurationJob, ItemRecord, JobRecord, Resource, ResourceKind},
    jobs::JobRequest,
    workflows::{Standing, check_script, child_job},
};

/// A recovery plan as stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryPlanRecord {
    /// Its name.
    pub name: String,
    /// The protected site of all its machines.
    pub fabric: String,
    /// The recovery site of all its machines.
    pub recovery_fabric: String,
    /// What it does.
    pub plan: RecoveryPlan,
    /// The job that carries it out now.
    pub running: Option<JobId>,
    /// The job that carried it out last.
    pub last_job: Option<JobId>,
    /// When a test failover last succeeded, milliseconds since the Unix epoch; so all times here.
    pub last_test_failover_ms: Option<i64>,
    /// When a planned failover, in either direction, last succeeded.
    pub last_planned_failover_ms: Option<i64>,
    /// When an unplanned failover last succeeded.
    pub last_unplanned_failover_ms: Option<i64>,
}

impl Resource for RecoveryPlanRecord {
    const KIND: ResourceKind = ResourceKind::RecoveryPlan;

    fn name(&self) -> String {
        self.name.clone()
    }
}

impl RecoveryPlanRecord {
    /// What the end of its job leaves in it.
    pub(crate) fn note_ending(&mut self, operation: Operation, ending: Ending, now_ms: i64) {
        self.running = None;
        if ending != Ending::Succeeded {
            return;
        }
        match operation {
            Operation::TestFailover => self.last_test_failover_ms = Some(now_ms),
            Operation::PlannedFailover | Operation::Failback => self.last_planned_failover_ms = Some(now_ms),
            Operation::UnplannedFailover => self.last_unplanned_failover_ms = Some(now_ms),
            _ => {}
        }
    }

    /// What can be asked of it now: what at least one of its machines allows.
    pub fn allowed_operations(&self, items: &[ItemRecord]) -> Vec<Operation> {
        if self.running.is_some() {
            return Vec::new();
        }
        let allows = |operation: &Operation| {
            let operation = *operation;
            items.iter().any(|item| Standing::of(item, operation) == Standing::Ready)
        };
        OPERATIONS.into_iter().filter(allows).collect()
    }
}

impl Control {
    /// Makes or changes a recovery plan. Both sites must be those of all its machines.
    pub async fn put_recovery_plan(
        &self,
        name: &str,
        fabric: &str,
        recovery_fabric: &str,
        plan: RecoveryPlan,
        by: Requester,
    ) -> Result<ConfigurationJob, ControlError> {
        check_name("recovery plan", name)?;
        plan.validate().map_err(|message| {
            ControlError::invalid(
                "InvalidRecoveryPlan",
                message,
                "Correct the plan; see docs/guides/recovery-plans.md.",
            )
        })?;
        self.check_scripts(&plan)?;
        let mut transaction = self.db.begin().await?;
        for id in plan.items() {
            let item = transaction
                .item(id)
                .await?
                .ok_or_else(|| ControlError::not_found("replicated item", id.to_string()))?;
            let is_of_sites = item.fabric.eq_ignore_ascii_case(fabric)
                && item.recovery_fabric.eq_ignore_ascii_case(recovery_fabric);
            if !is_of_sites {
                return Err(ControlError::invalid(
                    "MachineOfOtherSite",
                    format!(
                        "'{}' is replicated from '{}' to '{}', the plan is for '{fabric}' to '{recovery_fabric}'",
                        item.vm_name, item.fabric, item.recovery_fabric
                    ),
                    "Make a plan of its own for each pair of sites.",
                ));
            }
        }
        let found = transaction.resource::<RecoveryPlanRecord>(name).await?;
        let change = match &found {
            Some(_) => ConfigurationChange::UpdateRecoveryPlan,
            None => ConfigurationChange::CreateRecoveryPlan,
        };
        let record = match found {
            Some(record) => {
                idle(&record)?;
                RecoveryPlanRecord {
                    fabric: fabric.to_owned(),
                    recovery_fabric: recovery_fabric.to_owned(),
                    plan,
                    ..record
                }
            }
            None => RecoveryPlanRecord {
                name: name.to_owned(),
                fabric: fabric.to_owned(),
                recovery_fabric: recovery_fabric.to_owned(),
                plan,
                running: None,
                last_job: None,
                last_test_failover_ms: None,
                last_planned_failover_ms: None,
                last_unplanned_failover_ms: None,
            },
        };
        let job = self.configuration_job(change, name, by);
        transaction.put_resource(&record).await?;
        transaction.put_configuration_job(&job).await?;
        transaction.commit().await?;
        Ok(job)
    }

    fn check_scripts(&self, plan: &RecoveryPlan) -> Result<(), ControlError> {
        let places =
            [Place::Shutdown, Place::Failover].into_iter().chain((0..plan.groups.len()).map(Place::Group));
        for actions in places.filter_map(|place| plan.actions(place)) {
            for action in actions.start.iter().chain(&actions.end) {
                if let ActionKind::Script { path, .. } = &action.kind {
                    check_script(self, path).map_err(|error| {
                        let message = format!("action '{}': {}", action.name, error.message);
                        ControlError::invalid("ScriptNotAllowed", message, error.recommended_action)
                    })?;
                }
            }
        }
        Ok(())
    }

    /// A recovery plan by name.
    pub async fn recovery_plan(&self, name: &str) -> Result<RecoveryPlanRecord, ControlError> {
        self.db.resource(name).await?.ok_or_else(|| ControlError::not_found("recovery plan", name))
    }

    /// All recovery plans.
    pub async fn recovery_plans(&self) -> Result<Vec<RecoveryPlanRecord>, ControlError> {
        Ok(self.db.resources().await?)
    }

    /// The machines of a plan that are still protected, in its order.
    pub async fn plan_items(&self, plan: &RecoveryPlan) -> Result<Vec<ItemRecord>, ControlError> {
        let mut found = Vec::new();
        for id in plan.items() {
            found.extend(self.db.item(id).await?);
        }
        Ok(found)
    }

    /// Removes a recovery plan; its machines stay as they are.
    pub async fn remove_recovery_plan(
        &self,
        name: &str,
        by: Requester,
    ) -> Result<ConfigurationJob, ControlError> {
        let mut transaction = self.db.begin().await?;
        let record = transaction
            .resource::<RecoveryPlanRecord>(name)
            .await?
            .ok_or_else(|| ControlError::not_found("recovery plan", name))?;
        idle(&record)?;
        transaction.remove_resource::<RecoveryPlanRecord>(name).await?;
        let job = self.configuration_job(ConfigurationChange::DeleteRecoveryPlan, name, by);
        transaction.put_configuration_job(&job).await?;
        transaction.commit().await?;
        Ok(job)
    }

    /// Begins to carry a plan out. `params` are those of the machines' own jobs.
    pub async fn start_recovery_plan(
        self: &Arc<Self>,
        name: &str,
        operation: Operation,
        params: impl Serialize,
        by: Requester,
    ) -> Result<JobRecord, ControlError> {
        let record = self.recovery_plan(name).await?;
        let items = self.plan_items(&record.plan).await?;
        let allowed = record.allowed_operations(&items);
        if !allowed.contains(&operation) {
            let reason = match record.running {
                Some(job) => format!("recovery plan '{}' is being carried out (job {job})", record.name),
                None => format!("none of the machines of recovery plan '{}' allows it now", record.name),
            };
            return Err(ControlError::NotAllowed { reason, allowed });
        }
        let params = serde_json::to_value(params).map_err(|error| {
            ControlError::invalid("InvalidParameters", error.to_string(), "Please report this.")
        })?;
        self.start_plan_job(name, JobRequest { operation, params, requested_by: by.0 }).await
    }

    /// Cancels the failover that a plan is carrying out.
    pub async fn cancel_recovery_plan(self: &Arc<Self>, name: &str) -> Result<JobRecord, ControlError> {
        let record = self.recovery_plan(name).await?;
        let running = match record.running {
            Some(job) => self.db.job(job).await?.filter(|job| kind_of(job.operation).is_some()),
            None => None,
        };
        let Some(job) = running else {
            let reason = format!("no failover of recovery plan '{}' is under way", record.name);
            let items = self.plan_items(&record.plan).await?;
            return Err(ControlError::NotAllowed { reason, allowed: record.allowed_operations(&items) });
        };
        self.cancel_job(job.id).await
    }

    /// The jobs of the machines that a plan's job has started so far.
    pub async fn child_jobs(&self, job: &JobRecord) -> Result<HashMap<JobId, JobRecord>, ControlError> {
        let mut found = HashMap::new();
        for item in job.plan.iter().flat_map(|plan| plan.items()) {
            let id = child_job(job.id, item);
            if let Some(child) = self.db.job(id).await? {
                found.insert(id, self.with_progress(child));
            }
        }
        Ok(found)
    }
}

fn idle(record: &RecoveryPlanRecord) -> Result<(), ControlError> {
    match record.running {
        None => Ok(()),
        Some(job) => {
            let reason = format!("recovery plan '{}' is being carried out (job {job})", record.name);
            Err(ControlError::NotAllowed { reason, allowed: Vec::new() })
        }
    }
}
