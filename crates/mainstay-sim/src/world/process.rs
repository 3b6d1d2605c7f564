//! Agents and servers as processes: a runtime each, whose end is a crash.

use std::{path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use mainstay_agent::{HostOptions, HostSite, records::Records};
use mainstay_control::{Control, ManualClock, db::Db};
use mainstay_model::ProviderId;
use mainstay_provider::serve_site;
use mainstay_replication::{BoxStream, Connect};
use mainstay_store::{Store, StoreOptions};
use object_store::memory::InMemory;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use super::{
    Host,
    network::{Network, Protocol},
};

/// How long what a process has handed to blocking threads may take to end. Nothing of it takes long.
const END_MAX: Duration = Duration::from_secs(10);

/// A process.
pub(super) struct Process {
    runtime: Option<Runtime>,
}

impl Process {
    fn start(name: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name(name)
            .enable_all()
            .build()
            .expect("a runtime");
        Self { runtime: Some(runtime) }
    }

    pub(super) fn handle(&self) -> &tokio::runtime::Handle {
        self.runtime.as_ref().expect("the process runs").handle()
    }

    /// Ends it where it is; returns when nothing of it is at work any more.
    pub(super) async fn kill(mut self) {
        if let Some(runtime) = self.runtime.take() {
            let ended = tokio::task::spawn_blocking(move || runtime.shutdown_timeout(END_MAX));
            ended.await.expect("a runtime ends");
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

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

/// Starts a server; it does not take connections yet.
pub(super) async fn start_server(
    database: PathBuf,
    storage: Arc<InMemory>,
    clock: Arc<ManualClock>,
) -> Server {
    let process = Process::start("server");
    let open = async move {
        let db = Db::open(&database).await.expect("the database opens");
        let store = Arc::new(Store::open(storage, StoreOptions::default()));
        let control = Control::new(db, store, clock);
        control.adopt_catalogue(false).await.expect("the catalogue is read");
        tokio::spawn(control.clone().run_reconcilers(CancellationToken::new()));
        control
    };
    let control = process.handle().spawn(open).await.expect("the server starts");
    Server { process, control }
}
