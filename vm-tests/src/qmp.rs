//! QEMU's control socket: commands, their answers, and events (QEMU `docs/interop/qmp-spec.rst`).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::patience::Deadline;

/// How long QEMU may take to answer: it waits for its own global lock, which emulated processors hold at times.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// A connected monitor, past the negotiation.
pub struct Qmp {
    stream: Mutex<UnixStream>,
    shared: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Default)]
struct State {
    last_id: u64,
    answers: Vec<Value>,
    events: Vec<Value>,
    closed: bool,
}

/// A position in the stream of events.
#[derive(Clone, Copy, Debug)]
pub struct EventMark(usize);

impl Qmp {
    /// Negotiates on a fresh connection.
    pub fn new(stream: UnixStream) -> Result<Self> {
        let shared: Arc<(Mutex<State>, Condvar)> = Arc::default();
        let from = stream.try_clone()?;
        let reader = Arc::clone(&shared);
        thread::spawn(move || read_all(from, &reader));
        let qmp = Self { stream: Mutex::new(stream), shared };
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a command and gives what it returns.
    pub fn execute(&self, command: &str, arguments: Value) -> Result<Value> {
        let id = {
            let mut state = self.state();
            state.last_id += 1;
            state.last_id
        };
        let mut line = serde_json::to_vec(&json!({"execute": command, "arguments": arguments, "id": id}))?;
        line.push(b'\n');
        self.stream
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write_all(&line)
            .context("write to QEMU")?;
        let answer = self.wait(ANSWER_WITHIN, |state| {
            let at = state.answers.iter().position(|answer| answer["id"] == id)?;
            Some(state.answers.swap_remove(at))
        });
        let mut answer = answer.with_context(|| format!("QEMU, {command}"))?;
        if let Some(error) = answer.get("error") {
            bail!("QEMU refuses {command} {arguments}: {}", error["desc"]);
        }
        Ok(answer["return"].take())
    }

    /// Behind the last event so far.
    pub fn here(&self) -> EventMark {
        EventMark(self.state().events.len())
    }

    /// Waits for an event of this name behind `mark` whose data satisfies `wanted`.
    pub fn wait_event(
        &self,
        mark: EventMark,
        name: &str,
        within: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let event = self.wait(within, |state| {
            let new = state.events.get(mark.0..).unwrap_or_default();
            new.iter().find(|event| event["event"] == name && wanted(&event["data"])).cloned()
        });
        event.with_context(|| format!("waiting for QEMU's event {name}"))
    }

    fn wait<T>(&self, within: Duration, mut take: impl FnMut(&mut State) -> Option<T>) -> Result<T> {
        let deadline = Deadline::after(within);
        let mut state = self.state();
        loop {
            if let Some(result) = take(&mut state) {
                return Ok(result);
            }
            let left = deadline.left();
            if state.closed {
                bail!("QEMU has ended");
            }
            if left.is_zero() {
                bail!("nothing within {within:?}");
            }
            state = self.shared.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn read_all(from: UnixStream, shared: &(Mutex<State>, Condvar)) {
    for line in BufReader::new(from).lines() {
        let Ok(line) = line else { break };
        let Ok(message) = serde_json::from_str::<Value>(&line) else { continue };
        let mut state = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        if message.get("event").is_some() {
            state.events.push(message);
        } else if message.get("id").is_some() {
            state.answers.push(message);
        }
        shared.1.notify_all();
    }
    shared.0.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
    shared.1.notify_all();
}
