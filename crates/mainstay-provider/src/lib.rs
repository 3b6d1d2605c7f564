//! The contract between the control plane and a site.
