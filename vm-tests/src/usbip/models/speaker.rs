//! A loudspeaker (USB Audio 1.0): 48 kHz, two channels of 16 bits, through one isochronous endpoint. It knows what it is
//! to play: the sample pairs are the numbers 1, 2, 3 … as 32-bit little-endian words, with silence before and after.

use serde::Serialize;
use serde_json::{Value, json};

use super::counted::VENDOR;
use crate::usbip::descriptors::{Endpoint, Identity, Image, Setting, Speed};
use crate::usbip::model::{Model, Reply};
use crate::usbip::wire::Setup;

/// Product number.
pub const PRODUCT: u16 = 0x0005;

const OUT: u8 = 0x01;
/// 48 pairs in a millisecond, and room for one more.
const PACKET_BYTES: u16 = 49 * 4;

/// Header 1.00 with one streaming interface, input terminal (USB streaming, left and right), output terminal (speaker).
const CONTROL: &[u8] = &[
    9, 36, 1, 0x00, 1, 30, 0, 1, 1, // header
    12, 36, 2, 1, 0x01, 0x01, 0, 2, 0x03, 0, 0, 0, // input terminal 1
    9, 36, 3, 2, 0x01, 0x03, 0, 1, 0, // output terminal 2 from 1
];
/// PCM from terminal 1, delay of one frame; type I, 2 channels of 2 bytes and 16 bits, one rate: 48000.
const STREAM: &[u8] = &[7, 36, 1, 1, 1, 1, 0, 11, 36, 2, 1, 2, 2, 16, 1, 0x80, 0xbb, 0];
/// General: no sampling frequency control, whole packets not needed.
const ENDPOINT: &[u8] = &[7, 37, 1, 0, 0, 0, 0];

/// What was heard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Heard {
    /// Packets that came.
    packets: u64,
    /// The last number in order; that of the last pair when all is well.
    last: u32,
    /// Numbers left out.
    missing: u64,
    /// Numbers that came again or too late.
    disordered: u64,
    /// Pairs of silence between the first number and the last.
    gaps: u64,
    /// Pairs of silence behind the last number so far.
    trailing: u64,
    /// Bytes that were no whole pair.
    torn: u64,
}

/// The loudspeaker.
pub struct Speaker {
    speed: Speed,
    image: Image,
    heard: Heard,
}

impl Speaker {
    /// At full speed, as most are, or high speed.
    pub fn new(speed: Speed, serial: &str) -> Self {
        let identity =
            Identity { speed, vendor: VENDOR, product: PRODUCT, class: [0; 3], serial: serial.to_owned() };
        // One packet a millisecond: 1 frame, or 2^3 microframes.
        let interval = if speed == Speed::Full { 1 } else { 4 };
        let control = Setting { class: [1, 1, 0], extra: CONTROL.to_vec(), ..Setting::default() };
        let off = Setting { interface: 1, class: [1, 2, 0], ..Setting::default() };
        let on = Setting {
            alternate: 1,
            extra: STREAM.to_vec(),
            endpoints: vec![Endpoint::isochronous(OUT, PACKET_BYTES, interval).with(ENDPOINT)],
            ..off.clone()
        };
        Self { speed, image: Image::new(&identity, &[control, off, on]), heard: Heard::default() }
    }
}

impl Model for Speaker {
    fn speed(&self) -> Speed {
        self.speed
    }

    fn image(&self) -> &Image {
        &self.image
    }

    fn write_packet(&mut self, _endpoint: u8, data: &[u8]) {
        self.heard.take(data);
    }

    fn control(&mut self, _setup: &Setup, _data: &[u8]) -> Reply {
        Reply::Standard
    }

    fn statistics(&self) -> Value {
        json!(self.heard)
    }
}

impl Heard {
    fn take(&mut self, data: &[u8]) {
        self.packets += 1;
        let (pairs, rest) = data.as_chunks::<4>();
        self.torn += rest.len() as u64;
        for pair in pairs {
            let number = u32::from_le_bytes(*pair);
            if number == 0 {
                self.trailing += u64::from(self.last > 0);
            } else if number <= self.last {
                self.disordered += 1;
            } else {
                self.missing += u64::from(number - self.last - 1);
                self.gaps += std::mem::take(&mut self.trailing);
                self.last = number;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_doubled_and_late_pairs_are_told_apart_from_silence() {
        let mut heard = Heard::default();
        for numbers in [[0, 0, 1], [2, 3, 0], [4, 6, 6], [5, 0, 0]] {
            heard.take(&numbers.map(u32::to_le_bytes).concat());
        }
        let expected =
            Heard { packets: 4, last: 6, missing: 1, disordered: 2, gaps: 1, trailing: 2, torn: 0 };
        assert_eq!(heard, expected);
    }

    #[test]
    fn length_of_the_class_specific_descriptors_is_right() {
        assert_eq!(usize::from(CONTROL[5]), CONTROL.len());
    }
}
