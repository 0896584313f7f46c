//! What is known of one device when a decision is made: plain data, read from sysfs once, never from an event.
//!
//! The same types are the format of `usbpolicyctl snapshot`, so a decision can be repeated anywhere. Strings come from
//! the device and are kept as they came; whoever prints them escapes them.

use std::fmt;
use std::str::FromStr;

use common::ids::{BusAddress, PortChain, Speed, VendorProduct};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::topology::{Connector, Controller, Topology};

/// Version of the snapshot format. A reader refuses any other.
pub const SNAPSHOT_VERSION: u32 = 1;

/// Class code of hubs (USB 2.0 §11.23.1).
pub const CLASS_HUB: u8 = 9;

/// A text is not of the form its type wants.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FactError {
    /// Not `cc:ss:pp`.
    #[error("{0:?} is not class:subclass:protocol, two hex digits each, like \"03:01:01\"")]
    Class(String),
    /// Not a fingerprint.
    #[error(
        "{0:?} is not a fingerprint: \"fp1:\" and 64 lower-case hex digits, as `usbpolicyctl list --json` prints it"
    )]
    Fingerprint(String),
}

/// Class, subclass and protocol of a device or interface (USB 2.0 Table 9-8 and 9-12), written `03:01:01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClassTriple {
    /// `bDeviceClass` or `bInterfaceClass`.
    pub class: u8,
    /// The subclass byte.
    pub subclass: u8,
    /// The protocol byte.
    pub protocol: u8,
}

impl fmt::Display for ClassTriple {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}:{:02x}", self.class, self.subclass, self.protocol)
    }
}

impl FromStr for ClassTriple {
    type Err = FactError;

    fn from_str(text: &str) -> Result<Self, FactError> {
        let bad = || FactError::Class(text.to_owned());
        let mut bytes = [0; 3];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            *byte = parts.next().and_then(parse_hex_byte).ok_or_else(bad)?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        let [class, subclass, protocol] = bytes;
        Ok(Self { class, subclass, protocol })
    }
}

/// Exactly two hex digits.
pub(crate) fn parse_hex_byte(text: &str) -> Option<u8> {
    let digits = text.len() == 2 && text.bytes().all(|b| b.is_ascii_hexdigit());
    digits.then(|| u8::from_str_radix(text, 16).ok()).flatten()
}

/// What a device is, as one number: `fp1:` and a SHA-256 over ids, `bcdDevice`, strings and the set of interface
/// classes. Nothing in it depends on the speed, so it is the same in a USB 2 and a USB 3 socket. The device chooses
/// all of it: good to notice a change, no proof of identity.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("fp1:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = FactError;

    fn from_str(text: &str) -> Result<Self, FactError> {
        let bad = || FactError::Fingerprint(text.to_owned());
        let hex =
            text.strip_prefix("fp1:").filter(|hex| hex.len() == 64 && hex.is_ascii()).ok_or_else(bad)?;
        let mut bytes = [0; 32];
        for (index, byte) in bytes.iter_mut().enumerate() {
            let pair = hex
                .get(index * 2..index * 2 + 2)
                .filter(|pair| !pair.bytes().any(|b| b.is_ascii_uppercase()));
            *byte = pair.and_then(parse_hex_byte).ok_or_else(bad)?;
        }
        Ok(Self(bytes))
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

serde_as_text!(ClassTriple, Fingerprint);

/// Whether a device can be taken out (sysfs `removable`). Firmware says so; a hub may lie about its own ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Removable {
    /// A user can pull it.
    Removable,
    /// Built in.
    Fixed,
    /// The firmware does not say.
    #[default]
    Unknown,
}

/// How a port is wired (sysfs `connect_type`, from ACPI `_UPC`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConnectType {
    /// A socket that a user can reach.
    Hotplug,
    /// A soldered device.
    Hardwired,
    /// No socket at all.
    NotUsed,
    /// The firmware does not say.
    #[default]
    Unknown,
}

/// Character device numbers of the node in `/dev/bus/usb`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeNumber {
    /// Major number, 189 for usbfs.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

/// One alternate setting of one interface of one configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterfaceFacts {
    /// `bConfigurationValue` of the configuration it belongs to.
    pub configuration: u8,
    /// `bInterfaceNumber`.
    pub number: u8,
    /// `bAlternateSetting`.
    pub alternate: u8,
    /// What it is.
    pub class: ClassTriple,
    /// The host driver that is bound now; only on the current alternate of the active configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
}

/// What the host does with a device. A rule names these in `allow_in_use`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostUseKind {
    /// A file system on it, or on something stacked on it, is mounted or is swap.
    Storage,
    /// LUKS, LVM, md or a loop device holds it, but nothing is mounted.
    StorageUnmounted,
    /// It carries the default route, or is part of a bond or bridge.
    Network,
    /// A network interface that is configured but down.
    NetDown,
    /// The last keyboard of the seat.
    Input,
    /// A console or a login runs on it.
    Console,
    /// It unlocks a volume of the host.
    SecurityKey,
    /// A program has it open (sound, video, serial).
    Open,
}

impl HostUseKind {
    /// All kinds, in the order of the documentation.
    pub const ALL: [Self; 8] = [
        Self::Storage,
        Self::StorageUnmounted,
        Self::Network,
        Self::NetDown,
        Self::Input,
        Self::Console,
        Self::SecurityKey,
        Self::Open,
    ];

    /// The word a policy uses.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Storage => "storage",
            Self::StorageUnmounted => "storage-unmounted",
            Self::Network => "network",
            Self::NetDown => "net-down",
            Self::Input => "input",
            Self::Console => "console",
            Self::SecurityKey => "security-key",
            Self::Open => "open",
        }
    }
}

impl fmt::Display for HostUseKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How strongly the host holds on to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostUseLevel {
    /// Not now; asked again when something changes.
    Busy,
    /// Losing it would hurt the host; only a rule that names the device and the use may take it.
    Protected,
}

/// One reason why the host keeps a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostUse {
    /// What the host does with it.
    pub kind: HostUseKind,
    /// How strongly it holds on.
    pub level: HostUseLevel,
    /// One line for people: `sdb1 is mounted on /home`.
    pub why: String,
}

/// Everything a rule can look at, and what the hand-over compares with the open file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceFacts {
    /// The kernel's name, last part of the syspath: `3-9.1`.
    pub sys_name: String,
    /// Bus and device number at the time of reading.
    pub address: BusAddress,
    /// Numbers of the device node.
    pub node: NodeNumber,
    /// The controller at the root.
    pub controller: Controller,
    /// The socket, with both halves where known.
    pub connector: Connector,
    /// Ports from the root hub down, on the bus the device is on now.
    pub chain: PortChain,
    /// Negotiated speed.
    pub speed: Speed,
    /// Vendor and product.
    pub id: VendorProduct,
    /// `bcdDevice`.
    pub bcd_device: u16,
    /// Serial number string, as the device sent it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Product string, as the device sent it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub product: Option<String>,
    /// Manufacturer string, as the device sent it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manufacturer: Option<String>,
    /// Class of the device descriptor.
    pub class: ClassTriple,
    /// All interfaces of all configurations with all their alternates.
    pub interfaces: Vec<InterfaceFacts>,
    /// `bConfigurationValue` that is set now; none on a claimed or unauthorized port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_configuration: Option<u8>,
    /// sysfs `authorized`.
    pub authorized: bool,
    /// sysfs `removable`.
    #[serde(default)]
    pub removable: Removable,
    /// `connect_type` of its port.
    #[serde(default)]
    pub connect_type: ConnectType,
    /// What the host does with it; empty means free.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_use: Vec<HostUse>,
}

/// What a device calls itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Strings {
    /// `iSerialNumber`.
    pub serial: Option<String>,
    /// `iProduct`.
    pub product: Option<String>,
    /// `iManufacturer`.
    pub manufacturer: Option<String>,
}

impl DeviceFacts {
    /// What the device calls itself.
    pub fn strings(&self) -> Strings {
        Strings {
            serial: self.serial.clone(),
            product: self.product.clone(),
            manufacturer: self.manufacturer.clone(),
        }
    }

    /// The same facts with other strings.
    pub fn set_strings(&mut self, strings: Strings) {
        Strings { serial: self.serial, product: self.product, manufacturer: self.manufacturer } = strings;
    }

    /// Whether it is a hub, or says of any interface that it is one. Such a device never leaves the host: through its
    /// file one can switch the ports of others.
    pub fn is_hub(&self) -> bool {
        self.class.class == CLASS_HUB || self.interfaces.iter().any(|one| one.class.class == CLASS_HUB)
    }

    /// Hubs between the root port and the device, 0..=6.
    pub fn depth(&self) -> u8 {
        u8::try_from(self.chain.ports().len().saturating_sub(1)).unwrap_or(u8::MAX)
    }

    /// The fingerprint of the device as it describes itself now.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut hash = Sha256::new();
        hash.update(b"usbpolicyd fp1\n");
        hash.update(self.id.vendor.to_be_bytes());
        hash.update(self.id.product.to_be_bytes());
        hash.update(self.bcd_device.to_be_bytes());
        for text in [&self.serial, &self.manufacturer, &self.product] {
            let (present, text) = text.as_deref().map_or((0, ""), |text| (1, text));
            hash.update([present]);
            hash.update((text.len() as u64).to_be_bytes());
            hash.update(text);
        }
        hash.update([self.class.class, self.class.subclass, self.class.protocol]);
        let mut classes: Vec<ClassTriple> = self.interfaces.iter().map(|one| one.class).collect();
        classes.sort_unstable();
        classes.dedup();
        for one in classes {
            hash.update([one.class, one.subclass, one.protocol]);
        }
        Fingerprint(hash.finalize().into())
    }
}

/// All devices of a host at one moment, with its ports: what `usbpolicyctl snapshot` writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// [`SNAPSHOT_VERSION`].
    pub version: u32,
    /// Buses and ports.
    pub topology: Topology,
    /// Devices, hubs included, root hubs not.
    pub devices: Vec<DeviceFacts>,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A stick at `pci-0000:00:14.0/usb2:PORT`, 0781:5581.
    pub(crate) fn stick(chain: &str) -> DeviceFacts {
        let port = format!("pci-0000:00:14.0/usb2:{chain}");
        DeviceFacts {
            sys_name: format!("1-{chain}"),
            address: BusAddress { bus: 1, device: 5 },
            node: NodeNumber { major: 189, minor: 4 },
            controller: "pci-0000:00:14.0".parse().unwrap(),
            connector: Connector::single(port.parse().unwrap()),
            chain: chain.parse().unwrap(),
            speed: Speed::High,
            id: "0781:5581".parse().unwrap(),
            bcd_device: 0x0100,
            serial: Some("4C530001".into()),
            product: Some("Ultra".into()),
            manufacturer: Some("SanDisk".into()),
            class: "00:00:00".parse().unwrap(),
            interfaces: vec![InterfaceFacts {
                configuration: 1,
                number: 0,
                alternate: 0,
                class: "08:06:50".parse().unwrap(),
                driver: None,
            }],
            active_configuration: Some(1),
            authorized: true,
            removable: Removable::Removable,
            connect_type: ConnectType::Hotplug,
            host_use: Vec::new(),
        }
    }

    #[test]
    fn fingerprint_ignores_speed_and_place() {
        let slow = stick("9");
        let mut fast = stick("4");
        fast.speed = Speed::Super;
        fast.connector = Connector::single("pci-0000:00:14.0/usb3:4".parse().unwrap());
        assert_eq!(slow.fingerprint(), fast.fingerprint());
    }

    #[test]
    fn fingerprint_sees_a_missing_serial_and_a_new_interface() {
        let was = stick("9").fingerprint();
        let mut mute = stick("9");
        mute.serial = None;
        let mut types = stick("9");
        types.interfaces[0].class = "03:01:01".parse().unwrap();
        assert!(mute.fingerprint() != was && types.fingerprint() != was);
        assert_eq!(was.to_string().parse::<Fingerprint>().unwrap(), was);
    }

    #[test]
    fn one_hub_interface_makes_a_hub() {
        let mut mixed = stick("9");
        assert!(!mixed.is_hub());
        mixed
            .interfaces
            .push(InterfaceFacts { class: "09:00:00".parse().unwrap(), ..mixed.interfaces[0].clone() });
        assert!(mixed.is_hub());
    }

    #[test]
    fn snapshot_reads_what_it_wrote() {
        let was = Snapshot { version: 1, topology: Topology::default(), devices: vec![stick("9.1")] };
        let text = serde_json::to_string(&was).unwrap();
        assert!(text.contains(r#""connector":["pci-0000:00:14.0/usb2:9.1"]"#), "{text}");
        assert_eq!(serde_json::from_str::<Snapshot>(&text).unwrap(), was);
    }
}
