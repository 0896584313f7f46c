//! `make bench`: the same devices used by the host itself, through QEMU's `usb-host`, through Cyberus usbvfiod (where
//! `PEER_USBVFIOD` and `CLOUD_HYPERVISOR` name binaries) and through us, in one virtual host.
//!
//! Machines differ and are noisy: ratios count, not figures. So each contender has a device of its own, all of them are
//! up all the time, and they are measured in turn, round after round, in short runs. Nothing is asserted.

mod clock;
mod contender;
mod table;
mod unemulated;

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use serde_json::Value;
use vm_tests::neighbours::{self, HANG};
use vm_tests::virtual_devices::{self, UsbIpDevice};
use vm_tests::{Host, HostConfig, Usbpolicyd, progress, slots};

use clock::{Clock, Moment};
use contender::{Contender, Kind, Way};
use table::{Quantity, Table};

/// Longest that one measurement may take, on a busy machine.
const WITHIN: Duration = Duration::from_secs(180);
/// From a plug in the host to the guest's word of it.
const SEEN_WITHIN: Duration = Duration::from_secs(60);
/// Time in which a machine that got a keyboard comes to rest.
const SETTLE_SECONDS: u32 = 3;
/// Time in which wake-ups are counted.
const IDLE_SECONDS: u32 = 10;
/// Hand-overs in one round.
const HANDOVERS: u32 = 4;
/// Bytes there and back in one run.
const ECHOES: u32 = 50;
/// Hangs in one round.
const HANGS: u32 = 4;
/// The device beside one that hangs, and that one.
const NEIGHBOUR: &str = "1209:0001";
const HANGING: &str = "1209:0666";

/// Speed, side by side.
#[derive(Parser)]
struct Arguments {
    /// How often each is measured.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Length of one run.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Only these, by parts of their names.
    #[arg(long)]
    only: Vec<String>,
    /// Only these parts: hand-over, stick, uas, keyboard, serial, hang. And one that runs only when it is named: uml,
    /// the hand-over without emulation, for which it makes a kernel of its own once.
    #[arg(long)]
    part: Vec<String>,
    /// Also count the system calls of the USB processes, in runs of their own.
    #[arg(long)]
    calls: bool,
}

impl Arguments {
    fn wants(&self, way: Way) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| way.name().contains(part))
    }

    fn has_part(&self, name: &str) -> bool {
        self.part.is_empty() || self.part.iter().any(|part| part == name)
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    vm_tests::binaries::directory()?;
    progress("waiting for a free place");
    let _slot = slots::Slot::acquire()?;
    if arguments.part.iter().any(|part| part == "uml") {
        let mut table = Table::default();
        unemulated::hand_overs(arguments.rounds, &mut table)?;
        println!("\nUser-Mode Linux, not emulated.\n{}", table.render());
        if arguments.part.len() == 1 {
            return Ok(());
        }
    }
    let host = Host::boot(&HostConfig { memory_mib: 4096, ..HostConfig::default() })?;
    let mut bench = Bench::new(&host, arguments)?;
    let (started, cpu_before) = (Instant::now(), host.cpu_time()?);
    let outcome = bench.run();
    let share = (host.cpu_time()? - cpu_before).as_secs_f64() / started.elapsed().as_secs_f64();
    println!(
        "\nOne virtual host, {:?}, which had {:.0} % of a processor; {} rounds of {} s, contenders in turn.",
        host.accel(),
        share * 100.0,
        bench.arguments.rounds,
        bench.arguments.seconds
    );
    println!("{}", bench.table.render());
    outcome.inspect_err(|_| eprintln!("{}", host.report()))
}

/// A run of all measurements.
struct Bench<'h> {
    host: &'h Host,
    arguments: Arguments,
    /// The host's kernel messages.
    clock: Clock,
    contenders: Vec<Contender<'h>>,
    table: Table,
}

impl<'h> Bench<'h> {
    fn new(host: &'h Host, arguments: Arguments) -> Result<Self> {
        let clock = Clock::start(host.remote())?;
        Ok(Self { host, arguments, clock, contenders: Vec::new(), table: Table::default() })
    }

    fn run(&mut self) -> Result<()> {
        let host = self.host;
        // Several hold transfer memory at once; docs/user/install.md.
        host.run("echo 256 > /sys/module/usbcore/parameters/usbfs_memory_mb; modprobe -a vhci_hcd cdc_acm")?;
        let vhci_buses = host.run("cat /sys/devices/platform/vhci_hcd.0/usb*/busnum")?;
        let vhci_buses: Vec<u32> = vhci_buses
            .lines()
            .map(|bus| bus.trim().parse().context("bus of vhci_hcd"))
            .collect::<Result<_>>()?;
        let _policy = Usbpolicyd::start(host, &contender::policy())?;
        if self.arguments.has_part("hand-over") {
            self.hand_overs()?;
        }
        if !["stick", "uas", "serial", "keyboard", "hang"].iter().any(|part| self.arguments.has_part(part)) {
            return Ok(());
        }
        for way in Way::available() {
            if !self.arguments.wants(way) {
                continue;
            }
            let started = Contender::start(host, way, &vhci_buses).or_else(|error| {
                progress(&format!("{} did not start, once more: {error:#}", way.name()));
                Contender::start(host, way, &vhci_buses)
            });
            match started {
                Ok(contender) => self.contenders.push(contender),
                Err(error) => self.table.fail(Quantity::Plug, way.name(), format!("{error:#}")),
            }
        }
        if self.arguments.has_part("stick") {
            self.sticks()?;
        }
        self.contenders.retain(|contender| !contender.way.is_loop());
        if self.arguments.has_part("uas") {
            self.attached_disks()?;
        }
        if self.arguments.has_part("serial") {
            self.serial_adapters()?;
        }
        self.contenders.retain(|contender| contender.way != Way::Host);
        if self.arguments.has_part("keyboard") {
            self.keyboards()?;
        }
        if self.arguments.has_part("hang") {
            self.hangs()?;
        }
        Ok(())
    }

    /// Does something with each contender that has not failed at it; a failure is noted and the others go on.
    fn each(
        &mut self,
        quantity: Quantity,
        mut work: impl FnMut(&mut Contender<'h>, &Clock, &mut Table) -> Result<()>,
    ) {
        for contender in &mut self.contenders {
            let name = contender.name();
            if self.table.has_failed(quantity, name) {
                continue;
            }
            if let Err(error) = work(contender, &self.clock, &mut self.table) {
                progress(&format!("{name}: {error:#}"));
                self.table.fail(quantity, name, format!("{error:#}"));
            }
        }
    }

    /// Plugs a device in for each; measures how long a guest takes to notice what the host has.
    fn plug(&mut self, kind: Kind) {
        self.each(Quantity::Plug, |contender, clock, table| {
            let host_mark = clock.here();
            let guest_mark = contender.clock.as_ref().map(Clock::here);
            let controller_mark = contender.controller.as_ref().map(|controller| controller.log().here());
            contender.plug(kind)?;
            let name = contender.kernel_name()?;
            if kind != Kind::Keyboard && !contender.way.is_loop() {
                contender.disk()?;
            }
            // The peer waits for a person.
            if let (Some(guest_clock), Some(guest_mark), Some(_)) =
                (&contender.clock, guest_mark, contender.guest().filter(|_| contender.way != Way::Peer))
            {
                let had = clock.wait(host_mark, &format!("usb {name}: New USB device found"), SEEN_WITHIN)?;
                let seen = guest_clock.wait(guest_mark, "Port change event", SEEN_WITHIN)?;
                if let Some((controller, mark)) = contender.controller.as_ref().zip(controller_mark) {
                    let line = controller.log().wait_after(mark, "device attached", SEEN_WITHIN)?;
                    let attached = Moment::of_log_line(&line.text)?;
                    table.add(Quantity::Handover, contender.name(), had.ms_until_on_same_day(attached));
                }
                table.add(Quantity::Plug, contender.name(), clock.ms_until(had, seen, guest_clock)?);
            }
            Ok(())
        });
    }

    /// Pulls them; measures how long a guest takes to notice.
    fn pull(&mut self) {
        self.each(Quantity::Pull, |contender, clock, table| {
            let Some(guest_clock) = contender.clock.as_ref().filter(|_| contender.guest().is_some()) else {
                return contender.pull();
            };
            let (host_mark, guest_mark) = (clock.here(), guest_clock.here());
            let name = contender.kernel_name()?;
            contender.pull()?;
            let guest_clock = contender.clock.as_ref().context("no clock")?;
            let lost = clock.wait(host_mark, &format!("usb {name}: USB disconnect"), SEEN_WITHIN)?;
            let seen = guest_clock.wait(guest_mark, "USB disconnect", SEEN_WITHIN)?;
            table.add(Quantity::Pull, contender.name(), clock.ms_until(lost, seen, guest_clock)?);
            Ok(())
        });
    }

    /// A keyboard that is plugged and pulled again and again: what udev takes for it, and what usbpolicyd takes.
    fn hand_overs(&mut self) -> Result<()> {
        progress("hand-overs");
        let rounds = self.arguments.rounds.saturating_mul(HANDOVERS);
        let command = format!("hand-over-latency {rounds} {}", contender::LATENCY);
        let said = self.host.remote().run_within(&command, WITHIN)?;
        add_hand_overs(&said, "usbpolicyd", &mut self.table)
    }

    fn sticks(&mut self) -> Result<()> {
        self.plug(Kind::Stick);
        let seconds = self.arguments.seconds;
        for round in 1..=self.arguments.rounds {
            progress(&format!("sticks, round {round}"));
            self.each(Quantity::SequentialRead, |contender, _, table| {
                transfer(contender, "read", seconds, Quantity::SequentialRead, Quantity::CpuRead, table)
            });
            self.each(Quantity::SequentialWrite, |contender, _, table| match contender.way {
                way if way.is_loop() => Ok(()),
                _ => transfer(
                    contender,
                    "write",
                    seconds,
                    Quantity::SequentialWrite,
                    Quantity::CpuWrite,
                    table,
                ),
            });
            self.each(Quantity::RandomRead, |contender, _, table| {
                random(contender, "", seconds, Quantity::RandomRead, table)
            });
        }
        if self.arguments.calls {
            self.each(Quantity::RandomRead, |contender, _, _| {
                if let Some(times) = contender.register_times(seconds, WITHIN)? {
                    println!("{}: {times}", contender.name());
                }
                Ok(())
            });
            for mode in ["read", "write", "random"] {
                self.each(Quantity::SequentialRead, |contender, _, _| {
                    if let Some(calls) = contender.system_calls(mode, seconds, WITHIN)? {
                        println!("{}, {mode}:\n{calls}", contender.name());
                    }
                    Ok(())
                });
            }
        }
        self.each(Quantity::Resident, |contender, _, table| {
            if let Some(mib) = contender.resident_mib()? {
                table.add(Quantity::Resident, contender.name(), mib);
            }
            Ok(())
        });
        self.pull();
        Ok(())
    }

    fn attached_disks(&mut self) -> Result<()> {
        self.plug(Kind::Attached);
        let seconds = self.arguments.seconds;
        for round in 1..=self.arguments.rounds {
            progress(&format!("UAS disks, round {round}"));
            self.each(Quantity::AttachedRandomRead, |contender, _, table| {
                random(contender, "--depth 8", seconds, Quantity::AttachedRandomRead, table)
            });
        }
        self.pull();
        Ok(())
    }

    fn keyboards(&mut self) -> Result<()> {
        self.plug(Kind::Keyboard);
        self.host.run(&format!("sleep {SETTLE_SECONDS}"))?;
        for _ in 0..2 {
            self.each(Quantity::IdleWakeUps, |contender, _, table| {
                if let Some(count) = contender.wake_ups(IDLE_SECONDS)? {
                    table.add(Quantity::IdleWakeUps, contender.name(), count);
                }
                Ok(())
            });
        }
        self.pull();
        Ok(())
    }

    /// A device for each contender. Each gets the port of `vhci_hcd` with the number of its contender's socket.
    fn plug_virtual(
        &mut self,
        quantity: Quantity,
        model: &str,
        arguments: &[&str],
    ) -> Result<Vec<UsbIpDevice>> {
        let mut devices = Vec::new();
        for socket in 1..=contender::SOCKETS {
            let serial = contender::virtual_serial(socket);
            devices.push(UsbIpDevice::plug(self.host, model, &[&["--serial", &serial], arguments].concat())?);
        }
        self.each(quantity, |contender, _, _| {
            let device = &devices[usize::from(contender.way.socket()) - 1];
            contender.hand_over(&contender::node(contender.host(), &device.kernel_name()?)?)
        });
        Ok(devices)
    }

    /// What a device moves beside another that hangs, against what it moves alone; and a register read.
    fn hangs(&mut self) -> Result<()> {
        let hang = HANG.as_millis().to_string();
        let _neighbours = self.plug_virtual(Quantity::BesideHang, "bulk", &["--speed", "super"])?;
        let _hanging =
            self.plug_virtual(Quantity::BesideHang, "identity", &["--delay-set-interface", &hang])?;
        self.each(Quantity::BesideHang, |contender, _, _| {
            let guest = contender.guest().context("it has a guest")?;
            virtual_devices::install(guest, "usb-stream")?;
            virtual_devices::wait_id(guest.remote(), NEIGHBOUR)?;
            virtual_devices::wait_id(guest.remote(), HANGING)
        });
        for round in 1..=self.arguments.rounds {
            progress(&format!("beside a device that hangs, round {round}"));
            self.each(Quantity::BesideHang, |contender, _, table| {
                let script = format!(
                    "usb-stream --id {NEIGHBOUR} beside-hang {HANGING} --hangs {HANGS} \
                       --register $(ls -d /sys/kernel/debug/usb/xhci/*/ports/port01/portsc)"
                );
                let report: neighbours::Report = serde_json::from_value(contender.script(&script, WITHIN)?)?;
                progress(&format!("{report:?}"));
                let (throughput, register_read) = report.changes();
                table.add(Quantity::BesideHang, contender.name(), throughput);
                table.add(Quantity::ReadBesideHang, contender.name(), register_read);
                table.add(Quantity::WorstReadAlone, contender.name(), report.alone.worst_us / 1e3);
                table.add(Quantity::WorstReadBesideHang, contender.name(), report.beside.worst_us / 1e3);
                Ok(())
            });
        }
        Ok(())
    }

    fn serial_adapters(&mut self) -> Result<()> {
        let _devices = self.plug_virtual(Quantity::EchoLatency, "serial", &[])?;
        for round in 1..=self.arguments.rounds {
            progress(&format!("serial adapters, round {round}"));
            self.each(Quantity::EchoLatency, |contender, _, table| {
                let serial = contender::virtual_serial(contender.way.socket());
                let script = format!(
                    "while :; do for tty in /sys/class/tty/ttyACM*; do \
                       [ \"$(cat $tty/device/../serial 2>/dev/null)\" = {serial} ] && break 2; done; \
                       busybox usleep 50000; done; tty=/dev/${{tty##*/}}; \
                     exec 3<>$tty; stty raw -echo <&3; bench-probe echo $tty --count {ECHOES}"
                );
                let said = contender.script(&script, WITHIN)?;
                table.add(Quantity::EchoLatency, contender.name(), number(&said, "median_us")?);
                Ok(())
            });
        }
        Ok(())
    }
}

/// What `hand-over-latency` said.
fn add_hand_overs(said: &str, row: &'static str, table: &mut Table) -> Result<()> {
    let said: Value = serde_json::from_str(said).with_context(|| format!("hand-over-latency said {said}"))?;
    for (name, quantity) in
        [("kernel", Quantity::Probe), ("udev", Quantity::UdevEvent), ("usbpolicyd", Quantity::File)]
    {
        for ms in said[name].as_array().context("no times")? {
            table.add(quantity, row, ms.as_f64().context("no number")?);
        }
    }
    Ok(())
}

/// Moves as much as goes in the time, and counts what the USB process works for it.
fn transfer(
    contender: &Contender<'_>,
    mode: &str,
    seconds: f64,
    rate: Quantity,
    cpu: Quantity,
    table: &mut Table,
) -> Result<()> {
    let before = contender.cpu_seconds()?;
    let said = if contender.way.is_loop() {
        let which = if contender.way == Way::Bare { "bare" } else { "alone" };
        contender.script(&format!("usb-transport {which} {}", contender.kernel_name()?), WITHIN)?
    } else {
        let disk = contender.disk()?;
        contender.probe(&format!("disk {disk} {mode} --seconds {seconds}"), WITHIN)?
    };
    let bytes = number(&said, "bytes")?;
    table.add(rate, contender.name(), bytes / 1e6 / number(&said, "seconds")?);
    let spent = match before.zip(contender.cpu_seconds()?) {
        Some((before, after)) => Some(after - before),
        None => said["cpu_seconds"].as_f64(),
    };
    if let Some(spent) = spent {
        table.add(cpu, contender.name(), spent / (bytes / 1e9));
    }
    Ok(())
}

fn random(
    contender: &Contender<'_>,
    arguments: &str,
    seconds: f64,
    quantity: Quantity,
    table: &mut Table,
) -> Result<()> {
    if contender.way.is_loop() {
        return Ok(());
    }
    let disk = contender.disk()?;
    let said = contender.probe(&format!("disk {disk} random --seconds {seconds} {arguments}"), WITHIN)?;
    table.add(quantity, contender.name(), number(&said, "count")? / number(&said, "seconds")?);
    Ok(())
}

fn number(said: &Value, name: &str) -> Result<f64> {
    said[name].as_f64().with_context(|| format!("no {name} in {said}"))
}
