//! Where a device is plugged in: controllers, ports and connectors.
//!
//! A socket on the outside of a computer is up to two ports inside: one that serves USB 2 and one that serves USB 3.
//! The kernel links the two through the sysfs attribute `peer` (`drivers/usb/core/port.c`). Both together are one
//! [`Connector`], anchored at the controller and not at a bus number, because bus numbers change from boot to boot.
//!
//! Plain data and pure functions; `sysfs.rs` fills a [`Topology`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use common::ids::{PORT_CHAIN_MAX, PortChain};
use serde::{Deserialize, Serialize};

/// The longest name of a controller that we take.
pub const CONTROLLER_NAME_MAX: usize = 64;

/// A text is not a place where a device can be plugged in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// Not a controller.
    #[error(
        "{0:?} is not a controller: a PCI address like \"0000:00:14.0\" or a platform device like \
         \"platform-xhci-hcd.0\""
    )]
    Controller(String),
    /// Not a port in the stable form.
    #[error(
        "{0:?} is not a port: controller, '/', \"usb2\" or \"usb3\", ':', port chain, like \"pci-0000:00:14.0/usb2:9.1\""
    )]
    Port(String),
    /// Not a kernel name.
    #[error("{0:?} is not a kernel name: bus, '-', port chain, like \"3-9.1\"")]
    Kernel(String),
}

/// A USB host controller by its place in the machine: `pci-0000:00:14.0` or `platform-xhci-hcd.0`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Controller(String);

impl Controller {
    /// The canonical text, with `pci-` or `platform-` in front.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `0000:00:14.0`: domain of 4 or more hex digits, bus, device, function.
fn is_pci_address(text: &str) -> bool {
    let hex = |part: &str, least: usize, most: usize| {
        (least..=most).contains(&part.len()) && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    let mut parts = text.splitn(3, ':');
    let (Some(domain), Some(bus), Some(rest)) = (parts.next(), parts.next(), parts.next()) else {
        return false;
    };
    let Some((device, function)) = rest.split_once('.') else { return false };
    hex(domain, 4, 8) && hex(bus, 2, 2) && hex(device, 2, 2) && matches!(function.as_bytes(), [b'0'..=b'7'])
}

impl FromStr for Controller {
    type Err = PlaceError;

    /// Takes `pci-0000:00:14.0`, the bare `0000:00:14.0` and `platform-NAME`.
    fn from_str(text: &str) -> Result<Self, PlaceError> {
        let bad = || PlaceError::Controller(text.to_owned());
        if text.len() > CONTROLLER_NAME_MAX {
            return Err(bad());
        }
        let lower = text.to_ascii_lowercase();
        let bare = lower.strip_prefix("pci-").unwrap_or(&lower);
        if is_pci_address(bare) {
            return Ok(Self(format!("pci-{bare}")));
        }
        let name = text.strip_prefix("platform-").ok_or_else(bad)?;
        let clean = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b':' | b'@' | b'+');
        if name.is_empty() || name.starts_with('.') || !name.bytes().all(clean) {
            return Err(bad());
        }
        Ok(Self(text.to_owned()))
    }
}

/// Which of the two port sets of a controller: the one for low, full and high speed, or the one for SuperSpeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Half {
    /// Ports of a root hub that runs at high speed or below.
    Usb2,
    /// Ports of a SuperSpeed root hub.
    Usb3,
}

impl fmt::Display for Half {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Usb2 => "usb2",
            Self::Usb3 => "usb3",
        })
    }
}

/// One port: `pci-0000:00:14.0/usb2:9.1` is port 1 of the hub in USB 2 root port 9 of that controller. Stable as long
/// as the controller stays in its slot and the hub in its port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortAddress {
    /// The controller that the root port belongs to.
    pub controller: Controller,
    /// USB 2 or USB 3 side of that controller.
    pub half: Half,
    /// Root port, then the ports of the hubs on the way.
    pub chain: PortChain,
}

impl PortAddress {
    /// The port that the hub with this port hangs on; none for a root port.
    pub fn parent(&self) -> Option<Self> {
        let ports = self.chain.ports();
        let chain = PortChain::new(ports.get(..ports.len().checked_sub(1)?)?)?;
        Some(Self { controller: self.controller.clone(), half: self.half, chain })
    }

    /// Port `port` of a hub that is plugged in here; none where USB allows no further hub.
    pub fn child(&self, port: u8) -> Option<Self> {
        let mut ports = self.chain.ports().to_vec();
        ports.push(port);
        Some(Self { controller: self.controller.clone(), half: self.half, chain: PortChain::new(&ports)? })
    }

    /// Whether `other` is this port or below a hub that is plugged in here.
    pub fn is_at_or_above(&self, other: &Self) -> bool {
        self.controller == other.controller
            && self.half == other.half
            && other.chain.ports().starts_with(self.chain.ports())
    }
}

impl fmt::Display for PortAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}:{}", self.controller, self.half, self.chain)
    }
}

impl FromStr for PortAddress {
    type Err = PlaceError;

    fn from_str(text: &str) -> Result<Self, PlaceError> {
        let bad = || PlaceError::Port(text.to_owned());
        let (controller, port) = text.split_once('/').ok_or_else(bad)?;
        let (half, chain) = port.split_once(':').ok_or_else(bad)?;
        let half = match half {
            "usb2" => Half::Usb2,
            "usb3" => Half::Usb3,
            _ => return Err(bad()),
        };
        Ok(Self { controller: controller.parse()?, half, chain: chain.parse().map_err(|_| bad())? })
    }
}

/// `3-9.1`: how the kernel names a device in sysfs. The bus number holds until the next boot only.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelName {
    /// Bus number.
    pub bus: u32,
    /// Ports from the root hub down.
    pub chain: PortChain,
}

impl fmt::Display for KernelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.bus, self.chain)
    }
}

impl FromStr for KernelName {
    type Err = PlaceError;

    fn from_str(text: &str) -> Result<Self, PlaceError> {
        let bad = || PlaceError::Kernel(text.to_owned());
        let (bus, chain) = text.split_once('-').ok_or_else(bad)?;
        if bus.is_empty() || !bus.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        let bus = bus.parse().ok().filter(|&bus| bus > 0).ok_or_else(bad)?;
        Ok(Self { bus, chain: chain.parse().map_err(|_| bad())? })
    }
}

macro_rules! serde_as_text {
    ($($name:ident),*) => {$(
        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}

serde_as_text!(Controller, PortAddress, KernelName);

/// One socket: the ports that are wired to it. Two when the kernel knows both halves, one otherwise; an operator may
/// put more together (an EHCI port and its UHCI companion). Never empty when made by [`Topology::connector`].
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Connector {
    /// The ports, in the order of their addresses: the USB 2 half comes first.
    pub halves: BTreeSet<PortAddress>,
}

impl Connector {
    /// A connector of one port.
    pub fn single(port: PortAddress) -> Self {
        Self { halves: BTreeSet::from([port]) }
    }

    /// Whether both name at least one port in common, so that a device can be in both.
    pub fn meets(&self, other: &Self) -> bool {
        self.halves.iter().any(|half| other.halves.contains(half))
    }

    /// Whether `other` is this connector or below a hub that is plugged in here.
    pub fn is_at_or_above(&self, other: &Self) -> bool {
        self.halves.iter().any(|above| other.halves.iter().any(|half| above.is_at_or_above(half)))
    }
}

/// The stable form of the first half; that alone names the connector.
impl fmt::Display for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.halves.first() {
            Some(half) => half.fmt(f),
            None => f.write_str("nowhere"),
        }
    }
}

/// What a bus number stands for in this boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootHub {
    /// The controller behind the bus.
    pub controller: Controller,
    /// Which half of the controller the bus is.
    pub half: Half,
}

/// What is known of one port of a root hub or hub.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HubPort {
    /// The other half of the same socket (`peer`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<PortAddress>,
    /// How something is connected here (`connect_type`).
    #[serde(default)]
    pub connect_type: crate::facts::ConnectType,
}

/// Which buses and hub ports exist now and which ports are two halves of one socket. With this, an address in a policy
/// becomes a connector even when nothing is plugged in there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    /// Root hubs by bus number.
    #[serde(default)]
    pub buses: BTreeMap<u32, RootHub>,
    /// All ports of all hubs, root hubs included.
    #[serde(default)]
    pub ports: BTreeMap<PortAddress, HubPort>,
}

impl Topology {
    /// The port that a kernel name means in this boot; none when there is no such bus.
    pub fn port_of(&self, name: &KernelName) -> Option<PortAddress> {
        let root = self.buses.get(&name.bus)?;
        Some(PortAddress { controller: root.controller.clone(), half: root.half, chain: name.chain.clone() })
    }

    /// What the kernel calls a port in this boot; none when its controller is not there.
    pub fn kernel_name(&self, port: &PortAddress) -> Option<KernelName> {
        let of_port = |root: &RootHub| root.controller == port.controller && root.half == port.half;
        let bus = self.buses.iter().find(|(_, root)| of_port(root)).map(|(bus, _)| *bus)?;
        Some(KernelName { bus, chain: port.chain.clone() })
    }

    /// The connector that a port is part of.
    ///
    /// When the hub that would have the port is not plugged in, the other half is worked out from the nearest port
    /// above that has a peer: a USB 3 hub pairs its ports number by number (`port.c`).
    pub fn connector(&self, port: &PortAddress) -> Connector {
        let mut connector = Connector::single(port.clone());
        if let Some(peer) = self.peer(port) {
            connector.halves.insert(peer);
        }
        connector
    }

    fn peer(&self, port: &PortAddress) -> Option<PortAddress> {
        let mut above = port.clone();
        let mut below = Vec::new();
        for _ in 0..PORT_CHAIN_MAX {
            if let Some(known) = self.ports.get(&above) {
                let peer = known.peer.clone()?;
                return below.iter().rev().try_fold(peer, |at, &number| at.child(number));
            }
            below.push(*above.chain.ports().last()?);
            above = above.parent()?;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(text: &str) -> PortAddress {
        text.parse().unwrap()
    }

    /// One xHCI: socket A is usb2:9 and usb3:4, socket B is usb2:10 alone.
    fn topology() -> Topology {
        let controller: Controller = "pci-0000:00:14.0".parse().unwrap();
        let mut all = Topology::default();
        all.buses.insert(1, RootHub { controller: controller.clone(), half: Half::Usb2 });
        all.buses.insert(2, RootHub { controller, half: Half::Usb3 });
        let mut add = |at: &str, peer: Option<&str>| {
            all.ports.insert(port(at), HubPort { peer: peer.map(port), ..HubPort::default() });
        };
        add("pci-0000:00:14.0/usb2:9", Some("pci-0000:00:14.0/usb3:4"));
        add("pci-0000:00:14.0/usb3:4", Some("pci-0000:00:14.0/usb2:9"));
        add("pci-0000:00:14.0/usb2:10", None);
        all
    }

    #[test]
    fn bare_pci_address_gets_its_prefix() {
        let bare: Controller = "0000:00:14.0".parse().unwrap();
        assert_eq!(bare.as_str(), "pci-0000:00:14.0");
    }

    #[test]
    fn controllers_of_other_forms_are_refused() {
        for text in
            ["", "pci-", "00:14.0", "0000:00:14", "0000:00:14.8", "platform-", "platform-a/b", "platform-.."]
        {
            assert!(text.parse::<Controller>().is_err(), "{text}");
        }
    }

    #[test]
    fn port_address_prints_as_it_parses() {
        for text in ["pci-0000:00:14.0/usb2:9.1", "platform-vhci_hcd.0/usb3:4"] {
            assert_eq!(port(text).to_string(), text);
        }
    }

    #[test]
    fn kernel_name_becomes_both_halves_of_the_socket() {
        let all = topology();
        let at = all.port_of(&"2-4".parse().unwrap()).unwrap();
        let connector = all.connector(&at);
        assert_eq!(connector.to_string(), "pci-0000:00:14.0/usb2:9");
        assert_eq!(connector.halves.len(), 2);
        assert_eq!(all.kernel_name(&at).unwrap().to_string(), "2-4");
    }

    #[test]
    fn port_of_an_absent_hub_pairs_like_the_socket_above() {
        let connector = topology().connector(&port("pci-0000:00:14.0/usb2:9.3.1"));
        assert!(connector.halves.contains(&port("pci-0000:00:14.0/usb3:4.3.1")));
    }

    #[test]
    fn port_without_peer_stays_alone() {
        assert_eq!(topology().connector(&port("pci-0000:00:14.0/usb2:10.1")).halves.len(), 1);
    }

    #[test]
    fn subtree_has_the_port_and_what_is_below_but_no_longer_number() {
        let all = topology();
        let socket = all.connector(&port("pci-0000:00:14.0/usb2:9"));
        let below = |text| socket.is_at_or_above(&all.connector(&port(text)));
        assert!(below("pci-0000:00:14.0/usb2:9"));
        assert!(below("pci-0000:00:14.0/usb3:4.1"));
        assert!(!below("pci-0000:00:14.0/usb2:90"));
        assert!(!below("pci-0000:00:14.0/usb2:4.1"));
    }
}
