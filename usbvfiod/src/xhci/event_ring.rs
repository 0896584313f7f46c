//! The event ring of an interrupter: segments, enqueue pointer, the full ring (xHCI 1.2 §4.9.3, §4.9.4). When to
//! interrupt is decided in `interrupter`.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::regs::ERST_SEGMENTS;
use super::ring::read_object;
use super::trb::{CompletionCode, TRB_BYTES, Trb};
use super::{DmaFault, GuestMem};

/// Most events kept while the ring is full. Transfers and commands pause then; only events that cannot wait where they
/// arise are kept: one for each port, and a few for each endpoint.
const DEFERRED_MAX: usize = 4096;

/// Event Ring Segment Table Entry (§6.5).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct TableEntry {
    base: U64,
    size: U32,
    reserved: U32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    base: u64,
    trbs: u32,
}

/// Where the producer stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Position {
    segment: usize,
    index: u32,
    /// Producer cycle state, inverted so that the default is the start (PCS = 1).
    wrapped: bool,
}

/// The guest built an event ring we cannot use.
#[derive(Debug, thiserror::Error)]
pub(super) enum EventRingError {
    /// Segment table or segment outside guest memory.
    #[error("event ring is not in guest memory")]
    Memory(#[from] DmaFault),
    /// A segment of fewer than 16 or more than 4096 TRBs (§6.5).
    #[error("event ring segment {segment} has {trbs} TRBs")]
    SegmentSize { segment: usize, trbs: u32 },
}

/// Registers and state of one event ring.
#[derive(Debug, Default)]
pub(super) struct EventRing {
    /// ERSTSZ as written.
    pub(super) table_size: u16,
    /// ERSTBA as written.
    pub(super) table_base: u64,
    /// ERDP without its low four bits.
    pub(super) dequeue: u64,
    /// DESI of ERDP: stored for the guest, not needed by us.
    pub(super) dequeue_segment: u8,
    segments: Vec<Segment>,
    loaded: bool,
    at: Position,
    full: bool,
    deferred: VecDeque<Trb>,
}

impl EventRing {
    /// A new table: the ring starts again at its first TRB (§4.9.3). The table is read when the first event comes, as
    /// the guest writes the register in two halves.
    pub(super) fn table_written(&mut self) {
        self.loaded = false;
        self.at = Position::default();
        self.full = false;
    }

    /// Whether the guest has set the ring up.
    pub(super) fn is_enabled(&self) -> bool {
        self.table_size != 0
    }

    /// Whether the guest has taken every event.
    pub(super) fn is_empty(&self) -> bool {
        match self.segments.get(self.at.segment) {
            Some(segment) => slot_address(*segment, self.at.index) == self.dequeue,
            None => true,
        }
    }

    /// Producer position, for Save State (§4.23.2).
    pub(super) fn position(&self) -> Position {
        self.at
    }

    /// Takes the position up again after the guest has restored the registers.
    pub(super) fn restore(&mut self, at: Position) {
        self.loaded = false;
        self.at = at;
    }

    /// Whether an event can be posted now. When not, Event Ring Full has been posted and the rest waits until ERDP moves.
    pub(super) fn has_room<M: GuestMem>(&mut self, mem: &M) -> Result<bool, EventRingError> {
        if !self.is_enabled() {
            return Ok(true);
        }
        self.load(mem)?;
        if !self.deferred.is_empty() {
            return Ok(false);
        }
        self.make_room(mem)
    }

    /// Posts an event, or keeps it until there is room. True when something was written. Events for a ring that is not
    /// set up are lost, as on hardware.
    pub(super) fn post<M: GuestMem>(&mut self, mem: &M, event: Trb) -> Result<bool, EventRingError> {
        if !self.is_enabled() {
            return Ok(false);
        }
        self.load(mem)?;
        let was_full = self.full;
        if self.deferred.is_empty() && self.make_room(mem)? {
            self.write(mem, event)?;
            return Ok(true);
        }
        if self.deferred.len() < DEFERRED_MAX && !self.deferred.contains(&event) {
            self.deferred.push_back(event);
        }
        Ok(self.full && !was_full)
    }

    /// Posts what was kept, as far as there is room. True when something was written.
    pub(super) fn flush<M: GuestMem>(&mut self, mem: &M) -> Result<bool, EventRingError> {
        let mut written = false;
        while let Some(event) = self.deferred.front().copied() {
            if !self.make_room(mem)? {
                break;
            }
            self.write(mem, event)?;
            self.deferred.pop_front();
            written = true;
        }
        Ok(written)
    }

    /// One slot is always left free; the one before it is kept for the Event Ring Full event (§4.9.4).
    fn make_room<M: GuestMem>(&mut self, mem: &M) -> Result<bool, EventRingError> {
        let next = self.advanced(self.at);
        if self.address(next) == self.dequeue {
            return Ok(false);
        }
        if self.address(self.advanced(next)) != self.dequeue {
            self.full = false;
            return Ok(true);
        }
        if !self.full {
            self.full = true;
            self.write(mem, Trb::host_controller(CompletionCode::EventRingFull))?;
        }
        Ok(false)
    }

    /// Writes an event; its cycle bit last, as the guest may look at any time.
    fn write<M: GuestMem>(&mut self, mem: &M, event: Trb) -> Result<(), EventRingError> {
        let at = self.address(self.at);
        let event = event.with_cycle(!self.at.wrapped);
        let bytes = event.as_bytes();
        mem.write(at, &bytes[..12])?;
        fence(Ordering::Release);
        mem.write(at.wrapping_add(12), &bytes[12..])?;
        self.at = self.advanced(self.at);
        Ok(())
    }

    fn load<M: GuestMem>(&mut self, mem: &M) -> Result<(), EventRingError> {
        if self.loaded {
            return Ok(());
        }
        self.segments.clear();
        for index in 0..ERST_SEGMENTS.min(usize::from(self.table_size)) {
            let entry: TableEntry = read_object(mem, self.table_base.wrapping_add(index as u64 * 16))?;
            let trbs = entry.size.get() & 0xffff;
            if !(16..=4096).contains(&trbs) {
                self.segments.clear();
                return Err(EventRingError::SegmentSize { segment: index, trbs });
            }
            self.segments.push(Segment { base: entry.base.get() & !0x3f, trbs });
        }
        let fits = self.segments.get(self.at.segment).is_some_and(|segment| self.at.index < segment.trbs);
        if !fits {
            self.at = Position::default();
        }
        self.loaded = true;
        Ok(())
    }

    fn address(&self, at: Position) -> u64 {
        slot_address(self.segments[at.segment], at.index)
    }

    fn advanced(&self, at: Position) -> Position {
        if at.index + 1 < self.segments[at.segment].trbs {
            Position { index: at.index + 1, ..at }
        } else if at.segment + 1 < self.segments.len() {
            Position { segment: at.segment + 1, index: 0, ..at }
        } else {
            Position { segment: 0, index: 0, wrapped: !at.wrapped }
        }
    }
}

fn slot_address(segment: Segment, index: u32) -> u64 {
    segment.base.wrapping_add(u64::from(index) * TRB_BYTES)
}

#[cfg(test)]
mod tests {
    use super::super::fixture::Memory;
    use super::super::trb::event_type;
    use super::*;

    const TABLE: u64 = 0x1000;

    fn ring(mem: &Memory, segments: &[(u64, u32)]) -> EventRing {
        for (index, (base, size)) in segments.iter().enumerate() {
            mem.put(TABLE + index as u64 * 16, &Trb::new(*base, *size, 0));
        }
        EventRing {
            table_size: segments.len() as u16,
            table_base: TABLE,
            dequeue: segments[0].0,
            ..EventRing::default()
        }
    }

    fn event(number: u64) -> Trb {
        Trb::transfer_event(number, 0, CompletionCode::Success, 1, 1, false)
    }

    fn fill(ring: &mut EventRing, mem: &Memory) -> u64 {
        (0..10_000)
            .find(|number| !ring.has_room(mem).unwrap() || !ring.post(mem, event(*number)).unwrap())
            .unwrap()
    }

    #[test]
    fn full_ring_gets_one_event_ring_full_and_the_rest_later() {
        let mem = Memory::new(0x10000);
        let mut ring = ring(&mem, &[(0x2000, 16)]);
        assert_eq!(fill(&mut ring, &mem), 14);
        let last: Trb = mem.get(0x2000 + 14 * 16);
        assert_eq!(last.control().trb_type(), event_type::HOST_CONTROLLER);
        assert_eq!(last.status_bits() >> 24, CompletionCode::EventRingFull as u32);

        assert!(!ring.post(&mem, event(77)).unwrap(), "nothing is written to a full ring");
        let untouched: Trb = mem.get(0x2000 + 15 * 16);
        assert_eq!(untouched, Trb::default());

        ring.dequeue = 0x2000 + 15 * 16;
        assert!(ring.flush(&mem).unwrap());
        let resumed: Trb = mem.get(0x2000 + 15 * 16);
        assert_eq!(resumed.parameter(), 77);
    }

    #[test]
    fn cycle_bit_turns_after_the_last_of_several_segments() {
        let mem = Memory::new(0x10000);
        let mut ring = ring(&mem, &[(0x2000, 16), (0x4000, 32), (0x3000, 16)]);
        for number in 0..65 {
            ring.post(&mem, event(number)).unwrap();
            ring.dequeue = ring.address(ring.at);
        }
        let first: Trb = mem.get(0x2000);
        assert_eq!((first.parameter(), first.control().cycle()), (64, false));
        let last: Trb = mem.get(0x3000 + 15 * 16);
        assert_eq!((last.parameter(), last.control().cycle()), (63, true));
    }

    #[test]
    fn segment_sizes_out_of_range_are_refused() {
        let mem = Memory::new(0x10000);
        for size in [0, 15, 4097, 65535] {
            let mut ring = ring(&mem, &[(0x2000, size)]);
            assert!(matches!(ring.post(&mem, event(0)), Err(EventRingError::SegmentSize { .. })), "{size}");
        }
    }

    #[test]
    fn table_of_65535_segments_reads_eight() {
        let mem = Memory::new(0x10000);
        let mut ring = ring(&mem, &[(0x2000, 16); 9]);
        ring.table_size = 65535;
        ring.post(&mem, event(0)).unwrap();
        assert_eq!(ring.segments.len(), ERST_SEGMENTS);
    }

    #[test]
    fn ring_outside_memory_is_an_error() {
        let mem = Memory::new(0x2000);
        for base in [0x4000, 1 << 63, u64::MAX] {
            let mut ring = ring(&mem, &[(base, 16)]);
            assert!(matches!(ring.post(&mem, event(0)), Err(EventRingError::Memory(_))), "{base:#x}");
        }
        let mut unmapped = EventRing { table_size: 1, table_base: u64::MAX, ..EventRing::default() };
        assert!(unmapped.post(&mem, event(0)).is_err());
    }

    #[test]
    fn dequeue_pointer_outside_the_ring_does_no_harm() {
        let mem = Memory::new(0x10000);
        let mut ring = ring(&mem, &[(0x2000, 16)]);
        ring.dequeue = 0x7770;
        for number in 0..1000 {
            ring.post(&mem, event(number)).unwrap();
        }
        assert!(!ring.is_empty());
    }

    #[test]
    fn kept_events_are_bounded_and_not_repeated() {
        let mem = Memory::new(0x10000);
        let mut ring = ring(&mem, &[(0x2000, 16)]);
        fill(&mut ring, &mem);
        for _ in 0..100 {
            ring.post(&mem, Trb::port_status_change(3)).unwrap();
        }
        assert_eq!(ring.deferred.len(), 1);
        for number in 0..100_000 {
            ring.post(&mem, event(number)).unwrap();
        }
        assert_eq!(ring.deferred.len(), DEFERRED_MAX);
    }
}
