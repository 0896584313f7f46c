//! Programs' ends of devices, to be run in a guest: what a driver library or an application says to a device for which
//! the kernel has no driver (a card reader, a phone), or only a thin one (a security key, a serial line, a network).
//!
//! Each moves data that both sides know and compares it; nothing here knows that the device is virtual.

pub mod card_reader;
pub mod numbers;
pub mod phone;
pub mod security_key;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::usbfs::{UrbBuffer, UrbKind, UrbQueue};

use crate::stream;

/// An answer that takes longer will never come.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// Two bulk pipes of a device, used as libusb's synchronous calls use them.
pub struct Pipes {
    queue: UrbQueue,
    input: u8,
    output: u8,
}

impl Pipes {
    /// Opens the device with this `vendor:product` and takes its interface 0.
    pub fn open(id: &str, input: u8, output: u8) -> Result<Self> {
        let file = stream::open(&stream::find_node(id)?)?;
        Ok(Self { queue: UrbQueue::new(file), input, output })
    }

    /// Sends bytes in one transfer.
    pub fn write(&mut self, data: &[u8]) -> Result<()> {
        let (sent, _) = self.transfer(self.output, data.to_vec())?;
        ensure!(sent == data.len(), "{sent} of {} bytes were taken", data.len());
        Ok(())
    }

    /// Receives one transfer of at most so many bytes.
    pub fn read(&mut self, room: usize) -> Result<Vec<u8>> {
        let (length, mut data) = self.transfer(self.input, vec![0; room])?;
        data.truncate(length);
        Ok(data)
    }

    fn transfer(&mut self, endpoint: u8, data: Vec<u8>) -> Result<(usize, Vec<u8>)> {
        let kind = UrbKind::Bulk { stream: 0, follows: false };
        let length = data.len();
        self.queue.submit(endpoint, kind, length, UrbBuffer::Heap(data)).context("submit a transfer")?;
        let done = stream::wait(&mut self.queue, &mut Vec::new(), ANSWER_WITHIN)?;
        done.status.with_context(|| format!("endpoint {endpoint:#x}"))?;
        Ok((done.actual as usize, done.buffer.as_slice().to_vec()))
    }
}
