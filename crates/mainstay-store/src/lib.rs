//! The replica store: recovery points in object storage.
//!
//! A *replica* is everything one replicated item has at this site. A [`Session`] receives the frames of one
//! capture into immutable *segments*; its commit writes a *layer* (which blocks are where) and then, with
//! put-if-absent, the next version of the replica's *manifest*. That put is the only commit point: before it the
//! recovery point does not exist, after it everything the point needs is durable.
//!
//! ```text
//! v1/<replica>/segment/<id>       frames, verbatim from the agent       docs/formats/segment.md
//! v1/<replica>/map/<id>           extent maps of layers                 docs/formats/layer.md
//! v1/<replica>/definition/<id>    opaque description of the VM
//! v1/<replica>/manifest/<version> what is true                          docs/formats/manifest.md
//! v1/catalogue/<name>             what a vault is made of               docs/formats/catalogue.md
//! ```
//!
//! Only put, put-if-absent, get (range), list and delete are used, so a local directory ([`local_storage`], with
//! fsync) and S3, Azure Blob or Ceph behave alike. Deleting and opening a recovery point costs the same for any
//! number of points and any size of disk; space comes back in [`Store::maintain`].
//!
//! **After a crash** unreferenced objects can remain: segments of sessions that were never committed, maps and
//! segments of an interrupted maintenance step. [`Store::maintain`] finds them by listing and deletes them in a
//! later pass. Nothing else can leak, and nothing acknowledged is lost.

mod cache;
mod catalogue;
mod cipher;
mod diff;
mod direct;
mod envelope;
mod error;
mod extent_map;
#[doc(hidden)]
pub mod fuzzing;
mod keyring;
mod keys;
mod local;
mod maintain;
mod manifest;
mod map_file;
mod map_reader;
mod options;
mod reader;
mod repair;
mod replica;
mod scrub;
mod segment;
mod session;
mod storage;
mod store;

pub use diff::DiskDiff;
pub use error::StoreError;
pub use keyring::{Unlocked, VaultKey};
pub use local::local_storage;
pub use maintain::MaintainReport;
pub use manifest::{Consistency, DiskSpec, PointCounters};
pub use options::StoreOptions;
pub use reader::{PointDisk, PointReader};
pub use scrub::{BlockRange, Damage, ScrubOptions, ScrubReport};
pub use session::{FrameUse, PointMeta, Received, Session, SessionSpec};
pub use store::{PointInfo, ReplicaInfo, Store};
