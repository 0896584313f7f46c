//! A vfio-user server that emulates an xHCI controller for one virtual machine. See `ARCHITECTURE.md`.

pub mod attached;
pub mod cli;
pub mod daemon;
pub mod guest_memory;
pub mod pci;
pub mod policy_link;
pub mod sandbox;
pub mod urb;
pub mod usb;
pub mod vfio_user;
pub mod xhci;
