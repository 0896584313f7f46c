//! How both daemons name devices, ports and machines.
//!
//! Everything that comes from outside is checked here once and carried as a type afterwards.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A device as `usbpolicyd` names it to `usbvfiod`: unique on this host until the next boot, never a bus and device
/// number (the kernel reuses those). Assigned by `usbpolicyd`; a new number for each plug-in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeviceId(pub u64);

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// Bus and device number as in `/dev/bus/usb/BBB/DDD`. Good for the moment only: device numbers wrap at 127.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BusAddress {
    /// Bus number, 1 and up. The kernel counts buses in a `u32` but numbers them below 64.
    pub bus: u32,
    /// Device number on that bus, 1..=127.
    pub device: u32,
}

impl fmt::Display for BusAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:03}:{:03}", self.bus, self.device)
    }
}

/// Speed a device runs at on the host (`enum usb_device_speed` of `linux/usb/ch9.h`; `USBDEVFS_GET_SPEED`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Speed {
    /// 1.5 Mb/s, USB 1.0.
    Low,
    /// 12 Mb/s, USB 1.1.
    Full,
    /// 480 Mb/s, USB 2.0.
    High,
    /// 5 Gb/s, USB 3.0.
    Super,
    /// 10 Gb/s and more, USB 3.1.
    SuperPlus,
}

impl Speed {
    /// Takes the answer of `USBDEVFS_GET_SPEED`. Wireless USB (4) and unknown (0) are not speeds we serve.
    pub const fn from_kernel(raw: u32) -> Option<Self> {
        match raw {
            1 => Some(Self::Low),
            2 => Some(Self::Full),
            3 => Some(Self::High),
            5 => Some(Self::Super),
            6 => Some(Self::SuperPlus),
            _ => None,
        }
    }

    /// Takes the sysfs attribute `speed`, which is in Mb/s.
    pub fn from_sysfs(text: &str) -> Option<Self> {
        match text.trim() {
            "1.5" => Some(Self::Low),
            "12" => Some(Self::Full),
            "480" => Some(Self::High),
            "5000" => Some(Self::Super),
            "10000" | "20000" => Some(Self::SuperPlus),
            _ => None,
        }
    }

    /// Whether the device hangs on a USB 3 port.
    pub const fn is_usb3(self) -> bool {
        matches!(self, Self::Super | Self::SuperPlus)
    }
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Low => "low",
            Self::Full => "full",
            Self::High => "high",
            Self::Super => "super",
            Self::SuperPlus => "super-plus",
        })
    }
}

/// Vendor and product id. Written `vvvv:pppp` in lower-case hex everywhere; zero is a value like any other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VendorProduct {
    /// `idVendor`.
    pub vendor: u16,
    /// `idProduct`.
    pub product: u16,
}

impl fmt::Display for VendorProduct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:04x}", self.vendor, self.product)
    }
}

/// A text is not of the form its type wants.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Not `vvvv:pppp`.
    #[error("{0:?} is not vendor:product, four hex digits each, like \"0781:5581\"")]
    VendorProduct(String),
    /// Not `9.1`.
    #[error("{0:?} is not a port chain, 1 to 7 numbers of 1 to 255 with dots between, like \"9.1\"")]
    PortChain(String),
    /// Not a VM name.
    #[error("{0:?} is not a VM name: 1 to 32 of a-z, 0-9 and '-', the first no '-'")]
    VmName(String),
}

impl FromStr for VendorProduct {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let bad = || IdError::VendorProduct(text.to_owned());
        let hex = |part: &str| {
            let digits = part.len() == 4 && part.bytes().all(|b| b.is_ascii_hexdigit());
            digits.then(|| u16::from_str_radix(part, 16).ok()).flatten().ok_or_else(bad)
        };
        let (vendor, product) = text.split_once(':').ok_or_else(bad)?;
        Ok(Self { vendor: hex(vendor)?, product: hex(product)? })
    }
}

/// The longest way from a root port to a device: the root port and six hubs (`struct usbdevfs_conninfo_ex`).
pub const PORT_CHAIN_MAX: usize = 7;

/// Port numbers from the root hub down to the device, `9.1`: root port 9, then port 1 of the hub there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortChain(Vec<u8>);

impl PortChain {
    /// Takes 1 to [`PORT_CHAIN_MAX`] port numbers, none of them 0.
    pub fn new(ports: &[u8]) -> Option<Self> {
        let fits = !ports.is_empty() && ports.len() <= PORT_CHAIN_MAX && !ports.contains(&0);
        fits.then(|| Self(ports.to_vec()))
    }

    /// The port numbers, root port first.
    pub fn ports(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for PortChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, port) in self.0.iter().enumerate() {
            if position > 0 {
                f.write_str(".")?;
            }
            write!(f, "{port}")?;
        }
        Ok(())
    }
}

impl FromStr for PortChain {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let bad = || IdError::PortChain(text.to_owned());
        let mut ports = Vec::with_capacity(PORT_CHAIN_MAX);
        for part in text.split('.').take(PORT_CHAIN_MAX + 1) {
            if part.starts_with('+') {
                return Err(bad());
            }
            ports.push(part.parse::<u8>().map_err(|_| bad())?);
        }
        Self::new(&ports).ok_or_else(bad)
    }
}

/// Name of a virtual machine: `[a-z0-9][a-z0-9-]{0,31}`. It is also a directory below `/run/usbvfiod` and a systemd
/// instance name, so nothing else gets in.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmName(String);

impl VmName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for VmName {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let fits = (1..=32).contains(&text.len())
            && !text.starts_with('-')
            && text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        fits.then(|| Self(text.to_owned())).ok_or_else(|| IdError::VmName(text.to_owned()))
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

serde_as_text!(VendorProduct, PortChain, VmName);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vendor_product_prints_as_it_parses() {
        let id: VendorProduct = "0781:5581".parse().unwrap();
        assert_eq!(id.to_string(), "0781:5581");
        assert_eq!(id.vendor, 0x0781);
    }

    #[test]
    fn vendor_product_of_other_forms_is_refused() {
        for text in ["", ":", "781:5581", "0781-5581", "0781:558g", "+781:5581", "0781:5581:1", "0781:55810"]
        {
            assert_eq!(text.parse::<VendorProduct>(), Err(IdError::VendorProduct(text.to_owned())));
        }
    }

    #[test]
    fn port_chain_of_other_forms_is_refused() {
        for text in ["", ".", "0", "1.0", "1..2", "256", "+1", "1.2.3.4.5.6.7.8", "-1", " 1"] {
            assert_eq!(text.parse::<PortChain>(), Err(IdError::PortChain(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn vm_names_cannot_leave_their_directory() {
        for text in ["", ".", "..", "a/b", "-a", "A", "a_b", "a.b", "0123456789012345678901234567890123"] {
            assert_eq!(text.parse::<VmName>(), Err(IdError::VmName(text.to_owned())), "{text}");
        }
        assert_eq!("vm-1".parse::<VmName>().unwrap().as_str(), "vm-1");
    }
}
