//! Writes to sysfs what `usbpolicyd` may not. All of it is in [`usbpolicyd::sysfs_write::service`].

use std::process::ExitCode;

use clap::Parser as _;
use usbpolicyd::sysfs_write::service::{Cli, run};

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .with_ansi(false)
        .init();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
