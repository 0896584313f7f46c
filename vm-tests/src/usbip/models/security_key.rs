//! A security key as far as its transport goes (FIDO U2F HID 1.2, CTAPHID): INIT gives a channel, PING comes back.

use std::collections::VecDeque;

use serde_json::{Value, json};

use super::counted::VENDOR;
use crate::usbip::descriptors::{Endpoint, Identity, Image, Setting, Speed};
use crate::usbip::model::{Model, Reply};
use crate::usbip::wire::Setup;

/// Product number.
pub const PRODUCT: u16 = 0x0006;

/// Length of every report.
pub const REPORT_BYTES: usize = 64;
/// The channel on which a channel is asked for.
pub const BROADCAST: [u8; 4] = [0xff; 4];
/// Commands, with the bit that tells the first report of a message.
pub const PING: u8 = 0x81;
/// Asks for a channel.
pub const INIT: u8 = 0x86;
/// Answer to what is not understood.
pub const ERROR: u8 = 0xbf;
/// The longest message: one first report and 128 that continue it.
pub const MESSAGE_BYTES_MAX: usize = 57 + 128 * 59;

const INVALID_COMMAND: u8 = 1;
const INVALID_SEQUENCE: u8 = 4;

/// Usage page FIDO, usage U2F authenticator: 64 bytes in, 64 bytes out.
const REPORT_DESCRIPTOR: [u8; 34] = [
    0x06, 0xd0, 0xf1, 0x09, 0x01, 0xa1, 0x01, 0x09, 0x20, 0x15, 0x00, 0x26, 0xff, 0x00, 0x75, 0x08, 0x95,
    0x40, 0x81, 0x02, 0x09, 0x21, 0x15, 0x00, 0x26, 0xff, 0x00, 0x75, 0x08, 0x95, 0x40, 0x91, 0x02, 0xc0,
];
/// HID 1.11, one report descriptor.
const HID_DESCRIPTOR: [u8; 9] = [9, 0x21, 0x11, 0x01, 0, 1, 0x22, REPORT_DESCRIPTOR.len() as u8, 0];

const IN: u8 = 0x81;
const OUT: u8 = 0x01;

/// A message: channel, command and payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Channel.
    pub channel: [u8; 4],
    /// Command with its high bit.
    pub command: u8,
    /// Payload.
    pub payload: Vec<u8>,
}

/// Puts a message together from reports.
#[derive(Debug, Default)]
pub struct Assembly {
    message: Option<(Message, usize)>,
    sequence: u8,
}

/// The reports that carry a message.
pub fn reports_of(message: &Message) -> Vec<[u8; REPORT_BYTES]> {
    let length = (message.payload.len().min(MESSAGE_BYTES_MAX) as u16).to_be_bytes();
    let first_bytes = message.payload.len().min(57);
    let (first, rest) = message.payload.split_at(first_bytes);
    let report = |head: &[u8], data: &[u8]| {
        let mut report = [0; REPORT_BYTES];
        let bytes = message.channel.iter().chain(head).chain(data);
        report.iter_mut().zip(bytes).for_each(|(place, byte)| *place = *byte);
        report
    };
    let mut reports = vec![report(&[message.command, length[0], length[1]], first)];
    reports.extend((0..=127).zip(rest.chunks(59)).map(|(sequence, data): (u8, _)| report(&[sequence], data)));
    reports
}

impl Assembly {
    /// Takes a report; a message if it is complete now; `Err` when the report does not continue what was begun.
    pub fn take(&mut self, report: &[u8]) -> Result<Option<Message>, [u8; 4]> {
        let Some((&channel, [command, rest @ ..])) = report.split_first_chunk::<4>() else {
            return Err(BROADCAST);
        };
        if command & 0x80 != 0 {
            let Some((&length, data)) = rest.split_first_chunk::<2>() else { return Err(channel) };
            let length = usize::from(u16::from_be_bytes(length));
            self.sequence = 0;
            let payload = data[..data.len().min(length)].to_vec();
            self.message = Some((Message { channel, command: *command, payload }, length));
        } else {
            let expected = self.sequence;
            let Some((message, length)) =
                self.message.as_mut().filter(|(m, _)| m.channel == channel && *command == expected)
            else {
                self.message = None;
                return Err(channel);
            };
            self.sequence = self.sequence.wrapping_add(1);
            let left = *length - message.payload.len();
            message.payload.extend_from_slice(&rest[..rest.len().min(left)]);
        }
        let is_complete = self.message.as_ref().is_some_and(|(m, length)| m.payload.len() == *length);
        Ok(if is_complete { self.message.take().map(|(message, _)| message) } else { None })
    }
}

/// The key.
pub struct SecurityKey {
    speed: Speed,
    image: Image,
    assembly: Assembly,
    answers: VecDeque<[u8; REPORT_BYTES]>,
    channels: u32,
    pings: u64,
}

impl SecurityKey {
    /// At full speed, as they are, or high speed.
    pub fn new(speed: Speed, serial: &str) -> Self {
        let identity =
            Identity { speed, vendor: VENDOR, product: PRODUCT, class: [0; 3], serial: serial.to_owned() };
        // Four milliseconds.
        let interval = if speed == Speed::Full { 4 } else { 6 };
        let size = REPORT_BYTES as u16;
        let setting = Setting {
            class: [3, 0, 0],
            extra: HID_DESCRIPTOR.to_vec(),
            endpoints: vec![
                Endpoint::interrupt(IN, size, interval),
                Endpoint::interrupt(OUT, size, interval),
            ],
            ..Setting::default()
        };
        Self {
            speed,
            image: Image::new(&identity, &[setting]),
            assembly: Assembly::default(),
            answers: VecDeque::new(),
            channels: 0,
            pings: 0,
        }
    }

    fn answer(&mut self, message: Message) -> Message {
        let Message { channel, command, payload } = message;
        match command {
            INIT if payload.len() == 8 => {
                self.channels += 1;
                let mut answer = payload;
                answer.extend(self.channels.to_be_bytes());
                // Protocol 2, device 1.0.0, no abilities.
                answer.extend([2, 1, 0, 0, 0]);
                Message { channel, command, payload: answer }
            }
            PING => {
                self.pings += 1;
                Message { channel, command, payload }
            }
            _ => Message { channel, command: ERROR, payload: vec![INVALID_COMMAND] },
        }
    }
}

impl Model for SecurityKey {
    fn speed(&self) -> Speed {
        self.speed
    }

    fn image(&self) -> &Image {
        &self.image
    }

    fn control(&mut self, setup: &Setup, _data: &[u8]) -> Reply {
        let room = usize::from(setup.length);
        match (setup.request_type, setup.request, setup.value) {
            (0x81, 6, 0x2200) => Reply::Done(REPORT_DESCRIPTOR[..room.min(REPORT_DESCRIPTOR.len())].to_vec()),
            (0x81, 6, 0x2100) => Reply::Done(HID_DESCRIPTOR[..room.min(HID_DESCRIPTOR.len())].to_vec()),
            // SET_IDLE
            (0x21, 0x0a, _) => Reply::Done(Vec::new()),
            _ => Reply::Standard,
        }
    }

    fn read(&mut self, _endpoint: u8, _room: usize) -> Reply {
        self.answers.pop_front().map_or(Reply::Nak, |report| Reply::Done(report.to_vec()))
    }

    fn write(&mut self, _endpoint: u8, data: &[u8]) -> Reply {
        let answer = match self.assembly.take(data) {
            Ok(None) => return Reply::Done(Vec::new()),
            Ok(Some(message)) => self.answer(message),
            Err(channel) => Message { channel, command: ERROR, payload: vec![INVALID_SEQUENCE] },
        };
        self.answers.extend(reports_of(&answer));
        Reply::Done(Vec::new())
    }

    fn setting_chosen(&mut self, _interface: u8, _alternate: u8) {
        self.answers.clear();
        self.assembly = Assembly::default();
    }

    fn statistics(&self) -> Value {
        json!({ "channels": self.channels, "pings": self.pings })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_message_is_whole_after_its_last_report() {
        let payload: Vec<u8> = (0..MESSAGE_BYTES_MAX).map(|n| (n / 7) as u8).collect();
        let message = Message { channel: [1, 2, 3, 4], command: PING, payload };
        let mut assembly = Assembly::default();
        let reports = reports_of(&message);
        let (last, first) = reports.split_last().unwrap();
        assert!(first.iter().all(|report| assembly.take(report) == Ok(None)));
        assert_eq!(assembly.take(last), Ok(Some(message)));
    }

    #[test]
    fn a_report_out_of_sequence_is_an_error() {
        let message = Message { channel: [1; 4], command: PING, payload: vec![0; 200] };
        let reports = reports_of(&message);
        let mut assembly = Assembly::default();
        assert_eq!(assembly.take(&reports[0]), Ok(None));
        assert_eq!(assembly.take(&reports[2]), Err([1; 4]));
    }

    #[test]
    fn a_channel_is_given_and_a_ping_on_it_comes_back() {
        let mut key = SecurityKey::new(Speed::Full, "1");
        let init = Message { channel: BROADCAST, command: INIT, payload: vec![7; 8] };
        key.write(OUT, &reports_of(&init)[0]);
        let Reply::Done(answer) = key.read(IN, REPORT_BYTES) else { panic!("no answer") };
        assert_eq!(answer[..19], [&[0xff; 4][..], &[INIT, 0, 17], &[7; 8], &[0, 0, 0, 1]].concat());
        assert_eq!(key.read(IN, REPORT_BYTES), Reply::Nak);
    }
}
