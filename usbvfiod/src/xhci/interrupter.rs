//! One interrupter: its registers, and when it signals (xHCI 1.2 §4.17, §5.5.2). Its events are in [`EventRing`].

use std::time::Duration;

use super::event_ring::EventRing;
use super::regs::Iman;

/// Unit of the moderation interval (§5.5.2.2).
const TICK_NS: u64 = 250;

/// Registers and moderation of one interrupter.
#[derive(Debug, Default)]
pub(super) struct Interrupter {
    pub(super) ring: EventRing,
    /// IE.
    pub(super) enable: bool,
    /// IP.
    pub(super) pending: bool,
    /// IMODI, in units of 250 ns.
    pub(super) interval: u16,
    /// EHB of ERDP: the guest is at work on the ring.
    pub(super) busy: bool,
    /// IPE: an event came that wants an interrupt (§4.17.5).
    wanted: bool,
    /// IMODC reaches 0 then.
    not_before: Duration,
}

/// What [`Interrupter::decide`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Decision {
    /// IP went from 0 to 1, so USBSTS.EINT is set.
    pub(super) raised: bool,
    /// The MSI-X message is to be sent.
    pub(super) signal: bool,
}

impl Interrupter {
    /// An event was posted. Events with BEI do not ask for an interrupt (§4.17.5).
    pub(super) fn posted(&mut self, blocks_interrupt: bool) {
        self.wanted |= !blocks_interrupt;
    }

    /// The one decision of a batch: nothing while the guest is busy with the ring (EHB) or the interval runs.
    pub(super) fn decide(&mut self, now: Duration, interrupter_enable: bool) -> Decision {
        let mut decision = Decision::default();
        if self.wanted && self.ring.is_empty() {
            self.wanted = false;
        }
        if self.wanted && !self.busy && now >= self.not_before {
            self.wanted = false;
            self.busy = true;
            decision.raised = !self.pending;
            self.pending = true;
        }
        if self.pending && self.enable && interrupter_enable {
            self.pending = false;
            self.not_before = now + interval(self.interval);
            decision.signal = true;
        }
        decision
    }

    /// When [`Self::decide`] must be asked again, unless something else happens before.
    pub(super) fn deadline(&self) -> Option<Duration> {
        (self.wanted && !self.busy).then_some(self.not_before)
    }

    /// IMAN as read.
    pub(super) fn management(&self) -> u32 {
        Iman::new().with_pending(self.pending).with_enable(self.enable).into_bits()
    }

    /// A write of IMAN: IP is RW1C.
    pub(super) fn write_management(&mut self, value: u32) {
        let value = Iman::from_bits(value);
        self.pending &= !value.pending();
        self.enable = value.enable();
    }

    /// IMOD as read: the counter is what is left of the interval.
    pub(super) fn moderation(&self, now: Duration) -> u32 {
        let left = self.not_before.saturating_sub(now).as_nanos() as u64 / TICK_NS;
        u32::from(self.interval) | (left.min(0xffff) as u32) << 16
    }

    /// A write of IMOD: interval and counter.
    pub(super) fn write_moderation(&mut self, now: Duration, value: u32) {
        self.interval = value as u16;
        self.not_before = now + interval((value >> 16) as u16);
    }
}

fn interval(ticks: u16) -> Duration {
    Duration::from_nanos(u64::from(ticks) * TICK_NS)
}

#[cfg(test)]
mod tests {
    use super::super::fixture::Memory;
    use super::super::trb::Trb;
    use super::*;

    const RAISED: Decision = Decision { raised: true, signal: true };
    const NOTHING: Decision = Decision { raised: false, signal: false };

    fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    fn post(interrupter: &mut Interrupter, mem: &Memory) {
        assert!(interrupter.ring.post(mem, Trb::mfindex_wrap()).unwrap());
        interrupter.posted(false);
    }

    fn ready(mem: &Memory) -> Interrupter {
        mem.put(0x1000, &Trb::new(0x2000, 64, 0));
        let mut interrupter = Interrupter { enable: true, interval: 160, ..Interrupter::default() };
        interrupter.ring.table_size = 1;
        interrupter.ring.table_base = 0x1000;
        interrupter.ring.dequeue = 0x2000;
        interrupter
    }

    #[test]
    fn first_event_after_idle_signals_at_once_and_the_trailing_one_later() {
        let mem = Memory::new(0x4000);
        let mut interrupter = ready(&mem);
        post(&mut interrupter, &mem);
        assert_eq!(interrupter.decide(us(1000), true), RAISED);

        interrupter.ring.dequeue = 0x2010;
        interrupter.busy = false;
        post(&mut interrupter, &mem);
        assert_eq!(interrupter.decide(us(1001), true), NOTHING);
        assert_eq!(interrupter.deadline(), Some(us(1040)));
        assert_eq!(interrupter.decide(us(1040), true), RAISED);
        assert_eq!(interrupter.deadline(), None);
    }

    #[test]
    fn busy_guest_is_not_signalled_until_it_says_so() {
        let mem = Memory::new(0x4000);
        let mut interrupter = ready(&mem);
        interrupter.interval = 0;
        post(&mut interrupter, &mem);
        assert_eq!(interrupter.decide(us(0), true), RAISED);
        post(&mut interrupter, &mem);
        assert_eq!(interrupter.decide(us(500), true), NOTHING);
        assert_eq!(interrupter.deadline(), None, "no wake-ups while the guest is busy");
        interrupter.busy = false;
        assert_eq!(interrupter.decide(us(501), true), RAISED);
    }

    #[test]
    fn pending_interrupt_is_sent_when_enabled() {
        let mem = Memory::new(0x4000);
        let mut interrupter = ready(&mem);
        interrupter.enable = false;
        post(&mut interrupter, &mem);
        assert_eq!(interrupter.decide(us(0), true), Decision { raised: true, signal: false });
        assert_eq!(interrupter.management(), 1);
        interrupter.write_management(2);
        assert_eq!(interrupter.decide(us(0), false), NOTHING, "INTE gates it");
        assert_eq!(interrupter.decide(us(0), true), Decision { raised: false, signal: true });
        assert_eq!(interrupter.management(), 2, "a message clears IP");
    }

    #[test]
    fn pending_is_cleared_by_writing_one() {
        let mut interrupter = Interrupter { pending: true, ..Interrupter::default() };
        interrupter.write_management(2);
        assert!(interrupter.pending);
        interrupter.write_management(1);
        assert!(!interrupter.pending);
    }

    #[test]
    fn event_with_bei_waits_for_company() {
        let mem = Memory::new(0x4000);
        let mut interrupter = ready(&mem);
        interrupter.ring.post(&mem, Trb::mfindex_wrap()).unwrap();
        interrupter.posted(true);
        assert_eq!(interrupter.decide(us(0), true), NOTHING);
        post(&mut interrupter, &mem);
        assert_eq!(interrupter.decide(us(0), true), RAISED);
    }

    #[test]
    fn emptied_ring_needs_no_interrupt() {
        let mem = Memory::new(0x4000);
        let mut interrupter = ready(&mem);
        post(&mut interrupter, &mem);
        interrupter.ring.dequeue = 0x2010;
        assert_eq!(interrupter.decide(us(0), true), NOTHING);
    }

    #[test]
    fn longest_moderation_interval_ends_after_16_ms() {
        let mem = Memory::new(0x4000);
        let mut interrupter = ready(&mem);
        interrupter.write_moderation(us(0), 0xffff_ffff);
        post(&mut interrupter, &mem);
        assert_eq!(interrupter.decide(us(16_383), true), NOTHING);
        assert_eq!(interrupter.decide(us(16_384), true), RAISED);
    }
}
