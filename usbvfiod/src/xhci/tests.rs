//! The controller as a guest driver sees it, with devices that answer when a test says so.

mod allocations;
mod bulk_model;
mod commands;
mod control;
mod coverage;
mod events;
mod flow;
mod hostile;
mod isoch;
mod order_model;
mod ports;
mod registers;
mod rings;
mod slot_model;
mod streams;
mod td;
mod transfers;

/// Cases of a property test; `PROPTEST_CASES` overrides it for a long run.
fn cases(default: u32) -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(default)
}
