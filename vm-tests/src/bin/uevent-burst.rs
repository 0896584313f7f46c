//! `uevent-burst COUNT DEVICE`: lets udev say once that a device changed, then says the same COUNT times to all who listen
//! to udev. udev itself needs milliseconds for each event, so no burst that it is asked for is one.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use vm_tests::uevents;

/// A burst of udev's events.
#[derive(Parser)]
struct Arguments {
    /// How many.
    count: usize,
    /// A directory of sysfs.
    device: PathBuf,
}

fn main() -> Result<()> {
    let Arguments { count, device } = Arguments::parse();
    let event = uevents::udev_says(&device)?;
    let start = Instant::now();
    uevents::say(&event, count)?;
    println!("sent {count} events of {} bytes in {} ms", event.len(), start.elapsed().as_millis());
    Ok(())
}
