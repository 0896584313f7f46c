//! Kernel messages of a machine with the time at which they came, on one clock for all machines.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;
use vm_tests::{Mark, Process, Remote};

/// Questions for the time; the one that was answered fastest counts.
const QUESTIONS: usize = 12;
const ANSWERED_WITHIN: Duration = Duration::from_secs(30);

/// Follows the kernel of one machine.
pub(crate) struct Clock {
    process: Process,
    started: Instant,
}

/// When something happened, by the clock of one machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    us: f64,
}

const DAY_US: f64 = 86_400e6;

impl Moment {
    /// The time at the start of a line that a daemon logged: `2026-01-31T12:34:56.123456Z`; the day is left out.
    pub(crate) fn of_log_line(line: &str) -> Result<Self> {
        let time = line.get(11..26).with_context(|| format!("no time in {line}"))?;
        let mut us = 0.0;
        for (part, unit) in time.split(':').zip([3600e6, 60e6, 1e6]) {
            us += part.parse::<f64>().with_context(|| format!("no time in {line}"))? * unit;
        }
        Ok(Self { us })
    }

    /// Time to a moment of the same machine whose day is not known.
    pub(crate) fn ms_until_on_same_day(self, later: Self) -> f64 {
        (later.us - self.us).rem_euclid(DAY_US) / 1e3
    }
}

/// How the clock of one machine stands to ours.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offset {
    us: f64,
    /// It may be wrong by so much.
    error_us: f64,
}

impl Clock {
    pub(crate) fn start(machine: &Remote) -> Result<Self> {
        let process = machine.spawn(&["bench-probe", "clock"])?;
        Ok(Self { process, started: Instant::now() })
    }

    /// "From now on".
    pub(crate) fn here(&self) -> Mark {
        self.process.log().here()
    }

    /// When the kernel said something like `pattern`.
    pub(crate) fn wait(&self, mark: Mark, pattern: &str, within: Duration) -> Result<Moment> {
        let line = self.process.log().wait_after(mark, pattern, within)?;
        Ok(Moment { us: field(&line.text, "at_us")? })
    }

    /// Asks for the time.
    pub(crate) fn offset(&self) -> Result<Offset> {
        let mut best: Option<Offset> = None;
        for _ in 0..QUESTIONS {
            let mark = self.here();
            let asked = self.started.elapsed();
            self.process.write(b"\n")?;
            let line = self.process.log().wait_after(mark, "clock_us", ANSWERED_WITHIN)?;
            let answered = line.at.duration_since(self.started);
            let half = answered.saturating_sub(asked).as_secs_f64() * 1e6 / 2.0;
            // Against the moment at which both clocks were started.
            let us = field(&line.text, "clock_us")? - (asked.as_secs_f64() * 1e6 + half);
            if best.is_none_or(|best| half < best.error_us) {
                best = Some(Offset { us, error_us: half });
            }
        }
        best.context("no answer")
    }

    /// Time from `first` by this clock to `second` by the clock of another machine. A guest's clock is made from its
    /// host's, so they are taken as the same unless the answers to our questions say otherwise.
    pub(crate) fn ms_until(&self, first: Moment, second: Moment, other: &Self) -> Result<f64> {
        let (ours, theirs) = (self.offset()?, other.offset()?);
        let starts = other.started.duration_since(self.started).as_secs_f64() * 1e6;
        let ahead = theirs.us - ours.us - starts;
        let doubt = ours.error_us + theirs.error_us;
        let correction = if ahead.abs() <= doubt { 0.0 } else { ahead };
        Ok((second.us - first.us - correction) / 1e3)
    }
}

fn field(line: &str, name: &str) -> Result<f64> {
    let said: Value = serde_json::from_str(line).with_context(|| format!("the clock said {line}"))?;
    said[name].as_f64().with_context(|| format!("no {name} in {line}"))
}
