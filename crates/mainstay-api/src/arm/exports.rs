//! Exports of jobs.

use serde::{Deserialize, Serialize};

/// The instance type of an export's details.
pub const EXPORT_JOB_DETAILS: &str = "ExportJobDetails";

/// Which jobs to export, and in which form. Everything can be left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct JobQueryParameter {
    /// Accepted not before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<String>,
    /// Accepted not after.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_time: Option<String>,
    /// Of this fabric.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fabric_id: Option<String>,
    /// About objects of these types, separated by commas.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub affected_object_types: Option<String>,
    /// In these states, separated by commas.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job_status: Option<String>,
    /// `Json`, `Xml` or `Excel`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job_output_type: Option<String>,
    /// With this scenario name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job_name: Option<String>,
    /// Minutes that the client's time is ahead of UTC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timezone_offset: Option<f64>,
}

/// Details of an export's job.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ExportJobDetails {
    /// [`EXPORT_JOB_DETAILS`].
    pub instance_type: String,
    /// Where the jobs can be downloaded; absent when they no longer can.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blob_uri: Option<String>,
    /// The query to append to that, without its `?`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sas_token: Option<String>,
    /// Empty.
    pub affected_object_details: std::collections::BTreeMap<String, String>,
}
