//! Documents beside the replicas: what a server must know to make use of them, should it lose everything else. What is in them
//! is their writer's business.

use bytes::Bytes;

use crate::envelope::Envelope;
use crate::{Store, StoreError, keys};

/// A document of a vault with thousands of items is a few MiB.
pub(crate) const ENVELOPE: Envelope = Envelope { magic: b"MSCATLG1", version: 1, bytes_max: 64 << 20 };

impl Store {
    /// Writes a document, in place of one of the same name; it is durable when this returns. Names are like
    /// `folder/name`, of letters, digits and hyphens.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for other names and documents over 64 MiB.
    pub async fn put_document(&self, name: &str, document: &[u8]) -> Result<(), StoreError> {
        let key = key(name)?;
        let bytes = ENVELOPE.seal(name.as_bytes(), document).map_err(StoreError::Invalid)?;
        self.shared.storage.put(&key, bytes).await
    }

    /// Reads a document; `None` if there is none.
    ///
    /// # Errors
    /// [`StoreError::Damaged`].
    pub async fn document(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        let key = key(name)?;
        let Some(bytes) = self.shared.storage.get(&key).await? else { return Ok(None) };
        let document = ENVELOPE.open(name.as_bytes(), &bytes);
        document.map(|document| Some(document.into())).map_err(|what| StoreError::damaged(&key, what))
    }

    /// The names of all documents in a folder, with the folder's.
    ///
    /// # Errors
    /// [`StoreError::Storage`].
    pub async fn documents(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        let listed = self.shared.storage.list(&key(folder)?).await?;
        let names = listed.iter().filter_map(|object| object.location.filename());
        Ok(names.map(|name| format!("{folder}/{name}")).collect())
    }

    /// Removes a document; one that is gone is no error.
    ///
    /// # Errors
    /// [`StoreError::Storage`].
    pub async fn remove_document(&self, name: &str) -> Result<(), StoreError> {
        self.shared.storage.delete(&key(name)?).await
    }
}

fn key(name: &str) -> Result<object_store::path::Path, StoreError> {
    let is_plain = |part: &str| {
        !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    match name.split('/').all(is_plain) {
        true => Ok(keys::document(name)),
        false => Err(StoreError::Invalid("the name of a document")),
    }
}
