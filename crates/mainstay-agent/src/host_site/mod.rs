//! The operations of the control plane, carried out on a host.
//!
//! Each operation runs as a task of its own that holds its item's lock. When the request is dropped the task is told
//! to stop, cleans up after itself and only then lets go of the lock: a repeated operation never meets the remains of
//! the first one at work.

mod compare;
mod home;
mod source;
mod tables;
mod tail;
mod target;
mod transfer;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use mainstay_block::BlockError;
use mainstay_model::{Generation, ItemId, VmId};
use mainstay_provider::{
    Discovery, DiskProgress, ErrorKind, Examination, FindingSeverity, Hypervisor, Progress, ProgressSink,
    Site, SiteError, SiteOperation, Staging,
};
use mainstay_replication::{Connect, RefusalKind, ReplicationError};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::records::{ItemFile, Records};
use target::Served;
use transfer::known_size;

/// How a host does its work.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// Where sockets go; short, because a socket's path ends at 107 bytes.
    pub run_dir: PathBuf,
    /// Names the present boot of the host; another one after each boot.
    pub boot: String,
    /// How long a capture looks at new ranges before the transfer goes on with the next one.
    pub capture_time_max: Duration,
}

/// A host as the control plane sees it.
#[derive(Clone)]
pub struct HostSite {
    inner: Arc<Inner>,
}

struct Inner {
    hypervisor: Arc<dyn Hypervisor>,
    server: Arc<dyn Connect>,
    records: Records,
    options: HostOptions,
    locks: Mutex<HashMap<ItemId, Arc<tokio::sync::Mutex<()>>>>,
    /// Newest generation heard of, so that a transfer under way can be told at once.
    stops: Mutex<HashMap<ItemId, CancellationToken>>,
    /// Recovery VMs whose disks are served out of the store.
    served: tokio::sync::Mutex<HashMap<VmId, Served>>,
    /// Open staging areas; while one is open the home VM's start is prevented where the host allows it.
    stagings: tokio::sync::Mutex<HashMap<ItemId, Box<dyn Staging>>>,
}

/// What an operation's task is given.
struct Work {
    progress: watch::Sender<Progress>,
    cancel: CancellationToken,
}

impl Work {
    fn report(&self, phase: &str, bytes_done: u64, bytes_total: u64, bytes_moved: u64) {
        self.progress.send_replace(Progress {
            phase: phase.to_owned(),
            bytes_done,
            bytes_total,
            bytes_moved,
            disks: Vec::new(),
        });
    }

    fn report_disks(&self, phase: &str, disks: Vec<DiskProgress>, bytes_moved: u64) {
        self.progress.send_replace(Progress::of_disks(phase, disks, bytes_moved));
    }
}

impl HostSite {
    /// A site over a hypervisor.
    pub fn new(
        hypervisor: Arc<dyn Hypervisor>,
        server: Arc<dyn Connect>,
        records: Records,
        options: HostOptions,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                hypervisor,
                server,
                records,
                options,
                locks: Mutex::default(),
                stops: Mutex::default(),
                served: tokio::sync::Mutex::default(),
                stagings: tokio::sync::Mutex::default(),
            }),
        }
    }

    /// Takes up what an earlier run of the agent left: ends its captures, serves its recovery VMs again, holds its
    /// staging areas. Called once, before anything else; failures are logged and met again by later operations.
    pub async fn recover(&self) -> Result<(), SiteError> {
        let inner = &self.inner;
        match inner.hypervisor.abandon_stale_captures().await {
            Ok(vms) if vms.is_empty() => {}
            Ok(vms) => tracing::warn!(?vms, "ended captures that an earlier run left open"),
            Err(error) => tracing::error!(%error, "stale captures could not be ended"),
        }
        inner.note_boot()?;
        for record in inner.records.recovery_vms()? {
            if record.is_hydrated {
                // Killed before it had stopped serving them.
                inner.stop_serving(record.vm).await?;
                continue;
            }
            let (site, vm) = (self.clone(), record.vm);
            // The server may be away: the disks are served when it is back, and the guest waits until then.
            tokio::spawn(async move {
                if let Err(error) = site.inner.serve(&record).await {
                    tracing::error!(%vm, %error, "a recovery VM's disks could not be served again");
                }
            });
        }
        for record in inner.records.items()? {
            if record.staging.is_some()
                && let Err(error) = inner.hold_staging(&record).await
            {
                tracing::error!(item = %record.item, %error, "a staging area could not be opened again");
            }
        }
        Ok(())
    }

    /// Lets go of everything in an orderly way; VMs run on.
    pub async fn stop(&self) {
        for stop in lock(&self.inner.stops).values() {
            stop.cancel();
        }
        let locks: Vec<_> = lock(&self.inner.locks).values().cloned().collect();
        for item in locks {
            let _held = item.lock().await;
        }
        let stagings: Vec<_> = self.inner.stagings.lock().await.drain().collect();
        for (item, staging) in stagings {
            if let Err(error) = staging.close().await {
                tracing::warn!(%item, %error, "a staging area could not be closed");
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn answer(value: &impl Serialize) -> Result<Value, SiteError> {
    serde_json::to_value(value)
        .map_err(|error| SiteError::new(ErrorKind::Failed, format!("the answer cannot be written: {error}")))
}

#[async_trait]
impl Site for HostSite {
    async fn perform(&self, operation: SiteOperation, sink: &dyn ProgressSink) -> Result<Value, SiteError> {
        let (progress, mut progressed) = watch::channel(Progress::default());
        let cancel = CancellationToken::new();
        let _cancel_on_drop = cancel.clone().drop_guard();
        let site = self.clone();
        let mut task =
            tokio::spawn(async move { site.carry_out(operation, Work { progress, cancel }).await });
        loop {
            tokio::select! {
                biased;
                done = &mut task => {
                    return done.unwrap_or_else(|error| {
                        Err(SiteError::new(ErrorKind::Failed, format!("a bug of the agent: {error}"))
                            .with_remedy("See the agent's log; please report it."))
                    });
                }
                Ok(()) = progressed.changed() => sink.report(progressed.borrow_and_update().clone()),
            }
        }
    }
}

impl HostSite {
    async fn carry_out(&self, operation: SiteOperation, work: Work) -> Result<Value, SiteError> {
        let inner = &self.inner;
        let hypervisor = &inner.hypervisor;
        match operation {
            SiteOperation::Discover(_) => {
                let (host, inventory) = (hypervisor.host().await?, hypervisor.inventory().await?);
                let records = inner.records.items()?;
                answer(&Discovery {
                    host,
                    inventory,
                    waiting: records
                        .iter()
                        .filter(|record| record.is_waiting)
                        .map(|record| record.item)
                        .collect(),
                    generations: records.iter().map(|record| (record.item, record.generation)).collect(),
                })
            }
            SiteOperation::Examine(examine) => {
                let (host, vm) = (hypervisor.host().await?, hypervisor.vm(examine.vm).await?);
                // Where something is wrong with the VM, an image that is away perhaps, that is to be told.
                if vm.findings.iter().all(|finding| finding.severity != FindingSeverity::Error) {
                    let replicable = vm.disks.iter().filter(|disk| disk.is_replicable);
                    replicable.map(known_size).try_for_each(|size| size.map(drop))?;
                }
                answer(&Examination { host, vm })
            }
            SiteOperation::ReadPower(read) => answer(&hypervisor.power(read.vm).await?),
            SiteOperation::PowerOffVm(order) => {
                // Not behind the lock: it ends what takes too long.
                if let Some(item) = order.item {
                    inner.check_order(item, order.generation)?;
                }
                match hypervisor.power_off(order.vm).await {
                    Err(error) if error.kind == ErrorKind::NotFound => answer(&()),
                    result => answer(&result?),
                }
            }
            SiteOperation::ReadConsole(read) => answer(&hypervisor.console(read.vm).await?),
            SiteOperation::ApplyAddresses(apply) => answer(&inner.apply_addresses(&apply).await?),
            SiteOperation::StandDown(order) => {
                // Before the lock: a transfer of the old generation holds it.
                inner.stop_work(order.item);
                let _held = inner.hold(order.item, &work).await?;
                answer(&inner.stand_down(&order).await?)
            }
            SiteOperation::Protect(order) => {
                let _held = inner.hold(order.item, &work).await?;
                answer(&inner.protect(order).await?)
            }
            SiteOperation::Unprotect(order) => {
                inner.stop_work(order.item);
                let _held = inner.hold(order.item, &work).await?;
                answer(&inner.unprotect(&order).await?)
            }
            SiteOperation::Replicate(order) => {
                let _held = inner.hold(order.item, &work).await?;
                answer(&inner.replicate(&order, &work).await?)
            }
            SiteOperation::StartVm(order) => {
                let _held = inner.hold_since(order.item, order.generation, &work).await?;
                answer(&inner.start_vm(order.item, order.vm).await?)
            }
            SiteOperation::AnswerWaiting(order) => {
                let _held = inner.hold(order.item, &work).await?;
                answer(&inner.answer_waiting(&order).await?)
            }
            SiteOperation::ShutDownVm(order) => {
                inner.check_order(order.item, order.generation)?;
                // An open capture would make the guest's end take a minute (see the KVM driver).
                inner.stop_work(order.item);
                let _held = inner.hold_since(order.item, order.generation, &work).await?;
                let timeout = Duration::from_millis(order.timeout_ms);
                answer(&hypervisor.shut_down(order.vm, timeout).await?)
            }
            SiteOperation::CreateRecoveryVm(order) => {
                let _held = inner.hold(order.item, &work).await?;
                answer(&inner.create_recovery_vm(order).await?)
            }
            SiteOperation::Hydrate(order) => {
                let _held = inner.hold_since(order.item, order.generation, &work).await?;
                answer(&inner.hydrate(&order).await?)
            }
            SiteOperation::RemoveRecoveryVm(order) => {
                let _held = inner.hold_since(order.item, order.generation, &work).await?;
                answer(&inner.remove_recovery_vm(order.item, order.vm).await?)
            }
            SiteOperation::PrepareHome(order) => {
                let _held = inner.hold(order.item, &work).await?;
                answer(&inner.prepare_home(order).await?)
            }
            SiteOperation::StageHome(order) => {
                let _held = inner.hold_since(order.item, order.generation, &work).await?;
                answer(&inner.stage_home(&order, &work).await?)
            }
            SiteOperation::VerifyHome(order) => {
                let _held = inner.hold_since(order.item, order.generation, &work).await?;
                answer(&inner.verify_home(&order, &work).await?)
            }
            SiteOperation::CommitHome(order) => {
                let _held = inner.hold_since(order.item, order.generation, &work).await?;
                answer(&inner.commit_home(&order).await?)
            }
            SiteOperation::DiscardHome(order) => {
                inner.check_order(order.item, order.generation)?;
                inner.stop_work(order.item);
                let _held = inner.hold_since(order.item, order.generation, &work).await?;
                answer(&inner.discard_home(order.item, order.vm).await?)
            }
        }
    }
}

/// An item's lock, and the registration of what is at work under it.
struct Held<'a> {
    inner: &'a Inner,
    item: ItemId,
    _guard: tokio::sync::OwnedMutexGuard<()>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        lock(&self.inner.stops).remove(&self.item);
    }
}

impl Inner {
    /// Waits for the item's lock; ends early when the request is dropped.
    async fn hold(&self, item: ItemId, work: &Work) -> Result<Held<'_>, SiteError> {
        let mutex = lock(&self.locks).entry(item).or_default().clone();
        let guard = tokio::select! {
            () = work.cancel.cancelled() => {
                return Err(SiteError::new(ErrorKind::Cancelled, "cancelled before it began"));
            }
            guard = mutex.lock_owned() => guard,
        };
        lock(&self.stops).insert(item, work.cancel.clone());
        Ok(Held { inner: self, item, _guard: guard })
    }

    /// As [`Self::hold`], for an order of this generation.
    async fn hold_since(
        &self,
        item: ItemId,
        generation: Generation,
        work: &Work,
    ) -> Result<Held<'_>, SiteError> {
        let held = self.hold(item, work).await?;
        self.check_order(item, generation)?;
        Ok(held)
    }

    /// Refuses an order of before a generation that this host has heard of.
    fn check_order(&self, item: ItemId, generation: Generation) -> Result<(), SiteError> {
        self.records.item(item)?.map_or(Ok(()), |record| check_generation(&record, generation))
    }

    /// Tells what is at work on an item to stop.
    fn stop_work(&self, item: ItemId) {
        if let Some(stop) = lock(&self.stops).get(&item) {
            stop.cancel();
        }
    }

    /// The record of an item that this host must know.
    fn record(&self, item: ItemId) -> Result<ItemFile, SiteError> {
        self.records.item(item)?.ok_or_else(|| {
            SiteError::new(ErrorKind::NotFound, format!("this host has no record of item {item}"))
                .with_remedy(
                    "If the agent's data directory was lost, resynchronize or enable replication anew.",
                )
        })
    }
}

/// What to do when a server orders what was overtaken.
const SET_BACK: &str = "Nothing was changed. If the server and its store were set back to an earlier state, they do not know of a \
                        later failover: see docs/runbooks/lost-server.md.";

/// Refuses orders of an older generation.
fn check_generation(record: &ItemFile, generation: Generation) -> Result<(), SiteError> {
    if generation < record.generation {
        return Err(SiteError::new(
            ErrorKind::Fenced,
            format!("generation {generation} was overtaken by generation {} on this host", record.generation),
        )
        .with_remedy(SET_BACK));
    }
    Ok(())
}

/// An error of the data plane, for the control plane.
fn data_error(error: &ReplicationError) -> SiteError {
    let text = error.with_causes();
    match error {
        ReplicationError::Fenced { .. } => SiteError::new(ErrorKind::Fenced, text),
        ReplicationError::StoreFull => SiteError::new(ErrorKind::NoSpace, text).with_remedy(
            "Make space in the recovery site's store, or shorten the retention; replication then goes on.",
        ),
        ReplicationError::Device { source: BlockError::Io(cause), .. } => match cause.kind() {
            std::io::ErrorKind::StorageFull => SiteError::new(ErrorKind::NoSpace, text).with_remedy(
                "Make space in the run directory of the protected host's agent; replication then goes on by itself.",
            ),
            std::io::ErrorKind::TimedOut => SiteError::new(ErrorKind::TimedOut, text),
            // Who served the disk has ended: with the VM, or with somebody's end to the capture.
            std::io::ErrorKind::ConnectionAborted => SiteError::new(ErrorKind::Unavailable, text),
            _ => SiteError::new(ErrorKind::Failed, text),
        },
        ReplicationError::Cancelled => SiteError::new(ErrorKind::Cancelled, text),
        ReplicationError::Connection(_) => SiteError::new(ErrorKind::Unavailable, text),
        // The head has moved on: a transfer that was broken off became a recovery point all the same. The next one builds on that.
        ReplicationError::Refused { kind: RefusalKind::Unavailable | RefusalKind::NotHead { .. }, .. } => {
            SiteError::new(ErrorKind::Unavailable, text)
        }
        ReplicationError::Refused { kind: RefusalKind::NotFound, .. } => {
            SiteError::new(ErrorKind::NotFound, text)
        }
        ReplicationError::Refused { kind: RefusalKind::NoAccess, .. } => SiteError::new(ErrorKind::Failed, text)
            .with_remedy(
                "Look at the file system of the recovery site's store: it may have been mounted read-only after an error, or belong to another account. Replication then goes on by itself.",
            ),
        _ => SiteError::new(ErrorKind::Failed, text),
    }
}
