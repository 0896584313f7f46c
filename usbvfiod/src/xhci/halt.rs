//! Transfers that do not go through: endpoints that halt, stop or pause, and what is taken back then (xHCI 1.2 §4.6.9,
//! §4.8.3, §4.10.2).

use super::GuestMem;
use super::context::{EndpointKind, EndpointState};
use super::controller::{Controller, Io};
use super::report::error_code;
use super::slot::{Drain, Endpoint, Resume, TransferRing};
use super::td::{Ended, Flight, Outcome};
use super::trb::CompletionCode;
use crate::urb::{Effect, UrbStatus};

impl Controller {
    /// The oldest transfer of a ring failed and the guest has been told: the endpoint halts, the dequeue pointer stays at
    /// the failed TD, and what was queued behind it is not carried out (§4.10.2, §4.8.3).
    pub(super) fn halt<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
        endpoint: &mut Endpoint,
        index: usize,
    ) {
        let Some(Some(ring)) = endpoint.rings.get(index) else { return };
        let Some(flight) = ring.queue.front() else { return };
        let Some(outcome) = flight.outcome else { return };
        let retry = (outcome.status == Ended::Device(UrbStatus::TransactionError))
            .then(|| Resume { at: flight.start(), ..flight.resume_after(flight.moved(outcome), false) })
            .filter(|resume| resume.moved > 0 && endpoint.kind != EndpointKind::Control);
        let code = error_code(outcome.status);
        self.abandon(endpoint, slot, io.effects);
        if let Some(Some(ring)) = endpoint.rings.get_mut(index) {
            ring.resume = retry;
        }
        endpoint.state =
            if code == CompletionCode::Trb { EndpointState::Error } else { EndpointState::Halted };
        common::limited!(debug, slot, dci = endpoint.dci.get(), ?code, "endpoint stops");
        self.write_dequeue(io, slot, endpoint);
        if endpoint.drain.take() == Some(Drain::Stop) {
            self.stop_finished(io, slot, endpoint.dci, CompletionCode::ContextState);
        }
    }

    /// Gives up all started transfers of an endpoint; the rings go back to the oldest.
    pub(super) fn abandon(&mut self, endpoint: &mut Endpoint, slot: u8, effects: &mut Vec<Effect>) {
        let ids = endpoint.outstanding();
        for ring in endpoint.rings_mut() {
            if let Some(first) = ring.queue.front() {
                ring.cursor = first.start();
                ring.resume = first.resume();
            }
            while let Some(flight) = ring.queue.pop_front() {
                self.retire(flight);
            }
        }
        if ids.is_empty() {
            return;
        }
        if let Some(device) = self.slot_device(slot) {
            device.touched = true;
            device.lingering.extend(ids.iter().map(|id| (*id, endpoint.dci.address())));
            effects.push(Effect::Abandon { device: device.handle, ids });
        }
    }

    /// Cancels all transfers of an endpoint and waits for them, so that what they moved is known.
    pub(super) fn start_drain(
        &mut self,
        endpoint: &mut Endpoint,
        slot: u8,
        reason: Drain,
        effects: &mut Vec<Effect>,
    ) {
        let is_under_way = endpoint.drain.replace(reason).is_some();
        let ids = endpoint.outstanding();
        let Some(device) = self.slot_device(slot) else { return endpoint.cancel_waiting(|_| true) };
        if reason == Drain::Stop {
            endpoint.cancel_waiting(|flight| !flight.submitted);
        }
        if !ids.is_empty() && !is_under_way {
            effects.push(Effect::Cancel { device: device.handle, ids });
        }
    }

    /// All transfers are back: the rings stand at the first that did not end, and the reason for it goes on.
    pub(super) fn drained<M: GuestMem>(&mut self, io: &mut Io<'_, M>, slot: u8, endpoint: &mut Endpoint) {
        let Some(reason) = endpoint.drain.take() else { return };
        let (kind, dci, is_stop) = (endpoint.kind, endpoint.dci, reason == Drain::Stop);
        let has_streams = endpoint.streams.is_some();
        for index in 0..endpoint.rings.len() {
            let max_packet = u32::from(endpoint.context.dword1().max_packet());
            let Some(ring) = &mut endpoint.rings[index] else { continue };
            ring.rung = !is_stop;
            let Some(flight) = ring.queue.front() else { continue };
            let moved = flight.outcome.map_or(0, |outcome| flight.moved(outcome));
            let actual = flight.outcome.map_or(0, |outcome| outcome.actual);
            let is_short = flight.is_in && max_packet > 0 && actual % max_packet != 0;
            let ended = moved > 0 && (is_short || moved >= flight.len);
            let resumes = moved > 0 && matches!(kind, EndpointKind::Bulk | EndpointKind::Interrupt);
            let resume = resumes.then(|| flight.resume_after(moved, ended));
            let report = flight.stopped_report(moved, resumes && is_short && moved < flight.len);
            ring.cursor = flight.start();
            ring.resume = resume;
            let lost = ring.queue.iter().skip(1).filter(|flight| flight.has_moved()).count();
            if lost > 0 {
                common::limited!(
                    debug,
                    slot,
                    dci = dci.get(),
                    lost,
                    "transfers ended behind a cancelled one"
                );
            }
            while let Some(flight) = ring.queue.pop_front() {
                self.retire(flight);
            }
            if let Some(report) = report
                && is_stop
                && (moved > 0 || !has_streams)
            {
                self.post(io, report.interrupter, report.event(slot, dci.get()), report.blocks_interrupt);
            }
        }
        if is_stop {
            endpoint.state = EndpointState::Stopped;
            endpoint.streaming = false;
            self.set_timer(slot, endpoint, None);
            self.write_dequeue(io, slot, endpoint);
            self.stop_finished(io, slot, dci, CompletionCode::Success);
        }
    }

    /// Tells the guest where the rings stand, in the endpoint context or the stream contexts.
    pub(super) fn write_dequeue<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
        endpoint: &mut Endpoint,
    ) {
        if endpoint.streams.is_some() {
            endpoint.write_streams(io.mem);
        } else if let Some(Some(ring)) = endpoint.rings.first() {
            endpoint.context.set_dequeue(ring.dequeue().field());
        }
        if let Some(at) = self.slot(slot).map(|slot| slot.endpoint_at(endpoint.dci)) {
            endpoint.write_context(io.mem, at);
        }
    }
}

impl TransferRing {
    /// An isochronous transfer that was cancelled in the middle: its intervals that were served become a transfer that
    /// has ended, the others one that was cancelled.
    pub(super) fn split_cancelled(&mut self) {
        let Some(flight) = self.queue.front_mut() else { return };
        let cancelled = |status| matches!(status, UrbStatus::Cancelled | UrbStatus::NotRun);
        let Some(Outcome { status: Ended::Device(status), .. }) = flight.outcome else { return };
        if !cancelled(status) || flight.packets.is_empty() {
            return;
        }
        let served = flight.packets.iter().position(|packet| cancelled(packet.status));
        let served = served.unwrap_or(flight.packets.len());
        flight.packets.truncate(served);
        if served == 0 {
            return;
        }
        let ends = flight.items.iter().enumerate().filter(|(_, item)| item.ends_td);
        let after = ends.map(|(index, _)| index + 1).nth(served - 1).unwrap_or(flight.items.len());
        let rest = flight.items.split_off(after);
        let mut cancelled = Flight { items: rest, end: flight.end, ..Flight::new(flight.id) };
        cancelled.outcome = flight.outcome;
        cancelled.is_in = flight.is_in;
        flight.outcome = Some(Outcome::COMPLETED);
        flight.end = cancelled.start();
        if !cancelled.items.is_empty() {
            self.queue.insert(1, cancelled);
        }
    }
}

impl Endpoint {
    /// Lets transfers without an outcome count as cancelled.
    pub(super) fn cancel_waiting(&mut self, which: impl Fn(&Flight) -> bool) {
        for flight in self.rings_mut().flat_map(|ring| &mut ring.queue) {
            if flight.outcome.is_none() && which(flight) {
                flight.outcome = Some(Outcome { status: Ended::Device(UrbStatus::Cancelled), actual: 0 });
            }
        }
    }
}

impl Flight {
    /// Where to go on with a transfer that had been resumed once and is given up now.
    fn resume(&self) -> Option<Resume> {
        let moved = self.moved_before;
        (moved > 0).then(|| self.resume_after(moved, moved >= self.len))
    }

    fn has_moved(&self) -> bool {
        self.outcome.is_some_and(|outcome| outcome.actual > 0)
    }
}
