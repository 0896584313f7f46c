//! Who is measured: each has a device of its own, the same model, in a socket of its own, and all of them are up all the
//! time, so that they can be measured in turn.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use vm_tests::daemons::Usbvfiod;
use vm_tests::scenarios::Client;
use vm_tests::{Guest, GuestConfig, Host, Plugged, Process, Remote, UsbDevice, Vmm, virtual_devices};

use super::clock::Clock;

/// The names that others are compared with.
pub(crate) const USB_HOST: &str = "QEMU usb-host";
pub(crate) const BARE: &str = "a bare usbfs loop in the host";
pub(crate) const PEER: &str = "Cyberus usbvfiod, Cloud Hypervisor";

/// The last socket of one that has USB/IP devices, see [`Way::socket`].
pub(crate) const SOCKETS: u8 = 5;

/// Looks for a disk, five in a second at most.
const DISK_TRIES: u32 = 150;
/// The same on a busy machine.
const DISK_WITHIN: Duration = Duration::from_secs(180);

/// The VM that `hand-over-latency` is.
pub(crate) const LATENCY: &str = "latency";

/// Functions of the guest's driver.
const DOORBELL: &str = "xhci_ring_ep_doorbell";
const INTERRUPT: &str = "xhci_irq";

const PEER_SOCKET: &str = "/run/peer.sock";
const PEER_HOTPLUG_SOCKET: &str = "/run/peer-hotplug.sock";

/// One who moves data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// The host's own drivers.
    Host,
    /// A loop on usbfs in the host, without a guest: the least that any pass-through by usbfs costs.
    Bare,
    /// Our transport in the host, driven by a loop instead of a controller.
    Transport,
    UsbHost,
    Peer,
    Ours(Client),
}

impl Way {
    /// All that can run here.
    pub(crate) fn available() -> Vec<Self> {
        let mut ways = vec![Self::Host, Self::Bare, Self::Transport, Self::UsbHost, Self::Ours(Client::Qemu)];
        if std::env::var_os("CLOUD_HYPERVISOR").is_some() {
            ways.push(Self::Ours(Client::CloudHypervisor));
            if std::env::var_os("PEER_USBVFIOD").is_some() {
                ways.push(Self::Peer);
            }
        }
        ways
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Host => "the host itself",
            Self::Bare => BARE,
            Self::Transport => "our transport without a guest",
            Self::UsbHost => USB_HOST,
            Self::Peer => PEER,
            Self::Ours(Client::Qemu) => "ours, QEMU",
            Self::Ours(Client::CloudHypervisor) => "ours, Cloud Hypervisor",
        }
    }

    /// Whether it is a program that reads its device by usbfs, without drivers above it.
    pub(crate) const fn is_loop(self) -> bool {
        matches!(self, Self::Bare | Self::Transport)
    }

    /// The socket of the host's controller, 1 and up, which is also its port of `vhci_hcd`.
    pub(crate) const fn socket(self) -> u8 {
        match self {
            Self::Host => 1,
            Self::UsbHost => 2,
            Self::Peer => 3,
            Self::Ours(Client::Qemu) => 4,
            Self::Ours(Client::CloudHypervisor) => 5,
            Self::Bare => 6,
            Self::Transport => 7,
        }
    }

    /// Name of the VM, also for the policy.
    const fn vm(self) -> &'static str {
        match self {
            Self::Host | Self::Bare | Self::Transport => "",
            Self::UsbHost => "usbhost",
            Self::Peer => "peer",
            Self::Ours(Client::Qemu) => "vm1",
            Self::Ours(Client::CloudHypervisor) => "vm2",
        }
    }

    /// A regular expression for the command line of the process that moves the data, in the host.
    const fn process(self) -> Option<&'static str> {
        match self {
            Self::Host | Self::Bare | Self::Transport => None,
            Self::UsbHost => Some("^qemu-system-x86_64.*usb-host"),
            Self::Peer => Some("^peer-usbvfiod"),
            Self::Ours(Client::Qemu) => Some("^usbvfiod .*/run/usbvfiod/vm1/"),
            Self::Ours(Client::CloudHypervisor) => Some("^usbvfiod .*/run/usbvfiod/vm2/"),
        }
    }
}

/// What each gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Stick,
    Attached,
    Keyboard,
}

/// One who moves data, up and running.
pub(crate) struct Contender<'h> {
    pub(crate) way: Way,
    host: &'h Host,
    guest: Option<Guest>,
    pub(crate) clock: Option<Clock>,
    pub(crate) plugged: Option<Plugged>,
    /// In the host.
    pid: Option<u32>,
    pub(crate) controller: Option<Usbvfiod>,
    /// Held so that it runs.
    _peer: Option<Process>,
}

/// The policy for ours: by socket, and by serial number for what has none.
pub(crate) fn policy() -> String {
    let mut policy = "schema = 1\n[vms.vm1]\n[vms.vm2]\n".to_owned();
    for way in [Way::Ours(Client::Qemu), Way::Ours(Client::CloudHypervisor)] {
        let (vm, socket) = (way.vm(), way.socket());
        for matching in [
            format!("at = \"pci-0000:00:10.0/usb3:{socket}\""),
            format!("id = \"1209:*\", serial = \"{}\"", virtual_serial(socket)),
        ] {
            policy += &format!("[[assign]]\nvm = \"{vm}\"\nmatch = {{ {matching} }}\n");
        }
    }
    policy += &format!("[vms.{LATENCY}]\n[[assign]]\nvm = \"{LATENCY}\"\nmatch = {{ id = \"1d6b:0108\" }}\n");
    policy
}

/// Serial number of the USB/IP devices that belong to a socket.
pub(crate) fn virtual_serial(socket: u8) -> String {
    format!("VIRTUAL{socket}")
}

impl<'h> Contender<'h> {
    /// Starts what it needs, with no device yet. `vhci_buses`: the buses of USB/IP devices.
    pub(crate) fn start(host: &'h Host, way: Way, vhci_buses: &[u32]) -> Result<Self> {
        let (mut controller, mut peer) = (None, None);
        let config = match way {
            Way::Host | Way::Bare | Way::Transport => None,
            Way::UsbHost => {
                let port = way.socket();
                let buses = [&[1, 2], vhci_buses].concat();
                let devices = buses.iter().map(|bus| format!("hostbus={bus},hostport={port}")).collect();
                Some(GuestConfig::new(way.vm(), Vmm::QemuUsbHost { devices }))
            }
            Way::Peer => {
                host.run(&format!("rm -f {PEER_SOCKET} {PEER_HOTPLUG_SOCKET}"))?;
                let argv = ["peer-usbvfiod", "--no-color", "--socket-path", PEER_SOCKET];
                let process =
                    host.spawn(&[&argv[..], &["--hotplug-socket-path", PEER_HOTPLUG_SOCKET]].concat())?;
                host.run(&format!("until [ -S {PEER_SOCKET} ]; do sleep 0.05; done"))?;
                peer = Some(process);
                Some(GuestConfig::new(way.vm(), Vmm::CloudHypervisor { socket: PEER_SOCKET.to_owned() }))
            }
            Way::Ours(client) => {
                // Of a start that failed.
                host.run(&format!("pkill -f '^usbvfiod .*/run/usbvfiod/{}/' && sleep 2; true", way.vm()))?;
                controller = Some(Usbvfiod::start(host, way.vm())?);
                Some(client.guest(way.vm()))
            }
        };
        let guest = config.map(|config| Guest::start(host, &config)).transpose()?;
        if let Some(guest) = &guest {
            virtual_devices::install(guest, "bench-probe")?;
            // Port changes are told by the driver only when asked to.
            guest.run(
                "echo 'module xhci_hcd func handle_port_status +p' > /sys/kernel/debug/dynamic_debug/control; \
                 modprobe cdc_acm",
            )?;
        }
        let pid = match way.process() {
            Some(pattern) => Some(
                host.run(&format!("pgrep -of '{pattern}'"))?
                    .trim()
                    .parse()
                    .with_context(|| format!("the process of {}", way.name()))?,
            ),
            None => None,
        };
        let mut contender =
            Self { way, host, guest, clock: None, plugged: None, pid, controller, _peer: peer };
        if !way.is_loop() {
            contender.clock = Some(Clock::start(contender.machine())?);
        }
        Ok(contender)
    }

    pub(crate) fn name(&self) -> &'static str {
        self.way.name()
    }

    /// Where its data ends.
    pub(crate) fn machine(&self) -> &Remote {
        self.guest.as_ref().map_or(self.host.remote(), Guest::remote)
    }

    pub(crate) fn host(&self) -> &'h Host {
        self.host
    }

    pub(crate) fn guest(&self) -> Option<&Guest> {
        self.guest.as_ref()
    }

    /// Plugs a device in; the host has it then.
    pub(crate) fn plug(&mut self, kind: Kind) -> Result<()> {
        let name = format!("{kind:?}{}", self.way.socket()).to_lowercase();
        let device = match kind {
            Kind::Stick => UsbDevice::stick(&name).size_mib(64),
            Kind::Attached => UsbDevice::uas(&name).size_mib(64),
            Kind::Keyboard => UsbDevice::keyboard(&name),
        };
        let plugged = self.host.plug(device.port(&self.way.socket().to_string()))?;
        self.host.kernel_name(&plugged)?;
        self.plugged = Some(plugged);
        self.hand_over(&self.node()?)
    }

    /// The peer is told of each device; the others watch for themselves.
    pub(crate) fn hand_over(&self, node: &str) -> Result<()> {
        if self.way == Way::Peer {
            self.host.run(&format!("peer-remote --socket {PEER_HOTPLUG_SOCKET} --attach {node}"))?;
        }
        Ok(())
    }

    /// The host's name for its device, such as `2-1`.
    pub(crate) fn kernel_name(&self) -> Result<String> {
        self.host.kernel_name(self.plugged.as_ref().context("nothing is plugged")?)
    }

    fn node(&self) -> Result<String> {
        node(self.host, &self.kernel_name()?)
    }

    /// Pulls it.
    pub(crate) fn pull(&mut self) -> Result<()> {
        match self.plugged.take() {
            Some(plugged) => self.host.unplug(&plugged),
            None => Ok(()),
        }
    }

    /// The block device of its stick or disk, in its machine.
    pub(crate) fn disk(&self) -> Result<String> {
        // A guest has no other disk; the host has those of all.
        let place = match self.guest {
            Some(_) => "/sys/block/sd*".to_owned(),
            None => format!("/sys/bus/usb/devices/{}/*/host*/target*/*/block/*", self.kernel_name()?),
        };
        // Ends by itself: what is left behind would slow everybody down.
        let script = format!(
            "for try in $(seq {DISK_TRIES}); do for block in {place}; do \
               [ -b /dev/${{block##*/}} ] && [ \"$(cat $block/size)\" != 0 ] && echo /dev/${{block##*/}} && exit; \
             done; busybox usleep 200000; done; exit 1"
        );
        self.machine().run_within(&script, DISK_WITHIN).context("no disk came")
    }

    /// Runs the probe in its machine.
    pub(crate) fn probe(&self, arguments: &str, within: Duration) -> Result<Value> {
        self.script(&format!("bench-probe {arguments}"), within)
    }

    /// Runs a script in its machine that ends with a line of JSON.
    pub(crate) fn script(&self, script: &str, within: Duration) -> Result<Value> {
        let text = self.machine().run_within(script, within)?;
        let last = text.lines().last().unwrap_or_default();
        serde_json::from_str(last).with_context(|| format!("`{script}` said {text}"))
    }

    /// Processor time of the USB process so far, in seconds. Of QEMU the main thread counts, in which `usb-host` works;
    /// what it does for register accesses is done by the processor's thread and left out, in its favour.
    pub(crate) fn cpu_seconds(&self) -> Result<Option<f64>> {
        let Some(pid) = self.pid else { return Ok(None) };
        let threads = if self.way == Way::UsbHost { pid.to_string() } else { "*".to_owned() };
        // The first number is nanoseconds on a processor (Documentation/scheduler/sched-stats.rst).
        let text = self.host.run(&format!(
            "cat /proc/{pid}/task/{threads}/schedstat | awk '{{sum += $1}} END {{print sum}}'"
        ))?;
        Ok(Some(text.trim().parse::<f64>().context("schedstat")? / 1e9))
    }

    /// What the USB process asks of its kernel while a disk is used.
    pub(crate) fn system_calls(&self, mode: &str, seconds: f64, within: Duration) -> Result<Option<String>> {
        let Some(pid) = self.pid else { return Ok(None) };
        let times = format!("awk '{{print $14, $15}}' /proc/{pid}/stat");
        let disk = self.disk()?;
        let work = || self.probe(&format!("disk {disk} {mode} --seconds {seconds}"), within);
        let before = self.host.run(&times)?;
        let untraced = work()?;
        let after = self.host.run(&times)?;
        let strace = self.host.spawn(&["strace", "-c", "-f", "-o", "/tmp/calls", "-p", &pid.to_string()])?;
        strace.log().wait("attached", within)?;
        let traced = work()?;
        strace.stop(nix::sys::signal::Signal::SIGINT, within)?;
        let calls = self.host.run("cut -c 1-100 /tmp/calls")?;
        Ok(Some(format!(
            "untraced: {untraced}, user and system time in 10 ms from {before} to {after}\ntraced: {traced}\n{calls}"
        )))
    }

    /// How long the guest's driver takes for a doorbell (a register write and a read) and for an interrupt (three reads and
    /// three writes) while it reads at random: median in µs and count of each.
    pub(crate) fn register_times(&self, seconds: f64, within: Duration) -> Result<Option<String>> {
        if self.guest.is_none() {
            return Ok(None);
        }
        let disk = self.disk()?;
        let script = format!(
            "cd /sys/kernel/debug/tracing && echo 0 > tracing_on && echo > trace && \
             echo {DOORBELL} {INTERRUPT} > set_ftrace_filter && echo function_graph > current_tracer && \
             echo 1 > tracing_on && bench-probe disk {disk} random --seconds {seconds} >&2; echo 0 > tracing_on; \
             sed -n 's/.*[^0-9.]\\([0-9.]*\\) us *|.*\\({DOORBELL}\\|{INTERRUPT}\\).*/\\2 \\1/p' trace | head -n 4000; \
             echo nop > current_tracer; echo > set_ftrace_filter"
        );
        let text = self.machine().run_within(&script, within)?;
        let of = |function: &str| {
            let lines = text.lines().filter_map(|line| line.strip_prefix(function));
            let mut times: Vec<f64> = lines.filter_map(|time| time.trim().parse().ok()).collect();
            times.sort_by(f64::total_cmp);
            format!(
                "{function} {:.0} µs ({} times)",
                times.get(times.len() / 2).copied().unwrap_or_default(),
                times.len()
            )
        };
        Ok(Some(format!("{}, {}", of(DOORBELL), of(INTERRUPT))))
    }

    /// Memory that is its own: anonymous, and its program. Guest memory is shared, transfer memory not counted by Linux.
    pub(crate) fn resident_mib(&self) -> Result<Option<f64>> {
        let Some(pid) = self.pid.filter(|_| self.way != Way::UsbHost) else { return Ok(None) };
        let text = self
            .host
            .run(&format!("awk '/^Rss(Anon|File)/ {{sum += $2}} END {{print sum}}' /proc/{pid}/status"))?;
        Ok(Some(text.trim().parse::<f64>().context("RssAnon and RssFile")? / 1024.0))
    }

    /// How often its threads slept and were woken within `seconds`. Of QEMU the main thread counts.
    pub(crate) fn wake_ups(&self, seconds: u32) -> Result<Option<f64>> {
        let Some(pid) = self.pid else { return Ok(None) };
        let threads = if self.way == Way::UsbHost { pid.to_string() } else { "*".to_owned() };
        let count = format!(
            "cat /proc/{pid}/task/{threads}/status | awk '/^voluntary/ {{sum += $2}} END {{print sum}}'"
        );
        let text =
            self.host.run(&format!("before=$({count}); sleep {seconds}; echo $(($({count}) - before))"))?;
        Ok(Some(text.trim().parse().context("voluntary_ctxt_switches")?))
    }
}

/// The node of a device of the host by its kernel name.
pub(crate) fn node(host: &Host, name: &str) -> Result<String> {
    let place = format!("/sys/bus/usb/devices/{name}");
    host.run(&format!("printf '/dev/bus/usb/%03d/%03d' $(cat {place}/busnum) $(cat {place}/devnum)"))
}
