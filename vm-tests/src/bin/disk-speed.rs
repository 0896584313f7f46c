//! Reads a block device past the cache and says how fast: `disk-speed DEVICE sequential|random SECONDS`.
//!
//! Runs on the host under test and in guests alike, so that one program measures all. Prints one JSON line.

use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

const BLOCK: usize = 4096;
const CHUNK: usize = 1 << 20;

/// O_DIRECT wants an aligned buffer.
#[repr(align(4096))]
struct Aligned([u8; CHUNK]);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [device, mode, seconds] = &arguments[..] else {
        bail!("usage: disk-speed DEVICE sequential|random SECONDS");
    };
    let limit = Duration::from_secs(seconds.parse().context("SECONDS is a number")?);
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(nix::fcntl::OFlag::O_DIRECT.bits())
        .open(device)
        .with_context(|| format!("open {device}"))?;
    let size = file.seek(SeekFrom::End(0))?;
    let mut buffer = Box::new(Aligned([0; CHUNK]));
    let length = match mode.as_str() {
        "sequential" => CHUNK,
        "random" => BLOCK,
        other => bail!("mode is sequential or random, not {other}"),
    };
    let places = size / length as u64;
    if places == 0 {
        bail!("{device} is smaller than {length} bytes");
    }
    // The same places in every run; a prime step so that no read-ahead of anybody helps.
    let mut place = 0;
    let (mut reads, start) = (0u64, Instant::now());
    while start.elapsed() < limit {
        file.read_exact_at(&mut buffer.0[..length], place * length as u64)?;
        reads += 1;
        place = if mode == "random" { (place + 1_000_003) % places } else { (place + 1) % places };
    }
    let elapsed = start.elapsed().as_secs_f64();
    let rate = reads as f64 / elapsed;
    let mb = rate * length as f64 / 1e6;
    println!("{{\"reads\":{reads},\"seconds\":{elapsed:.3},\"reads_per_s\":{rate:.1},\"mb_per_s\":{mb:.2}}}");
    Ok(())
}
