//! A growing list of lines that a test can wait on: console of a machine, output of a daemon.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::patience::Deadline;

/// Lines kept; older ones are dropped, so that a chattering daemon cannot eat the memory of the test.
const LINES_MAX: usize = 200_000;

/// A position in a [`Log`]: "from here on".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(usize);

impl Mark {
    /// Before the first line.
    pub const START: Self = Self(0);
}

/// A line as it was found by a wait.
#[derive(Clone, Debug)]
pub struct Line {
    /// Its text, without the end of line.
    pub text: String,
    /// When this process received it.
    pub at: Instant,
    /// Right behind this line.
    pub mark: Mark,
}

#[derive(Default)]
struct State {
    lines: Vec<(Instant, String)>,
    dropped: usize,
    partial: Vec<u8>,
    closed: bool,
}

/// Shared between the thread that reads and the test that waits.
#[derive(Clone)]
pub struct Log {
    name: Arc<str>,
    inner: Arc<(Mutex<State>, Condvar)>,
}

impl Log {
    /// An empty log; the name appears in failures.
    pub fn new(name: &str) -> Self {
        Self { name: name.into(), inner: Arc::default() }
    }

    /// The name given to [`Self::new`].
    pub fn name(&self) -> &str {
        &self.name
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends raw output; a line counts once its newline is there.
    pub fn push(&self, bytes: &[u8]) {
        let mut state = self.state();
        for &byte in bytes {
            if byte == b'\n' {
                let text = String::from_utf8_lossy(&state.partial).trim_end_matches('\r').to_owned();
                state.partial.clear();
                state.lines.push((Instant::now(), text));
            } else {
                state.partial.push(byte);
            }
        }
        if state.lines.len() > LINES_MAX {
            let excess = state.lines.len() - LINES_MAX / 2;
            state.lines.drain(..excess);
            state.dropped += excess;
        }
        self.inner.1.notify_all();
    }

    /// No more lines will come; waits fail at once instead of at their deadline.
    pub fn close(&self) {
        self.state().closed = true;
        self.inner.1.notify_all();
    }

    /// Behind the last line so far.
    pub fn here(&self) -> Mark {
        let state = self.state();
        Mark(state.dropped + state.lines.len())
    }

    /// The first line behind `mark` that matches. `pattern`: pieces separated by `*`, found in this order anywhere in the line.
    pub fn wait_after(&self, mark: Mark, pattern: &str, within: Duration) -> Result<Line> {
        let deadline = Deadline::after(within);
        let mut state = self.state();
        let mut next = mark.0;
        loop {
            next = next.max(state.dropped);
            while let Some((at, text)) = state.lines.get(next - state.dropped) {
                next += 1;
                if matches(text, pattern) {
                    return Ok(Line { text: text.clone(), at: *at, mark: Mark(next) });
                }
            }
            let left = deadline.left();
            if state.closed || left.is_zero() {
                let why = if state.closed { "it ended".to_owned() } else { format!("{within:?} went by") };
                drop(state);
                bail!("no line `{pattern}` from {}: {why}; its last lines:\n{}", self.name, self.tail(25));
            }
            state = self.inner.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The first matching line from the start.
    pub fn wait(&self, pattern: &str, within: Duration) -> Result<Line> {
        self.wait_after(Mark::START, pattern, within)
    }

    /// All lines behind `mark` that match, without waiting.
    pub fn all_after(&self, mark: Mark, pattern: &str) -> Vec<String> {
        let state = self.state();
        let skip = mark.0.saturating_sub(state.dropped);
        state
            .lines
            .iter()
            .skip(skip)
            .filter(|(_, text)| matches(text, pattern))
            .map(|(_, text)| text.clone())
            .collect()
    }

    /// The last `count` lines, for a person.
    pub fn tail(&self, count: usize) -> String {
        let state = self.state();
        let skip = state.lines.len().saturating_sub(count);
        let mut text: Vec<&str> = state.lines.iter().skip(skip).map(|(_, line)| line.as_str()).collect();
        let partial = String::from_utf8_lossy(&state.partial);
        if !partial.is_empty() {
            text.push(&partial);
        }
        if text.is_empty() { "    (nothing)".to_owned() } else { format!("    {}", text.join("\n    ")) }
    }
}

fn matches(line: &str, pattern: &str) -> bool {
    let mut rest = line;
    pattern.split('*').all(|piece| match rest.find(piece) {
        Some(at) => {
            rest = &rest[at + piece.len()..];
            true
        }
        None => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_pieces_in_order() {
        assert!(matches("usb 2-1: new SuperSpeed USB device number 2", "usb 2-1:*new*SuperSpeed"));
        assert!(!matches("new usb", "usb*new"));
    }

    #[test]
    fn a_wait_behind_a_mark_ignores_what_came_before() {
        let log = Log::new("test");
        log.push(b"disconnect\n");
        let here = log.here();
        let late = log.clone();
        let writer = std::thread::spawn(move || late.push(b"dis\xc3\xa4\r\nsecond disconnect\n"));
        let line = log.wait_after(here, "disconnect", Duration::from_secs(10)).unwrap();
        writer.join().unwrap();
        assert_eq!(line.text, "second disconnect");
        assert!(log.wait_after(line.mark, "disconnect", Duration::ZERO).is_err());
    }

    #[test]
    fn a_closed_log_ends_a_wait_at_once() {
        let log = Log::new("test");
        log.close();
        let start = Instant::now();
        assert!(log.wait("anything", Duration::from_secs(60)).is_err());
        assert!(start.elapsed() < Duration::from_secs(30));
    }
}
