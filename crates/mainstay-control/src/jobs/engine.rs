//! The engine: runs jobs step by step, as their logs say.
//!
//! Guarantees: (1) a step is written down before it begins and after it ended, together with what it changes in
//! the item; (2) after a crash every job goes on where its log says; (3) a job ends Succeeded, or undone as Failed
//! or Cancelled, or Stuck, which a person sees and can restart; (4) an item belongs to at most one job.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use mainstay_model::{
    Ending, Event, Health, ItemId, JobId, JobLog, Next, Operation, Outcome, RecoveryPlan, Running, StepPlan,
    StepState, projection,
};
use mainstay_provider::Progress;
use serde_json::Value;
use tokio::sync::Notify;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use super::{Done, ItemChange, Step, StepContext, Task, Undone};
use crate::{
    Control, ControlError,
    app::RecoveryPlanRecord,
    caught,
    db::{ItemRecord, JobError, JobRecord, JobState, StepRecord},
    workflows,
};

/// The job engine. Jobs run as tasks of the process; the database is what they are.
#[derive(Default)]
pub struct Engine {
    active: Mutex<HashMap<JobId, Arc<Active>>>,
    tasks: TaskTracker,
    stopping: CancellationToken,
    faults: Mutex<Option<Arc<dyn Faults>>>,
    ended: Notify,
    /// Held by whoever starts a job in a task of its own; who waits for it alone knows that no start is half done.
    starting: Arc<tokio::sync::RwLock<()>>,
}

struct Active {
    cancel: CancellationToken,
    woken: Notify,
    progress: Mutex<Progress>,
}

/// What a test makes happen around a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// The step is done twice.
    Repeat,
    /// The step reports failure after having been done.
    FailAfter,
    /// The process dies after the step was done and before that was written down.
    StopAfter,
    /// Somebody cancels the job while the step is being done.
    Cancel,
    /// Somebody cancels the job after the step was chosen and before it is written down as begun.
    CancelBefore,
}

/// Decides about faults; only tests install one.
pub trait Faults: Send + Sync {
    /// Asked before each step and each undo.
    fn fault(&self, job: &JobRecord, step: usize, is_undo: bool) -> Fault;
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// First pause before a job is taken up again whose state could not be written; doubles up to the longest.
const WRITE_PAUSE_MIN: Duration = Duration::from_millis(500);
/// Longest pause.
const WRITE_PAUSE_MAX: Duration = Duration::from_secs(15);
/// How often a job is tried again after errors that should not pass.
const RUNS_MAX: u32 = 3;

/// What a request for a job says.
pub struct JobRequest {
    /// What to do.
    pub operation: Operation,
    /// The workflow's parameters.
    pub params: Value,
    /// Who asks.
    pub requested_by: String,
}

impl Engine {
    /// Installs faults, for tests.
    pub fn set_faults(&self, faults: Option<Arc<dyn Faults>>) {
        *lock(&self.faults) = faults;
    }

    /// Progress of the step that a job is at.
    pub fn progress(&self, job: JobId) -> Option<Progress> {
        lock(&self.active).get(&job).map(|active| lock(&active.progress).clone())
    }

    /// Whether a job is being carried out by this process.
    pub fn is_active(&self, job: JobId) -> bool {
        lock(&self.active).contains_key(&job)
    }

    /// Waits until no job is being carried out by this process (suspended ones count as carried out).
    pub async fn wait_until_ended(&self, job: JobId) {
        loop {
            let ended = self.ended.notified();
            if !self.is_active(job) {
                return;
            }
            ended.await;
        }
    }

    /// Stops all jobs where they are, as a crash would but orderly; [`Control::resume_jobs`] of the next process
    /// goes on.
    pub async fn stop(&self) {
        self.stopping.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl Control {
    /// Accepts a job: asks the model, writes the item and the job, starts the work. `prepare` may change the item
    /// within the same transaction.
    pub async fn start_job(
        self: &Arc<Self>,
        item: ItemId,
        request: JobRequest,
    ) -> Result<JobRecord, ControlError> {
        self.start_job_as(JobId(Uuid::now_v7()), item, request).await
    }

    /// The same with an identifier that the caller knows beforehand; a job that exists already is answered as it is.
    pub(crate) async fn start_job_as(
        self: &Arc<Self>,
        id: JobId,
        item: ItemId,
        request: JobRequest,
    ) -> Result<JobRecord, ControlError> {
        let mut transaction = self.db.begin().await?;
        if let Some(job) = transaction.job(id).await? {
            return Ok(job);
        }
        let mut record = transaction
            .item(item)
            .await?
            .ok_or_else(|| ControlError::not_found("replicated item", item.to_string()))?;
        let job = self.new_job(id, &record, request);
        begin(&mut record, &job)?;
        transaction.update_item(&record).await?;
        transaction.put_job(&job).await?;
        transaction.commit().await?;
        self.launch(job.id);
        Ok(job)
    }

    /// Accepts the job that creates an item: both are written together.
    pub async fn start_first_job(
        self: &Arc<Self>,
        mut record: ItemRecord,
        request: JobRequest,
    ) -> Result<JobRecord, ControlError> {
        let job = self.new_job(JobId(Uuid::now_v7()), &record, request);
        begin(&mut record, &job)?;
        let mut transaction = self.db.begin().await?;
        transaction.insert_item(&record).await?;
        transaction.put_job(&job).await?;
        transaction.commit().await?;
        self.launch(job.id);
        Ok(job)
    }

    /// As [`Self::start_job_as`], and never half: who asks may be cancelled at any moment, and the job would be written and not
    /// launched.
    pub(crate) async fn start_job_whole(
        self: &Arc<Self>,
        id: JobId,
        item: ItemId,
        request: JobRequest,
    ) -> Result<JobRecord, ControlError> {
        let starting = Arc::clone(&self.engine.starting).read_owned().await;
        let control = Arc::clone(self);
        let start = tokio::spawn(async move {
            let started = control.start_job_as(id, item, request).await;
            drop(starting);
            started
        });
        start
            .await
            .map_err(|error| ControlError::Conflict(format!("job {id} could not be started: {error}")))?
    }

    /// Waits until no job is half started.
    pub(crate) async fn wait_until_started(&self) {
        drop(self.engine.starting.write().await);
    }

    /// Accepts a job of a recovery plan, which carries out one at a time.
    pub(crate) async fn start_plan_job(
        self: &Arc<Self>,
        plan: &str,
        request: JobRequest,
    ) -> Result<JobRecord, ControlError> {
        let mut transaction = self.db.begin().await?;
        let mut record = transaction
            .resource::<RecoveryPlanRecord>(plan)
            .await?
            .ok_or_else(|| ControlError::not_found("recovery plan", plan))?;
        if let Some(running) = record.running {
            return Err(ControlError::NotAllowed {
                reason: format!("recovery plan '{}' is being carried out (job {running})", record.name),
                allowed: Vec::new(),
            });
        }
        let job = self.new_job_of(
            JobId(Uuid::now_v7()),
            Subject {
                item: ItemId(Uuid::nil()),
                item_name: record.name.clone(),
                vm_name: record.name.clone(),
                fabric: record.fabric.clone(),
                plan: Some(Box::new(record.plan.clone())),
            },
            request,
        );
        record.running = Some(job.id);
        record.last_job = Some(job.id);
        transaction.put_resource(&record).await?;
        transaction.put_job(&job).await?;
        transaction.commit().await?;
        self.launch(job.id);
        Ok(job)
    }

    fn new_job(&self, id: JobId, item: &ItemRecord, request: JobRequest) -> JobRecord {
        let subject = Subject {
            item: item.id,
            item_name: item.name.clone(),
            vm_name: item.vm_name.clone(),
            fabric: item.fabric.clone(),
            plan: None,
        };
        self.new_job_of(id, subject, request)
    }

    fn new_job_of(&self, id: JobId, subject: Subject, request: JobRequest) -> JobRecord {
        let steps = workflows::steps(request.operation, subject.plan.as_deref())
            .iter()
            .map(|step| StepRecord {
                name: step.task.name.to_string(),
                state: StepState::NotStarted,
                started_ms: None,
                ended_ms: None,
                attempts: 0,
                output: Value::Null,
                errors: Vec::new(),
                progress: Progress::default(),
            })
            .collect();
        JobRecord {
            id,
            operation: request.operation,
            item: subject.item,
            item_name: subject.item_name,
            vm_name: subject.vm_name,
            plan: subject.plan,
            fabric: subject.fabric,
            params: request.params,
            requested_by: request.requested_by,
            state: JobState::InProgress,
            is_cancel_requested: false,
            created_ms: self.clock.now_ms(),
            ended_ms: None,
            steps,
        }
    }

    /// Goes on with every job that is not over, after a start of the process.
    pub async fn resume_jobs(self: &Arc<Self>) -> Result<usize, ControlError> {
        let open = self.db.open_jobs().await?;
        for job in &open {
            tracing::info!(job = %job.id, operation = ?job.operation, item = job.item_name, "going on with a job");
            self.launch(job.id);
        }
        Ok(open.len())
    }

    /// Asks to cancel a job.
    pub async fn cancel_job(self: &Arc<Self>, id: JobId) -> Result<JobRecord, ControlError> {
        let job = self
            .change_job(id, |job| {
                job_log(job).check_cancel().map_err(|reason| not_allowed(job, reason))?;
                job.is_cancel_requested = true;
                job.state = JobState::Cancelling;
                Ok(())
            })
            .await?;
        if let Some(active) = lock(&self.engine.active).get(&id) {
            active.cancel.cancel();
            active.woken.notify_one();
        }
        Ok(job)
    }

    /// Continues a job that waits for a person.
    pub async fn resume_job(self: &Arc<Self>, id: JobId) -> Result<JobRecord, ControlError> {
        let now_ms = self.clock.now_ms();
        let job = self
            .change_job(id, |job| {
                let Next::Wait(step) = job_log(job).next() else {
                    return Err(not_allowed(job, "the job does not wait for anybody"));
                };
                job.steps[step].state = StepState::Succeeded;
                job.steps[step].ended_ms = Some(now_ms);
                job.state = JobState::InProgress;
                Ok(())
            })
            .await?;
        match lock(&self.engine.active).get(&id) {
            Some(active) => active.woken.notify_one(),
            None => {
                return Err(ControlError::Conflict(format!(
                    "job {id} is not being carried out by this server"
                )));
            }
        }
        Ok(job)
    }

    /// Tries a stuck job again.
    pub async fn restart_job(self: &Arc<Self>, id: JobId) -> Result<JobRecord, ControlError> {
        let job = self
            .change_job(id, |job| {
                if job.state != JobState::Ended(Ending::Stuck) {
                    return Err(not_allowed(job, "only a stuck job can be restarted"));
                }
                let mut log = job_log(job);
                log.restart();
                for (step, (_, state)) in job.steps.iter_mut().zip(log.steps) {
                    step.state = state;
                }
                job.state = JobState::InProgress;
                job.ended_ms = None;
                Ok(())
            })
            .await?;
        // The stuck run has written its end and may not have left the table yet.
        self.engine.wait_until_ended(id).await;
        self.launch(id);
        Ok(job)
    }

    async fn change_job(
        &self,
        id: JobId,
        change: impl FnOnce(&mut JobRecord) -> Result<(), ControlError> + Send,
    ) -> Result<JobRecord, ControlError> {
        let mut transaction = self.db.begin().await?;
        let mut job =
            transaction.job(id).await?.ok_or_else(|| ControlError::not_found("job", id.to_string()))?;
        change(&mut job)?;
        transaction.put_job(&job).await?;
        transaction.commit().await?;
        Ok(job)
    }

    fn launch(self: &Arc<Self>, id: JobId) {
        let active = Arc::new(Active {
            cancel: CancellationToken::new(),
            woken: Notify::new(),
            progress: Mutex::new(Progress::default()),
        });
        match lock(&self.engine.active).entry(id) {
            Entry::Occupied(_) => {
                tracing::error!(job = %id, "a job was launched twice; the first run goes on alone");
                return;
            }
            Entry::Vacant(entry) => entry.insert(active.clone()),
        };
        let control = self.clone();
        self.engine.tasks.spawn(async move {
            tokio::select! {
                () = control.carry_out(id, &active) => {}
                () = control.engine.stopping.cancelled() => {}
            }
            lock(&control.engine.active).remove(&id);
            control.engine.ended.notify_waiters();
            control.changed.notify_waiters();
        });
    }

    /// Runs a job to its end. What it has done cannot always be written down at once: the database may be away, or its disk
    /// full. What cannot pass, an error of our own, is for a person to look at.
    async fn carry_out(self: &Arc<Self>, id: JobId, active: &Active) {
        let mut hopeless: Option<JobError> = None;
        let (mut failures, mut pause) = (0, WRITE_PAUSE_MIN);
        loop {
            let run = async {
                match &hopeless {
                    None => self.run_job(id, active).await,
                    Some(reason) => self.give_up(id, reason).await,
                }
            };
            match caught(run).await {
                Ok(Ok(())) | Ok(Err(ControlError::NotFound { .. })) => return,
                Ok(Err(_)) if self.catalogue.is_superseded() => return,
                Ok(Err(error @ (ControlError::Db(_) | ControlError::Conflict(_)))) => {
                    tracing::error!(job = %id, %error, "what a job does cannot be written down; trying on");
                }
                Ok(Err(error)) => {
                    tracing::error!(job = %id, %error, "a job cannot be carried on");
                    failures += 1;
                    if failures >= RUNS_MAX {
                        hopeless.get_or_insert_with(|| error.into());
                    }
                }
                Err(panic) => {
                    tracing::error!(job = %id, panic, "a job was broken off by an error of the server");
                    hopeless.get_or_insert_with(|| {
                        JobError::new(
                            "InternalError",
                            format!("the server made a mistake: {panic}"),
                            "Restart the job, and please report this with the server's log.",
                        )
                    });
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(WRITE_PAUSE_MAX);
        }
    }

    /// Ends a job that only a person can help, and says why.
    async fn give_up(self: &Arc<Self>, id: JobId, reason: &JobError) -> Result<(), ControlError> {
        self.change_job(id, |job| {
            let is_open = |step: &&mut StepRecord| {
                !matches!(step.state, StepState::Succeeded | StepState::Skipped | StepState::Undone)
            };
            if let Some(step) = job.steps.iter_mut().find(is_open)
                && step.errors.last() != Some(reason)
            {
                step.errors.push(reason.clone());
            }
            Ok(())
        })
        .await?;
        self.end_job(id, Ending::Stuck).await
    }

    async fn run_job(self: &Arc<Self>, id: JobId, active: &Active) -> Result<(), ControlError> {
        loop {
            let job = self.db.job(id).await?.ok_or_else(|| ControlError::not_found("job", id.to_string()))?;
            let steps = self.workflow_steps(&job);
            match job_log_of(&job, &steps).next() {
                Next::Run(index) => {
                    if self.run_step(job, &steps[index], index, active).await?.is_break() {
                        return Ok(());
                    }
                }
                Next::Undo(index) => {
                    if self.undo_step(job, &steps[index], index, active).await?.is_break() {
                        return Ok(());
                    }
                }
                Next::Wait(_) => {
                    if job.state != JobState::Suspended {
                        self.change_job(id, |job| {
                            if matches!(job_log(job).next(), Next::Wait(_)) {
                                job.state = JobState::Suspended;
                            }
                            Ok(())
                        })
                        .await?;
                        self.changed.notify_waiters();
                    }
                    active.woken.notified().await;
                }
                Next::End(ending) => return self.end_job(id, ending).await,
            }
        }
    }

    /// The steps of a job's workflow. They depend on the phase that the item had when the job began, which is the phase
    /// it has still: phases move when jobs end.
    fn workflow_steps(&self, job: &JobRecord) -> Vec<Step> {
        workflows::steps(job.operation, job.plan.as_deref())
    }

    async fn run_step(
        self: &Arc<Self>,
        job: JobRecord,
        step: &Step,
        index: usize,
        active: &Active,
    ) -> Result<std::ops::ControlFlow<()>, ControlError> {
        let now_ms = self.clock.now_ms();
        let fault = self.fault(&job, index, false);
        if fault == Fault::CancelBefore {
            // A refusal is what the test looks for at steps beyond the point of no return.
            let _ = self.cancel_job(job.id).await;
        }
        let job = self
            .change_job(job.id, |job| {
                // Cancelled since the step was chosen: it must not begin, least of all if there is no way back from it.
                if job.is_cancel_requested && !job_log(job).is_past_return() {
                    return Ok(());
                }
                let entry = &mut job.steps[index];
                entry.state = StepState::Started;
                entry.started_ms.get_or_insert(now_ms);
                entry.attempts += 1;
                Ok(())
            })
            .await?;
        if job.is_cancel_requested && !job_log(&job).is_past_return() {
            return Ok(std::ops::ControlFlow::Continue(()));
        }
        self.write_ahead(&job).await?;
        *lock(&active.progress) = Progress::default();
        let context = StepContext {
            control: self,
            job: &job,
            index,
            cancel: &active.cancel,
            progress: &active.progress,
        };
        tracing::info!(job = %job.id, item = job.item_name, step = %step.task.name, "step begins");
        let action = async {
            if fault == Fault::Repeat {
                step.action.run(&context).await?;
            }
            if fault == Fault::Cancel {
                // A refusal is what the test looks for at steps beyond the point of no return.
                let _ = self.cancel_job(job.id).await;
            }
            step.action.run(&context).await
        };
        let result = if step.is_point_of_no_return || job_log(&job).is_past_return() {
            action.await
        } else {
            tokio::select! {
                // Cancelling first: a step that is ready in the same moment is undone like any other.
                biased;
                () = active.cancel.cancelled() => return Ok(std::ops::ControlFlow::Continue(())),
                result = action => result,
            }
        };
        let result = match fault {
            Fault::StopAfter => return Ok(std::ops::ControlFlow::Break(())),
            Fault::FailAfter => {
                result.and(Err(JobError::new("InjectedFault", "the test failed this step", "")))
            }
            _ => result,
        };
        let progress = lock(&active.progress).clone();
        self.write_step(job.id, index, |entry, now_ms| {
            entry.progress = progress;
            match result {
                Ok(done) if done.is_waiting => {
                    entry.state = StepState::Waiting;
                    (false, None)
                }
                Ok(Done { output, is_skipped, warnings, fences, change, .. }) => {
                    entry.state = if is_skipped { StepState::Skipped } else { StepState::Succeeded };
                    entry.ended_ms = Some(now_ms);
                    entry.output = output;
                    entry.errors = warnings;
                    (fences, change)
                }
                Err(error) => {
                    tracing::warn!(step = entry.name, code = error.code, "step failed: {}", error.message);
                    entry.state = StepState::Failed;
                    entry.ended_ms = Some(now_ms);
                    entry.errors.push(error);
                    (false, None)
                }
            }
        })
        .await?;
        Ok(std::ops::ControlFlow::Continue(()))
    }

    async fn undo_step(
        self: &Arc<Self>,
        job: JobRecord,
        step: &Step,
        index: usize,
        active: &Active,
    ) -> Result<std::ops::ControlFlow<()>, ControlError> {
        let job = self
            .change_job(job.id, |job| {
                job.steps[index].state = StepState::UndoStarted;
                job.state = JobState::Cancelling;
                Ok(())
            })
            .await?;
        self.write_ahead(&job).await?;
        *lock(&active.progress) = Progress::default();
        let never = CancellationToken::new();
        let context =
            StepContext { control: self, job: &job, index, cancel: &never, progress: &active.progress };
        let fault = self.fault(&job, index, true);
        tracing::info!(job = %job.id, item = job.item_name, step = %step.task.name, "step is undone");
        let result = async {
            if fault == Fault::Repeat {
                step.action.undo(&context).await?;
            }
            step.action.undo(&context).await
        }
        .await;
        let result = match fault {
            Fault::StopAfter => return Ok(std::ops::ControlFlow::Break(())),
            Fault::FailAfter => {
                result.and(Err(JobError::new("InjectedFault", "the test failed this undo", "")))
            }
            _ => result,
        };
        self.write_step(job.id, index, |entry, now_ms| match result {
            Ok(Undone { fences, change }) => {
                entry.state = StepState::Undone;
                entry.ended_ms = Some(now_ms);
                (fences, change)
            }
            Err(error) => {
                tracing::error!(step = entry.name, code = error.code, "undo failed: {}", error.message);
                entry.state = StepState::UndoFailed;
                entry.errors.push(error);
                (false, None)
            }
        })
        .await?;
        Ok(std::ops::ControlFlow::Continue(()))
    }

    /// Has the store know what a job is about to do, before it does it. A store that takes no writes does not keep a job from
    /// going on: only together with the loss of the database would that be missed.
    async fn write_ahead(&self, job: &JobRecord) -> Result<(), ControlError> {
        match self.catalogue_ahead(job).await {
            Err(error) if !self.catalogue.is_superseded() => {
                tracing::warn!(job = %job.id, item = job.item_name, %error, "a step is not in the store's catalogue");
                Ok(())
            }
            result => result,
        }
    }

    fn fault(&self, job: &JobRecord, step: usize, is_undo: bool) -> Fault {
        lock(&self.engine.faults).as_ref().map_or(Fault::None, |faults| faults.fault(job, step, is_undo))
    }

    /// Writes a step's entry and what it changes in the item, in one transaction.
    async fn write_step(
        &self,
        id: JobId,
        index: usize,
        write: impl FnOnce(&mut StepRecord, i64) -> (bool, Option<ItemChange>) + Send,
    ) -> Result<(), ControlError> {
        let now_ms = self.clock.now_ms();
        let mut transaction = self.db.begin().await?;
        let mut job =
            transaction.job(id).await?.ok_or_else(|| ControlError::not_found("job", id.to_string()))?;
        let (fences, change) = write(&mut job.steps[index], now_ms);
        if (fences || change.is_some())
            && let Some(mut item) = transaction.item(job.item).await?
        {
            if let Some(change) = change {
                change(&mut item);
            }
            if fences && let Outcome::State(state) = item.state.apply(Event::Fence(id))? {
                item.state = state;
            }
            transaction.update_item(&item).await?;
        }
        transaction.put_job(&job).await?;
        transaction.commit().await?;
        self.changed.notify_waiters();
        Ok(())
    }

    async fn end_job(self: &Arc<Self>, id: JobId, ending: Ending) -> Result<(), ControlError> {
        let now_ms = self.clock.now_ms();
        let mut transaction = self.db.begin().await?;
        let mut job =
            transaction.job(id).await?.ok_or_else(|| ControlError::not_found("job", id.to_string()))?;
        job.state = JobState::Ended(ending);
        job.ended_ms = Some(now_ms);
        let event = match ending {
            Ending::Succeeded => Some(Event::Succeed(id)),
            Ending::Failed | Ending::Cancelled => Some(Event::Abandon(id)),
            // The item stays with the job until a person has looked.
            Ending::Stuck => None,
        };
        if let (Some(event), Some(mut item)) = (event, transaction.item(job.item).await?) {
            match item.state.apply(event)? {
                Outcome::Removed => transaction.remove_item(item.id).await?,
                Outcome::State(state) => {
                    item.state = state;
                    workflows::note_ending(&mut item, job.operation, ending, now_ms);
                    transaction.update_item(&item).await?;
                }
            }
        }
        // A plan whose job is stuck stays with it, as an item would.
        if event.is_some()
            && job.plan.is_some()
            && let Some(mut plan) = transaction.resource::<RecoveryPlanRecord>(&job.item_name).await?
        {
            plan.note_ending(job.operation, ending, now_ms);
            transaction.put_resource(&plan).await?;
        }
        transaction.put_job(&job).await?;
        let (severity, word) = match ending {
            Ending::Succeeded => (Health::Normal, "Succeeded"),
            Ending::Failed => (Health::Warning, "Failed"),
            Ending::Cancelled => (Health::Warning, "Cancelled"),
            Ending::Stuck => (Health::Critical, "Stuck"),
        };
        let errors: Vec<_> =
            job.steps.iter().flat_map(|step| &step.errors).map(|error| error.message.as_str()).collect();
        let mut description = format!("{} - {word}", projection::scenario_name(job.operation));
        if !errors.is_empty() {
            description = format!("{description}: {}", errors.join("; "));
        }
        let event =
            self.event("JobStatus", word, severity, description, job.vm_name.clone(), job.fabric.clone());
        transaction.add_event(&event).await?;
        transaction.commit().await?;
        metrics::counter!("mainstay_jobs_ended", "operation" => format!("{:?}", job.operation), "ending" => word).increment(1);
        tracing::info!(job = %id, operation = ?job.operation, item = job.item_name, ?ending, "job ended");
        Ok(())
    }
}

/// What a job is about.
struct Subject {
    item: ItemId,
    item_name: String,
    vm_name: String,
    fabric: String,
    plan: Option<Box<RecoveryPlan>>,
}

fn begin(item: &mut ItemRecord, job: &JobRecord) -> Result<(), ControlError> {
    let running = Running { operation: job.operation, job: job.id };
    if let Outcome::State(state) = item.state.apply(Event::Begin(running))? {
        item.state = state;
    }
    Ok(())
}

fn not_allowed(job: &JobRecord, reason: &str) -> ControlError {
    ControlError::NotAllowed { reason: format!("job {}: {reason}", job.id), allowed: Vec::new() }
}

/// The tasks of a job, in the order of its step log.
pub fn tasks(job: &JobRecord) -> Vec<Task> {
    workflows::steps(job.operation, job.plan.as_deref()).into_iter().map(|step| step.task).collect()
}

/// The pure log of a job.
pub fn job_log(job: &JobRecord) -> JobLog {
    let steps = workflows::steps(job.operation, job.plan.as_deref());
    job_log_of(job, &steps)
}

fn job_log_of(job: &JobRecord, steps: &[Step]) -> JobLog {
    let steps = steps
        .iter()
        .zip(&job.steps)
        .map(|(step, entry)| (StepPlan { is_point_of_no_return: step.is_point_of_no_return }, entry.state))
        .collect();
    JobLog { steps, is_cancel_requested: job.is_cancel_requested }
}
