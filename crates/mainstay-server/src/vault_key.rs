//! The keys of encrypted replica stores, in files.

use std::{fs, io::Write as _, os::unix::fs::OpenOptionsExt as _, path::Path};

use anyhow::{Context as _, bail};
use mainstay_block::durable::sync_parent;
use mainstay_store::{Store, StoreError, Unlocked, VaultKey};

use crate::ServerConfig;

/// Makes a vault key in a new file that only its owner can read; answers its fingerprint.
///
/// # Errors
/// When the file is there already, or cannot be written.
pub fn create_vault_key(path: &Path) -> anyhow::Result<String> {
    let key = VaultKey::generate()?;
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("make the key file {}", path.display()))?;
    file.write_all(key.to_text().as_bytes())?;
    file.sync_all()?;
    sync_parent(path)?;
    Ok(key.fingerprint())
}

fn read(path: &Path) -> anyhow::Result<VaultKey> {
    let text = fs::read_to_string(path).with_context(|| format!("vault key {}", path.display()))?;
    VaultKey::parse(&text).with_context(|| {
        format!("{} holds no vault key; `mainstay server key FILE` makes one", path.display())
    })
}

/// Unlocks a store with the configured keys.
pub(crate) async fn unlock(store: &Store, config: &ServerConfig) -> anyhow::Result<()> {
    let key = config.vault_key_file.as_deref().map(read).transpose()?;
    let former =
        config.former_vault_key_files.iter().map(|path| read(path)).collect::<anyhow::Result<Vec<_>>>()?;
    match store.unlock(key.as_ref(), &former).await {
        Ok(Unlocked::Plain | Unlocked::Same) => Ok(()),
        Ok(Unlocked::Begun) => {
            tracing::info!(
                "what is written into the store from now on is encrypted; scrubs encrypt the rest"
            );
            Ok(())
        }
        Ok(Unlocked::Rotated) => {
            tracing::info!("the store is locked with the new vault key; scrubs encrypt what it holds anew");
            Ok(())
        }
        Err(StoreError::Locked { by }) => match key {
            None => bail!("it is encrypted with the vault key {by}: name its file as vault_key_file"),
            Some(key) => bail!(
                "it is encrypted with the vault key {by}, not with {}: name the file of {by} as vault_key_file, or in \
                 former_vault_key_files to replace it",
                key.fingerprint()
            ),
        },
        Err(error) => Err(error.into()),
    }
}
