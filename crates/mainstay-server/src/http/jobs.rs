//! Jobs, the status of operations (which are jobs), and events.

use std::collections::HashMap;

use axum::response::Response;
use hyper::Method;
use mainstay_api::arm::{CommentsInput, OperationStatus};
use mainstay_control::{
    ControlError,
    db::{Comparison, EventPlace, EventRecord, JobColumn, JobCondition, JobEntry, JobPlace, JobState},
};
use mainstay_model::{Ending, JobId};

use super::{
    Call, PAGE_LENGTH, body,
    convert::{self, Ids, time_text},
    error::ApiError,
    exports,
    filter::{Filter, unknown_field},
    json, page,
};

pub(super) async fn dispatch(call: &Call) -> Result<Response, ApiError> {
    let path = call.path();
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    let control = call.control();
    let ids = Ids(&call.vault);
    match (&call.method, path.as_slice()) {
        (&Method::GET, ["replicationjobs"]) => list_jobs(call).await,
        (&Method::GET, ["replicationjobs", name]) => {
            let entry = control.job_entry(job_id(name)?).await?;
            let children = match &entry {
                JobEntry::Item(job) => control.child_jobs(job).await?,
                JobEntry::Configuration(_) => HashMap::new(),
            };
            let mut shown = convert::job_entry(&ids, &entry, &children);
            exports::show(call, &entry, &mut shown).await?;
            json(&shown)
        }
        (&Method::POST, ["replicationjobs", "export"]) => exports::begin(call).await,
        (&Method::POST, ["replicationjobs", name, verb]) => {
            let id = job_id(name)?;
            let job = match *verb {
                "cancel" => control.cancel_job(id).await?,
                "resume" => {
                    let _: CommentsInput = call.properties(body::COMMENTS)?;
                    control.resume_job(id).await?
                }
                "restart" => control.restart_job(id).await?,
                _ => return Err(ApiError::no_such_path()),
            };
            Ok(call.accepted(job.id, &ids.job(job.id)))
        }
        (&Method::GET, ["replicationoperationstatus", name]) => {
            json(&operation_status(call, job_id(name)?).await?)
        }
        (&Method::GET, ["replicationevents"]) => list_events(call).await,
        (&Method::GET, ["replicationevents", name]) => {
            let event = control.db.event(name).await.map_err(ControlError::from)?;
            let event = event.ok_or_else(|| ControlError::not_found("event", *name))?;
            json(&convert::event(&ids, &event))
        }
        _ => Err(ApiError::no_such_path()),
    }
}

/// The job that an operation is.
pub(super) async fn find(call: &Call, operation: &str) -> Result<JobEntry, ApiError> {
    Ok(call.control().job_entry(job_id(operation)?).await?)
}

fn job_id(name: &str) -> Result<JobId, ApiError> {
    name.parse().map_err(|_| ControlError::not_found("job", name).into())
}

/// What events can be filtered by: the names of the service's query parameters.
fn event_field(event: &EventRecord, field: &str) -> Option<String> {
    Some(match field {
        "eventcode" => event.code.clone(),
        "eventtype" => event.kind.clone(),
        "severity" => convert::severity(event.severity).to_owned(),
        "fabricname" => event.fabric.clone(),
        "affectedobjectfriendlyname" => event.affected_object.clone(),
        _ => return None,
    })
}

/// A page of the events that pass the filter, newest first.
async fn list_events(call: &Call) -> Result<Response, ApiError> {
    let filter = call.filter()?;
    let place = call.query("skiptoken").map(|token| {
        let (time_ms, id) = token.split_once('.')?;
        Some(EventPlace { time_ms: time_ms.parse().ok()?, id: id.to_owned() })
    });
    let mut place = place.map(|place| place.ok_or_else(ApiError::invalid_page)).transpose()?;
    let ids = Ids(&call.vault);
    let mut shown = Vec::new();
    loop {
        let events = call.control().db.events_after(place.as_ref(), PAGE_LENGTH).await;
        let events = events.map_err(ControlError::from)?;
        if events.is_empty() {
            return page(shown, None);
        }
        for event in events {
            if shown.len() == PAGE_LENGTH {
                let next = place.map(|place| call.next_page(&format!("{}.{}", place.time_ms, place.id)));
                return page(shown, next);
            }
            place = Some(EventPlace { time_ms: event.time_ms, id: event.id.clone() });
            let field = |name: &str| event_field(&event, name);
            if filter.as_ref().map_or(Ok(true), |filter| filter.matches(&field))? {
                shown.push(convert::event(&ids, &event));
            }
        }
    }
}

async fn list_jobs(call: &Call) -> Result<Response, ApiError> {
    let condition = call.filter()?.as_ref().map(job_condition).transpose()?;
    let after = call.query("skiptoken").map(|token| {
        let (created_ms, id) = token.split_once('.')?;
        Some(JobPlace { created_ms: created_ms.parse().ok()?, id: id.parse().ok()? })
    });
    let after = after.map(|place| place.ok_or_else(ApiError::invalid_page)).transpose()?;
    let condition = condition.unwrap_or(JobCondition::All(Vec::new()));
    // One more than is shown tells whether there is another page.
    let mut entries = call.control().job_entries(&condition, after, PAGE_LENGTH + 1).await?;
    let has_more = entries.len() > PAGE_LENGTH;
    entries.truncate(PAGE_LENGTH);
    let next = entries
        .last()
        .filter(|_| has_more)
        .map(|last| call.next_page(&format!("{}.{}", last.created_ms(), last.id())));
    let ids = Ids(&call.vault);
    let none = HashMap::new();
    page(entries.iter().map(|entry| convert::job_entry(&ids, entry, &none)).collect(), next)
}

const JOB_FIELDS: &str = "JobStatus, JobName, ObjectName, StartTime, EndTime";
pub(super) const JOB_STATES: [&str; 6] =
    ["InProgress", "Suspended", "Cancelling", "Succeeded", "Failed", "Cancelled"];

/// A filter of jobs as the database takes it. Field names are those of the service's query parameters; there `StartTime`
/// and `EndTime` are the ends of a span of time, so `eq` means from and until.
fn job_condition(filter: &Filter) -> Result<JobCondition, ApiError> {
    let all = |parts: &[Filter]| parts.iter().map(job_condition).collect::<Result<Vec<_>, _>>();
    let (field, comparison, value) = match filter {
        Filter::All(parts) => return Ok(JobCondition::All(all(parts)?)),
        Filter::Any(parts) => return Ok(JobCondition::Any(all(parts)?)),
        Filter::Compare { field, comparison, value } => (field, *comparison, value),
    };
    let time = |comparison| {
        let text = value.trim_start_matches("datetime");
        let time: jiff::Timestamp = text.parse().map_err(|_| {
            ApiError::bad_request(
                "InvalidFilter",
                format!("'{value}' is not a time"),
                "Write it as 2026-01-31T23:59:59Z.",
            )
        })?;
        Ok(JobCondition::Time(JobColumn::Created, comparison, time.as_millisecond()))
    };
    let is_equality = matches!(comparison, Comparison::Equal | Comparison::NotEqual);
    let text = |column, value: &str| {
        if is_equality {
            return Ok(JobCondition::Text(column, comparison, value.to_owned()));
        }
        let message = format!("'{field}' has no order");
        Err(ApiError::bad_request("InvalidFilter", message, "Compare it with eq or ne."))
    };
    match field.to_lowercase().as_str() {
        "jobstatus" | "state" => {
            let known = JOB_STATES.into_iter().find(|state| state.eq_ignore_ascii_case(value));
            let known = known.ok_or_else(|| {
                ApiError::bad_request(
                    "InvalidFilter",
                    format!("'{value}' is not a state of jobs"),
                    format!("States are: {}.", JOB_STATES.join(", ")),
                )
            })?;
            text(JobColumn::State, known)
        }
        "jobname" | "scenarioname" => text(JobColumn::Scenario, value),
        "objectname" | "targetobjectname" => text(JobColumn::Object, value),
        "starttime" if comparison == Comparison::Equal => time(Comparison::GreaterOrEqual),
        "endtime" if comparison == Comparison::Equal => time(Comparison::LessOrEqual),
        "starttime" | "endtime" => time(comparison),
        _ => Err(unknown_field(field, JOB_FIELDS)),
    }
}

async fn operation_status(call: &Call, id: JobId) -> Result<OperationStatus, ApiError> {
    let job = match call.control().job_entry(id).await? {
        JobEntry::Item(job) => job,
        JobEntry::Configuration(job) => {
            let time = Some(time_text(job.time_ms));
            return Ok(OperationStatus {
                id: None,
                name: job.id.to_string(),
                status: "Succeeded".to_owned(),
                start_time: time.clone(),
                end_time: time,
                percent_complete: None,
                properties: None,
                error: None,
            });
        }
    };
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
