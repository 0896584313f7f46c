//! The peer of the kernel's `usbtest` driver: sources and sinks of zeros in alternate settings 0 (bulk), 1 (bulk and
//! isochronous) and 2 (interrupt), and a control buffer to write and read back (`usbtest.c ctrl_out`).

use serde_json::{Value, json};

use crate::usbip::descriptors::{Endpoint, Identity, Image, Setting, Speed};
use crate::usbip::model::{Model, Reply};
use crate::usbip::wire::Setup;

/// Vendor requests of Intel's old test firmware, which `usbtest` still speaks.
const WRITE_BUFFER: u8 = 0x5b;
const READ_BUFFER: u8 = 0x5c;

/// Gadget Zero, which `usbtest` binds to by itself.
pub const VENDOR: u16 = 0x0525;
/// See [`VENDOR`].
pub const PRODUCT: u16 = 0xa4a0;

/// The device.
pub struct UsbTest {
    speed: Speed,
    image: Image,
    buffer: Vec<u8>,
    sunk: u64,
    /// Bytes towards us that were not zero.
    wrong: u64,
}

impl UsbTest {
    /// At high speed or SuperSpeed.
    pub fn new(speed: Speed, serial: &str) -> Self {
        let bulk = [Endpoint::bulk(0x81, speed), Endpoint::bulk(0x01, speed)];
        // Interval 4: eight microframes, a millisecond.
        let isochronous = [Endpoint::isochronous(0x82, 1024, 4), Endpoint::isochronous(0x02, 1024, 4)];
        let interrupt = [Endpoint::interrupt(0x83, 64, 4), Endpoint::interrupt(0x03, 64, 4)];
        let settings = [
            Setting::vendor(0, 0, &bulk),
            Setting::vendor(0, 1, &[bulk, isochronous].concat()),
            Setting::vendor(0, 2, &interrupt),
        ];
        let class = [0xff, 0, 0];
        let identity = Identity { speed, vendor: VENDOR, product: PRODUCT, class, serial: serial.to_owned() };
        let image = Image::new(&identity, &settings);
        Self { speed, image, buffer: Vec::new(), sunk: 0, wrong: 0 }
    }

    fn sink(&mut self, data: &[u8]) {
        self.sunk += data.len() as u64;
        self.wrong += data.iter().filter(|&&byte| byte != 0).count() as u64;
    }
}

impl Model for UsbTest {
    fn speed(&self) -> Speed {
        self.speed
    }

    fn image(&self) -> &Image {
        &self.image
    }

    fn control(&mut self, setup: &Setup, data: &[u8]) -> Reply {
        match (setup.request_type, setup.request, setup.value, setup.index) {
            (0x40, WRITE_BUFFER, 0, 0) => {
                self.buffer = data.to_vec();
                Reply::Done(Vec::new())
            }
            (0xc0, READ_BUFFER, 0, 0) => {
                Reply::Done(self.buffer[..self.buffer.len().min(usize::from(setup.length))].to_vec())
            }
            _ => Reply::Standard,
        }
    }

    fn read(&mut self, _endpoint: u8, room: usize) -> Reply {
        Reply::Done(vec![0; room])
    }

    fn write(&mut self, _endpoint: u8, data: &[u8]) -> Reply {
        self.sink(data);
        Reply::Done(Vec::new())
    }

    fn read_packet(&mut self, _endpoint: u8, room: usize) -> Vec<u8> {
        vec![0; room]
    }

    fn write_packet(&mut self, _endpoint: u8, data: &[u8]) {
        self.sink(data);
    }

    fn statistics(&self) -> Value {
        json!({ "sunk": self.sunk, "wrong": self.wrong })
    }
}
