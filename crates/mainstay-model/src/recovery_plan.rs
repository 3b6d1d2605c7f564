//! A recovery plan: machines in groups that run in order, with actions between them.
//!
//! A plan's job is a list of [`PlanTask`]s that follows from the plan and the operation alone ([`tasks`]); the machines' own
//! work is done by jobs of their own, which the tasks start and wait for.
//!
//! ```text
//!  failover   check ─ (shut down all: planned only) ─ [Shutdown, Failover actions] ─ { pre-actions ─ group ─ post-actions }… ─ finish
//!  failback   check ─ synchronize all ─ wait for a person ─ { pre-actions ─ group ─ post-actions }… ─ finish
//!  the rest   check ─ all machines at once ─ finish
//! ```

use serde::{Deserialize, Serialize};

use crate::{ItemId, Operation};

/// Most machines of a plan; Site Recovery's limit.
pub const MACHINES_MAX: usize = 100;
/// Most groups of machines of a plan; Site Recovery's limit.
pub const GROUPS_MAX: usize = 7;
/// Most actions on one side of a group.
pub const ACTIONS_MAX: usize = 20;

/// What a plan does, in which order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryPlan {
    /// Actions around the shutdown of all machines.
    pub shutdown: Actions,
    /// Actions around the failover as a whole.
    pub failover: Actions,
    /// Groups of machines, started in this order.
    pub groups: Vec<PlanGroup>,
}

/// Machines that run at the same time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanGroup {
    /// Its machines.
    pub items: Vec<ItemId>,
    /// What is done before and after.
    pub actions: Actions,
}

/// Actions around a group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actions {
    /// Before it, in this order.
    pub start: Vec<PlanAction>,
    /// After it, in this order.
    pub end: Vec<PlanAction>,
}

/// What a person or a program does between groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanAction {
    /// Its name, for people.
    pub name: String,
    /// In which kinds of failover it is done.
    pub failovers: Vec<FailoverKind>,
    /// In which directions it is done.
    pub directions: Vec<Direction>,
    /// What it is.
    pub kind: ActionKind,
}

/// What an action is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActionKind {
    /// The job waits until a person says that it is done.
    Manual {
        /// What the person is to do.
        instructions: String,
    },
    /// A program of the server's script directory is run.
    Script {
        /// Its file name.
        path: String,
        /// How long it may run, in seconds.
        timeout_seconds: u32,
        /// Whether it concerns the protected site; told to the script, which runs on the server either way.
        is_primary: bool,
    },
}

/// Kinds of failover, as actions are chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FailoverKind {
    /// A rehearsal.
    TestFailover,
    /// Without loss, in either direction.
    PlannedFailover,
    /// After a disaster.
    UnplannedFailover,
}

/// Directions of a failover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Direction {
    /// To the recovery site.
    PrimaryToRecovery,
    /// Home.
    RecoveryToPrimary,
}

impl Direction {
    /// Whether the text names this direction. "Secondary" is what the recovery site was called in older versions of the API.
    pub fn parse(text: &str) -> Option<Self> {
        match text.to_lowercase().as_str() {
            "primarytorecovery" | "primarytosecondary" => Some(Self::PrimaryToRecovery),
            "recoverytoprimary" | "secondarytoprimary" => Some(Self::RecoveryToPrimary),
            _ => None,
        }
    }
}

/// The side of a group that an action stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Side {
    /// Before it.
    Start,
    /// After it.
    End,
}

/// Where an action stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Place {
    /// At the shutdown of all machines.
    Shutdown,
    /// At the failover as a whole.
    Failover,
    /// At a group of machines.
    Group(usize),
}

/// A task of a plan's job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PlanTask {
    /// Find out what each machine needs; nothing is begun if one cannot.
    Check,
    /// Shut all machines down, the last group first.
    ShutDownAll,
    /// Begin all machines' failback, until each waits for its completion.
    SynchronizeAll,
    /// Wait for a person before the downtime begins.
    WaitForUser,
    /// Do an action.
    Action(Place, Side, usize),
    /// Run a group's machines.
    Group(usize),
    /// Run all machines at once.
    All,
    /// Say how it ended.
    Finish,
}

impl RecoveryPlan {
    /// All machines, in the order of their groups.
    pub fn items(&self) -> impl Iterator<Item = ItemId> + '_ {
        self.groups.iter().flat_map(|group| group.items.iter().copied())
    }

    /// The actions at a place.
    pub fn actions(&self, place: Place) -> Option<&Actions> {
        match place {
            Place::Shutdown => Some(&self.shutdown),
            Place::Failover => Some(&self.failover),
            Place::Group(index) => self.groups.get(index).map(|group| &group.actions),
        }
    }

    /// One action.
    pub fn action(&self, place: Place, side: Side, index: usize) -> Option<&PlanAction> {
        let actions = self.actions(place)?;
        match side {
            Side::Start => actions.start.get(index),
            Side::End => actions.end.get(index),
        }
    }

    /// Whether the plan can be carried out; the error says what is wrong with it.
    pub fn validate(&self) -> Result<(), String> {
        if self.groups.len() > GROUPS_MAX {
            return Err(format!(
                "the plan has {} groups of machines; {GROUPS_MAX} are possible",
                self.groups.len()
            ));
        }
        let mut seen = std::collections::HashSet::new();
        let count = self.items().count();
        if count == 0 {
            return Err("the plan has no machines".to_owned());
        }
        if count > MACHINES_MAX {
            return Err(format!("the plan has {count} machines; {MACHINES_MAX} are possible"));
        }
        if let Some(twice) = self.items().find(|item| !seen.insert(*item)) {
            return Err(format!("machine {twice} is in the plan twice"));
        }
        let places =
            [Place::Shutdown, Place::Failover].into_iter().chain((0..self.groups.len()).map(Place::Group));
        for actions in places.filter_map(|place| self.actions(place)) {
            if actions.start.len().max(actions.end.len()) > ACTIONS_MAX {
                return Err(format!("more than {ACTIONS_MAX} actions before or after a group"));
            }
            for action in actions.start.iter().chain(&actions.end) {
                action.validate()?;
            }
        }
        Ok(())
    }
}

impl PlanAction {
    fn validate(&self) -> Result<(), String> {
        if self.name.trim().is_empty() || self.name.len() > 200 {
            return Err("an action needs a name of at most 200 bytes".to_owned());
        }
        if self.failovers.is_empty() || self.directions.is_empty() {
            return Err(format!(
                "action '{}' is never done: it names no failover type or no direction",
                self.name
            ));
        }
        if let ActionKind::Script { path, timeout_seconds, .. } = &self.kind {
            let is_name = !path.is_empty()
                && path.len() <= 255
                && !path.starts_with('.')
                && !path.contains(['/', '\\', '\0']);
            if !is_name {
                return Err(format!(
                    "'{path}' of action '{}' is not the name of a file in the server's script directory",
                    self.name
                ));
            }
            if !(1..=SCRIPT_SECONDS_MAX).contains(timeout_seconds) {
                return Err(format!(
                    "the time-out of action '{}' is {timeout_seconds} s; 1 to {SCRIPT_SECONDS_MAX} are possible",
                    self.name
                ));
            }
        }
        Ok(())
    }

    fn applies(&self, operation: Operation) -> bool {
        kind_of(operation).is_some_and(|(kind, direction)| {
            self.failovers.contains(&kind) && self.directions.contains(&direction)
        })
    }
}

/// Longest run of a script, in seconds.
pub const SCRIPT_SECONDS_MAX: u32 = 86_400;

/// Which kind of failover, in which direction, an operation is; `None` if it is none.
pub fn kind_of(operation: Operation) -> Option<(FailoverKind, Direction)> {
    Some(match operation {
        Operation::TestFailover => (FailoverKind::TestFailover, Direction::PrimaryToRecovery),
        Operation::PlannedFailover => (FailoverKind::PlannedFailover, Direction::PrimaryToRecovery),
        Operation::UnplannedFailover => (FailoverKind::UnplannedFailover, Direction::PrimaryToRecovery),
        Operation::Failback => (FailoverKind::PlannedFailover, Direction::RecoveryToPrimary),
        _ => return None,
    })
}

/// The operations that a plan can carry out.
pub const OPERATIONS: [Operation; 7] = [
    Operation::TestFailover,
    Operation::TestFailoverCleanup,
    Operation::PlannedFailover,
    Operation::UnplannedFailover,
    Operation::Failback,
    Operation::Commit,
    Operation::ReverseReplicate,
];

/// The tasks of a plan's job, in order.
pub fn tasks(plan: &RecoveryPlan, operation: Operation) -> Vec<PlanTask> {
    let mut tasks = vec![PlanTask::Check];
    if kind_of(operation).is_none() {
        tasks.extend([PlanTask::All, PlanTask::Finish]);
        return tasks;
    }
    let add = |place: Place, side: Side, tasks: &mut Vec<PlanTask>| {
        let found = plan.actions(place).map(|actions| match side {
            Side::Start => &actions.start,
            Side::End => &actions.end,
        });
        for (index, action) in found.into_iter().flatten().enumerate() {
            if action.applies(operation) {
                tasks.push(PlanTask::Action(place, side, index));
            }
        }
    };
    if operation == Operation::Failback {
        tasks.extend([PlanTask::SynchronizeAll, PlanTask::WaitForUser]);
    }
    if operation != Operation::TestFailover {
        add(Place::Shutdown, Side::Start, &mut tasks);
        if operation == Operation::PlannedFailover {
            tasks.push(PlanTask::ShutDownAll);
        }
        add(Place::Shutdown, Side::End, &mut tasks);
    }
    add(Place::Failover, Side::Start, &mut tasks);
    for group in 0..plan.groups.len() {
        add(Place::Group(group), Side::Start, &mut tasks);
        tasks.push(PlanTask::Group(group));
        add(Place::Group(group), Side::End, &mut tasks);
    }
    add(Place::Failover, Side::End, &mut tasks);
    tasks.push(PlanTask::Finish);
    tasks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn action(name: &str, failovers: &[FailoverKind], directions: &[Direction]) -> PlanAction {
        PlanAction {
            name: name.to_owned(),
            failovers: failovers.to_vec(),
            directions: directions.to_vec(),
            kind: ActionKind::Manual { instructions: String::new() },
        }
    }

    fn plan() -> RecoveryPlan {
        let item = || ItemId(uuid::Uuid::new_v4());
        let mut plan = RecoveryPlan {
            groups: vec![
                PlanGroup { items: vec![item(), item()], ..PlanGroup::default() },
                PlanGroup { items: vec![item()], ..PlanGroup::default() },
            ],
            ..RecoveryPlan::default()
        };
        let both = [Direction::PrimaryToRecovery, Direction::RecoveryToPrimary];
        plan.groups[1].actions.start.push(action("never here", &[FailoverKind::PlannedFailover], &both[1..]));
        plan.groups[1].actions.start.push(action("dns", &[FailoverKind::UnplannedFailover], &both));
        plan.shutdown.start.push(action(
            "warn",
            &[FailoverKind::PlannedFailover, FailoverKind::TestFailover],
            &both,
        ));
        plan
    }

    #[test]
    fn groups_run_in_order_with_the_actions_that_apply() {
        use PlanTask::{Action, All, Check, Finish, Group, ShutDownAll, SynchronizeAll, WaitForUser};
        let plan = plan();
        assert_eq!(plan.validate(), Ok(()));
        let warn = Action(Place::Shutdown, Side::Start, 0);
        let dns = Action(Place::Group(1), Side::Start, 1);
        let of = |operation| tasks(&plan, operation);
        assert_eq!(of(Operation::TestFailover), [Check, Group(0), Group(1), Finish]);
        assert_eq!(of(Operation::UnplannedFailover), [Check, Group(0), dns, Group(1), Finish]);
        assert_eq!(of(Operation::PlannedFailover), [Check, warn, ShutDownAll, Group(0), Group(1), Finish]);
        let home = Action(Place::Group(1), Side::Start, 0);
        assert_eq!(
            of(Operation::Failback),
            [Check, SynchronizeAll, WaitForUser, warn, Group(0), home, Group(1), Finish]
        );
        assert_eq!(of(Operation::Commit), [Check, All, Finish]);
    }

    #[test]
    fn plans_that_cannot_be_carried_out_are_refused() {
        let refused = |change: &dyn Fn(&mut RecoveryPlan)| {
            let mut plan = plan();
            change(&mut plan);
            plan.validate().unwrap_err()
        };
        assert!(refused(&|plan| plan.groups.clear()).contains("no machines"));
        assert!(refused(&|plan| plan.groups[1].items = plan.groups[0].items.clone()).contains("twice"));
        assert!(refused(&|plan| plan.groups.resize(8, PlanGroup::default())).contains("8 groups"));
        assert!(refused(&|plan| plan.shutdown.start[0].directions.clear()).contains("never done"));
        assert!(refused(&|plan| plan.shutdown.start[0].name.clear()).contains("needs a name"));
        for path in ["", "../sh", "/bin/sh", "a/b", ".hidden"] {
            let script = ActionKind::Script { path: path.to_owned(), timeout_seconds: 60, is_primary: false };
            assert!(
                refused(&|plan| plan.shutdown.start[0].kind = script.clone()).contains("is not the name")
            );
        }
        let script = ActionKind::Script { path: "dns".to_owned(), timeout_seconds: 0, is_primary: false };
        assert!(refused(&|plan| plan.shutdown.start[0].kind = script.clone()).contains("time-out"));
    }
}
