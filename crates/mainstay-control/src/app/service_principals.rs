//! Service principals: programs that sign in with a client id and a secret, as Azure's own clients do.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    check_name,
    tokens::{Role, TokenSecret, digest, is_before, new_secret},
};
use crate::{
    Control, ControlError,
    db::{Resource, ResourceKind},
};

/// A service principal as stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePrincipalRecord {
    /// What it signs in as, and its object id.
    pub client_id: Uuid,
    /// For people: what it is for.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// SHA-256 of the secret, hexadecimal.
    pub digest: String,
    /// When it was made, milliseconds since the Unix epoch.
    pub created_ms: i64,
    /// When it stops to work; `None` = never.
    pub expires_ms: Option<i64>,
}

impl Resource for ServicePrincipalRecord {
    const KIND: ResourceKind = ResourceKind::ServicePrincipal;

    fn name(&self) -> String {
        self.client_id.to_string()
    }
}

impl Control {
    /// Makes a service principal. Names need not be unique, as in Azure; the client id is what identifies it.
    pub async fn create_service_principal(
        &self,
        name: &str,
        role: Role,
        expires_ms: Option<i64>,
    ) -> Result<(ServicePrincipalRecord, TokenSecret), ControlError> {
        check_name("service principal", name)?;
        let secret = new_secret();
        let record = ServicePrincipalRecord {
            client_id: Uuid::new_v4(),
            name: name.to_owned(),
            role,
            digest: digest(&secret),
            created_ms: self.clock.now_ms(),
            expires_ms,
        };
        let mut transaction = self.db.begin().await?;
        transaction.put_resource(&record).await?;
        transaction.commit().await?;
        Ok((record, TokenSecret(secret)))
    }

    /// The service principal of a client id, if there is one that has not expired.
    pub async fn valid_service_principal(
        &self,
        client_id: Uuid,
    ) -> Result<Option<ServicePrincipalRecord>, ControlError> {
        let record: Option<ServicePrincipalRecord> = self.db.resource(&client_id.to_string()).await?;
        let now_ms = self.clock.now_ms();
        Ok(record.filter(|record| is_before(now_ms, record.expires_ms)))
    }

    /// The service principal that a client id and a secret belong to, if it is valid now. Digests are compared: how long
    /// that takes tells nothing of a secret.
    pub async fn authenticate_service_principal(
        &self,
        client_id: Uuid,
        secret: &str,
    ) -> Result<Option<ServicePrincipalRecord>, ControlError> {
        let record = self.valid_service_principal(client_id).await?;
        Ok(record.filter(|record| record.digest == digest(secret)))
    }

    /// All service principals.
    pub async fn service_principals(&self) -> Result<Vec<ServicePrincipalRecord>, ControlError> {
        Ok(self.db.resources().await?)
    }

    /// Removes a service principal; the access tokens it was given stop to work at once.
    pub async fn remove_service_principal(&self, client_id: &str) -> Result<(), ControlError> {
        let mut transaction = self.db.begin().await?;
        if !transaction.remove_resource::<ServicePrincipalRecord>(client_id).await? {
            return Err(ControlError::not_found("service principal", client_id));
        }
        Ok(transaction.commit().await?)
    }
}
