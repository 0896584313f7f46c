use proptest::prelude::*;

use super::*;

/// A stick with bulk-only storage in alternate 0 and UAS in alternate 1, as QEMU and most real ones have it.
fn stick() -> Vec<u8> {
    let mut bytes = vec![18, 1, 0x00, 3, 0, 0, 0, 9, 0xf4, 0x46, 0x03, 0, 0, 0, 1, 2, 3, 1];
    let mut configuration = vec![9, 2, 0, 0, 1, 1, 0, 0x80, 50];
    configuration.extend([9, 4, 0, 0, 2, 8, 6, 0x50, 0]);
    for address in [0x81, 0x02] {
        configuration.extend([7, 5, address, 2, 0, 4, 0]);
        configuration.extend([6, 48, 15, 0, 0, 0]);
    }
    configuration.extend([9, 4, 0, 1, 2, 8, 6, 0x62, 0]);
    for address in [0x81, 0x02] {
        configuration.extend([7, 5, address, 2, 0, 4, 0]);
        configuration.extend([6, 48, 15, 4, 0, 0]);
        configuration.extend([4, 0x24, 3, 0]);
    }
    configuration[2] = u8::try_from(configuration.len()).unwrap();
    bytes.extend(configuration);
    bytes
}

#[test]
fn stick_is_read_with_its_alternates_and_streams() {
    let descriptors = Descriptors::parse(&stick()).unwrap();

    let configuration = descriptors.configuration(1).unwrap();
    let settings: Vec<_> =
        configuration.alternates.iter().map(|a| (a.interface, a.setting, a.class)).collect();
    let exponents: Vec<_> =
        configuration.alternates[1].endpoints.iter().map(|e| e.streams_exponent).collect();
    assert_eq!((descriptors.vendor, descriptors.product), (0x46f4, 3));
    assert_eq!(settings, [(0, 0, (8, 6, 0x50)), (0, 1, (8, 6, 0x62))]);
    assert_eq!(configuration.interfaces(), [0]);
    assert_eq!(exponents, [4, 4]);
}

#[test]
fn guest_whose_stream_array_has_room_for_more_than_the_device_has_gets_what_there_is() {
    let mut bytes = stick();
    let of = |bytes: &[u8], endpoints: &[u8], asked| {
        let descriptors = Descriptors::parse(bytes).unwrap();
        descriptors.configuration(1).unwrap().usable_streams(endpoints, asked)
    };

    // 16 streams need 32 entries in the array: 31 without the reserved one.
    assert_eq!([31, 16, 7].map(|asked| of(&bytes, &[0x81, 0x02], asked)), [16, 16, 7]);
    assert_eq!(of(&bytes, &[0x83], 31), 31, "an endpoint that does not exist");
    // The last companion descriptor stands before the last pipe usage descriptor.
    let companion = bytes.len() - 4 - 6;
    bytes[companion + 3] = 2;
    assert_eq!(of(&bytes, &[0x81, 0x02], 31), 4);
    bytes[companion + 3] = 16;
    assert_eq!(of(&bytes, &[0x02], 31), 31);
}

#[test]
fn two_configurations_are_told_apart_by_their_total_length() {
    let mut bytes = stick();
    let mut second = bytes[18..].to_vec();
    second[5] = 2;
    bytes.extend(second);
    bytes[17] = 2;

    let descriptors = Descriptors::parse(&bytes).unwrap();

    assert_eq!(descriptors.configurations.iter().map(|c| c.value).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(descriptors.configurations[1].alternates.len(), 2);
}

#[test]
fn descriptor_of_length_zero_or_one_ends_the_walk() {
    for length in [0, 1] {
        let mut bytes = stick();
        bytes[18 + 9 + 9] = length;
        let descriptors = Descriptors::parse(&bytes).unwrap();
        assert_eq!(descriptors.configurations[0].alternates.len(), 1);
        assert_eq!(descriptors.configurations[0].alternates[0].endpoints, []);
    }
}

#[test]
fn total_length_that_lies_hides_only_what_lies_behind_it() {
    for (total, configurations) in [(0_u16, 0), (8, 0), (9, 1), (u16::MAX, 1)] {
        let mut bytes = stick();
        bytes[20..22].copy_from_slice(&total.to_le_bytes());
        let descriptors = Descriptors::parse(&bytes).unwrap();
        assert_eq!(descriptors.configurations.len(), configurations, "wTotalLength {total}");
    }
}

#[test]
fn zero_configurations_make_a_device_without_any() {
    let mut bytes = stick();
    bytes[17] = 0;
    assert_eq!(Descriptors::parse(&bytes).unwrap().configurations, []);
}

#[test]
fn endpoint_before_any_interface_is_skipped() {
    let mut bytes = stick()[..18].to_vec();
    bytes.extend([9, 2, 16, 0, 0, 1, 0, 0x80, 50, 7, 5, 0x81, 2, 0, 2, 0]);
    assert_eq!(Descriptors::parse(&bytes).unwrap().configurations[0].alternates, []);
}

#[test]
fn bytes_that_begin_otherwise_are_no_device() {
    assert_eq!(Descriptors::parse(&[]), Err(DescriptorError::NoDevice(0)));
    assert_eq!(Descriptors::parse(&stick()[..17]), Err(DescriptorError::NoDevice(17)));
    assert_eq!(Descriptors::parse(&[0; 18]), Err(DescriptorError::NoDevice(18)));
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let _ = Descriptors::parse(&bytes);
    }

    #[test]
    fn no_damage_to_a_real_device_panics_or_invents_interfaces(
        changes in proptest::collection::vec((0..100_usize, any::<u8>()), 0..12),
        cut in 0..100_usize,
    ) {
        let mut bytes = stick();
        for (at, value) in changes {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        bytes.truncate(bytes.len() - cut % bytes.len());
        if let Ok(descriptors) = Descriptors::parse(&bytes) {
            let found: usize = descriptors.configurations.iter().map(|c| c.alternates.len()).sum();
            prop_assert!(found * 9 <= bytes.len());
        }
    }
}
