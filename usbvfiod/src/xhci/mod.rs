//! The xHCI controller: pure, input in, effects out. Registers, rings, contexts and events of xHCI 1.2, no fd, no
//! thread, no clock. It speaks to the devices through [`crate::urb`] and to guest memory through [`GuestMem`].

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
