//! The xHCI controller: pure, input in, effects out. Registers, rings, contexts and events of xHCI 1.2, no fd, no
//! thread, no clock. It speaks to the devices through [`crate::urb`] and to guest memory through [`GuestMem`].
//!
//! Inputs are the methods of [`Controller`]; what follows from them is appended to a list of [`crate::urb::Effect`].
//! After a batch of inputs comes one [`Controller::settle`], which refills the rings and decides once about interrupts.

mod command;
mod configure;
mod context;
mod controller;
mod event_ring;
mod hub;
mod interrupter;
mod isoch;
mod mmio;
mod port;
mod regs;
mod report;
mod request;
mod ring;
mod slot;
mod stream;
mod td;
mod transfer;
mod trb;

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod tests;

pub use controller::{Controller, ControllerConfig};
pub use hub::AttachError;
pub use port::{AttachOptions, PortNumber, ResetPolicy};

/// An access to guest memory did not hit memory the guest may use for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no accessible guest memory at {addr:#x}, {len} bytes")]
pub struct DmaFault {
    /// First guest physical address asked for.
    pub addr: u64,
    /// Length asked for, in bytes.
    pub len: usize,
}

/// Guest physical memory as the controller sees it by DMA.
///
/// The guest may change it at any time, so callers copy once and parse the copy. An access may cross the border of two
/// adjacent mappings; nothing is read or written when any byte of it is not accessible.
pub trait GuestMem {
    /// Copies `buf.len()` bytes from guest physical `addr`.
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), DmaFault>;
    /// Copies `buf` to guest physical `addr`.
    fn write(&self, addr: u64, buf: &[u8]) -> Result<(), DmaFault>;
}
