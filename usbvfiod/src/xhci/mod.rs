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
mod events;
mod halt;
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
mod start;
mod stream;
mod td;
mod transfer;
mod trb;

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod tests;

pub use crate::urb::{DmaFault, GuestMem};
pub use controller::{Controller, ControllerConfig};
pub use hub::AttachError;
pub use port::{AttachOptions, PortNumber, ResetPolicy};
