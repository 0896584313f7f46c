//! A source whose bytes are numbered and a sink that checks the numbers, bulk or isochronous: nothing can be lost,
//! doubled or swapped on the way without being seen.
//!
//! Bulk: a stream of 64-bit little-endian numbers 0, 1, 2 … in each direction. Isochronous: each packet starts with
//! its 32-bit little-endian number, and all further bytes are the lowest byte of that number. Both start again at 0
//! when the host chooses a setting.

use serde::Serialize;
use serde_json::{Value, json};

use crate::usbip::descriptors::{Endpoint, Identity, Image, Setting, Speed};
use crate::usbip::model::{Model, Reply};

/// Vendor of the devices here: pid.codes' test numbers.
pub const VENDOR: u16 = 0x1209;
/// Product number of the bulk device.
pub const BULK_PRODUCT: u16 = 0x0001;
/// Product number of the isochronous device.
pub const ISOCHRONOUS_PRODUCT: u16 = 0x0002;

/// Source endpoint.
pub const SOURCE: u8 = 0x81;
/// Sink endpoint.
pub const SINK: u8 = 0x02;

fn identity(speed: Speed, product: u16, serial: &str) -> Identity {
    Identity { speed, vendor: VENDOR, product, class: [0xff, 0, 0], serial: serial.to_owned() }
}

/// Fills `bytes` with the numbered stream from byte `at` on.
pub fn fill_stream(at: u64, bytes: &mut [u8]) {
    let skip = (at % 8) as usize;
    let head = bytes.len().min((8 - skip) % 8);
    let (head, rest) = bytes.split_at_mut(head);
    head.copy_from_slice(&(at / 8).to_le_bytes()[skip..skip + head.len()]);
    for (number, place) in (at.div_ceil(8)..).zip(rest.chunks_mut(8)) {
        place.copy_from_slice(&number.to_le_bytes()[..place.len()]);
    }
}

/// Compares `bytes` with the numbered stream from byte `at` on: how many are wrong, and where the first of them is.
pub fn check_stream(at: u64, bytes: &[u8]) -> (u64, Option<u64>) {
    let mut right = vec![0; bytes.len()];
    fill_stream(at, &mut right);
    if right == bytes {
        return (0, None);
    }
    let mut wrong = (at..).zip(right.iter().zip(bytes)).filter(|(_, (right, is))| right != is);
    let first = wrong.next().map(|(at, _)| at);
    (u64::from(first.is_some()) + wrong.count() as u64, first)
}

/// The packet with this number.
pub fn packet(number: u32, length: usize) -> Vec<u8> {
    let mut bytes = vec![number as u8; length];
    for (byte, of_number) in bytes.iter_mut().zip(number.to_le_bytes()) {
        *byte = of_number;
    }
    bytes
}

/// Bulk source and sink.
pub struct Bulk {
    speed: Speed,
    image: Image,
    sourced: u64,
    sunk: u64,
    wrong: u64,
    first_wrong: Option<u64>,
}

impl Bulk {
    /// At any speed that has bulk endpoints.
    pub fn new(speed: Speed, serial: &str) -> Self {
        let settings = [Setting::vendor(0, 0, &[Endpoint::bulk(SOURCE, speed), Endpoint::bulk(SINK, speed)])];
        let image = Image::new(&identity(speed, BULK_PRODUCT, serial), &settings);
        Self { speed, image, sourced: 0, sunk: 0, wrong: 0, first_wrong: None }
    }
}

impl Model for Bulk {
    fn speed(&self) -> Speed {
        self.speed
    }

    fn image(&self) -> &Image {
        &self.image
    }

    fn read(&mut self, _endpoint: u8, room: usize) -> Reply {
        let mut data = vec![0; room];
        fill_stream(self.sourced, &mut data);
        self.sourced += room as u64;
        Reply::Done(data)
    }

    fn write(&mut self, _endpoint: u8, data: &[u8]) -> Reply {
        let (wrong, first) = check_stream(self.sunk, data);
        self.wrong += wrong;
        self.first_wrong = self.first_wrong.or(first);
        self.sunk += data.len() as u64;
        Reply::Done(Vec::new())
    }

    fn setting_chosen(&mut self, _interface: u8, _alternate: u8) {
        (self.sourced, self.sunk) = (0, 0);
    }

    fn statistics(&self) -> Value {
        let Self { sourced, sunk, wrong, first_wrong, .. } = self;
        json!({ "sourced": sourced, "sunk": sunk, "wrong": wrong, "first_wrong": first_wrong })
    }
}

/// Isochronous source and sink in alternate setting 1; setting 0 has no endpoints.
pub struct Isochronous {
    speed: Speed,
    image: Image,
    sourced: u32,
    sink: PacketCheck,
}

/// Checks numbered isochronous packets, on either side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PacketCheck {
    /// The number that should come next.
    pub expected: u32,
    /// Packets with a number.
    pub received: u64,
    /// Packets without room for one.
    pub empty: u64,
    /// Numbers that were skipped.
    pub missing: u64,
    /// Numbers that came again or too late.
    pub disordered: u64,
    /// Packets whose bytes do not fit their number.
    pub corrupt: u64,
}

impl Isochronous {
    /// `max_packet` bytes each 2^(`interval` - 1) microframes (frames at full speed).
    pub fn new(speed: Speed, max_packet: u16, interval: u8, serial: &str) -> Self {
        let endpoints = [SOURCE, SINK].map(|address| Endpoint::isochronous(address, max_packet, interval));
        let settings = [Setting::vendor(0, 0, &[]), Setting::vendor(0, 1, &endpoints)];
        let image = Image::new(&identity(speed, ISOCHRONOUS_PRODUCT, serial), &settings);
        Self { speed, image, sourced: 0, sink: PacketCheck::default() }
    }
}

impl Model for Isochronous {
    fn speed(&self) -> Speed {
        self.speed
    }

    fn image(&self) -> &Image {
        &self.image
    }

    fn read_packet(&mut self, _endpoint: u8, room: usize) -> Vec<u8> {
        let data = packet(self.sourced, room);
        self.sourced = self.sourced.wrapping_add(1);
        data
    }

    fn write_packet(&mut self, _endpoint: u8, data: &[u8]) {
        self.sink.take(data);
    }

    fn setting_chosen(&mut self, _interface: u8, alternate: u8) {
        // Leaving the stream keeps the figures of the last one.
        if alternate == 1 {
            self.sourced = 0;
            self.sink = PacketCheck::default();
        }
    }

    fn statistics(&self) -> Value {
        json!({ "sourced": self.sourced, "sink": self.sink })
    }
}

impl PacketCheck {
    /// The next packet.
    pub fn take(&mut self, data: &[u8]) {
        let Some((number, _)) = data.split_first_chunk::<4>() else {
            self.empty += 1;
            return;
        };
        let number = u32::from_le_bytes(*number);
        self.received += 1;
        if data != packet(number, data.len()) {
            self.corrupt += 1;
        } else if number < self.expected {
            self.disordered += 1;
        } else {
            self.missing += u64::from(number - self.expected);
            self.expected = number.wrapping_add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stream_goes_on_where_it_stopped() {
        let mut bulk = Bulk::new(Speed::High, "1");
        let Reply::Done(first) = bulk.read(SOURCE, 13) else { panic!() };
        let Reply::Done(second) = bulk.read(SOURCE, 11) else { panic!() };
        let stream = [first, second].concat();
        assert_eq!(stream[..8], 0u64.to_le_bytes());
        assert_eq!(stream[8..16], 1u64.to_le_bytes());
        assert_eq!(stream[16..24], 2u64.to_le_bytes());
    }

    #[test]
    fn a_lost_byte_is_seen_and_where() {
        let mut bulk = Bulk::new(Speed::High, "1");
        let mut data = vec![0; 32];
        fill_stream(0, &mut data);
        data.remove(8);
        let _ = bulk.write(SINK, &data);
        assert_eq!(bulk.statistics()["first_wrong"], 8);
    }

    #[test]
    fn sink_tells_missing_doubled_and_corrupt_packets_apart() {
        let mut sink = PacketCheck::default();
        let mut broken = packet(5, 16);
        broken[9] ^= 1;
        for data in [packet(0, 16), packet(3, 16), packet(3, 16), Vec::new(), packet(4, 16), broken] {
            sink.take(&data);
        }
        let PacketCheck { received, empty, missing, disordered, corrupt, expected } = sink;
        assert_eq!((received, empty, missing, disordered, corrupt, expected), (5, 1, 2, 1, 1, 5));
    }
}
