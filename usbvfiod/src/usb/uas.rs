//! USB Attached SCSI without streams: hiding the alternate setting.
//!
//! At SuperSpeed UAS needs streams. Where the host cannot give them (vhci, some host controllers), a guest that sees
//! the alternate setting tries it, fails, and does not fall back. So the guest is shown another protocol number there
//! and takes the bulk-only setting of the same interface. No length changes.

use super::descriptors::{Alternate, Configuration, Descriptors, walk};

const BULK_ONLY: (u8, u8, u8) = (8, 6, 0x50);
const UAS: (u8, u8, u8) = (8, 6, 0x62);
/// Mass storage, SCSI, vendor specific: nobody's driver.
const NOBODYS_PROTOCOL: u8 = 0xff;

/// The interfaces of all configurations that have both, bulk-only and UAS.
pub(super) fn interfaces_with_a_choice(descriptors: &Descriptors) -> Vec<u8> {
    let mut numbers: Vec<u8> =
        descriptors.configurations.iter().flat_map(|c| settings(c).map(|uas| uas.interface)).collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

/// The UAS settings of a configuration whose interface has a bulk-only one too.
pub(super) fn settings(configuration: &Configuration) -> impl Iterator<Item = &Alternate> {
    configuration.alternates.iter().filter(|uas| {
        uas.class == UAS
            && configuration.alternates.iter().any(|a| a.interface == uas.interface && a.class == BULK_ONLY)
    })
}

/// Whether a setup packet asks for a configuration descriptor (GET_DESCRIPTOR, USB 2.0 §9.4.3).
pub(super) fn asks_for_configuration(setup: [u8; 8]) -> bool {
    setup[0] == 0x80 && setup[1] == 6 && setup[3] == 2
}

/// Changes the protocol of UAS settings of these interfaces in a configuration descriptor, which may be cut short
/// anywhere. The bytes are the device's word.
pub(super) fn hide(interfaces: &[u8], configuration: &mut [u8]) {
    let end = walk(configuration).last().map_or(0, |(at, descriptor)| at + descriptor.len());
    let mut found: Vec<usize> = walk(configuration).map(|(at, _)| at).collect();
    // The last one may be cut: its bLength then points beyond the end, but the protocol byte may be there.
    found.push(end);
    for at in found {
        let Some(descriptor) = configuration.get_mut(at..).and_then(|rest| rest.get_mut(..8)) else {
            continue;
        };
        let class = (descriptor[5], descriptor[6], descriptor[7]);
        if descriptor[0] >= 9 && descriptor[1] == 4 && class == UAS && interfaces.contains(&descriptor[2]) {
            descriptor[7] = NOBODYS_PROTOCOL;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bulk-only in alternate 0, UAS in alternate 1, one endpoint each.
    const STORAGE: [u8; 41] = [
        9, 2, 41, 0, 1, 1, 0, 0x80, 50, 9, 4, 3, 0, 1, 8, 6, 0x50, 0, 7, 5, 0x81, 2, 0, 2, 0, 9, 4, 3, 1, 1,
        8, 6, 0x62, 0, 7, 5, 0x81, 2, 0, 2, 0,
    ];
    const PROTOCOL_AT: usize = 32;

    #[test]
    fn only_the_protocol_byte_of_the_uas_setting_changes() {
        let mut bytes = STORAGE;
        hide(&[3], &mut bytes);

        let mut expected = STORAGE;
        expected[PROTOCOL_AT] = 0xff;
        assert_eq!(bytes, expected);
    }

    #[test]
    fn answer_cut_anywhere_shows_no_uas() {
        for length in 0..=STORAGE.len() {
            let mut bytes = STORAGE[..length].to_vec();
            hide(&[3], &mut bytes);
            assert_ne!(bytes.get(PROTOCOL_AT), Some(&0x62), "{length} bytes");
            assert_eq!(
                bytes[..length.min(PROTOCOL_AT)],
                STORAGE[..length.min(PROTOCOL_AT)],
                "{length} bytes"
            );
        }
    }

    #[test]
    fn other_interfaces_stay_as_they_are() {
        let mut bytes = STORAGE;
        hide(&[0, 1, 2], &mut bytes);
        assert_eq!(bytes, STORAGE);
    }

    #[test]
    fn interface_without_a_bulk_only_setting_offers_no_choice() {
        let mut node = vec![18, 1, 0, 3, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        node.extend(STORAGE);
        let both = interfaces_with_a_choice(&Descriptors::parse(&node).unwrap());
        node[18 + 16] = 0x62;
        let uas_alone = interfaces_with_a_choice(&Descriptors::parse(&node).unwrap());

        assert_eq!((both, uas_alone), (vec![3], vec![]));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(mut bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
            hide(&[0, 1, 2, 3], &mut bytes);
        }
    }
}
