//! Recovery services providers: the agents of registered hosts, and the keys that register them.

use std::sync::Arc;

use mainstay_model::{ConfigurationChange, ProviderId};
use mainstay_provider::{Discover, Discovery, NoProgress, call};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    Requester,
    tokens::{TokenSecret, digest, new_secret},
};
use crate::{
    Control, ControlError,
    db::{ConfigurationJob, Resource, ResourceKind},
};

/// A registered host's agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProviderRecord {
    /// Identifier; the subject of its certificate.
    pub id: ProviderId,
    /// The host's name.
    pub name: String,
    /// Its fabric.
    pub fabric: String,
    /// When it was registered, milliseconds since the Unix epoch.
    pub registered_ms: i64,
    /// When it was last heard of.
    pub last_seen_ms: i64,
    /// The agent's version.
    pub version: String,
    /// What was last discovered on it.
    pub discovery: Option<Discovery>,
    /// When that was.
    pub discovered_ms: Option<i64>,
    /// Digest of the public key in its certificate: those of earlier registrations do not work any more. `None`: whatever
    /// certificate names the host.
    #[serde(default)]
    pub public_key: Option<String>,
    /// Whether the host has connected since it was registered. Until then the answer to its registration may have been lost.
    #[serde(default)]
    pub has_connected: bool,
}

/// What a host says of itself when it registers.
pub struct HostRegistration<'a> {
    /// Its name.
    pub name: &'a str,
    /// The agent's version.
    pub version: &'a str,
    /// Digest of the public key that its certificate will have; see [`ProviderRecord::public_key`].
    pub public_key: Option<String>,
}

impl Resource for ProviderRecord {
    const KIND: ResourceKind = ResourceKind::Provider;

    fn name(&self) -> String {
        self.id.to_string()
    }
}

/// A registration key as stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistrationKeyRecord {
    /// SHA-256 of the secret, hexadecimal.
    pub digest: String,
    /// The fabric it registers hosts in.
    pub fabric: String,
    /// When it stops to work, milliseconds since the Unix epoch.
    pub expires_ms: i64,
}

impl Resource for RegistrationKeyRecord {
    const KIND: ResourceKind = ResourceKind::RegistrationKey;

    fn name(&self) -> String {
        self.digest.clone()
    }
}

/// How long a registration key is valid: five days, as in Site Recovery.
pub const REGISTRATION_KEY_HOURS: i64 = 5 * 24;
const REGISTRATION_KEY_MS: i64 = REGISTRATION_KEY_HOURS * 3_600_000;

impl RegistrationKeyRecord {
    fn created_ms(&self) -> i64 {
        self.expires_ms - REGISTRATION_KEY_MS
    }
}

impl Control {
    /// Makes a key that registers hosts in a fabric for five days.
    pub async fn create_registration_key(
        &self,
        fabric: &str,
    ) -> Result<(RegistrationKeyRecord, TokenSecret), ControlError> {
        let fabric = self.fabric(fabric).await?;
        let secret = new_secret();
        let record = RegistrationKeyRecord {
            digest: digest(&secret),
            fabric: fabric.name,
            expires_ms: self.clock.now_ms() + REGISTRATION_KEY_MS,
        };
        let mut transaction = self.db.begin().await?;
        transaction.put_resource(&record).await?;
        transaction.commit().await?;
        Ok((record, TokenSecret(secret)))
    }

    /// The key that a secret opens, unless it has expired.
    pub async fn registration_key(&self, secret: &str) -> Result<RegistrationKeyRecord, ControlError> {
        let key: RegistrationKeyRecord = self.db.resource(&digest(secret)).await?.ok_or_else(|| {
            ControlError::invalid(
                "RegistrationKeyInvalid",
                "the registration key is not known to this server",
                "Make a new one with `mainstay host key --fabric FABRIC` and copy it whole.",
            )
        })?;
        if self.clock.now_ms() >= key.expires_ms {
            return Err(ControlError::invalid(
                "RegistrationKeyExpired",
                format!("the registration key of fabric '{}' has expired", key.fabric),
                "Make a new one with `mainstay host key --fabric FABRIC`.",
            ));
        }
        Ok(key)
    }

    /// Registers a host that shows a valid key. A host that registers again under the same name keeps its identity, and its
    /// certificate takes the place of the one before. Keys work often; so that none of them hands a host over to whoever finds
    /// it later, a host that has connected can only be registered again with a key that is newer than its registration.
    pub async fn register_host(
        &self,
        secret: &str,
        host: HostRegistration<'_>,
    ) -> Result<ProviderRecord, ControlError> {
        let key = self.registration_key(secret).await?;
        let now_ms = self.clock.now_ms();
        super::check_name("host", host.name)?;
        let mut transaction = self.db.begin().await?;
        let present: Vec<ProviderRecord> = transaction.resources().await?;
        let present = present.into_iter().find(|provider| {
            provider.name.eq_ignore_ascii_case(host.name) && provider.fabric.eq_ignore_ascii_case(&key.fabric)
        });
        if let Some(present) = &present
            && present.has_connected
            && key.created_ms() <= present.registered_ms
        {
            return Err(ControlError::invalid(
                "RegistrationKeyUsed",
                format!(
                    "host '{}' is registered and was connected; this registration key is older than that",
                    present.name
                ),
                format!("Make a new one with `mainstay host key --fabric {}`.", present.fabric),
            ));
        }
        let fresh = ProviderRecord {
            id: ProviderId(Uuid::new_v4()),
            name: host.name.to_owned(),
            fabric: key.fabric,
            registered_ms: now_ms,
            last_seen_ms: now_ms,
            version: host.version.to_owned(),
            discovery: None,
            discovered_ms: None,
            public_key: host.public_key,
            has_connected: false,
        };
        let record = match present {
            Some(ProviderRecord { id, name, fabric, discovery, discovered_ms, .. }) => {
                ProviderRecord { id, name, fabric, discovery, discovered_ms, ..fresh }
            }
            None => fresh,
        };
        transaction.put_resource(&record).await?;
        transaction.commit().await?;
        self.sites.registrations_changed();
        Ok(record)
    }

    /// Takes note that a host has connected with its certificate.
    pub async fn note_connection(&self, id: ProviderId) -> Result<(), ControlError> {
        if self.provider(id).await?.has_connected {
            return Ok(());
        }
        let mut transaction = self.db.begin().await?;
        if let Some(mut record) = transaction.resource::<ProviderRecord>(&id.to_string()).await? {
            record.has_connected = true;
            transaction.put_resource(&record).await?;
            transaction.commit().await?;
        }
        Ok(())
    }

    /// Asks all hosts, or those of a fabric, what is on them. Hosts that are away are left as they were last seen.
    pub async fn refresh_providers(
        &self,
        fabric: Option<&str>,
        change: ConfigurationChange,
        by: Requester,
    ) -> Result<ConfigurationJob, ControlError> {
        for provider in self.providers().await?.iter() {
            let is_meant = fabric.is_none_or(|fabric| provider.fabric.eq_ignore_ascii_case(fabric));
            if is_meant && self.sites.is_connected(provider.id) {
                self.refresh_provider(provider.id).await?;
            }
        }
        self.record_configuration(change, fabric.unwrap_or("vault"), by).await
    }

    /// All registered hosts.
    pub async fn providers(&self) -> Result<Arc<Vec<Arc<ProviderRecord>>>, ControlError> {
        Ok(self.db.shared_resources().await?)
    }

    /// A registered host by identifier.
    pub async fn provider(&self, id: ProviderId) -> Result<ProviderRecord, ControlError> {
        self.db
            .resource(&id.to_string())
            .await?
            .ok_or_else(|| ControlError::not_found("registered host", id.to_string()))
    }

    /// Removes a registered host; its certificate stops to work.
    pub async fn remove_provider(
        &self,
        id: ProviderId,
        by: Requester,
    ) -> Result<ConfigurationJob, ControlError> {
        let provider = self.provider(id).await?;
        let items = self.db.items().await?;
        if let Some(item) =
            items.iter().find(|item| item.primary_provider == id || item.recovery_provider == id)
        {
            return Err(ControlError::Conflict(format!(
                "host '{}' still serves the replicated item '{}'",
                provider.name, item.name
            )));
        }
        let mut transaction = self.db.begin().await?;
        transaction.remove_resource::<ProviderRecord>(&id.to_string()).await?;
        let job = self.configuration_job(ConfigurationChange::RemoveProvider, &provider.name, by);
        transaction.put_configuration_job(&job).await?;
        transaction.commit().await?;
        self.sites.registrations_changed();
        Ok(job)
    }

    /// As [`Self::refresh_provider`], at somebody's request; the job tells that it was done.
    pub async fn refresh_provider_for(
        &self,
        id: ProviderId,
        by: Requester,
    ) -> Result<ConfigurationJob, ControlError> {
        let provider = self.provider(id).await?;
        self.refresh_provider(id).await?;
        self.record_configuration(ConfigurationChange::RefreshProvider, &provider.name, by).await
    }

    /// Asks a host what is on it and keeps the answer.
    pub async fn refresh_provider(&self, id: ProviderId) -> Result<Discovery, ControlError> {
        let site = self.sites.get(id)?;
        let items_before = self.db.items().await?;
        let discovery = call(&*site, Discover {}, &NoProgress).await?;
        let now_ms = self.clock.now_ms();
        let mut transaction = self.db.begin().await?;
        if let Some(mut record) = transaction.resource::<ProviderRecord>(&id.to_string()).await? {
            record.last_seen_ms = now_ms;
            record.discovered_ms = Some(now_ms);
            record.discovery = Some(discovery.clone());
            transaction.put_resource(&record).await?;
            transaction.commit().await?;
        }
        self.note_changes(id, &discovery).await?;
        self.note_old_copies(id, &discovery, &items_before).await?;
        Ok(discovery)
    }
}
