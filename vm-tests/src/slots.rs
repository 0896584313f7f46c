//! How many virtual hosts run at once on this machine: the one place for that limit, shared by all test processes.

use std::fs::{File, OpenOptions};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{Flock, FlockArg};

use crate::image;

/// Between two looks for a free slot; a virtual host runs for much longer.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// The right to run one virtual host; given back when dropped or when its process dies.
pub struct Slot {
    _lock: Flock<File>,
}

impl Slot {
    /// Waits for a free one. `VM_TESTS_PARALLEL` sets their number; by default one for each processor, as an emulated
    /// host keeps one busy.
    pub fn acquire() -> Result<Self> {
        let processors = std::thread::available_parallelism().map_or(2, usize::from);
        let count: usize = match std::env::var("VM_TESTS_PARALLEL") {
            Ok(number) => number.parse().context("VM_TESTS_PARALLEL is a number")?,
            Err(_) => processors,
        };
        ensure!(count > 0, "VM_TESTS_PARALLEL must not be 0");
        let cache = image::cache_directory()?;
        let open = |number: usize| {
            let path = cache.join(format!("slot-{number}.lock"));
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(&path)
                .with_context(|| format!("open {}", path.display()))
        };
        // First come, first served: only one waiter at a time looks for a free one.
        let _turn = image::lock(&cache.join("slot-queue.lock"))?;
        loop {
            for number in 0..count {
                if let Ok(lock) = Flock::lock(open(number)?, FlockArg::LockExclusiveNonblock) {
                    return Ok(Self { _lock: lock });
                }
            }
            // Nothing in the kernel waits for any one of several file locks.
            std::thread::sleep(LOOK_AGAIN);
        }
    }
}
