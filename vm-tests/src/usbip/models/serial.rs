//! A serial adapter (CDC-ACM, USB CDC PSTN 1.2) that sends back what it gets.

use std::collections::VecDeque;

use serde_json::{Value, json};

use super::counted::VENDOR;
use crate::usbip::descriptors::{Endpoint, Identity, Image, Setting, Speed};
use crate::usbip::model::{Model, Reply};
use crate::usbip::wire::Setup;

/// Product number.
pub const PRODUCT: u16 = 0x0003;

/// What it holds before it stops taking more.
const BUFFER_BYTES: usize = 64 * 1024;

/// Class requests (PSTN §6.3).
const SET_LINE_CODING: u8 = 0x20;
const GET_LINE_CODING: u8 = 0x21;
const SET_CONTROL_LINE_STATE: u8 = 0x22;
const SEND_BREAK: u8 = 0x23;

/// The adapter.
pub struct Serial {
    speed: Speed,
    image: Image,
    line_coding: Vec<u8>,
    buffer: VecDeque<u8>,
    echoed: u64,
}

impl Serial {
    /// At full speed or above.
    pub fn new(speed: Speed, serial: &str) -> Self {
        let identity =
            Identity { speed, vendor: VENDOR, product: PRODUCT, class: [2, 0, 0], serial: serial.to_owned() };
        let notifications = Setting {
            class: [2, 2, 1],
            // Header 1.20, call management on interface 1, abstract control (line coding and state), union 0 + 1.
            extra: vec![5, 36, 0, 0x20, 1, 5, 36, 1, 0, 1, 4, 36, 2, 2, 5, 36, 6, 0, 1],
            endpoints: vec![Endpoint::interrupt(0x82, 16, 8)],
            ..Setting::default()
        };
        let data = Setting {
            interface: 1,
            class: [10, 0, 0],
            endpoints: vec![Endpoint::bulk(0x81, speed), Endpoint::bulk(0x01, speed)],
            ..Setting::default()
        };
        Self {
            speed,
            image: Image::new(&identity, &[notifications, data]),
            // 9600 8N1.
            line_coding: vec![0x80, 0x25, 0, 0, 0, 0, 8],
            buffer: VecDeque::new(),
            echoed: 0,
        }
    }
}

impl Model for Serial {
    fn speed(&self) -> Speed {
        self.speed
    }

    fn image(&self) -> &Image {
        &self.image
    }

    fn control(&mut self, setup: &Setup, data: &[u8]) -> Reply {
        match (setup.request_type, setup.request) {
            (0x21, SET_LINE_CODING) if data.len() == 7 => {
                self.line_coding = data.to_vec();
                Reply::Done(Vec::new())
            }
            (0xa1, GET_LINE_CODING) => Reply::Done(
                self.line_coding[..self.line_coding.len().min(usize::from(setup.length))].to_vec(),
            ),
            (0x21, SET_CONTROL_LINE_STATE | SEND_BREAK) => Reply::Done(Vec::new()),
            _ => Reply::Standard,
        }
    }

    fn read(&mut self, endpoint: u8, room: usize) -> Reply {
        if endpoint != 0x81 || self.buffer.is_empty() {
            // No news about the line, ever.
            return Reply::Nak;
        }
        let count = self.buffer.len().min(room);
        self.echoed += count as u64;
        Reply::Done(self.buffer.drain(..count).collect())
    }

    fn write(&mut self, _endpoint: u8, data: &[u8]) -> Reply {
        if !self.buffer.is_empty() && self.buffer.len() + data.len() > BUFFER_BYTES {
            return Reply::Nak;
        }
        self.buffer.extend(data);
        Reply::Done(Vec::new())
    }

    fn statistics(&self) -> Value {
        json!({ "echoed": self.echoed, "held": self.buffer.len(), "line_coding": self.line_coding })
    }
}
