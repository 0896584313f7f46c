//! The transport: carries out what the controller wants from the devices ([`crate::urb`]) on usbfs.
//!
//! [`DeviceSet`] is the door. It runs on the event loop and never waits: what can wait in the kernel goes to a lane
//! ([`Lanes`]), together with the device's link, so that the loop cannot make a call on that device meanwhile. It knows
//! nothing of registers, rings or ports, and decides nothing by policy.

mod descriptors;
mod device;
mod device_set;
mod lane;
mod link;
mod payload;
mod pool;
mod status;
mod uas;
mod wake;

pub use descriptors::{Alternate, Configuration, DescriptorError, Descriptors, Endpoint};
pub use device_set::{Counters, DeviceEvent, DeviceSet};
pub use lane::Lanes;
pub use link::{DeviceInfo, Handover, Refused};
pub use pool::Limits;
