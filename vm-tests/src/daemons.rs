//! Our daemons in the host under test, started as the units in `packaging/` start them: with their own users, no
//! capability, and the udev rule that gives usbpolicyd the device nodes.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::guest::vfio_socket;
use crate::host::Host;
use crate::log::Log;
use crate::patience::Deadline;
use crate::progress;
use crate::remote::{Ended, Process};

/// Start of a daemon until its socket is there; a fraction of a second where nothing is emulated.
const START_WITHIN: Duration = Duration::from_secs(90);

/// SIGTERM until the end.
const STOP_WITHIN: Duration = Duration::from_secs(15);

const POLICY: &str = "/etc/usbpolicyd/policy.toml";
const ADMIN_SOCKET: &str = "/run/usbpolicyd/admin.sock";

/// The emulator of one VM.
pub struct Usbvfiod {
    vm: String,
    process: Process,
}

impl Usbvfiod {
    /// Starts it for a VM and waits for its sockets.
    pub fn start(host: &Host, vm: &str) -> Result<Self> {
        Self::start_with(host, vm, &[])
    }

    /// The same with more arguments.
    pub fn start_with(host: &Host, vm: &str, arguments: &[&str]) -> Result<Self> {
        progress(&format!("starting usbvfiod for {vm}"));
        prepare(host)?;
        let (user, directory) = (format!("usbvfiod-{vm}"), format!("/run/usbvfiod/{vm}"));
        host.run(&format!(
            "id -u {user} >/dev/null 2>&1 || useradd --system --no-create-home --gid usbpolicyd {user} && \
             install -d -m 0750 -o {user} -g usbpolicyd {directory}"
        ))?;
        let (socket, policy_socket) = (vfio_socket(vm), format!("{directory}/policy.sock"));
        let mut argv = as_user(&user);
        argv.extend(
            ["usbvfiod", "--socket-path", &socket, "--policy-socket", &policy_socket].map(str::to_owned),
        );
        argv.extend(arguments.iter().map(|&argument| argument.to_owned()));
        let process = host.spawn(&argv)?;
        wait_socket(host, &socket, &process)?;
        wait_socket(host, &policy_socket, &process)?;
        Ok(Self { vm: vm.to_owned(), process })
    }

    /// The VM it serves.
    pub fn vm(&self) -> &str {
        &self.vm
    }

    /// What it logs.
    pub fn log(&self) -> &Log {
        self.process.log()
    }

    /// Its process in the host.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Ends it as an operator would, and checks that it ends cleanly.
    pub fn stop(self) -> Result<()> {
        stop(&self.process)
    }
}

/// The policy daemon of the host.
pub struct Usbpolicyd {
    process: Process,
}

impl Usbpolicyd {
    /// Starts it with a policy and waits until it can be asked.
    pub fn start(host: &Host, policy: &str) -> Result<Self> {
        progress("starting usbpolicyd");
        prepare(host)?;
        host.remote().write_file(POLICY, policy.as_bytes())?;
        Self::start_again(host)
    }

    /// Starts it with the policy that is already there: after [`Self::kill`].
    pub fn start_again(host: &Host) -> Result<Self> {
        Self::start_again_with(host, &[])
    }

    /// The same with more arguments.
    pub fn start_again_with(host: &Host, arguments: &[&str]) -> Result<Self> {
        // What a crashed one left behind must not be taken for the new one's.
        host.run(&format!("rm -f {ADMIN_SOCKET}"))?;
        let mut argv = BEFORE_UDEV.map(str::to_owned).to_vec();
        argv.extend(as_user("usbpolicyd"));
        argv.extend(["usbpolicyd", "--policy", POLICY].map(str::to_owned));
        argv.extend(arguments.iter().map(|&argument| argument.to_owned()));
        let process = host.spawn(&argv)?;
        wait_socket(host, ADMIN_SOCKET, &process)?;
        Ok(Self { process })
    }

    /// What it logs.
    pub fn log(&self) -> &Log {
        self.process.log()
    }

    /// Its process in the host.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Puts another policy in force.
    pub fn reload(&self, host: &Host, policy: &str) -> Result<()> {
        progress("reloading the policy");
        host.remote().write_file(POLICY, policy.as_bytes())?;
        self.process.signal(Signal::SIGHUP)
    }

    /// Kills it without a chance to tidy up.
    pub fn kill(self) -> Result<()> {
        progress("killing usbpolicyd");
        match self.process.stop(Signal::SIGKILL, STOP_WITHIN)? {
            Ended::Status(137) => Ok(()),
            ended => bail!("usbpolicyd ended with {ended:?} before it was killed:\n{}", self.log().tail(25)),
        }
    }

    /// Ends it as an operator would, and checks that it ends cleanly.
    pub fn stop(self) -> Result<()> {
        stop(&self.process)
    }
}

/// What `usbpolicyctl list --json` says: an array of devices.
pub fn list(host: &Host) -> Result<Value> {
    let text = host.run("usbpolicyctl list --json")?;
    serde_json::from_str(&text).with_context(|| format!("answer of usbpolicyctl: {text}"))
}

/// Users, groups, the udev rule and the directories of our packages; once per host.
fn prepare(host: &Host) -> Result<()> {
    host.run(&format!("[ -e /run/usbvfiod ] && exit; set -e; {INSTALL}")).map(drop)
}

/// The same in words of a shell; `packaging/` of this repository is in `/stage`.
pub const INSTALL: &str = "cd /stage/packaging; \
     systemd-sysusers sysusers.d/usbpolicyd.conf; \
     systemd-tmpfiles --create tmpfiles.d/usbpolicyd.conf; \
     install -d -o usbpolicyd -g usbpolicyd -m 0700 /var/lib/usbpolicyd; \
     mkdir -p /etc/udev/rules.d /etc/usbpolicyd; cp udev/70-usbpolicyd.rules /etc/udev/rules.d/; \
     udevadm control --reload; udevadm trigger --action=change --subsystem-match=usb; udevadm settle";

/// Words before the command of usbpolicyd: `Nice=` of its unit.
pub const BEFORE_UDEV: [&str; 3] = ["nice", "-n", "-10"];

/// Words before a command that is to run as one of our users, confined as a unit confines it.
pub fn as_user(user: &str) -> Vec<String> {
    let confined = ["--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--"];
    let identity = ["setpriv", "--reuid", user, "--regid", "usbpolicyd"];
    identity.into_iter().chain(confined).map(str::to_owned).collect()
}

/// Waits for a socket of a daemon that runs; tells its last words if it does not.
fn wait_socket(host: &Host, path: &str, process: &Process) -> Result<()> {
    // The file is there before the socket listens; the flag is SO_ACCEPTCON of linux/net.h.
    let shown = format!("until grep -q ' 00010000 .* {path}$' /proc/net/unix; do sleep 0.02; done");
    let waiting = host.remote().spawn(&["sh", "-c", &shown])?;
    let deadline = Deadline::after(START_WITHIN);
    while !deadline.is_over() {
        match waiting.wait(Duration::from_millis(250)) {
            Ok(_) => return Ok(()),
            Err(_) if process.is_running() => {}
            Err(_) => break,
        }
    }
    waiting.signal(Signal::SIGKILL)?;
    bail!("no socket {path}; {} says:\n{}", process.log().name(), process.log().tail(25))
}

fn stop(process: &Process) -> Result<()> {
    match process.stop(Signal::SIGTERM, STOP_WITHIN)? {
        Ended::Status(0) => Ok(()),
        ended => bail!("SIGTERM: {} ended with {ended:?}:\n{}", process.log().name(), process.log().tail(25)),
    }
}
