//! Builds descriptors (USB 2.0 §9.6, USB 3.2 §9.6), true ones. A hostile device edits the finished bytes.

/// Speed of a device, with the number that `vhci_hcd` and the kernel use (`enum usb_device_speed`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speed {
    /// 1.5 Mbit/s.
    Low = 1,
    /// 12 Mbit/s.
    Full = 2,
    /// 480 Mbit/s.
    High = 3,
    /// 5 Gbit/s.
    Super = 5,
}

impl Speed {
    /// Packet size of bulk endpoints.
    pub const fn bulk_packet(self) -> u16 {
        match self {
            Self::Low => 8,
            Self::Full => 64,
            Self::High => 512,
            Self::Super => 1024,
        }
    }

    const fn bcd_usb(self) -> u16 {
        match self {
            Self::Low | Self::Full => 0x0110,
            Self::High => 0x0200,
            Self::Super => 0x0320,
        }
    }

    /// bMaxPacketSize0: at SuperSpeed an exponent of two.
    const fn packet0(self) -> u8 {
        match self {
            Self::Low => 8,
            Self::Full | Self::High => 64,
            Self::Super => 9,
        }
    }
}

/// What an endpoint moves (bmAttributes bits 1:0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// In every interval, never repeated.
    Isochronous = 1,
    /// As it comes.
    Bulk = 2,
    /// At least once an interval.
    Interrupt = 3,
}

/// One endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Endpoint {
    /// Number with direction bit.
    pub address: u8,
    /// Its kind.
    pub kind: Kind,
    /// wMaxPacketSize with the additional transactions of high speed in bits 12:11.
    pub max_packet: u16,
    /// bInterval as it stands in the descriptor.
    pub interval: u8,
    /// Class-specific descriptors behind it.
    pub extra: &'static [u8],
}

impl Endpoint {
    /// A bulk endpoint.
    pub const fn bulk(address: u8, speed: Speed) -> Self {
        Self { address, kind: Kind::Bulk, max_packet: speed.bulk_packet(), interval: 0, extra: &[] }
    }

    /// An interrupt endpoint.
    pub const fn interrupt(address: u8, max_packet: u16, interval: u8) -> Self {
        Self { address, kind: Kind::Interrupt, max_packet, interval, extra: &[] }
    }

    /// An isochronous endpoint, asynchronous, for data.
    pub const fn isochronous(address: u8, max_packet: u16, interval: u8) -> Self {
        Self { address, kind: Kind::Isochronous, max_packet, interval, extra: &[] }
    }

    /// The same with class-specific descriptors behind it.
    pub const fn with(self, extra: &'static [u8]) -> Self {
        Self { extra, ..self }
    }

    fn encode(self, speed: Speed, to: &mut Vec<u8>) {
        let [low, high] = self.max_packet.to_le_bytes();
        // Asynchronous synchronization type for isochronous endpoints.
        let attributes = self.kind as u8 | if self.kind == Kind::Isochronous { 0x04 } else { 0 };
        to.extend_from_slice(&[7, 5, self.address, attributes, low, high, self.interval]);
        if speed == Speed::Super {
            // SuperSpeed endpoint companion: no burst, no streams, one packet an interval.
            let [low, high] = if self.kind == Kind::Bulk { [0, 0] } else { [low, high] };
            to.extend_from_slice(&[6, 48, 0, 0, low, high]);
        }
        to.extend_from_slice(self.extra);
    }
}

/// One alternate setting of one interface.
#[derive(Clone, Debug, Default)]
pub struct Setting {
    /// bInterfaceNumber.
    pub interface: u8,
    /// bAlternateSetting.
    pub alternate: u8,
    /// Class, subclass, protocol.
    pub class: [u8; 3],
    /// Class-specific descriptors between interface and endpoints.
    pub extra: Vec<u8>,
    /// Its endpoints.
    pub endpoints: Vec<Endpoint>,
}

impl Setting {
    /// Setting `alternate` of `interface`, vendor-specific.
    pub fn vendor(interface: u8, alternate: u8, endpoints: &[Endpoint]) -> Self {
        Self { interface, alternate, class: [0xff, 0, 0], extra: Vec::new(), endpoints: endpoints.to_vec() }
    }
}

/// Who a device says it is, and what it has.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Speed it is attached at.
    pub speed: Speed,
    /// idVendor.
    pub vendor: u16,
    /// idProduct.
    pub product: u16,
    /// Class, subclass, protocol of the device.
    pub class: [u8; 3],
    /// Serial number string.
    pub serial: String,
}

/// The bytes that a device answers to GET_DESCRIPTOR.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// Device descriptor.
    pub device: Vec<u8>,
    /// Each configuration with all that follows it.
    pub configurations: Vec<Vec<u8>>,
    /// Binary object store; none below USB 2.1.
    pub bos: Option<Vec<u8>>,
    /// String descriptors from index 0 (languages) on.
    pub strings: Vec<Vec<u8>>,
    /// High speed only: device qualifier, and the configuration as it would be at full speed (USB 2.0 §9.6.2, §9.6.4).
    pub other_speed: Option<[Vec<u8>; 2]>,
}

impl Image {
    /// A device of one configuration with `settings`; settings of one interface stand next to each other.
    pub fn new(identity: &Identity, settings: &[Setting]) -> Self {
        let speed = identity.speed;
        let other_speed = (speed == Speed::High).then(|| {
            let [class, subclass, protocol] = identity.class;
            let qualifier = vec![10, 6, 0x00, 0x02, class, subclass, protocol, Speed::Full.packet0(), 1, 0];
            let mut configuration = configuration(Speed::Full, &slower(settings));
            configuration[1] = 7;
            [qualifier, configuration]
        });
        let [usb, vendor, product] =
            [speed.bcd_usb(), identity.vendor, identity.product].map(u16::to_le_bytes);
        let [class, subclass, protocol] = identity.class;
        let mut device = vec![18, 1, usb[0], usb[1], class, subclass, protocol, speed.packet0()];
        // Release 1.00; strings 1, 2, 3; one configuration.
        device.extend_from_slice(&[vendor[0], vendor[1], product[0], product[1], 0x00, 0x01, 1, 2, 3, 1]);
        Self {
            device,
            configurations: vec![configuration(speed, settings)],
            bos: (speed == Speed::Super).then(superspeed_bos),
            strings: vec![
                vec![4, 3, 0x09, 0x04],
                string("vm-tests"),
                string("device under control of a test"),
                string(&identity.serial),
            ],
            other_speed,
        }
    }

    /// The descriptor that a GET_DESCRIPTOR with this wValue gets.
    pub fn find(&self, value: u16) -> Option<&[u8]> {
        let [index, kind] = value.to_le_bytes();
        let found = match kind {
            1 => Some(&self.device),
            2 => self.configurations.get(usize::from(index)),
            3 => self.strings.get(usize::from(index)),
            6 => self.other_speed.as_ref().map(|[qualifier, _]| qualifier),
            7 => self.other_speed.as_ref().map(|[_, configuration]| configuration),
            15 => self.bos.as_ref(),
            _ => None,
        };
        found.map(Vec::as_slice)
    }

    /// What the configuration with this value has; the walk ends at the first descriptor that is none.
    pub fn settings(&self, value: u8) -> Vec<Summary> {
        let configuration = self.configurations.iter().find(|bytes| bytes.get(5) == Some(&value));
        let mut rest = configuration.map_or(&[][..], Vec::as_slice);
        let mut settings: Vec<Summary> = Vec::new();
        while let [length, kind, ..] = *rest {
            // A length of 0 or 1 would keep the walk where it is.
            let Some((descriptor, next)) = rest.split_at_checked(usize::from(length)).filter(|_| length >= 2)
            else {
                break;
            };
            match (kind, descriptor) {
                (4, &[_, _, interface, alternate, ..]) => {
                    settings.push(Summary { interface, alternate, endpoints: Vec::new() });
                }
                (5, &[_, _, address, ..]) => settings.iter_mut().last().into_iter().for_each(|setting| {
                    setting.endpoints.push(address);
                }),
                _ => {}
            }
            rest = next;
        }
        settings
    }
}

/// One alternate setting, as read back from descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// bInterfaceNumber.
    pub interface: u8,
    /// bAlternateSetting.
    pub alternate: u8,
    /// Addresses of its endpoints.
    pub endpoints: Vec<u8>,
}

/// The same settings with packets that fit full speed.
fn slower(settings: &[Setting]) -> Vec<Setting> {
    let mut settings = settings.to_vec();
    for endpoint in settings.iter_mut().flat_map(|setting| &mut setting.endpoints) {
        endpoint.max_packet = endpoint.max_packet.min(Speed::Full.bulk_packet());
    }
    settings
}

fn configuration(speed: Speed, settings: &[Setting]) -> Vec<u8> {
    let interfaces = settings.iter().filter(|setting| setting.alternate == 0).count() as u8;
    // Self-powered with remote wakeup; 2 mA, in units of 2 mA (8 mA at SuperSpeed).
    let mut bytes = vec![9, 2, 0, 0, interfaces, 1, 0, 0xe0, 1];
    for setting in settings {
        let [class, subclass, protocol] = setting.class;
        let count = setting.endpoints.len() as u8;
        bytes.extend_from_slice(&[
            9,
            4,
            setting.interface,
            setting.alternate,
            count,
            class,
            subclass,
            protocol,
            0,
        ]);
        bytes.extend_from_slice(&setting.extra);
        for endpoint in &setting.endpoints {
            endpoint.encode(speed, &mut bytes);
        }
    }
    let total = (bytes.len() as u16).to_le_bytes();
    bytes[2..4].copy_from_slice(&total);
    bytes
}

fn superspeed_bos() -> Vec<u8> {
    let mut bytes = vec![5, 15, 22, 0, 2];
    bytes.extend_from_slice(&[7, 16, 2, 0, 0, 0, 0]); // USB 2.0 extension: no link power management
    bytes.extend_from_slice(&[10, 16, 3, 0, 0x0e, 0, 3, 0, 0, 0]); // SuperSpeed: full speed and above
    bytes
}

fn string(text: &str) -> Vec<u8> {
    let units: Vec<u8> = text.encode_utf16().take(126).flat_map(u16::to_le_bytes).collect();
    let mut bytes = vec![units.len() as u8 + 2, 3];
    bytes.extend(units);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(speed: Speed) -> Identity {
        Identity { speed, vendor: 0x0525, product: 0xa4a0, class: [0xff, 0, 0], serial: "1".to_owned() }
    }

    #[test]
    fn total_length_is_the_length_of_the_whole_configuration() {
        let settings =
            [Setting::vendor(0, 0, &[Endpoint::bulk(0x81, Speed::High), Endpoint::bulk(2, Speed::High)])];
        let image = Image::new(&identity(Speed::High), &settings);
        assert_eq!(image.configurations[0][..5], [9, 2, 32, 0, 1]);
        assert_eq!(image.configurations[0].len(), 32);
        assert!(image.bos.is_none());
    }

    #[test]
    fn every_superspeed_endpoint_has_a_companion() {
        let settings = [Setting::vendor(0, 0, &[Endpoint::bulk(0x81, Speed::Super)])];
        let image = Image::new(&identity(Speed::Super), &settings);
        assert_eq!(image.configurations[0][18..], [7, 5, 0x81, 2, 0, 4, 0, 6, 48, 0, 0, 0, 0]);
        assert_eq!(usize::from(image.bos.as_ref().unwrap()[2]), image.bos.unwrap().len());
    }

    #[test]
    fn settings_are_read_back() {
        let settings = [
            Setting::vendor(0, 0, &[]),
            Setting::vendor(0, 1, &[Endpoint::isochronous(0x83, 192, 4)]),
            Setting::vendor(1, 0, &[Endpoint::bulk(2, Speed::High)]),
        ];
        let image = Image::new(&identity(Speed::High), &settings);
        let found: Vec<_> =
            image.settings(1).into_iter().map(|s| (s.interface, s.alternate, s.endpoints)).collect();
        assert_eq!(found, [(0, 0, vec![]), (0, 1, vec![0x83]), (1, 0, vec![2])]);
        assert_eq!(image.settings(2), []);
    }

    #[test]
    fn walk_over_broken_bytes_ends() {
        let image =
            Image { configurations: vec![vec![9, 2, 0, 0, 1, 1, 0, 0, 0, 0, 4, 0, 0]], ..Image::default() };
        assert_eq!(image.settings(1), []);
    }
}
