//! The xHCI controller: pure, input in, effects out. Registers, rings, contexts and events of xHCI 1.2, no fd, no
//! thread, no clock. It speaks to the devices through [`crate::urb`] and to guest memory through [`GuestMem`].

pub use crate::urb::{DmaFault, GuestMem};
