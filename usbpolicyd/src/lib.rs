//! Decides by policy which USB device goes to which virtual machine. See `ARCHITECTURE.md`.

pub mod admin;
pub mod audit;
pub mod broker;
pub mod claims;
pub mod cli;
pub mod ctl;
pub mod daemon;
pub mod facts;
pub mod guards;
pub mod hostsleep;
pub mod hostwatch;
pub mod instances;
pub mod inventory;
pub mod jobs;
pub mod orders;
pub mod policy;
pub mod policy_files;
pub mod record;
pub mod sandbox;
pub mod strings;
pub mod sysfs;
pub mod sysfs_write;
pub mod topology;
pub mod uevent;
pub mod usbnode;
