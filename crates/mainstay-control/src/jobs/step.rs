//! A workflow's step: what it is given, what it answers.

use std::{
    borrow::Cow,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use mainstay_model::{ItemId, ProviderId};
use mainstay_provider::{ErrorKind, Operation, Progress, ProgressSink, SiteError, call};
use rand::Rng as _;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::{
    Control,
    db::{ItemRecord, JobError, JobRecord},
};

/// A task's names as clients of the Site Recovery API know them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// `taskId`.
    pub id: Cow<'static, str>,
    /// `name`; also the step's name in the log.
    pub name: Cow<'static, str>,
    /// `friendlyName`.
    pub friendly_name: Cow<'static, str>,
}

/// A step of a workflow.
pub struct Step {
    /// Its names.
    pub task: Task,
    /// Whether the job can no longer be cancelled or undone once it has begun.
    pub is_point_of_no_return: bool,
    /// What it does.
    pub action: Box<dyn StepAction>,
}

impl Step {
    /// A step that can be undone.
    pub fn new(
        id: impl Into<Cow<'static, str>>,
        name: impl Into<Cow<'static, str>>,
        friendly_name: impl Into<Cow<'static, str>>,
        action: impl StepAction + 'static,
    ) -> Self {
        Self {
            task: Task { id: id.into(), name: name.into(), friendly_name: friendly_name.into() },
            is_point_of_no_return: false,
            action: Box::new(action),
        }
    }

    /// The same as the point of no return.
    #[must_use]
    pub fn point_of_no_return(mut self) -> Self {
        self.is_point_of_no_return = true;
        self
    }
}

/// What a step does. Both methods may run any number of times, also after having run in part.
#[async_trait]
pub trait StepAction: Send + Sync {
    /// Does the step. Dropped when the job is cancelled.
    async fn run(&self, step: &StepContext<'_>) -> Result<Done, JobError>;

    /// Puts back what the step did, wholly or in part.
    async fn undo(&self, _step: &StepContext<'_>) -> Result<Undone, JobError> {
        Ok(Undone::default())
    }
}

/// A change to the item, written together with the step's log entry.
pub type ItemChange = Box<dyn FnOnce(&mut ItemRecord) + Send>;

/// What a step answers.
#[derive(Default)]
pub struct Done {
    /// For later steps and for people.
    pub output: Value,
    /// It was not needed.
    pub is_skipped: bool,
    /// It waits for a person; `run` is called again when the job is resumed.
    pub is_waiting: bool,
    /// What went wrong all the same.
    pub warnings: Vec<JobError>,
    /// Raise the item's generation: whoever wrote before writes no more.
    pub fences: bool,
    /// What becomes of the item.
    pub change: Option<ItemChange>,
}

impl Done {
    /// A step with an output.
    pub fn with(output: &impl Serialize) -> Result<Self, JobError> {
        let output = serde_json::to_value(output).map_err(|error| {
            JobError::new(
                "InternalError",
                format!("the step's output cannot be written: {error}"),
                "Please report this.",
            )
        })?;
        Ok(Self { output, ..Self::default() })
    }

    /// A step that was not needed.
    pub fn skipped() -> Self {
        Self { is_skipped: true, ..Self::default() }
    }

    /// A step that waits for a person.
    pub fn waiting() -> Self {
        Self { is_waiting: true, ..Self::default() }
    }

    /// Changes the item in the same transaction.
    #[must_use]
    pub fn changing(mut self, change: impl FnOnce(&mut ItemRecord) + Send + 'static) -> Self {
        self.change = Some(Box::new(change));
        self
    }

    /// Adds a warning.
    #[must_use]
    pub fn warning(mut self, warning: JobError) -> Self {
        self.warnings.push(warning.as_warning());
        self
    }

    /// Raises the item's generation in the same transaction.
    #[must_use]
    pub fn fencing(mut self) -> Self {
        self.fences = true;
        self
    }
}

/// What an undo answers.
#[derive(Default)]
pub struct Undone {
    /// Raise the item's generation.
    pub fences: bool,
    /// What becomes of the item.
    pub change: Option<ItemChange>,
}

/// How long a site that is away, or busy, is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience(pub Duration);

impl Patience {
    /// Not at all.
    pub const NONE: Self = Self(Duration::ZERO);
    /// Until a living agent has dialled again after a restart of the server: it pauses for 5 s at most.
    pub const RECONNECT: Self = Self(Duration::from_secs(15));
    /// Through a restart of an agent or of its hypervisor's daemon.
    pub const RESTART: Self = Self(Duration::from_secs(120));
    /// Through an outage that a person must end; the job then fails and is undone.
    pub const OUTAGE: Self = Self(Duration::from_secs(600));
}

/// What a step is given.
pub struct StepContext<'a> {
    /// The control plane.
    pub control: &'a Arc<Control>,
    /// The job as of the step's begin.
    pub job: &'a JobRecord,
    /// The step's index.
    pub index: usize,
    /// Set when somebody cancels the job.
    pub cancel: &'a CancellationToken,
    pub(super) progress: &'a Mutex<Progress>,
}

impl ProgressSink for StepContext<'_> {
    fn report(&self, progress: Progress) {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner) = progress;
    }
}

impl StepContext<'_> {
    /// The item's identifier.
    pub fn item_id(&self) -> ItemId {
        self.job.item
    }

    /// The item as it is now.
    pub async fn item(&self) -> Result<ItemRecord, JobError> {
        Ok(self.control.item(self.job.item).await?)
    }

    /// Refuses to go on where the store takes no writes, while nothing has happened yet: what comes could be neither finished
    /// nor undone without.
    pub(crate) async fn check_store(&self) -> Result<(), JobError> {
        self.control.store.check_writable(self.job.item.0).await.map_err(|error| {
            JobError::new(
                "StoreNotWritable",
                format!("the store takes no writes: {error}"),
                "The VM was not touched. Make the store's file system writable again, or give it space, and start anew.",
            )
        })
    }

    /// Whether the step was begun before: the server may have been restarted, and agents be on their way back.
    pub(crate) fn is_resumed(&self) -> bool {
        self.job.steps.get(self.index).is_some_and(|step| step.attempts > 1)
    }

    /// What was asked for.
    pub fn params<T: DeserializeOwned>(&self) -> Result<T, JobError> {
        read(&self.job.params, "the job's parameters")
    }

    /// What an earlier step answered; `None` if it was skipped or has not run.
    pub fn output<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, JobError> {
        match self.job.steps.iter().find(|step| step.name == name) {
            Some(step) if !step.output.is_null() => read(&step.output, name).map(Some),
            _ => Ok(None),
        }
    }

    /// What an earlier step answered that must have run.
    pub fn expect_output<T: DeserializeOwned>(&self, name: &str) -> Result<T, JobError> {
        self.output(name)?.ok_or_else(|| {
            JobError::new("InternalError", format!("step {name} has left no output"), "Please report this.")
        })
    }

    /// Asks a site to carry out an operation, again and again while it is away or busy, for as long as `patience`.
    pub async fn call<O: Operation + Clone + Send + 'static>(
        &self,
        provider: ProviderId,
        operation: O,
        patience: Patience,
    ) -> Result<O::Answer, SiteError> {
        call_patiently(self.control, provider, operation, patience, self).await
    }

    /// Asks a site once; gives up when nothing was heard of the operation for `silence_max`.
    pub(crate) async fn call_once<O: Operation>(
        &self,
        provider: ProviderId,
        operation: O,
        silence_max: Duration,
    ) -> Result<O::Answer, SiteError> {
        call_heard(&*self.control.sites.get(provider)?, operation, self, silence_max).await
    }
}

/// Asks a site to carry out an operation; see [`StepContext::call`].
pub(crate) async fn call_patiently<O: Operation + Clone + Send + 'static>(
    control: &Control,
    provider: ProviderId,
    operation: O,
    patience: Patience,
    progress: &dyn ProgressSink,
) -> Result<O::Answer, SiteError> {
    let mut retry = Retry::new(patience);
    loop {
        let result = match control.sites.get(provider) {
            Ok(site) => call_heard(&*site, operation.clone(), progress, SILENCE_MAX).await,
            Err(error) => Err(error),
        };
        match result {
            Err(error) if retry.pause(&error).await => {}
            result => return result,
        }
    }
}

/// How long an operation may say nothing before it counts as hung: reading the hashes of large disks over a slow line, and
/// merging them, take long and are silent.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(12 * 3600);

/// Passes progress on and remembers when there was some.
struct Heard<'a> {
    sink: &'a dyn ProgressSink,
    last: Mutex<tokio::time::Instant>,
}

impl Heard<'_> {
    fn last(&self) -> MutexGuard<'_, tokio::time::Instant> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ProgressSink for Heard<'_> {
    fn report(&self, progress: Progress) {
        *self.last() = tokio::time::Instant::now();
        self.sink.report(progress);
    }
}

/// Asks a site to carry out an operation, and gives up when nothing was heard of it for `silence_max`: the agent lives, but what
/// it waits for does not answer. The operation is cancelled then.
pub(crate) async fn call_heard<O: Operation>(
    site: &dyn mainstay_provider::Site,
    operation: O,
    sink: &dyn ProgressSink,
    silence_max: Duration,
) -> Result<O::Answer, SiteError> {
    let heard = Heard { sink, last: Mutex::new(tokio::time::Instant::now()) };
    let answer = call(site, operation, &heard);
    tokio::pin!(answer);
    loop {
        let silent_until = *heard.last() + silence_max;
        tokio::select! {
            biased;
            answer = &mut answer => return answer,
            () = tokio::time::sleep_until(silent_until) => {}
        }
        if *heard.last() + silence_max <= tokio::time::Instant::now() {
            let message = format!("the host has said nothing of this for {} s", silence_max.as_secs());
            let remedy = "See on the host whether its hypervisor answers (`virsh list`), and restart its daemon if not.";
            return Err(SiteError::new(ErrorKind::TimedOut, message).with_remedy(remedy));
        }
    }
}

/// Trying again while a site is away or busy.
pub(crate) struct Retry {
    deadline: tokio::time::Instant,
    delay: Duration,
}

impl Retry {
    pub(crate) fn new(patience: Patience) -> Self {
        Self { deadline: tokio::time::Instant::now() + patience.0, delay: RETRY_DELAY_MIN }
    }

    /// Waits a while and answers whether to try again after this error.
    pub(crate) async fn pause(&mut self, error: &SiteError) -> bool {
        if !matches!(error.kind, ErrorKind::Unavailable | ErrorKind::Busy)
            || tokio::time::Instant::now() + self.delay >= self.deadline
        {
            return false;
        }
        tracing::debug!(%error, "a site is away or busy; trying again");
        let jitter = rand::rng().random_range(0.5..1.0);
        tokio::time::sleep(self.delay.mul_f64(jitter)).await;
        self.delay = (self.delay * 2).min(RETRY_DELAY_MAX);
        true
    }
}

/// A lost connection is back after a tenth of a second when only a process was restarted.
const RETRY_DELAY_MIN: Duration = Duration::from_millis(100);
/// And looked for every five seconds at most when it takes longer.
const RETRY_DELAY_MAX: Duration = Duration::from_secs(5);

fn read<T: DeserializeOwned>(value: &Value, what: &str) -> Result<T, JobError> {
    T::deserialize(value).map_err(|error| {
        JobError::new(
            "InternalError",
            format!("{what} cannot be read by this version: {error}"),
            "If the server was downgraded, install the newer version again.",
        )
    })
}

impl From<crate::ControlError> for JobError {
    fn from(error: crate::ControlError) -> Self {
        match error {
            crate::ControlError::Site(error) => error.into(),
            crate::ControlError::Invalid { code, message, remedy } => Self::new(code, message, remedy),
            error @ crate::ControlError::NotFound { .. } => Self::new("NotFound", error.to_string(), ""),
            error @ (crate::ControlError::NotAllowed { .. } | crate::ControlError::Conflict(_)) => {
                Self::new("NotAllowed", error.to_string(), "Try again when the item is in another state.")
            }
            error @ crate::ControlError::Store(_) => Self::new(
                "StoreError",
                error.to_string(),
                "Check the recovery site's storage, then restart the job.",
            ),
            error @ crate::ControlError::Db(_) => {
                Self::new("DatabaseError", error.to_string(), "Check the server's data directory.")
            }
        }
    }
}
