//! What the transport costs above a bare usbfs loop that moves the same bytes of the same stick.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use common::usbfs::{UrbBuffer, UrbKind, UrbQueue, UsbfsFile};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{UsageWho, getrusage};
use serde_json::json;
use vm_tests::rig::{BULK_IN, BULK_OUT, CSW_AT, DATA_AT, Stick, bulk, open_node};

/// Counted runs of each way; the median counts.
const RUNS: usize = 5;
/// Length of a run.
const RUN_BYTES: u64 = 256 << 20;
/// Length of a run of one of them alone.
const ALONE_BYTES: u64 = 256 << 20;

/// Compares at a few transfer sizes. Prints one line for each: CPU per GB, and the ratio of the medians.
pub(crate) fn compare(device: &str) -> Result<()> {
    for piece in [4096_u32, 64 << 10, 120 << 10, 1 << 20] {
        let (mut ours, mut bare) = (Vec::new(), Vec::new());
        let bytes = RUN_BYTES.min(u64::from(piece) * 4096);
        // One after the other, so that what disturbs the machine disturbs both.
        for _ in 0..RUNS {
            bare.push(measure(bytes, || run_bare(device, piece, bytes))?);
            ours.push(measure(bytes, || run_ours(device, piece, bytes))?);
        }
        let [(bare_cpu, bare_rate), (our_cpu, our_rate)] = [bare, ours].map(median);
        println!(
            "{:>5} KiB: bare {bare_cpu:.3} s/GB at {bare_rate:.0} MB/s, ours {our_cpu:.3} s/GB at {our_rate:.0} MB/s, ratio {:.2}",
            piece / 1024,
            our_cpu / bare_cpu
        );
    }
    Ok(())
}

/// The bare loop alone, or the transport alone, 1 MiB at a time. Prints one JSON line.
pub(crate) fn alone(device: &str, is_bare: bool) -> Result<()> {
    let run = if is_bare { run_bare } else { run_ours };
    let (cpu_per_gb, rate) = measure(ALONE_BYTES, || run(device, 1 << 20, ALONE_BYTES))?;
    let gigabytes = ALONE_BYTES as f64 / 1e9;
    let said = json!({
        "bytes": ALONE_BYTES, "seconds": gigabytes * 1e3 / rate, "cpu_seconds": cpu_per_gb * gigabytes,
    });
    println!("{said}");
    Ok(())
}

/// CPU seconds for each GB, and MB/s.
fn measure(bytes: u64, run: impl FnOnce() -> Result<Duration>) -> Result<(f64, f64)> {
    let cpu = || -> Result<f64> {
        let usage = getrusage(UsageWho::RUSAGE_SELF)?;
        let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
        Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
    };
    let before = cpu()?;
    let took = run()?;
    let spent = cpu()? - before;
    Ok((spent / (bytes as f64 / 1e9), bytes as f64 / 1e6 / took.as_secs_f64()))
}

fn median(mut runs: Vec<(f64, f64)>) -> (f64, f64) {
    runs.sort_by(|a, b| a.0.total_cmp(&b.0));
    runs[runs.len() / 2]
}

/// READ(10) from the start of the medium, as often as needed, one data transfer for each command.
fn run_ours(device: &str, piece: u32, bytes: u64) -> Result<Duration> {
    let mut stick = Stick::attach(device, piece as usize)?;
    stick.make_ready()?;
    let [n0, n1] = u16::try_from(piece / 512)?.to_be_bytes();
    let command = [0x28, 0, 0, 0, 0, 0, 0, n0, n1, 0];
    let started = Instant::now();
    for _ in 0..bytes / u64::from(piece) {
        stick.prepare(&command, piece, true);
        stick.rig.submit(BULK_OUT, bulk(), 0, 31);
        let data = stick.rig.submit(BULK_IN, bulk(), DATA_AT, piece);
        ensure!(stick.rig.wait(data)?.actual == piece);
        let status = stick.rig.submit(BULK_IN, bulk(), CSW_AT, 13);
        ensure!(stick.rig.wait(status)?.actual == 13 && stick.passed());
        stick.rig.forget();
    }
    let took = started.elapsed();
    stick.rig.detach()?;
    Ok(took)
}

/// The same by hand: fixed buffers, mapped as the transport's are, and one copy out.
fn run_bare(device: &str, piece: u32, bytes: u64) -> Result<Duration> {
    let (fd, _) = open_node(device)?;
    let file = UsbfsFile::new(fd)?;
    if file.claim_interface(0).is_err() {
        file.disconnect_and_claim(0)?;
    }
    let mut small = file.map(4096, 16)?;
    let mut out = UrbBuffer::Mapped(small.pop().context("a piece")?);
    let mut status = UrbBuffer::Mapped(small.pop().context("a piece")?);
    let mut data =
        UrbBuffer::Mapped(file.map((piece as usize).next_power_of_two(), 1)?.pop().context("a piece")?);
    let mut queue = UrbQueue::new(file);
    let mut guest = vec![0_u8; piece as usize + 64];
    let [n0, n1] = u16::try_from(piece / 512)?.to_be_bytes();
    let mut command = *b"USBC\x01\0\0\0\0\0\0\0\x80\0\x0a\x28\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    command[8..12].copy_from_slice(&piece.to_le_bytes());
    command[22..24].copy_from_slice(&[n0, n1]);
    let kind = UrbKind::Bulk { stream: 0, follows: false };
    let mut packets = Vec::new();
    let started = Instant::now();
    for _ in 0..bytes / u64::from(piece) {
        out.as_mut_slice()[..31].copy_from_slice(&command);
        let sent = queue.submit(BULK_OUT, kind, 31, out)?;
        let asked = queue.submit(BULK_IN, kind, piece as usize, data)?;
        let (mut sent_back, mut data_back) = (None, None);
        while data_back.is_none() || sent_back.is_none() {
            match queue.reap(&mut packets)? {
                Some(reaped) if reaped.token == sent => sent_back = Some(reaped.buffer),
                Some(reaped) if reaped.token == asked => {
                    let came = reaped.actual as usize;
                    ensure!(came == piece as usize);
                    guest[..came].copy_from_slice(&reaped.buffer.as_slice()[..came]);
                    data_back = Some(reaped.buffer);
                }
                Some(_) => bail!("a stray transfer"),
                None => wait(&queue)?,
            }
        }
        (out, data) = (sent_back.context("sent")?, data_back.context("came")?);
        queue.submit(BULK_IN, kind, 13, status)?;
        status = loop {
            match queue.reap(&mut packets)? {
                Some(reaped) => {
                    guest[..13].copy_from_slice(&reaped.buffer.as_slice()[..13]);
                    ensure!(guest[..4] == *b"USBS" && reaped.actual == 13);
                    break reaped.buffer;
                }
                None => wait(&queue)?,
            }
        };
    }
    Ok(started.elapsed())
}

fn wait(queue: &UrbQueue) -> Result<()> {
    let mut fds = [PollFd::new(queue.file().as_fd(), PollFlags::POLLOUT)];
    poll(&mut fds, PollTimeout::from(10_000_u16))?;
    Ok(())
}
