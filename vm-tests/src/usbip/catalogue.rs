//! The ready-made devices by name.

use super::descriptors::Speed;
use super::model::Model;
use super::models::counted::{Bulk, Isochronous};
use super::models::disk::Disk;
use super::models::hostile::{Fault, Hostile, Lie};
use super::models::security_key::SecurityKey;
use super::models::serial::Serial;
use super::models::speaker::Speaker;
use super::models::usbtest::UsbTest;

/// What can be chosen of a device besides its name.
#[derive(Clone, Debug)]
pub struct Choice {
    /// Speed to attach at.
    pub speed: Speed,
    /// Serial number string.
    pub serial: String,
    /// wMaxPacketSize of isochronous endpoints.
    pub iso_packet: u16,
    /// bInterval of isochronous endpoints.
    pub iso_interval: u8,
}

/// Every name.
pub const NAMES: &[&str] = &[
    "usbtest",
    "bulk",
    "isochronous",
    "serial",
    "disk",
    "speaker",
    "security-key",
    "total-length-huge",
    "total-length-small",
    "length-zero",
    "length-one",
    "length-beyond-end",
    "interfaces-255",
    "endpoints",
    "superspeed-lies",
    "missing-configurations",
    "uas-choice",
    "babble",
    "broken",
    "stall",
    "silence",
    "stall-control",
    "silence-control",
    "identity",
];

/// The device of this name, if there is one.
pub fn make(name: &str, choice: &Choice) -> Option<Box<dyn Model>> {
    let Choice { speed, serial, iso_packet, iso_interval } = choice;
    let hostile =
        |lie, data, control| Box::new(Hostile::new(*speed, serial, lie, data, control)) as Box<dyn Model>;
    let lying = |lie| hostile(lie, Fault::None, Fault::None);
    let faulty = |data| hostile(Lie::None, data, Fault::None);
    let device: Box<dyn Model> = match name {
        "usbtest" => Box::new(UsbTest::new(*speed, serial)),
        "bulk" => Box::new(Bulk::new(*speed, serial)),
        "isochronous" => Box::new(Isochronous::new(*speed, *iso_packet, *iso_interval, serial)),
        "serial" => Box::new(Serial::new(*speed, serial)),
        "disk" => Box::new(Disk::new(*speed, serial)),
        "speaker" => Box::new(Speaker::new(*speed, serial)),
        "security-key" => Box::new(SecurityKey::new(*speed, serial)),
        "total-length-huge" => lying(Lie::TotalLengthHuge),
        "total-length-small" => lying(Lie::TotalLengthSmall),
        "length-zero" => lying(Lie::LengthZero),
        "length-one" => lying(Lie::LengthOne),
        "length-beyond-end" => lying(Lie::LengthBeyondEnd),
        "interfaces-255" => lying(Lie::Interfaces255),
        "endpoints" => lying(Lie::Endpoints),
        "superspeed-lies" => lying(Lie::Superspeed),
        "missing-configurations" => lying(Lie::MissingConfigurations),
        "uas-choice" => lying(Lie::UasChoice),
        "babble" => faulty(Fault::Babble),
        "broken" => faulty(Fault::Broken),
        "stall" => faulty(Fault::Stall),
        "silence" => faulty(Fault::Silence),
        "stall-control" => hostile(Lie::None, Fault::None, Fault::Stall),
        "silence-control" => hostile(Lie::None, Fault::None, Fault::Silence),
        "identity" => lying(Lie::None),
        _ => return None,
    };
    Some(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_makes_a_device() {
        let choice = Choice { speed: Speed::Super, serial: "1".to_owned(), iso_packet: 192, iso_interval: 4 };
        for name in NAMES {
            assert!(make(name, &choice).is_some(), "{name}");
        }
    }
}
