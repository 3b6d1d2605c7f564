//! What the object storage does to the server.

use std::sync::Arc;

use mainstay_control::Control;
use mainstay_model::Operation;
use mainstay_sim::{StorageTrouble, World, WorldOptions, simulate};

use crate::{
    support::{codes, log},
    workflows::VM,
};

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

/// The server ends before it removes the item's document, and its database is replaced by an older one: the replica tells.
#[test]
fn an_item_that_has_been_disabled_since_the_backup_of_the_database_is_removed() {
    simulate(|| async {
        log();
        let mut world = World::new(WorldOptions::default()).await;
        world.protect(VM).await;
        world.settle().await;
        let read = |control: Arc<Control>| async move {
            control.reconcile_catalogue().await.unwrap();
            let names = control.store.documents("items").await.unwrap();
            assert_eq!(names.len(), 1);
            let document = control.store.document(&names[0]).await.unwrap().unwrap();
            (names[0].clone(), document)
        };
        let (name, document) = world.ask(read).await;
        world.back_up_database().await;
        world.run(VM, Operation::DisableProtection).await;
        world.settle().await;
        let put = |control: Arc<Control>| async move { control.store.put_document(&name, &document).await };
        world.ask(put).await.unwrap();
        world.restore_database().await;
        assert!(world.item(VM).await.is_none(), "an item without a replica came back");
        assert!(codes(&world).await.contains(&"VaultRebuilt".to_owned()));
        world.protect(VM).await;
        world.check().await;
    });
}
