//! Jobs as asked for by people.

use mainstay_model::JobId;

use crate::{
    Control, ControlError,
    db::{JobCondition, JobEntry, JobPlace, JobRecord},
};

impl Control {
    /// A job, with the newest progress of the step that it is at.
    pub async fn job(&self, id: JobId) -> Result<JobRecord, ControlError> {
        let job = self.db.job(id).await?.ok_or_else(|| ControlError::not_found("job", id.to_string()))?;
        Ok(self.with_progress(job))
    }

    /// A job of any kind.
    pub async fn job_entry(&self, id: JobId) -> Result<JobEntry, ControlError> {
        let entry = self.db.job_entry(id).await?;
        let entry = entry.ok_or_else(|| ControlError::not_found("job", id.to_string()))?;
        Ok(self.entry_with_progress(entry))
    }

    /// Jobs of all kinds; see [`crate::db::Db::job_entries`].
    pub async fn job_entries(
        &self,
        condition: &JobCondition,
        after: Option<JobPlace>,
        count: usize,
    ) -> Result<Vec<JobEntry>, ControlError> {
        let entries = self.db.job_entries(condition, after, count).await?;
        Ok(entries.into_iter().map(|entry| self.entry_with_progress(entry)).collect())
    }

    fn entry_with_progress(&self, entry: JobEntry) -> JobEntry {
        match entry {
            JobEntry::Item(job) => JobEntry::Item(Box::new(self.with_progress(*job))),
            other @ JobEntry::Configuration(_) => other,
        }
    }

    pub(super) fn with_progress(&self, mut job: JobRecord) -> JobRecord {
        if let Some(progress) = self.engine.progress(job.id)
            && let Some(step) =
                job.steps.iter_mut().find(|step| step.state == mainstay_model::StepState::Started)
        {
            step.progress = progress;
        }
        job
    }
}
