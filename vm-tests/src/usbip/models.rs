//! The ready-made devices.

pub mod counted;
pub mod delayed;
pub mod disk;
pub mod hostile;
pub mod security_key;
pub mod serial;
pub mod speaker;
pub mod usbtest;
