//! The daemon that decides which VM gets which USB device. See `daemon.rs`.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use usbpolicyd::cli::Cli;
use usbpolicyd::daemon::{Daemon, StartError};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = match EnvFilter::try_new(&cli.log) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("usbpolicyd: --log {:?} is no filter: {error}", cli.log);
            return ExitCode::from(2);
        }
    };
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    if journal {
        builder.without_time().with_ansi(false).init();
    } else {
        builder.with_ansi(std::io::stderr().is_terminal()).init();
    }
    match Daemon::new(&cli, journal).and_then(|mut daemon| daemon.run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let status = if matches!(error, StartError::Policy) { 2 } else { 1 };
            tracing::error!("{:#}", anyhow::Error::from(error));
            ExitCode::from(status)
        }
    }
}
