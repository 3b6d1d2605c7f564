//! What the object storage does to the server.

use mainstay_sim::{StorageTrouble, World, WorldOptions, simulate};

use crate::{support::log, workflows::VM};

#[test]
fn a_server_starts_over_a_full_store_and_takes_it_over_when_there_is_space() {
    simulate(|| async {
        log();
        let mut world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        world.storage.set_trouble(Some(StorageTrouble::Full));
        world.restart_server().await;
        let item = world.item(VM).await.unwrap();
        let points =
            world.ask(move |control| async move { control.recovery_points(&item).await }).await.unwrap();
        assert!(!points.is_empty(), "a full store can be read");
        world.storage.set_trouble(None);
        // What protects the VM from now on must be in the catalogue, which only the server does that has claimed the store.
        let mut target = world.item(VM).await.unwrap().target;
        target.vcpus = Some(3);
        world.update_target(VM, target).await;
        world.lose_database().await;
        assert_eq!(world.item(VM).await.unwrap().target.vcpus, Some(3));
        world.write(VM, &[("vda", 9, 9)]).await;
        world.cycle(VM).await;
        world.check().await;
    });
}
