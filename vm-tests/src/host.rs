//! The host under test: a virtual machine with USB controllers and Debian's kernel, in which our daemons and the guests run.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;
use tempfile::TempDir;

use crate::accel::{self, Accel};
use crate::devices::{Controller, Plugged, UsbDevice};
use crate::image::Image;
use crate::initramfs::Extra;
use crate::log::Log;
use crate::patience::Deadline;
use crate::qmp::Qmp;
use crate::remote::{Process, Remote};
use crate::{KERNEL_ARGUMENTS, agent, binaries, initramfs, patience, progress};

/// Programs that the host under test gets: ours, and those of this crate that run in it.
const PROGRAMS: &[&str] = &[
    "usbpolicyd",
    "usbpolicyd-sysfs",
    "usbpolicyctl",
    "usbvfiod",
    "vm-agent",
    "play-instance",
    "usb-transport",
    "usbip-device",
    "gadget",
    "usbtest-run",
    "usb-stream",
    "usb-client",
    "bench-probe",
    "uevent-burst",
    "kernel-probes",
    "hand-over-latency",
];

/// Start of QEMU until it connects to its sockets.
const CONNECT_WITHIN: Duration = Duration::from_secs(60);

/// Start of the kernel until the agent answers; 5 s on an idle machine.
const BOOT_WITHIN: Duration = Duration::from_secs(150);

/// The same where the processor is real and only its use is in doubt.
const BOOT_WITHIN_KVM: Duration = Duration::from_secs(15);

/// A device that is pulled is gone at once for QEMU.
const UNPLUG_WITHIN: Duration = Duration::from_secs(10);

/// An answer of usbpolicyd after a failure; a host that hangs must not hold up the report.
const REPORT_WITHIN: Duration = Duration::from_secs(20);

/// What the host under test is made of.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// Its USB controllers.
    pub controllers: Vec<Controller>,
    /// Its memory; guests live in it.
    pub memory_mib: u32,
    /// More words for its kernel command line.
    pub kernel_arguments: String,
    /// What its guests have beyond drivers and a shell.
    pub guest_extras: Vec<Extra>,
}

impl Default for HostConfig {
    fn default() -> Self {
        Self {
            controllers: vec![Controller::Xhci],
            memory_mib: 3072,
            kernel_arguments: String::new(),
            guest_extras: Vec::new(),
        }
    }
}

impl HostConfig {
    /// With these controllers.
    pub fn with(controllers: &[Controller]) -> Self {
        Self { controllers: controllers.to_vec(), ..Self::default() }
    }

    /// The same with more in its guests.
    pub fn extras(self, guest_extras: &[Extra]) -> Self {
        Self { guest_extras: guest_extras.to_vec(), ..self }
    }
}

/// A running host. It is switched off when dropped.
pub struct Host {
    remote: Remote,
    qmp: Qmp,
    console: Log,
    /// Everything a person wants to see after a failure, in order of appearance.
    logs: Mutex<Vec<Log>>,
    image: Image,
    accel: Accel,
    qemu: Child,
    /// Sockets, media and the share; last, so that QEMU is gone before its files are.
    directory: TempDir,
}

impl Host {
    /// Boots a host and waits until it takes commands.
    pub fn boot(config: &HostConfig) -> Result<Self> {
        let image = Image::get()?;
        for accel in accel::candidates()? {
            match Self::boot_with(config, &image, accel) {
                Ok(host) if accel == Accel::Tcg => return Ok(host),
                Ok(host) if host.run("test -c /dev/kvm").is_ok() => {
                    accel::remember(accel, true)?;
                    return Ok(host);
                }
                Err(error) if accel == Accel::Tcg => return Err(error),
                // No guest can run in it, or it does not run at all: emulate the processor instead.
                Ok(_) | Err(_) => accel::remember(accel, false)?,
            }
        }
        bail!("no way to run a virtual machine here")
    }

    fn boot_with(config: &HostConfig, image: &Image, accel: Accel) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("vm-tests-").tempdir()?;
        let at = |name: &str| directory.path().join(name);
        progress("bringing the programs up to date");
        let programs = binaries::directory()?;
        let share = at("stage");
        std::fs::create_dir_all(share.join("bin"))?;
        for program in PROGRAMS {
            let from = programs.join(program);
            // A workspace in the making may lack one; a scenario that starts it says so.
            if from.exists() {
                binaries::stage(&from, &share.join("bin").join(program))?;
            }
        }
        for (variable, name) in [("CLOUD_HYPERVISOR", "cloud-hypervisor"), ("PEER_USBVFIOD", "peer-usbvfiod")]
        {
            if let Some(from) = std::env::var_os(variable).map(PathBuf::from) {
                binaries::stage(&from, &share.join("bin").join(name)).context(variable)?;
            }
        }
        if let Some(peer) = std::env::var_os("PEER_USBVFIOD").map(PathBuf::from) {
            binaries::stage(&peer.with_file_name("remote"), &share.join("bin/peer-remote"))?;
        }
        binaries::stage_packaging(&share)?;
        std::fs::write(share.join("host-start.sh"), include_bytes!("host-start.sh"))?;
        std::fs::write(
            share.join("guest.initramfs"),
            initramfs::for_guest(image, &programs.join("vm-agent"), &config.guest_extras)?,
        )?;
        std::fs::write(at("host.initramfs"), initramfs::for_host(image)?)?;

        progress(&format!("booting the host ({accel:?})"));
        let qmp_listener = UnixListener::bind(at("qmp.sock"))?;
        let agent_listener = UnixListener::bind(at("agent.sock"))?;
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-machine",
            "pc",
            "-smp",
            accel.processors(),
        ]);
        qemu.args(accel.arguments());
        qemu.arg("-m").arg(format!("{}M", config.memory_mib));
        qemu.arg("-kernel").arg(image.kernel()).arg("-initrd").arg(at("host.initramfs"));
        // The agent looks after the registers of a controller that the kernel drives: see `lost_interrupts`.
        qemu.arg("-append")
            .arg(format!("console=ttyS0 iomem=relaxed {KERNEL_ARGUMENTS} {}", config.kernel_arguments));
        qemu.args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]);
        qemu.arg("-chardev").arg(format!("socket,id=qmp,path={}", at("qmp.sock").display()));
        qemu.args(["-mon", "chardev=qmp,mode=control"]);
        qemu.arg("-chardev").arg(format!("socket,id=agent,path={}", at("agent.sock").display()));
        qemu.args(["-device", "virtio-serial-pci", "-device"]);
        qemu.arg(format!("virtserialport,chardev=agent,name={}", agent::PORT_NAME));
        for (tag, path) in [("image", &image.root), ("stage", &share)] {
            qemu.arg("-fsdev").arg(format!(
                "local,id={tag},path={},security_model=none,readonly=on,multidevs=remap",
                path.display()
            ));
            qemu.arg("-device").arg(format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"));
        }
        for controller in &config.controllers {
            let ports = if *controller == Controller::Xhci { ",p2=8,p3=8" } else { "" };
            let (model, name, slot) = (controller.model(), controller.name(), controller.pci_device());
            qemu.arg("-device").arg(format!("{model},id={name},addr={slot:#x}{ports}"));
        }
        let mut qemu = qemu
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start qemu-system-x86_64 (`vm-tests/setup.sh` installs it)")?;
        patience::follow(qemu.id());
        let console = Log::new("console of the host");
        crate::follow(qemu.stdout.take(), &console);
        crate::follow(qemu.stderr.take(), &console);

        let connected = accept(&qmp_listener, &mut qemu, &console)
            .and_then(|qmp| Ok((Qmp::new(qmp)?, accept(&agent_listener, &mut qemu, &console)?)));
        let (qmp, agent) = match connected {
            Ok(connected) => connected,
            Err(error) => {
                patience::unfollow(qemu.id());
                let _ = qemu.kill().and_then(|()| qemu.wait());
                return Err(error);
            }
        };
        let remote = Remote::new("the host", agent.try_clone()?, agent);
        let image = image.clone();
        let host = Self { remote, qmp, console, logs: Mutex::default(), image, accel, qemu, directory };
        let within = if accel == Accel::Tcg { BOOT_WITHIN } else { BOOT_WITHIN_KVM };
        host.remote
            .wait_boot_after(0, within)
            .with_context(|| format!("console:\n{}", host.console.tail(40)))?;
        if accel == Accel::Tcg {
            host.remote.keep_awake();
        }
        progress("the host is up");
        Ok(host)
    }

    /// The line to its agent.
    pub fn remote(&self) -> &Remote {
        &self.remote
    }

    /// Runs a shell script in it that must succeed, and gives what it printed.
    pub fn run(&self, script: &str) -> Result<String> {
        self.remote.run(script)
    }

    /// Starts a program in it whose log is part of the report of a failure.
    pub fn spawn<S: AsRef<str>>(&self, argv: &[S]) -> Result<Process> {
        let process = self.remote.spawn(argv)?;
        self.keep(process.log());
        Ok(process)
    }

    /// Its kernel messages.
    pub fn console(&self) -> &Log {
        &self.console
    }

    /// The image it runs from.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Whether its processor is emulated.
    pub fn accel(&self) -> Accel {
        self.accel
    }

    /// The monitor of its QEMU.
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Makes a log part of the report of a failure.
    pub fn keep(&self, log: &Log) {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner).push(log.clone());
    }

    /// Plugs a device in, with a fresh medium if it has one.
    pub fn plug(&self, device: UsbDevice) -> Result<Plugged> {
        let medium = device.make_medium(self.directory.path())?;
        let plugged = Plugged { device, medium };
        self.replug(&plugged)?;
        Ok(plugged)
    }

    /// Plugs a device in again after [`Self::unplug`], with what is on it.
    pub fn replug(&self, plugged: &Plugged) -> Result<()> {
        for (command, arguments) in plugged.device.plug_commands(plugged.medium.as_ref()) {
            self.qmp.execute(command, arguments)?;
        }
        progress(&format!("plugged {}", plugged.device.name()));
        Ok(())
    }

    /// Pulls a device out, whatever it is doing.
    pub fn unplug(&self, plugged: &Plugged) -> Result<()> {
        let name = plugged.device.name();
        let before = self.qmp.here();
        self.qmp.execute("device_del", json!({"id": name}))?;
        progress(&format!("pulled {name}"));
        self.qmp.wait_event(before, "DEVICE_DELETED", UNPLUG_WITHIN, |data| data["device"] == name)?;
        if plugged.device.has_node() {
            self.qmp.execute("blockdev-del", json!({"node-name": plugged.device.node()}))?;
        }
        Ok(())
    }

    /// Presses and releases keys, by QEMU's names (`a`, `ret`, `shift`).
    pub fn press(&self, keys: &[&str]) -> Result<()> {
        for key in keys {
            for down in [true, false] {
                let key = json!({"key": {"type": "qcode", "data": key}, "down": down});
                self.qmp.execute("input-send-event", json!({"events": [{"type": "key", "data": key}]}))?;
            }
        }
        Ok(())
    }

    /// The host kernel's name of a plugged device, like `2-1`; waits until the host has enumerated it.
    pub fn kernel_name(&self, plugged: &Plugged) -> Result<String> {
        let device = &plugged.device;
        let pci = device.controller().pci_address();
        let script = format!(
            "for try in $(seq 100); do for place in /sys/bus/usb/devices/*-{port}; do \
               case $(readlink -f \"$place\") in */{pci}/*) [ -e \"$place\"/idVendor ] && echo ${{place##*/}} && exit 0;; esac; \
             done; udevadm settle; read -t 0.1 nothing < /dev/zero; done; exit 1",
            port = device.port_chain()
        );
        let shell = self.remote.spawn(&["bash", "-c", &script])?;
        shell.close_input()?;
        let ended = shell.wait(Duration::from_secs(60))?;
        let name = String::from_utf8_lossy(&shell.take_stdout()).trim().to_owned();
        if name.is_empty() {
            bail!(
                "the host does not see {} at port {} of {pci}: {ended:?}",
                device.name(),
                device.port_chain()
            );
        }
        Ok(name)
    }

    /// Processor time that the whole virtual host has used so far: on a busy machine a fairer clock than the wall's.
    pub fn cpu_time(&self) -> Result<Duration> {
        let stat =
            std::fs::read_to_string(format!("/proc/{}/stat", self.qemu.id())).context("times of QEMU")?;
        // proc(5): behind the name in brackets, utime and stime are fields 14 and 15, counted from 1, in hundredths.
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        let ticks = fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().unwrap_or(0));
        Ok(Duration::from_millis(ticks.sum::<u64>() * 10))
    }

    /// What an engineer needs after a failure: what usbpolicyd says of the devices, the last lines of everybody, and then
    /// more of the same. In this order, since whoever shows a long report shows its beginning.
    pub fn report(&self) -> String {
        let mut report = format!("---- usbpolicyctl list\n{}\n", self.ask_usbpolicyd());
        let logs = self.logs.lock().unwrap_or_else(PoisonError::into_inner);
        for lines in [8, 60] {
            for log in logs.iter().rev().chain([&self.console]) {
                report += &format!("---- {}, last {lines} lines\n{}\n", log.name(), log.tail(lines));
            }
        }
        report
    }

    fn ask_usbpolicyd(&self) -> String {
        let answer = self.remote.run_within("usbpolicyctl list 2>&1 || true", REPORT_WITHIN);
        answer.unwrap_or_else(|error| format!("{error:#}"))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        patience::unfollow(self.qemu.id());
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// The connection QEMU makes to one of our sockets. It ends early when QEMU does.
fn accept(listener: &UnixListener, qemu: &mut Child, console: &Log) -> Result<UnixStream> {
    use std::os::fd::AsFd;
    let deadline = Deadline::after(CONNECT_WITHIN);
    while !deadline.is_over() {
        let mut waiting = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        if poll(&mut waiting, PollTimeout::from(100_u16)).context("wait for QEMU")? > 0 {
            return Ok(listener.accept()?.0);
        }
        if let Some(status) = qemu.try_wait()? {
            bail!("QEMU ended with {status}:\n{}", console.tail(20));
        }
    }
    bail!("QEMU did not connect within {CONNECT_WITHIN:?}:\n{}", console.tail(20))
}
