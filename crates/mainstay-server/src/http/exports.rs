//! Exports of jobs: the request, what its job tells, and the download.
//!
//! A download carries no bearer token: browsers and scripts get a link. Its secret is in the job, for those who may read
//! jobs, and works for a day. Jobs are read a page at a time while they are sent.

use std::sync::Arc;

use axum::{
    body::{Body, Bytes},
    response::{IntoResponse as _, Response},
};
use hyper::{StatusCode, header};
use jiff::{Timestamp, tz::Offset};
use mainstay_api::arm::{EXPORT_JOB_DETAILS, ExportJobDetails, JobProperties, JobQueryParameter, Resource};
use mainstay_control::{
    ControlError,
    app::{ExportFormat, ExportQuery, JobExportRecord},
    db::{JobEntry, JobPlace},
};
use mainstay_model::{ConfigurationChange, JobId};
use serde_json::json;

use super::{
    Api, Call, PAGE_LENGTH, body,
    convert::{self, Ids, last_segment},
    error::ApiError,
    jobs::JOB_STATES,
};
use crate::vaults::HostedVault;

/// First segment of a download's path.
pub(super) const PATH: &str = "jobexports";

/// `replicationJobs/export`.
pub(super) async fn begin(call: &Call) -> Result<Response, ApiError> {
    let input: JobQueryParameter = call.body(body::EXPORT_JOBS)?;
    let words = |text: &Option<String>| -> Vec<String> {
        let words = text.as_deref().unwrap_or_default().split(',').map(str::trim);
        words.filter(|word| !word.is_empty()).map(str::to_owned).collect()
    };
    let mut states = Vec::new();
    for word in words(&input.job_status) {
        let known = JOB_STATES.into_iter().find(|state| state.eq_ignore_ascii_case(&word));
        states.push(known.map(str::to_owned).ok_or_else(|| {
            ApiError::bad_request(
                "InvalidParameter",
                format!("jobStatus cannot be \"{word}\": expected are {}", JOB_STATES.join(", ")),
                "Correct it and try again; nothing was changed.",
            )
        })?);
    }
    let time_ms = |text: &Option<String>| {
        let time = text.as_deref().and_then(|text| text.parse::<Timestamp>().ok());
        time.map(Timestamp::as_millisecond)
    };
    let name = |text: Option<String>| text.filter(|text| !text.is_empty());
    let is =
        |word: &str| input.job_output_type.as_deref().is_some_and(|found| found.eq_ignore_ascii_case(word));
    let query = ExportQuery {
        from_ms: time_ms(&input.start_time),
        until_ms: time_ms(&input.end_time),
        fabric: name(input.fabric_id.clone()).map(|id| last_segment(&id).to_owned()),
        object_types: words(&input.affected_object_types),
        states,
        scenario: name(input.job_name.clone()),
        format: match () {
            () if is("Xml") => ExportFormat::Xml,
            () if is("Excel") => ExportFormat::Csv,
            () => ExportFormat::Json,
        },
        // Checked to be within a day.
        offset_minutes: input.timezone_offset.unwrap_or_default().round() as i32,
    };
    let job = call.control().export_jobs(query, call.who.clone()).await?;
    Ok(call.accepted(job.id, &Ids(&call.vault).job(job.id)))
}

/// Tells in an export's job where its download is.
pub(super) async fn show(
    call: &Call,
    entry: &JobEntry,
    job: &mut Resource<JobProperties>,
) -> Result<(), ApiError> {
    let JobEntry::Configuration(record) = entry else { return Ok(()) };
    if record.change != ConfigurationChange::ExportJobs {
        return Ok(());
    }
    let export = match call.control().job_export(record.id).await {
        Ok(export) => Some(export),
        Err(ControlError::NotFound { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let details = ExportJobDetails {
        instance_type: EXPORT_JOB_DETAILS.to_owned(),
        blob_uri: export.as_ref().map(|_| format!("{}/jobExports/{}", call.base_url, record.id)),
        sas_token: export.map(|export| {
            let expires = convert::time_text(export.expires_ms);
            format!("se={}&sig={}", mainstay_api::encode_segment(&expires), export.secret)
        }),
        affected_object_details: std::collections::BTreeMap::new(),
    };
    job.properties.custom_details =
        serde_json::to_value(details).map_err(|error| ApiError::internal(error.to_string()))?;
    Ok(())
}

/// A download: `/jobExports/{job}?sig=…`. Whatever is wrong with it, the answer is the same.
pub(super) async fn download(
    api: &Arc<Api>,
    name: &str,
    query: &[(String, String)],
) -> Result<Response, ApiError> {
    let refused = || {
        ApiError::new(
            StatusCode::FORBIDDEN,
            "AuthenticationFailed",
            "there is no export of jobs for this link, or no longer",
            "Export the jobs again, and append the job's sasToken to its blobUri after a '?'.",
        )
    };
    let secret = query.iter().find(|(name, _)| name == "sig").map_or("", |(_, secret)| secret.as_str());
    let job: JobId = name.parse().map_err(|_| refused())?;
    let mut found = None;
    for vault in api.vaults.all() {
        match vault.control.job_export(job).await {
            Ok(export) if export.is_opened_by(secret) => found = Some((vault, export)),
            Ok(_) | Err(ControlError::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let (vault, export) = found.ok_or_else(refused)?;
    let (kind, ending) = match export.query.format {
        ExportFormat::Json => ("application/json", "json"),
        ExportFormat::Xml => ("application/xml", "xml"),
        ExportFormat::Csv => ("text/csv; charset=utf-8", "csv"),
    };
    let disposition = format!("attachment; filename=\"jobs-{job}.{ending}\"");
    let headers = [
        (header::CONTENT_TYPE, kind.to_owned()),
        (header::CONTENT_DISPOSITION, disposition),
        // The link is a secret, and so is what it gives.
        (header::CACHE_CONTROL, "no-store".to_owned()),
    ];
    let writing = Writing { vault, export, next: Next::Beginning, is_first: true };
    let pieces = futures::stream::try_unfold(writing, Writing::piece);
    Ok((headers, Body::from_stream(pieces)).into_response())
}

/// A download under way.
struct Writing {
    vault: Arc<HostedVault>,
    export: JobExportRecord,
    next: Next,
    /// Whether no job has been written yet.
    is_first: bool,
}

enum Next {
    Beginning,
    Page(Option<JobPlace>),
    End,
    Nothing,
}

impl Writing {
    /// The next piece of the text. An error breaks the download off, which the client sees.
    async fn piece(mut self) -> Result<Option<(Bytes, Self)>, ControlError> {
        let format = self.export.query.format;
        let text = match self.next {
            Next::Beginning => {
                self.next = Next::Page(None);
                beginning(format)
            }
            Next::Page(after) => {
                let found = self.vault.control.exported_jobs(&self.export, after, PAGE_LENGTH).await;
                let (entries, next) = found.inspect_err(|error| {
                    tracing::error!(%error, job = %self.export.job, "an export of jobs broke off");
                })?;
                self.next = next.map_or(Next::End, |place| Next::Page(Some(place)));
                let record = self.vault.record();
                let ids = Ids(&record);
                let mut text = String::new();
                for entry in &entries {
                    let job = convert::job_entry(&ids, entry, &convert::Children::new());
                    let separator = if format == ExportFormat::Json && !self.is_first { "," } else { "" };
                    text.push_str(separator);
                    text.push_str(&job_text(format, &job, self.export.query.offset_minutes));
                    self.is_first = false;
                }
                text
            }
            Next::End => {
                self.next = Next::Nothing;
                ending(format).to_owned()
            }
            Next::Nothing => return Ok(None),
        };
        Ok(Some((Bytes::from(text), self)))
    }
}

/// What is told of a job where it is not told whole.
const COLUMNS: [&str; 12] = [
    "Name",
    "ScenarioName",
    "FriendlyName",
    "State",
    "StateDescription",
    "StartTime",
    "EndTime",
    "TargetObjectId",
    "TargetObjectName",
    "TargetInstanceType",
    "Errors",
    "Id",
];

fn beginning(format: ExportFormat) -> String {
    match format {
        ExportFormat::Json => "{\"value\":[".to_owned(),
        ExportFormat::Xml => "<?xml version=\"1.0\" encoding=\"utf-8\"?>\n<Jobs>\n".to_owned(),
        // The mark tells spreadsheets that it is UTF-8.
        ExportFormat::Csv => format!("\u{feff}{}\r\n", COLUMNS.join(",")),
    }
}

fn ending(format: ExportFormat) -> &'static str {
    match format {
        ExportFormat::Json => "]}",
        ExportFormat::Xml => "</Jobs>\n",
        ExportFormat::Csv => "",
    }
}

fn job_text(format: ExportFormat, job: &Resource<JobProperties>, offset_minutes: i32) -> String {
    if format == ExportFormat::Json {
        return json!(job).to_string();
    }
    let it = &job.properties;
    let time =
        |text: &Option<String>| text.as_deref().map_or_else(String::new, |text| local(text, offset_minutes));
    let errors: Vec<_> = it
        .errors
        .iter()
        .map(|error| format!("{}: {}", error.service_error_details.code, error.service_error_details.message))
        .collect();
    let values: [String; COLUMNS.len()] = [
        job.name.clone(),
        it.scenario_name.clone(),
        it.friendly_name.clone(),
        it.state.clone(),
        it.state_description.clone(),
        time(&it.start_time),
        time(&it.end_time),
        it.target_object_id.clone(),
        it.target_object_name.clone(),
        it.target_instance_type.clone(),
        errors.join("; "),
        job.id.clone(),
    ];
    if format == ExportFormat::Csv {
        return format!("{}\r\n", values.map(|value| csv(&value)).join(","));
    }
    let fields = COLUMNS.iter().zip(&values).map(|(name, value)| format!("<{name}>{}</{name}>", xml(value)));
    format!("<Job>{}</Job>\n", fields.collect::<String>())
}

/// A time as people at the client's place write it.
fn local(text: &str, offset_minutes: i32) -> String {
    let offset = Offset::from_seconds(offset_minutes.saturating_mul(60));
    match (text.parse::<Timestamp>(), offset) {
        (Ok(time), Ok(offset)) => time.display_with_offset(offset).to_string(),
        _ => text.to_owned(),
    }
}

/// A quoted value. What a spreadsheet would take for a formula gets an apostrophe before it: names of VMs come from
/// whoever may make VMs.
fn csv(value: &str) -> String {
    let mark = if value.starts_with(['=', '+', '-', '@', '\t', '\r']) { "'" } else { "" };
    format!("\"{mark}{}\"", value.replace('"', "\"\""))
}

fn xml(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    for c in value.chars() {
        match c {
            '&' => text.push_str("&amp;"),
            '<' => text.push_str("&lt;"),
            '>' => text.push_str("&gt;"),
            // XML has no way to write these at all.
            c if c.is_control() && !matches!(c, '\n' | '\t') => text.push('\u{fffd}'),
            c => text.push(c),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stay_values_in_every_form() {
        assert_eq!(csv("a \"b\", c"), "\"a \"\"b\"\", c\"");
        assert_eq!(csv("=cmd()"), "\"'=cmd()\"");
        assert_eq!(xml("<a & b>\u{1}"), "&lt;a &amp; b&gt;\u{fffd}");
    }

    #[test]
    fn times_are_the_clients() {
        assert_eq!(local("2026-01-31T23:30:00Z", 90), "2026-02-01T01:00:00+01:30");
        assert_eq!(local("0001-01-01T00:00:00", 90), "0001-01-01T00:00:00");
    }
}
