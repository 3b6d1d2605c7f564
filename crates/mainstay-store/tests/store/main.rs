//! The store from outside.

mod crash;
mod oracle;
mod rules;
mod support;
