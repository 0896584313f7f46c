//! A running transfer allocates nothing: memory of ended transfers is used again.

#![expect(unsafe_code, reason = "a counting allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use super::super::fixture::{CHAIN, DATA, Guest, IOC, ISP, normal};
use crate::urb::{Effect, UrbCompletion, UrbRequest, UrbStatus};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// Counts what the current thread allocates.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: each call is passed on to the system's allocator unchanged; the counter is a plain cell of the thread.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the promises of `alloc`, which are the same there.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `System` with this layout, by `alloc` above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: `pointer` came from `System` with this layout, by `alloc` above.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the promises of `alloc_zeroed`, which are the same there.
        unsafe { System.alloc_zeroed(layout) }
    }
}

/// Queues a TD of four TRBs, rings, and ends what was started, as a transport does: payloads go back and forth.
fn round(guest: &mut Guest, slot: u8, started: &mut Vec<UrbRequest>) {
    for index in 0..4u64 {
        let flags = if index == 3 { IOC } else { CHAIN | ISP };
        guest.push(slot, 4, normal(DATA + index * 0x2000, 4096, flags));
    }
    guest.ring(slot, 4);
    for effect in guest.effects.drain(..) {
        if let Effect::Submit(request) = effect {
            started.push(request);
        }
    }
    for UrbRequest { id, len, payload, .. } in started.drain(..) {
        let status = UrbStatus::Completed;
        let completion = UrbCompletion { id, status, actual: len, packets: Vec::new(), payload };
        guest.controller.complete(guest.now, &guest.mem, completion, &mut guest.effects);
    }
    guest.settle();
}

#[test]
fn running_bulk_transfers_allocate_nothing() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let mut started = Vec::with_capacity(8);
    for _ in 0..100 {
        round(&mut guest, slot, &mut started);
        guest.events();
    }
    let mut allocated = 0;
    for _ in 0..100 {
        let before = ALLOCATIONS.get();
        round(&mut guest, slot, &mut started);
        allocated += ALLOCATIONS.get() - before;
        assert_eq!(guest.transfers().len(), 1);
    }
    assert_eq!(allocated, 0);
}
