//! A security key as a browser uses it: reports through `/dev/hidraw*` (FIDO U2F HID 1.2).

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::usbip::models::counted::fill_stream;
use crate::usbip::models::security_key::{
    Assembly, BROADCAST, INIT, MESSAGE_BYTES_MAX, Message, PING, REPORT_BYTES, reports_of,
};

const NONCE: [u8; 8] = *b"vm-tests";

/// Takes a channel of the key at this node and sends pings of growing length, up to the longest. Returns how many bytes
/// came back as they had been sent.
pub fn ping(node: &Path) -> Result<usize> {
    let key = OpenOptions::new().read(true).write(true).open(node);
    let mut key = key.with_context(|| format!("open {}", node.display()))?;
    let init = Message { channel: BROADCAST, command: INIT, payload: NONCE.to_vec() };
    let answer = exchange(&mut key, &init)?;
    let Some((nonce, channel)) = answer.payload.split_first_chunk::<8>() else { return wrong(&answer) };
    ensure!(answer.command == INIT && *nonce == NONCE, "another's answer: {answer:x?}");
    let Some((&channel, _)) = channel.split_first_chunk::<4>() else { return wrong(&answer) };
    let mut total = 0;
    for length in [0, 1, 57, 58, 116, 117, 1024, MESSAGE_BYTES_MAX] {
        let mut payload = vec![0; length];
        fill_stream(total as u64, &mut payload);
        let ping = Message { channel, command: PING, payload };
        let answer = exchange(&mut key, &ping).with_context(|| format!("ping of {length} bytes"))?;
        ensure!(answer == ping, "a ping of {length} bytes came back as {answer:x?}");
        total += length;
    }
    Ok(total)
}

fn wrong(answer: &Message) -> Result<usize> {
    anyhow::bail!("the answer to INIT is too short: {answer:x?}")
}

fn exchange(key: &mut File, message: &Message) -> Result<Message> {
    for report in reports_of(message) {
        // hidraw wants the report number first; the key has only one kind of report, number 0.
        let numbered: Vec<u8> = [0].into_iter().chain(report).collect();
        key.write_all(&numbered).context("send a report")?;
    }
    let mut assembly = Assembly::default();
    let mut report = [0; REPORT_BYTES];
    // The longest message has 129 reports.
    for _ in 0..129 {
        let length = key.read(&mut report).context("receive a report")?;
        ensure!(length == REPORT_BYTES, "a report of {length} bytes");
        let message = assembly.take(&report);
        if let Some(message) = message.map_err(|_| anyhow::anyhow!("a report out of sequence"))? {
            return Ok(message);
        }
    }
    anyhow::bail!("the answer does not end")
}
