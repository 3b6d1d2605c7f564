//! Jobs as stored: the step log is part of the job's document, so that a step's entry, the job's state and the item's
//! state are written in one transaction.

use mainstay_model::{Ending, ItemId, JobId, Operation, StepState};
use mainstay_provider::{ErrorKind, Progress, SiteError};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::Row as _;

use super::{Db, DbError, Transaction, decode, encode};

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
            Self::Ended(_) => "Ended",
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
    /// To which item.
    pub item: ItemId,
    /// The item's resource name, for people, also after it is gone.
    pub item_name: String,
    /// The VM's name.
    pub vm_name: String,
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

/// The searchable part of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobSummary {
    /// Identifier.
    pub id: JobId,
    /// How it stands.
    pub state: JobState,
}

/// Jobs answered by one listing at most; older ones are reached by filters.
const LIST_MAX: i64 = 1000;

impl Db {
    /// Reads a job.
    pub async fn job(&self, id: JobId) -> Result<Option<JobRecord>, DbError> {
        let row = sqlx::query("SELECT id, document FROM jobs WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.pool)
            .await?;
        row.map(|row| read(&row)).transpose()
    }

    /// The newest jobs, newest first.
    pub async fn jobs(&self) -> Result<Vec<JobRecord>, DbError> {
        let rows = sqlx::query("SELECT id, document FROM jobs ORDER BY created_ms DESC, id DESC LIMIT $1")
            .bind(LIST_MAX)
            .fetch_all(&self.pool)
            .await?;
        rows.iter().map(read).collect()
    }

    /// All jobs that are not over, oldest first.
    pub async fn open_jobs(&self) -> Result<Vec<JobRecord>, DbError> {
        let rows =
            sqlx::query("SELECT id, document FROM jobs WHERE state <> 'Ended' ORDER BY created_ms, id")
                .fetch_all(&self.pool)
                .await?;
        rows.iter().map(read).collect()
    }
}

impl Transaction {
    /// Reads a job.
    pub async fn job(&mut self, id: JobId) -> Result<Option<JobRecord>, DbError> {
        let row = sqlx::query("SELECT id, document FROM jobs WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&mut *self.inner)
            .await?;
        row.map(|row| read(&row)).transpose()
    }

    /// Writes a job.
    pub async fn put_job(&mut self, job: &JobRecord) -> Result<(), DbError> {
        sqlx::query(
            "INSERT INTO jobs (id, item, state, created_ms, document) VALUES ($1, $2, $3, $4, $5)
             ON CONFLICT (id) DO UPDATE SET state = excluded.state, document = excluded.document",
        )
        .bind(job.id.to_string())
        .bind(job.item.to_string())
        .bind(job.state.key())
        .bind(job.created_ms)
        .bind(encode("job", &job.id.to_string(), job)?)
        .execute(&mut *self.inner)
        .await?;
        Ok(())
    }
}

fn read(row: &sqlx::sqlite::SqliteRow) -> Result<JobRecord, DbError> {
    decode("job", row.try_get("id")?, row.try_get("document")?)
}
