//! A USB device that does exactly what a test says: the device side of USB/IP, attached to the kernel's `vhci_hcd`.
//!
//! ```text
//! usbfs, drivers ── usbcore ── vhci_hcd ══ UNIX socket ══ session ── device ── model
//! ```
//!
//! [`wire`] is the protocol, [`session`] keeps the order and the time of transfers, [`device`] answers what every
//! device answers (USB 2.0 chapter 9), a [`model::Model`] is what makes one device different from another, and
//! [`catalogue`] names those that are ready-made. [`vhci`] plugs and pulls.
//!
//! What USB/IP cannot carry: streams, link power states, port resets (the device sees only the enumeration that
//! follows) and SET_ADDRESS; `vhci_hcd` keeps those to itself.

pub mod catalogue;
pub mod descriptors;
pub mod device;
pub mod model;
pub mod models;
pub mod session;
pub mod vhci;
pub mod wire;
