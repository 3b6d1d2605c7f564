//! How an item's state is told to clients of the Site Recovery API: names and texts as recorded there.
//! Where the record is silent the name is our choice; such lines say so.

use crate::{ConfigurationChange, ItemState, Location, Operation, Phase, TestFailoverState};

/// `protectionState` and `protectionStateDescription`.
pub fn protection_state(state: &ItemState) -> (&'static str, &'static str) {
    match state.phase {
        Phase::EnablingProtection => ("EnablingProtection", "Enabling protection"),
        Phase::InitialReplication => ("InitialReplicationInProgress", "Initial replication is in progress"),
        Phase::FinalizingProtection => {
            ("InitialReplicationRecoveryCompletionPending", "Waiting for first recovery point")
        }
        Phase::Protected if state.test_failover == TestFailoverState::WaitingForCleanup => {
            ("Protected", "Cleanup test failover pending")
        }
        Phase::Protected => ("Protected", "Protected"),
        Phase::UnplannedFailoverCommitPending => {
            ("UnplannedFailoverCommitPendingStatesBegin", "Failover completed")
        }
        Phase::PlannedFailoverCommitPending => ("PlannedFailoverCommitRequired", "Planned failover finished"),
        // The record has this name for a failover between two Azure regions only.
        Phase::UnplannedFailoverCommitted => ("UnplannedFailoverCommitted", "Failover committed"),
        Phase::PlannedFailoverCommitted => ("PlannedFailoverStatesBegin", "Planned failover committed"),
        // Not recorded: told apart from a failover by the active location, which is Primary.
        Phase::FailbackCommitPending => ("PlannedFailoverCommitRequired", "Planned failover finished"),
        Phase::FailbackCommitted => ("RestoreFinalized", "Failback finalized"),
    }
}

/// `vmProtectionState` and its description.
pub fn vm_protection_state(state: &ItemState) -> (&'static str, &'static str) {
    match state.phase {
        Phase::EnablingProtection | Phase::InitialReplication => {
            ("UnprotectedStatesBegin", "Enabling protection")
        }
        Phase::FinalizingProtection => ("ReplicaConfigurationInProgress", "Configuring the replica"),
        _ => protection_state(state),
    }
}

/// `testFailoverState` and its description.
pub fn test_failover_state(state: TestFailoverState) -> (&'static str, &'static str) {
    match state {
        TestFailoverState::None => ("None", "None"),
        TestFailoverState::WaitingForCleanup => ("WaitingForCompletion", "Waiting for user input"),
        // This value stays after the clean-up has finished, as recorded.
        TestFailoverState::CleanedUp => ("MarkedForDeletion", "Cleaning up test environment"),
    }
}

/// `activeLocation`.
pub fn active_location(location: Location) -> &'static str {
    match location {
        Location::Primary => "Primary",
        Location::Recovery => "Recovery",
    }
}

/// `allowedOperations`: Site Recovery's names for those operations that it has a name for.
pub fn allowed_operations(state: &ItemState) -> Vec<&'static str> {
    state.allowed_operations().into_iter().filter_map(operation_name).collect()
}

/// Site Recovery's name of an operation, as in `allowedOperations`.
pub fn operation_name(operation: Operation) -> Option<&'static str> {
    Some(match operation {
        Operation::TestFailover => "TestFailover",
        Operation::TestFailoverCleanup => "TestFailoverCleanup",
        Operation::UnplannedFailover => "UnplannedFailover",
        Operation::PlannedFailover => "PlannedFailover",
        Operation::ChangeRecoveryPoint => "ChangePit",
        Operation::Commit => "Commit",
        Operation::Failback => "Failback",
        Operation::ReverseReplicate => "ReverseReplicate",
        Operation::Resynchronize => "RepairReplication",
        Operation::DisableProtection => "DisableProtection",
        Operation::EnableProtection | Operation::FinalizeProtection | Operation::UpdateProperties => {
            return None;
        }
    })
}

/// `scenarioName` of the job that carries an operation out.
pub fn scenario_name(operation: Operation) -> &'static str {
    match operation {
        Operation::EnableProtection => "EnableDr",
        Operation::FinalizeProtection => "IrCompletion",
        Operation::TestFailover => "TestFailover",
        Operation::TestFailoverCleanup => "TestFailoverCleanup",
        Operation::UnplannedFailover => "UnplannedFailover",
        Operation::PlannedFailover => "PlannedFailover",
        Operation::ChangeRecoveryPoint => "ApplyRecoveryPoint",
        Operation::Commit => "CommitFailover",
        Operation::Failback => "Failback",
        Operation::ReverseReplicate => "ReprotectReplicationGroup",
        Operation::Resynchronize => "RepairReplication",
        Operation::UpdateProperties => "UpdateVmProperties",
        Operation::DisableProtection => "DisableDr",
    }
}

/// `friendlyName` of the job that carries an operation out.
pub fn friendly_name(operation: Operation) -> &'static str {
    match operation {
        Operation::EnableProtection => "Enable replication",
        Operation::FinalizeProtection => "Finalize protection on the virtual machine",
        Operation::TestFailover => "Test failover",
        Operation::TestFailoverCleanup => "Test failover cleanup",
        Operation::UnplannedFailover => "Failover",
        Operation::PlannedFailover | Operation::Failback => "Planned failover",
        Operation::ChangeRecoveryPoint => "Change recovery point",
        Operation::Commit => "Commit",
        Operation::ReverseReplicate => "Reverse replication",
        Operation::Resynchronize => "Resynchronize",
        Operation::UpdateProperties => "Update the virtual machine",
        Operation::DisableProtection => "Disable replication",
    }
}

/// How a change of configuration is told as a job: `scenarioName`, `friendlyName`, `targetInstanceType`. Only those of
/// creating policies and sites are recorded; the others are our choice, in their manner.
pub fn configuration_job(change: ConfigurationChange) -> (&'static str, &'static str, &'static str) {
    match change {
        ConfigurationChange::CreatePolicy => {
            ("AddProtectionProfile", "Create replication policy", "ProtectionProfile")
        }
        ConfigurationChange::UpdatePolicy => {
            ("UpdateProtectionProfile", "Edit replication policy", "ProtectionProfile")
        }
        ConfigurationChange::DeletePolicy => {
            ("RemoveProtectionProfile", "Delete replication policy", "ProtectionProfile")
        }
        ConfigurationChange::CreateFabric => ("CreateSite", "Create a site", "Server"),
        ConfigurationChange::DeleteFabric => ("DeleteSite", "Delete a site", "Server"),
        ConfigurationChange::AssociatePolicy => {
            ("AssociateProtectionProfile", "Associate replication policy", "ProtectionProfile")
        }
        ConfigurationChange::DissociatePolicy => {
            ("DissociateProtectionProfile", "Dissociate replication policy", "ProtectionProfile")
        }
        ConfigurationChange::RefreshProvider => ("RefreshDra", "Refresh server", "Server"),
        ConfigurationChange::RemoveProvider => ("UnregisterDra", "Delete server", "Server"),
        ConfigurationChange::DiscoverProtectableItem => {
            ("DiscoverProtectableItem", "Discover virtual machines", "Server")
        }
        ConfigurationChange::CheckConsistency => ("CheckConsistency", "Check consistency", "Server"),
        ConfigurationChange::CreateRecoveryPlan => {
            ("CreateRecoveryPlan", "Create a recovery plan", "RecoveryPlan")
        }
        ConfigurationChange::UpdateRecoveryPlan => {
            ("UpdateRecoveryPlan", "Save a recovery plan", "RecoveryPlan")
        }
        ConfigurationChange::DeleteRecoveryPlan => {
            ("DeleteRecoveryPlan", "Delete a recovery plan", "RecoveryPlan")
        }
        ConfigurationChange::RefreshVaultHealth => ("RefreshVaultHealth", "Refresh vault health", "Other"),
        // Recorded.
        ConfigurationChange::ExportJobs => ("ExportJobs", "Export jobs", "Other"),
        ConfigurationChange::MapNetwork => ("MapNetwork", "Map a network", "Other"),
        ConfigurationChange::UnmapNetwork => ("UnmapNetwork", "Remove a network mapping", "Other"),
        ConfigurationChange::ResolveHealthErrors => {
            ("ResolveHealthErrors", "Resolve health errors", "ProtectionEntity")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recorded_states_allow_what_was_recorded() {
        let at = |phase| ItemState { phase, ..ItemState::new() };
        let allowed = |phase| {
            let mut names = allowed_operations(&at(phase));
            names.sort_unstable();
            names
        };
        assert_eq!(allowed(Phase::InitialReplication), ["DisableProtection", "RepairReplication"]);
        assert_eq!(
            allowed(Phase::Protected),
            [
                "DisableProtection",
                "PlannedFailover",
                "RepairReplication",
                "TestFailover",
                "UnplannedFailover"
            ]
        );
        assert_eq!(
            allowed(Phase::PlannedFailoverCommitPending),
            ["ChangePit", "Commit", "DisableProtection"]
        );
        assert_eq!(allowed(Phase::PlannedFailoverCommitted), ["DisableProtection", "Failback"]);
        assert_eq!(allowed(Phase::FailbackCommitPending), ["Commit", "DisableProtection"]);
        assert_eq!(allowed(Phase::FailbackCommitted), ["DisableProtection", "ReverseReplicate"]);
        let testing =
            ItemState { test_failover: TestFailoverState::WaitingForCleanup, ..at(Phase::Protected) };
        assert_eq!(allowed_operations(&testing), ["TestFailoverCleanup"]);
    }
}
