//! Test failover and its clean-up: a copy in an isolated network; source and replication are not touched.

use async_trait::async_trait;
use mainstay_model::PointId;
use mainstay_provider::{CreateRecoveryVm, Discover, NicPlan};
use serde::{Deserialize, Serialize};

use super::{
    failover::check_host,
    points::{PointChoice, point_time_ms},
    power::{power_off, remove, start},
    vm_of_job,
};
use crate::{
    db::{ItemRecord, JobError, VmCopy},
    jobs::{Done, Patience, Step, StepAction, StepContext, Undone},
};

/// What a test failover is asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TestFailoverParams {
    /// The recovery point.
    pub point: PointChoice,
    /// A network to attach to instead of what the item's settings say; empty = an isolated one.
    pub network: Option<String>,
}

impl TestFailoverParams {
    fn network_for(&self, item: &ItemRecord) -> Option<String> {
        let network = self.network.as_ref().or(item.target.test_network.as_ref());
        network.filter(|network| !network.is_empty()).cloned()
    }
}

pub(super) fn steps() -> Vec<Step> {
    vec![
        Step::new(
            "TestFailoverPreflightChecksTask",
            "VmTfoPrerequisitesCheck",
            "Prerequisites check for test failover",
            CheckPrerequisites,
        ),
        Step::new("BeginTestFailoverTask", BEGIN, "Starting test failover", Begin),
        Step::new(
            "PrepareTestProtectedEntitiesTask",
            "VmTfoPrepareTestVm",
            "Creating test virtual machine",
            CreateCopy,
        ),
        Step::new("BootTestProtectedEntitiesTask", "VmTfoBootTestVm", "Start the virtual machine", StartCopy),
    ]
}

pub(super) fn cleanup_steps() -> Vec<Step> {
    vec![
        Step::new(
            "TestFailoverCleanupPreflightChecksTask",
            "VmTfoCleanupPreflightsCheck",
            "Prerequisites check for test failover cleanup",
            CheckCleanup,
        ),
        Step::new("EndTestFailoverTask", "VmTfoEndFailover", "Ending test failover", StopCopy)
            .point_of_no_return(),
        Step::new(
            "CleanupTestProtectedEntitiesTask",
            "VmTfoDeleteTestVm",
            "Clean up the test virtual machine",
            RemoveCopy,
        ),
    ]
}

const BEGIN: &str = "VmTfoInitiateFailover";

struct CheckPrerequisites;

#[async_trait]
impl StepAction for CheckPrerequisites {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let params: TestFailoverParams = step.params()?;
        let target = step.call(item.recovery_provider, Discover {}, Patience::RESTART).await?;
        check_host(&target.host)?;
        let network = params.network_for(&item);
        if let Some(network) = network
            && !target.inventory.networks.iter().any(|known| known.name == network)
        {
            let known: Vec<_> =
                target.inventory.networks.iter().map(|network| network.name.as_str()).collect();
            return Err(JobError::new(
                "NetworkNotFound",
                format!("the recovery site has no network '{network}'"),
                format!("Its networks are: {}. Without a network the copy is isolated.", known.join(", ")),
            ));
        }
        let name = test_name(&item);
        if let Some(other) = target.inventory.vms.iter().find(|vm| vm.name == name) {
            return Err(JobError::new(
                "NameInUse",
                format!("the recovery site has a VM '{name}' already ({})", other.id),
                "Remove or rename that VM.",
            ));
        }
        Ok(Done::default())
    }
}

fn test_name(item: &ItemRecord) -> String {
    format!("{}-test", item.target.name)
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct Begun {
    point: PointId,
    taken_at_ms: i64,
}

struct Begin;

#[async_trait]
impl StepAction for Begin {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let params: TestFailoverParams = step.params()?;
        let point = step.control.choose_point(&item, params.point).await?;
        let begun = Begun { point: PointId(point.id), taken_at_ms: point_time_ms(&point) };
        let vm = vm_of_job(item.id, step.job.id);
        step.control.hold_point(item.id, begun.point, vm).await?;
        Ok(Done::with(&begun)?.changing(move |item| {
            item.test_vm = Some(VmCopy {
                vm,
                point: begun.point,
                taken_at_ms: begun.taken_at_ms,
                is_hydrated: false,
                bytes_done: 0,
                bytes_total: 0,
            });
        }))
    }

    async fn undo(&self, step: &StepContext<'_>) -> Result<Undone, JobError> {
        let item = step.item_id();
        step.control.release_point(item, vm_of_job(item, step.job.id)).await?;
        Ok(Undone { change: Some(Box::new(|item| item.test_vm = None)), ..Undone::default() })
    }
}

struct CreateCopy;

#[async_trait]
impl StepAction for CreateCopy {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let params: TestFailoverParams = step.params()?;
        let begun: Begun = step.expect_output(BEGIN)?;
        let (definition, disks) = step.control.point_contents(item.id, begun.point).await?;
        let network = params.network_for(&item);
        let nics = item
            .target
            .nics
            .iter()
            .map(|nic| NicPlan { network: network.clone(), address: None, ..nic.clone() })
            .collect();
        let create = CreateRecoveryVm {
            item: item.id,
            generation: item.state.generation,
            vm: vm_of_job(item.id, step.job.id),
            point: begun.point,
            name: test_name(&item),
            is_test: true,
            definition,
            disks,
            vcpus: item.target.vcpus,
            memory_bytes: item.target.memory_bytes,
            nics,
            autostart: false,
        };
        step.call(item.recovery_provider, create, Patience::RESTART).await?;
        Ok(Done::default())
    }

    async fn undo(&self, step: &StepContext<'_>) -> Result<Undone, JobError> {
        let item = step.item().await?;
        let vm = vm_of_job(item.id, step.job.id);
        remove(step, &item, vm, Patience::OUTAGE).await?;
        Ok(Undone::default())
    }
}

struct StartCopy;

#[async_trait]
impl StepAction for StartCopy {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let vm = vm_of_job(item.id, step.job.id);
        start(step, &item, item.recovery_provider, vm, Patience::RESTART).await?;
        Ok(Done::default())
    }
}

struct CheckCleanup;

#[async_trait]
impl StepAction for CheckCleanup {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        // Cleaning up needs the recovery site; without it nothing is begun.
        step.call(item.recovery_provider, Discover {}, Patience::RESTART).await?;
        Ok(Done::default())
    }
}

struct StopCopy;

#[async_trait]
impl StepAction for StopCopy {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let Some(copy) = item.test_vm else { return Ok(Done::skipped()) };
        power_off(step, &item, item.recovery_provider, copy.vm, Patience::OUTAGE).await?;
        Ok(Done::default())
    }
}

struct RemoveCopy;

#[async_trait]
impl StepAction for RemoveCopy {
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError> {
        let item = step.item().await?;
        let Some(copy) = item.test_vm else { return Ok(Done::skipped()) };
        remove(step, &item, copy.vm, Patience::OUTAGE).await?;
        step.control.release_point(item.id, copy.vm).await?;
        Ok(Done::default().changing(|item| item.test_vm = None))
    }
}
