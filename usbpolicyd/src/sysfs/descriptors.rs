//! The descriptor blob of a device (`/sys/…/descriptors`, or a read of its open node), USB 2.0 §9.6.
//!
//! The kernel has checked and cut these bytes already (`config.c`), but the numbers in them are still the device's: an
//! endless or lying list ends the walk, it never fails the device.

use crate::facts::{ClassTriple, InterfaceFacts};

/// Length of a device descriptor (USB 2.0 Table 9-8).
pub const DEVICE_LENGTH: usize = 18;
const TYPE_CONFIGURATION: u8 = 2;
const TYPE_INTERFACE: u8 = 4;
/// Most interfaces with alternates that are kept; real devices stay below 100.
const INTERFACES_MAX: usize = 512;

/// What rules look at in the descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// `idVendor`.
    pub vendor: u16,
    /// `idProduct`.
    pub product: u16,
    /// `bcdDevice`.
    pub bcd_device: u16,
    /// Class of the device.
    pub class: ClassTriple,
    /// All interfaces of all configurations with all alternates; no drivers yet.
    pub interfaces: Vec<InterfaceFacts>,
}

/// Reads the blob. `None` only when it has no whole device descriptor.
pub fn parse(blob: &[u8]) -> Option<Parsed> {
    let device = blob.get(..DEVICE_LENGTH)?;
    let word = |at: usize| u16::from_le_bytes([device[at], device[at + 1]]);
    let mut parsed = Parsed {
        vendor: word(8),
        product: word(10),
        bcd_device: word(12),
        class: ClassTriple { class: device[4], subclass: device[5], protocol: device[6] },
        interfaces: Vec::new(),
    };
    let mut configuration = 0;
    let walk = Descriptors { rest: blob.get(DEVICE_LENGTH..).unwrap_or_default() };
    for one in walk {
        match (one[1], one.len()) {
            (TYPE_CONFIGURATION, 9..) => configuration = one[5],
            (TYPE_INTERFACE, 9..) if parsed.interfaces.len() < INTERFACES_MAX => {
                parsed.interfaces.push(InterfaceFacts {
                    configuration,
                    number: one[2],
                    alternate: one[3],
                    class: ClassTriple { class: one[5], subclass: one[6], protocol: one[7] },
                    driver: None,
                });
            }
            _ => {}
        }
    }
    Some(parsed)
}

/// Values of `bConfigurationValue`, in the order of the blob.
pub fn configurations(blob: &[u8]) -> impl Iterator<Item = u8> {
    let all = Descriptors { rest: blob.get(DEVICE_LENGTH..).unwrap_or_default() };
    all.filter(|one| one[1] == TYPE_CONFIGURATION && one.len() >= 9).map(|one| one[5])
}

/// Whether the blob read from an open node is of the device whose sysfs blob this is.
///
/// The two differ for a device whose configuration claims to be longer than it is: sysfs leaves the missing part out,
/// a read of the node skips it (`devio.c usbdev_read`, `sysfs.c descriptors_read`).
pub fn same_device(sysfs: &[u8], node: &[u8]) -> bool {
    let Some(device) = sysfs.get(..DEVICE_LENGTH) else { return false };
    if node.get(..DEVICE_LENGTH) != Some(device) {
        return false;
    }
    let mut at = DEVICE_LENGTH;
    let mut rest = sysfs.get(DEVICE_LENGTH..).unwrap_or_default();
    while let [_, TYPE_CONFIGURATION, low, high, ..] = rest {
        let claimed = usize::from(u16::from_le_bytes([*low, *high]));
        let length = configuration_length(rest).min(claimed);
        if node.get(at..at.saturating_add(length)) != rest.get(..length) || length == 0 {
            return false;
        }
        at = at.saturating_add(claimed);
        rest = rest.get(configuration_length(rest)..).unwrap_or_default();
    }
    rest.is_empty()
}

/// Bytes from a configuration descriptor to the next one, or to the end of the blob.
fn configuration_length(blob: &[u8]) -> usize {
    let mut walk = Descriptors { rest: blob };
    let mut length = walk.next().map_or(0, <[u8]>::len);
    loop {
        let before = walk.rest;
        match walk.next() {
            Some(one) if one[1] == TYPE_CONFIGURATION => return length,
            Some(one) => length += one.len(),
            // The tail is no descriptor: it belongs to this configuration.
            None => return length + before.len(),
        }
    }
}

/// Descriptor after descriptor, each at least two bytes long; ends where the lengths make no sense.
struct Descriptors<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Descriptors<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let length = usize::from(*self.rest.first()?);
        if length < 2 {
            return None;
        }
        let (one, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        Some(one)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A device descriptor of 0781:5581 and one configuration per list of interface classes.
    pub(crate) fn blob(configurations: &[&[u8]]) -> Vec<u8> {
        let mut blob = vec![18, 1, 0, 2, 0, 0, 0, 64, 0x81, 0x07, 0x81, 0x55, 0x00, 0x01, 1, 2, 3, 1];
        for (index, classes) in configurations.iter().enumerate() {
            let total = 9 + 9 * classes.len() as u8;
            blob.extend([9, 2, total, 0, classes.len() as u8, index as u8 + 1, 0, 0x80, 50]);
            for (number, class) in classes.iter().enumerate() {
                blob.extend([9, 4, number as u8, 0, 0, *class, 6, 80, 0]);
            }
        }
        blob
    }

    #[test]
    fn interfaces_carry_their_configuration() {
        let parsed = parse(&blob(&[&[8], &[3, 2]])).unwrap();
        assert_eq!((parsed.vendor, parsed.product, parsed.bcd_device), (0x0781, 0x5581, 0x0100));
        let seen: Vec<_> =
            parsed.interfaces.iter().map(|one| (one.configuration, one.number, one.class.class)).collect();
        assert_eq!(seen, [(1, 0, 8), (2, 0, 3), (2, 1, 2)]);
    }

    #[test]
    fn zero_length_descriptor_ends_the_walk() {
        let mut bytes = blob(&[&[8]]);
        bytes.extend([0, 4, 0, 0]);
        assert_eq!(parse(&bytes).unwrap().interfaces.len(), 1);
    }

    #[test]
    fn thousand_interfaces_are_cut() {
        let mut bytes = blob(&[]);
        bytes.extend([9, 4, 0, 0, 0, 8, 6, 80, 0].repeat(1000));
        assert_eq!(parse(&bytes).unwrap().interfaces.len(), INTERFACES_MAX);
    }

    #[test]
    fn other_serial_index_is_another_device() {
        let sysfs = blob(&[&[8], &[3]]);
        let mut node = sysfs.clone();
        assert!(same_device(&sysfs, &node));
        node[16] = 9;
        assert!(!same_device(&sysfs, &node));
        assert!(!same_device(&sysfs, &sysfs[..20]));
    }

    #[test]
    fn configuration_that_claims_too_much_leaves_a_hole_in_the_node() {
        let mut sysfs = blob(&[&[8], &[3]]);
        sysfs[DEVICE_LENGTH + 2] = 28;
        let mut node = sysfs.clone();
        let second = node.split_off(DEVICE_LENGTH + 18);
        node.extend([0; 10]);
        node.extend(second);
        assert!(same_device(&sysfs, &node));
    }

    proptest! {
        #[test]
        fn any_blob_is_read_without_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..400),
            other in proptest::collection::vec(any::<u8>(), 0..400),
        ) {
            let _ = parse(&bytes);
            let _ = same_device(&bytes, &other);
            let _ = configurations(&bytes).count();
        }

        #[test]
        fn a_blob_is_the_same_as_itself(tail in proptest::collection::vec(any::<u8>(), 0..60)) {
            let mut bytes = blob(&[&[8, 3]]);
            // Any class-specific descriptor after the interfaces, told in the total length.
            for chunk in tail.chunks(8) {
                bytes.extend([chunk.len() as u8 + 2, 0x24]);
                bytes.extend(chunk);
            }
            let total = (bytes.len() - DEVICE_LENGTH) as u16;
            bytes[DEVICE_LENGTH + 2..DEVICE_LENGTH + 4].copy_from_slice(&total.to_le_bytes());
            prop_assert!(same_device(&bytes, &bytes));
        }
    }
}
