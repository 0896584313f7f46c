//! Devices that lie, break or fall silent.

use serde_json::{Value, json};

use super::counted::VENDOR;
use crate::usbip::descriptors::{Endpoint, Identity, Image, Setting, Speed};
use crate::usbip::model::{Model, Reply};
use crate::usbip::wire::Setup;

/// Product number of the devices here.
pub const PRODUCT: u16 = 0x0666;
/// Product number after `new-identity`.
pub const OTHER_PRODUCT: u16 = 0x0667;

/// What is wrong with the descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// Nothing.
    None,
    /// wTotalLength is 65535.
    TotalLengthHuge,
    /// wTotalLength ends in the middle of the first endpoint.
    TotalLengthSmall,
    /// A descriptor of bLength 0 in front of the interface.
    LengthZero,
    /// A descriptor of bLength 1.
    LengthOne,
    /// The last descriptor is longer than what is left.
    LengthBeyondEnd,
    /// 255 interfaces, most with numbers that nobody can claim.
    Interfaces255,
    /// Endpoints 0x80 and 0, one address twice, packet size 0, interval 255.
    Endpoints,
    /// SuperSpeed without companions and with garbage in the BOS.
    Superspeed,
    /// bNumConfigurations 8 with one configuration to be had.
    MissingConfigurations,
    /// Storage that says it has UAS besides bulk-only, but has no streams.
    UasChoice,
}

/// What it does to transfers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Works: a source of zeros and a sink.
    None,
    /// More than asked for.
    Babble,
    /// EPROTO, at once.
    Broken,
    /// STALL.
    Stall,
    /// Nothing, for ever.
    Silence,
}

impl Fault {
    fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "none" => Self::None,
            "babble" => Self::Babble,
            "broken" => Self::Broken,
            "stall" => Self::Stall,
            "silence" => Self::Silence,
            _ => return None,
        })
    }

    const fn reply(self) -> Option<Reply> {
        match self {
            Self::None => None,
            Self::Babble => Some(Reply::Babble),
            Self::Broken => Some(Reply::Broken),
            Self::Stall => Some(Reply::Stall),
            Self::Silence => Some(Reply::Nak),
        }
    }
}

/// A device that must not hurt anybody. Words of the test: `data FAULT`, `control FAULT`, `new-identity`.
pub struct Hostile {
    speed: Speed,
    image: Image,
    other: Image,
    data: Fault,
    /// From the first configuration on, so that the host gets to know the device at all.
    control: Fault,
    is_configured: bool,
    faults: u64,
}

impl Hostile {
    /// A device with these faults.
    pub fn new(speed: Speed, serial: &str, lie: Lie, data: Fault, control: Fault) -> Self {
        let [image, other] = [PRODUCT, OTHER_PRODUCT].map(|product| {
            let class = [0xff, 0, 0];
            let identity = Identity { speed, vendor: VENDOR, product, class, serial: serial.to_owned() };
            Image::new(&identity, &settings(speed, lie))
        });
        Self { speed, image: distort(image, lie), other, data, control, is_configured: false, faults: 0 }
    }

    fn fault(&mut self, fault: Fault) -> Option<Reply> {
        let reply = fault.reply();
        self.faults += u64::from(reply.is_some());
        reply
    }
}

impl Model for Hostile {
    fn speed(&self) -> Speed {
        self.speed
    }

    fn image(&self) -> &Image {
        &self.image
    }

    fn control(&mut self, _setup: &Setup, _data: &[u8]) -> Reply {
        let fault = if self.is_configured { self.control } else { Fault::None };
        self.fault(fault).unwrap_or(Reply::Standard)
    }

    fn read(&mut self, _endpoint: u8, room: usize) -> Reply {
        self.fault(self.data).unwrap_or_else(|| Reply::Done(vec![0; room]))
    }

    fn write(&mut self, _endpoint: u8, _data: &[u8]) -> Reply {
        self.fault(self.data).unwrap_or(Reply::Done(Vec::new()))
    }

    fn setting_chosen(&mut self, _interface: u8, _alternate: u8) {
        self.is_configured = true;
    }

    fn order(&mut self, words: &[&str]) -> bool {
        match *words {
            ["data", fault] => Fault::parse(fault).map(|fault| self.data = fault).is_some(),
            ["control", fault] => Fault::parse(fault).map(|fault| self.control = fault).is_some(),
            ["new-identity"] => {
                std::mem::swap(&mut self.image, &mut self.other);
                true
            }
            _ => false,
        }
    }

    fn statistics(&self) -> Value {
        json!({ "faults": self.faults })
    }
}

fn settings(speed: Speed, lie: Lie) -> Vec<Setting> {
    let bulk = [Endpoint::bulk(0x81, speed), Endpoint::bulk(0x02, speed)];
    match lie {
        Lie::Interfaces255 => (0..255).map(|number| Setting::vendor(number, 0, &[])).collect(),
        Lie::Endpoints => {
            let zero = Endpoint { max_packet: 0, ..Endpoint::bulk(0x83, speed) };
            let odd = [Endpoint::bulk(0x80, speed), Endpoint::bulk(0x00, speed), bulk[0], zero];
            let slow = Endpoint::interrupt(0x84, 0x1fff, 255);
            vec![Setting::vendor(0, 0, &[&bulk[..], &odd, &[slow]].concat()), Setting::vendor(0, 0, &bulk)]
        }
        Lie::UasChoice => {
            let pipes = [0x01, 0x82, 0x83, 0x04].map(|address| Endpoint::bulk(address, speed));
            vec![
                Setting { class: [8, 6, 0x50], ..Setting::vendor(0, 0, &bulk) },
                Setting { class: [8, 6, 0x62], ..Setting::vendor(0, 1, &pipes) },
            ]
        }
        _ => vec![Setting::vendor(0, 0, &bulk)],
    }
}

fn distort(mut image: Image, lie: Lie) -> Image {
    let bytes = &mut image.configurations[0];
    match lie {
        Lie::None | Lie::Interfaces255 | Lie::Endpoints | Lie::UasChoice => {}
        Lie::TotalLengthHuge => bytes[2..4].copy_from_slice(&[0xff, 0xff]),
        Lie::TotalLengthSmall => bytes[2..4].copy_from_slice(&[9 + 9 + 3, 0]),
        Lie::LengthZero => insert(bytes, &[0, 4, 0, 0]),
        Lie::LengthOne => insert(bytes, &[1]),
        Lie::LengthBeyondEnd => {
            let at = bytes.len() - 7;
            bytes[at] = 255;
        }
        Lie::Superspeed => {
            // Type 48 becomes one that nobody knows.
            let companions: Vec<usize> =
                (18..bytes.len()).filter(|&at| bytes[at..].starts_with(&[6, 48])).collect();
            companions.into_iter().for_each(|at| bytes[at + 1] = 0x7e);
            image.bos = Some(vec![5, 15, 255, 255, 255, 0, 16, 3, 255, 16, 3]);
        }
        Lie::MissingConfigurations => image.device[17] = 8,
    }
    image
}

/// Puts bytes between the configuration descriptor and what follows it, and keeps wTotalLength true.
fn insert(bytes: &mut Vec<u8>, extra: &[u8]) {
    bytes.splice(9..9, extra.iter().copied());
    let total = (bytes.len() as u16).to_le_bytes();
    bytes[2..4].copy_from_slice(&total);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(lie: Lie) -> Hostile {
        Hostile::new(Speed::High, "1", lie, Fault::None, Fault::None)
    }

    #[test]
    fn lies_stand_in_the_bytes() {
        assert_eq!(device(Lie::TotalLengthHuge).image.configurations[0][2..4], [0xff, 0xff]);
        assert_eq!(device(Lie::LengthZero).image.configurations[0][9], 0);
        assert_eq!(device(Lie::Interfaces255).image.configurations[0][4], 255);
    }

    #[test]
    fn new_identity_is_another_product() {
        let mut device = device(Lie::None);
        assert!(device.order(&["new-identity"]));
        assert_eq!(device.image.device[10..12], OTHER_PRODUCT.to_le_bytes());
    }

    #[test]
    fn control_faults_wait_for_the_configuration() {
        let mut device = Hostile::new(Speed::High, "1", Lie::None, Fault::None, Fault::Stall);
        assert_eq!(device.control(&Setup::default(), &[]), Reply::Standard);
        device.setting_chosen(0, 0);
        assert_eq!(device.control(&Setup::default(), &[]), Reply::Stall);
    }
}
