//! What `usbpolicyd` and `usbvfiod` share, and nothing else: the names they call devices by ([`ids`]), the messages
//! between them ([`wire`]) and the socket those travel on ([`channel`]), the kernel's usbfs interface ([`usbfs`]), and a log
//! that nobody outside can fill ([`limit`]).
//!
//! No policy and no xHCI here: a type that only one daemon needs lives in that daemon.

pub mod channel;
pub mod confine;
pub mod ids;
pub mod limit;
pub mod usbfs;
pub mod wire;
