//! Shared by the tests of this crate.

/// Shows what happens when `SIM_LOG` says what of it (a filter like `debug` or `mainstay_control=info`).
pub(crate) fn log() {
    if let Ok(filter) = std::env::var("SIM_LOG") {
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
    }
}
