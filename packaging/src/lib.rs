//! The command lines of the programs, for what is made from them: completions, and the check of the man pages.
//!
//! Nothing here is part of a daemon; the files that are installed lie beside this crate.

pub mod manual;

use clap::{Command, CommandFactory};

/// The command line of each program that is installed, with the section of its man page.
pub fn programs() -> Vec<(Command, u8)> {
    vec![
        (usbpolicyd::ctl::Cli::command().name("usbpolicyctl"), 1),
        (usbpolicyd::cli::Cli::command().name("usbpolicyd"), 8),
        (usbpolicyd::sysfs_write::service::Cli::command().name("usbpolicyd-sysfs"), 8),
        (usbvfiod::cli::Cli::command().name("usbvfiod"), 8),
    ]
}
