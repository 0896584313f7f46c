//! Scenarios on real kernels: a virtual host with USB controllers ([`Host`]), our daemons in it, guests below it
//! ([`Guest`]), and devices that are plugged and pulled while all of it runs.
//!
//! A scenario is a function that reads like what a person would do; everything it waits for has a deadline, and
//! nothing waits by sleeping. See `docs/developer/vm-tests.md`.

pub mod accel;
pub mod agent;
pub mod binaries;
pub mod clients;
pub mod cpio;
pub mod daemons;
pub mod devices;
pub mod gadget;
pub mod guest;
pub mod guest_devices;
pub mod host;
pub mod image;
pub mod initramfs;
pub mod injection;
pub mod log;
pub mod lost_interrupts;
pub mod mirror;
pub mod modules;
pub mod neighbours;
pub mod patience;
pub mod play;
pub mod protocol;
pub mod qmp;
pub mod remote;
pub mod rig;
pub mod scenarios;
pub mod slots;
pub mod smart_card;
pub mod stream;
pub mod uevents;
pub mod uml;
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
pub use initramfs::Extra;
pub use log::{Log, Mark};
pub use remote::{Ended, Process, Remote};

/// For the kernel command lines of the host and its guests: what a machine without hardware of its own need not do.
///
/// `pci=noearly,lastbus=0` keeps the kernel from looking for AGP bridges and unknown root bridges in 256 buses, 8 s of
/// the 27 s that a nested guest's boot takes on a busy machine: each look is an exit to its VMM.
pub(crate) const KERNEL_ARGUMENTS: &str =
    "panic=-1 mitigations=off nokaslr no_timer_check random.trust_cpu=on pci=noearly,lastbus=0";

/// Boots a host, runs a scenario in it, and prints what an engineer needs if it fails.
pub fn scenario(config: &HostConfig, body: impl Fn(&Host) -> Result<()>) -> Result<()> {
    // Before a place is taken: a build on a busy machine takes longer than most scenarios.
    progress("bringing the programs up to date");
    binaries::directory()?;
    image::Image::get()?;
    progress("waiting for a free place");
    let _slot = slots::Slot::acquire()?;
    let host = Host::boot(config)?;
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(&host)));
    for lost in host.console().all_after(Mark::START, lost_interrupts::LOST) {
        progress(&lost);
    }
    if !matches!(outcome, Ok(Ok(()))) {
        if let Ok(Err(error)) = &outcome {
            progress(&format!("failed: {error:#}"));
        }
        eprintln!("{}", host.report());
    }
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
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
