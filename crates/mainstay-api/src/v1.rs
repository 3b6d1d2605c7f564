//! What Azure has no word for, under `/api/v1`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use serde_json::{Number, Value};

/// Days that a token or a service principal can last at most: a century.
pub const DAYS_MAX: u32 = 36_500;

/// Reads a number of days as JSON means numbers: `7.0` is the same as `7`.
fn days<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    let Some(number) = Option::<Number>::deserialize(deserializer)? else { return Ok(None) };
    let is_whole = |value: &f64| value.fract() == 0.0;
    let days = number.as_f64().filter(is_whole).filter(|days| (0.0..=f64::from(DAYS_MAX)).contains(days));
    let days = days.ok_or_else(|| {
        D::Error::custom(format!("'days' must be a whole number from 0 to {DAYS_MAX}, not {number}"))
    })?;
    Ok(Some(days as u32))
}

/// Answer of `GET /api/v1/vault`: where the ARM resources are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RegisterRequest {
    /// The key's secret.
    #[schemars(length(min = 1, max = 256), regex(pattern = r"^[^\u0000-\u001f\u007f-\u009f]+$"))]
    pub secret: String,
    /// The host's name.
    #[schemars(length(max = 63), regex(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]*$"))]
    pub host: String,
    /// The agent's version.
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[^\u0000-\u001f\u007f-\u009f]+$"))]
    pub version: String,
    /// Certificate signing request, PEM. The private key stays on the host.
    pub certificate_request: String,
}

/// Answer of `POST /api/v1/register`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
    /// Its disks, as they were when protection began.
    #[serde(default)]
    pub disks: Vec<DiskStatus>,
}

/// What ARM has no field for of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DiskStatus {
    /// Its key.
    pub key: String,
    /// Format of its image at home: `Raw`, `Qcow2`.
    pub format: String,
    /// Whether it is replicated.
    pub is_replicated: bool,
}

/// Answer of `GET` and `POST /api/v1/items/{item}/scrub`: what is known of the item's replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ItemScrub {
    /// The item's name.
    pub item: String,
    /// The VM's name.
    pub vm: String,
    /// What goes on.
    pub state: ScrubState,
    /// Bytes that the scrub under way has read.
    pub bytes_read: Option<u64>,
    /// When the last complete scrub ended.
    pub finished: Option<String>,
    /// Objects that it read.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Damaged objects that were put right from the store alone, ever.
    pub mended: u64,
    /// What is damaged still; the first hundred.
    pub damage: Vec<DamagedObject>,
    /// Recovery points that cannot be read whole.
    pub damaged_points: Vec<String>,
    /// The next replication cycle sends again what cannot be read.
    pub is_repair_pending: bool,
}

/// What goes on with scrubs of an item's replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ScrubState {
    /// Nothing until the next one is due.
    Idle,
    /// Somebody asked for one, or something was sent again that is to be looked at.
    Requested,
    /// It is read through now.
    Running,
}

/// A damaged object of the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DamagedObject {
    /// Its key in the store.
    pub key: String,
    /// What is wrong with it.
    pub what: String,
    /// Recovery points that need it.
    pub points: u64,
}

/// Answer of `GET /api/v1/jobs/{id}`: what ARM has no field for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
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
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
    /// The same of each disk, where it goes disk by disk.
    #[serde(default)]
    pub disks: Vec<DiskProgress>,
}

/// Progress with a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DiskProgress {
    /// The disk's key.
    pub key: String,
    /// Bytes dealt with.
    pub bytes_done: u64,
    /// Bytes to deal with.
    pub bytes_total: u64,
}

/// Answer of `GET /api/v1/items/{id}/console`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Console {
    /// The command that reaches the console, on the host.
    pub command: String,
}

/// Request of `POST /api/v1/tokens`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenRequest {
    /// For people: whose it is.
    #[schemars(length(min = 1, max = 128), regex(pattern = r"^[^\u0000-\u001f\u007f-\u009f]+$"))]
    pub label: String,
    /// `Reader`, `Operator` or `Contributor`.
    #[schemars(extend("enum" = ["Reader", "Operator", "Contributor"]))]
    pub role: String,
    /// Days until it stops to work, [`DAYS_MAX`] at most; absent = never.
    #[serde(default, deserialize_with = "days")]
    #[schemars(range(min = 0, max = 36500))]
    pub days: Option<u32>,
}

/// A token; the secret is shown only once, when it is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Token {
    /// Identifies it.
    pub digest: String,
    /// Whose it is.
    pub label: String,
    /// What it allows.
    #[schemars(extend("enum" = ["Reader", "Operator", "Contributor"]))]
    pub role: String,
    /// When it stops to work.
    pub expires: Option<String>,
    /// The secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
}

/// Request of `POST /api/v1/servicePrincipals`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServicePrincipalRequest {
    /// For people: what it is for.
    #[schemars(length(max = 63), regex(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]*$"))]
    pub name: String,
    /// `Reader`, `Operator` or `Contributor`.
    #[schemars(extend("enum" = ["Reader", "Operator", "Contributor"]))]
    pub role: String,
    /// Days until it stops to work, [`DAYS_MAX`] at most; absent = never.
    #[serde(default, deserialize_with = "days")]
    #[schemars(range(min = 0, max = 36500))]
    pub days: Option<u32>,
}

/// A service principal; the secret is shown only once, when it is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServicePrincipal {
    /// What it signs in as.
    pub client_id: String,
    /// The tenant it signs in at: the vault's subscription id.
    pub tenant_id: String,
    /// What it is for.
    pub name: String,
    /// What it may do.
    #[schemars(extend("enum" = ["Reader", "Operator", "Contributor"]))]
    pub role: String,
    /// When it was made.
    pub created: String,
    /// When it stops to work.
    pub expires: Option<String>,
    /// The secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
}

/// An entry of the audit trail: who did what, or tried to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AuditEntry {
    /// Identifier, ordered by time.
    pub id: String,
    /// When, milliseconds since the Unix epoch.
    pub time_ms: i64,
    /// The token's, service principal's or agent's name; empty if it is not known.
    pub who: String,
    /// The address it came from; empty if it was not kept.
    pub from: String,
    /// The method.
    pub action: String,
    /// The path.
    pub target: String,
    /// Whether it was allowed.
    pub is_allowed: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_whole_numbers_in_a_range() {
        let read = |days: &str| {
            let text = format!("{{\"label\": \"x\", \"role\": \"Reader\", \"days\": {days}}}");
            serde_json::from_str::<TokenRequest>(&text).map(|request| request.days)
        };
        assert_eq!(read("0").unwrap(), Some(0));
        assert_eq!(read("7").unwrap(), Some(7));
        assert_eq!(read("7.0").unwrap(), Some(7));
        assert_eq!(read("36500").unwrap(), Some(DAYS_MAX));
        assert_eq!(read("null").unwrap(), None);
        for bad in ["-1", "1.5", "36501", "1e300", "100000000000000001", "\"7\""] {
            assert!(read(bad).is_err(), "{bad}");
        }
        let absent = serde_json::from_str::<TokenRequest>("{\"label\": \"x\", \"role\": \"Reader\"}");
        assert_eq!(absent.unwrap().days, None);
    }
}
