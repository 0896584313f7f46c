//! Scenarios on real kernels: a virtual host with USB controllers ([`Host`]), our daemons in it, guests below it
//! ([`Guest`]), and devices that are plugged and pulled while all of it runs.
//!
//! A scenario is a function that reads like what a person would do; everything it waits for has a deadline, and
//! nothing waits by sleeping. See `docs/developer/vm-tests.md`.

pub mod accel;
pub mod agent;
pub mod binaries;
pub mod cpio;
pub mod daemons;
pub mod devices;
pub mod gadget;
pub mod guest;
pub mod guest_devices;
pub mod host;
pub mod image;
pub mod initramfs;
pub mod log;
pub mod mirror;
pub mod modules;
pub mod protocol;
pub mod qmp;
pub mod remote;
pub mod rig;
pub mod scenarios;
pub mod slots;
pub mod stream;
pub mod usbip;
pub mod usbtest;
pub mod virtual_devices;

use std::io::Read;
use std::sync::OnceLock;
use std::time::Instant;

use anyhow::Result;

pub use daemons::{Usbpolicyd, Usbvfiod};
pub use devices::{Controller, Plugged, UsbDevice};
pub use guest::{Guest, GuestConfig, Vmm};
pub use host::{Host, HostConfig};
pub use log::{Log, Mark};
pub use remote::{Ended, Process, Remote};

/// How often a scenario is tried. Two faults are known and not understood, each about once in thirty scenarios: a guest
/// that hangs while it boots, and a guest whose first command to a stick is never answered (see the known faults in
/// `docs/developer/vm-tests.md`). A second try, in a fresh host and told loudly, keeps them from hiding everything
/// else; it goes when they are found. An assertion that fails is not tried again.
const TRIES: usize = 2;

/// Boots a host, runs a scenario in it, and prints what an engineer needs if it fails.
pub fn scenario(config: &HostConfig, body: impl Fn(&Host) -> Result<()>) -> Result<()> {
    progress("waiting for a free place");
    let _slot = slots::Slot::acquire()?;
    let mut tried = 0;
    loop {
        tried += 1;
        let outcome = try_scenario(config, &body);
        match outcome {
            Ok(Err(error)) if tried < TRIES => {
                eprintln!("{error:#}\nTRYING ONCE MORE IN A FRESH HOST: see the known faults");
            }
            Ok(result) => return result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

fn try_scenario(config: &HostConfig, body: &impl Fn(&Host) -> Result<()>) -> std::thread::Result<Result<()>> {
    let host = match Host::boot(config) {
        Ok(host) => host,
        Err(error) => return Ok(Err(error)),
    };
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(&host)));
    if !matches!(outcome, Ok(Ok(()))) {
        eprintln!("{}", host.report());
    }
    outcome
}

/// Tells a person what happens, with the seconds since the first such line; `cargo test` shows it for tests that fail.
pub fn progress(what: &str) {
    static START: OnceLock<Instant> = OnceLock::new();
    eprintln!("[{:6.1} s] {what}", START.get_or_init(Instant::now).elapsed().as_secs_f32());
}

/// Copies a stream into a log until it ends, in a thread.
fn follow(from: Option<impl Read + Send + 'static>, log: &Log) {
    let (Some(mut from), log) = (from, log.clone()) else { return };
    std::thread::spawn(move || {
        let mut buffer = [0; 8192];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            log.push(&buffer[..length]);
        }
    });
}
