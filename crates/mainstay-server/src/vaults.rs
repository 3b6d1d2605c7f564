//! The vaults that the server hosts.
//!
//! Each has a control plane, a database and a replica store of its own, so that nothing of one can show in another, and
//! every invariant of a vault holds whatever else is hosted beside it. The first, made by `server init`, lives as long as
//! the server: its database also keeps who may sign in, the audit trail, and the list of the others.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use anyhow::Context as _;
use mainstay_block::durable::create_private_directory;
use mainstay_control::{
    Clock, Control, ControlError,
    alerts::{AlertSender, Alerts},
    app::{HostedVaultRecord, VaultRecord},
    db::Db,
};
use mainstay_model::ProviderId;
use mainstay_store::{Store, StoreOptions, local_storage};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use crate::{ServerConfig, rescue::DATABASE};

/// Vaults of a server: each costs a few connections to its database and a look at its items twice a second.
const VAULTS_MAX: usize = 100;

/// A vault of this server.
pub(crate) struct HostedVault {
    /// Its control plane.
    pub(crate) control: Arc<Control>,
    record: RwLock<Arc<VaultRecord>>,
    /// `None` = the first.
    id: Option<Uuid>,
    /// Held for reading by every request in the vault, so that nothing is written into one that is being deleted.
    is_deleted: tokio::sync::RwLock<bool>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// Leave to work in a vault: it stays as long as this lives.
pub(crate) type InUse<'a> = tokio::sync::RwLockReadGuard<'a, bool>;

impl HostedVault {
    async fn open(control: Arc<Control>, id: Option<Uuid>) -> Result<Self, ControlError> {
        control.adopt_catalogue(false).await?;
        let record = control.vault().await?;
        // New just now: it is empty.
        let _ = control.vault_name.set(record.name.clone());
        Ok(Self {
            control,
            record: RwLock::new(Arc::new(record)),
            id,
            is_deleted: tokio::sync::RwLock::new(false),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        })
    }

    /// Who it is.
    pub(crate) fn record(&self) -> Arc<VaultRecord> {
        self.record.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps it from being deleted; `None` = it is already.
    pub(crate) async fn in_use(&self) -> Option<InUse<'_>> {
        let is_deleted = self.is_deleted.read().await;
        (!*is_deleted).then_some(is_deleted)
    }

    /// Writes other tags on it. Alone in the vault: what is remembered of it must be what was written last, and a vault that
    /// is being deleted has nothing to be written in.
    pub(crate) async fn tag(&self, tags: BTreeMap<String, String>) -> Result<Arc<VaultRecord>, ControlError> {
        let is_deleted = self.is_deleted.write().await;
        if *is_deleted {
            return Err(ControlError::not_found("vault", self.record().name.as_str()));
        }
        let record = Arc::new(self.control.tag_vault(tags).await?);
        *self.record.write().unwrap_or_else(PoisonError::into_inner) = record.clone();
        Ok(record)
    }

    fn is_named(&self, resource_group: &str, name: &str) -> bool {
        let record = self.record();
        record.resource_group.eq_ignore_ascii_case(resource_group) && record.name.eq_ignore_ascii_case(name)
    }

    /// Takes up what was under way, and keeps true what must be.
    async fn start(
        &self,
        alerts: Option<&AlertSettings>,
        superseded: &CancellationToken,
    ) -> Result<usize, ControlError> {
        let (control, superseded, stop) = (self.control.clone(), superseded.clone(), self.stop.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = control.superseded() => superseded.cancel(),
            }
        });
        if let Some(alerts) = alerts {
            let name = self.record().name.clone();
            let alerts =
                Alerts::new(self.control.clone(), alerts.sender.clone(), alerts.owners.clone(), name);
            self.tasks.spawn(alerts.run(self.stop.clone()));
        }
        self.tasks.spawn(self.control.clone().run_reconcilers(self.stop.clone()));
        self.control.resume_jobs().await
    }

    /// Lets nothing take a further step: what is under way ends where it can be taken up again.
    async fn halt(&self) {
        self.control.engine.stop().await;
        self.stop.cancel();
    }

    async fn close(&self) {
        self.tasks.close();
        self.tasks.wait().await;
        self.control.db.close().await;
    }
}

/// How alerts go out.
pub(crate) struct AlertSettings {
    pub(crate) sender: Arc<dyn AlertSender>,
    pub(crate) owners: Vec<String>,
}

/// All vaults of the server.
pub(crate) struct Vaults {
    config: ServerConfig,
    clock: Arc<dyn Clock>,
    alerts: Option<AlertSettings>,
    first: Arc<HostedVault>,
    others: RwLock<Vec<Arc<HostedVault>>>,
    /// One vault is made or deleted at a time.
    changing: tokio::sync::Mutex<()>,
    /// Another server has taken over the store of one of them.
    superseded: CancellationToken,
}

impl Vaults {
    /// Opens all of them; nothing runs yet.
    pub(crate) async fn open(
        config: &ServerConfig,
        clock: Arc<dyn Clock>,
        alerts: Option<AlertSettings>,
    ) -> anyhow::Result<Self> {
        let first = HostedVault::open(open_control(config, None, clock.clone()).await?, None).await?;
        let mut others = Vec::new();
        for listed in first.control.hosted_vaults().await? {
            if listed.is_deleting {
                erase(config, &first.control, listed.id).await;
                continue;
            }
            let control = open_control(config, Some(listed.id), clock.clone()).await?;
            let vault = HostedVault::open(control, Some(listed.id)).await;
            others.push(Arc::new(vault.with_context(|| format!("vault in {}", listed.id))?));
        }
        Ok(Self {
            config: config.clone(),
            clock,
            alerts,
            first: Arc::new(first),
            others: RwLock::new(others),
            changing: tokio::sync::Mutex::new(()),
            superseded: CancellationToken::new(),
        })
    }

    /// Starts all of them; answers how many jobs were taken up.
    pub(crate) async fn start(&self) -> Result<usize, ControlError> {
        let mut resumed = 0;
        for vault in self.all() {
            resumed += vault.start(self.alerts.as_ref(), &self.superseded).await?;
        }
        Ok(resumed)
    }

    /// Lets nothing take a further step in any of them: what is under way ends where it can be taken up again. Requests
    /// are still answered.
    pub(crate) async fn halt(&self) {
        for vault in self.all() {
            vault.halt().await;
        }
    }

    /// Closes them, when nobody asks for anything any more.
    pub(crate) async fn close(&self) {
        for vault in self.all() {
            vault.close().await;
        }
    }

    /// Returns when another server has taken over the store of one of them.
    pub(crate) async fn superseded(&self) {
        self.superseded.cancelled().await;
    }

    /// The first, which keeps what is the server's.
    pub(crate) fn first(&self) -> &Arc<HostedVault> {
        &self.first
    }

    /// All of them, the first one first.
    pub(crate) fn all(&self) -> Vec<Arc<HostedVault>> {
        let others = self.others.read().unwrap_or_else(PoisonError::into_inner);
        std::iter::once(&self.first).chain(others.iter()).cloned().collect()
    }

    /// The vault of this name; names differ in more than case.
    pub(crate) fn find(&self, resource_group: &str, name: &str) -> Option<Arc<HostedVault>> {
        self.all().into_iter().find(|vault| vault.is_named(resource_group, name))
    }

    /// The vault that `NAME` or `GROUP/NAME` means.
    pub(crate) fn find_named(&self, text: &str) -> Result<Arc<HostedVault>, ControlError> {
        let is_meant = |vault: &HostedVault| match text.split_once('/') {
            Some((group, name)) => vault.is_named(group, name),
            None => vault.record().name.eq_ignore_ascii_case(text),
        };
        let mut found = self.all().into_iter().filter(|vault| is_meant(vault));
        match (found.next(), found.next()) {
            (Some(vault), None) => Ok(vault),
            (None, _) => Err(ControlError::not_found("vault", text)),
            (Some(_), Some(_)) => Err(ControlError::invalid(
                "AmbiguousVault",
                format!("several resource groups have a vault '{text}'"),
                "Name it as GROUP/NAME.",
            )),
        }
    }

    /// The vault in which a host is registered.
    pub(crate) async fn hosting(&self, provider: ProviderId) -> Result<Arc<HostedVault>, ControlError> {
        for vault in self.all() {
            match vault.control.provider(provider).await {
                Ok(_) => return Ok(vault),
                Err(ControlError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Err(ControlError::not_found("registered host", provider.to_string()))
    }

    /// Makes a vault, and starts it.
    pub(crate) async fn create(&self, record: VaultRecord) -> anyhow::Result<Arc<HostedVault>> {
        let _changing = self.changing.lock().await;
        if self.find(&record.resource_group, &record.name).is_some() {
            let text = format!("the vault '{}' has just been made by somebody else", record.name);
            return Err(ControlError::Conflict(text).into());
        }
        if self.all().len() >= VAULTS_MAX {
            return Err(ControlError::Conflict(format!(
                "the server has {VAULTS_MAX} vaults, and no more are possible"
            ))
            .into());
        }
        let id = Uuid::new_v4();
        let made = self.make(id, record).await;
        if made.is_err() {
            // Directories that nothing names do no harm; a vault without its directories does.
            let is_listed =
                self.first.control.hosted_vaults().await.map(|all| all.iter().any(|one| one.id == id));
            if is_listed.is_ok_and(|is_listed| !is_listed)
                && let Err(error) = remove_directories(&self.config, id).await
            {
                tracing::warn!(%error, %id, "the directories of a vault that could not be made stay behind");
            }
        }
        made
    }

    async fn make(&self, id: Uuid, record: VaultRecord) -> anyhow::Result<Arc<HostedVault>> {
        let control = open_control(&self.config, Some(id), self.clock.clone()).await?;
        control.create_vault(record).await?;
        let vault = Arc::new(HostedVault::open(control, Some(id)).await?);
        let kept = async {
            vault.start(self.alerts.as_ref(), &self.superseded).await?;
            // Last: from now on it is one of the server's vaults, also after a crash.
            self.first.control.put_hosted_vault(&HostedVaultRecord { id, is_deleting: false }).await
        };
        if let Err(error) = kept.await {
            vault.halt().await;
            vault.close().await;
            return Err(error.into());
        }
        self.others.write().unwrap_or_else(PoisonError::into_inner).push(vault.clone());
        Ok(vault)
    }

    /// Deletes a vault that has nothing in it any more; what still is in it is the error. One that is gone already is no
    /// error.
    pub(crate) async fn delete(&self, vault: &HostedVault) -> Result<Result<(), Vec<String>>, ControlError> {
        let _changing = self.changing.lock().await;
        let Some(id) = vault.id else {
            let name = &vault.record().name;
            return Err(ControlError::Conflict(format!(
                "'{name}' is the first vault of this server, which keeps who may sign in, and lives as long as the server"
            )));
        };
        let mut is_deleted = vault.is_deleted.write().await;
        if *is_deleted {
            return Ok(Ok(()));
        }
        let contents = vault.control.vault_contents().await?;
        if !contents.is_empty() {
            return Ok(Err(contents));
        }
        self.first.control.put_hosted_vault(&HostedVaultRecord { id, is_deleting: true }).await?;
        *is_deleted = true;
        self.others.write().unwrap_or_else(PoisonError::into_inner).retain(|other| other.id != Some(id));
        drop(is_deleted);
        vault.halt().await;
        vault.close().await;
        erase(&self.config, &self.first.control, id).await;
        Ok(Ok(()))
    }
}

/// Removes what a deleted vault has left. What cannot be removed now is removed at the next start.
async fn erase(config: &ServerConfig, first: &Control, id: Uuid) {
    let erased = async {
        remove_directories(config, id).await?;
        anyhow::Ok(first.forget_hosted_vault(id).await?)
    };
    if let Err(error) = erased.await {
        tracing::warn!(%error, %id, "what a deleted vault has left cannot be removed yet");
    }
}

async fn remove_directories(config: &ServerConfig, id: Uuid) -> std::io::Result<()> {
    for directory in [data_dir(config, Some(id)), store_dir(config, Some(id))] {
        match tokio::fs::remove_dir_all(&directory).await {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Where the directories of further vaults are, in the server's data and in its store.
pub(crate) const VAULTS_DIR: &str = "vaults";

fn data_dir(config: &ServerConfig, id: Option<Uuid>) -> PathBuf {
    beneath(&config.data_dir, id)
}

fn store_dir(config: &ServerConfig, id: Option<Uuid>) -> PathBuf {
    beneath(&config.store_dir(), id)
}

fn beneath(directory: &Path, id: Option<Uuid>) -> PathBuf {
    id.map_or_else(|| directory.to_owned(), |id| directory.join(VAULTS_DIR).join(id.to_string()))
}

/// Puts the control plane of a vault together from its directories, which are made if they are not there.
pub(crate) async fn open_control(
    config: &ServerConfig,
    id: Option<Uuid>,
    clock: Arc<dyn Clock>,
) -> anyhow::Result<Arc<Control>> {
    let (data_dir, store_dir) = (data_dir(config, id), store_dir(config, id));
    create_private_directory(&data_dir).with_context(|| format!("data directory {}", data_dir.display()))?;
    create_private_directory(&store_dir)
        .with_context(|| format!("store directory {}", store_dir.display()))?;
    let db_path = data_dir.join(DATABASE);
    let db = Db::open(&db_path).await.with_context(|| format!("database {}", db_path.display()))?;
    let storage =
        local_storage(&store_dir).with_context(|| format!("replica store {}", store_dir.display()))?;
    let shown = store_dir.clone();
    let reserve = config.store_reserve_mib.saturating_mul(1 << 20);
    let has_room = move |bytes: u64| match nix::sys::statvfs::statvfs(&store_dir) {
        Ok(space) => {
            space.blocks_available().saturating_mul(space.fragment_size()) >= bytes.saturating_add(reserve)
        }
        Err(error) => {
            // The write itself says then what is wrong.
            tracing::warn!(%error, "the store's free space cannot be read");
            true
        }
    };
    let options = StoreOptions { has_room: Arc::new(has_room), ..StoreOptions::default() };
    let store = Store::open(storage, options);
    crate::vault_key::unlock(&store, config)
        .await
        .with_context(|| format!("replica store {}", shown.display()))?;
    let control = Control::new(db, Arc::new(store), clock);
    // New just now: all are empty.
    let _ = control.scrubs.pace.set(config.scrub_pace());
    let _ = control.old_copies.set(config.old_copies);
    if let Some(scripts) = &config.script_dir {
        let scripts =
            scripts.canonicalize().with_context(|| format!("script directory {}", scripts.display()))?;
        let _ = control.scripts.set(scripts);
    }
    Ok(control)
}
