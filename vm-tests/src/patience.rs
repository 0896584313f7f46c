//! Deadlines that do not run while this machine has no processor for the virtual host.
//!
//! A limit that suits an idle machine is too short on a busy one, and one that suits a busy machine makes a real hang
//! take minutes. The kernel tells the two apart: it counts how long each thread of the virtual host's QEMU was ready to
//! run and had to wait for a processor (`/proc/PID/task/TID/schedstat`, second field), and, where this machine is a
//! virtual one itself, how long its processors were given to others (`/proc/stat`, steal). That time is given back.

use std::cell::RefCell;
use std::time::{Duration, Instant};

/// However busy the machine is, a wait ends after so many times its limit.
const STRETCH_MAX: u32 = 8;
/// Between two looks at the kernel's figures while a wait lasts.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

thread_local! {
    /// QEMU of the virtual hosts that this thread's test has booted.
    static HOSTS: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// From here on, deadlines of this thread stand still while that process waits for a processor.
pub(crate) fn follow(process: u32) {
    HOSTS.with_borrow_mut(|hosts| hosts.push(process));
}

/// That process is gone.
pub(crate) fn unfollow(process: u32) {
    HOSTS.with_borrow_mut(|hosts| hosts.retain(|&host| host != process));
}

/// The end of somebody's patience.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    start: Instant,
    starved_at_start: Duration,
    within: Duration,
}

impl Deadline {
    /// So long from now, while the virtual host has a processor.
    pub fn after(within: Duration) -> Self {
        Self { start: Instant::now(), starved_at_start: starved(), within }
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        self.left().is_zero()
    }

    /// How long to wait before asking again; zero when it is over.
    pub fn left(&self) -> Duration {
        let waited = self.start.elapsed();
        if waited < self.within {
            return (self.within - waited).min(LOOK_AGAIN);
        }
        let starved = starved().saturating_sub(self.starved_at_start);
        remaining(self.within, waited, starved).min(LOOK_AGAIN)
    }
}

/// What is left of a limit after so long, of which the virtual host had no processor for `starved`.
fn remaining(within: Duration, waited: Duration, starved: Duration) -> Duration {
    if waited >= within.saturating_mul(STRETCH_MAX) {
        return Duration::ZERO;
    }
    within.saturating_sub(waited.saturating_sub(starved))
}

/// How long the busiest thread of each virtual host of this test has waited for a processor so far, and how long this
/// machine's processors were away. Those of all together: which of them the host would have run on nobody knows.
fn starved() -> Duration {
    HOSTS.with_borrow(|hosts| {
        if hosts.is_empty() {
            return Duration::ZERO;
        }
        let stolen = std::fs::read_to_string("/proc/stat").ok().and_then(|text| steal(&text));
        hosts.iter().map(|&process| longest_wait(process)).sum::<Duration>() + stolen.unwrap_or_default()
    })
}

fn longest_wait(process: u32) -> Duration {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{process}/task")) else { return Duration::ZERO };
    let waits = threads.filter_map(|thread| {
        let text = std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
        run_delay(&text)
    });
    waits.max().unwrap_or_default()
}

/// `/proc/stat`: of all processors together user, nice, system, idle, iowait, irq, softirq, steal, in hundredths of a second
/// (`USER_HZ`, the same on all architectures we run on).
fn steal(stat: &str) -> Option<Duration> {
    let hundredths: u64 =
        stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().nth(7)?.parse().ok()?;
    Some(Duration::from_millis(hundredths.saturating_mul(10)))
}

/// `schedstat`: nanoseconds on a processor, nanoseconds of waiting for one, number of turns.
fn run_delay(schedstat: &str) -> Option<Duration> {
    schedstat.split_whitespace().nth(1)?.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn time_without_a_processor_is_given_back() {
        assert_eq!(remaining(s(10), s(15), s(7)), s(2));
        assert_eq!(remaining(s(10), s(15), s(5)), s(0));
        assert_eq!(remaining(s(10), s(15), s(20)), s(10));
    }

    #[test]
    fn patience_ends_however_busy_the_machine_is() {
        assert_eq!(remaining(s(10), s(80), s(79)), s(0));
    }

    #[test]
    fn second_field_is_the_waiting() {
        assert_eq!(run_delay("631404 2500000000 17\n"), Some(Duration::from_millis(2500)));
        assert_eq!(run_delay(""), None);
    }

    #[test]
    fn eighth_figure_of_all_processors_is_what_was_stolen() {
        let text = "cpu  187127 0 20979 719319 1824 0 393 1307 5 0\ncpu0 1 2 3 4 5 6 7 8 9 0\n";
        assert_eq!(steal(text), Some(Duration::from_millis(13_070)));
        assert_eq!(steal("cpu0 1 2 3 4 5 6 7 8 9 0\n"), None);
    }

    #[test]
    fn this_kernel_counts_the_waiting_of_threads_and_what_is_stolen() {
        let own = std::fs::read_to_string("/proc/self/schedstat").unwrap();
        assert!(run_delay(&own).is_some(), "{own}");
        let all = std::fs::read_to_string("/proc/stat").unwrap();
        assert!(steal(&all).is_some(), "{all}");
    }

    #[test]
    fn deadline_of_a_test_without_a_host_is_the_wall_clocks() {
        assert!(Deadline::after(Duration::ZERO).is_over());
        assert!(!Deadline::after(s(60)).is_over());
    }
}
