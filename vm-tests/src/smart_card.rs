//! A smart card in QEMU's reader (`usb-ccid` with `ccid-card-passthru`): the card's side of the VSCARD protocol of
//! libcacard (`vscard_common.h`), big-endian messages on a socket. The card answers each command with its data in
//! reverse order.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Message types.
const INIT: u32 = 1;
const READER_ADD: u32 = 3;
const ANSWER_TO_RESET: u32 = 5;
const COMMAND: u32 = 7;

const MAGIC: &[u8; 4] = b"VSCD";
/// 0.0.2
const VERSION: u32 = 2;
const MESSAGE_BYTES_MAX: u32 = 64 * 1024;

/// What the card says when it gets power (ISO 7816-3 §8.2): direct convention, ten historical bytes.
pub const ANSWER: &[u8; 12] = b"\x3b\x0avm-tests-1";

/// A card; it is in the reader while this lives.
pub struct SmartCard {
    directory: tempfile::TempDir,
}

impl SmartCard {
    /// A card that waits for its reader.
    pub fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let card = Self { directory };
        let listener = UnixListener::bind(card.socket()).context("socket of the card")?;
        // Ends with the connection; without a reader, with the process.
        std::thread::spawn(move || {
            let served = listener.accept().context("accept").and_then(|(reader, _)| serve(reader));
            if let Err(error) = served {
                crate::progress(&format!("smart card: {error:#}"));
            }
        });
        Ok(card)
    }

    /// The socket that its reader connects to.
    pub fn socket(&self) -> PathBuf {
        self.path().join("card")
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }
}

fn serve(mut reader: UnixStream) -> Result<()> {
    let hello = [&MAGIC[..], &VERSION.to_be_bytes(), &[0; 4]].concat();
    send(&mut reader, INIT, &hello)?;
    send(&mut reader, READER_ADD, b"")?;
    send(&mut reader, ANSWER_TO_RESET, ANSWER)?;
    let mut header = [0; 12];
    while reader.read_exact(&mut header).is_ok() {
        let word =
            |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (kind, length) = (word(0), word(8));
        ensure!(length <= MESSAGE_BYTES_MAX, "a message of {length} bytes");
        let mut message = vec![0; length as usize];
        reader.read_exact(&mut message)?;
        if kind == COMMAND {
            send(&mut reader, COMMAND, &answer(&message))?;
        }
    }
    Ok(())
}

fn send(reader: &mut UnixStream, kind: u32, message: &[u8]) -> Result<()> {
    // All messages are about reader 0.
    let header = [kind, 0, message.len() as u32].map(u32::to_be_bytes).concat();
    reader.write_all(&[&header, message].concat()).context("send to the reader")
}

/// CLA INS P1 P2 Lc and data (ISO 7816-4 §5.1): the data reversed, then 9000.
fn answer(command: &[u8]) -> Vec<u8> {
    command.get(5..).unwrap_or_default().iter().rev().copied().chain([0x90, 0x00]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_the_data_reversed() {
        assert_eq!(answer(&[0x80, 0x10, 0, 0, 3, 1, 2, 3]), [3, 2, 1, 0x90, 0]);
        assert_eq!(answer(&[0x80, 0x10, 0, 0]), [0x90, 0]);
    }
}
