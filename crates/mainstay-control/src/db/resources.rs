//! Resources that have a name and little else: fabrics, providers, policies, mappings, tokens, keys, service principals.

use serde::{Serialize, de::DeserializeOwned};
use sqlx::Row as _;

use super::{Db, DbError, Transaction, decode, encode};

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

/// A document that is kept as a named resource.
pub trait Resource: Serialize + DeserializeOwned + Send {
    /// What kind it is.
    const KIND: ResourceKind;
    /// Its name, unique among its kind; names that differ only in case are the same.
    fn name(&self) -> String;
}

impl Db {
    /// Reads a resource by name.
    pub async fn resource<R: Resource>(&self, name: &str) -> Result<Option<R>, DbError> {
        let kind = R::KIND.key();
        let row = sqlx::query("SELECT document FROM resources WHERE kind = $1 AND name = $2")
            .bind(kind)
            .bind(name.to_lowercase())
            .fetch_optional(&self.pool)
            .await?;
        row.map(|row| decode(kind, name, row.try_get("document")?)).transpose()
    }

    /// All resources of a kind, by name.
    pub async fn resources<R: Resource>(&self) -> Result<Vec<R>, DbError> {
        let kind = R::KIND.key();
        let rows = sqlx::query("SELECT name, document FROM resources WHERE kind = $1 ORDER BY name")
            .bind(kind)
            .fetch_all(&self.pool)
            .await?;
        rows.iter().map(|row| decode(kind, row.try_get("name")?, row.try_get("document")?)).collect()
    }
}

impl Transaction {
    /// All resources of a kind, by name.
    pub async fn resources<R: Resource>(&mut self) -> Result<Vec<R>, DbError> {
        let kind = R::KIND.key();
        let rows = sqlx::query("SELECT name, document FROM resources WHERE kind = $1 ORDER BY name")
            .bind(kind)
            .fetch_all(&mut *self.inner)
            .await?;
        rows.iter().map(|row| decode(kind, row.try_get("name")?, row.try_get("document")?)).collect()
    }

    /// Reads a resource by name.
    pub async fn resource<R: Resource>(&mut self, name: &str) -> Result<Option<R>, DbError> {
        let kind = R::KIND.key();
        let row = sqlx::query("SELECT document FROM resources WHERE kind = $1 AND name = $2")
            .bind(kind)
            .bind(name.to_lowercase())
            .fetch_optional(&mut *self.inner)
            .await?;
        row.map(|row| decode(kind, name, row.try_get("document")?)).transpose()
    }

    /// Writes a resource, replacing one of the same name.
    pub async fn put_resource<R: Resource>(&mut self, resource: &R) -> Result<(), DbError> {
        let (kind, name) = (R::KIND.key(), resource.name());
        sqlx::query(
            "INSERT INTO resources (kind, name, document) VALUES ($1, $2, $3)
             ON CONFLICT (kind, name) DO UPDATE SET document = excluded.document",
        )
        .bind(kind)
        .bind(name.to_lowercase())
        .bind(encode(kind, &name, resource)?)
        .execute(&mut *self.inner)
        .await?;
        Ok(())
    }

    /// Removes a resource; answers whether it was there.
    pub async fn remove_resource<R: Resource>(&mut self, name: &str) -> Result<bool, DbError> {
        let result = sqlx::query("DELETE FROM resources WHERE kind = $1 AND name = $2")
            .bind(R::KIND.key())
            .bind(name.to_lowercase())
            .execute(&mut *self.inner)
            .await?;
        Ok(result.rows_affected() > 0)
    }
}
