//! `usbpolicyctl log` and `watch`: what was decided and done, why and by whom. And `reload`, `retry`.

use std::io::Write;

use super::online::Socket;
use super::{Outcome, finish, refused};
use crate::admin::wire::{Reply, Request};
use crate::audit::Entry;

/// Show what happened to a device, or to all; the daemon keeps the last 1024 entries
#[derive(Debug, clap::Args)]
pub(super) struct LogArgs {
    #[command(flatten)]
    socket: Socket,
    /// Only this device: kernel name, vendor:product, connector, or id
    device: Option<String>,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

/// Show what happens, as it happens; end it with Ctrl-C
#[derive(Debug, clap::Args)]
pub(super) struct WatchArgs {
    #[command(flatten)]
    socket: Socket,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

/// A verb without arguments
#[derive(Debug, clap::Args)]
pub(super) struct PlainArgs {
    #[command(flatten)]
    socket: Socket,
}

/// Try a failed hand-over again now, instead of after its pause
#[derive(Debug, clap::Args)]
pub(super) struct RetryArgs {
    #[command(flatten)]
    socket: Socket,
    /// The device: kernel name, bus:dev, vendor:product, serial number, connector or id
    device: String,
}

pub(super) fn log(args: &LogArgs, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let (replies, result) = args.socket.call(&Request::Log { device: args.device.clone() })?;
    for reply in replies {
        if let Reply::Entry(entry) = reply {
            print(&entry, args.json, out)?;
        }
    }
    match result {
        Ok(_) => Ok(Outcome::Done),
        Err(text) => Ok(refused(&text)),
    }
}

pub(super) fn watch(args: &WatchArgs, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let mut answer = args.socket.ask(&Request::Watch)?;
    answer.wait_for_ever()?;
    while let Some(reply) = answer.next()? {
        match reply {
            Reply::Entry(entry) => print(&entry, args.json, out)?,
            Reply::End { ok: false, text } => return Ok(refused(&text)),
            _ => {}
        }
        out.flush()?;
    }
    anyhow::bail!("usbpolicyd ended")
}

fn print(entry: &Entry, json: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    if json {
        serde_json::to_writer(&mut *out, entry)?;
        writeln!(out)?;
    } else {
        // The line is escaped already; a daemon that forgot is not believed.
        let line = entry.line().replace(|c: char| c.is_control() && c != '\n', "?");
        writeln!(out, "{} {line}", clock(entry.time_us))?;
    }
    Ok(())
}

/// Time of day, UTC, with milliseconds.
fn clock(time_us: u64) -> String {
    let millis = time_us / 1000;
    let seconds = millis / 1000;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{hour:02}:{minute:02}:{second:02}.{:03}Z", millis % 1000)
}

pub(super) fn reload(args: &PlainArgs, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    finish(args.socket.call(&Request::Reload)?.1, out)
}

pub(super) fn retry(args: &RetryArgs, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    finish(args.socket.call(&Request::Retry { device: args.device.clone() })?.1, out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_shows_the_time_of_day() {
        assert_eq!(clock(1_700_000_000_123_456), "22:13:20.123Z");
    }
}
