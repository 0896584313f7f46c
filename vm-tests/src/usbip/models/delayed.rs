//! Any other device, but slow to answer on endpoint 0.

use std::time::Duration;

use serde_json::{Value, json};

use crate::usbip::descriptors::{Image, Speed};
use crate::usbip::model::{Model, Reply};
use crate::usbip::wire::Setup;

/// How slow.
#[derive(Clone, Copy, Debug, Default)]
pub struct Delays {
    /// Before SET_INTERFACE is done.
    pub set_interface: Duration,
    /// Before class and vendor requests are answered.
    pub special: Duration,
    /// How many SET_INTERFACE requests are fast first: the one that the host itself sends, for instance.
    pub fast_set_interfaces: u32,
}

/// The slow device.
pub struct Delayed {
    inner: Box<dyn Model>,
    delays: Delays,
    delayed: u32,
}

impl Delayed {
    /// Makes a device slow.
    pub fn new(inner: Box<dyn Model>, delays: Delays) -> Self {
        Self { inner, delays, delayed: 0 }
    }

    fn delay_of(&mut self, setup: &Setup) -> Duration {
        match setup.request_type & 0x60 {
            0 if (setup.request_type, setup.request) != (0x01, 11) => Duration::ZERO,
            0 if self.delays.fast_set_interfaces > 0 => {
                self.delays.fast_set_interfaces -= 1;
                Duration::ZERO
            }
            0 => self.delays.set_interface,
            _ => self.delays.special,
        }
    }
}

impl Model for Delayed {
    fn speed(&self) -> Speed {
        self.inner.speed()
    }

    fn image(&self) -> &Image {
        self.inner.image()
    }

    fn control(&mut self, setup: &Setup, data: &[u8]) -> Reply {
        let reply = self.inner.control(setup, data);
        let delay = self.delay_of(setup);
        if delay.is_zero() {
            return reply;
        }
        self.delayed += 1;
        Reply::Later(delay, Box::new(reply))
    }

    fn read(&mut self, endpoint: u8, room: usize) -> Reply {
        self.inner.read(endpoint, room)
    }

    fn write(&mut self, endpoint: u8, data: &[u8]) -> Reply {
        self.inner.write(endpoint, data)
    }

    fn read_packet(&mut self, endpoint: u8, room: usize) -> Vec<u8> {
        self.inner.read_packet(endpoint, room)
    }

    fn write_packet(&mut self, endpoint: u8, data: &[u8]) {
        self.inner.write_packet(endpoint, data);
    }

    fn setting_chosen(&mut self, interface: u8, alternate: u8) {
        self.inner.setting_chosen(interface, alternate);
    }

    fn order(&mut self, words: &[&str]) -> bool {
        if let ["delay-set-interface", milliseconds] = words
            && let Ok(milliseconds) = milliseconds.parse()
        {
            self.delays.set_interface = Duration::from_millis(milliseconds);
            return true;
        }
        self.inner.order(words)
    }

    fn statistics(&self) -> Value {
        json!({ "delayed": self.delayed, "inner": self.inner.statistics() })
    }
}
