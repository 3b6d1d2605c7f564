//! What stands between a job and its end: a database that takes no writes, a mistake of ours, a host that hangs.

use std::{path::PathBuf, sync::Arc, time::Duration};

use mainstay_control::{
    db::{JobRecord, JobState},
    jobs::{Fault, Faults},
};
use mainstay_model::{Ending, Operation, Phase};
use mainstay_provider::{ErrorKind, PowerState};
use mainstay_sim::{HostFault, JobEnd, World, WorldOptions, simulate};
use sqlx::{Connection as _, SqliteConnection};
use tokio::sync::Semaphore;

use crate::{
    support::{codes, log, pass},
    workflows::{VM, Workflow},
};

/// Carries a statement out in the server's database, behind its back.
fn execute(database: PathBuf, statement: &'static str) {
    let work = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let url = format!("sqlite:{}", database.display());
            let mut connection = SqliteConnection::connect(&url).await.unwrap();
            sqlx::query(statement).execute(&mut connection).await.unwrap();
            connection.close().await.unwrap();
        });
    };
    std::thread::spawn(work).join().unwrap();
}

#[test]
fn a_job_goes_on_when_the_database_takes_writes_again() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        let gate = Arc::new(Semaphore::new(0));
        world.home.hypervisor.inject("shut_down", HostFault::Hang(gate.clone()), 1);
        let job = world.begin(VM, Operation::PlannedFailover).await.unwrap();
        world.home.hypervisor.wait_for_hang().await;
        execute(
            world.database(),
            "CREATE TRIGGER refused BEFORE UPDATE ON jobs BEGIN SELECT RAISE(ABORT, 'the disk is full'); END",
        );
        gate.add_permits(1);
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(world.job(job.id).await.state, JobState::InProgress);
        assert_eq!(world.phase(VM).await, Some(Phase::Protected));
        execute(world.database(), "DROP TRIGGER refused");
        assert_eq!(world.end(job.id).await, JobEnd::Ended(Ending::Succeeded));
        world.check_planned_failover(VM).await;
        world.check().await;
    });
}

struct Panics;

impl Faults for Panics {
    fn fault(&self, job: &JobRecord, step: usize, _: bool) -> Fault {
        assert!(step < 2 || job.operation != Operation::PlannedFailover, "a mistake");
        Fault::None
    }
}

#[test]
fn a_job_that_a_mistake_of_ours_breaks_off_is_stuck_with_the_reason_and_can_be_restarted() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        world.set_faults(Some(Arc::new(Panics)));
        let job = world.begin(VM, Operation::PlannedFailover).await.unwrap();
        assert_eq!(world.end(job.id).await, JobEnd::Ended(Ending::Stuck));
        let errors: Vec<_> = world.job(job.id).await.steps.into_iter().flat_map(|step| step.errors).collect();
        assert!(errors.iter().any(|error| error.message.contains("a mistake")), "{errors:?}");
        world.set_faults(None);
        world.ask(move |control| async move { control.restart_job(job.id).await }).await.unwrap();
        assert_eq!(world.end(job.id).await, JobEnd::Ended(Ending::Succeeded));
        world.check_planned_failover(VM).await;
        world.check().await;
    });
}

/// The home host's hypervisor hangs, and its agent lives.
#[test]
fn an_unplanned_failover_does_not_wait_for_a_host_that_hangs() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        let gate = Arc::new(Semaphore::new(0));
        for method in ["power", "shut_down", "begin_capture", "vm", "disks", "inventory", "power_off"] {
            world.home.hypervisor.inject(method, HostFault::Hang(gate.clone()), 20);
        }
        let began = tokio::time::Instant::now();
        let job = world.begin(VM, Operation::UnplannedFailover).await.unwrap();
        assert_eq!(world.end(job.id).await, JobEnd::Ended(Ending::Succeeded));
        assert!(began.elapsed() < Duration::from_secs(300), "{:?}", began.elapsed());
        let job = world.job(job.id).await;
        assert!(
            job.steps.iter().flat_map(|step| &step.errors).any(|error| error.code == "TimedOut"),
            "{job:?}"
        );
        // And is stopped when it answers again.
        world.home.hypervisor.clear_faults();
        gate.add_permits(200);
        world.until_old_copies_are_off(VM).await;
        world.settle().await;
        world.check().await;
    });
}

/// What belongs to no job is asked of each host by itself.
#[test]
fn a_host_that_hangs_does_not_keep_another_one_from_standing_down() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        let gate = Arc::new(Semaphore::new(0));
        world.run(VM, Operation::PlannedFailover).await;
        world.recovery.hypervisor.inject("inventory", HostFault::Hang(gate.clone()), 1000);
        let home = world.item(VM).await.unwrap().vm;
        world.clock.advance_ms(60_000);
        world.home.hypervisor.start_by_hand(home).await.unwrap();
        world.until_old_copies_are_off(VM).await;
        world.recovery.hypervisor.clear_faults();
        gate.add_permits(1000);
        world.settle().await;
        world.check().await;
    });
}

/// Workflows that start a VM.
const STARTING: [Workflow; 6] = [
    Workflow::TestFailover,
    Workflow::FailoverWithShutdown,
    Workflow::PlannedFailover,
    Workflow::ChangePoint,
    Workflow::FailbackSynchronizedBefore,
    Workflow::FailbackSynchronizedDuring,
];

/// Ends the next starts on both hosts.
fn end_starts(world: &World, times: u32) {
    world.home.hypervisor.end_starts(times);
    world.recovery.hypervisor.end_starts(times);
}

async fn power(world: &World) -> PowerState {
    let (host, vm) = world.active(VM).await;
    host.hypervisor.view(vm).unwrap().power
}

/// libvirt's daemon, killed while it starts a VM, ends it at its own next start.
#[test]
fn a_vm_that_is_off_right_after_its_start_is_started_again() {
    simulate(|| async {
        log();
        for workflow in STARTING {
            let world = World::new(WorldOptions::default()).await;
            workflow.prepare(&world).await;
            end_starts(&world, 2);
            let job = workflow.begin(&world).await;
            assert_eq!(world.complete(job.id).await, Ending::Succeeded, "{workflow:?}");
            if let Some(copy) = world.item(VM).await.unwrap().test_vm {
                assert_eq!(world.recovery.hypervisor.view(copy.vm).unwrap().power, PowerState::Running);
            }
            end_starts(&world, 0);
            assert_eq!(power(&world).await, PowerState::Running, "{workflow:?}");
            world.settle().await;
            world.check().await;
        }
    });
}

#[test]
fn a_vm_that_does_not_stay_on_fails_the_job_with_the_reason_and_everything_is_put_back() {
    simulate(|| async {
        log();
        for workflow in STARTING {
            let world = World::new(WorldOptions::default()).await;
            workflow.prepare(&world).await;
            let before = world.phase(VM).await;
            // The other side's VM starts well when this is undone.
            let is_at_home = workflow.operation() == Operation::Failback;
            let host = if is_at_home { &world.home } else { &world.recovery };
            host.hypervisor.end_starts(1000);
            let job = workflow.begin(&world).await;
            let ending = world.complete(job.id).await;
            let told = world.tell(job.id).await;
            assert!(told.contains("was started") && told.contains("is Off"), "{workflow:?}: {told}");
            host.hypervisor.end_starts(0);
            if workflow == Workflow::ChangePoint {
                // The VM that ran before is gone: it can be restarted, with this point or another.
                assert_eq!(ending, Ending::Stuck, "{told}");
                continue;
            }
            assert_eq!((ending, world.phase(VM).await), (Ending::Failed, before), "{workflow:?}: {told}");
            assert_eq!(power(&world).await, PowerState::Running, "{workflow:?}");
            world.settle().await;
            world.check().await;
        }
    });
}

/// Strikes once the VM is started at the other side.
struct FailsAtTheStart;

impl Faults for FailsAtTheStart {
    fn fault(&self, job: &JobRecord, step: usize, is_undo: bool) -> Fault {
        let is_start = job.steps[step].name.contains("StartVm");
        if is_start && !is_undo { Fault::FailAfter } else { Fault::None }
    }
}

#[test]
fn an_undo_starts_again_what_is_off_right_after_its_start_and_tells_when_it_stays_so() {
    simulate(|| async {
        log();
        for workflow in [Workflow::PlannedFailover, Workflow::FailbackSynchronizedBefore] {
            for (ended, expected) in [(2, PowerState::Running), (3, PowerState::Off)] {
                let world = World::new(WorldOptions::default()).await;
                workflow.prepare(&world).await;
                let (active, _) = world.active(VM).await;
                active.hypervisor.end_starts(ended);
                world.set_faults(Some(Arc::new(FailsAtTheStart)));
                let job = workflow.begin(&world).await;
                assert_eq!(world.complete(job.id).await, Ending::Failed, "{workflow:?}");
                assert_eq!(power(&world).await, expected, "{workflow:?}");
                let is_told = codes(&world).await.iter().any(|code| code == "VmNotRunning");
                assert_eq!(is_told, expected == PowerState::Off, "{workflow:?}");
                world.check().await;
            }
        }
    });
}

/// A cycle that is broken off may become a recovery point all the same, a moment after the next transfer has chosen its parent.
#[test]
fn a_resynchronization_is_not_in_the_way_of_the_cycle_before_it() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        let item = world.item(VM).await.unwrap().id;
        for delay in 0..240 {
            world.write(VM, &[("vda", 9, delay)]).await;
            // So late that the point which the next transfer has chosen may have expired as well.
            let hours = if delay % 2 == 0 { 0 } else { 30 };
            world.clock.advance_ms(5_000 + hours * 3_600_000);
            // As an agent that has lost its tables, and must read what they say of that point.
            let tables = world.home.data_dir.join("items").join(item.to_string());
            for entry in std::fs::read_dir(tables).unwrap() {
                let path = entry.unwrap().path();
                if path.extension().is_some_and(|extension| extension == "hashes") {
                    std::fs::remove_file(path).unwrap();
                }
            }
            world.control().changed.notify_waiters();
            tokio::time::sleep(Duration::from_millis(u64::from(delay) / 4)).await;
            let job = world.begin(VM, Operation::Resynchronize).await.unwrap();
            assert_eq!(
                world.end(job.id).await,
                JobEnd::Ended(Ending::Succeeded),
                "{delay}: {}",
                world.tell(job.id).await
            );
        }
        world.check().await;
    });
}

/// How many cycles begin in a minute in which each fails at once with that error.
async fn cycles_in_a_minute(world: &World, kind: ErrorKind) -> usize {
    let home = &world.home.hypervisor;
    home.inject("disks", HostFault::Fail(kind), 1000);
    pass(world, 600_000).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    1000 - home.faults_left("disks")
}

/// It answers at once that it is away; asked again at once, server and agent would do nothing else.
#[test]
fn a_hypervisor_that_is_away_is_asked_now_and_then_and_told_of() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        let before = world.item(VM).await.unwrap().replication.last_point;
        let asked = cycles_in_a_minute(&world, ErrorKind::Unavailable).await;
        assert!((5..=12).contains(&asked), "it was asked {asked} times in a minute");
        let told = codes(&world).await;
        assert_eq!(told.iter().filter(|code| *code == "ReplicationFailed").count(), 1, "{told:?}");
        assert!(world.item(VM).await.unwrap().replication.last_error.is_some_and(|error| error.is_transient));

        world.home.hypervisor.clear_faults();
        tokio::time::sleep(Duration::from_secs(12)).await;
        world.settle().await;
        let item = world.item(VM).await.unwrap();
        assert!(item.replication.last_point != before && item.replication.last_error.is_none());
        assert!(codes(&world).await.contains(&"ReplicationRecovered".to_owned()));
    });
}

/// A cycle whose end cannot be written down would be begun again at once, with a capture each time.
#[test]
fn cycles_wait_for_a_database_that_takes_no_writes() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        execute(
            world.database(),
            "CREATE TRIGGER refused BEFORE UPDATE ON items BEGIN SELECT RAISE(ABORT, 'the disk is full'); END",
        );
        let asked = cycles_in_a_minute(&world, ErrorKind::Failed).await;
        assert!((5..=12).contains(&asked), "there were {asked} cycles in a minute");
        world.home.hypervisor.clear_faults();
        execute(world.database(), "DROP TRIGGER refused");
        world.cycle(VM).await;
        world.check().await;
    });
}
