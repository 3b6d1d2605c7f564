//! Events (for administrators) and the audit trail (who changed what).

use mainstay_model::Health;
use serde::{Deserialize, Serialize};
use sqlx::Row as _;

use super::{Db, DbError, Transaction, decode, encode};

/// Something that an administrator may want to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventRecord {
    /// Identifier, ordered by time.
    pub id: String,
    /// When, milliseconds since the Unix epoch.
    pub time_ms: i64,
    /// Stable name of the event.
    pub code: String,
    /// `VmHealth`, `JobStatus`, `AgentStatus`.
    pub kind: String,
    /// How bad.
    pub severity: Health,
    /// What happened.
    pub description: String,
    /// The item's or host's name.
    pub affected_object: String,
    /// The item's fabric.
    pub fabric: String,
}

/// Who changed what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRecord {
    /// Identifier, ordered by time.
    pub id: String,
    /// When, milliseconds since the Unix epoch.
    pub time_ms: i64,
    /// The token's, service principal's or agent's name; empty if it is not known.
    pub who: String,
    /// The address it came from; empty in records from before it was kept.
    #[serde(default)]
    pub from: String,
    /// What was asked for.
    pub action: String,
    /// Of what.
    pub target: String,
    /// Whether it was allowed.
    pub is_allowed: bool,
}

/// Records answered by one listing at most.
const LIST_MAX: i64 = 1000;

impl Db {
    /// The newest events, newest first.
    pub async fn events(&self) -> Result<Vec<EventRecord>, DbError> {
        let rows = sqlx::query("SELECT id, document FROM events ORDER BY time_ms DESC, id DESC LIMIT $1")
            .bind(LIST_MAX)
            .fetch_all(&self.pool)
            .await?;
        rows.iter().map(|row| decode("event", row.try_get("id")?, row.try_get("document")?)).collect()
    }

    /// The newest audit records, newest first.
    pub async fn audit_trail(&self) -> Result<Vec<AuditRecord>, DbError> {
        let rows = sqlx::query("SELECT id, document FROM audit ORDER BY time_ms DESC, id DESC LIMIT $1")
            .bind(LIST_MAX)
            .fetch_all(&self.pool)
            .await?;
        rows.iter().map(|row| decode("audit record", row.try_get("id")?, row.try_get("document")?)).collect()
    }
}

impl Transaction {
    /// Adds an event.
    pub async fn add_event(&mut self, event: &EventRecord) -> Result<(), DbError> {
        sqlx::query("INSERT INTO events (id, time_ms, item, document) VALUES ($1, $2, $3, $4)")
            .bind(&event.id)
            .bind(event.time_ms)
            .bind(&event.affected_object)
            .bind(encode("event", &event.id, event)?)
            .execute(&mut *self.inner)
            .await?;
        Ok(())
    }

    /// Adds an audit record.
    pub async fn add_audit(&mut self, record: &AuditRecord) -> Result<(), DbError> {
        sqlx::query("INSERT INTO audit (id, time_ms, document) VALUES ($1, $2, $3)")
            .bind(&record.id)
            .bind(record.time_ms)
            .bind(encode("audit record", &record.id, record)?)
            .execute(&mut *self.inner)
            .await?;
        Ok(())
    }

    /// Removes events and audit records older than `before_ms`.
    pub async fn trim_history(&mut self, before_ms: i64) -> Result<(), DbError> {
        sqlx::query("DELETE FROM events WHERE time_ms < $1")
            .bind(before_ms)
            .execute(&mut *self.inner)
            .await?;
        sqlx::query("DELETE FROM audit WHERE time_ms < $1").bind(before_ms).execute(&mut *self.inner).await?;
        Ok(())
    }
}
