//! Measures from inside of a machine: the same program in the host under test and in its guests. `cargo run --bin bench`
//! starts it. Prints one JSON object a line.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;

const BLOCK: usize = 4096;
const CHUNK: usize = 1 << 20;
/// Between two places that are read at random: a prime, so that no read-ahead helps and all places are visited.
const STEP: u64 = 1_000_003;
/// An echo that takes longer is lost.
const ECHO_WITHIN_MS: u16 = 10_000;

/// Figures for `bench`.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Moves data of a block device, past the cache.
    Disk {
        /// Its node.
        device: PathBuf,
        /// How.
        mode: Mode,
        /// Requests under way at once.
        #[arg(long, default_value_t = 1)]
        depth: u32,
        /// How long.
        #[arg(long, default_value_t = 2.0)]
        seconds: f64,
    },
    /// Sends single bytes to a serial adapter that sends them back. Its line is raw already (`stty`).
    Echo {
        /// Its node.
        tty: PathBuf,
        /// How many.
        #[arg(long, default_value_t = 100)]
        count: usize,
    },
    /// Tells the messages of this kernel, each with the time it was read; each line of standard input is answered with
    /// the time.
    Clock,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// 1 MiB at a time, place after place.
    Read,
    /// The same, written.
    Write,
    /// 4 KiB from places all over the device.
    Random,
}

fn main() -> Result<()> {
    match Arguments::parse().what {
        What::Disk { device, mode, depth, seconds } => {
            disk(&device, mode, depth.clamp(1, 64), Duration::from_secs_f64(seconds.clamp(0.1, 600.0)))
        }
        What::Echo { tty, count } => echo(&tty, count.max(1)),
        What::Clock => clock(),
    }
}

/// O_DIRECT wants an aligned buffer.
#[repr(align(4096))]
struct Aligned([u8; CHUNK]);

fn disk(device: &Path, mode: Mode, depth: u32, time: Duration) -> Result<()> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(mode == Mode::Write)
        .custom_flags(nix::fcntl::OFlag::O_DIRECT.bits())
        .open(device)
        .with_context(|| format!("open {}", device.display()))?;
    let size = file.seek(SeekFrom::End(0))?;
    let length = if mode == Mode::Random { BLOCK } else { CHUNK };
    let places = size / length as u64;
    ensure!(places > 0, "{} is smaller than {length} bytes", device.display());
    let step = if mode == Mode::Random { STEP } else { 1 };
    let (begun, ended) = (AtomicU64::new(0), AtomicU64::new(0));
    let start = Instant::now();
    let work = || -> Result<()> {
        let mut buffer = Box::new(Aligned([0x5a; CHUNK]));
        while start.elapsed() < time {
            let number = begun.fetch_add(1, Ordering::Relaxed);
            let at = number.wrapping_mul(step) % places * length as u64;
            let bytes = &mut buffer.0[..length];
            match mode {
                Mode::Write => file.write_all_at(bytes, at)?,
                Mode::Read | Mode::Random => file.read_exact_at(bytes, at)?,
            }
            ended.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    thread::scope(|scope| -> Result<()> {
        let workers: Vec<_> = (0..depth).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            worker.join().map_err(|_| anyhow::anyhow!("a worker panicked"))??;
        }
        Ok(())
    })?;
    let seconds = start.elapsed().as_secs_f64();
    let count = ended.into_inner();
    println!("{}", json!({"count": count, "bytes": count * length as u64, "seconds": seconds}));
    Ok(())
}

fn echo(tty: &Path, count: usize) -> Result<()> {
    let mut line = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::fcntl::OFlag::O_NOCTTY.bits())
        .open(tty)
        .with_context(|| format!("open {}", tty.display()))?;
    let mut times = Vec::with_capacity(count);
    // The first few wake everything up and do not count.
    for number in 0..count + 3 {
        let sent = [b'a' + (number % 26) as u8];
        let start = Instant::now();
        line.write_all(&sent).context("write to the line")?;
        let mut waiting = [PollFd::new(line.as_fd(), PollFlags::POLLIN)];
        ensure!(
            poll(&mut waiting, PollTimeout::from(ECHO_WITHIN_MS)).context("wait for the echo")? > 0,
            "no echo"
        );
        let mut came = [0; 1];
        line.read_exact(&mut came).context("read from the line")?;
        ensure!(came == sent, "the echo of {sent:?} is {came:?}");
        if number >= 3 {
            times.push(start.elapsed().as_secs_f64() * 1e6);
        }
    }
    times.sort_by(f64::total_cmp);
    println!("{}", json!({"median_us": times[count / 2], "min_us": times[0], "max_us": times[count - 1]}));
    Ok(())
}

fn clock() -> Result<()> {
    let mut messages = BufReader::new(File::open("/dev/kmsg").context("open /dev/kmsg")?);
    thread::spawn(|| {
        for _ in std::io::stdin().lock().lines().map_while(Result::ok) {
            let _ = tell(&json!({"clock_us": now_us()}));
        }
    });
    let mut line = Vec::new();
    loop {
        line.clear();
        match messages.read_until(b'\n', &mut line) {
            Ok(0) => bail!("/dev/kmsg ended"),
            // EPIPE: messages were overwritten before they were read.
            Err(error) if error.raw_os_error() != Some(nix::libc::EPIPE) => return Err(error.into()),
            Err(_) => {}
            Ok(_) => {
                let text = String::from_utf8_lossy(&line);
                if let Some((_, text)) = text.split_once(';') {
                    tell(&json!({"at_us": now_us(), "kernel": text.trim_end()}))?;
                }
            }
        }
    }
}

fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// One line in one piece, whichever thread says it.
fn tell(value: &serde_json::Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}")?;
    out.flush().context("standard output")
}
