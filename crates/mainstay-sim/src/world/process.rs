//! Agents and servers as processes.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use mainstay_agent::{HostOptions, HostSite, records::Records};
use mainstay_control::{Control, ControlError, ManualClock, db::Db};
use mainstay_model::ProviderId;
use mainstay_provider::serve_site;
use mainstay_replication::{BoxStream, Connect};
use mainstay_store::{Store, StoreOptions, VaultKey};
use tokio_util::sync::CancellationToken;

use crate::{SimStorage, turns::Process};

use super::{
    Host,
    network::{Network, Protocol},
};

struct DataLink {
    network: Arc<Network>,
    host: ProviderId,
}

#[async_trait]
impl Connect for DataLink {
    async fn connect(&self) -> std::io::Result<BoxStream> {
        Ok(Box::new(self.network.dial(self.host, Protocol::Data)?))
    }
}

/// Starts an agent over a host and its data directory.
pub(super) async fn start_agent(network: &Arc<Network>, host: &Host) -> Process {
    let process = Process::start("agent");
    let Host { provider: host, hypervisor, data_dir, run_dir, boots, .. } = host;
    let host = *host;
    let link = DataLink { network: network.clone(), host };
    let records = Records::open(data_dir).expect("the agent's records open");
    // No time at all: every transfer of more than one read takes several captures.
    let options = HostOptions {
        run_dir: run_dir.clone(),
        boot: format!("boot {boots}"),
        capture_time_max: Duration::ZERO,
    };
    let site = HostSite::new(Arc::new(hypervisor.clone()), Arc::new(link), records, options);
    let network = network.clone();
    let (ready, is_ready) = tokio::sync::oneshot::channel();
    process.handle().spawn(async move {
        if let Err(error) = site.recover().await {
            tracing::error!(%error, "an agent could not recover");
        }
        // The test may be over already.
        let _ = ready.send(());
        let mut changes = network.changes();
        loop {
            changes.borrow_and_update();
            match network.dial(host, Protocol::Control) {
                Ok(stream) => {
                    let ended = serve_site(stream, Arc::new(site.clone())).await;
                    tracing::debug!(%host, ?ended, "an agent lost the server");
                }
                Err(_) => {
                    if changes.changed().await.is_err() {
                        return;
                    }
                }
            }
        }
    });
    is_ready.await.expect("the agent starts");
    process
}

/// A server: the control plane over a database file and an object storage.
pub(super) struct Server {
    pub(super) process: Process,
    pub(super) control: Arc<Control>,
}

/// How often the files of a directory are looked at, a millisecond apart, until they are closed. Nothing takes long there.
const CLOSED_LOOKS_MAX: u32 = 60_000;

/// Waits until nothing of ours has a file of a directory open. A killed server's database is closed by threads of its own, the
/// last of which removes the log: the world stands still until that is so.
pub(super) fn wait_until_closed(dir: &Path) {
    let is_open = || {
        let open = std::fs::read_dir("/proc/self/fd").expect("the open files").flatten();
        // A descriptor may be closed meanwhile.
        open.filter_map(|entry| std::fs::read_link(entry.path()).ok()).any(|path| path.starts_with(dir))
    };
    for _ in 0..CLOSED_LOOKS_MAX {
        if !is_open() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("{} is not closed", dir.display());
}

/// How often a server that does not start is started again, as its service manager does.
const STARTS_MAX: usize = 500;

/// Small limits, so that the few blocks of a world make several segments, layers that are merged, and flattened maps; and
/// small caches, so that what is read comes from the storage.
fn store_options(storage: SimStorage) -> StoreOptions {
    StoreOptions {
        segment_bytes: 24 << 10,
        uploads_in_flight: 2,
        upload_retry: Duration::from_millis(1),
        path_maps_max: 4,
        frame_cache_bytes: 64 << 10,
        chunk_cache_bytes: 64 << 10,
        garbage_age_ms: 10_000,
        manifest_age: Duration::ZERO,
        compact_small_segments: 3,
        has_room: Arc::new(move |_| !storage.is_full()),
        ..StoreOptions::default()
    }
}

/// Starts a server; it does not take connections yet.
pub(super) async fn start_server(
    database: PathBuf,
    storage: SimStorage,
    clock: Arc<ManualClock>,
    vault_key: Option<String>,
) -> Server {
    let vault_key = vault_key.and_then(|text| VaultKey::parse(&text)).map(Arc::new);
    for _ in 0..STARTS_MAX {
        let process = Process::start("server");
        let (database, storage, clock) = (database.clone(), storage.clone(), clock.clone());
        let vault_key = vault_key.clone();
        let open = async move {
            let db = Db::open(&database).await.expect("the database opens");
            let store = Arc::new(Store::open(Arc::new(storage.clone()), store_options(storage)));
            store.unlock(vault_key.as_deref(), &[]).await?;
            let control = Control::new(db, store, clock);
            control.adopt_catalogue(false).await?;
            tokio::spawn(control.clone().run_reconcilers(CancellationToken::new()));
            Ok::<_, ControlError>(control)
        };
        match process.handle().spawn(open).await.expect("the server starts") {
            Ok(control) => return Server { process, control },
            // Reading the catalogue failed.
            Err(error) => tracing::debug!(%error, "the server did not start"),
        }
        process.kill().await;
    }
    panic!("the server does not start");
}
