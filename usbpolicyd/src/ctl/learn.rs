//! `usbpolicyctl learn`: plug something in, get its rule.

use std::io::Write;

use anyhow::bail;
use common::ids::VmName;

use super::generate::{By, rule_text};
use super::online::Socket;
use super::{Outcome, host, refused};
use crate::admin::wire::{Reply, Request};
use crate::audit::Kind;

/// Wait for the next device that is plugged in, and print a rule that gives it to a VM
///
/// The rule goes to standard output: append it to /etc/usbpolicyd/policy.toml, then `usbpolicyctl check` and `reload`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    socket: Socket,
    /// The VM that gets the device
    #[arg(long, value_name = "NAME")]
    vm: VmName,
    /// What the rule knows the device by; without this, its serial number if it has one of its own, else its port
    #[arg(long, value_enum)]
    by: Option<By>,
}

pub(super) fn run(args: &Args, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let mut answer = args.socket.ask(&Request::Watch)?;
    answer.wait_for_ever()?;
    eprintln!("plug the device in now (Ctrl-C ends this)");
    loop {
        let entry = match answer.next()? {
            Some(Reply::Entry(entry)) if entry.event == Kind::Plugged => entry,
            Some(Reply::End { ok: false, text }) => return Ok(refused(&text)),
            Some(_) => continue,
            None => bail!("usbpolicyd ended"),
        };
        let Some(subject) = entry.device else { continue };
        let snapshot = host::this_host()?;
        // It may be gone again already, and hubs have no rules.
        let found = snapshot.devices.iter().find(|one| one.sys_name == subject.name);
        if let Some(device) = found.filter(|one| !one.is_hub()) {
            out.write_all(rule_text(&snapshot, device, &args.vm, args.by).as_bytes())?;
            return Ok(Outcome::Done);
        }
    }
}
