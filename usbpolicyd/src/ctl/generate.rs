//! `usbpolicyctl generate`: a policy from what is plugged in.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write;

use clap::ValueEnum;
use common::ids::{VendorProduct, VmName};

use super::Outcome;
use super::host::{Devices, find, title};
use crate::facts::{DeviceFacts, HostUseLevel, Snapshot};
use crate::policy::compile::CompiledPolicy;
use crate::policy::pattern::{Glob, IdPattern};
use crate::policy::print;
use crate::policy::problem::Origin;
use crate::policy::schema::{AssignRule, Expect, Limits, Match, PlaceRef, Spot};

/// By what a generated rule knows its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum By {
    /// The port it is in
    Port,
    /// Its id and serial number
    Serial,
    /// Its id
    Id,
}

/// Write a policy that gives the plugged-in devices to a VM, to be read and cut down
///
/// Hubs and what the host needs are left out; a hub that is named as DEVICE stands for all that is plugged into it, now
/// and later. Write one policy for each VM into /etc/usbpolicyd/policy.d to serve several. Without --by, a device is known by id and serial number if it has a serial
/// number of its own, and by its port otherwise.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The VM that gets them
    #[arg(long, value_name = "NAME", default_value = "vm1")]
    vm: VmName,
    /// By what to know a device
    #[arg(long, value_name = "KEY")]
    by: Option<By>,
    /// Only these devices (as for explain)
    #[arg(value_name = "DEVICE")]
    only: Vec<String>,
    /// Add a rule that denies sticks that also type or network
    #[arg(long)]
    with_deny: bool,
    #[command(flatten)]
    devices: Devices,
}

const DENY: &str = "
[[deny]]
name = \"no-badusb-sticks\"
reason = \"mass storage that also types or networks\"
match = { interfaces.all = [\"storage\"], interfaces.any = [\"hid\", \"cdc\", \"wireless\"] }
";

pub(super) fn run(args: &Args, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let snapshot = args.devices.read()?;
    let none = CompiledPolicy::default();
    let named =
        args.only.iter().map(|name| find(&snapshot, &none, name)).collect::<anyhow::Result<Vec<_>>>()?;
    let chosen = if named.is_empty() { snapshot.devices.iter().collect() } else { named };
    let with_hubs = !args.only.is_empty();
    out.write_all(policy(&snapshot, &chosen, with_hubs, args).as_bytes())?;
    Ok(Outcome::Done)
}

fn policy(snapshot: &Snapshot, chosen: &[&DeviceFacts], with_hubs: bool, args: &Args) -> String {
    let mut text = format!("schema = 1\n\n[vms.{}]\n", args.vm);
    if args.with_deny {
        text.push_str(DENY);
    }
    let mut names: BTreeMap<String, u32> = BTreeMap::new();
    for device in chosen {
        if device.is_hub() {
            if with_hubs {
                hub(device, args, &mut names, &mut text);
            }
            continue;
        }
        if let Some(used) = device.host_use.iter().find(|used| used.level == HostUseLevel::Protected) {
            let why = super::text::escaped(&used.why);
            let _ = writeln!(text, "\n# {} {} is left out: {why}", device.sys_name, title(device));
            continue;
        }
        let _ = write!(text, "\n# {} {}", device.sys_name, title(device));
        let matches = matches(snapshot, device, args.by);
        let name = unique(name(device, &args.vm), &mut names);
        print::assign(&rule(name, matches, &args.vm), &mut text);
    }
    text
}

/// A connector for the hub, and a rule for all below it.
fn hub(device: &DeviceFacts, args: &Args, names: &mut BTreeMap<String, u32>, text: &mut String) {
    let name = unique(name(device, &args.vm), names);
    let connector = format!("below-{}", name.replace('.', "-"));
    let _ = writeln!(text, "\n# what is plugged into {} {}", device.sys_name, title(device));
    let _ = writeln!(text, "[connectors.{connector}]\nat = \"{}\"\nsubtree = true", device.connector);
    let at = vec![PlaceRef::Named(connector)];
    print::assign(&rule(name, Match { at, ..Match::default() }, &args.vm), text);
}

/// A rule that gives one device to a VM, as `learn` prints it.
pub(super) fn rule_text(snapshot: &Snapshot, device: &DeviceFacts, vm: &VmName, by: Option<By>) -> String {
    let mut text = format!("# {} {}", device.sys_name, title(device));
    print::assign(&rule(name(device, vm), matches(snapshot, device, by), vm), &mut text);
    text
}

fn rule(name: String, matches: Match, vm: &VmName) -> AssignRule {
    AssignRule {
        origin: Origin { file: String::new(), line: 0, column: 0 },
        name: Some(name),
        vms: vec![vm.clone()],
        vms_at: Spot::default(),
        matches,
        mode: None,
        priority: 0,
        preempt: false,
        on_conflict: None,
        on_release: None,
        reset: None,
        claim_ports: None,
        configuration: None,
        follow: None,
        expect: Expect::default(),
        allow_in_use: Vec::new(),
        limits: Limits::default(),
    }
}

fn matches(snapshot: &Snapshot, device: &DeviceFacts, by: Option<By>) -> Match {
    let serial = device.serial.as_deref().and_then(|serial| Glob::literal(serial, false).ok());
    let same = |other: &&DeviceFacts| other.id == device.id && other.serial == device.serial;
    let is_own = serial.is_some() && snapshot.devices.iter().filter(same).count() == 1;
    let port = || device.connector.halves.first().cloned().map(PlaceRef::Port).into_iter().collect();
    let id = |id: VendorProduct| vec![IdPattern::exact(id)];
    match (by, serial) {
        (Some(By::Id), _) => Match { id: id(device.id), ..Match::default() },
        (Some(By::Serial), Some(serial)) => {
            Match { id: id(device.id), serial: vec![serial], ..Match::default() }
        }
        (None, Some(serial)) if is_own => {
            Match { id: id(device.id), serial: vec![serial], ..Match::default() }
        }
        _ => Match { at: port(), ..Match::default() },
    }
}

/// A name for the rule, from VM and product string as far as that has letters and digits. The VM is in it so that the
/// rules generated for another one, in another file, do not replace these.
fn name(device: &DeviceFacts, vm: &VmName) -> String {
    const NAME_MAX: usize = 24;
    let words = device.product.as_deref().unwrap_or_default();
    let mut name = String::new();
    for one in words.chars() {
        let one = if one.is_ascii_alphanumeric() { one.to_ascii_lowercase() } else { '-' };
        if name.len() < NAME_MAX && !(one == '-' && (name.is_empty() || name.ends_with('-'))) {
            name.push(one);
        }
    }
    match name.trim_end_matches('-') {
        "" => format!("{vm}-{:04x}-{:04x}", device.id.vendor, device.id.product),
        name => format!("{vm}-{name}"),
    }
}

fn unique(name: String, names: &mut BTreeMap<String, u32>) -> String {
    let count = names.entry(name.clone()).or_default();
    *count += 1;
    if *count == 1 { name } else { format!("{name}.{count}") }
}
