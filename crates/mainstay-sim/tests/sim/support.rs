//! Shared by the tests of this crate.

use mainstay_sim::World;

/// Shows what happens when `SIM_LOG` says what of it (a filter like `debug` or `mainstay_control=info`).
pub(crate) fn log() {
    if let Ok(filter) = std::env::var("SIM_LOG") {
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
    }
}

/// Codes of all events, in order.
pub(crate) async fn codes(world: &World) -> Vec<String> {
    let events = world.ask(|control| async move { control.db.events_after(None, 1000).await.unwrap() }).await;
    events.iter().map(|event| event.code.clone()).collect()
}

/// Time passes, and the reconcilers see to what is due by then.
pub(crate) async fn pass(world: &World, ms: i64) {
    world.clock.advance_ms(ms);
    world.control().changed.notify_waiters();
    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
}

/// The calls of a hypervisor that tests let fail.
pub(crate) const METHODS: [&str; 27] = [
    "host",
    "inventory",
    "vm",
    "disks",
    "definition",
    "power",
    "start",
    "start_tracked",
    "shut_down",
    "power_off",
    "begin_capture",
    "confirm_tracker",
    "create_recovery_vm",
    "hydrate",
    "remove_recovery_vm",
    "open_staging",
    "commit_staging",
    "discard_staging",
    "restore_state",
    "create_home_vm",
    "remove_home_vm",
    "remove_trackers",
    "set_autostart",
    "guest_addresses",
    "set_guest_address",
    "abandon_stale_captures",
    "console",
];
