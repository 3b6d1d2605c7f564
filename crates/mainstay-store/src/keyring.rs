//! The keys that a store's objects are sealed with.
//!
//! Objects are sealed with *data keys*. These lie in the store itself, wrapped by the *vault key*, which lies anywhere else.
//! To rotate the vault key is to wrap them anew, which is one small object; it also begins a new data key. Scrubs seal again
//! what an older one has sealed.

use std::collections::HashMap;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::rand::{SecureRandom as _, SystemRandom};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::cipher::DataKey;
use crate::envelope::Envelope;
use crate::storage::Created;
use crate::{Store, StoreError, keys};

const ENVELOPE: Envelope = Envelope { magic: b"MSKEYRN1", bytes_max: 1 << 20 };
const KEY_BYTES: usize = 32;
const PREFIX: &str = "mainstay-vault-key-1:";

/// What the data keys of a store are wrapped by. Whoever has it and the store can read everything in it; who has lost it
/// can read nothing.
#[derive(Clone)]
pub struct VaultKey {
    secret: [u8; KEY_BYTES],
}

impl std::fmt::Debug for VaultKey {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "VaultKey({})", self.fingerprint())
    }
}

impl VaultKey {
    /// A new one.
    ///
    /// # Errors
    /// When the system has no randomness to give.
    pub fn generate() -> Result<Self, StoreError> {
        Ok(Self { secret: random()? })
    }

    /// Reads what [`Self::to_text`] wrote; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.trim().strip_prefix(PREFIX)?;
        if digits.len() != 2 * KEY_BYTES || !digits.is_ascii() {
            return None;
        }
        let mut secret = [0; KEY_BYTES];
        for (byte, at) in secret.iter_mut().zip((0..).step_by(2)) {
            *byte = u8::from_str_radix(&digits[at..at + 2], 16).ok()?;
        }
        Some(Self { secret })
    }

    /// One line of text, for a file that only the server may read and a copy in a safe place.
    pub fn to_text(&self) -> String {
        let digits: String = self.secret.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{PREFIX}{digits}\n")
    }

    /// A name for people, from which the key does not follow.
    pub fn fingerprint(&self) -> String {
        self.id().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn id(&self) -> [u8; 8] {
        let mut id = [0; 8];
        id.copy_from_slice(&blake3::derive_key("mainstay vault key id 1", &self.secret)[..8]);
        id
    }

    fn cipher(&self) -> Result<LessSafeKey, StoreError> {
        let secret = blake3::derive_key("mainstay vault key wrap 1", &self.secret);
        UnboundKey::new(&AES_256_GCM, &secret).map(LessSafeKey::new).map_err(StoreError::internal)
    }

    fn wrap(&self, key: &DataKey) -> Result<Wrapped, StoreError> {
        let nonce = random()?;
        let mut sealed = key.secret.to_vec();
        self.cipher()?
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(key.id.as_bytes()),
                &mut sealed,
            )
            .map_err(StoreError::internal)?;
        Ok(Wrapped { id: key.id, nonce, sealed })
    }

    fn unwrap(&self, wrapped: &Wrapped) -> Result<DataKey, StoreError> {
        let damaged = || StoreError::damaged(&keys::keyring(), "a data key");
        let mut sealed = wrapped.sealed.clone();
        let nonce = Nonce::assume_unique_for_key(wrapped.nonce);
        let opened = self.cipher()?.open_in_place(nonce, Aad::from(wrapped.id.as_bytes()), &mut sealed);
        let secret = opened.map_err(|_| damaged())?;
        Ok(DataKey { id: wrapped.id, secret: (&*secret).try_into().map_err(|_| damaged())? })
    }
}

fn random<const N: usize>() -> Result<[u8; N], StoreError> {
    let mut bytes = [0; N];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| StoreError::Internal("the system gives no random bytes".to_owned()))?;
    Ok(bytes)
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Wrapped {
    id: Uuid,
    nonce: [u8; 12],
    sealed: Vec<u8>,
}

/// The object in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Ring {
    /// The vault key that wraps all of them.
    wrapped_by: [u8; 8],
    active: Uuid,
    keys: Vec<Wrapped>,
}

/// Data keys in the clear.
pub(crate) struct DataKeys {
    pub(crate) active: DataKey,
    pub(crate) all: HashMap<Uuid, DataKey>,
}

impl std::fmt::Debug for DataKeys {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "DataKeys({})", self.active.id)
    }
}

impl DataKeys {
    pub(crate) fn salt() -> Result<[u8; 16], StoreError> {
        random()
    }
}

/// How a store was unlocked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unlocked {
    /// It is not encrypted, and no key was given.
    Plain,
    /// It was not encrypted; what is written from now on is.
    Begun,
    /// With the key it was locked with.
    Same,
    /// With a former key: it is locked with the given one now.
    Rotated,
}

impl Store {
    /// Must be called before anything else is read or written. `former` are vault keys that `key` has replaced: a store that
    /// one of them locks is locked with `key` from now on, and a new data key begins.
    ///
    /// # Errors
    /// [`StoreError::Locked`] when the store is locked with another key, or a key is missing; [`StoreError::Damaged`].
    pub async fn unlock(&self, key: Option<&VaultKey>, former: &[VaultKey]) -> Result<Unlocked, StoreError> {
        let storage = &self.shared.storage;
        let at = keys::keyring();
        let found = match storage.get_copies(&at).await? {
            None => None,
            Some(copies) => {
                let opened = ENVELOPE.read(&[], &copies).map_err(|what| StoreError::damaged(&at, what))?;
                let ring: Result<Ring, _> = postcard::from_bytes(&opened.document);
                Some(ring.map_err(|_| StoreError::damaged(&at, "encoding"))?)
            }
        };
        let (ring, how) = match (found, key) {
            (None, None) => return Ok(Unlocked::Plain),
            (Some(ring), None) => return Err(StoreError::Locked { by: hex(&ring.wrapped_by) }),
            (None, Some(key)) => {
                let first = new_key()?;
                let keys = vec![key.wrap(&first)?];
                let ring = Ring { wrapped_by: key.id(), active: first.id, keys };
                if storage.create_twice(&at, encoded(&ring)?).await? == Created::Taken {
                    return Err(StoreError::Busy);
                }
                (ring, Unlocked::Begun)
            }
            (Some(ring), Some(key)) if ring.wrapped_by == key.id() => (ring, Unlocked::Same),
            (Some(ring), Some(key)) => {
                let old = former.iter().find(|former| former.id() == ring.wrapped_by);
                let Some(old) = old else { return Err(StoreError::Locked { by: hex(&ring.wrapped_by) }) };
                let mut opened =
                    ring.keys.iter().map(|wrapped| old.unwrap(wrapped)).collect::<Result<Vec<_>, _>>()?;
                opened.push(new_key()?);
                let active = opened.last().map_or(ring.active, |key| key.id);
                let keys = opened.iter().map(|opened| key.wrap(opened)).collect::<Result<_, _>>()?;
                let ring = Ring { wrapped_by: key.id(), active, keys };
                storage.put_twice(&at, encoded(&ring)?).await?;
                (ring, Unlocked::Rotated)
            }
        };
        let Some(key) = key else { return Ok(how) };
        let mut all = HashMap::new();
        for wrapped in &ring.keys {
            all.insert(wrapped.id, key.unwrap(wrapped)?);
        }
        let active = all.get(&ring.active).cloned();
        let active = active.ok_or_else(|| StoreError::damaged(&at, "the active key is missing"))?;
        storage.set_keys(DataKeys { active, all });
        Ok(how)
    }
}

fn new_key() -> Result<DataKey, StoreError> {
    Ok(DataKey { id: Uuid::new_v4(), secret: random()? })
}

fn encoded(ring: &Ring) -> Result<bytes::Bytes, StoreError> {
    let plain = postcard::to_stdvec(ring).map_err(StoreError::internal)?;
    Ok(ENVELOPE.seal(&[], &plain).map_err(StoreError::internal)?.into())
}

fn hex(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_its_text_and_is_not_shown() {
        let key = VaultKey::generate().unwrap();
        let text = key.to_text();
        assert_eq!(VaultKey::parse(&text).unwrap().secret, key.secret);
        assert!(!format!("{key:?}").contains(&text[PREFIX.len()..PREFIX.len() + 16]));
        for wrong in
            ["", PREFIX, &text[1..], &text[..text.len() - 2], &format!("{text}0"), &text.replace(':', ":é")]
        {
            assert!(VaultKey::parse(wrong).is_none(), "{wrong:?}");
        }
    }

    #[test]
    fn a_data_key_is_bound_to_its_id_and_its_vault_key() {
        let (key, other) = (VaultKey::generate().unwrap(), VaultKey::generate().unwrap());
        let data = new_key().unwrap();
        let wrapped = key.wrap(&data).unwrap();
        assert_eq!(key.unwrap(&wrapped).unwrap().secret, data.secret);
        assert!(other.unwrap(&wrapped).is_err());
        assert!(key.unwrap(&Wrapped { id: Uuid::from_u128(1), ..wrapped }).is_err());
    }
}
