//! The store's medium returns other bytes than were written: what a scrub finds, what heals it, and what a failover makes of it.

use mainstay_control::workflows::{FailoverParams, PointChoice};
use mainstay_model::{Ending, Health, Operation, Phase, PointId};
use mainstay_sim::{JobEnd, World, WorldOptions, simulate};

use crate::{
    support::{codes, log},
    workflows::VM,
};

/// A protected VM with some points, the first of which everything else is built on.
async fn world() -> World {
    log();
    let world = World::new(WorldOptions::default()).await;
    let all: Vec<_> = (3..60).map(|block| ("vda", block, block as u8)).collect();
    assert!(world.write(VM, &all).await);
    world.protect(VM).await;
    for fill in 100..103 {
        assert!(world.write(VM, &[("vda", 40, fill), ("vdb", 16, fill)]).await);
        world.cycle(VM).await;
    }
    world
}

async fn flip_all(world: &World, folder: &str, share: f64) {
    let keys = world.objects(folder);
    assert!(!keys.is_empty());
    for key in keys {
        world.flip(&key, share);
    }
}

async fn damaged(world: &World) -> Vec<PointId> {
    world.item(VM).await.unwrap().scrub.damaged_points
}

#[test]
fn a_cycle_heals_what_the_source_still_has_and_the_points_before_it() {
    simulate(|| async {
        for share in [0.2, 0.5, 0.9] {
            let mut world = world().await;
            flip_all(&world, "segment", share).await;
            // What was read before is still in its memory.
            world.restart_server().await;
            let before = world.legible(VM).await;
            assert!(!before.damaged.is_empty(), "{share}");
            let moved = world.item(VM).await.unwrap().replication.bytes_moved;
            world.scrub(VM).await;
            world.cycle(VM).await;
            world.until_looked_at(VM).await;
            let after = world.legible(VM).await;
            let newest = world.item(VM).await.unwrap().replication.last_point.unwrap();
            assert!(after.whole.contains(&newest), "{share}: {after:?}");
            assert!(after.damaged.len() < before.damaged.len(), "{share}: nothing was healed");
            assert_eq!(damaged(&world).await, after.damaged, "{share}: marks are not what is so");
            let moved = world.item(VM).await.unwrap().replication.bytes_moved - moved;
            assert!(moved < 80 * 4096, "{share}: {moved} bytes moved");
            let codes = codes(&world).await;
            assert!(codes.iter().any(|code| code == "ReplicaDamaged"), "{codes:?}");
            world.run(VM, Operation::UnplannedFailover).await;
            let copy = world.item(VM).await.unwrap().recovery_vm.unwrap();
            let expected = world.oracle.disks_at(copy.taken_at_ms).unwrap();
            let started = world.recovery.hypervisor.view(copy.vm).unwrap().started_from.unwrap();
            assert!(started.values().eq(expected.iter()));
        }
    });
}

#[test]
fn what_describes_data_bears_a_flip() {
    simulate(|| async {
        for folder in ["map", "definition", "manifest", "catalogue"] {
            let mut world = world().await;
            flip_all(&world, folder, 0.3).await;
            world.restart_server().await;
            let legible = world.legible(VM).await;
            assert!(legible.damaged.is_empty(), "{folder}: {legible:?}");
            world.scrub(VM).await;
            let item = world.item(VM).await.unwrap();
            assert!(item.scrub.damage.is_empty(), "{folder}: {:?}", item.scrub);
            if folder == "definition" {
                assert!(item.scrub.mended > 0);
            }
            world.lose_database().await;
            world.settle().await;
            assert_eq!(world.phase(VM).await, Some(Phase::Protected), "{folder}");
            world.check().await;
        }
    });
}

#[test]
fn a_failover_passes_damaged_points_over_and_takes_none_by_accident() {
    simulate(|| async {
        let mut world = world().await;
        // Of what the newest point alone has.
        let newest = world.objects("segment");
        let before = world.legible(VM).await.whole;
        for key in newest {
            world.flip(&key, 0.5);
            world.restart_server().await;
            if world.legible(VM).await.damaged == [*before.last().unwrap()] {
                break;
            }
            world.flip(&key, 0.5);
        }
        world.cut(true);
        world.scrub(VM).await;
        assert_eq!(damaged(&world).await, [*before.last().unwrap()]);
        let health = world
            .ask(|control| async move {
                let item = control.db.items().await.unwrap()[0].clone();
                control.item_health(&item).await.unwrap().0
            })
            .await;
        assert_eq!(health, Health::Critical);
        let params = |point| FailoverParams { point, shutdown_source: false, shutdown_timeout_ms: 1_000 };
        let job = world.fail_over(VM, params(PointChoice::Latest)).await.unwrap();
        assert_eq!(world.end(job.id).await, JobEnd::Ended(Ending::Succeeded));
        let copy = world.item(VM).await.unwrap().recovery_vm.unwrap();
        assert_eq!(Some(&copy.point), before.iter().rev().nth(1));
        assert!(codes(&world).await.iter().any(|code| code == "RecoveryPointDamaged"));
    });
}

#[test]
fn when_every_point_is_damaged_one_must_be_named() {
    simulate(|| async {
        let mut world = world().await;
        flip_all(&world, "segment", 0.5).await;
        world.restart_server().await;
        world.cut(true);
        world.scrub(VM).await;
        let all = damaged(&world).await;
        assert_eq!(all, world.legible(VM).await.damaged);
        let params = |point| FailoverParams { point, shutdown_source: false, shutdown_timeout_ms: 1_000 };
        if world.legible(VM).await.whole.is_empty() {
            let job = world.fail_over(VM, params(PointChoice::LatestProcessed)).await.unwrap();
            assert_eq!(world.end(job.id).await, JobEnd::Ended(Ending::Failed));
            assert!(world.tell(job.id).await.contains("have blocks that the store cannot read"));
            assert_eq!(world.phase(VM).await, Some(Phase::Protected));
        } else {
            panic!("the first segment is in every point");
        }
    });
}

/// What describes one replica is lost in both of its copies: that is said of its item, and all others are looked after as before.
#[test]
fn a_replica_that_nobody_can_read_is_told_and_keeps_no_other_from_being_looked_after() {
    simulate(|| async {
        log();
        let vms = vec!["web".to_owned(), "db".to_owned()];
        let mut world = World::new(WorldOptions { vms, ..WorldOptions::default() }).await;
        for vm in ["web", "db"] {
            assert!(world.write(vm, &[("vda", 10, 1)]).await);
            world.protect(vm).await;
        }
        let replica = world.item("web").await.unwrap().id.to_string();
        for key in world.objects("manifest") {
            if key.as_ref().contains(&replica) {
                world.flip(&key, 0.25);
                world.flip(&key, 0.75);
            }
        }
        world.restart_server().await;
        let errors = async |world: &World| {
            let item = world.item("web").await.unwrap();
            world.ask(move |control| async move { control.item_health(&item).await.unwrap() }).await
        };
        world.clock.advance_ms(60_000);
        world.control().changed.notify_waiters();
        world
            .until("it is told", async |world| {
                let (health, errors, _) = errors(world).await;
                health == Health::Critical && errors.iter().any(|error| error.message.contains("is damaged"))
            })
            .await;
        let failed = async |world: &World| codes(world).await.contains(&"ReplicationFailed".to_owned());
        world.until("the failed replication is told", failed).await;

        // The other one: new points come, old ones expire, and their space comes back.
        let points = async |world: &World| {
            let id = world.item("db").await.unwrap().id.0;
            world.ask(move |control| async move { control.store.points(id).await.unwrap() }).await
        };
        let old = points(&world).await[0].id;
        for fill in 2..5 {
            assert!(world.write("db", &[("vda", 10, fill)]).await);
            let newest = points(&world).await.last().map(|point| point.id);
            world.clock.advance_ms(25 * 3_600_000);
            world.control().changed.notify_waiters();
            world
                .until("a point is added", async |world| {
                    points(world).await.last().map(|point| point.id) != newest
                })
                .await;
        }
        world
            .until("the first point has expired", async |world| {
                world.clock.advance_ms(1_000);
                world.control().changed.notify_waiters();
                points(world).await.iter().all(|point| point.id != old)
            })
            .await;
    });
}
