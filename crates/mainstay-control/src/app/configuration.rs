//! Changes of the configuration, told as jobs.

use mainstay_model::{ConfigurationChange, JobId};
use uuid::Uuid;

use super::Requester;
use crate::{Control, ControlError, db::ConfigurationJob};

impl Control {
    /// The job that tells of a change; to be written in the same transaction as the change.
    pub(super) fn configuration_job(
        &self,
        change: ConfigurationChange,
        object: &str,
        by: Requester,
    ) -> ConfigurationJob {
        ConfigurationJob {
            id: JobId(Uuid::now_v7()),
            change,
            object: object.to_owned(),
            requested_by: by.0,
            time_ms: self.clock.now_ms(),
        }
    }

    /// Writes the job of a change that has happened by other means.
    pub(super) async fn record_configuration(
        &self,
        change: ConfigurationChange,
        object: &str,
        by: Requester,
    ) -> Result<ConfigurationJob, ControlError> {
        let job = self.configuration_job(change, object, by);
        let mut transaction = self.db.begin().await?;
        transaction.put_configuration_job(&job).await?;
        transaction.commit().await?;
        Ok(job)
    }
}
