use proptest::prelude::*;

use super::*;

#[test]
fn layouts_have_the_sizes_of_the_protocol() {
    assert_eq!(size_of::<Header>(), 16);
    assert_eq!(size_of::<VersionNumbers>(), 4);
    assert_eq!(size_of::<DmaMapLayout>(), 32);
    assert_eq!(size_of::<DmaUnmapLayout>(), 24);
    assert_eq!(size_of::<DeviceInfo>(), 16);
    assert_eq!(size_of::<RegionInfo>(), 32);
    assert_eq!(size_of::<IrqInfo>(), 16);
    assert_eq!(size_of::<SetIrqsLayout>(), 20);
    assert_eq!(size_of::<RegionAccess>(), 16);
}

#[test]
fn success_reply_echoes_id_and_command() {
    let request = Header { id: 7, command: 9, size: 32, flags: 0, error: 5 };
    assert_eq!(request.reply(24), Header { id: 7, command: 9, size: 40, flags: 1, error: 0 });
}

#[test]
fn error_reply_is_a_header_with_the_error_bit() {
    let request = Header { id: 7, command: 2, size: 48, flags: 0, error: 0 };
    let reply = request.error_reply(Errno::EEXIST);
    assert_eq!(reply, Header { id: 7, command: 2, size: 16, flags: 0x21, error: libc::EEXIST as u32 });
}

#[test]
fn frame_of_a_size_that_cannot_be_is_a_header() {
    let of = |size| Header { id: 0, command: 0, size, flags: 0, error: 0 };
    let kept = |size| (of(size).frame_len(), of(size).excess_len());
    assert_eq!(kept(0), (16, 0));
    assert_eq!(kept(15), (16, 0));
    assert_eq!(kept(17), (17, 0));
    assert_eq!(kept(MAX_MESSAGE as u32), (MAX_MESSAGE, 0));
    assert_eq!(kept(MAX_MESSAGE as u32 + 1), (16, MAX_MESSAGE as u64 - 15));
    assert_eq!(kept(u32::MAX), (16, u64::from(u32::MAX) - 16));
}

#[test]
fn regions_have_their_vfio_indices() {
    assert_eq!(Region::from_index(0), Some(Region::Bar(0)));
    assert_eq!(Region::from_index(5), Some(Region::Bar(5)));
    assert_eq!(Region::from_index(6), Some(Region::Rom));
    assert_eq!(Region::from_index(7), Some(Region::Config));
    assert_eq!(Region::from_index(8), Some(Region::Vga));
    assert_eq!(Region::from_index(9), None);
    assert_eq!(Region::from_index(u32::MAX), None);
}

proptest! {
    /// Whatever the bytes: no panic, and what is accepted keeps its promises.
    #[test]
    fn any_payload_is_parsed_or_refused(
        number in prop_oneof![0_u16..20, any::<u16>()],
        words in prop::collection::vec(prop_oneof![0_u32..70, any::<u32>()], 0..12),
        tail in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let payload: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).chain(tail).collect();
        match parse(number, &payload) {
            Ok(Command::RegionWrite(access, data)) => prop_assert_eq!(access.count as usize, data.len()),
            Ok(Command::RegionRead(access)) => prop_assert!(access.count as usize <= MAX_DATA_XFER),
            Ok(Command::SetIrqs { set, only }) => {
                prop_assert!(only.is_empty() || only.len() == set.count as usize);
                prop_assert!(set.count > 0 || set.action == IrqAction::Disable);
            }
            Ok(Command::DmaMap(map)) => {
                prop_assert!(map.size > 0 && map.address.checked_add(map.size - 1).is_some());
                prop_assert!(map.offset.checked_add(map.size).is_some());
            }
            Ok(Command::Version { json, .. }) => prop_assert!(json.len() < payload.len()),
            _ => {}
        }
    }
}
