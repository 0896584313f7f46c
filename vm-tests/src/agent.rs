//! The agent that runs inside a machine under test: starts programs for the test and streams what they print.
//!
//! It is also that machine's process 1: the part that runs commands is its child, so that orphans are reaped and the
//! machine goes down when the test goes away. It knows nothing about USB.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::lost_interrupts::LostInterrupts;
use crate::protocol::{Report, Request, bytes_of, text_of};

/// Name of the virtio-serial port that leads to the test.
pub const PORT_NAME: &str = "vm-tests.agent";

/// How long output may still trickle in after a process has ended: a child that it left behind keeps the pipe open.
const OUTPUT_GRACE: Duration = Duration::from_millis(300);

/// The port to the test: the virtio-serial port of our name, or the console (`hvc0`) where the VMM has no such ports.
pub fn find_port() -> Result<PathBuf> {
    if let Ok(ports) = std::fs::read_dir("/sys/class/virtio-ports") {
        for port in ports.flatten() {
            let name = std::fs::read_to_string(port.path().join("name")).unwrap_or_default();
            if name.trim_end() == PORT_NAME {
                return Ok(PathBuf::from("/dev").join(port.file_name()));
            }
        }
    }
    let console = PathBuf::from("/dev/hvc0");
    if console.exists() {
        return Ok(console);
    }
    bail!("neither a virtio-serial port named {PORT_NAME} nor /dev/hvc0")
}

/// Serves requests until the test closes its end.
pub fn serve() -> Result<()> {
    let path = find_port()?;
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))?;
    if nix::unistd::isatty(&port).unwrap_or(false) {
        // A terminal would echo lines back, cut long ones and change their ends. Set on the open file: this driver forgets
        // its settings when the last one closes it.
        let status = Command::new("stty").args(["raw", "-echo"]).stdin(port.try_clone()?).status();
        if !status.is_ok_and(|status| status.success()) {
            bail!("cannot make {} raw", path.display());
        }
    }
    let reports = Reports(Arc::new(Mutex::new(port.try_clone().context("second handle of the port")?)));
    reports.send(&Report::Ready)?;
    let (mut processes, mut interrupts) = (HashMap::new(), None);
    let mut lines = BufReader::new(port);
    let mut line = String::new();
    loop {
        line.clear();
        if lines.read_line(&mut line).context("read the port")? == 0 {
            return Ok(());
        }
        match serde_json::from_str(&line) {
            // Asked of the host only, and when its drivers are there.
            Ok(Request::Wake) => interrupts.get_or_insert_with(LostInterrupts::new).look(),
            Ok(request) => handle(request, &mut processes, &reports)?,
            Err(error) => eprintln!("agent: {error} in {line:?}"),
        }
    }
}

/// What the agent keeps of a started process.
struct Running {
    group: Pid,
    stdin: Option<ChildStdin>,
}

/// The way back to the test, shared by the threads that follow the processes.
#[derive(Clone)]
struct Reports(Arc<Mutex<File>>);

impl Reports {
    fn send(&self, report: &Report) -> Result<()> {
        let mut line = serde_json::to_vec(report)?;
        line.push(b'\n');
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line).context("write the port")
    }
}

fn handle(request: Request, processes: &mut HashMap<u32, Running>, reports: &Reports) -> Result<()> {
    match request {
        Request::Run { id, argv } => match start(&argv) {
            Ok(mut child) => {
                let group = Pid::from_raw(child.id().cast_signed());
                processes.insert(id, Running { group, stdin: child.stdin.take() });
                follow(id, child, reports.clone());
            }
            Err(error) => {
                reports.send(&Report::Output {
                    id,
                    error: true,
                    data: text_of(format!("{error:#}\n").as_bytes()),
                })?;
                reports.send(&Report::Exit { id, status: 127 })?;
            }
        },
        Request::Input { id, data } => {
            if let Some(stdin) = processes.get_mut(&id).and_then(|process| process.stdin.as_mut()) {
                // A process that has ended or closed its input does not want it: nothing to report.
                let _ = stdin.write_all(&bytes_of(&data)).and_then(|()| stdin.flush());
            }
        }
        Request::CloseInput { id } => {
            if let Some(process) = processes.get_mut(&id) {
                process.stdin = None;
            }
        }
        Request::Wake => {}
        Request::Signal { id, signal } => {
            if let (Some(process), Ok(signal)) = (processes.get(&id), Signal::try_from(signal)) {
                // ESRCH: it has just ended; its exit is on the way.
                let _ = killpg(process.group, signal);
            }
        }
    }
    Ok(())
}

fn start(argv: &[String]) -> Result<Child> {
    let (program, arguments) = argv.split_first().context("empty command")?;
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("start {program}"))
}

/// Three threads per process: one for each stream, one for the end.
fn follow(id: u32, mut child: Child, reports: Reports) {
    let (done, all_done) = mpsc::channel();
    if let Some(stdout) = child.stdout.take() {
        let (reports, done) = (reports.clone(), done.clone());
        thread::spawn(move || pump(stdout, id, false, &reports, &done));
    }
    if let Some(stderr) = child.stderr.take() {
        let reports = reports.clone();
        thread::spawn(move || pump(stderr, id, true, &reports, &done));
    }
    thread::spawn(move || {
        let status = child.wait().map_or(-1, status_number);
        // Ends when both senders are gone, or when nothing came for the grace time.
        while all_done.recv_timeout(OUTPUT_GRACE).is_ok() {}
        let _ = reports.send(&Report::Exit { id, status });
    });
}

fn status_number(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn pump(mut from: impl Read, id: u32, error: bool, reports: &Reports, progress: &mpsc::Sender<()>) {
    let mut buffer = vec![0; 32 * 1024];
    while let Ok(length) = from.read(&mut buffer) {
        if length == 0
            || reports.send(&Report::Output { id, error, data: text_of(&buffer[..length]) }).is_err()
        {
            return;
        }
        let _ = progress.send(());
    }
}

/// Process 1: runs the serving part as its child, reaps every orphan, and returns when the serving part is gone.
pub fn reap_until_served() -> Result<()> {
    let own_path = std::env::current_exe().context("own path")?;
    let server = Command::new(own_path).arg("serve").spawn().context("start the serving part")?;
    let server = Pid::from_raw(server.id().cast_signed());
    loop {
        match nix::sys::wait::wait() {
            Ok(status) if status.pid() == Some(server) => return Ok(()),
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("wait for children"),
        }
    }
}
