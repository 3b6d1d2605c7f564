//! What the network does between agents and server.

use mainstay_sim::{Direction, World, WorldOptions, simulate};

use crate::{support::log, workflows::VM};

async fn until_connected(world: &World, is_connected: bool) {
    world
        .until("the site is seen as it is", async |world| {
            world.control().sites.is_connected(world.home.provider) == is_connected
        })
        .await;
}

#[test]
fn a_cut_in_one_direction_is_noticed_and_replication_goes_on_after_it() {
    simulate(|| async {
        log();
        for direction in [Direction::ToServer, Direction::ToAgent] {
            let world = World::new(WorldOptions::default()).await;
            world.protect(VM).await;
            world.stall(true, direction);
            // The side that hears nothing gives the connection up, and the other one learns of it.
            until_connected(&world, false).await;
            world.write(VM, &[("vda", 9, 9)]).await;
            world.mend(true);
            until_connected(&world, true).await;
            world.cycle(VM).await;
            world.check().await;
        }
    });
}

#[test]
fn what_was_held_up_by_a_short_cut_arrives() {
    simulate(|| async {
        log();
        for direction in [Direction::ToServer, Direction::ToAgent] {
            let world = World::new(WorldOptions::default()).await;
            world.protect(VM).await;
            world.write(VM, &[("vda", 9, 9)]).await;
            world.stall(true, direction);
            let before = world.item(VM).await.unwrap().replication.last_point;
            world.clock.advance_ms(5_000);
            world.control().changed.notify_waiters();
            world
                .until("a cycle is under way", async |world| {
                    let item = world.item(VM).await.unwrap();
                    world.control().cycles.progress(item.id).is_some()
                })
                .await;
            assert_eq!(world.item(VM).await.unwrap().replication.last_point, before);
            world.mend(true);
            world
                .until("the cycle has ended", async |world| {
                    world.item(VM).await.unwrap().replication.last_point != before
                })
                .await;
            world.settle().await;
            world.check().await;
        }
    });
}
