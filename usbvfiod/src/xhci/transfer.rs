//! The life of a transfer: started from its ring, ended by the device, told to the guest, halted, stopped, cancelled
//! (xHCI 1.2 §4.6.9, §4.8.3, §4.9, §4.10).

use super::GuestMem;
use super::context::{Dci, EndpointKind, EndpointState};
use super::controller::{Controller, Io};
use super::report::error_code;
use super::slot::{Drain, Endpoint, Resume, TransferRing};
use super::td::{Ended, Flight, Outcome, Parsed, Parser, Progress};
use super::trb::CompletionCode;
use crate::urb::{Effect, OpError, PacketResult, TransferId, UrbCompletion, UrbStatus};

/// TRBs looked at for an endpoint in one go; what is left comes in the next batch.
pub(super) const TRBS_PER_KICK: usize = 256;
/// TRBs of all transfers in flight: bounds what a guest can make us remember.
const TRBS_IN_FLIGHT: usize = 1 << 16;
/// Transfers in flight on a bulk endpoint.
const BULK_FLIGHTS: usize = 8;
/// Bytes in flight on a bulk endpoint, unless one transfer alone is larger.
const BULK_BYTES: u64 = 4 << 20;
/// Transfers in flight on an interrupt endpoint.
const INTERRUPT_FLIGHTS: usize = 2;
/// Transfers in flight on one stream: each stream must have one, or the device may wait for a stream we hold back.
const STREAM_FLIGHTS: usize = 2;
/// A transfer that comes back cancelled this often in a row, without our asking, has failed.
const SPURIOUS_MAX: u8 = 3;

/// What became of a ring's started transfers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reported {
    /// All that have ended well are told.
    Good,
    /// No room on an event ring.
    Blocked,
    /// The oldest failed: the endpoint halts.
    Failed,
    /// The oldest was cancelled, or not run.
    Cancelled,
}

impl Controller {
    /// A doorbell of an endpoint (§4.7). Halted and disabled endpoints do not hear it.
    pub(super) fn ring_endpoint<M: GuestMem>(&mut self, io: &mut Io<'_, M>, slot: u8, dci: Dci, stream: u16) {
        if !self.is_running() {
            return;
        }
        let Some(at) = self.slot(slot).map(|slot| slot.endpoint_at(dci)) else { return };
        self.with_endpoint(slot, dci, |controller, endpoint| {
            let hears = matches!(endpoint.state, EndpointState::Running | EndpointState::Stopped);
            if !hears || !controller.ring_doorbell(io, slot, endpoint, stream) {
                return;
            }
            if endpoint.state == EndpointState::Stopped {
                endpoint.state = EndpointState::Running;
                endpoint.write_context(io.mem, at);
            }
            controller.requeue(slot, endpoint);
        });
    }

    /// Marks the ring; false when there is no such ring.
    fn ring_doorbell<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
        endpoint: &mut Endpoint,
        stream: u16,
    ) -> bool {
        if endpoint.streams.is_some() {
            if !self.open_stream(io, slot, endpoint, stream) {
                return false;
            }
        } else if stream != 0 {
            return false;
        }
        let Some(Some(ring)) = endpoint.rings.get_mut(usize::from(stream)) else { return false };
        ring.rung = true;
        true
    }

    /// Notes the outcome of a transfer. An outcome nobody waits for frees its endpoint for new transfers.
    pub(super) fn transfer_ended<M: GuestMem>(&mut self, _io: &mut Io<'_, M>, completion: UrbCompletion) {
        self.spare.keep_payload(completion.payload);
        let outcome = Outcome { status: Ended::Device(completion.status), actual: completion.actual };
        if let Some((slot, dci)) = Self::endpoint_of(completion.id)
            && self.note_outcome(slot, dci, completion.id, outcome, completion.packets)
        {
            self.make_ready(slot, dci);
            self.unblock();
            return;
        }
        self.lingering_ended(completion.id);
    }

    fn note_outcome(
        &mut self,
        slot: u8,
        dci: Dci,
        id: TransferId,
        outcome: Outcome,
        packets: Vec<PacketResult>,
    ) -> bool {
        let Some(endpoint) = self.endpoint_mut(slot, dci) else { return false };
        let isochronous = endpoint.kind == EndpointKind::Isochronous;
        for ring in endpoint.rings_mut() {
            let Some(flight) =
                ring.queue.iter_mut().find(|flight| flight.id == id && flight.is_with_device())
            else {
                continue;
            };
            ring.rung = true;
            flight.outcome = Some(outcome);
            if isochronous {
                flight.packets = packets;
                flight.fill_packets();
            }
            return true;
        }
        false
    }

    /// A transfer given up earlier has come back: its endpoint may go on.
    fn lingering_ended(&mut self, id: TransferId) {
        let mut freed = None;
        for device in self.ports.iter_mut().filter_map(|port| port.device.as_mut()) {
            if let Some(index) = device.lingering.iter().position(|(lingering, _)| *lingering == id) {
                let (_, address) = device.lingering.swap_remove(index);
                freed = Some((device.handle, address));
            }
        }
        let Some((device, address)) = freed else { return };
        let dci = Dci::from_address(address).unwrap_or(Dci::CONTROL);
        for slot in 1..=self.capabilities.slots {
            if self.slot(slot).is_some_and(|slot| slot.device == Some(device)) {
                self.make_ready(slot, dci);
            }
        }
    }

    /// The outcome of an operation that stands for a control transfer.
    pub(super) fn control_operation_done(&mut self, id: TransferId, result: Result<(), OpError>) {
        let Some((slot, dci)) = Self::endpoint_of(id) else { return };
        let Some(endpoint) = self.endpoint_mut(slot, dci) else { return };
        let waiting = |flight: &&mut Flight| flight.id == id && flight.outcome.is_none();
        let Some(flight) = endpoint.rings_mut().flat_map(|ring| &mut ring.queue).find(waiting) else {
            return;
        };
        let status = match result {
            Ok(()) => UrbStatus::Completed,
            Err(OpError::Stalled) => UrbStatus::Stalled,
            Err(OpError::Gone) => UrbStatus::Gone,
            Err(OpError::Failed | OpError::NoResources) => UrbStatus::TransactionError,
        };
        flight.outcome = Some(Outcome { status: Ended::Device(status), actual: 0 });
        if let Some(Some(ring)) = endpoint.rings.first_mut() {
            ring.rung = true;
        }
        self.make_ready(slot, dci);
    }

    /// Brings an endpoint up to date: events for what has ended, then new transfers.
    pub(super) fn service<M: GuestMem>(&mut self, io: &mut Io<'_, M>, slot: u8, endpoint: &mut Endpoint) {
        if !self.is_running() || !self.report_ended(io, slot, endpoint) {
            return;
        }
        if endpoint.drain.is_some() {
            if endpoint.is_waiting() {
                return;
            }
            self.drained(io, slot, endpoint);
        }
        if endpoint.state == EndpointState::Running && endpoint.drain.is_none() {
            self.fill(io, slot, endpoint);
        }
    }

    /// Reports what has ended, oldest first. False when the endpoint cannot go on now.
    fn report_ended<M: GuestMem>(&mut self, io: &mut Io<'_, M>, slot: u8, endpoint: &mut Endpoint) -> bool {
        for index in 0..endpoint.rings.len() {
            match self.report_ring(io, slot, endpoint, index) {
                Reported::Good => {}
                Reported::Blocked => {
                    self.block(slot, endpoint.dci);
                    return false;
                }
                Reported::Failed => {
                    self.halt(io, slot, endpoint, index);
                    return false;
                }
                Reported::Cancelled if endpoint.drain.is_none() => {
                    if endpoint.spurious >= SPURIOUS_MAX {
                        self.give_up(endpoint, index);
                        self.requeue(slot, endpoint);
                        return false;
                    }
                    endpoint.spurious += 1;
                    self.start_drain(endpoint, slot, Drain::Pause, io.effects);
                }
                Reported::Cancelled => {}
            }
        }
        true
    }

    /// A transfer that is cancelled again and again counts as failed.
    fn give_up(&mut self, endpoint: &mut Endpoint, index: usize) {
        endpoint.spurious = 0;
        if let Some(flight) = endpoint.rings[index].as_mut().and_then(|ring| ring.queue.front_mut())
            && let Some(outcome) = &mut flight.outcome
        {
            outcome.status = Ended::Device(UrbStatus::TransactionError);
            for packet in &mut flight.packets {
                packet.status = UrbStatus::TransactionError;
            }
        }
    }

    fn report_ring<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
        endpoint: &mut Endpoint,
        index: usize,
    ) -> Reported {
        let dci = endpoint.dci;
        while let Some(ring) = &mut endpoint.rings[index] {
            ring.split_cancelled();
            let Some(flight) = ring.queue.front_mut() else { break };
            let Some(outcome) = flight.outcome else { break };
            let mut failed = false;
            if flight.packets.is_empty() {
                match outcome.status {
                    Ended::Device(UrbStatus::Completed) => {}
                    Ended::Device(UrbStatus::Cancelled | UrbStatus::NotRun) => return Reported::Cancelled,
                    _ => failed = true,
                }
            }
            if !self.write_reports(io, slot, dci, flight) {
                return Reported::Blocked;
            }
            if failed {
                return Reported::Failed;
            }
            if let Some(flight) = ring.queue.pop_front() {
                self.retire(flight);
            }
            endpoint.spurious = 0;
        }
        Reported::Good
    }

    /// Writes the events of a transfer as far as there is room; true when all are written.
    fn write_reports<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
        dci: Dci,
        flight: &mut Flight,
    ) -> bool {
        loop {
            let before = flight.progress;
            let Some(report) = flight.next_report() else { return true };
            if !self.has_room(io, report.interrupter) {
                flight.progress = before;
                return false;
            }
            self.post(io, report.interrupter, report.event(slot, dci.get()), report.blocks_interrupt);
        }
    }

    /// The oldest transfer of a ring failed and the guest has been told: the endpoint halts, the dequeue pointer stays at
    /// the failed TD, and what was queued behind it is not carried out (§4.10.2, §4.8.3).
    fn halt<M: GuestMem>(&mut self, io: &mut Io<'_, M>, slot: u8, endpoint: &mut Endpoint, index: usize) {
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
        tracing::debug!(slot, dci = endpoint.dci.get(), ?code, "endpoint stops");
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
        endpoint.drain = Some(reason);
        let ids = endpoint.outstanding();
        let Some(device) = self.slot_device(slot) else { return endpoint.cancel_waiting(|_| true) };
        if reason == Drain::Stop {
            endpoint.cancel_waiting(|flight| !flight.submitted);
        }
        if !ids.is_empty() {
            effects.push(Effect::Cancel { device: device.handle, ids });
        }
    }

    /// All transfers are back: the rings stand at the first that did not end, and the reason for it goes on.
    fn drained<M: GuestMem>(&mut self, io: &mut Io<'_, M>, slot: u8, endpoint: &mut Endpoint) {
        let Some(reason) = endpoint.drain.take() else { return };
        let (kind, dci, is_stop) = (endpoint.kind, endpoint.dci, reason == Drain::Stop);
        let has_streams = endpoint.streams.is_some();
        for index in 0..endpoint.rings.len() {
            let max_packet = u32::from(endpoint.context.dword1().max_packet());
            let Some(ring) = &mut endpoint.rings[index] else { continue };
            ring.rung = !is_stop;
            let Some(flight) = ring.queue.front() else { continue };
            let moved = flight.outcome.map_or(0, |outcome| flight.moved(outcome));
            let is_short = flight.is_in && max_packet > 0 && moved % max_packet != 0;
            let ended = moved > 0 && (is_short || moved >= flight.len);
            let resumes = moved > 0 && matches!(kind, EndpointKind::Bulk | EndpointKind::Interrupt);
            let resume = resumes.then(|| flight.resume_after(moved, ended));
            let report = flight.stopped_report(moved, resumes && is_short && moved < flight.len);
            ring.cursor = flight.start();
            ring.resume = resume;
            let lost = ring.queue.iter().skip(1).filter(|flight| flight.has_moved()).count();
            if lost > 0 {
                tracing::debug!(slot, dci = dci.get(), lost, "transfers ended behind a cancelled one");
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

    /// Starts what the guest has queued, within the limits of the kind of endpoint.
    fn fill<M: GuestMem>(&mut self, io: &mut Io<'_, M>, slot: u8, endpoint: &mut Endpoint) {
        let address = endpoint.dci.address();
        let is_held = |device: &super::port::Device| device.lingering.iter().any(|(_, at)| *at == address);
        if self.slot_device(slot).is_some_and(|device| is_held(device)) {
            return;
        }
        if endpoint.kind == EndpointKind::Isochronous {
            return self.fill_isoch(io, slot, endpoint);
        }
        let mut parser = Parser::new(io.mem, endpoint.kind, endpoint.dci.is_in());
        for stream in 0..endpoint.rings.len() {
            while let Some(ring) = &endpoint.rings[stream]
                && ring.rung
                && ring.flows()
                && has_credit(endpoint.kind, endpoint.streams.is_some(), ring)
            {
                if self.is_crowded() {
                    return self.block(slot, endpoint.dci);
                }
                if parser.trbs >= TRBS_PER_KICK {
                    return self.requeue(slot, endpoint);
                }
                let started = self.start_next(io, slot, endpoint, stream, &mut parser);
                if !started && let Some(ring) = &mut endpoint.rings[stream] {
                    ring.rung = false;
                }
            }
        }
        if endpoint.flights().any(|flight| flight.outcome.is_some()) {
            self.requeue(slot, endpoint);
        }
    }

    /// Whether the guest has as much in flight as we are ready to remember.
    pub(super) fn is_crowded(&self) -> bool {
        self.trbs_in_flight >= TRBS_IN_FLIGHT
    }

    /// Reads a TD and starts it; false when there is none.
    fn start_next<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
        endpoint: &mut Endpoint,
        stream: usize,
        parser: &mut Parser<'_, M>,
    ) -> bool {
        let Some(Some(ring)) = endpoint.rings.get_mut(stream) else { return false };
        let (at, resume) = (ring.cursor, ring.resume);
        let mut items = self.spare.items();
        let mut segments = self.spare.segments();
        let parsed = match parser.parse(at, &mut items, &mut segments) {
            Ok(parsed) => parsed,
            Err(fault) => {
                tracing::debug!(slot, %fault, "transfer ring not readable");
                items.clear();
                items.push(super::td::Item::unreadable(at));
                Parsed::Malformed { end: at }
            }
        };
        let mut flight = Flight {
            items,
            is_in: endpoint.dci.is_in(),
            ..Flight::new(self.new_transfer(slot, endpoint.dci))
        };
        match parsed {
            Parsed::Nothing => {
                self.spare.keep_items(flight.items);
                self.spare.keep_payload(crate::urb::Payload::Guest(segments));
                return false;
            }
            Parsed::Idle { end } => {
                flight.end = end;
                flight.outcome = Some(Outcome::COMPLETED);
            }
            Parsed::Malformed { end } => {
                flight.end = end;
                flight.outcome = Some(Outcome { status: Ended::Malformed, actual: 0 });
            }
            Parsed::Transfer { immediate, len, setup, end, .. } => {
                flight.end = end;
                flight.len = len;
                let payload = immediate.unwrap_or(crate::urb::Payload::Guest(segments));
                let resume = resume.filter(|resume| resume.start == flight.start());
                let start = super::request::Start { slot, stream: stream as u16, setup, payload, resume };
                self.request(io, endpoint, &mut flight, start);
            }
        }
        self.trbs_in_flight += flight.items.len();
        if let Some(Some(ring)) = endpoint.rings.get_mut(stream) {
            ring.cursor = flight.end;
            ring.resume = None;
            ring.queue.push_back(flight);
        }
        true
    }
}

/// Whether another transfer may be started on this ring.
fn has_credit(kind: EndpointKind, has_streams: bool, ring: &TransferRing) -> bool {
    let flights = ring.queue.len();
    match kind {
        EndpointKind::Control => flights == 0,
        EndpointKind::Interrupt => flights < INTERRUPT_FLIGHTS,
        EndpointKind::Bulk if has_streams => flights < STREAM_FLIGHTS,
        EndpointKind::Bulk => flights < BULK_FLIGHTS && (flights == 0 || ring.bytes() < BULK_BYTES),
        EndpointKind::Isochronous => true,
    }
}

impl TransferRing {
    /// An isochronous transfer that was cancelled in the middle: its intervals that were served become a transfer that
    /// has ended, the others one that was cancelled.
    fn split_cancelled(&mut self) {
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
    /// A transfer without anything in it yet.
    pub(super) fn new(id: TransferId) -> Self {
        Self {
            id,
            items: Vec::new(),
            end: super::ring::Cursor::default(),
            len: 0,
            moved_before: 0,
            is_in: false,
            submitted: false,
            outcome: None,
            packets: Vec::new(),
            progress: Progress::default(),
        }
    }

    /// Where to go on with a transfer that had been resumed once and is given up now.
    fn resume(&self) -> Option<Resume> {
        let moved = self.moved_before;
        (moved > 0).then(|| self.resume_after(moved, moved >= self.len))
    }

    fn has_moved(&self) -> bool {
        self.outcome.is_some_and(|outcome| outcome.actual > 0)
    }

    /// Gives each interval a result, whatever the transport handed back.
    fn fill_packets(&mut self) {
        let Some(outcome) = self.outcome else { return };
        let Ended::Device(status) = outcome.status else { return };
        let intervals = self.items.iter().filter(|item| item.ends_td).count();
        let status = if status == UrbStatus::Completed { UrbStatus::TransactionError } else { status };
        self.packets.resize(intervals, PacketResult { status, actual: 0 });
    }
}
