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

/// Code of events about alerts themselves; they are not alerted of.
pub const ALERTS_FAILED: &str = "AlertDelivery";

/// An event is not owed to anybody, or no longer.
const SETTLED: i64 = 0;
/// An event is owed and in no mail yet.
const OWED: i64 = 1;
/// An event is in the mail that is being sent.
const CLAIMED: i64 = 2;

/// Events that are in the mail to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwedAlerts {
    /// How many there are.
    pub count: usize,
    /// The newest of them, newest first.
    pub newest: Vec<EventRecord>,
}

/// A place in the list of events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventPlace {
    /// When the event was.
    pub time_ms: i64,
    /// Its identifier.
    pub id: String,
}

/// Audit records answered by one listing at most.
const LIST_MAX: i64 = 1000;

impl Db {
    /// Reads an event.
    pub async fn event(&self, id: &str) -> Result<Option<EventRecord>, DbError> {
        let row = sqlx::query("SELECT id, document FROM events WHERE id = $1")
            .bind(id.to_lowercase())
            .fetch_optional(&self.connections)
            .await?;
        row.map(|row| decode("event", row.try_get("id")?, row.try_get("document")?)).transpose()
    }

    /// Events, newest first: at most `count`, after a place.
    pub async fn events_after(
        &self,
        place: Option<&EventPlace>,
        count: usize,
    ) -> Result<Vec<EventRecord>, DbError> {
        let newest = EventPlace { time_ms: i64::MAX, id: String::new() };
        let place = place.unwrap_or(&newest);
        let rows = sqlx::query(
            "SELECT id, document FROM events WHERE time_ms < $1 OR (time_ms = $1 AND id < $2)
             ORDER BY time_ms DESC, id DESC LIMIT $3",
        )
        .bind(place.time_ms)
        .bind(&place.id)
        .bind(i64::try_from(count).unwrap_or(i64::MAX))
        .fetch_all(&self.connections)
        .await?;
        rows.iter().map(|row| decode("event", row.try_get("id")?, row.try_get("document")?)).collect()
    }

    /// The newest audit records, newest first.
    pub async fn audit_trail(&self) -> Result<Vec<AuditRecord>, DbError> {
        let rows = sqlx::query("SELECT id, document FROM audit ORDER BY time_ms DESC, id DESC LIMIT $1")
            .bind(LIST_MAX)
            .fetch_all(&self.connections)
            .await?;
        rows.iter().map(|row| decode("audit record", row.try_get("id")?, row.try_get("document")?)).collect()
    }
}

impl Db {
    /// How many events are owed to somebody.
    pub async fn owed_alerts(&self) -> Result<i64, DbError> {
        let row = sqlx::query("SELECT COUNT(*) AS count FROM events WHERE alert > $1")
            .bind(SETTLED)
            .fetch_one(&self.connections)
            .await?;
        Ok(row.try_get("count")?)
    }

    /// Puts what is owed into one mail, together with what was in one that was never sent, and answers it. What is older than
    /// `from_ms` is no longer owed.
    pub async fn claim_alerts(&self, from_ms: i64, count_max: usize) -> Result<OwedAlerts, DbError> {
        // The usual case: it must not cost a write.
        if self.owed_alerts().await? == 0 {
            return Ok(OwedAlerts { count: 0, newest: Vec::new() });
        }
        let mut transaction = self.begin().await?;
        for (from, to, before_ms) in
            [(OWED, SETTLED, from_ms), (CLAIMED, SETTLED, from_ms), (OWED, CLAIMED, i64::MAX)]
        {
            sqlx::query("UPDATE events SET alert = $1 WHERE alert = $2 AND time_ms < $3")
                .bind(to)
                .bind(from)
                .bind(before_ms)
                .execute(&mut transaction.inner)
                .await?;
        }
        let count: i64 = sqlx::query("SELECT COUNT(*) AS count FROM events WHERE alert = $1")
            .bind(CLAIMED)
            .fetch_one(&mut transaction.inner)
            .await?
            .try_get("count")?;
        let rows = sqlx::query(
            "SELECT id, document FROM events WHERE alert = $1 ORDER BY time_ms DESC, id DESC LIMIT $2",
        )
        .bind(CLAIMED)
        .bind(i64::try_from(count_max).unwrap_or(i64::MAX))
        .fetch_all(&mut transaction.inner)
        .await?;
        transaction.commit().await?;
        let newest = rows
            .iter()
            .map(|row| decode("event", row.try_get("id")?, row.try_get("document")?))
            .collect::<Result<_, _>>()?;
        Ok(OwedAlerts { count: usize::try_from(count).unwrap_or_default(), newest })
    }

    /// What was in the mail has been told.
    pub async fn forget_alerts(&self) -> Result<(), DbError> {
        let mut transaction = self.begin().await?;
        sqlx::query("UPDATE events SET alert = $1 WHERE alert = $2")
            .bind(SETTLED)
            .bind(CLAIMED)
            .execute(&mut transaction.inner)
            .await?;
        transaction.commit().await
    }
}

impl Transaction {
    /// Adds an event.
    pub async fn add_event(&mut self, event: &EventRecord) -> Result<(), DbError> {
        let is_owed = event.severity >= Health::Warning && event.code != ALERTS_FAILED;
        sqlx::query("INSERT INTO events (id, time_ms, item, document, alert) VALUES ($1, $2, $3, $4, $5)")
            .bind(&event.id)
            .bind(event.time_ms)
            .bind(&event.affected_object)
            .bind(encode("event", &event.id, event)?)
            .bind(if is_owed { OWED } else { SETTLED })
            .execute(&mut self.inner)
            .await?;
        Ok(())
    }

    /// Adds an audit record.
    pub async fn add_audit(&mut self, record: &AuditRecord) -> Result<(), DbError> {
        sqlx::query("INSERT INTO audit (id, time_ms, document) VALUES ($1, $2, $3)")
            .bind(&record.id)
            .bind(record.time_ms)
            .bind(encode("audit record", &record.id, record)?)
            .execute(&mut self.inner)
            .await?;
        Ok(())
    }

    /// Removes events and audit records older than `before_ms`.
    pub async fn trim_history(&mut self, before_ms: i64) -> Result<(), DbError> {
        sqlx::query("DELETE FROM events WHERE time_ms < $1").bind(before_ms).execute(&mut self.inner).await?;
        sqlx::query("DELETE FROM audit WHERE time_ms < $1").bind(before_ms).execute(&mut self.inner).await?;
        Ok(())
    }
}
