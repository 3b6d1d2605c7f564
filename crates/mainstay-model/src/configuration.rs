//! Changes of what is configured: carried out at once, told as jobs that have ended, as Site Recovery tells them.

use serde::{Deserialize, Serialize};

/// What was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ConfigurationChange {
    /// A replication policy was made.
    CreatePolicy,
    /// A replication policy was changed.
    UpdatePolicy,
    /// A replication policy was removed.
    DeletePolicy,
    /// A site was made.
    CreateFabric,
    /// A site was removed.
    DeleteFabric,
    /// A container was mapped to a recovery container under a policy.
    AssociatePolicy,
    /// Such a mapping was removed.
    DissociatePolicy,
    /// A host was asked what is on it.
    RefreshProvider,
    /// A registered host was removed.
    RemoveProvider,
    /// The hosts of a container were asked for a VM.
    DiscoverProtectableItem,
    /// The hosts of a site were asked what is on them, to bring what is known up to date.
    CheckConsistency,
    /// A recovery plan was made.
    CreateRecoveryPlan,
    /// A recovery plan was changed.
    UpdateRecoveryPlan,
    /// A recovery plan was removed.
    DeleteRecoveryPlan,
    /// All hosts were asked, to bring the vault's health up to date.
    RefreshVaultHealth,
    /// Jobs were offered for download.
    ExportJobs,
    /// A network was mapped to one of a recovery site.
    MapNetwork,
    /// Such a mapping was removed.
    UnmapNetwork,
    /// Health errors were put out of sight by somebody who has seen them.
    ResolveHealthErrors,
}
