//! `usbpolicyctl vm`: the VMs and whether they get devices.

use std::io::Write;
use std::time::{Duration, Instant};

use common::ids::VmName;
use serde::Serialize;

use super::online::Socket;
use super::text::escaped;
use super::{Outcome, refused};
use crate::admin::wire::{Reply, Request, Service, VmView};

/// List VMs; stop, resume or drain one
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    socket: Socket,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// List the VMs
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Give a VM nothing new; it keeps what it has
    Pause {
        /// Name of the VM
        vm: VmName,
    },
    /// Give a VM devices by the rules again
    Resume {
        /// Name of the VM
        vm: VmName,
    },
    /// Take everything from a VM and give it nothing new
    Drain {
        /// Name of the VM
        vm: VmName,
    },
    /// Wait until a VM has a device by each of its rules with `mode = "required"`
    ///
    /// Exit status: 0 it has, 1 it has not in time, or there is no such VM.
    Wait {
        /// Name of the VM
        vm: VmName,
        /// How long to wait; 0 only looks
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        timeout: u32,
    },
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    vms: &'a [VmView],
}

pub(super) fn run(args: &Args, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let (vm, service) = match &args.verb {
        Verb::List { json } => return list(&args.socket, *json, out),
        Verb::Wait { vm, timeout } => return wait(&args.socket, vm, *timeout, out),
        Verb::Pause { vm } => (vm, Service::Paused),
        Verb::Resume { vm } => (vm, Service::Running),
        Verb::Drain { vm } => (vm, Service::Drained),
    };
    let (_, result) = args.socket.call(&Request::Serve { vm: vm.clone(), service })?;
    super::finish(result, out)
}

fn list(socket: &Socket, json: bool, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let (replies, result) = socket.call(&Request::Vms)?;
    if let Err(text) = result {
        return Ok(refused(&text));
    }
    let views = replies.into_iter().filter_map(|reply| match reply {
        Reply::Vm(view) => Some(view),
        _ => None,
    });
    let views: Vec<VmView> = views.collect();
    if json {
        serde_json::to_writer_pretty(&mut *out, &Report { schema: "usbpolicyctl-vms/1", vms: &views })?;
        writeln!(out)?;
        return Ok(Outcome::Done);
    }
    let names = views.iter().map(|view| view.name.as_str().len()).max().unwrap_or(0);
    for view in &views {
        let limit = view.max_devices.map(|max| format!(" of {max}")).unwrap_or_default();
        let up = match (view.up, view.vmm_connected) {
            (Some(true), Some(true)) => "up",
            (Some(true), _) => "up, no VMM yet",
            (Some(false), _) => "down",
            (None, _) => "not answering",
        };
        let service = match view.service {
            Service::Running => "",
            Service::Paused => ", paused",
            Service::Drained => ", drained",
        };
        let stray = if view.in_policy { "" } else { ", not in the policy" };
        writeln!(out, "{:names$}  {} devices{limit}  {up}{service}{stray}", view.name, view.devices)?;
        if !view.missing.is_empty() {
            let rules = view.missing.iter().map(|rule| escaped(rule)).collect::<Vec<_>>().join(", ");
            writeln!(out, "{:names$}  not there yet, by required rules: {rules}", "")?;
        }
        if let Some(problem) = &view.problem {
            writeln!(out, "{:names$}  {}", "", escaped(problem))?;
        }
    }
    Ok(Outcome::Done)
}

/// Waits for what the VM requires. Looks again whenever something happens, so nothing is missed and nothing polled.
fn wait(socket: &Socket, vm: &VmName, timeout: u32, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let deadline = Instant::now() + Duration::from_secs(timeout.into());
    // Watches before it looks the first time.
    let mut events = socket.ask(&Request::Watch)?;
    loop {
        let (replies, result) = socket.call(&Request::Vms)?;
        if let Err(text) = result {
            return Ok(refused(&text));
        }
        let found = replies.into_iter().find_map(|reply| match reply {
            Reply::Vm(view) if view.name == *vm => Some(view),
            _ => None,
        });
        let Some(view) = found.filter(|view| view.in_policy) else {
            return Ok(refused(&format!("the policy has no VM {vm}")));
        };
        if view.missing.is_empty() {
            writeln!(out, "{vm} has all that it requires")?;
            return Ok(Outcome::Done);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if !events.wait_for_news(left)? {
            let rules = view.missing.join(", ");
            return Ok(refused(&format!("{vm} has no device by these required rules: {rules}")));
        }
    }
}
