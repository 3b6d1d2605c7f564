//! Jobs, the status of operations (which are jobs), and events.

use axum::response::Response;
use hyper::Method;
use mainstay_api::arm::OperationStatus;
use mainstay_control::{ControlError, db::JobState};
use mainstay_model::{Ending, JobId};

use super::{
    Call,
    convert::{self, Ids, time_text},
    error::ApiError,
    json, list,
};

pub(super) async fn dispatch(call: &Call) -> Result<Response, ApiError> {
    let path = call.path();
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    let control = call.control();
    let ids = Ids(&call.api.vault);
    match (&call.method, path.as_slice()) {
        (&Method::GET, ["replicationjobs"]) => {
            list(control.jobs().await?.iter().map(|job| convert::job(&ids, job)).collect())
        }
        (&Method::GET, ["replicationjobs", name] | ["replicationjobs", name, "operationresults", _]) => {
            json(&convert::job(&ids, &control.job(job_id(name)?).await?))
        }
        (&Method::POST, ["replicationjobs", name, verb]) => {
            let id = job_id(name)?;
            let job = match *verb {
                "cancel" => control.cancel_job(id).await?,
                "resume" => control.resume_job(id).await?,
                "restart" => control.restart_job(id).await?,
                _ => return Err(ApiError::no_such_path()),
            };
            Ok(call.accepted(&job, &ids.job(job.id)))
        }
        (&Method::GET, ["replicationoperationstatus", name]) => {
            json(&operation_status(call, job_id(name)?).await?)
        }
        (&Method::GET, ["replicationevents"]) => {
            let events = control.db.events().await.map_err(ControlError::from)?;
            list(events.iter().map(|event| convert::event(&ids, event)).collect())
        }
        _ => Err(ApiError::no_such_path()),
    }
}

fn job_id(name: &str) -> Result<JobId, ApiError> {
    name.parse().map_err(|_| ControlError::not_found("job", name).into())
}

async fn operation_status(call: &Call, id: JobId) -> Result<OperationStatus, ApiError> {
    let job = call.control().job(id).await?;
    // A suspended job is still the operation in progress. `Canceled` with one l: the SDKs wait for ever for the other.
    let status = match job.state {
        JobState::InProgress | JobState::Suspended | JobState::Cancelling => "InProgress",
        JobState::Ended(Ending::Succeeded) => "Succeeded",
        JobState::Ended(Ending::Cancelled) => "Canceled",
        JobState::Ended(Ending::Failed | Ending::Stuck) => "Failed",
    };
    Ok(OperationStatus {
        id: None,
        name: job.id.to_string(),
        status: status.to_owned(),
        start_time: Some(time_text(job.created_ms)),
        end_time: job.ended_ms.map(time_text),
        percent_complete: None,
        properties: None,
        error: if status == "Failed" { convert::operation_error(&job) } else { None },
    })
}
