//! Decides by policy which USB device goes to which virtual machine. See `ARCHITECTURE.md`.

pub mod broker;
pub mod ctl;
pub mod facts;
pub mod instances;
pub mod jobs;
pub mod policy;
pub mod policy_files;
pub mod sysfs;
pub mod topology;
pub mod uevent;
pub mod usbnode;
