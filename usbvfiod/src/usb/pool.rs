//! Buffers for the transfers of one device, used again and again.
//!
//! Buffers come in powers of two. Up to 4 MiB they are mapped from the host controller, so that payload is copied once
//! (between guest and buffer) and never in the kernel; beyond, or when the host has no contiguous memory, or when the
//! budget is used up, they are plain heap and the kernel copies once more.
//!
//! Buffers are not cleared between transfers. That leaks nothing: they stay with one device, a transfer to the device
//! fills all of the bytes it sends, and of a transfer from the device only the bytes that came are copied out.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::limited;
use common::usbfs::{UrbBuffer, UsbfsFile};
use nix::errno::Errno;

/// Smallest buffer: one page, so that sixteen commands and statuses of storage share a mapping.
const CLASS_MIN: usize = 4 * 1024;
/// Buffers from here on have a mapping of their own; smaller ones share one of this size.
const OWN_MAPPING_MIN: usize = 64 * 1024;
/// Largest mapping: the largest piece a page allocator hands out.
const CLASS_MAX: usize = 4 * 1024 * 1024;
const CLASSES: usize = (CLASS_MAX / CLASS_MIN).ilog2() as usize + 1;
/// After the host had no memory for a mapping, so many buffers of that size come from the heap.
const REST_AFTER_REFUSAL: u32 = 64;
/// Heap that is kept for later, per device.
const IDLE_HEAP_MAX: usize = 4 * 1024 * 1024;

/// How much memory transfers may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Mapped bytes for one device. 0 maps nothing, for hosts where mapped memory is uncached.
    pub mapped_per_device: usize,
    /// Mapped bytes for all devices.
    pub mapped_total: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { mapped_per_device: 8 * 1024 * 1024, mapped_total: 64 * 1024 * 1024 }
    }
}

/// Mapped bytes of all devices of the process.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    limits: Limits,
    /// Held by the pools of all devices.
    used: Arc<AtomicUsize>,
}

impl Budget {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, used: Arc::default() }
    }

    fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}

/// Buffers of one device.
#[derive(Debug)]
pub(super) struct Pool {
    budget: Budget,
    mapped: usize,
    /// By class, heap before mapped.
    idle: [Vec<UrbBuffer>; CLASSES],
    idle_heap: usize,
    rest: [u32; CLASSES],
    unmappable: bool,
}

impl Pool {
    pub(super) fn new(budget: Budget) -> Self {
        Self {
            budget,
            mapped: 0,
            idle: Default::default(),
            idle_heap: 0,
            rest: [0; CLASSES],
            unmappable: false,
        }
    }

    /// The kernel cannot map memory for this device.
    pub(super) fn use_heap_only(&mut self) {
        self.unmappable = true;
    }

    /// A buffer of at least `len` bytes.
    pub(super) fn take(&mut self, file: &UsbfsFile, len: usize) -> UrbBuffer {
        if len == 0 {
            return UrbBuffer::empty();
        }
        let Some(class) = class_of(len) else { return UrbBuffer::Heap(vec![0; len]) };
        // Mapped ones lie behind heap ones, see `put`.
        if let Some(buffer) = self.idle[class].pop_if(|buffer| buffer.is_mapped()) {
            return buffer;
        }
        if let Some(buffer) = self.map(file, class) {
            return buffer;
        }
        match self.idle[class].pop() {
            Some(buffer) => {
                self.idle_heap -= buffer.len();
                buffer
            }
            None => UrbBuffer::Heap(vec![0; size_of_class(class)]),
        }
    }

    /// Takes a buffer back.
    pub(super) fn put(&mut self, buffer: UrbBuffer) {
        let Some(class) = class_of(buffer.len()).filter(|&class| size_of_class(class) == buffer.len()) else {
            return;
        };
        if buffer.is_mapped() {
            self.idle[class].push(buffer);
        } else if self.idle_heap + buffer.len() <= IDLE_HEAP_MAX {
            self.idle_heap += buffer.len();
            self.idle[class].insert(0, buffer);
        }
    }

    /// Gives back to the host what lies idle, small buffers excepted. Returns whether there was something.
    pub(super) fn trim(&mut self) -> bool {
        let mut freed = 0;
        for (class, idle) in self.idle.iter_mut().enumerate() {
            let size = size_of_class(class);
            if size < OWN_MAPPING_MIN {
                continue;
            }
            freed += idle.iter().filter(|buffer| buffer.is_mapped()).count() * size;
            self.idle_heap -= idle.iter().filter(|buffer| !buffer.is_mapped()).count() * size;
            idle.clear();
        }
        self.account(freed);
        freed > 0
    }

    fn account(&mut self, freed: usize) {
        self.mapped -= freed;
        self.budget.used.fetch_sub(freed, Ordering::Relaxed);
    }

    fn has_room(&self, class: usize) -> bool {
        let size = size_of_class(class).max(OWN_MAPPING_MIN);
        self.mapped + size <= self.budget.limits.mapped_per_device
            && self.budget.used() + size <= self.budget.limits.mapped_total
    }

    fn map(&mut self, file: &UsbfsFile, class: usize) -> Option<UrbBuffer> {
        if self.unmappable {
            return None;
        }
        if self.rest[class] > 0 {
            self.rest[class] -= 1;
            return None;
        }
        if !self.has_room(class) {
            // Room may be made of what lies idle in other sizes, but not again and again.
            self.rest[class] = REST_AFTER_REFUSAL;
            if !self.trim() || !self.has_room(class) {
                return None;
            }
        }
        let size = size_of_class(class);
        let pieces = OWN_MAPPING_MIN.div_ceil(size);
        match file.map(size, pieces) {
            Ok(buffers) => {
                let mapped = size * pieces;
                self.mapped += mapped;
                self.budget.used.fetch_add(mapped, Ordering::Relaxed);
                self.idle[class].extend(buffers.into_iter().map(UrbBuffer::Mapped));
                self.idle[class].pop()
            }
            Err(Errno::ENOMEM | Errno::EAGAIN) => {
                limited!(
                    debug,
                    size,
                    "no memory to map, transfers of this size are copied once more for a while"
                );
                self.rest[class] = REST_AFTER_REFUSAL;
                None
            }
            Err(error) => {
                limited!(warn, %error, "transfer memory cannot be mapped, each transfer is copied once more");
                self.unmappable = true;
                None
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mapped = self.mapped;
        self.account(mapped);
    }
}

/// The class that holds `len` bytes; none for what is too large.
fn class_of(len: usize) -> Option<usize> {
    let size = len.max(CLASS_MIN).checked_next_power_of_two().filter(|&size| size <= CLASS_MAX)?;
    Some((size / CLASS_MIN).ilog2() as usize)
}

const fn size_of_class(class: usize) -> usize {
    CLASS_MIN << class
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_length_gets_the_next_power_of_two() {
        let sizes = [1, 4096, 4097, 120 * 1024, 1 << 20, 4 << 20].map(|len| class_of(len).map(size_of_class));
        let expected = [4096, 4096, 8192, 128 * 1024, 1 << 20, 4 << 20].map(Some);
        assert_eq!(sizes, expected);
        assert_eq!(class_of((4 << 20) + 1), None);
        assert_eq!(class_of(usize::MAX), None);
    }

    #[test]
    fn heap_that_is_kept_is_bounded() {
        let mut pool = Pool::new(Budget::new(Limits::default()));
        for _ in 0..10 {
            pool.put(UrbBuffer::Heap(vec![0; 1 << 20]));
        }
        assert_eq!(pool.idle_heap, IDLE_HEAP_MAX);
        assert!(!pool.trim());
        assert_eq!(pool.idle_heap, 0);
    }

    #[test]
    fn buffer_of_an_odd_length_is_not_kept() {
        let mut pool = Pool::new(Budget::new(Limits::default()));
        pool.put(UrbBuffer::Heap(vec![0; 5000]));
        pool.put(UrbBuffer::empty());
        assert!(pool.idle.iter().all(Vec::is_empty));
    }
}
