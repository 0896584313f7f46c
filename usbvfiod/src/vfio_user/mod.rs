//! The vfio-user protocol as a server speaks it: [`message`] turns bytes into requests, [`version`] agrees on a version,
//! [`inbox`] cuts the stream into messages, [`outbox`] holds the
//! replies, [`session`] is the state of one connection, and [`transport`] is the thin
//! shell that moves bytes and file descriptors.
//!
//! All but [`transport`] are pure: bytes and descriptors in, requests and reply bytes out. Nothing here knows what a
//! region holds or does. Protocol: QEMU `docs/interop/vfio-user.rst`; what is answered how, and why:
//! `docs/protocol.md`.

pub mod inbox;
pub mod message;
pub mod outbox;
pub mod session;
pub mod transport;
pub mod version;
