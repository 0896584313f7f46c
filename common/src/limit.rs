//! Log lines that somebody outside can repeat: so many at once and no more, and a count of those that were left out.
//!
//! [`limited!`](crate::limited) is for every line that a guest, a device, a VMM or a client makes appear. Not for what
//! an operator looks for afterwards (attached, detached, refused, decided): such lines are as rare as plugs are.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

#[doc(hidden)]
pub use tracing;

/// Lines of one place in a [`WINDOW`].
pub const BURST: u32 = 8;
/// After so long the next [`BURST`] may come.
pub const WINDOW: Duration = Duration::from_secs(10);

/// The budget of one place in the code.
#[derive(Debug)]
pub struct Limit {
    /// Whoever logs from this place: the event loop and the lanes.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    since: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl Limit {
    /// A budget that nothing was taken from.
    pub const fn new() -> Self {
        Self { state: Mutex::new(State { since: None, lines: 0, left_out: 0 }) }
    }

    /// Whether a line may appear now, and then how many were left out before it.
    pub fn pass(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = state.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW);
        if is_new {
            state.since = Some(now);
            state.lines = 0;
        }
        if state.lines >= BURST {
            state.left_out = state.left_out.saturating_add(1);
            return None;
        }
        state.lines += 1;
        Some(std::mem::take(&mut state.left_out))
    }
}

impl Default for Limit {
    fn default() -> Self {
        Self::new()
    }
}

/// Logs like the macro of `tracing` that it is given the name of, but not more than [`BURST`](crate::limit::BURST)
/// lines from this place in a [`WINDOW`](crate::limit::WINDOW): `limited!(warn, %error, "it failed")`.
#[macro_export]
macro_rules! limited {
    (@ $level:ident $name:ident, $($line:tt)+) => {{
        // A line that nobody reads costs a comparison.
        if $crate::limit::tracing::enabled!($crate::limit::tracing::Level::$level) {
            static LIMIT: $crate::limit::Limit = $crate::limit::Limit::new();
            if let Some(left_out) = LIMIT.pass(::std::time::Instant::now()) {
                if left_out > 0 {
                    $crate::limit::tracing::$name!(left_out, "lines like the next one were left out");
                }
                $crate::limit::tracing::$name!($($line)+);
            }
        }
    }};
    (error, $($line:tt)+) => { $crate::limited!(@ ERROR error, $($line)+) };
    (warn, $($line:tt)+) => { $crate::limited!(@ WARN warn, $($line)+) };
    (info, $($line:tt)+) => { $crate::limited!(@ INFO info, $($line)+) };
    (debug, $($line:tt)+) => { $crate::limited!(@ DEBUG debug, $($line)+) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_beyond_the_burst_are_left_out_and_counted() {
        let limit = Limit::new();
        let start = Instant::now();
        let passed = (0..1000).filter(|_| limit.pass(start).is_some()).count();
        assert_eq!(passed, BURST as usize);
        assert_eq!(limit.pass(start + WINDOW), Some(1000 - u64::from(BURST)));
        assert_eq!(limit.pass(start + WINDOW), Some(0));
    }

    #[test]
    fn each_window_has_a_burst_of_its_own() {
        let limit = Limit::new();
        let start = Instant::now();
        for window in 0..3 {
            let now = start + WINDOW * window;
            let passed = (0..100).filter(|_| limit.pass(now).is_some()).count();
            assert_eq!(passed, BURST as usize, "window {window}");
        }
    }

    /// Counts the events that reach the log.
    #[derive(Default)]
    struct Count(std::sync::atomic::AtomicUsize);

    impl tracing::Subscriber for &'static Count {
        fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
            *metadata.level() <= tracing::Level::WARN
        }
        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            tracing::span::Id::from_u64(1)
        }
        fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
        fn event(&self, _: &tracing::Event<'_>) {
            self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
        fn enter(&self, _: &tracing::span::Id) {}
        fn exit(&self, _: &tracing::span::Id) {}
    }

    #[test]
    fn each_place_has_its_own_budget_and_lines_that_are_off_cost_nothing() {
        let count: &'static Count = Box::leak(Box::default());
        tracing::subscriber::with_default(count, || {
            for round in 0..100 {
                crate::limited!(warn, round, "here");
                crate::limited!(debug, round, "not shown");
            }
            crate::limited!(warn, "there");
        });
        assert_eq!(count.0.load(std::sync::atomic::Ordering::Relaxed), BURST as usize + 1);
    }
}
