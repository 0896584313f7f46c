//! What makes one device different from another.

use std::time::Duration;

use serde_json::Value;

use super::descriptors::{Image, Speed};
use super::wire::Setup;

/// What a device does with a transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It succeeds: towards the host with these bytes, towards the device completely.
    Done(Vec<u8>),
    /// STALL handshake; EPIPE to the driver.
    Stall,
    /// No answer, or a broken one, three times; EPROTO to the driver.
    Broken,
    /// More bytes than the host has room for; EOVERFLOW to the driver.
    Babble,
    /// Not ready (NAK). The model is asked again after each other event of the device.
    Nak,
    /// Control transfers only: what USB 2.0 §9.4 says.
    Standard,
    /// The device is not ready for a time, and then does the other thing.
    Later(Duration, Box<Reply>),
}

/// A device beyond the standard requests. It is asked for one transfer of an endpoint at a time, in order.
pub trait Model: Send {
    /// The speed it is attached at.
    fn speed(&self) -> Speed;

    /// Its descriptors as of now.
    fn image(&self) -> &Image;

    /// A control transfer; `data` comes from the host.
    fn control(&mut self, _setup: &Setup, _data: &[u8]) -> Reply {
        Reply::Standard
    }

    /// A bulk or interrupt transfer to the host of at most `room` bytes.
    fn read(&mut self, _endpoint: u8, _room: usize) -> Reply {
        Reply::Stall
    }

    /// A bulk or interrupt transfer to the device.
    fn write(&mut self, _endpoint: u8, _data: &[u8]) -> Reply {
        Reply::Stall
    }

    /// One isochronous packet to the host, at most `room` bytes.
    fn read_packet(&mut self, _endpoint: u8, _room: usize) -> Vec<u8> {
        Vec::new()
    }

    /// One isochronous packet to the device.
    fn write_packet(&mut self, _endpoint: u8, _data: &[u8]) {}

    /// The host has chosen an alternate setting, or a configuration, which chooses setting 0 of all interfaces.
    fn setting_chosen(&mut self, _interface: u8, _alternate: u8) {}

    /// A word of the test; false when this device does not know it.
    fn order(&mut self, _words: &[&str]) -> bool {
        false
    }

    /// What the device has seen, for assertions.
    fn statistics(&self) -> Value {
        Value::Object(serde_json::Map::new())
    }
}
