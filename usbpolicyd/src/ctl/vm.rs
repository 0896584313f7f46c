//! `usbpolicyctl vm`: the VMs and whether they get devices.

use std::io::Write;

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
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    vms: &'a [VmView],
}

pub(super) fn run(args: &Args, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let (vm, service) = match &args.verb {
        Verb::List { json } => return list(&args.socket, *json, out),
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
        if let Some(problem) = &view.problem {
            writeln!(out, "{:names$}  {}", "", escaped(problem))?;
        }
    }
    Ok(Outcome::Done)
}
