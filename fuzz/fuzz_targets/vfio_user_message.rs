//! Any bytes as the payload of any command.

#![no_main]

use libfuzzer_sys::fuzz_target;
use usbvfiod::vfio_user::message::{Command, IrqAction, MAX_DATA_XFER, parse};
use usbvfiod::vfio_user::version::negotiate;

fuzz_target!(|input: (u16, &[u8])| {
    let (number, payload) = input;
    match parse(number, payload) {
        Ok(Command::Version { numbers, json }) => {
            if let Ok((agreed, reply)) = negotiate(numbers, json) {
                assert!(agreed.minor <= numbers.minor && reply.len() < 512);
            }
        }
        Ok(Command::RegionRead(access)) => assert!(access.count as usize <= MAX_DATA_XFER),
        Ok(Command::RegionWrite(access, data)) => assert_eq!(access.count as usize, data.len()),
        Ok(Command::SetIrqs { set, only }) => {
            assert!(only.is_empty() || only.len() == set.count as usize);
            assert!(set.count > 0 || set.action == IrqAction::Disable);
        }
        Ok(Command::DmaMap(map)) => {
            assert!(map.size > 0 && map.address.checked_add(map.size - 1).is_some());
        }
        Ok(_) | Err(_) => {}
    }
});
