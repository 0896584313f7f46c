//! The vfio-user server as its clients see it: over a socket, by the client that Cloud Hypervisor runs (`client`), by a
//! script of what QEMU sends (`qemu`), and by a client that does what it should not (`negotiate`, `requests`, `irqs`,
//! `dma`, `regions`, `lifecycle`).
//!
//! The server is the daemon's loop around `Session` with a device of memory behind it (`server`). With
//! `USBVFIOD_TEST_BINARY=/path/to/usbvfiod` the tests in `client` run against that program instead.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod client;
mod dma;
mod irqs;
mod lifecycle;
mod negotiate;
mod qemu;
mod real_qemu;
mod regions;
mod requests;
mod server;
mod wire;
