//! Exports of jobs: what was asked for is kept for some hours together with a secret, and the jobs are read when somebody who
//! has the secret downloads them. Nothing is stored twice, and an export of many jobs costs nothing until then.

use mainstay_model::{ConfigurationChange, JobId, projection};
use serde::{Deserialize, Serialize};

use super::{
    Requester,
    tokens::{digest, new_secret},
};
use crate::{
    Control, ControlError,
    db::{Comparison, ConfigurationJob, JobColumn, JobCondition, JobEntry, JobPlace, Resource, ResourceKind},
};

/// How long an export can be downloaded.
pub const EXPORT_HOURS: i64 = 24;

/// In which form jobs are exported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExportFormat {
    /// The jobs as resources.
    #[default]
    Json,
    /// One element for each job.
    Xml,
    /// Comma-separated values, which every spreadsheet reads.
    Csv,
}

/// Which jobs are exported; what is left out does not limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportQuery {
    /// Accepted not before, milliseconds since the Unix epoch.
    pub from_ms: Option<i64>,
    /// Accepted not after.
    pub until_ms: Option<i64>,
    /// Of this fabric.
    pub fabric: Option<String>,
    /// About one of these types of objects.
    pub object_types: Vec<String>,
    /// In one of these states.
    pub states: Vec<String>,
    /// With this scenario.
    pub scenario: Option<String>,
    /// In which form.
    pub format: ExportFormat,
    /// Minutes that times in texts for people are ahead of UTC.
    pub offset_minutes: i32,
}

/// An export that can be downloaded.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobExportRecord {
    /// The job that made it.
    pub job: JobId,
    /// What a download must show. Kept as it is, because whoever may read the job is told it, again and again.
    pub secret: String,
    /// When it stops to work, milliseconds since the Unix epoch.
    pub expires_ms: i64,
    /// Which jobs.
    pub query: ExportQuery,
}

impl std::fmt::Debug for JobExportRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JobExportRecord").field("job", &self.job).finish_non_exhaustive()
    }
}

impl Resource for JobExportRecord {
    const KIND: ResourceKind = ResourceKind::JobExport;

    fn name(&self) -> String {
        self.job.to_string()
    }
}

impl JobExportRecord {
    /// Whether a download shows the right secret. Digests are compared: the time that it takes says nothing.
    pub fn is_opened_by(&self, secret: &str) -> bool {
        digest(&self.secret) == digest(secret)
    }

    fn condition(&self) -> JobCondition {
        let query = &self.query;
        let mut all = Vec::new();
        if let Some(from_ms) = query.from_ms {
            all.push(JobCondition::Time(JobColumn::Created, Comparison::GreaterOrEqual, from_ms));
        }
        if let Some(until_ms) = query.until_ms {
            all.push(JobCondition::Time(JobColumn::Created, Comparison::LessOrEqual, until_ms));
        }
        let equal = |column, value: &String| JobCondition::Text(column, Comparison::Equal, value.clone());
        if !query.states.is_empty() {
            all.push(JobCondition::Any(
                query.states.iter().map(|state| equal(JobColumn::State, state)).collect(),
            ));
        }
        all.extend(query.scenario.as_ref().map(|scenario| equal(JobColumn::Scenario, scenario)));
        JobCondition::All(all)
    }

    /// What the database cannot search by.
    fn includes(&self, entry: &JobEntry) -> bool {
        let (fabric, object_type) = match entry {
            JobEntry::Item(job) => (Some(job.fabric.as_str()), "ProtectionEntity"),
            JobEntry::Configuration(job) => {
                let (_, _, object_type) = projection::configuration_job(job.change);
                // Sites and what belongs to them are named after the site; a policy belongs to none.
                (Some(job.object.as_str()), object_type)
            }
        };
        let is = |wanted: &str, found: &str| wanted.eq_ignore_ascii_case(found);
        let query = &self.query;
        query.fabric.as_ref().is_none_or(|wanted| fabric.is_some_and(|fabric| is(wanted, fabric)))
            && (query.object_types.is_empty()
                || query.object_types.iter().any(|wanted| is(wanted, object_type)))
    }
}

impl Control {
    /// Offers jobs for download. The job itself and what comes after it are not among them.
    pub async fn export_jobs(
        &self,
        mut query: ExportQuery,
        by: Requester,
    ) -> Result<ConfigurationJob, ControlError> {
        if let (Some(from_ms), Some(until_ms)) = (query.from_ms, query.until_ms)
            && from_ms > until_ms
        {
            return Err(ControlError::invalid(
                "InvalidTimeSpan",
                "startTime is later than endTime",
                "Exchange them and try again.",
            ));
        }
        if let Some(fabric) = &query.fabric {
            query.fabric = Some(self.fabric(fabric).await?.name);
        }
        let job = self.configuration_job(ConfigurationChange::ExportJobs, "", by);
        let export = JobExportRecord {
            job: job.id,
            secret: new_secret(),
            expires_ms: job.time_ms + EXPORT_HOURS * 3_600_000,
            query,
        };
        let mut transaction = self.db.begin().await?;
        for old in transaction.resources::<JobExportRecord>().await? {
            if old.expires_ms <= job.time_ms {
                transaction.remove_resource::<JobExportRecord>(&Resource::name(&old)).await?;
            }
        }
        transaction.put_resource(&export).await?;
        transaction.put_configuration_job(&job).await?;
        transaction.commit().await?;
        Ok(job)
    }

    /// An export that has not expired.
    pub async fn job_export(&self, job: JobId) -> Result<JobExportRecord, ControlError> {
        let export: Option<JobExportRecord> = self.db.resource(&job.to_string()).await?;
        export
            .filter(|export| self.clock.now_ms() < export.expires_ms)
            .ok_or_else(|| ControlError::not_found("export of jobs", job.to_string()))
    }

    /// The next jobs of an export after a place, newest first, and where to go on; `None` = that was the end. May hold fewer
    /// than `count`, also none, before the end.
    pub async fn exported_jobs(
        &self,
        export: &JobExportRecord,
        after: Option<JobPlace>,
        count: usize,
    ) -> Result<(Vec<JobEntry>, Option<JobPlace>), ControlError> {
        // Identifiers are ordered by time: beginning at the export's own job leaves that and later ones out.
        let place = match after {
            Some(place) => place,
            None => JobPlace { created_ms: self.job_entry(export.job).await?.created_ms(), id: export.job },
        };
        let mut entries = self.job_entries(&export.condition(), Some(place), count).await?;
        let next = entries
            .last()
            .filter(|_| entries.len() == count)
            .map(|last| JobPlace { created_ms: last.created_ms(), id: last.id() });
        entries.retain(|entry| export.includes(entry));
        Ok((entries, next))
    }
}
