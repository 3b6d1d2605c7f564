//! The ugly cases, each on real VMs and through the command line, as an operator meets them.
//!
//! Every test has a lab of its own and takes it down; with `MAINSTAY_KEEP=1` a failed one leaves it for a look.

mod access;
mod bad_line;
mod boot;
mod changes;
mod crashes;
mod damage;
mod disaster;
mod firmware;
mod hang;
mod isolation;
mod migration;
mod other_host;
mod outcomes;
mod plan;
mod rescue;
mod space;
mod split;
mod stubborn;
mod support;
