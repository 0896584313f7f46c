//! The vfio-user server as its clients see it: over a socket, by the client that Cloud Hypervisor runs (`client`), by a
//! script of what QEMU sends (`qemu`), and by a client that does what it should not (`negotiate`, `requests`, `irqs`,
//! `dma`, `regions`, `lifecycle`).
//!
//! The server is the daemon's loop around `Session` with a device of memory behind it (`server`). The tests in `client`
//! run against the program as well: the one that was built, or the one that `USBVFIOD_TEST_BINARY` names.

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
