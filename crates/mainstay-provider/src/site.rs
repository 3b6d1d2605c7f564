//! What the control plane asks of a registered host.
//!
//! An [`Operation`] is a whole, repeatable piece of work: the agent makes it safe to repeat, to drop and
//! to kill. Operations on the same item exclude each other at the agent, so that a repeated one
//! follows the remains of the first. Implementations of [`Site`]: `mainstay_agent::HostSite` (over any
//! [`crate::Hypervisor`]) and [`crate::RemoteSite`] (over a connection to one).

use async_trait::async_trait;
use mainstay_model::{Generation, ItemId, PointId, SessionId, VmId};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    Consistency, ErrorKind, GuestAddress, HostFacts, Hydration, Inventory, NicPlan, PowerState,
    ShutdownOutcome, SiteError, VirtualMachine, VmDefinition, WhenOff,
};

/// How far an operation is; sent at most a few times a second.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// What is being done, a few words for a person.
    pub phase: String,
    /// Bytes dealt with so far.
    pub bytes_done: u64,
    /// Bytes to deal with in all; 0 = not known yet.
    pub bytes_total: u64,
    /// Bytes that went over the data connection.
    pub bytes_moved: u64,
    /// The same of each disk, where the operation goes disk by disk; empty from agents of before this was told.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskProgress>,
}

impl Progress {
    /// Progress of disks, and of all together.
    pub fn of_disks(phase: &str, disks: Vec<DiskProgress>, bytes_moved: u64) -> Self {
        Self {
            phase: phase.to_owned(),
            bytes_done: disks.iter().map(|disk| disk.bytes_done).sum(),
            bytes_total: disks.iter().map(|disk| disk.bytes_total).sum(),
            bytes_moved,
            disks,
        }
    }
}

/// How far an operation is with a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiskProgress {
    /// The disk's key.
    pub key: String,
    /// Bytes dealt with so far.
    pub bytes_done: u64,
    /// Bytes to deal with in all.
    pub bytes_total: u64,
}

/// Receives progress. Must return at once.
pub trait ProgressSink: Send + Sync {
    /// The newest progress; replaces what was said before.
    fn report(&self, progress: Progress);
}

/// Discards progress.
pub struct NoProgress;

impl ProgressSink for NoProgress {
    fn report(&self, _: Progress) {}
}

/// A registered host.
///
/// Dropping the future of [`Site::perform`] cancels the operation: it stops soon and leaves what the next
/// operation on the item can carry on from.
#[async_trait]
pub trait Site: Send + Sync {
    /// Carries out an operation and answers with its [`Operation::Answer`] as JSON. Use [`call`].
    async fn perform(
        &self,
        operation: SiteOperation,
        progress: &dyn ProgressSink,
    ) -> Result<Value, SiteError>;
}

/// What to do when the other side of the control channel says something that this one does not know.
pub(crate) const SAME_VERSION: &str = "Update the agent and the server to the same version.";

/// A typed operation and its answer.
pub trait Operation: Into<SiteOperation> {
    /// What a success answers.
    type Answer: Serialize + DeserializeOwned + Send;
}

/// Carries out a typed operation.
pub async fn call<O: Operation>(
    site: &dyn Site,
    operation: O,
    progress: &dyn ProgressSink,
) -> Result<O::Answer, SiteError> {
    let operation = operation.into();
    let name = operation.name();
    let answer = site.perform(operation, progress).await?;
    serde_json::from_value(answer).map_err(|error| {
        SiteError::new(ErrorKind::Failed, format!("the agent's answer to {name} cannot be read: {error}"))
            .with_remedy(SAME_VERSION)
    })
}

macro_rules! operations {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* } -> $answer:ty;)*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
            pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }

            impl From<$name> for SiteOperation {
                fn from(operation: $name) -> Self {
                    Self::$name(operation)
                }
            }

            impl Operation for $name {
                type Answer = $answer;
            }
        )*

        /// Any operation, as it travels to the agent.
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub enum SiteOperation { $($(#[$doc])* $name($name),)* }

        impl SiteOperation {
            /// The operation's name, for logs and metrics.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$name(_) => stringify!($name),)* }
            }
        }
    };
}

/// What an order counts as whose server does not tell the generation yet: as of the newest.
fn untold() -> Generation {
    Generation(u64::MAX)
}

operations! {
    /// Reads what is on the host.
    Discover {} -> Discovery;

    /// Reads one VM afresh, with the host's facts.
    Examine {
        /// The VM.
        vm: VmId,
    } -> Examination;

    /// Prepares a VM for replication: takes autostart over and keeps a record of the item.
    Protect {
        /// The replicated item.
        item: ItemId,
        /// Its VM on this host.
        vm: VmId,
        /// Keys of the replicated disks; position = index in the store.
        disks: Vec<String>,
        /// The item's generation.
        generation: Generation,
    } -> ();

    /// Removes every trace of the item from the host and its VM; the VM itself stays as it is.
    Unprotect {
        /// The replicated item.
        item: ItemId,
        /// The item's generation. A server that was set back does not know which copy is the active one: what it says of that counts
        /// only if the host has heard of no newer generation.
        #[serde(default = "untold")]
        generation: Generation,
        /// Whether the item's VM on this host is the active copy. Only then does the host start it by itself again if it did
        /// so before: an old copy that comes up with its host would run beside the active one.
        is_active: bool,
    } -> ();

    /// Takes a capture and ships what changed since `parent` as a new recovery point.
    Replicate {
        /// The replicated item.
        item: ItemId,
        /// The generation in which the host believes to be the active one.
        generation: Generation,
        /// Names the transfer: the same session never makes two recovery points.
        session: SessionId,
        /// The point that the changes build on; `None` = nothing: the replica is empty, or what it has is beyond use.
        parent: Option<PointId>,
        /// Blocks (first, end) per disk that the store cannot read any more, sorted: they are sent whether they changed or not.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        resend: Vec<Vec<(u64, u64)>>,
        /// Ask the guest to take part.
        application_consistent: bool,
        /// Compare every block by hash instead of trusting trackers.
        compare_all: bool,
        /// Bytes per second on the wire at most; `None` = as fast as it goes.
        bytes_per_second_max: Option<u64>,
    } -> Replicated;

    /// The host is no longer the active one since `generation`: running transfers of the item end. With
    /// `stop_vm` the VM is stopped as by a power cut if it runs.
    StandDown {
        /// The replicated item.
        item: ItemId,
        /// The generation that is now active elsewhere.
        generation: Generation,
        /// Whether to stop the VM.
        stop_vm: bool,
        /// Which VM that is, for a host that has no record of the item.
        #[serde(default)]
        vm: Option<VmId>,
    } -> StoodDown;

    /// Reads whether a VM runs.
    ReadPower {
        /// The VM.
        vm: VmId,
    } -> PowerState;

    /// Starts a VM; for a VM of an item on this host with a tracker, so that the next delta is known.
    StartVm {
        /// The replicated item.
        item: ItemId,
        /// The item's generation: an order of before one that the host has heard of is refused.
        #[serde(default = "untold")]
        generation: Generation,
        /// The VM.
        vm: VmId,
    } -> ();

    /// The answer to [`Discovery::waiting`]: the host may start the item's VM, or must leave it off because another copy is
    /// the active one.
    AnswerWaiting {
        /// The replicated item.
        item: ItemId,
        /// The item's generation.
        generation: Generation,
        /// Whether to start the VM.
        may_start: bool,
    } -> ();

    /// Asks the guest to stop and waits.
    ShutDownVm {
        /// The replicated item.
        item: ItemId,
        /// The item's generation: an order of before one that the host has heard of is refused.
        #[serde(default = "untold")]
        generation: Generation,
        /// The VM.
        vm: VmId,
        /// How long the guest may take, in milliseconds.
        timeout_ms: u64,
    } -> ShutdownOutcome;

    /// Stops a VM as a power cut would.
    PowerOffVm {
        /// The replicated item; none = of a server that does not tell it yet.
        #[serde(default)]
        item: Option<ItemId>,
        /// The item's generation: an order of before one that the host has heard of is refused.
        #[serde(default = "untold")]
        generation: Generation,
        /// The VM.
        vm: VmId,
    } -> ();

    /// Makes a VM from a recovery point, without starting it. Its disks are served out of the store.
    CreateRecoveryVm {
        /// The replicated item.
        item: ItemId,
        /// The generation in which this VM is the active one (a test copy: the present one).
        generation: Generation,
        /// The VM's identifier, chosen by the caller.
        vm: VmId,
        /// The recovery point.
        point: PointId,
        /// Its name on this host.
        name: String,
        /// Whether it is a test copy.
        is_test: bool,
        /// The definition from the recovery point.
        definition: VmDefinition,
        /// Keys and sizes in bytes of the disks in the order of the store.
        disks: Vec<(String, u64)>,
        /// Virtual processors; `None` = as defined.
        vcpus: Option<u32>,
        /// Memory in bytes; `None` = as defined.
        memory_bytes: Option<u64>,
        /// What becomes of each adapter.
        nics: Vec<NicPlan>,
        /// Whether the VM is to be started when the host boots, as it was at home.
        autostart: bool,
    } -> ();

    /// Copies a recovery VM's disks out of the store, or goes on; answers how far it is. When it is complete, the host has
    /// let go of the recovery point.
    Hydrate {
        /// The replicated item.
        item: ItemId,
        /// The item's generation: an order of before one that the host has heard of is refused.
        #[serde(default = "untold")]
        generation: Generation,
        /// The VM.
        vm: VmId,
        /// What to do while the VM is off.
        when_off: WhenOff,
    } -> Hydration;

    /// Removes a recovery VM with its disks, or what there is of one.
    RemoveRecoveryVm {
        /// The replicated item.
        item: ItemId,
        /// The item's generation: an order of before one that the host has heard of is refused.
        #[serde(default = "untold")]
        generation: Generation,
        /// The VM.
        vm: VmId,
    } -> ();

    /// Gives adapters of a running recovery VM their planned addresses and answers what the guest then says.
    ApplyAddresses {
        /// The VM.
        vm: VmId,
        /// The plans that name an address.
        nics: Vec<NicPlan>,
    } -> Vec<GuestAddress>;

    /// Checks that a home VM can receive a failback and holds it: off, without snapshots, not started.
    PrepareHome {
        /// The replicated item.
        item: ItemId,
        /// The home VM's identifier.
        vm: VmId,
        /// The generation of the failback.
        generation: Generation,
        /// Keys and sizes of the disks.
        disks: Vec<(String, u64)>,
        /// If the VM does not exist: the definition to make it from; `None` = that is an error.
        create_from: Option<VmDefinition>,
    } -> HomePrepared;

    /// Brings the staging area at home to the state of a recovery point.
    StageHome {
        /// The replicated item.
        item: ItemId,
        /// The item's generation: an order of before one that the host has heard of is refused.
        #[serde(default = "untold")]
        generation: Generation,
        /// The home VM.
        vm: VmId,
        /// The point to reach.
        to: PointId,
        /// Keys and sizes of the disks at that point: a disk may have grown since the failback began.
        disks: Vec<(String, u64)>,
        /// Fetch everything, trusting nothing that is at home.
        full: bool,
    } -> Staged;

    /// Proves by hashes that the staging area equals a recovery point in every block that was staged.
    VerifyHome {
        /// The replicated item.
        item: ItemId,
        /// The item's generation: an order of before one that the host has heard of is refused.
        #[serde(default = "untold")]
        generation: Generation,
        /// The home VM.
        vm: VmId,
        /// The point to compare with.
        to: PointId,
    } -> Verified;

    /// Merges the staging area into the home disks.
    CommitHome {
        /// The replicated item.
        item: ItemId,
        /// The home VM.
        vm: VmId,
        /// Orders of an older generation are overtaken from now on.
        generation: Generation,
        /// The point that the home disks now equal.
        to: PointId,
        /// Its definition: firmware variables and TPM state come home with the disks.
        definition: VmDefinition,
    } -> ();

    /// Throws the staging area away; the home disks are as they were before it. A VM that was made for it goes too.
    DiscardHome {
        /// The replicated item.
        item: ItemId,
        /// The item's generation: an order of before one that the host has heard of is refused.
        #[serde(default = "untold")]
        generation: Generation,
        /// The home VM.
        vm: VmId,
    } -> ();

    /// How to reach a VM's console from the host.
    ReadConsole {
        /// The VM.
        vm: VmId,
    } -> String;
}

/// Answer of [`Discover`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Discovery {
    /// The host.
    pub host: HostFacts,
    /// Its VMs and networks.
    pub inventory: Inventory,
    /// Items whose VM would have been started when the host booted, if it were not protected. Whether it is still the active
    /// copy only the server knows: the host waits for [`AnswerWaiting`].
    #[serde(default)]
    pub waiting: Vec<ItemId>,
    /// The newest generation that the host has heard of, of each item that it has a record of.
    #[serde(default)]
    pub generations: Vec<(ItemId, Generation)>,
}

/// Answer of [`Examine`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Examination {
    /// The host.
    pub host: HostFacts,
    /// The VM.
    pub vm: VirtualMachine,
}

/// Answer of [`Replicate`]: the recovery point exists and is durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replicated {
    /// The recovery point.
    pub point: PointId,
    /// The moment it shows, milliseconds since the Unix epoch by the host's clock.
    pub taken_at_ms: i64,
    /// What was reached.
    pub consistency: Consistency,
    /// Why less than what was asked for was reached; empty otherwise.
    pub note: String,
    /// Bytes of blocks that differed from the replica.
    pub bytes_changed: u64,
    /// Bytes that went over the data connection.
    pub bytes_moved: u64,
    /// Why changes had to be found by hashes; `None` if the tracker was intact.
    pub resynchronized: Option<String>,
}

/// Answer of [`StandDown`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoodDown {
    /// Whether a running VM was stopped.
    pub was_stopped: bool,
    /// The host has heard of a newer generation; nothing was done.
    #[serde(default)]
    pub is_overtaken: bool,
}

/// Answer of [`PrepareHome`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HomePrepared {
    /// Whether the VM had to be made, so that everything must be fetched.
    pub was_created: bool,
    /// Whether the host prevents the VM's start while it is staged.
    pub is_start_prevented: bool,
}

/// Answer of [`StageHome`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Staged {
    /// Bytes of blocks that were staged.
    pub bytes_changed: u64,
    /// Bytes that went over the data connection.
    pub bytes_moved: u64,
    /// Bytes at home that had to be hashed because it was not known what had changed there.
    pub bytes_hashed: u64,
}

/// Answer of [`VerifyHome`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// Bytes compared.
    pub bytes_compared: u64,
    /// Bytes in blocks that differ; anything but 0 is a failure.
    pub bytes_different: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_understood_by_agents_and_servers_of_other_versions() {
        let old = r#"{"phase":"x","bytes_done":1,"bytes_total":2,"bytes_moved":3}"#;
        let read: Progress = serde_json::from_str(old).unwrap();
        assert_eq!((read.bytes_done, read.bytes_total, read.disks.len()), (1, 2, 0));
        assert_eq!(serde_json::to_string(&read).unwrap(), old);
        // What an older one reads of a newer one's: fields that it does not know are passed over.
        let newer: Progress = serde_json::from_str(r#"{"phase":"x","colours":[{"key":"vda"}]}"#).unwrap();
        assert_eq!(newer, Progress { phase: "x".to_owned(), ..Progress::default() });

        let disk = |key: &str, bytes_done| DiskProgress { key: key.to_owned(), bytes_done, bytes_total: 10 };
        let sum = Progress::of_disks("x", vec![disk("vda", 3), disk("vdb", 4)], 5);
        assert_eq!((sum.bytes_done, sum.bytes_total, sum.bytes_moved), (7, 20, 5));
        let text = serde_json::to_string(&sum).unwrap();
        assert_eq!(serde_json::from_str::<Progress>(&text).unwrap(), sum);
    }
}
