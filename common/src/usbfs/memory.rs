//! Memory of transfers: plain heap, or memory of the host controller mapped through the device's file.

#![expect(unsafe_code, reason = "mmap of transfer memory")]

use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::UsbfsFile;

/// One mapping, unmapped when the last piece of it is dropped. The kernel keeps the memory while a URB uses it
/// (`devio.c dec_usb_memory_use_count`), so dropping it early hurts nobody.
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is process-wide memory, not tied to a thread; access goes through disjoint `MappedBuffer`s.
unsafe impl Send for Mapping {}
// SAFETY: `Mapping` itself offers no access to the memory.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `start` and `len` are what mmap gave and was asked for, and no piece is left (we are in Drop).
        let result = unsafe { munmap(self.start.cast(), self.len) };
        debug_assert_eq!(result, Ok(()));
    }
}

/// A piece of memory that the host controller reads and writes without a copy in the kernel. Pieces never overlap.
///
/// The controller touches it only while a URB with it is in flight, and a buffer in flight is owned by the
/// [`super::UrbQueue`]: whoever holds one has it alone.
pub struct MappedBuffer {
    /// Shared with the other pieces of the same mapping.
    mapping: Arc<Mapping>,
    offset: usize,
    len: usize,
}

impl std::fmt::Debug for MappedBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MappedBuffer({} bytes)", self.len)
    }
}

impl MappedBuffer {
    fn as_ptr(&self) -> NonNull<u8> {
        // SAFETY: `offset + len` is inside of the mapping (`UsbfsFile::map` cuts it so).
        unsafe { self.mapping.start.add(self.offset) }
    }
}

impl UsbfsFile {
    /// Maps `pieces` buffers of `piece_len` bytes each, in one physically contiguous mapping.
    ///
    /// `ENOMEM`: the host has no contiguous memory, or `usbfs_memory_mb` is used up. Lengths are multiples of the page
    /// size in all.
    pub fn map(&self, piece_len: usize, pieces: usize) -> nix::Result<Vec<MappedBuffer>> {
        let len = piece_len.checked_mul(pieces).and_then(NonZeroUsize::new).ok_or(Errno::EINVAL)?;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs no memory of ours.
        let start = unsafe {
            mmap(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, self, 0)
        }?;
        let mapping = Arc::new(Mapping { start: start.cast(), len: len.get() });
        let piece =
            |index| MappedBuffer { mapping: Arc::clone(&mapping), offset: index * piece_len, len: piece_len };
        Ok((0..pieces).map(piece).collect())
    }
}

/// What a URB reads from or writes to.
#[derive(Debug)]
pub enum UrbBuffer {
    /// Process memory: the kernel copies.
    Heap(Vec<u8>),
    /// Memory of the host controller: nobody copies.
    Mapped(MappedBuffer),
}

impl UrbBuffer {
    /// No memory at all, for a transfer without payload.
    pub const fn empty() -> Self {
        Self::Heap(Vec::new())
    }

    /// Length in bytes; never changes.
    pub fn len(&self) -> usize {
        match self {
            Self::Heap(bytes) => bytes.len(),
            Self::Mapped(piece) => piece.len,
        }
    }

    /// Whether there is no memory.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it is mapped.
    pub const fn is_mapped(&self) -> bool {
        matches!(self, Self::Mapped(_))
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        match self {
            Self::Heap(bytes) => bytes,
            // SAFETY: the piece is mapped readable and initialised (the kernel zeroes it), it lives as long as `self`,
            // and nobody writes to it: pieces are disjoint, and while a URB uses it the queue owns it.
            Self::Mapped(piece) => unsafe { std::slice::from_raw_parts(piece.as_ptr().as_ptr(), piece.len) },
        }
    }

    /// The bytes, to be changed.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        match self {
            Self::Heap(bytes) => bytes,
            // SAFETY: as in `as_slice`, and `&mut self` makes this the only reference.
            Self::Mapped(piece) => unsafe {
                std::slice::from_raw_parts_mut(piece.as_ptr().as_ptr(), piece.len)
            },
        }
    }

    /// Where the kernel finds it. The pointer stays good when `self` is moved.
    pub(super) fn as_mut_ptr(&mut self) -> *mut u8 {
        match self {
            Self::Heap(bytes) => bytes.as_mut_ptr(),
            Self::Mapped(piece) => piece.as_ptr().as_ptr(),
        }
    }
}
