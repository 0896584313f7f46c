//! `usbip-device NAME [options]`: plugs a ready-made device into `vhci_hcd` and tells what happens, one JSON object a
//! line. It takes orders on standard input (`stats`, `unplug`, `plug`, and those of the device) and is pulled when it ends.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};
use vm_tests::usbip::catalogue::{self, Choice};
use vm_tests::usbip::descriptors::Speed;
use vm_tests::usbip::device::Device;
use vm_tests::usbip::models::delayed::{Delayed, Delays};
use vm_tests::usbip::session::Session;
use vm_tests::usbip::vhci::{self, Plugged};
use vm_tests::usbip::wire::{Command, read_command};

/// A USB device that does exactly what the test says.
#[derive(Parser)]
struct Arguments {
    /// Which device.
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(catalogue::NAMES))]
    name: String,
    /// Speed to attach at.
    #[arg(long, value_enum, default_value = "high")]
    speed: SpeedName,
    /// Serial number string.
    #[arg(long, default_value = "0001")]
    serial: String,
    /// Bytes of an isochronous packet.
    #[arg(long, default_value_t = 192)]
    iso_packet: u16,
    /// bInterval of isochronous endpoints.
    #[arg(long, default_value_t = 4)]
    iso_interval: u8,
    /// Answer SET_INTERFACE after so many milliseconds.
    #[arg(long, default_value_t = 0)]
    delay_set_interface: u64,
    /// Answer so many SET_INTERFACE requests at once before the delay begins.
    #[arg(long, default_value_t = 0)]
    fast_set_interfaces: u32,
    /// Answer class and vendor requests after so many milliseconds.
    #[arg(long, default_value_t = 0)]
    delay_control: u64,
    /// Tell each control request.
    #[arg(long)]
    log_control: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum SpeedName {
    Low,
    Full,
    High,
    Super,
}

impl From<SpeedName> for Speed {
    fn from(name: SpeedName) -> Self {
        match name {
            SpeedName::Low => Self::Low,
            SpeedName::Full => Self::Full,
            SpeedName::High => Self::High,
            SpeedName::Super => Self::Super,
        }
    }
}

/// What the main loop waits for. The number tells connections apart: an old one may still speak after a new one began.
enum Event {
    Command(u32, Command),
    Closed(u32, String),
    Order(String),
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let choice = Choice {
        speed: arguments.speed.into(),
        serial: arguments.serial.clone(),
        iso_packet: arguments.iso_packet,
        iso_interval: arguments.iso_interval,
    };
    let model = catalogue::make(&arguments.name, &choice).context("unknown device")?;
    let delays = Delays {
        set_interface: Duration::from_millis(arguments.delay_set_interface),
        special: Duration::from_millis(arguments.delay_control),
        fast_set_interfaces: arguments.fast_set_interfaces,
    };
    let is_delayed = delays.set_interface + delays.special > Duration::ZERO;
    let model = if is_delayed { Box::new(Delayed::new(model, delays)) } else { model };
    let (events, inbox) = channel();
    let orders = events.clone();
    thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if orders.send(Event::Order(line)).is_err() {
                return;
            }
        }
    });
    let mut bench = Bench {
        session: Session::new(Device::new(model)),
        speed: choice.speed,
        connection: None,
        count: 0,
        events,
        is_control_logged: arguments.log_control,
        configuration: 0,
    };
    bench.plug()?;
    bench.run(&inbox)
}

/// The device and its connection.
struct Bench {
    session: Session,
    speed: Speed,
    connection: Option<Plugged>,
    /// Connections so far.
    count: u32,
    events: Sender<Event>,
    is_control_logged: bool,
    configuration: u8,
}

impl Bench {
    fn plug(&mut self) -> Result<()> {
        if self.connection.is_some() {
            bail!("already plugged in");
        }
        let plugged = vhci::plug(self.speed)?;
        self.count += 1;
        let socket = plugged.socket.try_clone().context("second handle of the socket")?;
        let (events, number) = (self.events.clone(), self.count);
        thread::spawn(move || follow(socket, number, &events));
        tell(json!({ "event": "plugged", "port": plugged.port }))?;
        self.connection = Some(plugged);
        Ok(())
    }

    fn unplug(&mut self) -> Result<()> {
        let Some(plugged) = self.connection.take() else { return Ok(()) };
        // The reading thread holds a second handle: the kernel sees the end only by a shutdown.
        plugged.socket.shutdown(std::net::Shutdown::Both).context("shutdown")?;
        self.session.lose_power();
        tell(json!({ "event": "unplugged", "port": plugged.port }))
    }

    fn run(&mut self, inbox: &Receiver<Event>) -> Result<()> {
        loop {
            let event = match self.session.next_due() {
                None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(due) => inbox.recv_timeout(due.saturating_duration_since(Instant::now())),
            };
            match event {
                Ok(Event::Command(number, command)) if number == self.count && self.connection.is_some() => {
                    self.log_control(&command)?;
                    self.session.take(Instant::now(), command);
                }
                Ok(Event::Closed(number, reason)) if number == self.count && self.connection.is_some() => {
                    tell(json!({ "event": "closed", "reason": reason }))?;
                    self.connection = None;
                    self.session.lose_power();
                }
                Ok(Event::Command(..) | Event::Closed(..)) => {}
                Ok(Event::Order(line)) => self.obey(&line)?,
                Err(RecvTimeoutError::Timeout) => self.session.run(Instant::now()),
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            self.flush()?;
        }
    }

    fn flush(&mut self) -> Result<()> {
        let output = self.session.take_output();
        if let (Some(plugged), false) = (&mut self.connection, output.is_empty()) {
            // The reading thread tells why when the kernel has hung up.
            let _ = plugged.socket.write_all(&output);
        }
        let configuration = self.session.device().configuration();
        if let (Some(plugged), true) = (&self.connection, configuration != self.configuration) {
            let bus_id = vhci::bus_id(plugged.port);
            tell(json!({ "event": "configured", "configuration": configuration, "device": bus_id }))?;
        }
        self.configuration = configuration;
        Ok(())
    }

    fn obey(&mut self, line: &str) -> Result<()> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let is_known = match words[..] {
            [] => true,
            ["stats"] => {
                tell(json!({ "event": "stats", "stats": self.session.statistics() }))?;
                true
            }
            ["unplug"] => self.unplug().map(|()| true)?,
            ["plug"] => self.plug().map(|()| true)?,
            ["quit"] => {
                tell(json!({ "event": "stats", "stats": self.session.statistics() }))?;
                std::process::exit(0);
            }
            _ => {
                let is_known = self.session.device().model().order(&words);
                self.session.run(Instant::now());
                is_known
            }
        };
        tell(json!({ "event": "order", "order": line, "known": is_known }))
    }

    fn log_control(&self, command: &Command) -> Result<()> {
        match command {
            Command::Submit(submit) if self.is_control_logged && submit.endpoint == 0 => {
                let setup = submit.setup;
                let fields = [setup.value, setup.index, setup.length];
                tell(
                    json!({ "event": "control", "type": setup.request_type, "request": setup.request, "fields": fields }),
                )
            }
            _ => Ok(()),
        }
    }
}

fn follow(socket: UnixStream, number: u32, events: &Sender<Event>) {
    let mut socket = BufReader::new(socket);
    loop {
        let event = match read_command(&mut socket) {
            Ok(Some(command)) => Event::Command(number, command),
            Ok(None) => Event::Closed(number, "end of connection".to_owned()),
            Err(error) => Event::Closed(number, error.to_string()),
        };
        let is_last = matches!(event, Event::Closed(..));
        if events.send(event).is_err() || is_last {
            return;
        }
    }
}

fn tell(value: Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}").and_then(|()| out.flush()).context("standard output")
}
