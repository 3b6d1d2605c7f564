//! Sites and guests on one machine.
//!
//! A [`Site`] is a private libvirt daemon with its own directories, so that two of them, and the machine's
//! own, never meet. A [`LedgerVm`] is a guest that writes numbered records to two disks and acknowledges
//! each one to the host ([`ledger`]): whatever is done to the disks, it can be said afterwards whether
//! they hold a whole prefix of what was acknowledged.

mod account;
mod guest;
pub mod ledger;
mod site;

pub use account::Account;
pub use guest::{DiskImage, GuestImages, LedgerVm};
pub use site::Site;
