//! Every verb, and waiting for what becomes of it.

use mainstay_control::{
    Clock as _, ControlError,
    app::{EnableRequest, Requester},
    db::{ItemRecord, JobRecord, JobState, TargetRecord},
    workflows::{FailbackParams, FailoverParams, PointChoice, TestFailoverParams},
};
use mainstay_model::{Ending, JobId, Operation, Phase, ProviderId, ReplicationPolicy};

use mainstay_provider::PowerState;

use super::{Host, World, vm_named};
use crate::trace;

/// How a job stands when it does not go on by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobEnd {
    /// It is over.
    Ended(Ending),
    /// It waits for a person.
    Suspended,
}

pub(super) fn by() -> Requester {
    Requester("test".to_owned())
}

impl World {
    /// Begins to protect a VM.
    pub async fn enable(&self, name: &str) -> Result<JobRecord, ControlError> {
        self.enable_without(name, &[]).await
    }

    /// Begins to protect a VM without some of its disks.
    pub async fn enable_without(&self, name: &str, excluded: &[&str]) -> Result<JobRecord, ControlError> {
        let request = EnableRequest {
            name: name.to_owned(),
            fabric: "home".to_owned(),
            vm: vm_named(name),
            policy: "policy".to_owned(),
            excluded_disks: excluded.iter().map(|&key| key.to_owned()).collect(),
            target: TargetRecord::default(),
        };
        self.ask(|control| async move { control.enable_protection(request, by()).await }).await
    }

    /// Protects a VM and waits until it is protected.
    pub async fn protect(&self, name: &str) {
        let job = self.enable(name).await.expect("protection begins");
        assert_eq!(self.end(job.id).await, JobEnd::Ended(Ending::Succeeded));
        self.until("the VM is protected", async |world| world.phase(name).await == Some(Phase::Protected))
            .await;
        self.settle().await;
    }

    /// Begins an operation on an item with the usual parameters.
    pub async fn begin(&self, name: &str, operation: Operation) -> Result<JobRecord, ControlError> {
        let failover =
            FailoverParams { point: PointChoice::Latest, shutdown_source: true, shutdown_timeout_ms: 1_000 };
        match operation {
            Operation::EnableProtection => self.enable(name).await,
            Operation::UnplannedFailover => self.fail_over(name, failover).await,
            Operation::Failback => self.fail_back(name, true).await,
            Operation::ChangeRecoveryPoint => self.change_point(name, PointChoice::LatestProcessed).await,
            _ => {
                let item = self.expect_item(name).await;
                self.ask(|control| async move {
                    match operation {
                        Operation::TestFailover => {
                            let params =
                                TestFailoverParams { point: PointChoice::LatestProcessed, network: None };
                            control.test_failover(&item, params, by()).await
                        }
                        Operation::TestFailoverCleanup => {
                            control.test_failover_cleanup(&item, "", by()).await
                        }
                        Operation::PlannedFailover => control.planned_failover(&item, failover, by()).await,
                        Operation::Commit => control.commit(&item, by()).await,
                        Operation::ReverseReplicate => control.reverse_replicate(&item, by()).await,
                        Operation::Resynchronize => control.resynchronize(&item, by()).await,
                        Operation::UpdateProperties => {
                            let target = TargetRecord { vcpus: Some(4), ..item.target.clone() };
                            control.update_item_target(&item, target, by()).await
                        }
                        Operation::DisableProtection => control.disable_protection(&item, false, by()).await,
                        other => panic!("{other:?} is not asked for by people"),
                    }
                })
                .await
            }
        }
    }

    /// Begins an unplanned failover.
    pub async fn fail_over(&self, name: &str, params: FailoverParams) -> Result<JobRecord, ControlError> {
        let item = self.expect_item(name).await;
        self.ask(|control| async move { control.unplanned_failover(&item, params, by()).await }).await
    }

    /// Begins a failback.
    pub async fn fail_back(&self, name: &str, synchronize_before: bool) -> Result<JobRecord, ControlError> {
        self.fail_back_to(name, synchronize_before, None).await
    }

    /// Begins a failback to a host.
    pub async fn fail_back_to(
        &self,
        name: &str,
        synchronize_before: bool,
        host: Option<ProviderId>,
    ) -> Result<JobRecord, ControlError> {
        let params = FailbackParams { synchronize_before, create_vm: true, host, shutdown_timeout_ms: 1_000 };
        let item = self.expect_item(name).await;
        self.ask(|control| async move { control.failback(&item, params, by()).await }).await
    }

    /// Begins to run another recovery point.
    pub async fn change_point(&self, name: &str, point: PointChoice) -> Result<JobRecord, ControlError> {
        let item = self.expect_item(name).await;
        self.ask(|control| async move { control.change_recovery_point(&item, point, by()).await }).await
    }

    /// Begins an operation, completes it where it waits for a person, and expects that it succeeds.
    pub async fn run(&self, name: &str, operation: Operation) {
        let job = self.begin(name, operation).await.expect("the operation is allowed");
        assert_eq!(
            self.complete(job.id).await,
            Ending::Succeeded,
            "{operation:?}: {}",
            self.tell(job.id).await
        );
        self.settle().await;
    }

    /// Waits until a job does not go on by itself.
    pub async fn end(&self, job: JobId) -> JobEnd {
        let ended = |job: &JobRecord| match job.state {
            JobState::Ended(ending) => Some(JobEnd::Ended(ending)),
            JobState::Suspended => Some(JobEnd::Suspended),
            JobState::InProgress | JobState::Cancelling => None,
        };
        self.until("the job is over", async |world| ended(&world.job(job).await).is_some()).await;
        let end = ended(&self.job(job).await).expect("a job that is over stays so");
        trace::note(format_args!("job {job}: {end:?}"));
        end
    }

    /// Waits for a job's end, and says *Complete failover* when it asks.
    pub async fn complete(&self, job: JobId) -> Ending {
        loop {
            match self.end(job).await {
                JobEnd::Ended(ending) => return ending,
                JobEnd::Suspended => {
                    let resumed = self.ask(|control| async move { control.resume_job(job).await }).await;
                    resumed.expect("a suspended job goes on");
                }
            }
        }
    }

    /// Reads a job.
    pub async fn job(&self, job: JobId) -> JobRecord {
        self.ask(|control| async move { control.job(job).await }).await.expect("the job is read")
    }

    /// What went wrong in a job.
    pub async fn tell(&self, job: JobId) -> String {
        let job = self.job(job).await;
        let step = |step: &mainstay_control::db::StepRecord| {
            let errors: Vec<_> = step.errors.iter().map(|error| error.message.as_str()).collect();
            format!("{} {:?} {errors:?}", step.name, step.state)
        };
        job.steps.iter().map(step).collect::<Vec<_>>().join("; ")
    }

    /// Makes the next replication cycle due and waits until the item has a newer point.
    pub async fn cycle(&self, name: &str) {
        let item = self.expect_item(name).await;
        let (before, not_before_ms) = (item.replication.last_point, item.replication.not_before_ms);
        let policy = self.ask(move |control| async move { control.policy(&item.policy).await }).await;
        let frequency_seconds = policy.expect("the policy").policy.copy_frequency_seconds;
        // Or when the pause after a failed one is over.
        let pause_ms = not_before_ms.map_or(0, |until_ms| until_ms - self.clock.now_ms());
        self.clock.advance_ms(pause_ms.max(i64::from(frequency_seconds) * 1_000));
        self.control().changed.notify_waiters();
        self.until("a replication cycle has ended", async |world| {
            world.item(name).await.is_some_and(|item| item.replication.last_point != before)
        })
        .await;
        self.settle().await;
    }

    /// Waits until no copy of a VM runs but the active one: hosts are read, and what is found there is stopped.
    pub async fn until_old_copies_are_off(&self, name: &str) {
        self.clock.advance_ms(31_000);
        self.control().changed.notify_waiters();
        self.until("old copies are off", async |world| {
            let Some(item) = world.item(name).await else { return true };
            let runs = |host: &Host| {
                let vm = world.old_copy(&item, host);
                vm.and_then(|vm| host.hypervisor.view(vm))
                    .is_some_and(|view| view.power == PowerState::Running)
            };
            item.stand_downs.is_empty() && !world.hosts().any(runs)
        })
        .await;
    }

    /// Waits until no job and no cycle is at work and the former active side has stood down.
    pub async fn settle(&self) {
        self.until("everything has settled", async |world| {
            let jobs = world.ask(|control| async move { control.db.open_jobs().await }).await;
            let is_working = |job: &JobRecord| job.state != JobState::Suspended;
            if jobs.expect("jobs are read").iter().any(is_working) {
                return false;
            }
            // An operation that was cancelled cleans up after itself.
            if world.open_captures() > 0 {
                return false;
            }
            let items = world.ask(|control| async move { control.db.items().await }).await;
            let home_is_there = world.control().sites.is_connected(world.home.provider);
            items.expect("items are read").iter().all(|item| {
                world.control().cycles.progress(item.id).is_none()
                    && (item.state.running.is_some() || item.stand_downs.is_empty() || !home_is_there)
                    && item.state.phase != Phase::FinalizingProtection
                    && (item.state.phase != Phase::InitialReplication || !home_is_there)
            })
        })
        .await;
    }

    /// Changes the policy that everything is protected under.
    pub async fn set_policy(&self, policy: ReplicationPolicy) {
        let put =
            self.ask(move |control| async move { control.put_policy("policy", policy, by()).await }).await;
        put.expect("the policy is valid");
    }

    /// Changes what the recovery VM shall be.
    pub async fn update_target(&self, name: &str, target: TargetRecord) {
        let item = self.expect_item(name).await;
        let job =
            self.ask(|control| async move { control.update_item_target(&item, target, by()).await }).await;
        let job = job.expect("the change is allowed");
        assert_eq!(self.end(job.id).await, JobEnd::Ended(Ending::Succeeded));
    }

    async fn expect_item(&self, name: &str) -> ItemRecord {
        self.item(name).await.expect("the VM is protected")
    }
}
