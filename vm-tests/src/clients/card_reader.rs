//! A smart-card reader as `pcscd`'s driver uses it (USB CCID 1.1 §6): messages over two bulk pipes.

use anyhow::{Context, Result, ensure};

use super::Pipes;

const BULK_IN: u8 = 0x82;
const BULK_OUT: u8 = 0x03;

/// bMessageType to the reader (Table 6.1-1).
const ICC_POWER_ON: u8 = 0x62;
const ICC_POWER_OFF: u8 = 0x63;
const GET_SLOT_STATUS: u8 = 0x65;
const TRANSFER_BLOCK: u8 = 0x6f;
/// And from it (Table 6.2-1).
const DATA_BLOCK: u8 = 0x80;
const SLOT_STATUS: u8 = 0x81;

const HEADER_BYTES: usize = 10;
const MESSAGE_BYTES_MAX: usize = 4096;

/// A reader with one slot.
pub struct CardReader {
    pipes: Pipes,
    sequence: u8,
}

/// What the card says when it gets power, and bmICCStatus (0 active, 1 inactive, 2 none) before and after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoweredOn {
    /// Answer to reset.
    pub answer: Vec<u8>,
    /// Status before.
    pub before: u8,
    /// Status after.
    pub after: u8,
}

impl CardReader {
    /// Opens the reader with this `vendor:product`.
    pub fn open(id: &str) -> Result<Self> {
        Ok(Self { pipes: Pipes::open(id, BULK_IN, BULK_OUT)?, sequence: 0 })
    }

    /// Gives the card power.
    pub fn power_on(&mut self) -> Result<PoweredOn> {
        let (_, before) = self.exchange(GET_SLOT_STATUS, &[], SLOT_STATUS)?;
        let (answer, _) = self.exchange(ICC_POWER_ON, &[], DATA_BLOCK)?;
        let (_, after) = self.exchange(GET_SLOT_STATUS, &[], SLOT_STATUS)?;
        Ok(PoweredOn { answer, before, after })
    }

    /// A command to the card and its answer.
    pub fn transmit(&mut self, command: &[u8]) -> Result<Vec<u8>> {
        Ok(self.exchange(TRANSFER_BLOCK, command, DATA_BLOCK)?.0)
    }

    /// Takes the power away; the status afterwards.
    pub fn power_off(&mut self) -> Result<u8> {
        Ok(self.exchange(ICC_POWER_OFF, &[], SLOT_STATUS)?.1)
    }

    fn exchange(&mut self, kind: u8, data: &[u8], expected: u8) -> Result<(Vec<u8>, u8)> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = vec![kind];
        message.extend((data.len() as u32).to_le_bytes());
        // Slot 0, then three bytes that are 0 here: voltage chosen by the reader, no waiting time extension.
        message.extend([0, self.sequence, 0, 0, 0]);
        message.extend(data);
        self.pipes.write(&message).with_context(|| format!("message {kind:#x}"))?;
        let answer = self.pipes.read(MESSAGE_BYTES_MAX).with_context(|| format!("answer to {kind:#x}"))?;
        ensure!(answer.len() >= HEADER_BYTES, "an answer of {} bytes", answer.len());
        let (header, data) = answer.split_at(HEADER_BYTES);
        let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        ensure!(header[0] == expected && header[6] == self.sequence, "{header:x?} answers {kind:#x}");
        // bmCommandStatus
        ensure!(header[7] >> 6 == 0, "{kind:#x} failed: {header:x?}");
        ensure!(length == data.len(), "{length} bytes are announced, {} came", data.len());
        Ok((data.to_vec(), header[7] & 3))
    }
}
