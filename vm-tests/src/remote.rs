//! The test's end of the line to an agent: start programs in a machine, read what they print, wait for their end.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::Signal;

use crate::log::Log;
use crate::patience::Deadline;
use crate::protocol::{Report, Request, bytes_of, text_of};

/// Bytes per message of input: keeps the lines short enough for any console.
const INPUT_CHUNK: usize = 8 * 1024;

/// Between two interrupts of [`Remote::keep_awake`].
const WAKE_EACH: Duration = Duration::from_millis(250);

/// [`Report::Ready`] on the line; no other report can end like this.
const READY_LINE: &[u8] = b"\"ready\"\n";

/// A machine died while it booted, or never came up.
#[derive(Debug, thiserror::Error)]
#[error("no agent in {machine}: {how} (limit {within:?})")]
pub struct NoBoot {
    machine: String,
    how: &'static str,
    within: Duration,
}

/// A machine that can run programs for us: the host under test, or a guest in it.
#[derive(Clone)]
pub struct Remote {
    shared: Arc<Shared>,
}

/// Held by each [`Remote`], each [`Process`] and the thread that reads the line.
struct Shared {
    name: String,
    writer: Mutex<Box<dyn Write + Send>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    last_id: u32,
    /// How often the agent has said that it is ready: once for each boot.
    boots: u32,
    closed: bool,
    processes: HashMap<u32, Entry>,
}

struct Entry {
    log: Log,
    stdout: Vec<u8>,
    raw: Option<mpsc::Sender<Vec<u8>>>,
    ended: Option<Ended>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this status; 128 + n: by signal n; 127: not started.
    Status(i32),
    /// Its machine rebooted, died or was switched off.
    Lost,
}

/// A program that has run to its end.
#[derive(Clone, Debug)]
pub struct Output {
    /// Its exit status.
    pub status: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Both streams as lines, for a person.
    pub transcript: String,
}

impl Output {
    /// Standard output as text without white space at the ends.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }
}

impl Remote {
    /// Takes both directions of a line to an agent. Reading happens in a thread that ends with the line.
    pub fn new(name: &str, from: impl Read + Send + 'static, to: impl Write + Send + 'static) -> Self {
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            writer: Mutex::new(Box::new(to)),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let reader = Arc::clone(&shared);
        thread::spawn(move || reader.read_all(BufReader::new(from)));
        Self { shared }
    }

    /// Interrupts the machine four times a second from now on, until it ends. QEMU's emulated APIC (7.2, one processor)
    /// sometimes loses the timer interrupt of a machine that hosts another one and is busy with it. If it is idle then, it
    /// sleeps until the next interrupt of any kind, minutes if all that is going on waits for a timer; the kernel tells of
    /// it afterwards ("soft lockup - CPU#0 stuck for 136s! [swapper/0:0]"). Seen with QEMU's own usb-host, so without any
    /// part of ours.
    pub fn keep_awake(&self) {
        let shared = Arc::downgrade(&self.shared);
        thread::spawn(move || {
            while let Some(shared) = shared.upgrade()
                && !shared.state().closed
                && shared.send(&Request::Wake).is_ok()
            {
                drop(shared);
                thread::sleep(WAKE_EACH);
            }
        });
    }

    /// How often the machine has come up so far.
    pub fn boots(&self) -> u32 {
        self.shared.state().boots
    }

    /// Waits until the machine has come up more than `boots` times.
    pub fn wait_boot_after(&self, boots: u32, within: Duration) -> Result<()> {
        let state = self.shared.wait(within, |state| (state.boots > boots || state.closed).then_some(()));
        let (state, reached) = state;
        if reached.is_none() || state.boots <= boots {
            let how = if state.closed { "its machine ended" } else { "it did not come up in time" };
            return Err(NoBoot { machine: self.shared.name.clone(), how, within }.into());
        }
        Ok(())
    }

    /// Starts a program; its output is collected in its log.
    pub fn spawn<S: AsRef<str>>(&self, argv: &[S]) -> Result<Process> {
        self.start(argv, None)
    }

    /// Starts a program whose standard output goes to the returned reader instead of the log.
    pub fn spawn_piped<S: AsRef<str>>(&self, argv: &[S]) -> Result<(Process, ChannelReader)> {
        let (sender, chunks) = mpsc::channel();
        let process = self.start(argv, Some(sender))?;
        Ok((process, ChannelReader { chunks, rest: Vec::new(), taken: 0 }))
    }

    fn start<S: AsRef<str>>(&self, argv: &[S], raw: Option<mpsc::Sender<Vec<u8>>>) -> Result<Process> {
        let argv: Vec<String> = argv.iter().map(|arg| arg.as_ref().to_owned()).collect();
        let program = argv.first().context("empty command")?;
        let program = program.rsplit('/').next().unwrap_or(program);
        let log = Log::new(&format!("{program} in {}", self.shared.name));
        let id = {
            let mut state = self.shared.state();
            if state.closed {
                bail!("{} is gone", self.shared.name);
            }
            state.last_id += 1;
            let id = state.last_id;
            state.processes.insert(id, Entry { log: log.clone(), stdout: Vec::new(), raw, ended: None });
            id
        };
        self.shared.send(&Request::Run { id, argv })?;
        Ok(Process { id, log, shared: Arc::clone(&self.shared) })
    }

    /// Runs a shell script to its end, whatever its status.
    pub fn try_run(&self, script: &str, within: Duration) -> Result<Output> {
        let process = self.spawn(&["sh", "-c", script])?;
        process.close_input()?;
        let ended = process.wait(within).with_context(|| format!("`{script}` in {}", self.shared.name))?;
        let transcript = process.log.tail(60);
        let stdout = process.take_stdout();
        match ended {
            Ended::Status(status) => Ok(Output { status, stdout, transcript }),
            Ended::Lost => bail!("{} went away while it ran `{script}`:\n{transcript}", self.shared.name),
        }
    }

    /// Runs a shell script that must succeed, and gives what it printed.
    pub fn run_within(&self, script: &str, within: Duration) -> Result<String> {
        let output = self.try_run(script, within)?;
        if output.status != 0 {
            bail!("`{script}` in {} ended with {}:\n{}", self.shared.name, output.status, output.transcript);
        }
        Ok(output.text())
    }

    /// As [`Self::run_within`] with a limit that suits short commands.
    pub fn run(&self, script: &str) -> Result<String> {
        self.run_within(script, Duration::from_secs(90))
    }

    /// Writes a file.
    pub fn write_file(&self, path: &str, content: &[u8]) -> Result<()> {
        let process =
            self.spawn(&["sh", "-c", "mkdir -p \"$(dirname \"$1\")\" && cat > \"$1\"", "sh", path])?;
        process.write(content)?;
        process.close_input()?;
        match process.wait(Duration::from_secs(90))? {
            Ended::Status(0) => Ok(()),
            ended => bail!("write {path} in {}: {ended:?}\n{}", self.shared.name, process.log.tail(5)),
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done` gives something or the time is over.
    fn wait<T>(
        &self,
        within: Duration,
        mut done: impl FnMut(&mut State) -> Option<T>,
    ) -> (MutexGuard<'_, State>, Option<T>) {
        let deadline = Deadline::after(within);
        let mut state = self.state();
        loop {
            let result = done(&mut state);
            let left = deadline.left();
            if result.is_some() || left.is_zero() {
                return (state, result);
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn send(&self, request: &Request) -> Result<()> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        writer
            .write_all(&line)
            .and_then(|()| writer.flush())
            .with_context(|| format!("send to {}", self.name))
    }

    fn read_all(&self, mut from: impl BufRead) {
        let mut line = Vec::new();
        loop {
            line.clear();
            match from.read_until(b'\n', &mut line) {
                Ok(1..) => {}
                Ok(0) | Err(_) => break,
            }
            if line.ends_with(READY_LINE) {
                // Behind half a line, if the machine went down in the middle of one.
                self.take(Report::Ready);
            } else if let Ok(report) = serde_json::from_slice(&line) {
                self.take(report);
            }
        }
        let mut state = self.state();
        state.closed = true;
        lose_all(&mut state);
        self.changed.notify_all();
    }

    fn take(&self, report: Report) {
        let mut state = self.state();
        match report {
            Report::Ready => {
                lose_all(&mut state);
                state.boots += 1;
            }
            Report::Output { id, error, data } => {
                let Some(entry) = state.processes.get_mut(&id) else { return };
                let bytes = bytes_of(&data);
                match &entry.raw {
                    Some(raw) if !error => drop(raw.send(bytes)),
                    _ => {
                        entry.log.push(&bytes);
                        if !error {
                            entry.stdout.extend_from_slice(&bytes);
                        }
                    }
                }
            }
            Report::Exit { id, status } => {
                if let Some(entry) = state.processes.get_mut(&id) {
                    entry.end(Ended::Status(status));
                }
            }
        }
        self.changed.notify_all();
    }
}

impl Entry {
    fn end(&mut self, how: Ended) {
        if self.ended.is_none() {
            self.ended = Some(how);
            self.raw = None;
            self.log.close();
        }
    }
}

fn lose_all(state: &mut State) {
    for entry in state.processes.values_mut() {
        entry.end(Ended::Lost);
    }
}

/// A program that was started in a machine. Dropping it leaves the program alone.
pub struct Process {
    id: u32,
    log: Log,
    shared: Arc<Shared>,
}

impl Process {
    /// What it printed, both streams, as lines.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Waits for its end.
    pub fn wait(&self, within: Duration) -> Result<Ended> {
        let (state, ended) =
            self.shared.wait(within, |state| state.processes.get(&self.id).and_then(|entry| entry.ended));
        drop(state);
        ended.ok_or_else(|| {
            anyhow!("{} still runs after {within:?}; its last lines:\n{}", self.log.name(), self.log.tail(25))
        })
    }

    /// Whether it has not ended as far as we know.
    pub fn is_running(&self) -> bool {
        self.shared.state().processes.get(&self.id).is_some_and(|entry| entry.ended.is_none())
    }

    /// Everything it printed to standard output since the last call.
    pub fn take_stdout(&self) -> Vec<u8> {
        let mut state = self.shared.state();
        state.processes.get_mut(&self.id).map(|entry| std::mem::take(&mut entry.stdout)).unwrap_or_default()
    }

    /// Sends bytes to its standard input.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        for chunk in bytes.chunks(INPUT_CHUNK) {
            self.shared.send(&Request::Input { id: self.id, data: text_of(chunk) })?;
        }
        Ok(())
    }

    /// Ends its standard input.
    pub fn close_input(&self) -> Result<()> {
        self.shared.send(&Request::CloseInput { id: self.id })
    }

    /// Sends a signal to it and what it started.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.shared.send(&Request::Signal { id: self.id, signal: signal as i32 })
    }

    /// Signals it and waits for its end.
    pub fn stop(&self, signal: Signal, within: Duration) -> Result<Ended> {
        self.signal(signal)?;
        self.wait(within)
    }

    /// Its standard input as a writer, for a line to another agent.
    pub fn input(&self) -> ProcessInput {
        ProcessInput { id: self.id, shared: Arc::clone(&self.shared) }
    }
}

/// Standard input of a [`Process`].
pub struct ProcessInput {
    id: u32,
    shared: Arc<Shared>,
}

impl Write for ProcessInput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let chunk = &bytes[..bytes.len().min(INPUT_CHUNK)];
        let request = Request::Input { id: self.id, data: text_of(chunk) };
        self.shared.send(&request).map_err(io::Error::other)?;
        Ok(chunk.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Standard output of a [`Process`] started by [`Remote::spawn_piped`].
pub struct ChannelReader {
    chunks: mpsc::Receiver<Vec<u8>>,
    rest: Vec<u8>,
    taken: usize,
}

impl Read for ChannelReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.taken == self.rest.len() {
            match self.chunks.recv() {
                Ok(chunk) => (self.rest, self.taken) = (chunk, 0),
                Err(mpsc::RecvError) => return Ok(0),
            }
        }
        let length = into.len().min(self.rest.len() - self.taken);
        into[..length].copy_from_slice(&self.rest[self.taken..self.taken + length]);
        self.taken += length;
        Ok(length)
    }
}
