//! Jobs: beginning them, watching them, and what people can do to them.

use std::{io::Write as _, path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::{Args, Subcommand, ValueEnum};
use mainstay_api::{
    arm::{CommentsInput, ExportJobDetails, JobProperties, JobQueryParameter, JobTask, Request},
    v1::{JobStatus, TaskStatus},
};
use reqwest::Method;
use serde_json::Value;

use crate::{
    exit::Exit,
    output, progress,
    session::{Resource, Session},
};

type Job = Resource<JobProperties>;

/// Whether to wait for the job.
#[derive(Args, Clone, Copy)]
pub(crate) struct WaitArguments {
    /// Wait until the job ends, or waits for a person (default).
    #[arg(long, overrides_with = "no_wait")]
    wait: bool,
    /// Answer as soon as the job is accepted.
    #[arg(long)]
    no_wait: bool,
    /// Print the item (or, without waiting, the job) as ARM resource.
    #[arg(long)]
    pub(crate) json: bool,
}

impl WaitArguments {
    /// The same, for who prints the item itself, later.
    pub(crate) fn silent(self) -> Self {
        Self { json: false, ..self }
    }
}

#[derive(Subcommand)]
pub(crate) enum JobCommand {
    /// Lists the newest jobs.
    List {
        /// How many.
        #[arg(long, default_value_t = 30)]
        limit: usize,
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Shows a job and its tasks.
    Show {
        /// The job's id.
        job: String,
        /// Print JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Follows a job until it ends or waits for a person.
    #[command(after_help = "\
What another command began without waiting:
  mainstay failover web01 --no-wait
  mainstay job list
  mainstay job watch 0198f2b4-6a1e-7c33-9d55-3a1c3f0a9b77

The exit code is the job's: 0 done, 1 failed, 6 waiting for a person (`mainstay job resume`).")]
    Watch {
        /// The job's id.
        job: String,
    },
    /// Downloads jobs as JSON, XML or comma-separated values.
    Export(ExportArguments),
    /// Cancels a job: what it did is undone.
    Cancel {
        /// The job's id.
        job: String,
        #[command(flatten)]
        wait: WaitArguments,
    },
    /// Continues a job that waits for a person.
    Resume {
        /// The job's id.
        job: String,
        #[command(flatten)]
        wait: WaitArguments,
    },
    /// Tries a stuck job again.
    Restart {
        /// The job's id.
        job: String,
        #[command(flatten)]
        wait: WaitArguments,
    },
}

pub(crate) async fn run(session: &Session, command: JobCommand) -> anyhow::Result<Exit> {
    match command {
        JobCommand::List { limit, json } => {
            let path = format!("{}/replicationJobs", session.vault);
            let jobs: Vec<Job> = session.client.list_first(&path, limit).await?;
            if json {
                output::json(&jobs)?;
                return Ok(Exit::Done);
            }
            let rows = jobs
                .into_iter()
                .map(|job| {
                    let job = job.into_known();
                    let it = job.properties;
                    vec![
                        it.start_time.unwrap_or_default(),
                        it.friendly_name,
                        it.target_object_name,
                        it.state,
                        it.state_description,
                        job.name,
                    ]
                })
                .collect();
            output::table(&["BEGAN", "JOB", "VM", "STATE", "", "ID"], rows);
            Ok(Exit::Done)
        }
        JobCommand::Show { job, json } => {
            let job = read(session, &job).await?;
            if json {
                output::json(&job)?;
            } else {
                show(&job);
            }
            Ok(Exit::Done)
        }
        JobCommand::Watch { job } => {
            let job = follow(session, &job).await?;
            Ok(ending(&job))
        }
        JobCommand::Export(arguments) => export(session, arguments).await,
        JobCommand::Cancel { job, wait } => match act(session, &job, "cancel", &wait).await? {
            // That is what was asked for.
            Exit::Failed if read(session, &job).await?.properties.state == "Cancelled" => Ok(Exit::Done),
            exit => Ok(exit),
        },
        JobCommand::Resume { job, wait } => resume(session, &job, &wait).await,
        JobCommand::Restart { job, wait } => act(session, &job, "restart", &wait).await,
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ExportForm {
    /// The jobs as ARM resources.
    Json,
    /// One element for each job.
    Xml,
    /// Comma-separated values, for spreadsheets.
    Csv,
}

#[derive(Args)]
pub(crate) struct ExportArguments {
    /// Jobs accepted not before (RFC 3339).
    #[arg(long, value_name = "TIME")]
    from: Option<String>,
    /// Jobs accepted not after.
    #[arg(long, value_name = "TIME")]
    to: Option<String>,
    /// Jobs of this fabric.
    #[arg(long)]
    fabric: Option<String>,
    /// Jobs in this state (Succeeded, Failed, ...); can be given several times.
    #[arg(long, value_name = "STATE")]
    state: Vec<String>,
    /// Jobs with this scenario name (TestFailover, UnplannedFailover, ...).
    #[arg(long, value_name = "NAME")]
    scenario: Option<String>,
    /// The form.
    #[arg(long, value_enum, default_value = "json")]
    format: ExportForm,
    /// Where to; standard output by default.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
}

async fn export(session: &Session, arguments: ExportArguments) -> anyhow::Result<Exit> {
    let form = match arguments.format {
        ExportForm::Json => "Json",
        ExportForm::Xml => "Xml",
        ExportForm::Csv => "Excel",
    };
    let query = JobQueryParameter {
        start_time: arguments.from,
        end_time: arguments.to,
        fabric_id: arguments.fabric,
        job_status: (!arguments.state.is_empty()).then(|| arguments.state.join(",")),
        job_output_type: Some(form.to_owned()),
        job_name: arguments.scenario,
        ..JobQueryParameter::default()
    };
    let path = format!("{}/replicationJobs/export", session.vault);
    let name = session.client.begin(Method::POST, &path, Some(&query)).await?;
    let job = read(session, &name.context("the server answered without an operation")?).await?.into_known();
    let details: ExportJobDetails = serde_json::from_value(job.properties.custom_details)?;
    let (Some(uri), Some(token)) = (details.blob_uri, details.sas_token) else {
        anyhow::bail!("job {} offers nothing to download", job.name);
    };
    let link = format!("{uri}?{token}");
    match arguments.file {
        None => session.client.download(&link, output::piece).await?,
        Some(path) => {
            let mut file =
                std::fs::File::create(&path).with_context(|| format!("create {}", path.display()))?;
            session.client.download(&link, |piece| file.write_all(piece)).await?;
            file.sync_all().with_context(|| format!("write {}", path.display()))?;
        }
    }
    Ok(Exit::Done)
}

async fn read(session: &Session, name: &str) -> anyhow::Result<Job> {
    Ok(session.client.get(&format!("{}/replicationJobs/{name}", session.vault)).await?)
}

fn show(job: &Job) {
    let it = &job.properties;
    output::line(&format!("job:      {}", job.name));
    output::line(&format!("what:     {} of '{}'", it.friendly_name, it.target_object_name));
    output::line(&format!("state:    {} ({})", it.state, it.state_description));
    output::line(&format!("began:    {}", it.start_time.as_deref().unwrap_or("-")));
    output::line(&format!("ended:    {}", it.end_time.as_deref().unwrap_or("-")));
    if let Some(notes) = it.custom_details["comments"].as_str().filter(|notes| !notes.is_empty()) {
        output::line(&format!("notes:    {notes}"));
    }
    if !it.allowed_actions.is_empty() {
        output::line(&format!("possible: {}", it.allowed_actions.join(", ")));
    }
    let rows = it
        .tasks
        .iter()
        .flat_map(|task| {
            let machines = machines(task)
                .into_iter()
                .map(|machine| JobTask { friendly_name: format!("  {}", machine.friendly_name), ..machine });
            std::iter::once(task.clone()).chain(machines)
        })
        .map(|task| {
            let errors: Vec<_> =
                task.errors.iter().map(|error| error.service_error_details.message.as_str()).collect();
            vec![
                task.friendly_name.clone(),
                task.state.clone(),
                task.state_description.clone(),
                errors.join("; "),
            ]
        })
        .collect();
    output::table(&["TASK", "STATE", "", "NOTES"], rows);
    for text in it.tasks.iter().filter_map(instructions) {
        output::hint(&text);
    }
}

/// What a person is to do, if the task waits for one.
fn instructions(task: &JobTask) -> Option<String> {
    let text = task.custom_details.as_ref()?["instructions"].as_str()?;
    (task.state == "Suspended").then(|| format!("{}: {text}", task.friendly_name))
}

/// A task's machines, if it is a group of a recovery plan, and how each stands.
fn machines(task: &JobTask) -> Vec<JobTask> {
    let tasks = task.group_task_custom_details.as_ref().map(|details| details["childTasks"].clone());
    tasks.and_then(|tasks| serde_json::from_value(tasks).ok()).unwrap_or_default()
}

async fn act(session: &Session, name: &str, verb: &str, wait: &WaitArguments) -> anyhow::Result<Exit> {
    let path = format!("{}/replicationJobs/{name}/{verb}", session.vault);
    session.client.begin(Method::POST, &path, None::<&()>).await?;
    finish(session, name, wait, None).await
}

/// Continues a job that waits for a person.
pub(crate) async fn resume(session: &Session, name: &str, wait: &WaitArguments) -> anyhow::Result<Exit> {
    let path = format!("{}/replicationJobs/{name}/resume", session.vault);
    let body = Request { properties: CommentsInput::default() };
    session.client.begin(Method::POST, &path, Some(&body)).await?;
    finish(session, name, wait, None).await
}

/// Begins a long-running operation on an item and, if asked, waits for its job.
pub(crate) async fn begin<B: serde::Serialize>(
    session: &Session,
    method: Method,
    path: &str,
    body: Option<&B>,
    wait: &WaitArguments,
    resource: &str,
) -> anyhow::Result<Exit> {
    match session.client.begin(method, path, body).await? {
        Some(job) => finish(session, &job, wait, Some(resource)).await,
        None => Ok(Exit::Done),
    }
}

async fn finish(
    session: &Session,
    name: &str,
    wait: &WaitArguments,
    resource: Option<&str>,
) -> anyhow::Result<Exit> {
    let waits = wait.wait || !wait.no_wait;
    if !waits {
        let job = read(session, name).await?;
        if wait.json {
            output::json(&job)?;
        } else {
            output::note(&format!("job {name} is under way; follow it with `mainstay job watch {name}`"));
        }
        return Ok(Exit::Done);
    }
    let job = follow(session, name).await?;
    if wait.json {
        match resource {
            Some(resource) => match session.client.get::<Value>(resource).await {
                Ok(value) => output::json(&value)?,
                // The operation removed it.
                Err(error) if error.status() == Some(404) => output::json(&job)?,
                Err(error) => return Err(error.into()),
            },
            None => output::json(&job)?,
        }
    }
    Ok(ending(&job))
}

/// How often a job is looked at while it is followed.
const POLL: Duration = Duration::from_millis(200);

/// Shows a job's progress on standard error until it ends or waits for a person.
async fn follow(session: &Session, name: &str) -> anyhow::Result<Job> {
    let bar = output::spinner()?;
    let mut told: Vec<String> = Vec::new();
    loop {
        let job = read(session, name).await?;
        for task in &job.properties.tasks {
            let line = match task.state.as_str() {
                "Succeeded" => format!("✓ {}", task.friendly_name),
                "Failed" => format!("✗ {}", task.friendly_name),
                "Other" => format!("- {} ({})", task.friendly_name, task.state_description),
                _ => continue,
            };
            if !told.contains(&line) {
                bar.suspend(|| output::note(&line));
                for error in &task.errors {
                    let details = &error.service_error_details;
                    bar.suspend(|| output::note(&format!("    {}: {}", error.error_level, details.message)));
                    if !details.recommended_action.is_empty() {
                        bar.suspend(|| output::hint(&details.recommended_action));
                    }
                }
                told.push(line);
            }
        }
        for machine in job.properties.tasks.iter().flat_map(machines) {
            let line = match machine.state.as_str() {
                "Succeeded" => format!("    ✓ {}", machine.friendly_name),
                "Failed" | "Cancelled" => format!("    ✗ {} ({})", machine.friendly_name, machine.state),
                _ => continue,
            };
            if !told.contains(&line) {
                bar.suspend(|| output::note(&line));
                told.push(line);
            }
        }
        let it = &job.properties;
        match it.state.as_str() {
            "InProgress" | "NotStarted" | "Cancelling" => {
                let current = it.tasks.iter().find(|task| task.state == "InProgress");
                let text = match current {
                    // Progress is an extra: an older server does not know it.
                    Some(task) => {
                        let status: Option<JobStatus> =
                            session.client.get(&session.v1(&format!("/jobs/{name}"))).await.ok();
                        progress_text(task, status.as_ref().and_then(|status| status.task(&task.name)))
                    }
                    None => it.state.clone(),
                };
                bar.set_message(text);
                bar.tick();
                tokio::time::sleep(POLL).await;
            }
            _ => {
                bar.finish_and_clear();
                output::note(&format!(
                    "{} of '{}': {} ({})",
                    it.friendly_name, it.target_object_name, it.state, it.state_description
                ));
                for text in it.tasks.iter().filter_map(instructions) {
                    output::hint(&text);
                }
                if it.state == "Suspended" {
                    output::hint(&format!("`mainstay job resume {name}` goes on."));
                }
                return Ok(job);
            }
        }
    }
}

fn progress_text(task: &JobTask, status: Option<&TaskStatus>) -> String {
    let told = status.map(|status| progress::text(&status.progress)).filter(|told| !told.is_empty());
    match told {
        Some(told) => format!("{}: {told}", task.friendly_name),
        None => task.friendly_name.clone(),
    }
}

fn ending(job: &Job) -> Exit {
    match job.properties.state.as_str() {
        "Succeeded" => Exit::Done,
        "Suspended" => Exit::Waiting,
        _ => Exit::Failed,
    }
}
