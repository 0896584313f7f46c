//! Descriptors of a device (USB 2.0 §9.6, USB 3.2 §9.6): bytes to types. The bytes are the device's word, so nothing
//! in them is believed: a wrong length ends the walk, and what was found until then counts.

/// `USB_MAXCONFIG`: the kernel reads no more configurations.
const CONFIGURATIONS_MAX: u8 = 8;

const DEVICE: u8 = 1;
const CONFIGURATION: u8 = 2;
const INTERFACE: u8 = 4;
const ENDPOINT: u8 = 5;
const SUPERSPEED_COMPANION: u8 = 48;

/// A node's descriptors make no device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DescriptorError {
    /// No device descriptor of 18 bytes at the start.
    #[error("the first of {0} bytes are no device descriptor")]
    NoDevice(usize),
}

/// All descriptors of a device, as far as they make sense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptors {
    /// `bDeviceClass`.
    pub class: u8,
    /// `idVendor`.
    pub vendor: u16,
    /// `idProduct`.
    pub product: u16,
    /// At most eight.
    pub configurations: Vec<Configuration>,
}

/// One configuration with what belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration {
    /// `bConfigurationValue`.
    pub value: u8,
    /// Every alternate setting of every interface, in the device's order.
    pub alternates: Vec<Alternate>,
}

/// One alternate setting of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alternate {
    /// `bInterfaceNumber`.
    pub interface: u8,
    /// `bAlternateSetting`.
    pub setting: u8,
    /// `bInterfaceClass`, `bInterfaceSubClass`, `bInterfaceProtocol`.
    pub class: (u8, u8, u8),
    /// In the device's order.
    pub endpoints: Vec<Endpoint>,
}

/// One endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// `bEndpointAddress`.
    pub address: u8,
    /// `bmAttributes`.
    pub attributes: u8,
    /// `wMaxPacketSize`, all bits.
    pub max_packet_size: u16,
    /// `bInterval`.
    pub interval: u8,
    /// Bulk streams the companion descriptor offers: 2 to the power of this; 0 for none.
    pub streams_exponent: u8,
}

impl Endpoint {
    /// Whether it is a bulk endpoint.
    pub const fn is_bulk(&self) -> bool {
        self.attributes & 3 == 2
    }
}

impl Configuration {
    /// The interface numbers, each once.
    pub fn interfaces(&self) -> Vec<u8> {
        let mut numbers: Vec<u8> = self.alternates.iter().map(|alternate| alternate.interface).collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers
    }

    /// How many of `asked` streams these endpoints can use: a guest's stream array has a power of two of entries, the first
    /// of them reserved, so that it has room for more streams than a device has, and those are never named. Endpoints
    /// without any streams do not count; the kernel refuses them.
    pub fn usable_streams(&self, endpoints: &[u8], asked: u16) -> u16 {
        let offered = |address: u8| {
            let all = self.alternates.iter().flat_map(|alternate| &alternate.endpoints);
            all.filter(|endpoint| endpoint.address == address).map(|endpoint| endpoint.streams_exponent).max()
        };
        let exponents = endpoints.iter().filter_map(|&address| offered(address)).filter(|&offer| offer > 0);
        let fewest = exponents.map(|exponent| 1_u32 << exponent.min(16)).min();
        fewest.and_then(|fewest| u16::try_from(fewest).ok()).map_or(asked, |fewest| fewest.min(asked))
    }

    /// Takes one configuration descriptor and what follows it; it may be cut short.
    fn parse(bytes: &[u8]) -> Option<Self> {
        if bytes.len() < 9 || bytes[1] != CONFIGURATION {
            return None;
        }
        let mut alternates: Vec<Alternate> = Vec::new();
        for (_, descriptor) in walk(bytes) {
            match (descriptor[1], descriptor.len()) {
                (INTERFACE, 9..) => alternates.push(Alternate {
                    interface: descriptor[2],
                    setting: descriptor[3],
                    class: (descriptor[5], descriptor[6], descriptor[7]),
                    endpoints: Vec::new(),
                }),
                (ENDPOINT, 7..) => {
                    if let Some(alternate) = alternates.last_mut() {
                        alternate.endpoints.push(Endpoint {
                            address: descriptor[2],
                            attributes: descriptor[3],
                            max_packet_size: u16::from_le_bytes([descriptor[4], descriptor[5]]),
                            interval: descriptor[6],
                            streams_exponent: 0,
                        });
                    }
                }
                (SUPERSPEED_COMPANION, 6..) => {
                    let endpoint = alternates.last_mut().and_then(|alternate| alternate.endpoints.last_mut());
                    if let Some(endpoint) = endpoint.filter(|endpoint| endpoint.is_bulk()) {
                        endpoint.streams_exponent = (descriptor[3] & 0x1f).min(16);
                    }
                }
                _ => {}
            }
        }
        Some(Self { value: bytes[5], alternates })
    }
}

impl Descriptors {
    /// Takes what a usbfs node gives to a reader (`devio.c usbdev_read`): the device descriptor, then each
    /// configuration in as many bytes as its wTotalLength says; bytes that the kernel does not have are zero.
    pub fn parse(bytes: &[u8]) -> Result<Self, DescriptorError> {
        let (device, mut rest) = bytes.split_at_checked(18).ok_or(DescriptorError::NoDevice(bytes.len()))?;
        if device[0] < 18 || device[1] != DEVICE {
            return Err(DescriptorError::NoDevice(bytes.len()));
        }
        let word = |at: usize| u16::from_le_bytes([device[at], device[at + 1]]);
        let mut configurations = Vec::new();
        for _ in 0..device[17].min(CONFIGURATIONS_MAX) {
            let Some(&[low, high]) = rest.get(2..4) else { break };
            let total = usize::from(u16::from_le_bytes([low, high])).min(rest.len());
            let (this, next) = rest.split_at(total);
            rest = next;
            match Configuration::parse(this) {
                Some(configuration) => configurations.push(configuration),
                None => break,
            }
        }
        Ok(Self { class: device[4], vendor: word(8), product: word(10), configurations })
    }

    /// The configuration of this value.
    pub fn configuration(&self, value: u8) -> Option<&Configuration> {
        self.configurations.iter().find(|configuration| configuration.value == value)
    }
}

/// The descriptors in `bytes`, each with its offset and at least two bytes long. Ends at the first whose bLength is
/// wrong; at most `bytes.len() / 2` turns.
pub(super) fn walk(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut offset = 0;
    std::iter::from_fn(move || {
        let rest = bytes.get(offset..)?;
        let length = usize::from(*rest.first()?);
        let descriptor = rest.get(..length).filter(|descriptor| descriptor.len() >= 2)?;
        let at = offset;
        offset += length;
        Some((at, descriptor))
    })
}

#[cfg(test)]
#[path = "descriptors/tests.rs"]
mod tests;
