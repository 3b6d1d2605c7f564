//! Resources that have a name and little else: fabrics, providers, policies, mappings, tokens, keys, service principals.

use std::{any::Any, collections::HashMap, sync::Arc};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use sqlx::Row as _;
use tokio::sync::Mutex;

use super::{
    Db, DbError, Transaction,
    counters::{count, raise},
    decode, encode,
};

/// The kinds of named resources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResourceKind {
    /// The vault itself.
    Vault,
    /// A further vault of the same server.
    HostedVault,
    /// A site.
    Fabric,
    /// A registered host's agent.
    Provider,
    /// A replication policy.
    Policy,
    /// A container mapping.
    ContainerMapping,
    /// An access token, named by the digest of its secret.
    Token,
    /// A registration key, named by the digest of its secret.
    RegistrationKey,
    /// A recovery plan.
    RecoveryPlan,
    /// A service principal, named by its client id.
    ServicePrincipal,
    /// Jobs offered for download, named by the job that did it.
    JobExport,
    /// A mapping of a network to one of a recovery site.
    NetworkMapping,
    /// Who is told of what goes wrong.
    AlertSetting,
    /// Settings that the vault keeps for its clients.
    VaultSetting,
}

impl ResourceKind {
    fn key(self) -> &'static str {
        match self {
            Self::Vault => "vault",
            Self::HostedVault => "hosted-vault",
            Self::Fabric => "fabric",
            Self::Provider => "provider",
            Self::Policy => "policy",
            Self::ContainerMapping => "container-mapping",
            Self::Token => "token",
            Self::RegistrationKey => "registration-key",
            Self::RecoveryPlan => "recovery-plan",
            Self::ServicePrincipal => "service-principal",
            Self::JobExport => "job-export",
            Self::NetworkMapping => "network-mapping",
            Self::AlertSetting => "alert-setting",
            Self::VaultSetting => "vault-setting",
        }
    }
}

/// What the replica store's catalogue has of resources: all but who may sign in, keys, and what is made for one use.
const CATALOGUED: [ResourceKind; 10] = [
    ResourceKind::Vault,
    ResourceKind::HostedVault,
    ResourceKind::Fabric,
    ResourceKind::Provider,
    ResourceKind::Policy,
    ResourceKind::ContainerMapping,
    ResourceKind::RecoveryPlan,
    ResourceKind::NetworkMapping,
    ResourceKind::AlertSetting,
    ResourceKind::VaultSetting,
];

/// A resource as it is written, of whatever kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredResource {
    kind: String,
    name: String,
    /// Its record.
    pub document: Value,
}

impl StoredResource {
    /// Whether it is of this kind.
    pub fn is<R: Resource>(&self) -> bool {
        self.kind == R::KIND.key()
    }
}

/// A document that is kept as a named resource.
pub trait Resource: Serialize + DeserializeOwned + Clone + Send + Sync + 'static {
    /// What kind it is.
    const KIND: ResourceKind;
    /// Its name, unique among its kind; names that differ only in case are the same.
    fn name(&self) -> String;
}

/// Resources as last read: every request needs some, and they are seldom written. Transactions that write any are counted in
/// the database, as those that write items.
#[derive(Default)]
pub(super) struct ResourceCache {
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    writes: i64,
    /// By kind, its resources by name: an `Arc<Vec<Arc<R>>>`.
    kinds: HashMap<&'static str, Box<dyn Any + Send + Sync>>,
}

impl Db {
    /// Reads a resource by name.
    pub async fn resource<R: Resource>(&self, name: &str) -> Result<Option<R>, DbError> {
        let all = self.shared_resources::<R>().await?;
        let found = all.binary_search_by_key(&name.to_lowercase(), |resource| resource.name().to_lowercase());
        Ok(found.ok().map(|index| R::clone(&all[index])))
    }

    /// All resources of a kind, by name.
    pub async fn resources<R: Resource>(&self) -> Result<Vec<R>, DbError> {
        Ok(self.shared_resources::<R>().await?.iter().map(|resource| R::clone(resource)).collect())
    }

    /// The same, without copies of them.
    pub async fn shared_resources<R: Resource>(&self) -> Result<Arc<Vec<Arc<R>>>, DbError> {
        let mut known = self.resource_cache.known.lock().await;
        // Before reading: what is written meanwhile is read next time.
        let writes = self.counts().await?.resource_writes;
        // Another request may have brought them further than this one asks for.
        if known.writes < writes {
            known.kinds.clear();
            known.writes = writes;
        }
        let kind = R::KIND.key();
        if let Some(found) = known.kinds.get(kind).and_then(|found| found.downcast_ref::<Arc<Vec<Arc<R>>>>())
        {
            return Ok(found.clone());
        }
        let rows = sqlx::query("SELECT name, document FROM resources WHERE kind = $1 ORDER BY name")
            .bind(kind)
            .fetch_all(&self.connections)
            .await?;
        let read = rows
            .iter()
            .map(|row| decode(kind, row.try_get("name")?, row.try_get("document")?).map(Arc::new))
            .collect::<Result<Vec<Arc<R>>, DbError>>()?;
        let read = Arc::new(read);
        known.kinds.insert(kind, Box::new(read.clone()));
        Ok(read)
    }
}

impl Db {
    /// Everything that the catalogue has of resources.
    pub async fn catalogued_resources(&self) -> Result<Vec<StoredResource>, DbError> {
        let rows = sqlx::query("SELECT kind, name, document FROM resources ORDER BY kind, name")
            .fetch_all(&self.connections)
            .await?;
        let mut found = Vec::new();
        for row in rows {
            let kind: String = row.try_get("kind")?;
            if let Some(known) = CATALOGUED.iter().find(|known| known.key() == kind) {
                let name: String = row.try_get("name")?;
                let document = decode(known.key(), &name, row.try_get("document")?)?;
                found.push(StoredResource { kind, name, document });
            }
        }
        Ok(found)
    }
}

impl Transaction {
    /// Puts these in the place of everything that the catalogue has of resources, as a database would have them that has
    /// seen so many writes.
    pub async fn replace_catalogued_resources(
        &mut self,
        resources: &[StoredResource],
        writes: i64,
    ) -> Result<(), DbError> {
        self.count_resource_write().await?;
        for kind in CATALOGUED {
            sqlx::query("DELETE FROM resources WHERE kind = $1")
                .bind(kind.key())
                .execute(&mut self.inner)
                .await?;
        }
        for resource in resources {
            let Some(kind) = CATALOGUED.iter().find(|kind| kind.key() == resource.kind) else { continue };
            sqlx::query("INSERT INTO resources (kind, name, document) VALUES ($1, $2, $3)")
                .bind(kind.key())
                .bind(&resource.name)
                .bind(encode(kind.key(), &resource.name, &resource.document)?)
                .execute(&mut self.inner)
                .await?;
        }
        raise(self, "resource-writes", writes).await
    }

    /// All resources of a kind, by name.
    pub async fn resources<R: Resource>(&mut self) -> Result<Vec<R>, DbError> {
        let kind = R::KIND.key();
        let rows = sqlx::query("SELECT name, document FROM resources WHERE kind = $1 ORDER BY name")
            .bind(kind)
            .fetch_all(&mut self.inner)
            .await?;
        rows.iter().map(|row| decode(kind, row.try_get("name")?, row.try_get("document")?)).collect()
    }

    /// Reads a resource by name.
    pub async fn resource<R: Resource>(&mut self, name: &str) -> Result<Option<R>, DbError> {
        let kind = R::KIND.key();
        let row = sqlx::query("SELECT document FROM resources WHERE kind = $1 AND name = $2")
            .bind(kind)
            .bind(name.to_lowercase())
            .fetch_optional(&mut self.inner)
            .await?;
        row.map(|row| decode(kind, name, row.try_get("document")?)).transpose()
    }

    pub(super) async fn count_resource_write(&mut self) -> Result<(), DbError> {
        if !self.has_counted_resources {
            count(self, "resource-writes").await?;
            self.has_counted_resources = true;
        }
        Ok(())
    }

    /// Writes a resource, replacing one of the same name.
    pub async fn put_resource<R: Resource>(&mut self, resource: &R) -> Result<(), DbError> {
        self.count_resource_write().await?;
        let (kind, name) = (R::KIND.key(), resource.name());
        sqlx::query(
            "INSERT INTO resources (kind, name, document) VALUES ($1, $2, $3)
             ON CONFLICT (kind, name) DO UPDATE SET document = excluded.document",
        )
        .bind(kind)
        .bind(name.to_lowercase())
        .bind(encode(kind, &name, resource)?)
        .execute(&mut self.inner)
        .await?;
        Ok(())
    }

    /// Removes a resource; answers whether it was there.
    pub async fn remove_resource<R: Resource>(&mut self, name: &str) -> Result<bool, DbError> {
        self.count_resource_write().await?;
        let result = sqlx::query("DELETE FROM resources WHERE kind = $1 AND name = $2")
            .bind(R::KIND.key())
            .bind(name.to_lowercase())
            .execute(&mut self.inner)
            .await?;
        Ok(result.rows_affected() > 0)
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
    struct Thing {
        name: String,
        value: u32,
    }

    impl Resource for Thing {
        const KIND: ResourceKind = ResourceKind::Policy;

        fn name(&self) -> String {
            self.name.clone()
        }
    }

    async fn put(db: &Db, name: &str, value: u32) {
        let mut transaction = db.begin().await.unwrap();
        transaction.put_resource(&Thing { name: name.to_owned(), value }).await.unwrap();
        transaction.commit().await.unwrap();
    }

    async fn value(db: &Db, name: &str) -> Option<u32> {
        db.resource::<Thing>(name).await.unwrap().map(|thing| thing.value)
    }

    async fn behaves(db: &Db, other: &Db) {
        assert_eq!(value(db, "b").await, None);
        put(db, "B", 1).await;
        put(other, "a", 2).await;
        assert_eq!((value(db, "b").await, value(db, "A").await), (Some(1), Some(2)));
        let first = db.shared_resources::<Thing>().await.unwrap();
        assert!(Arc::ptr_eq(&first, &db.shared_resources::<Thing>().await.unwrap()));
        let mut transaction = db.begin().await.unwrap();
        transaction.put_resource(&Thing { name: "b".to_owned(), value: 3 }).await.unwrap();
        // Its own writes are seen by itself alone until they are committed.
        assert_eq!(transaction.resource::<Thing>("b").await.unwrap().map(|thing| thing.value), Some(3));
        drop(transaction);
        assert_eq!(value(db, "b").await, Some(1));
        let mut transaction = other.begin().await.unwrap();
        assert!(transaction.remove_resource::<Thing>("b").await.unwrap());
        transaction.commit().await.unwrap();
        assert_eq!(value(db, "b").await, None);
        assert_eq!(db.resources::<Thing>().await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn what_anybody_wrote_is_seen_at_once_and_nothing_is_read_twice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mainstay.db");
        behaves(&Db::open(&path).await.unwrap(), &Db::open(&path).await.unwrap()).await;
        let memory = Db::in_memory().await.unwrap();
        behaves(&memory, &memory).await;
    }
}
