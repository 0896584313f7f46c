//! Numbered bytes ([`crate::usbip::models::counted`]) over anything that reads and writes: a serial line with an echo at
//! the other end, or a TCP connection through a network adapter.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::usbip::models::counted::{check_stream, fill_stream};

/// A peer that is silent for longer has gone.
const SILENT_MAX: Duration = Duration::from_secs(60);
const CONNECT_WITHIN: Duration = Duration::from_secs(60);
/// Where scenarios let a sender or receiver wait.
pub const NETWORK_PORT: u16 = 5001;
const PIECE_BYTES: usize = 64 * 1024;
/// How often a receiver tells how far it has come.
const TELL_EACH_BYTES: u64 = 10_000_000;

/// What was moved.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Moved {
    /// Bytes sent or received.
    pub bytes: u64,
    /// Bytes received that were not what they should be.
    pub wrong: u64,
    /// Time from the first byte on.
    pub seconds: f64,
}

/// Sends so many bytes to a line that gives them back, and compares what comes.
pub fn echo(line: &Path, bytes: u64) -> Result<Moved> {
    let mut output = OpenOptions::new().read(true).write(true).open(line);
    let output = output.as_mut().map_err(|error| anyhow::anyhow!("open {}: {error}", line.display()))?;
    let input = output.try_clone().context("second handle of the line")?;
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| send_to(output, bytes));
        let moved = receive_from(input, bytes)?;
        writer.join().map_err(|_| anyhow::anyhow!("the writing half died"))??;
        Ok(moved)
    })
}

/// Either end of a TCP connection: waits at this address, or connects to it.
pub fn connect(address: &str, is_listening: bool) -> Result<TcpStream> {
    let stream = if is_listening {
        let listener = TcpListener::bind(address).with_context(|| format!("listen at {address}"))?;
        println!("listening");
        listener.accept().context("accept")?.0
    } else {
        let peer = address.parse().with_context(|| format!("{address} is an address and a port"))?;
        TcpStream::connect_timeout(&peer, CONNECT_WITHIN).with_context(|| format!("connect to {address}"))?
    };
    stream.set_read_timeout(Some(SILENT_MAX))?;
    stream.set_write_timeout(Some(SILENT_MAX))?;
    Ok(stream)
}

/// Sample pairs for [`crate::usbip::models::speaker`]: 1 to `count`, then half a second of silence.
pub fn samples(mut to: impl Write, count: u32) -> Result<()> {
    let pairs: Vec<u8> =
        (1..=count).chain(std::iter::repeat_n(0, 24_000)).flat_map(u32::to_le_bytes).collect();
    to.write_all(&pairs).context("write samples")
}

/// Sends so many bytes and waits until the other side has closed, so that all of them have arrived.
pub fn send(mut stream: TcpStream, bytes: u64) -> Result<Moved> {
    let start = Instant::now();
    send_to(&mut stream, bytes)?;
    stream.shutdown(Shutdown::Write)?;
    if stream.read(&mut [0]).context("wait for the receiver")? != 0 {
        bail!("the receiver talks");
    }
    Ok(Moved { bytes, wrong: 0, seconds: start.elapsed().as_secs_f64() })
}

/// Receives until the other side closes, and compares.
pub fn receive(stream: TcpStream) -> Result<Moved> {
    receive_from(stream, u64::MAX)
}

fn send_to(mut to: impl Write, bytes: u64) -> Result<()> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut at = 0;
    while at < bytes {
        let piece = &mut piece[..PIECE_BYTES.min(usize::try_from(bytes - at).unwrap_or(usize::MAX))];
        fill_stream(at, piece);
        to.write_all(piece).with_context(|| format!("send behind {at} bytes"))?;
        at += piece.len() as u64;
    }
    Ok(())
}

/// Takes `bytes` bytes, or what comes until the end of the stream.
fn receive_from(mut from: impl Read, bytes: u64) -> Result<Moved> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut moved = Moved::default();
    let mut start = None;
    while moved.bytes < bytes {
        let length = match from.read(&mut piece) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).with_context(|| format!("receive behind {} bytes", moved.bytes)),
        };
        start.get_or_insert_with(Instant::now);
        moved.wrong += check_stream(moved.bytes, &piece[..length]).0;
        let told = moved.bytes / TELL_EACH_BYTES;
        moved.bytes += length as u64;
        if moved.bytes / TELL_EACH_BYTES > told {
            let seconds = start.map_or(0.0, |start: Instant| start.elapsed().as_secs_f32());
            eprintln!("{} bytes after {seconds:.1} s", moved.bytes);
        }
    }
    moved.seconds = start.map_or(0.0, |start: Instant| start.elapsed().as_secs_f64());
    Ok(moved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_received_and_a_change_is_seen() {
        let mut sent = Vec::new();
        send_to(&mut sent, 100_001).unwrap();
        let moved = receive_from(&sent[..], u64::MAX).unwrap();
        assert_eq!((moved.bytes, moved.wrong), (100_001, 0));
        sent[70_000] ^= 1;
        assert_eq!(receive_from(&sent[..], u64::MAX).unwrap().wrong, 1);
    }
}
