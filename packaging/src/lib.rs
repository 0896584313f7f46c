//! The command lines of the programs, for what is made from them: completions, and the check of the man pages.
//!
//! Nothing here is part of a daemon; the files that are installed lie beside this crate.

use clap::{Command, CommandFactory};

/// The command line of each program that is installed, by its name.
pub fn programs() -> Vec<Command> {
    vec![usbvfiod::cli::Cli::command().name("usbvfiod")]
}
