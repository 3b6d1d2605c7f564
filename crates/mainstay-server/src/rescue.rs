//! What is done to a server that is not running: its state is copied, or made anew from its replica store.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, bail};
use mainstay_block::durable::{create_private_directory, sync_parent};
use mainstay_control::{
    Adoption, SystemClock,
    app::{Role, TokenSecret, VaultRecord},
    db::Db,
};

use crate::{
    Authority, ServerConfig,
    vaults::{VAULTS_DIR, open_control},
};

/// The database of a vault, in its directory.
pub(crate) const DATABASE: &str = "mainstay.db";
/// Keys and certificates, in the server's directory.
const PKI: &str = "pki";

/// A vault that was made anew.
#[derive(Debug)]
pub struct RebuiltVault {
    /// Who it is.
    pub vault: VaultRecord,
    /// What was found in its store.
    pub adoption: Adoption,
    /// Names of its hosts, each with its fabric: they must be registered again, under the same names.
    pub hosts: Vec<(String, String)>,
    /// Replicated items, each with its recovery points and when the newest was taken, milliseconds since 1970 UTC.
    pub items: Vec<(String, usize, Option<i64>)>,
}

/// What came of a rebuild.
pub struct Rebuilt {
    /// The server's first vault, and the others.
    pub vaults: Vec<RebuiltVault>,
    /// The first token's secret; `None` if the server had one.
    pub token: Option<TokenSecret>,
}

/// Makes a server from nothing but its replica store: vaults, fabrics, policies, hosts, items and the jobs that were under
/// way. Certificates and tokens are new.
///
/// # Errors
/// When the database has items or hosts already, and when the store has no catalogue.
pub async fn rebuild(config: &ServerConfig) -> anyhow::Result<Rebuilt> {
    let store = config.store_dir();
    if !store.is_dir() {
        bail!("there is no replica store in {}: name its directory with --store", store.display());
    }
    let clock = Arc::new(SystemClock);
    let first = open_control(config, None, clock.clone()).await?;
    let used = first.vault_contents().await?;
    if let Some(one) = used.first() {
        bail!(
            "the database in {} is in use ({one} and {} more): a rebuild is for a server that has lost its database. One whose \
             database is only older than its store catches up by itself when it is started",
            config.data_dir.display(),
            used.len() - 1
        );
    }
    let adoption = first.adopt_catalogue(true).await?;
    if !adoption.resources {
        bail!(
            "the replica store in {} has no catalogue that can be read{}",
            store.display(),
            adoption.damaged.first().map(|what| format!(": {what}")).unwrap_or_default()
        );
    }
    Authority::open(&config.data_dir.join(PKI))?;
    let token = match first.tokens().await?.is_empty() {
        true => Some(first.create_token("first administrator", Role::Contributor, None).await?.1),
        false => None,
    };
    let others = first.hosted_vaults().await?;
    let mut vaults = vec![rebuilt(&first, adoption).await?];
    first.db.close().await;
    for other in others.iter().filter(|other| !other.is_deleting) {
        let control = open_control(config, Some(other.id), clock.clone()).await?;
        let adoption = control.adopt_catalogue(true).await?;
        vaults.push(rebuilt(&control, adoption).await.with_context(|| format!("the vault {}", other.id))?);
        control.db.close().await;
    }
    Ok(Rebuilt { vaults, token })
}

async fn rebuilt(control: &mainstay_control::Control, adoption: Adoption) -> anyhow::Result<RebuiltVault> {
    let hosts = control.providers().await?;
    let hosts = hosts.iter().map(|host| (host.name.clone(), host.fabric.clone())).collect();
    let mut items = Vec::new();
    for item in control.db.items().await?.iter() {
        let points = control.recovery_points(item).await.unwrap_or_default();
        items.push((item.name.clone(), points.len(), item.replication.last_point_ms));
    }
    Ok(RebuiltVault { vault: control.vault().await?, adoption, hosts, items })
}

/// Copies the server's own state into a new directory, also while the server runs: databases, keys and certificates. Recovery
/// points are not in it.
///
/// # Errors
/// When the directory is there already, and those of reading and writing.
pub async fn back_up(config: &ServerConfig, to: &Path) -> anyhow::Result<()> {
    if to.exists() {
        bail!("{} is there already; a backup is made in a new directory", to.display());
    }
    let mut unfinished = to.as_os_str().to_owned();
    unfinished.push(".unfinished");
    let unfinished = PathBuf::from(unfinished);
    if unfinished.exists() {
        bail!(
            "{} is there already: another backup is being made, or was not finished; remove it in that case",
            unfinished.display()
        );
    }
    make_dir(&unfinished)?;
    copy_state(&config.data_dir, &unfinished).await?;
    fs::rename(&unfinished, to).with_context(|| format!("make {}", to.display()))?;
    sync_parent(to)?;
    Ok(())
}

/// Puts a backup in the place of a server's own state, which must not be there. What has happened since the backup is taken from
/// the replica store when the server starts.
///
/// # Errors
/// When there is a server's state already, when the backup is none, and those of reading and writing.
pub async fn restore(config: &ServerConfig, from: &Path) -> anyhow::Result<()> {
    if !from.join(DATABASE).is_file() {
        bail!("{} is no backup of a server: it has no {DATABASE}", from.display());
    }
    for present in [DATABASE, PKI] {
        let path = config.data_dir.join(present);
        if path.exists() {
            bail!(
                "{} is there already: stop the server and move what is in {} elsewhere first",
                path.display(),
                config.data_dir.display()
            );
        }
    }
    copy_state(from, &config.data_dir).await
}

/// Databases and keys of a server, from one directory to another. The first database comes last: without it there is no server.
async fn copy_state(from: &Path, to: &Path) -> anyhow::Result<()> {
    make_dir(to)?;
    copy_files(&from.join(PKI), &to.join(PKI))?;
    let vaults = from.join(VAULTS_DIR);
    if vaults.is_dir() {
        for entry in fs::read_dir(&vaults)? {
            let entry = entry?;
            let target = to.join(VAULTS_DIR).join(entry.file_name());
            make_dir(&target)?;
            copy_database(&entry.path(), &target).await?;
        }
    }
    copy_database(from, to).await
}

async fn copy_database(from: &Path, to: &Path) -> anyhow::Result<()> {
    let (from, to) = (from.join(DATABASE), to.join(DATABASE));
    Db::copy(&from, &to).await.with_context(|| format!("copy the database {}", from.display()))?;
    fs::File::open(&to)?.sync_all()?;
    Ok(sync_parent(&to)?)
}

fn copy_files(from: &Path, to: &Path) -> anyhow::Result<()> {
    make_dir(to)?;
    for entry in fs::read_dir(from).with_context(|| format!("read {}", from.display()))? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let bytes = fs::read(entry.path()).with_context(|| format!("read {}", entry.path().display()))?;
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&target)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
    }
    Ok(fs::File::open(to)?.sync_all()?)
}

fn make_dir(path: &Path) -> anyhow::Result<()> {
    create_private_directory(path).with_context(|| format!("make {}", path.display()))
}
