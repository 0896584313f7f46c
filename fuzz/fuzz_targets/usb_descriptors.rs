//! Any bytes as what a device node gives to a reader.

#![no_main]

use libfuzzer_sys::fuzz_target;
use usbvfiod::usb::Descriptors;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(descriptors) = Descriptors::parse(bytes) {
        assert!(descriptors.configurations.len() <= 8);
        let alternates = descriptors.configurations.iter().flat_map(|configuration| &configuration.alternates);
        let used: usize = alternates.map(|alternate| 9 + 7 * alternate.endpoints.len()).sum();
        assert!(used <= bytes.len(), "more was found than there are bytes");
    }
});
