//! How many there are, for summaries.

use sqlx::{QueryBuilder, Row as _};

use super::{Db, DbError, JobCondition};

impl Db {
    /// Jobs that fulfil a condition.
    pub async fn count_jobs(&self, condition: &JobCondition) -> Result<i64, DbError> {
        let mut query = QueryBuilder::new("SELECT COUNT(*) AS count FROM jobs WHERE (");
        condition.push(&mut query);
        query.push(")");
        Ok(query.build().fetch_one(&self.connections).await?.try_get("count")?)
    }

    /// Events since a time, milliseconds since the Unix epoch.
    pub async fn count_events(&self, since_ms: i64) -> Result<i64, DbError> {
        let row = sqlx::query("SELECT COUNT(*) AS count FROM events WHERE time_ms >= $1")
            .bind(since_ms)
            .fetch_one(&self.connections)
            .await?;
        Ok(row.try_get("count")?)
    }
}
