//! `usbpolicyctl attach`, `detach`, `clear`, `orders` and `revoke`: what an operator orders, over the rules.

use std::io::Write;

use common::ids::VmName;
use serde::Serialize;

use super::online::Socket;
use super::text::escaped;
use super::{Outcome, finish, refused};
use crate::admin::wire::{Lasting, OrderView, Reply, Request};

/// How long an order lasts.
#[derive(Clone, Copy, Debug, clap::Args)]
struct Duration {
    /// Only until the device leaves the VM
    #[arg(long, group = "lasting")]
    once: bool,
    /// Until the device is unplugged (this is what happens anyway)
    #[arg(long, group = "lasting")]
    until_unplug: bool,
    /// For good: over unplugging, restarts and reboots, until `clear`; for this device in this socket
    #[arg(long, group = "lasting")]
    persist: bool,
}

impl Duration {
    const fn lasting(self) -> Lasting {
        if self.once {
            Lasting::Once
        } else if self.persist {
            Lasting::Persist
        } else {
            Lasting::UntilUnplug
        }
    }
}

/// Give a device to a VM, whatever the assign rules say; denies and guards still hold
#[derive(Debug, clap::Args)]
pub(super) struct AttachArgs {
    #[command(flatten)]
    socket: Socket,
    /// The device: kernel name, bus:dev, vendor:product, serial number, connector or id
    device: String,
    /// The VM
    vm: VmName,
    #[command(flatten)]
    duration: Duration,
    /// Take it from another VM if one has it
    #[arg(long)]
    steal: bool,
}

/// Take a device from its VM and keep it on the host
#[derive(Debug, clap::Args)]
pub(super) struct DetachArgs {
    #[command(flatten)]
    socket: Socket,
    /// The device: kernel name, bus:dev, vendor:product, serial number, connector or id
    device: String,
    #[command(flatten)]
    duration: Duration,
}

/// Take orders back: the policy decides again
#[derive(Debug, clap::Args)]
pub(super) struct ClearArgs {
    #[command(flatten)]
    socket: Socket,
    /// The device whose orders are taken back
    #[arg(required_unless_present = "all")]
    device: Option<String>,
    /// Take back all orders for all devices
    #[arg(long, conflicts_with = "device")]
    all: bool,
}

/// List the orders in force
#[derive(Debug, clap::Args)]
pub(super) struct OrdersArgs {
    #[command(flatten)]
    socket: Socket,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Take a device from its VM and keep it on the host, by force if need be
///
/// As `detach`; and when the VM's usbvfiod does not let go in time, the device's port is switched off and on, which ends
/// every open file of it. That needs usbpolicyd-sysfs.socket to be enabled. `usbpolicyctl log` tells how it went.
#[derive(Debug, clap::Args)]
pub(super) struct RevokeArgs {
    #[command(flatten)]
    socket: Socket,
    /// The device: kernel name, bus:dev, vendor:product, serial number, connector or id
    device: String,
    #[command(flatten)]
    duration: Duration,
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: &'static str,
    orders: &'a [OrderView],
}

pub(super) fn attach(args: &AttachArgs, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let request = Request::Attach {
        device: args.device.clone(),
        vm: args.vm.clone(),
        lasting: args.duration.lasting(),
        steal: args.steal,
    };
    finish(args.socket.call(&request)?.1, out)
}

pub(super) fn detach(args: &DetachArgs, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let request = Request::Detach { device: args.device.clone(), lasting: args.duration.lasting() };
    finish(args.socket.call(&request)?.1, out)
}

pub(super) fn clear(args: &ClearArgs, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    finish(args.socket.call(&Request::Clear { device: args.device.clone() })?.1, out)
}

pub(super) fn revoke(args: &RevokeArgs, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let request = Request::Revoke { device: args.device.clone(), lasting: args.duration.lasting() };
    finish(args.socket.call(&request)?.1, out)
}

pub(super) fn orders(args: &OrdersArgs, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let (replies, result) = args.socket.call(&Request::Orders)?;
    if let Err(text) = result {
        return Ok(refused(&text));
    }
    let views = replies.into_iter().filter_map(|reply| match reply {
        Reply::Order(view) => Some(view),
        _ => None,
    });
    let views: Vec<OrderView> = views.collect();
    if args.json {
        serde_json::to_writer_pretty(&mut *out, &Report { schema: "usbpolicyctl-orders/1", orders: &views })?;
        writeln!(out)?;
        return Ok(Outcome::Done);
    }
    for view in &views {
        let what = view.vm.as_ref().map_or_else(|| "kept on the host".to_owned(), |vm| format!("to {vm}"));
        let lasts = match view.lasting {
            Lasting::Once => "once",
            Lasting::UntilUnplug => "until it is unplugged",
            Lasting::Persist => "for good",
        };
        writeln!(out, "{}: {what}, {lasts}, by {}", escaped(&view.device), escaped(&view.actor))?;
    }
    Ok(Outcome::Done)
}
