//! Notices that the host slept. While it did, devices came and went without an event; some kernels tell of none of it.
//!
//! A timer on the clock of the day that is cancelled when that clock jumps (`timerfd_create(2)`,
//! `TFD_TIMER_CANCEL_ON_SET`) becomes readable at resume. A clock that somebody merely set does the same: what tells them
//! apart is how much longer the boot took than the time awake.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId as TimerClock, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::{ClockId, clock_gettime};

/// A day that does not come, in seconds since 1970: the timer is only there to be cancelled.
const NEVER: i64 = 1 << 34;
/// Clocks read one after the other differ by so much without any sleep.
const LEAST: Duration = Duration::from_millis(500);

/// The timer, and how long the host had slept when it was looked at last.
#[derive(Debug)]
pub struct HostSleep {
    timer: TimerFd,
    asleep: Duration,
}

impl HostSleep {
    /// Starts to watch.
    pub fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let timer = TimerFd::new(TimerClock::CLOCK_REALTIME, flags)?;
        let watch = Self { timer, asleep: asleep_since_boot() };
        watch.arm()?;
        Ok(watch)
    }

    fn arm(&self) -> io::Result<()> {
        let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
        Ok(self.timer.set(Expiration::OneShot(TimeSpec::new(NEVER, 0)), flags)?)
    }

    /// The clock jumped: how long the host slept meanwhile, if it did.
    pub fn look(&mut self) -> Option<Duration> {
        // ECANCELED is what we wait for; it stays until the timer is set again.
        let _ = self.timer.wait();
        if let Err(error) = self.arm() {
            // The safety timer of the loop is left.
            tracing::warn!(%error, "cannot watch for the host's sleep any more");
        }
        self.account(asleep_since_boot())
    }

    /// What is new since the last look.
    fn account(&mut self, asleep: Duration) -> Option<Duration> {
        let slept = asleep.saturating_sub(std::mem::replace(&mut self.asleep, asleep));
        (slept >= LEAST).then_some(slept)
    }
}

impl AsFd for HostSleep {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

/// Time since boot less the time awake.
fn asleep_since_boot() -> Duration {
    let read = |clock| clock_gettime(clock).map(Duration::from).unwrap_or_default();
    // The smaller one first: a pause between the two calls counts as sleep rather than below nothing.
    let awake = read(ClockId::CLOCK_MONOTONIC);
    read(ClockId::CLOCK_BOOTTIME).saturating_sub(awake)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_that_did_not_sleep_has_not_slept() {
        assert_eq!(HostSleep::new().unwrap().look(), None);
    }

    #[test]
    fn sleep_is_told_once_and_with_its_length() {
        let mut watch = HostSleep::new().unwrap();
        let later = watch.asleep + Duration::from_secs(3600);
        assert_eq!(watch.account(later), Some(Duration::from_secs(3600)));
        assert_eq!(watch.account(later), None);
        assert_eq!(watch.account(later + LEAST / 2), None, "clocks that were read a moment apart");
    }
}
