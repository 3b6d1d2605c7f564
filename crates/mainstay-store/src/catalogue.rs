//! Documents beside the replicas: what a server must know to make use of them, should it lose everything else. What is in them
//! is their writer's business.

use bytes::Bytes;

use crate::envelope::Envelope;
use crate::{Store, StoreError, keys};

/// A document of a vault with thousands of items is a few MiB.
pub(crate) const ENVELOPE: Envelope = Envelope { magic: b"MSCATLG1", bytes_max: 64 << 20 };

impl Store {
    /// Writes a document, in place of one of the same name; it is durable when this returns. Names are like
    /// `folder/name`, of letters, digits and hyphens.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for other names and documents over 64 MiB.
    pub async fn put_document(&self, name: &str, document: &[u8]) -> Result<(), StoreError> {
        let key = key(name)?;
        let bytes = ENVELOPE.seal(name.as_bytes(), document).map_err(StoreError::Invalid)?;
        self.shared.storage.put_twice(&key, bytes.into()).await
    }

    /// Reads a document; `None` if there is none.
    ///
    /// # Errors
    /// [`StoreError::Damaged`].
    pub async fn document(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        let key = key(name)?;
        let Some(object) = self.shared.storage.get_copies(&key).await? else { return Ok(None) };
        let opened = ENVELOPE.read(name.as_bytes(), &object);
        opened.map(|opened| Some(opened.document.into())).map_err(|what| StoreError::damaged(&key, what))
    }

    /// Verifies all documents, and mends those of which one copy is damaged; answers how many those were. What is beyond
    /// mending is for their writer to find.
    ///
    /// # Errors
    /// [`StoreError::Storage`].
    pub async fn scrub_documents(&self) -> Result<usize, StoreError> {
        let storage = &self.shared.storage;
        let root = keys::catalogue();
        let mut mended = 0;
        for listed in storage.list(&root).await? {
            let key = listed.location;
            let Some(name) = key
                .prefix_match(&root)
                .map(|parts| parts.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/"))
            else {
                continue;
            };
            let Some(object) = storage.get_copies(&key).await? else { continue };
            let Ok(opened) = ENVELOPE.read(name.as_bytes(), &object) else { continue };
            if opened.is_damaged || !object.is_current {
                self.put_document(&name, &opened.document).await?;
                mended += usize::from(opened.is_damaged);
            }
        }
        Ok(mended)
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
