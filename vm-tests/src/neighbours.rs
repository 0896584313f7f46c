//! A device that works beside one that hangs: what it moves and how long a register read takes, while the SET_INTERFACE
//! of the other is unanswered, and between two of them.
//!
//! All in one process, by one clock, and with both devices open before the first hang: whoever looks for a device in
//! sysfs waits for one whose SET_INTERFACE is under way (its attributes take the device's lock).

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::stream::{self, Shape};

/// How long the other device leaves SET_INTERFACE unanswered: as long as Linux waits for it at most.
pub const HANG: Duration = Duration::from_secs(5);
/// From one SET_INTERFACE to the next: time for its end, and as long without it.
const PERIOD: Duration = Duration::from_secs(9);
/// Before the first.
const LEAD: Duration = Duration::from_secs(1);
/// Left out at both ends of what is counted: requests begin and end there.
const MARGIN: Duration = Duration::from_millis(150);
/// From one register read to the next, so that reading leaves the processor to the stream.
const READ_EACH: Duration = Duration::from_millis(10);
/// Length of the pieces that bytes are counted in.
const SLOT: Duration = Duration::from_millis(50);
/// Bytes of a transfer.
const SIZE: usize = 16384;

/// What was seen in some windows of time.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Figures {
    /// Their length.
    pub seconds: f64,
    /// Bytes that the neighbour moved.
    pub bytes: u64,
    /// Register reads.
    pub reads: u32,
    /// Their mean time in microseconds.
    pub read_us: f64,
    /// The longest in microseconds.
    pub worst_us: f64,
}

impl Figures {
    /// Bytes in a second.
    pub fn rate(&self) -> f64 {
        self.bytes as f64 / self.seconds
    }
}

/// What was seen.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Between two hangs.
    pub alone: Figures,
    /// While the other hangs.
    pub beside: Figures,
    /// Of each hang: how long SET_INTERFACE took here, in seconds.
    pub hangs: Vec<f64>,
    /// Bytes of the neighbour that were not what they should be.
    pub wrong: u64,
}

impl Report {
    /// Change of the throughput in percent, and of the time of a register read.
    pub fn changes(&self) -> (f64, f64) {
        let change = |alone: f64, beside: f64| (beside / alone - 1.0) * 100.0;
        (change(self.alone.rate(), self.beside.rate()), change(self.alone.read_us, self.beside.read_us))
    }
}

/// One register read.
#[derive(Clone, Copy, Debug)]
struct Read {
    begun: Instant,
    took: Duration,
}

/// Streams from `neighbour` and reads `register` (a file that is one), while SET_INTERFACE of `other` hangs `hangs` times.
pub fn measure(neighbour: &Path, other: &Path, register: &Path, hangs: u32) -> Result<Report> {
    let (neighbour, other) = (stream::open(neighbour)?, stream::open(other)?);
    let time = LEAD + PERIOD * hangs;
    let shape = Shape { size: SIZE, packets: 1, ahead: 4, time, transfers: u64::MAX, slot: SLOT };
    thread::scope(|threads| {
        let streaming = threads.spawn(|| stream::bulk_in(neighbour, shape));
        let reading = threads.spawn(|| read_again_and_again(register, Instant::now() + time));
        let begin = Instant::now() + LEAD;
        let mut hung = Vec::new();
        for number in 0..hangs {
            thread::sleep((begin + PERIOD * number).saturating_duration_since(Instant::now()));
            let start = Instant::now();
            // How it ends is not our business here; when, is.
            let _ = other.set_interface(0, 0);
            hung.push((start, Instant::now()));
        }
        let stream = streaming.join().ok().context("the stream's thread died")??;
        let reads = reading.join().ok().context("the reader's thread died")??;
        let streamed_from = stream.begun.context("nothing was streamed")?;
        let windows = |of: fn((Instant, Instant)) -> (Instant, Instant)| -> Vec<_> {
            hung.iter().copied().map(of).map(|(from, to)| (from + MARGIN, to - MARGIN)).collect()
        };
        let figures = |windows: &[(Instant, Instant)]| figures(windows, &stream.slots, streamed_from, &reads);
        let report = Report {
            alone: figures(&windows(|(start, _)| (start + HANG, start + PERIOD))),
            beside: figures(&windows(|hang| hang)),
            hangs: hung.iter().map(|(start, end)| end.duration_since(*start).as_secs_f64()).collect(),
            wrong: stream.wrong,
        };
        ensure!(report.alone.reads > 0 && report.alone.bytes > 0, "nothing moved alone: {report:?}");
        Ok(report)
    })
}

fn read_again_and_again(path: &Path, until: Instant) -> Result<Vec<Read>> {
    let mut reads = Vec::new();
    loop {
        let begun = Instant::now();
        if begun > until {
            return Ok(reads);
        }
        // Opened anew: the file makes its text when it is opened.
        std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
        reads.push(Read { begun, took: begun.elapsed() });
        thread::sleep(READ_EACH);
    }
}

/// Counts what lies in the windows: whole slots of the stream, and the reads that begin there.
fn figures(windows: &[(Instant, Instant)], slots: &[u64], streamed_from: Instant, reads: &[Read]) -> Figures {
    let mut figures = Figures::default();
    let mut slot_from = streamed_from;
    for bytes in slots {
        let slot_to = slot_from + SLOT;
        if windows.iter().any(|(from, to)| *from <= slot_from && slot_to <= *to) {
            figures.bytes += bytes;
            figures.seconds += SLOT.as_secs_f64();
        }
        slot_from = slot_to;
    }
    let mut sum_us = 0.0;
    for read in reads.iter().filter(|read| windows.iter().any(|(from, to)| (from..to).contains(&&read.begun)))
    {
        let us = read.took.as_secs_f64() * 1e6;
        figures.reads += 1;
        figures.worst_us = figures.worst_us.max(us);
        sum_us += us;
    }
    figures.read_us = sum_us / f64::from(figures.reads.max(1));
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_a_window_is_counted_and_nothing_else() {
        let zero = Instant::now();
        let at = |ms: u64| zero + Duration::from_millis(ms);
        // Slots of 50 ms from 0: the window holds those from 100 and from 150, the one from 200 only in part.
        let windows = [(at(90), at(240))];
        let read = |ms: u64, us: u64| Read { begun: at(ms), took: Duration::from_micros(us) };
        let reads = [read(80, 9000), read(90, 100), read(239, 300), read(240, 9000)];
        let figures = figures(&windows, &[1, 2, 4, 8, 16, 32], zero, &reads);
        assert_eq!((figures.bytes, figures.reads), (12, 2));
        assert!((figures.seconds - 0.1).abs() < 1e-9 && (figures.read_us - 200.0).abs() < 1e-9);
        assert!((figures.worst_us - 300.0).abs() < 1e-9 && (figures.rate() - 120.0).abs() < 1e-6);
    }

    #[test]
    fn time_without_transfers_counts_as_time() {
        let zero = Instant::now();
        // The last slot is the last that had a byte.
        let figures = figures(&[(zero, zero + Duration::from_secs(1))], &[0, 0, 0, 6], zero, &[]);
        assert!((figures.seconds - 0.2).abs() < 1e-9);
        assert_eq!(figures.bytes, 6);
    }
}
