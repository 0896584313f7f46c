//! What the controller tells the guest besides registers: events, fatal errors, and the frame counter (xHCI 1.2 §4.9.4,
//! §4.10.2.6, §4.14.2, §5.5.1).

use std::time::Duration;

use super::GuestMem;
use super::controller::{Controller, Io};
use super::event_ring::EventRingError;
use super::trb::Trb;

/// A frame counter of 14 bits of 125 µs (§5.5.1).
const MICROFRAME_US: u128 = 125;
const MFINDEX_RANGE: u128 = 1 << 14;

impl Controller {
    /// Stops for an error that no completion code can tell (§4.10.2.6, §5.4.2 HSE). HCRST clears it.
    pub(super) fn host_system_error(&mut self, error: &EventRingError) {
        common::limited!(debug, %error, "host system error");
        self.usbsts.set_host_system_error(true);
        self.usbcmd.set_run(false);
        self.commands.running = false;
    }

    /// Stops because the guest built something no event can be sent for (§4.24.1, HCE). HCRST clears it.
    pub(super) fn host_controller_error(&mut self, reason: &'static str) {
        common::limited!(debug, reason, "host controller error");
        self.usbsts.set_host_controller_error(true);
        self.usbcmd.set_run(false);
        self.commands.running = false;
    }

    /// Whether an event for this interrupter can be written now.
    pub(super) fn has_room<M: GuestMem>(&mut self, io: &mut Io<'_, M>, interrupter: u16) -> bool {
        if !self.is_running() {
            return false;
        }
        let index = self.interrupter_index(interrupter);
        let interrupter = &mut self.interrupters[index];
        match interrupter.ring.has_room(io.mem) {
            Ok(room) => {
                if !room {
                    interrupter.posted(false);
                }
                room
            }
            Err(error) => {
                self.host_system_error(&error);
                false
            }
        }
    }

    /// Writes an event, or keeps it until there is room. A halted controller writes none.
    pub(super) fn post<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        interrupter: u16,
        event: Trb,
        blocks_interrupt: bool,
    ) {
        if !self.is_running() {
            return;
        }
        tracing::trace!(interrupter, ?event, "event");
        let index = self.interrupter_index(interrupter);
        let interrupter = &mut self.interrupters[index];
        match interrupter.ring.post(io.mem, event) {
            Ok(true) => interrupter.posted(blocks_interrupt),
            Ok(false) => {}
            Err(error) => self.host_system_error(&error),
        }
    }

    /// A target beyond the last interrupter is the guest's mistake; its events go to the first.
    fn interrupter_index(&self, target: u16) -> usize {
        let index = usize::from(target);
        if index < self.interrupters.len() { index } else { 0 }
    }

    pub(super) fn flush_events<M: GuestMem>(&mut self, io: &mut Io<'_, M>) {
        if !self.is_running() {
            return;
        }
        for index in 0..self.interrupters.len() {
            match self.interrupters[index].ring.flush(io.mem) {
                Ok(true) => self.interrupters[index].posted(false),
                Ok(false) => {}
                Err(error) => return self.host_system_error(&error),
            }
        }
    }

    /// MFINDEX (§5.5.1): counts while the controller runs.
    pub(super) fn microframe(&self, now: Duration) -> u32 {
        if !self.is_running() {
            return 0;
        }
        let elapsed = now.saturating_sub(self.frames_since).as_micros();
        (elapsed / MICROFRAME_US % MFINDEX_RANGE) as u32
    }

    /// Sets when the next MFINDEX Wrap Event is due; none unless the guest enabled it.
    pub(super) fn schedule_wrap(&mut self, now: Duration) {
        let wanted = self.is_running() && self.usbcmd.wrap_event_enable();
        let left = MFINDEX_RANGE - u128::from(self.microframe(now));
        self.next_wrap = wanted.then(|| now + Duration::from_micros((left * MICROFRAME_US) as u64));
    }

    pub(super) fn expire_wrap<M: GuestMem>(&mut self, io: &mut Io<'_, M>) {
        if self.next_wrap.is_some_and(|at| at <= io.now) {
            self.post(io, 0, Trb::mfindex_wrap(), false);
            self.schedule_wrap(io.now);
        }
    }
}
