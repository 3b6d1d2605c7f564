//! Every workflow, and how a world comes to where it can begin.

use mainstay_control::{
    db::{JobCondition, JobEntry, JobRecord},
    workflows::{FailoverParams, PointChoice},
};
use mainstay_model::{Operation, Phase};
use mainstay_sim::World;

pub(crate) const VM: &str = "web";

/// A workflow in one of its variants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Workflow {
    Enable,
    Finalize,
    TestFailover,
    TestFailoverCleanup,
    FailoverWithShutdown,
    FailoverWithoutShutdown,
    FailoverOfDeadSource,
    PlannedFailover,
    ChangePoint,
    CommitFailover,
    FailbackSynchronizedBefore,
    FailbackSynchronizedDuring,
    CommitFailback,
    ReverseReplicate,
    Resynchronize,
    UpdateProperties,
    DisableProtected,
    DisableFailedOver,
}

impl Workflow {
    pub(crate) fn operation(self) -> Operation {
        match self {
            Self::Enable => Operation::EnableProtection,
            Self::Finalize => Operation::FinalizeProtection,
            Self::TestFailover => Operation::TestFailover,
            Self::TestFailoverCleanup => Operation::TestFailoverCleanup,
            Self::FailoverWithShutdown | Self::FailoverWithoutShutdown | Self::FailoverOfDeadSource => {
                Operation::UnplannedFailover
            }
            Self::PlannedFailover => Operation::PlannedFailover,
            Self::ChangePoint => Operation::ChangeRecoveryPoint,
            Self::CommitFailover | Self::CommitFailback => Operation::Commit,
            Self::FailbackSynchronizedBefore | Self::FailbackSynchronizedDuring => Operation::Failback,
            Self::ReverseReplicate => Operation::ReverseReplicate,
            Self::Resynchronize => Operation::Resynchronize,
            Self::UpdateProperties => Operation::UpdateProperties,
            Self::DisableProtected | Self::DisableFailedOver => Operation::DisableProtection,
        }
    }

    /// Brings a new world to where the workflow can begin. The guest's last writes are in no recovery point.
    pub(crate) async fn prepare(self, world: &World) {
        world.write(VM, &[("vda", 5, 1), ("vda", 60, 2), ("vdb", 16, 3)]).await;
        if matches!(self, Self::Enable | Self::Finalize) {
            return;
        }
        world.protect(VM).await;
        world.write(VM, &[("vda", 6, 4), ("vdb", 0, 5)]).await;
        world.cycle(VM).await;
        world.write(VM, &[("vda", 7, 6), ("vdb", 16, 7)]).await;
        match self {
            Self::TestFailoverCleanup => world.run(VM, Operation::TestFailover).await,
            Self::ChangePoint | Self::CommitFailover => world.run(VM, Operation::UnplannedFailover).await,
            Self::FailoverOfDeadSource => {
                let vm = world.item(VM).await.unwrap().vm;
                world.home.hypervisor.crash_vm(vm).unwrap();
                world.cut(true);
            }
            Self::FailbackSynchronizedBefore | Self::FailbackSynchronizedDuring | Self::DisableFailedOver => {
                fail_over_and_commit(world).await;
            }
            Self::CommitFailback | Self::ReverseReplicate => {
                fail_over_and_commit(world).await;
                world.run(VM, Operation::Failback).await;
                world.write(VM, &[("vda", 9, 10)]).await;
                if self == Self::ReverseReplicate {
                    world.run(VM, Operation::Commit).await;
                    world.write(VM, &[("vda", 10, 11)]).await;
                }
            }
            _ => {}
        }
    }

    /// Begins the workflow.
    pub(crate) async fn begin(self, world: &World) -> JobRecord {
        let job = match self {
            Self::Finalize => {
                world.enable(VM).await.unwrap();
                world.until("a finalize job exists", async |world| finalize_job(world).await.is_some()).await;
                return finalize_job(world).await.unwrap();
            }
            Self::FailoverWithoutShutdown => {
                let params = FailoverParams {
                    point: PointChoice::LatestProcessed,
                    shutdown_source: false,
                    shutdown_timeout_ms: 0,
                };
                world.fail_over(VM, params).await
            }
            Self::ChangePoint => {
                let item = world.item(VM).await.unwrap();
                let points =
                    world.ask(|control| async move { control.recovery_points(&item).await }).await.unwrap();
                let first = mainstay_model::PointId(points[0].id);
                world.change_point(VM, PointChoice::Point(first)).await
            }
            Self::FailbackSynchronizedDuring => world.fail_back(VM, false).await,
            other => world.begin(VM, other.operation()).await,
        };
        job.unwrap()
    }
}

async fn finalize_job(world: &World) -> Option<JobRecord> {
    let every = JobCondition::All(Vec::new());
    let jobs =
        world.ask(|control| async move { control.job_entries(&every, None, 1000).await }).await.unwrap();
    let mut jobs = jobs.into_iter().filter_map(|job| match job {
        JobEntry::Item(job) => Some(*job),
        JobEntry::Configuration(_) => None,
    });
    jobs.rfind(|job| job.operation == Operation::FinalizeProtection)
}

async fn fail_over_and_commit(world: &World) {
    world.run(VM, Operation::UnplannedFailover).await;
    world.write(VM, &[("vda", 7, 8), ("vdb", 1, 9)]).await;
    world.run(VM, Operation::Commit).await;
    world.write(VM, &[("vda", 8, 9)]).await;
}

/// From wherever the item is, through all that is left of the journey and `laps` whole ones, until it is protected at
/// home, and then no more. Checks on the way that nothing is lost where nothing may be.
pub(crate) async fn finish_journey(world: &World, vm: &str, mut laps: usize) {
    world.mend_all();
    let hosts: Vec<_> = world.hosts().map(|host| host.provider).collect();
    world
        .until("both sites are connected", async |world| {
            hosts.iter().all(|host| world.control().sites.is_connected(*host))
        })
        .await;
    world.settle().await;
    let mut fill = 100;
    while let Some(item) = world.item(vm).await {
        fill += 1;
        world.write(vm, &[("vda", 20, fill), ("vdb", 2, fill)]).await;
        let operation = match item.state.phase {
            Phase::Protected if item.test_vm.is_some() => Operation::TestFailoverCleanup,
            Phase::Protected if laps > 0 => {
                laps -= 1;
                Operation::PlannedFailover
            }
            Phase::Protected => {
                world.cycle(vm).await;
                world.check().await;
                Operation::DisableProtection
            }
            Phase::UnplannedFailoverCommitPending
            | Phase::PlannedFailoverCommitPending
            | Phase::FailbackCommitPending => Operation::Commit,
            Phase::UnplannedFailoverCommitted | Phase::PlannedFailoverCommitted => Operation::Failback,
            Phase::FailbackCommitted => Operation::ReverseReplicate,
            other => panic!("{other:?} is not a phase in which anything settles"),
        };
        world.run(vm, operation).await;
        world.check().await;
        match operation {
            Operation::Failback => world.check_failback(vm).await,
            Operation::PlannedFailover => world.check_planned_failover(vm).await,
            _ => {}
        }
    }
}
