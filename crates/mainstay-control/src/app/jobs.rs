//! Jobs as asked for by people.

use mainstay_model::JobId;

use crate::{Control, ControlError, db::JobRecord};

impl Control {
    /// A job, with the newest progress of the step that it is at.
    pub async fn job(&self, id: JobId) -> Result<JobRecord, ControlError> {
        let job = self.db.job(id).await?.ok_or_else(|| ControlError::not_found("job", id.to_string()))?;
        Ok(self.with_progress(job))
    }

    /// The newest jobs, newest first.
    pub async fn jobs(&self) -> Result<Vec<JobRecord>, ControlError> {
        Ok(self.db.jobs().await?.into_iter().map(|job| self.with_progress(job)).collect())
    }

    fn with_progress(&self, mut job: JobRecord) -> JobRecord {
        if let Some(progress) = self.engine.progress(job.id)
            && let Some(step) =
                job.steps.iter_mut().find(|step| step.state == mainstay_model::StepState::Started)
        {
            step.progress = progress;
        }
        job
    }
}
