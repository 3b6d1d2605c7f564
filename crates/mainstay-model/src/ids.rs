//! Typed identifiers. A bare `Uuid` never crosses a function boundary: two ids of different things
//! cannot be swapped by accident.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    };
}

id!(
    /// A capture of a VM's disks on its host, named by whoever asks for it.
    CaptureId
);
id!(
    /// A replicated item: one VM under protection, through all its failovers.
    ItemId
);
id!(
    /// A job.
    JobId
);
id!(
    /// A registered host's agent (recovery services provider).
    ProviderId
);
id!(
    /// A recovery point.
    PointId
);
id!(
    /// One transfer of changes towards one recovery point.
    SessionId
);
id!(
    /// A hypervisor's own identifier of a VM (libvirt's domain UUID, Hyper-V's VM id).
    VmId
);

/// The fencing number of a replicated item: every failover and every reversal increments it, and a
/// writer with an older one is refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl Generation {
    /// The generation that follows.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl std::fmt::Display for Generation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}
