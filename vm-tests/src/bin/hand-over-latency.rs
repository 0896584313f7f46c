//! `hand-over-latency ROUNDS VM`: how long usbpolicyd takes from an event to the file in the hands of a VM's instance. It
//! plugs a keyboard gadget again and again, hears what kernel and udev say of it, and is the instance itself. Prints one
//! JSON object: the times of all rounds, in milliseconds.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use common::channel::{Channel, Listener};
use common::ids::DeviceId;
use common::usbfs::UsbfsFile;
use common::wire::{FromInstance, PROTOCOL_VERSION, ToInstance};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;
use vm_tests::gadget::{self, Function, Speed};
use vm_tests::uevents::{self, Group};

/// Longest that a hand-over takes on a busy machine.
const WITHIN: Duration = Duration::from_secs(30);
/// Between two plugs: longer than the pause that usbpolicyd makes between two readings of sysfs.
const QUIET: Duration = Duration::from_millis(700);
const NAME: &str = "latency";

/// Times from an event to the file.
#[derive(Parser)]
struct Arguments {
    /// How often to plug.
    rounds: usize,
    /// The VM to be.
    vm: String,
}

/// Hears events, and is an instance that takes what it gets and lets go of it when it is pulled.
struct Ear {
    kernel: uevents::Listener,
    udev: uevents::Listener,
    listener: Listener,
    link: Option<Channel>,
    held: Option<(DeviceId, UsbfsFile)>,
    moments: Moments,
}

/// When things of one plug-in happened.
#[derive(Clone, Copy, Default)]
struct Moments {
    kernel: Option<Instant>,
    /// The kernel has configured it and its drivers had their look; until then whoever opens it waits.
    bound: Option<Instant>,
    udev: Option<Instant>,
    file: Option<Instant>,
}

fn main() -> Result<()> {
    let Arguments { rounds, vm } = Arguments::parse();
    let socket = Path::new("/run/usbvfiod").join(&vm).join("policy.sock");
    std::fs::create_dir_all(socket.parent().context("it has one")?)?;
    let mut ear = Ear {
        kernel: uevents::Listener::new(Group::Kernel, None)?,
        udev: uevents::Listener::new(Group::Udev, None)?,
        listener: Listener::bind(&socket, 0o666)?,
        link: None,
        held: None,
        moments: Moments::default(),
    };
    gadget::up(NAME, &[Function::Keyboard], Speed::High)?;
    let (mut of_kernel, mut of_udev, mut ours) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=rounds {
        // The file may be seen before the events that led to it: they come by other sockets.
        ear.turn_until(WITHIN, |ear| {
            let Moments { kernel, bound, udev, file } = ear.moments;
            [kernel, bound, udev, file].iter().all(Option::is_some)
        })?;
        let Moments { kernel, bound, udev, file } = std::mem::take(&mut ear.moments);
        // The first one has the start of everything in it.
        if round > 0 {
            let (kernel, udev) = (kernel.context("no word of the kernel")?, udev.context("no word of udev")?);
            let bound = bound.context("no bind")?;
            of_kernel.push(ms(bound.saturating_duration_since(kernel)));
            of_udev.push(ms(udev.saturating_duration_since(kernel)));
            ours.push(ms(file.context("no file")?.saturating_duration_since(udev.max(bound))));
        }
        gadget::unplug(NAME)?;
        ear.turn_until(WITHIN, |ear| ear.held.is_none())?;
        let quiet_at = Instant::now() + QUIET;
        ear.turn_until(WITHIN, |_| Instant::now() >= quiet_at)?;
        ear.moments = Moments::default();
        if round < rounds {
            gadget::plug(NAME, None)?;
        }
    }
    gadget::down(NAME)?;
    println!("{}", json!({ "kernel": of_kernel, "udev": of_udev, "usbpolicyd": ours }));
    Ok(())
}

/// Whether an event is this one of a USB device.
fn is_word(event: &[u8], action: &str) -> bool {
    uevents::value(event, "ACTION") == Some(action) && uevents::value(event, "DEVTYPE") == Some("usb_device")
}

impl Ear {
    fn turn_until(&mut self, within: Duration, done: impl Fn(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + within;
        while !done(self) {
            if Instant::now() > deadline {
                bail!("nothing happened within {within:?}");
            }
            self.turn()?;
        }
        Ok(())
    }

    /// Waits for whatever comes first and takes note of it.
    fn turn(&mut self) -> Result<()> {
        let fixed = [self.kernel.as_fd(), self.udev.as_fd(), self.listener.as_fd()];
        let link = self.link.as_ref().map(AsFd::as_fd);
        let readable = fixed.into_iter().chain(link).map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let held = self.held.iter().map(|(_, file)| PollFd::new(file.as_fd(), PollFlags::empty()));
        let mut fds: Vec<PollFd<'_>> = readable.chain(held).collect();
        poll(&mut fds, PollTimeout::from(50_u16))?;
        let now = Instant::now();
        let is_gone = self.held.is_some()
            && fds.last().and_then(PollFd::revents).is_some_and(|events| !events.is_empty());
        if is_gone && let Some((id, _)) = self.held.take() {
            self.send(&FromInstance::Gone { id, text: "unplugged".to_owned() })?;
        }
        while let Some(event) = self.kernel.take()? {
            if is_word(&event, "add") {
                self.moments.kernel.get_or_insert(now);
            }
            if is_word(&event, "bind") {
                self.moments.bound.get_or_insert(now);
            }
        }
        while let Some(event) = self.udev.take()? {
            if is_word(&event, "add") {
                self.moments.udev.get_or_insert(now);
            }
        }
        if self.link.is_none() {
            self.link = self.listener.accept()?;
        }
        while let Some((message, file)) = self.receive()? {
            self.answer(now, message, file)?;
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<Option<(ToInstance, Option<OwnedFd>)>> {
        Ok(match &mut self.link {
            Some(link) => link.receive()?,
            None => None,
        })
    }

    fn send(&self, message: &FromInstance) -> Result<()> {
        Ok(self.link.as_ref().context("nobody listens")?.send(message, None)?)
    }

    fn answer(&mut self, now: Instant, message: ToInstance, file: Option<OwnedFd>) -> Result<()> {
        let answer = match message {
            ToInstance::Hello { .. } => {
                let version = PROTOCOL_VERSION;
                FromInstance::Hello { version, usb2_ports: 15, usb3_ports: 15, vmm_connected: false }
            }
            ToInstance::List { .. } => FromInstance::Devices { devices: Vec::new(), more: false },
            ToInstance::Ping { nonce } => FromInstance::Pong { nonce, stats: Default::default() },
            ToInstance::Attach(attach) => {
                self.moments.file = Some(now);
                self.held = Some((attach.id, UsbfsFile::new(file.context("no file came along")?)?));
                FromInstance::Attached { id: attach.id, port: 1 }
            }
            ToInstance::Detach { id, .. } => {
                self.held = None;
                FromInstance::Detached { id }
            }
        };
        self.send(&answer)
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
