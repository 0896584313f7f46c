//! Policy and devices for the verbs that can do without the daemon.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use common::ids::{BusAddress, VendorProduct};

use super::online::Socket;
use super::text::{self, escaped};
use crate::admin::wire::{Reply, Request};
use crate::facts::{DeviceFacts, SNAPSHOT_VERSION, Snapshot};
use crate::guards::Guards;
use crate::policy::compile::{CompiledPolicy, compile};
use crate::policy::decide::Context;
use crate::policy::load::{Source, load};
use crate::policy::schema::Policy;
use crate::sysfs::Sysfs;
use crate::topology::Topology;

/// Devices, and what the daemon knows of each besides.
#[derive(Debug)]
pub(super) struct Host {
    /// The devices.
    pub(super) snapshot: Snapshot,
    contexts: BTreeMap<String, Context>,
}

impl From<Snapshot> for Host {
    fn from(snapshot: Snapshot) -> Self {
        Self { snapshot, contexts: BTreeMap::new() }
    }
}

impl Host {
    /// The circumstances of a decision about the device; empty ones when no daemon was asked.
    pub(super) fn context(&self, device: &DeviceFacts) -> Context {
        self.contexts.get(&device.sys_name).cloned().unwrap_or_default()
    }
}

/// The largest snapshot we read.
const SNAPSHOT_MAX: u64 = 16 << 20;

/// Which devices.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct Devices {
    /// Take the devices from a snapshot (`usbpolicyctl snapshot`, - for standard input), not from this host
    #[arg(long, value_name = "FILE")]
    devices: Option<PathBuf>,
}

/// Which devices, and whether to ask the daemon about them.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct MaybeLive {
    #[command(flatten)]
    devices: Devices,
    /// Do not ask the daemon who has a device now, what operators ordered and what the host uses
    #[arg(long)]
    no_daemon: bool,
    #[command(flatten)]
    socket: Socket,
}

impl MaybeLive {
    /// Reads the devices and asks the daemon, if it is to be asked and runs.
    pub(super) fn read(&self) -> anyhow::Result<Host> {
        let mut snapshot = self.devices.read()?;
        let mut contexts = BTreeMap::new();
        if self.no_daemon || self.devices.is_given() {
            return Ok(snapshot.into());
        }
        match self.socket.call(&Request::List) {
            Ok((replies, _)) => {
                for reply in replies {
                    let Reply::Device(view) = reply else { continue };
                    let device = snapshot.devices.iter_mut().find(|one| one.sys_name == view.name);
                    let Some(device) = device.filter(|one| one.address == view.address) else { continue };
                    device.host_use = view.host_use;
                    contexts.insert(view.name, view.context);
                }
            }
            Err(error) => {
                eprintln!("note: {error}");
                eprintln!("note: without the daemon, nothing is known of holders and orders");
            }
        }
        Ok(Host { snapshot, contexts })
    }
}

impl Devices {
    /// Whether a snapshot was named.
    pub(super) fn is_given(&self) -> bool {
        self.devices.is_some()
    }

    /// Reads them.
    pub(super) fn read(&self) -> anyhow::Result<Snapshot> {
        let Some(path) = &self.devices else { return this_host() };
        let mut text = String::new();
        let result = if path.as_os_str() == "-" {
            io::stdin().take(SNAPSHOT_MAX).read_to_string(&mut text)
        } else {
            File::open(path).and_then(|file| file.take(SNAPSHOT_MAX).read_to_string(&mut text))
        };
        result.with_context(|| format!("cannot read {}", path.display()))?;
        let snapshot: Snapshot =
            serde_json::from_str(&text).with_context(|| format!("{} is no snapshot", path.display()))?;
        if snapshot.version != SNAPSHOT_VERSION {
            bail!(
                "{} has version {}, this program reads {SNAPSHOT_VERSION}",
                path.display(),
                snapshot.version
            );
        }
        Ok(snapshot)
    }
}

/// Loads a policy; problems that make it unusable go to standard error.
pub(super) fn policy(sources: &[Source]) -> anyhow::Result<Policy> {
    match load(sources) {
        Ok(loaded) => Ok(loaded.policy),
        Err(problems) => {
            for problem in &problems {
                eprintln!("{}", text::problem(problem, false));
            }
            bail!("the policy cannot be used");
        }
    }
}

/// The same, ready to decide.
pub(super) fn compiled(sources: &[Source], topology: &Topology) -> anyhow::Result<CompiledPolicy> {
    Ok(compile(&policy(sources)?, topology))
}

/// The device that an operator means: kernel name, `bus:dev`, connector, the name of a connector, or `vendor:product`
/// if there is one of it.
pub(super) fn find<'s>(
    snapshot: &'s Snapshot,
    policy: &CompiledPolicy,
    wanted: &str,
) -> anyhow::Result<&'s DeviceFacts> {
    let is_meant = |device: &&DeviceFacts| {
        device.sys_name == wanted
            || address(wanted).is_some_and(|address| address == device.address)
            || wanted.parse::<VendorProduct>().is_ok_and(|id| id == device.id)
            || device.connector.halves.iter().any(|half| half.to_string() == wanted)
            || policy.connector_name(&device.connector) == Some(wanted)
    };
    let found: Vec<&DeviceFacts> = snapshot.devices.iter().filter(is_meant).collect();
    match found.as_slice() {
        [only] => Ok(only),
        [] => bail!("no device {:?} here; `usbpolicyctl list --hubs` shows them", escaped(wanted)),
        several => {
            let names: Vec<&str> = several.iter().map(|device| device.sys_name.as_str()).collect();
            bail!("{} devices are {:?}: {}; say which", several.len(), escaped(wanted), names.join(", "))
        }
    }
}

/// `003:014`, as `lsusb` prints it.
fn address(text: &str) -> Option<BusAddress> {
    let (bus, device) = text.split_once(':')?;
    let short = bus.len() == 3 && device.len() == 3;
    short.then(|| Some(BusAddress { bus: bus.parse().ok()?, device: device.parse().ok()? })).flatten()
}

/// One line for a device: what it is, as far as it says.
pub(super) fn title(device: &DeviceFacts) -> String {
    let text = |field: &Option<String>| escaped(field.as_deref().unwrap_or_default().trim());
    let (maker, product) = (text(&device.manufacturer), text(&device.product));
    let maker = if product.starts_with(&maker) { "" } else { &maker };
    let words = [device.id.to_string(), maker.to_owned(), product];
    words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// This host, as sysfs shows it.
pub(super) fn this_host() -> anyhow::Result<Snapshot> {
    let mut scan = Sysfs::default().scan().context("cannot read /sys/bus/usb/devices")?;
    Guards::default().assess(&mut scan);
    let devices = scan.devices.into_iter().map(|present| present.facts).collect();
    Ok(Snapshot { version: SNAPSHOT_VERSION, topology: scan.topology, devices })
}
