//! An item of the lab, in the hands of a client of the published API like any other.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use mainstay_api::{
    Client, ClientError,
    arm::{ItemProperties, JobProperties, List, RecoveryPointProperties, Resource},
    v1::{ItemStatus, JobStatus},
};
use reqwest::Method;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{Lab, LabFile, LabVm, RECOVERY, demo::Progress};

const POLL: Duration = Duration::from_millis(50);
/// Nothing in the journey takes longer, also in software emulation on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(600);

/// One item of the lab.
pub struct Item {
    client: Client,
    vault: String,
    name: String,
    path: String,
}

/// A recovery point.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    /// Its id.
    pub id: Uuid,
    /// When it was taken.
    pub time_ms: i64,
}

/// A job that ended or waits.
pub struct Job {
    pub(crate) resource: Resource<JobProperties>,
    status: JobStatus,
}

impl Job {
    /// The tasks' output by name.
    pub fn output(&self, task: &str) -> Value {
        self.status.task(task).map_or(Value::Null, |task| task.output.clone())
    }
}

/// The protection container that a VM of the lab is in.
fn container_of(vm: &LabVm) -> Result<&str> {
    vm.protectable_item_id.split("/replicationProtectableItems/").next().context("an ARM id")
}

impl Item {
    /// Makes a policy and protects a VM with it.
    pub async fn protect(lab: &Lab, vm: &str, copy_frequency_seconds: u32) -> Result<Self> {
        Self::protect_under(lab, vm, "demo", copy_frequency_seconds, 1).await
    }

    /// Makes a policy of that name, unless there is one, and protects a VM with it. Application-consistent points every so
    /// many hours, 0 = none.
    pub async fn protect_under(
        lab: &Lab,
        vm: &str,
        policy: &str,
        copy_frequency_seconds: u32,
        application_consistent_hours: u32,
    ) -> Result<Self> {
        let settings = (policy, copy_frequency_seconds, application_consistent_hours);
        let (item, job) = Self::begin_protection(lab, vm, settings).await?;
        item.finish(&job).await?;
        Ok(item)
    }

    /// Begins what [`Self::protect_under`] does; answers the job's name as well. `policy`: its name and its two times.
    pub(crate) async fn begin_protection(
        lab: &Lab,
        vm: &str,
        (policy, copy_frequency_seconds, application_consistent_hours): (&str, u32, u32),
    ) -> Result<(Self, String)> {
        let (client, vault) = (lab.client()?, lab.vault_path());
        let (name, policy) = (policy, format!("{vault}/replicationPolicies/{policy}"));
        let settings = json!({ "properties": { "providerSpecificInput": {
            "instanceType": "HyperVReplicaAzure", "replicationInterval": copy_frequency_seconds,
            "recoveryPointHistoryDuration": 24,
            "applicationConsistentSnapshotFrequencyInHours": application_consistent_hours } } });
        client.begin(Method::PUT, &policy, Some(&settings)).await?;
        let found = lab.file().vms.iter().find(|found| found.name == vm).context("a VM of the lab")?;
        let container = container_of(found)?;
        let mapping = json!({ "properties": { "policyId": policy, "targetProtectionContainerId": "Microsoft Azure",
            "providerSpecificInput": { "instanceType": "HyperVReplicaAzure" } } });
        let path = format!("{container}/replicationProtectionContainerMappings/{name}");
        client.begin(Method::PUT, &path, Some(&mapping)).await?;
        let item = Self {
            client,
            vault,
            name: vm.to_owned(),
            path: format!("{container}/replicationProtectedItems/{vm}"),
        };
        let body = json!({ "properties": { "policyId": policy, "protectableItemId": found.protectable_item_id,
            "providerSpecificDetails": { "instanceType": "HyperVReplicaAzure" } } });
        let job = item.begin(Method::PUT, "", &body).await?;
        Ok((item, job))
    }

    /// What goes on with a VM of the lab, if it is protected: what its job does, else its replication cycle.
    pub async fn progress_of(client: &Client, lab: &LabFile, vm: &str) -> Result<Progress> {
        let found = lab.vms.iter().find(|found| found.name == vm).context("a VM of the lab")?;
        let container = container_of(found)?;
        let path = format!("{container}/replicationProtectedItems/{vm}");
        let item = client.get::<Resource<ItemProperties>>(&path).await?.properties;
        let status: ItemStatus = client.get(&format!("/api/v1/items/{vm}")).await?;
        let job = item.current_scenario.job_id.rsplit('/').next().unwrap_or_default();
        let (task, cycle) = if job.is_empty() {
            let phase = status.cycle.as_ref().map(|cycle| cycle.phase.clone()).unwrap_or_default();
            (phase, status.cycle)
        } else {
            let vault = path.split("/replicationFabrics/").next().unwrap_or_default();
            let resource: Resource<JobProperties> =
                client.get(&format!("{vault}/replicationJobs/{job}")).await?;
            let current = resource.properties.tasks.iter().find(|task| task.state == "InProgress");
            let known: JobStatus = client.get(&format!("/api/v1/jobs/{job}")).await?;
            let progress = current.and_then(|task| known.task(&task.name)).map(|task| task.progress.clone());
            (current.map(|task| task.friendly_name.clone()).unwrap_or_default(), progress)
        };
        let (bytes_done, bytes_total, bytes_moved) =
            cycle.map_or((0, 0, 0), |cycle| (cycle.bytes_done, cycle.bytes_total, cycle.bytes_moved));
        Ok(Progress { task, bytes_done, bytes_total, bytes_moved, rpo_seconds: status.rpo_seconds })
    }

    /// The item's state.
    pub async fn show(&self) -> Result<ItemProperties> {
        Ok(self.client.get::<Resource<ItemProperties>>(&self.path).await?.properties)
    }

    /// What ARM has no field for.
    pub async fn status(&self) -> Result<ItemStatus> {
        Ok(self.client.get(&format!("/api/v1/items/{}", self.name)).await?)
    }

    /// Its recovery points, oldest first.
    pub async fn points(&self) -> Result<Vec<Point>> {
        let points: List<Resource<RecoveryPointProperties>> =
            self.client.get(&format!("{}/recoveryPoints", self.path)).await?;
        let mut found = Vec::new();
        for point in points.value.iter().rev() {
            let time: jiff::Timestamp = point.properties.recovery_point_time.parse()?;
            found.push(Point { id: point.name.parse()?, time_ms: time.as_millisecond() });
        }
        Ok(found)
    }

    /// Waits until the item is as `wanted`.
    pub async fn wait(&self, what: &str, wanted: impl Fn(&ItemProperties) -> bool) -> Result<ItemProperties> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let item = match self.show().await {
                Err(error) if is_outage(&error) && Instant::now() < deadline => {
                    tokio::time::sleep(POLL).await;
                    continue;
                }
                item => item?,
            };
            if wanted(&item) {
                return Ok(item);
            }
            if Instant::now() > deadline {
                bail!(
                    "{what} did not happen; the item is {} with {:?}",
                    item.protection_state,
                    item.health_errors
                );
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until a number of recovery points is there that were taken after a moment.
    pub async fn wait_points(&self, after_ms: i64, count: usize) -> Result<Vec<Point>> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let mut points = self.points().await?;
            points.retain(|point| point.time_ms > after_ms);
            if points.len() >= count {
                return Ok(points);
            }
            if Instant::now() > deadline {
                bail!(
                    "{count} new recovery points did not come; health: {:?}",
                    self.show().await?.health_errors
                );
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Begins an operation on the item and waits until its job ends well or waits for a person.
    pub async fn run(&self, method: Method, verb: &str, body: &Value) -> Result<Job> {
        let job = self.begin(method, verb, body).await?;
        self.finish(&job).await
    }

    /// Begins an operation and answers the job's name, as soon as the request is accepted.
    pub async fn begin(&self, method: Method, verb: &str, body: &Value) -> Result<String> {
        let path = if verb.is_empty() { self.path.clone() } else { format!("{}/{verb}", self.path) };
        self.client.begin(method, &path, Some(body)).await?.context("the operation is a job")
    }

    /// Continues a job that waits.
    pub async fn resume(&self, job: &Job) -> Result<Job> {
        self.begin_resume(job).await?;
        self.finish(&job.resource.name).await
    }

    /// Continues a job that waits, and does not wait for its end.
    pub async fn begin_resume(&self, job: &Job) -> Result<String> {
        let path = format!("{}/replicationJobs/{}/resume", self.vault, job.resource.name);
        self.client.begin(Method::POST, &path, Some(&json!({ "properties": {} }))).await?;
        Ok(job.resource.name.clone())
    }

    /// Cancels a job; answers whether that was accepted, or refused because the job is beyond its point of no return.
    pub async fn cancel(&self, name: &str) -> Result<bool> {
        let path = format!("{}/replicationJobs/{name}/cancel", self.vault);
        match self.client.begin(Method::POST, &path, None::<&()>).await {
            Ok(_) => Ok(true),
            Err(error) if error.status() == Some(409) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for a job, also through outages of the server.
    pub async fn finish(&self, name: &str) -> Result<Job> {
        self.finish_or_cancelled(name).await?.with_context(|| format!("the job {name} was cancelled"))
    }

    /// Waits for a job as [`Self::finish`] does; `None` if it was cancelled.
    pub async fn finish_or_cancelled(&self, name: &str) -> Result<Option<Job>> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let job = self.job(name, deadline).await?;
            match job.properties.state.as_str() {
                "Succeeded" | "Suspended" => {
                    let status = self.ask(&format!("/api/v1/jobs/{name}"), deadline).await?;
                    return Ok(Some(Job { resource: job, status }));
                }
                "Cancelled" => return Ok(None),
                state if is_running(state) && Instant::now() < deadline => tokio::time::sleep(POLL).await,
                state => {
                    let errors: Vec<_> = job
                        .properties
                        .errors
                        .iter()
                        .map(|error| error.service_error_details.message.as_str())
                        .collect();
                    bail!("the job '{}' is {state}: {}", job.properties.friendly_name, errors.join("; "));
                }
            }
        }
    }

    /// The tasks of a job that were begun after a moment, in milliseconds since 1970.
    pub async fn begun_after(&self, name: &str, at_ms: i64) -> Result<Vec<String>> {
        let job = self.job(name, Instant::now() + TIMEOUT).await?;
        let mut late = Vec::new();
        for task in job.properties.tasks {
            // A task that was never begun has ARM's time for none, which names no zone.
            if let Some(start) = task.start_time.filter(|start| start.ends_with('Z'))
                && start.parse::<jiff::Timestamp>()?.as_millisecond() > at_ms
            {
                late.push(task.name);
            }
        }
        Ok(late)
    }

    /// Whether a job still has something to do by itself.
    pub async fn is_running(&self, name: &str) -> Result<bool> {
        Ok(is_running(&self.job(name, Instant::now() + TIMEOUT).await?.properties.state))
    }

    async fn job(&self, name: &str, deadline: Instant) -> Result<Resource<JobProperties>> {
        self.ask(&format!("{}/replicationJobs/{name}", self.vault), deadline).await
    }

    /// Asks the server, also through its outages.
    async fn ask<T: DeserializeOwned>(&self, path: &str, deadline: Instant) -> Result<T> {
        loop {
            match self.client.get(path).await {
                Err(ClientError::Unreachable { .. }) if Instant::now() < deadline => {
                    tokio::time::sleep(POLL).await;
                }
                answer => return Ok(answer?),
            }
        }
    }

    /// What is left of recovery VMs at the recovery site: domains and files.
    pub async fn remains(&self, lab: &Lab) -> Result<Vec<String>> {
        let site = lab.site(RECOVERY)?;
        let mut found = Vec::new();
        for vm in site.libvirt().domains().await? {
            found.push(format!("domain {}", site.libvirt().name(vm).await?));
        }
        for entry in std::fs::read_dir(site.driver_directory().join("recovery"))? {
            found.push(entry?.path().display().to_string());
        }
        Ok(found)
    }

    /// Whether the server refuses an operation because of the item's state.
    pub async fn refuses(&self, verb: &str, body: &Value) -> Result<bool> {
        match self.begin(Method::POST, verb, body).await {
            Ok(_) => Ok(false),
            Err(error) => match error.downcast_ref::<ClientError>().and_then(ClientError::status) {
                Some(409) => Ok(true),
                _ => Err(error),
            },
        }
    }
}

fn is_running(state: &str) -> bool {
    matches!(state, "InProgress" | "NotStarted" | "Cancelling")
}

/// Whether the server was away; everything else is an answer.
fn is_outage(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(ClientError::Unreachable { .. }))
}
