//! Sites and guests on one machine.
//!
//! A [`Site`] is a private libvirt daemon with its own directories, so that two of them, and the machine's
//! own, never meet. A [`LedgerVm`] is a guest that writes numbered records to two disks and acknowledges
//! each one to the host ([`ledger`]): whatever is done to the disks, it can be said afterwards whether
//! they hold a whole prefix of what was acknowledged.

mod account;
mod copies;
pub mod demo;
mod guest;
mod images;
mod item;
pub mod kills;
mod lab;
mod lab_file;
pub mod ledger;
mod link;
mod mounts;
mod process;
mod segment;
mod site;
mod wan;

pub use account::Account;
pub use guest::{DiskImage, Fill, GuestImages, LedgerVm};
pub use images::{Image, Images};
pub use item::{Item, Job, Point};
pub use lab::{HOME, Lab, LabAction, LabOptions, LabStatus, LedgerCopy, RECOVERY, SiteStatus, scratch_dir};
pub use lab_file::{LabFile, LabSite, LabVm, NotThere};
pub use link::relay;
pub use mounts::{Mounted, run_in_own_mounts, run_in_own_network};
pub use process::Process;
pub use segment::{Arp, Mac, Segment};
pub use site::Site;
pub use wan::{Badness, FAR, NEAR, Wan, is_possible as can_make_a_wan};
