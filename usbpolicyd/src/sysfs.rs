//! What the kernel says about USB devices, read from `/sys/bus/usb/devices`.
//!
//! A tree that changes while it is read is normal: a device of which an indispensable file is missing is left out,
//! and the event that made it vanish brings the next reading. All other oddities (text that is no UTF-8, files of
//! any size, links to nowhere) cost at most the fact that they stand for.
//!
//! `bConfigurationValue` and the strings wait for the lock of their device (`drivers/usb/core/sysfs.c`), which others may
//! hold for long. So the first is not read, and the strings are read apart from all the rest (`strings`).
//!
//! This module opens no device node and writes nothing.

pub mod descriptors;
#[cfg(test)]
pub(crate) mod tests;

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use common::ids::{BusAddress, Speed, VendorProduct};

use crate::facts::{ConnectType, DeviceFacts, NodeNumber, Removable, Strings};
use crate::topology::{Connector, Controller, Half, HubPort, KernelName, PortAddress, RootHub, Topology};

/// Longest attribute that is read, in bytes. A sysfs attribute has at most a page.
const ATTRIBUTE_MAX: usize = 4096;
/// Longest descriptor blob that is read, as from the open node (`common::usbfs`).
const DESCRIPTORS_MAX: u64 = 128 * 1024;
/// Longest string of a device: 126 UTF-16 units (USB 2.0 §9.6.7).
const STRING_MAX: usize = 126;
/// Most entries of `/sys/bus/usb/devices` that are looked at: 64 buses of 127 devices with four interfaces each.
const ENTRIES_MAX: usize = 32_768;
/// Most ports of one hub (USB 2.0 §11.23.2.1: `bNbrPorts` is a byte).
const PORTS_MAX: usize = 255;

/// One plug-in of one device: the same device plugged in again is another one. The inode number of its sysfs directory
/// tells them apart even when path, bus and device number are all the same.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Plug {
    /// Its directory below `/sys/devices`.
    pub syspath: PathBuf,
    /// Inode number of that directory.
    pub inode: u64,
    /// Bus and device number.
    pub address: BusAddress,
}

/// A device that was there when the tree was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Present {
    /// Which plug-in it is.
    pub plug: Plug,
    /// What rules look at.
    pub facts: DeviceFacts,
    /// Its descriptors as sysfs shows them, to be compared with those of the open file.
    pub descriptors: Vec<u8>,
}

/// Where a hub is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HubPlace {
    /// It is the root hub of this half of a controller.
    Root(RootHub),
    /// It is plugged in here.
    Port(PortAddress),
}

/// A hub that is configured and so has ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hub {
    /// The kernel's name, `usb1` or `1-4`.
    pub name: String,
    /// Which plug-in it is.
    pub plug: Plug,
    /// Where it is.
    pub place: HubPlace,
    /// How many ports it has.
    pub ports: u8,
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// Buses and ports.
    pub topology: Topology,
    /// Devices, hubs included, root hubs not, in order of syspath.
    pub devices: Vec<Present>,
    /// Hubs that have ports now, root hubs included.
    pub hubs: Vec<Hub>,
}

/// A sysfs tree: the real one, or a made-up one in a test.
#[derive(Clone, Debug)]
pub struct Sysfs {
    root: PathBuf,
}

impl Default for Sysfs {
    fn default() -> Self {
        Self::new("/sys")
    }
}

impl Sysfs {
    /// The tree whose top is `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The top of the tree.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Reads everything, and waits for devices that are busy. Fails only when `/sys/bus/usb/devices` itself cannot be
    /// listed.
    pub fn scan(&self) -> io::Result<Scan> {
        let mut scan = self.scan_without_strings()?;
        scan.devices.retain_mut(|present| {
            let strings = read_strings(&present.plug);
            let is_there = strings.is_some();
            present.facts.set_strings(strings.unwrap_or_default());
            is_there
        });
        Ok(scan)
    }

    /// The same without strings, and waits for nobody.
    pub fn scan_without_strings(&self) -> io::Result<Scan> {
        let top = self.root.join("bus/usb/devices");
        let mut names: Vec<String> = fs::read_dir(&top)?
            .take(ENTRIES_MAX)
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect();
        names.sort_unstable();
        let mut scan = Scan::default();
        for name in names.iter().filter(|name| name.starts_with("usb")) {
            if let Some((bus, root)) = read_root_hub(&top.join(name)) {
                scan.topology.buses.insert(bus, root);
            }
        }
        for name in names.iter().filter(|name| name.contains(':')) {
            self.read_ports(&top.join(name), &mut scan);
        }
        for name in names.iter().filter(|name| !name.contains(':') && !name.starts_with("usb")) {
            // Of the interfaces `NAME:CONFIGURATION.NUMBER`, which only the active configuration has.
            let configuration = names.iter().find_map(|interface| {
                interface.strip_prefix(name.as_str())?.strip_prefix(':')?.split_once('.')?.0.parse().ok()
            });
            scan.devices.extend(read_device(&top, name, configuration, &scan.topology));
        }
        scan.devices.sort_by(|left, right| left.plug.cmp(&right.plug));
        Ok(scan)
    }

    /// Reads the port directories below one hub interface. Other interfaces have none.
    fn read_ports(&self, interface: &Path, scan: &mut Scan) {
        let Ok(entries) = fs::read_dir(interface) else { return };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let names: Vec<String> = names.filter(|name| name.contains("-port")).take(PORTS_MAX).collect();
        if names.is_empty() {
            return;
        }
        let hub = read_hub(interface, &scan.topology, names.len());
        scan.hubs.extend(hub);
        for name in names {
            let port_of = |name: &str| scan.topology.port_of(&port_name(name)?);
            let Some(address) = port_of(&name) else { continue };
            let directory = interface.join(&name);
            let peer = fs::read_link(directory.join("peer")).ok();
            let peer = peer.as_deref().and_then(|target| port_of(target.file_name()?.to_str()?));
            let port = HubPort { peer, connect_type: read_connect_type(&directory) };
            scan.topology.ports.insert(address, port);
        }
    }
}

/// `usb1-port4` and `1-4-port2` as the kernel name a device there would have: `1-4` and `1-4.2`.
pub(crate) fn port_name(name: &str) -> Option<KernelName> {
    let (hub, port) = name.rsplit_once("-port")?;
    match hub.strip_prefix("usb") {
        Some(bus) => format!("{bus}-{port}").parse().ok(),
        None => format!("{hub}.{port}").parse().ok(),
    }
}

/// The hub whose interface this is.
fn read_hub(interface: &Path, topology: &Topology, ports: usize) -> Option<Hub> {
    let interface = resolve(interface)?;
    let directory = interface.parent()?;
    let name = directory.file_name()?.to_str()?;
    let address = BusAddress { bus: number(directory, "busnum")?, device: number(directory, "devnum")? };
    let place = match name.parse::<KernelName>() {
        Ok(name) => HubPlace::Port(topology.port_of(&name)?),
        Err(_) => HubPlace::Root(topology.buses.get(&address.bus)?.clone()),
    };
    let inode = fs::metadata(directory).ok()?.ino();
    let plug = Plug { syspath: directory.to_owned(), inode, address };
    Some(Hub { name: name.to_owned(), plug, place, ports: u8::try_from(ports).ok()? })
}

fn read_root_hub(link: &Path) -> Option<(u32, RootHub)> {
    let directory = resolve(link)?;
    let bus = number(&directory, "busnum")?;
    let half =
        if Speed::from_sysfs(&text(&directory, "speed")?)?.is_usb3() { Half::Usb3 } else { Half::Usb2 };
    let parent = directory.parent()?;
    let name = parent.file_name()?.to_str()?;
    let subsystem = fs::read_link(parent.join("subsystem")).ok();
    let is_pci = subsystem.as_deref().and_then(Path::file_name).is_some_and(|name| name == "pci");
    let controller: Controller =
        if is_pci { name.parse().ok()? } else { format!("platform-{name}").parse().ok()? };
    Some((bus, RootHub { controller, half }))
}

/// The strings of a plug-in; waits while somebody else has its lock. `None` when it is no longer there.
pub fn read_strings(plug: &Plug) -> Option<Strings> {
    let [serial, product, manufacturer] =
        ["serial", "product", "manufacturer"].map(|attribute| string(&plug.syspath, attribute));
    // Still the same directory, or they may be another device's.
    let inode = fs::metadata(&plug.syspath).ok()?.ino();
    (inode == plug.inode).then_some(Strings { serial, product, manufacturer })
}

fn read_device(
    top: &Path,
    name: &str,
    active_configuration: Option<u8>,
    topology: &Topology,
) -> Option<Present> {
    let kernel_name: KernelName = name.parse().ok()?;
    let directory = resolve(&top.join(name))?;
    let before = fs::metadata(&directory).ok()?.ino();
    let descriptors = bytes(&directory, "descriptors", DESCRIPTORS_MAX)?;
    let parsed = descriptors::parse(&descriptors)?;
    let address = BusAddress { bus: number(&directory, "busnum")?, device: number(&directory, "devnum")? };
    let root = topology.buses.get(&address.bus)?;
    let port = PortAddress {
        controller: root.controller.clone(),
        half: root.half,
        chain: kernel_name.chain.clone(),
    };
    let mut connector = topology.connector(&port);
    if connector.halves.is_empty() {
        connector = Connector::single(port.clone());
    }
    let node = text(&directory, "dev")?;
    let (major, minor) = node.trim().split_once(':')?;
    let mut interfaces = parsed.interfaces;
    bind_drivers(top, name, active_configuration, &mut interfaces);
    // A kernel without the attribute has no authorization at all.
    let authorized = number::<u8>(&directory, "authorized") != Some(0);
    let plug = Plug { syspath: directory.clone(), inode: before, address };
    let facts = DeviceFacts {
        sys_name: name.to_owned(),
        address,
        node: NodeNumber { major: major.parse().ok()?, minor: minor.parse().ok()? },
        controller: root.controller.clone(),
        connector,
        chain: kernel_name.chain,
        speed: Speed::from_sysfs(&text(&directory, "speed")?)?,
        id: VendorProduct { vendor: parsed.vendor, product: parsed.product },
        bcd_device: parsed.bcd_device,
        serial: None,
        product: None,
        manufacturer: None,
        class: parsed.class,
        interfaces,
        active_configuration,
        authorized,
        removable: match text(&directory, "removable").as_deref().map(str::trim) {
            Some("removable") => Removable::Removable,
            Some("fixed") => Removable::Fixed,
            _ => Removable::Unknown,
        },
        connect_type: topology.ports.get(&port).map_or(ConnectType::Unknown, |port| port.connect_type),
        host_use: Vec::new(),
    };
    // The same directory from first to last, or the facts may be of two devices.
    let after = fs::metadata(&directory).ok()?.ino();
    (before == after).then_some(Present { plug, facts, descriptors })
}

/// Notes the driver of each interface of the active configuration, at its current alternate setting.
fn bind_drivers(
    top: &Path,
    device: &str,
    configuration: Option<u8>,
    interfaces: &mut [crate::facts::InterfaceFacts],
) {
    let Some(configuration) = configuration else { return };
    for interface in interfaces.iter_mut().filter(|one| one.configuration == configuration) {
        let directory = top.join(format!("{device}:{configuration}.{}", interface.number));
        if number(&directory, "bAlternateSetting") != Some(interface.alternate) {
            continue;
        }
        let driver = fs::read_link(directory.join("driver")).ok();
        interface.driver = driver.and_then(|link| Some(link.file_name()?.to_str()?.to_owned()));
    }
}

fn read_connect_type(port: &Path) -> ConnectType {
    match text(port, "connect_type").as_deref().map(str::trim) {
        Some("hotplug") => ConnectType::Hotplug,
        Some("hardwired") => ConnectType::Hardwired,
        Some("not used") => ConnectType::NotUsed,
        _ => ConnectType::Unknown,
    }
}

/// Where a link of `/sys/bus/usb/devices` or of a class leads. sysfs has no links on the way there, so it is enough to read
/// this one: asking the kernel about each directory above (`canonicalize`) takes a dozen system calls for each device.
pub(crate) fn resolve(link: &Path) -> Option<PathBuf> {
    let mut path = link.parent()?.to_owned();
    for part in fs::read_link(link).ok()?.components() {
        match part {
            Component::ParentDir => drop(path.pop()),
            Component::CurDir => {}
            other => path.push(other),
        }
    }
    Some(path)
}

/// A file's first `max` bytes. `None` when it cannot be read to there.
fn bytes(directory: &Path, name: &str, max: u64) -> Option<Vec<u8>> {
    let mut content = Vec::new();
    File::open(directory.join(name)).ok()?.take(max).read_to_end(&mut content).ok()?;
    Some(content)
}

/// An attribute as text; what is no UTF-8 is replaced. The kernel gives an attribute in one piece, so one read has all of
/// it.
pub(crate) fn text(directory: &Path, name: &str) -> Option<String> {
    let mut content = [0; ATTRIBUTE_MAX];
    let mut file = File::open(directory.join(name)).ok()?;
    let length = loop {
        match file.read(&mut content) {
            Ok(length) => break length,
            // Whoever waits for a device's lock is woken by the stop of the process, and by the host going to sleep.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    };
    Some(String::from_utf8_lossy(content.get(..length)?).into_owned())
}

/// A decimal attribute.
pub(crate) fn number<T: std::str::FromStr>(directory: &Path, name: &str) -> Option<T> {
    text(directory, name)?.trim().parse().ok()
}

/// A string descriptor: without the line end that sysfs adds, cut to what a device can send.
fn string(directory: &Path, name: &str) -> Option<String> {
    let content = text(directory, name)?;
    let content = content.strip_suffix('\n').unwrap_or(&content);
    Some(content.chars().take(STRING_MAX).collect())
}
