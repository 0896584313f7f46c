//! The ready-made devices.

pub mod counted;
pub mod delayed;
pub mod hostile;
pub mod serial;
pub mod usbtest;
