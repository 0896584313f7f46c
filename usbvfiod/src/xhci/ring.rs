//! Rings the guest fills: where we are on one, and how its TRBs are read (xHCI 1.2 §4.9.2). What a TRB means is not
//! known here, save that Link TRBs lead elsewhere.

use std::sync::atomic::{Ordering, fence};

use zerocopy::{FromBytes, IntoBytes};

use super::trb::{LINK, TRB_BYTES, Trb};
use super::{DmaFault, GuestMem};

/// TRBs read from guest memory at a time, when the first of a TD have shown that there are many.
const BATCH: usize = 64;
/// TRBs read first: most TDs are shorter.
const FIRST_BATCH: usize = 16;
/// A batch stays within a page, so that a ring at the end of a memory region can be read.
const PAGE: u64 = 4096;

/// A place on a ring: where the next TRB lies and which cycle bit makes it ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cursor {
    /// Guest physical address, a multiple of 16. The guest's word: it may lie anywhere.
    pub(super) at: u64,
    /// Consumer Cycle State.
    pub(super) cycle: bool,
}

impl Cursor {
    /// Takes a TR Dequeue Pointer field with DCS in bit 0.
    pub(super) fn from_field(field: u64) -> Self {
        Self { at: field & !0xf, cycle: field & 1 == 1 }
    }

    /// The field it came from.
    pub(super) fn field(self) -> u64 {
        self.at | u64::from(self.cycle)
    }

    /// The place after a TRB that is no Link. Wraps at 2^64 as DMA addresses do.
    pub(super) fn next(self) -> Self {
        Self { at: self.at.wrapping_add(TRB_BYTES), ..self }
    }

    /// The place a Link TRB found here leads to (§6.4.4.1).
    pub(super) fn follow(self, link: &Trb) -> Self {
        Self { at: link.parameter() & !0xf, cycle: self.cycle ^ link.control().toggle() }
    }
}

/// Reads TRBs, several at a time.
///
/// Each TRB that is handed out was copied after its cycle bit had been seen valid, so a guest that writes the cycle bit
/// last never shows us half a TRB, however many of them one copy takes.
///
/// A TRB that was seen not to be ours yet is not looked at again: the guest rings a doorbell behind it, and whoever hears
/// that makes a new reader. Each copy can cost a system call.
pub(super) struct Reader<'m, M> {
    mem: &'m M,
    base: u64,
    /// TRBs of the last copy that are ours.
    valid: usize,
    /// The one behind them was seen, and was not ours.
    at_end: bool,
    /// TRBs that the next copy takes.
    ahead: usize,
    trbs: [Trb; BATCH],
}

impl<'m, M: GuestMem> Reader<'m, M> {
    pub(super) fn new(mem: &'m M) -> Self {
        Self { mem, base: 0, valid: 0, at_end: false, ahead: FIRST_BATCH, trbs: [Trb::default(); BATCH] }
    }

    /// The TRB at `cursor`, none when the guest has not handed it over yet.
    pub(super) fn fetch(&mut self, cursor: Cursor) -> Result<Option<Trb>, DmaFault> {
        let place = (cursor.at.wrapping_sub(self.base) / TRB_BYTES) as usize;
        if cursor.at >= self.base && place < self.valid {
            let trb = self.trbs[place];
            return Ok((trb.control().cycle() == cursor.cycle).then_some(trb));
        }
        if self.at_end && cursor.at >= self.base && place == self.valid {
            return Ok(None);
        }
        self.load(cursor)?;
        Ok((self.valid > 0).then(|| self.trbs[0]))
    }

    fn load(&mut self, cursor: Cursor) -> Result<(), DmaFault> {
        let to_page_end = ((PAGE - cursor.at % PAGE) / TRB_BYTES) as usize;
        let mut count = self.ahead.min(to_page_end);
        self.ahead = BATCH;
        self.base = cursor.at;
        self.valid = 0;
        self.at_end = false;
        if self.copy(count).is_err() {
            count = 1;
            self.copy(count)?;
        }
        let owned = self.owned(count, cursor.cycle);
        // Behind a Link the ring goes on elsewhere.
        let is_link = |trb: &Trb| trb.control().trb_type() == LINK;
        self.at_end = owned > 0 && owned < count && !is_link(&self.trbs[owned - 1]);
        if owned == 0 {
            return Ok(());
        }
        fence(Ordering::Acquire);
        self.copy(owned)?;
        self.valid = self.owned(owned, cursor.cycle);
        self.at_end &= self.valid == owned;
        Ok(())
    }

    fn copy(&mut self, count: usize) -> Result<(), DmaFault> {
        self.mem.read(self.base, self.trbs[..count].as_mut_bytes())
    }

    /// How many of the first `limit` TRBs are handed over; a Link TRB is the last that counts.
    fn owned(&self, limit: usize, cycle: bool) -> usize {
        let mut count = 0;
        for trb in &self.trbs[..limit] {
            if trb.control().cycle() != cycle {
                break;
            }
            count += 1;
            if trb.control().trb_type() == LINK {
                break;
            }
        }
        count
    }
}

/// Reads a plain structure from guest memory.
pub(super) fn read_object<M: GuestMem, T: FromBytes + IntoBytes>(mem: &M, at: u64) -> Result<T, DmaFault> {
    let mut object = T::new_zeroed();
    mem.read(at, object.as_mut_bytes())?;
    Ok(object)
}

#[cfg(test)]
mod tests {
    use super::super::fixture::Memory;
    use super::*;

    fn normal(parameter: u64, cycle: bool) -> Trb {
        Trb::new(parameter, 0, 1 << 10 | u32::from(cycle))
    }

    #[test]
    fn reading_stops_at_the_first_trb_of_the_other_cycle() {
        let mem = Memory::new(0x3000);
        mem.put(0x1000, &normal(1, true));
        mem.put(0x1010, &normal(2, true));
        mem.put(0x1020, &normal(3, false));
        let mut reader = Reader::new(&mem);
        let first = Cursor { at: 0x1000, cycle: true };
        assert_eq!(reader.fetch(first).unwrap().map(|t| t.parameter()), Some(1));
        assert_eq!(reader.fetch(first.next()).unwrap().map(|t| t.parameter()), Some(2));
        assert_eq!(reader.fetch(first.next().next()).unwrap(), None);
    }

    /// Guest memory that counts how often it is read.
    struct Counted(Memory, std::cell::Cell<u32>);

    impl GuestMem for Counted {
        fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), DmaFault> {
            self.1.set(self.1.get() + 1);
            self.0.read(addr, buf)
        }

        fn write(&self, addr: u64, buf: &[u8]) -> Result<(), DmaFault> {
            self.0.write(addr, buf)
        }
    }

    #[test]
    fn end_that_was_seen_is_not_read_again() {
        let mem = Counted(Memory::new(0x3000), std::cell::Cell::new(0));
        mem.0.put(0x1000, &normal(1, true));
        let mut reader = Reader::new(&mem);
        let first = Cursor { at: 0x1000, cycle: true };
        assert!(reader.fetch(first).unwrap().is_some());
        assert_eq!(reader.fetch(first.next()).unwrap(), None);
        assert_eq!(mem.1.get(), 2, "once to see the cycle bit, once to copy");
        mem.0.put(0x1010, &normal(2, true));
        let mut behind_a_doorbell = Reader::new(&mem);
        assert!(behind_a_doorbell.fetch(first.next()).unwrap().is_some());
    }

    #[test]
    fn long_ring_is_read_with_few_copies() {
        let mem = Counted(Memory::new(0x3000), std::cell::Cell::new(0));
        let mut cursor = Cursor { at: 0x1000, cycle: true };
        for number in 0..200 {
            mem.0.put(0x1000 + number * TRB_BYTES, &normal(number, true));
        }
        let mut reader = Reader::new(&mem);
        for number in 0..200 {
            assert_eq!(reader.fetch(cursor).unwrap().map(|t| t.parameter()), Some(number));
            cursor = cursor.next();
        }
        assert_eq!(reader.fetch(cursor).unwrap(), None);
        assert!(mem.1.get() <= 8, "{} copies", mem.1.get());
    }

    #[test]
    fn ring_in_the_last_bytes_of_memory_is_read() {
        let mem = Memory::new(0x1010);
        mem.put(0x1000, &normal(7, true));
        let mut reader = Reader::new(&mem);
        let last = Cursor { at: 0x1000, cycle: true };
        assert_eq!(reader.fetch(last).unwrap().map(|t| t.parameter()), Some(7));
        assert!(reader.fetch(last.next()).is_err());
    }

    #[test]
    fn pointers_outside_memory_fault() {
        let mem = Memory::new(0x1000);
        for at in [0x1000, 1 << 63, !0xf] {
            let mut reader = Reader::new(&mem);
            assert!(reader.fetch(Cursor { at, cycle: true }).is_err(), "{at:#x}");
        }
    }

    #[test]
    fn link_toggles_the_cycle_only_when_asked() {
        let here = Cursor { at: 0x100, cycle: true };
        let link = |toggle: u32| Trb::new(0x2007, 0, 6 << 10 | toggle << 1 | 1);
        assert_eq!(here.follow(&link(0)), Cursor { at: 0x2000, cycle: true });
        assert_eq!(here.follow(&link(1)), Cursor { at: 0x2000, cycle: false });
    }
}
