//! The controller as a guest driver sees it, with devices that answer when a test says so.

mod bulk_model;
mod flow;
mod transfers;
