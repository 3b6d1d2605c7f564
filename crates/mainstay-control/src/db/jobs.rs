//! Jobs as stored: the step log is part of the job's document, so that a step's entry, the job's state and the item's
//! state are written in one transaction.

use mainstay_model::{
    ConfigurationChange, Ending, ItemId, JobId, Operation, RecoveryPlan, StepState, projection,
};
use mainstay_provider::{ErrorKind, Progress, SiteError};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{QueryBuilder, Row as _, Sqlite, sqlite::SqliteRow};

use super::{Comparison, Db, DbError, Transaction, decode, encode};

/// How a job stands, for searching; follows from the step log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum JobState {
    /// Steps are run.
    InProgress,
    /// Waits for a person.
    Suspended,
    /// Steps are undone.
    Cancelling,
    /// Over.
    Ended(Ending),
}

impl JobState {
    fn key(self) -> &'static str {
        match self {
            Self::InProgress => "InProgress",
            Self::Suspended => "Suspended",
            Self::Cancelling => "Cancelling",
            Self::Ended(Ending::Succeeded) => "Succeeded",
            // Told apart by the job itself: to a client both are failures.
            Self::Ended(Ending::Failed | Ending::Stuck) => "Failed",
            Self::Ended(Ending::Cancelled) => "Cancelled",
        }
    }
}

/// A job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    /// Identifier.
    pub id: JobId,
    /// What it does.
    pub operation: Operation,
    /// To which item; nil if it is a recovery plan's job.
    pub item: ItemId,
    /// The item's or the plan's resource name, for people, also after it is gone.
    pub item_name: String,
    /// The VM's or the plan's name.
    pub vm_name: String,
    /// The plan that it carries out, as it was when the job was accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<Box<RecoveryPlan>>,
    /// The item's fabric.
    pub fabric: String,
    /// What was asked for; its shape belongs to the workflow.
    pub params: Value,
    /// Who asked.
    pub requested_by: String,
    /// How it stands.
    pub state: JobState,
    /// Whether cancellation was asked for and accepted.
    pub is_cancel_requested: bool,
    /// When it was accepted, milliseconds since the Unix epoch; so all times here.
    pub created_ms: i64,
    /// When it ended.
    pub ended_ms: Option<i64>,
    /// The step log.
    pub steps: Vec<StepRecord>,
}

/// An entry of the step log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Name of the task, unique within the job.
    pub name: String,
    /// How far it is.
    pub state: StepState,
    /// When it was first begun.
    pub started_ms: Option<i64>,
    /// When it ended.
    pub ended_ms: Option<i64>,
    /// How often it was begun.
    pub attempts: u32,
    /// What it produced, for later steps and for people.
    pub output: Value,
    /// What went wrong, also when the step succeeded all the same.
    pub errors: Vec<JobError>,
    /// How far it was when last heard of.
    pub progress: Progress,
}

/// Something that went wrong, as shown with the job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobError {
    /// Stable name.
    pub code: String,
    /// What happened, to what.
    pub message: String,
    /// What to do next.
    pub recommended_action: String,
    /// Whether the step went on all the same.
    pub is_warning: bool,
}

impl JobError {
    /// An error that ends the step.
    pub fn new(code: &str, message: impl Into<String>, recommended_action: impl Into<String>) -> Self {
        Self {
            code: code.to_owned(),
            message: message.into(),
            recommended_action: recommended_action.into(),
            is_warning: false,
        }
    }

    /// The same, for a step that goes on.
    #[must_use]
    pub fn as_warning(mut self) -> Self {
        self.is_warning = true;
        self
    }
}

impl From<SiteError> for JobError {
    fn from(error: SiteError) -> Self {
        let code = match error.kind {
            ErrorKind::NotFound => "NotFound",
            ErrorKind::Busy => "Busy",
            ErrorKind::Unavailable => "SiteUnavailable",
            ErrorKind::Refused => "Refused",
            ErrorKind::Fenced => "Fenced",
            ErrorKind::NoSpace => "NoSpace",
            ErrorKind::TimedOut => "TimedOut",
            ErrorKind::Cancelled => "Cancelled",
            ErrorKind::Failed => "HypervisorError",
        };
        Self::new(code, error.message, error.remedy)
    }
}

/// A change of configuration, told as a job that has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigurationJob {
    /// Identifier.
    pub id: JobId,
    /// What was done.
    pub change: ConfigurationChange,
    /// Name of what was changed.
    pub object: String,
    /// Who asked.
    pub requested_by: String,
    /// When, milliseconds since the Unix epoch.
    pub time_ms: i64,
}

/// Any job.
#[derive(Clone, Debug, PartialEq)]
pub enum JobEntry {
    /// Of a replicated item.
    Item(Box<JobRecord>),
    /// Of the configuration.
    Configuration(ConfigurationJob),
}

impl JobEntry {
    /// Identifier.
    pub fn id(&self) -> JobId {
        match self {
            Self::Item(job) => job.id,
            Self::Configuration(job) => job.id,
        }
    }

    /// Whether nothing more will come of it.
    pub fn has_ended(&self) -> bool {
        match self {
            Self::Item(job) => matches!(job.state, JobState::Ended(_)),
            Self::Configuration(_) => true,
        }
    }

    /// When it was accepted, milliseconds since the Unix epoch.
    pub fn created_ms(&self) -> i64 {
        match self {
            Self::Item(job) => job.created_ms,
            Self::Configuration(job) => job.time_ms,
        }
    }
}

/// What jobs can be searched by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobColumn {
    /// The state, in a client's words.
    State,
    /// The scenario's name.
    Scenario,
    /// The name of what it is about.
    Object,
    /// When it was accepted, milliseconds since the Unix epoch.
    Created,
}

impl JobColumn {
    fn sql(self) -> &'static str {
        match self {
            Self::State => "state",
            Self::Scenario => "scenario",
            Self::Object => "object",
            Self::Created => "created_ms",
        }
    }
}

/// Which jobs are wanted.
#[derive(Clone, Debug, PartialEq)]
pub enum JobCondition {
    /// Everything within; nothing within = every job.
    All(Vec<Self>),
    /// At least one within.
    Any(Vec<Self>),
    /// A text column compared; case does not count.
    Text(JobColumn, Comparison, String),
    /// A time compared.
    Time(JobColumn, Comparison, i64),
}

impl JobCondition {
    pub(super) fn push(&self, query: &mut QueryBuilder<Sqlite>) {
        match self {
            Self::All(parts) => push_joined(query, parts, " AND ", "1 = 1"),
            Self::Any(parts) => push_joined(query, parts, " OR ", "1 = 0"),
            Self::Text(column, comparison, value) => {
                // States are written as they are, so that their index is of use.
                let (open, close) = if *column == JobColumn::State { ("", "") } else { ("LOWER(", ")") };
                query.push(format!("{open}{}{close} {} ", column.sql(), comparison.sql()));
                let value = if *column == JobColumn::State { value.clone() } else { value.to_lowercase() };
                query.push_bind(value);
            }
            Self::Time(column, comparison, value) => {
                query.push(format!("{} {} ", column.sql(), comparison.sql())).push_bind(*value);
            }
        }
    }
}

fn push_joined(query: &mut QueryBuilder<Sqlite>, parts: &[JobCondition], word: &str, without: &str) {
    if parts.is_empty() {
        query.push(without);
    }
    for (index, part) in parts.iter().enumerate() {
        query.push(if index > 0 { word } else { "" }).push("(");
        part.push(query);
        query.push(")");
    }
}

/// A place in the list of jobs, which is ordered by time and identifier, newest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobPlace {
    /// When the job was accepted.
    pub created_ms: i64,
    /// Its identifier.
    pub id: JobId,
}

impl Db {
    /// Reads a job.
    pub async fn job(&self, id: JobId) -> Result<Option<JobRecord>, DbError> {
        let row = sqlx::query("SELECT id, document FROM jobs WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.connections)
            .await?;
        row.map(|row| read(&row)).transpose()
    }

    /// All jobs that are not over, oldest first.
    pub async fn open_jobs(&self) -> Result<Vec<JobRecord>, DbError> {
        let rows =
            sqlx::query("SELECT id, document FROM jobs WHERE state IN ('InProgress', 'Suspended', 'Cancelling') ORDER BY created_ms, id")
                .fetch_all(&self.connections)
                .await?;
        rows.iter().map(read).collect()
    }
}

impl Db {
    /// Reads a job of any kind.
    pub async fn job_entry(&self, id: JobId) -> Result<Option<JobEntry>, DbError> {
        let row = sqlx::query("SELECT id, kind, document FROM jobs WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.connections)
            .await?;
        row.map(|row| read_entry(&row)).transpose()
    }

    /// Jobs of all kinds, newest first: at most `count` of those that fulfil a condition, after a place.
    pub async fn job_entries(
        &self,
        condition: &JobCondition,
        after: Option<JobPlace>,
        count: usize,
    ) -> Result<Vec<JobEntry>, DbError> {
        let mut query = QueryBuilder::new("SELECT id, kind, document FROM jobs WHERE (");
        condition.push(&mut query);
        query.push(")");
        if let Some(place) = after {
            query.push(" AND (created_ms < ").push_bind(place.created_ms);
            query.push(" OR (created_ms = ").push_bind(place.created_ms);
            query.push(" AND id < ").push_bind(place.id.to_string()).push("))");
        }
        query.push(" ORDER BY created_ms DESC, id DESC LIMIT ");
        query.push_bind(i64::try_from(count).unwrap_or(i64::MAX));
        let rows = query.build().fetch_all(&self.connections).await?;
        rows.iter().map(read_entry).collect()
    }
}

impl Transaction {
    /// Writes a change of configuration, which has happened in the same transaction.
    pub async fn put_configuration_job(&mut self, job: &ConfigurationJob) -> Result<(), DbError> {
        sqlx::query(
            "INSERT INTO jobs (id, kind, item, state, scenario, object, created_ms, document)
             VALUES ($1, 'Configuration', '', 'Succeeded', $2, $3, $4, $5)",
        )
        .bind(job.id.to_string())
        .bind(projection::configuration_job(job.change).0)
        .bind(&job.object)
        .bind(job.time_ms)
        .bind(encode("job", &job.id.to_string(), job)?)
        .execute(&mut self.inner)
        .await?;
        Ok(())
    }

    /// Reads a job.
    pub async fn job(&mut self, id: JobId) -> Result<Option<JobRecord>, DbError> {
        let row = sqlx::query("SELECT id, document FROM jobs WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&mut self.inner)
            .await?;
        row.map(|row| read(&row)).transpose()
    }

    /// Writes a job. What its log says belongs to its item or plan, which thereby counts as written: whoever compares two copies
    /// of one sees which is ahead.
    pub async fn put_job(&mut self, job: &JobRecord) -> Result<(), DbError> {
        match job.plan {
            None => self.touch_item(job.item).await?,
            Some(_) => self.count_resource_write().await?,
        }
        sqlx::query(
            "INSERT INTO jobs (id, kind, item, state, scenario, object, created_ms, document)
             VALUES ($1, 'Item', $2, $3, $4, $5, $6, $7)
             ON CONFLICT (id) DO UPDATE SET state = excluded.state, document = excluded.document",
        )
        .bind(job.id.to_string())
        .bind(job.item.to_string())
        .bind(job.state.key())
        .bind(projection::scenario_name(job.operation))
        .bind(&job.vm_name)
        .bind(job.created_ms)
        .bind(encode("job", &job.id.to_string(), job)?)
        .execute(&mut self.inner)
        .await?;
        Ok(())
    }
}

fn read_entry(row: &SqliteRow) -> Result<JobEntry, DbError> {
    match row.try_get("kind")? {
        "Configuration" => {
            Ok(JobEntry::Configuration(decode("job", row.try_get("id")?, row.try_get("document")?)?))
        }
        _ => read(row).map(Box::new).map(JobEntry::Item),
    }
}

fn read(row: &SqliteRow) -> Result<JobRecord, DbError> {
    decode("job", row.try_get("id")?, row.try_get("document")?)
}
