//! Clocks that are wrong, and set.

use mainstay_model::ReplicationPolicy;
use mainstay_provider::ErrorKind;
use mainstay_sim::{HostFault, World, WorldOptions, simulate};

use crate::{support::log, workflows::VM};

const HOUR_MS: i64 = 3_600_000;

async fn wait_for_a_newer_point(world: &World) {
    let before = world.item(VM).await.unwrap().replication.last_point;
    world.control().changed.notify_waiters();
    world
        .until("there is a newer recovery point", async |world| {
            world.item(VM).await.unwrap().replication.last_point != before
        })
        .await;
    world.settle().await;
}

#[test]
fn replication_goes_on_when_the_clock_was_set_back() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        world.clock.advance_ms(3 * HOUR_MS);
        world.cycle(VM).await;
        world.write(VM, &[("vda", 9, 9)]).await;
        world.clock.advance_ms(-3 * HOUR_MS);
        wait_for_a_newer_point(&world).await;
        world.check().await;
    });
}

#[test]
fn a_pause_after_failures_ends_when_the_clock_was_set_back() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        world.clock.advance_ms(3 * HOUR_MS);
        world.home.hypervisor.inject("begin_capture", HostFault::Fail(ErrorKind::Failed), 1);
        world.control().changed.notify_waiters();
        world
            .until("a cycle has failed", async |world| {
                world.item(VM).await.unwrap().replication.not_before_ms.is_some()
            })
            .await;
        world.clock.advance_ms(-3 * HOUR_MS);
        wait_for_a_newer_point(&world).await;
        world.check().await;
    });
}

#[test]
fn the_alarm_does_not_depend_on_the_clock_of_the_host() {
    simulate(|| async {
        log();
        for offset_ms in [0, 2 * HOUR_MS, -2 * HOUR_MS] {
            let world = World::new(WorldOptions::default()).await;
            world.protect(VM).await;
            world.home.hypervisor.set_clock_offset_ms(offset_ms);
            world.check_alarm(VM).await;
            world.check().await;
        }
    });
}

#[test]
fn the_newest_point_stays_when_the_clock_was_set_back_and_an_older_one_seems_newer() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        let policy = ReplicationPolicy {
            copy_frequency_seconds: 5,
            retention_hours: 1,
            app_consistent_frequency_hours: 0,
            bytes_per_second_max: None,
        };
        world.set_policy(policy).await;
        world.home.hypervisor.set_clock_offset_ms(2 * HOUR_MS);
        world.write(VM, &[("vda", 8, 8)]).await;
        world.cycle(VM).await;
        world.home.hypervisor.set_clock_offset_ms(0);
        world.write(VM, &[("vda", 9, 9)]).await;
        world.cycle(VM).await;
        let newest = world.item(VM).await.unwrap().replication.last_point.unwrap();
        // Nothing newer replaces it while the site is away.
        world.cut(true);
        let item = world.item(VM).await.unwrap();
        let before =
            world.ask(move |control| async move { control.store.points(item.id.0).await.unwrap() }).await;
        world.clock.advance_ms(30 * HOUR_MS);
        world.control().changed.notify_waiters();
        let id = world.item(VM).await.unwrap().id.0;
        world
            .until("points have expired", async |world| {
                let points =
                    world.ask(move |control| async move { control.store.points(id).await.unwrap() }).await;
                points.len() < before.len()
            })
            .await;
        let points = world.ask(move |control| async move { control.store.points(id).await.unwrap() }).await;
        assert!(points.iter().any(|point| point.id == newest.0), "{points:?}");
    });
}

/// A source that is dead for a week, and a server's clock that leaps ahead, look alike: what there is stays until something newer comes.
#[test]
fn nothing_expires_while_nothing_new_comes() {
    simulate(|| async {
        log();
        let world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        for fill in 1..4 {
            world.write(VM, &[("vda", 9, fill)]).await;
            world.cycle(VM).await;
        }
        world.cut(true);
        let id = world.item(VM).await.unwrap().id.0;
        let points = || world.ask(move |control| async move { control.store.points(id).await.unwrap() });
        let before = points().await;
        for _ in 0..3 {
            world.clock.advance_ms(7 * 24 * HOUR_MS);
            world.ask(|control| async move { control.reconcile_retention().await.unwrap() }).await;
            assert_eq!(points().await, before);
        }
        // And goes as if it had never been away when something has.
        world.mend(true);
        world.write(VM, &[("vda", 9, 9)]).await;
        wait_for_a_newer_point(&world).await;
        world.ask(|control| async move { control.reconcile_retention().await.unwrap() }).await;
        assert!(points().await.iter().all(|point| !before.contains(point)));
    });
}
