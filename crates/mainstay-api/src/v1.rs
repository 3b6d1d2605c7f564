//! What Azure has no word for, under `/api/v1`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Answer of `GET /api/v1/vault`: where the ARM resources are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Vault {
    /// Subscription id.
    pub subscription: String,
    /// Resource group.
    pub resource_group: String,
    /// Vault.
    pub name: String,
    /// The server's version.
    pub version: String,
}

/// Answer of `POST /api/v1/fabrics/{fabric}/registrationKeys`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RegistrationKey {
    /// What to give to `mainstay agent register`: the server's address, the CA's fingerprint and the secret.
    pub key: String,
    /// The fabric.
    pub fabric: String,
    /// When it stops to work.
    pub expires: String,
}

/// Request of `POST /api/v1/register`, the only one that needs no token: the key is the proof.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RegisterRequest {
    /// The key's secret.
    pub secret: String,
    /// The host's name.
    pub host: String,
    /// The agent's version.
    pub version: String,
    /// Certificate signing request, PEM. The private key stays on the host.
    pub certificate_request: String,
}

/// Answer of `POST /api/v1/register`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RegisterAnswer {
    /// The host's identifier.
    pub provider: String,
    /// Its fabric.
    pub fabric: String,
    /// Certificate, PEM.
    pub certificate: String,
    /// The CA's certificate, PEM.
    pub authority: String,
    /// Address of the agents' endpoint, `HOST:PORT`.
    pub endpoint: String,
}

/// Answer of `GET /api/v1/items/{id}`: what ARM has no field for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ItemStatus {
    /// The item's internal id.
    pub id: String,
    /// The fencing number.
    pub generation: u64,
    /// The VM at home.
    pub vm: String,
    /// The recovery VM.
    pub recovery_vm: Option<String>,
    /// The test copy.
    pub test_vm: Option<String>,
    /// Whether the recovery VM no longer needs the store.
    pub is_hydrated: Option<bool>,
    /// Bytes that differed, over all cycles.
    pub bytes_changed: u64,
    /// Bytes that went over the data connection, over all cycles.
    pub bytes_moved: u64,
    /// RPO in seconds.
    pub rpo_seconds: Option<i64>,
    /// Progress of the cycle under way.
    pub cycle: Option<CycleProgress>,
    /// Seconds that may have been lost in the last failover.
    pub loss_seconds: Option<i64>,
    /// `Keep` or `Generate`: the MAC address policy of each adapter, by its MAC address at home.
    #[serde(default)]
    pub mac_policies: BTreeMap<String, String>,
}

/// Answer of `GET /api/v1/jobs/{id}`: what ARM has no field for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JobStatus {
    /// The job's name.
    pub id: String,
    /// Who asked for it.
    pub requested_by: String,
    /// Its tasks, in order; none for a change of configuration.
    pub tasks: Vec<TaskStatus>,
}

impl JobStatus {
    /// A task by its name.
    pub fn task(&self, name: &str) -> Option<&TaskStatus> {
        self.tasks.iter().find(|task| task.name == name)
    }
}

/// What is known of a task besides its state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TaskStatus {
    /// The task's name.
    pub name: String,
    /// How often it was begun.
    pub attempts: u32,
    /// What it produced; null before its end.
    pub output: Value,
    /// How far it is.
    pub progress: CycleProgress,
}

/// Progress of a replication cycle, or of a job's task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CycleProgress {
    /// What is being done.
    pub phase: String,
    /// Bytes dealt with.
    pub bytes_done: u64,
    /// Bytes to deal with; 0 = not known.
    pub bytes_total: u64,
    /// Bytes that went over the data connection.
    pub bytes_moved: u64,
}

/// Answer of `GET /api/v1/items/{id}/console`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Console {
    /// The command that reaches the console, on the host.
    pub command: String,
}

/// Request of `POST /api/v1/tokens`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TokenRequest {
    /// For people: whose it is.
    pub label: String,
    /// `Reader`, `Operator` or `Contributor`.
    pub role: String,
    /// Days until it stops to work; absent = never.
    #[serde(default)]
    pub days: Option<u32>,
}

/// A token; the secret is shown only once, when it is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Token {
    /// Identifies it.
    pub digest: String,
    /// Whose it is.
    pub label: String,
    /// What it allows.
    pub role: String,
    /// When it stops to work.
    pub expires: Option<String>,
    /// The secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
}

/// Request of `POST /api/v1/servicePrincipals`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePrincipalRequest {
    /// For people: what it is for.
    pub name: String,
    /// `Reader`, `Operator` or `Contributor`.
    pub role: String,
    /// Days until it stops to work; absent = never.
    #[serde(default)]
    pub days: Option<u32>,
}

/// A service principal; the secret is shown only once, when it is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePrincipal {
    /// What it signs in as.
    pub client_id: String,
    /// The tenant it signs in at: the vault's subscription id.
    pub tenant_id: String,
    /// What it is for.
    pub name: String,
    /// What it may do.
    pub role: String,
    /// When it was made.
    pub created: String,
    /// When it stops to work.
    pub expires: Option<String>,
    /// The secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
}
