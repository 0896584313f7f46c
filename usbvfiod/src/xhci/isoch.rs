//! Isochronous endpoints: several intervals in one transfer, frame ids, rings that run dry (xHCI 1.2 §4.10.3, §4.11.2.5).
//!
//! The host schedules transfers as soon as possible; a Frame ID (CFC = 0) only delays the first TD of a stream, or makes
//! it a missed one. Isochronous endpoints do not halt on device errors.

use std::time::Duration;

use super::GuestMem;
use super::context::EndpointState;
use super::controller::{Controller, Io};
use super::ring::Cursor;
use super::slot::{Endpoint, TransferRing};
use super::start::TRBS_PER_KICK;
use super::td::{Ended, Flight, Item, Outcome, Parsed, Parser};

use super::trb::{CompletionCode, Trb};
use crate::urb::{Effect, PacketResult, Payload, Segment, TransferId, TransferKind, UrbRequest, UrbStatus};

/// Service intervals in one transfer.
const INTERVALS: usize = 32;
/// Transfers in flight. A guest queues a few; each doorbell becomes one.
const FLIGHTS: usize = 16;
/// Frame ids count 2048 ms; those further ahead than this are in the past (§4.11.2.5).
const FRAMES_AHEAD: u32 = 895;
const FRAME_RANGE: u32 = 2048;

/// Intervals gathered for one transfer.
#[derive(Default)]
struct Batch {
    items: Vec<Item>,
    segments: Vec<Segment>,
    packets: Vec<u32>,
    immediate: Option<Payload>,
    /// Where the ring goes on.
    end: Cursor,
}

impl Batch {
    /// Where it stands, to come back to with [`Self::undo`].
    fn mark(&self) -> (usize, usize, Option<Segment>) {
        (self.items.len(), self.segments.len(), self.segments.last().copied())
    }

    /// Takes a TD back. Its first piece of memory may have been joined to the last one before.
    fn undo(&mut self, (items, segments, last): (usize, usize, Option<Segment>)) {
        self.items.truncate(items);
        self.segments.truncate(segments);
        if let (Some(place), Some(last)) = (self.segments.last_mut(), last) {
            *place = last;
        }
    }
}

/// What stands next on the ring.
enum Gathered {
    /// Nothing that can be started now.
    Nothing,
    /// Intervals for the device.
    Intervals,
    /// TRBs that are answered without the device; with an interval that was missed or without any.
    Answered { outcome: Outcome, missed: bool },
}

/// When the first TD of a stream is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    Now,
    In(Duration),
    Missed,
}

impl Controller {
    /// Starts what is queued on an isochronous ring, as many intervals at a time as there are.
    pub(super) fn fill_isoch<M: GuestMem>(&mut self, io: &mut Io<'_, M>, slot: u8, endpoint: &mut Endpoint) {
        let mut parser = Parser::new(io.mem, endpoint.kind, endpoint.dci.is_in());
        while let Some(Some(ring)) = endpoint.rings.first()
            && ring.rung
            && ring.flows()
            && ring.queue.len() < FLIGHTS
        {
            if self.is_crowded() {
                return self.block(slot, endpoint.dci);
            }
            if parser.trbs >= TRBS_PER_KICK {
                return self.requeue(slot, endpoint);
            }
            if !self.start_intervals(io, slot, endpoint, &mut parser) {
                break;
            }
        }
        if endpoint.has_ended() {
            return self.requeue(slot, endpoint);
        }
        if endpoint.has_flights() {
            self.set_timer(slot, endpoint, None);
        } else if endpoint.streaming && endpoint.deadline.is_none() {
            let patience = endpoint.interval().max(Duration::from_millis(1));
            self.set_timer(slot, endpoint, Some(io.now + patience));
        }
    }

    /// Gathers intervals and starts them; false when nothing more can be started now.
    fn start_intervals<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
        endpoint: &mut Endpoint,
        parser: &mut Parser<'_, M>,
    ) -> bool {
        let Some(Some(ring)) = endpoint.rings.first() else { return false };
        let (items, segments) = (self.spare.items(), self.spare.segments());
        let mut batch = Batch { items, segments, end: ring.cursor, ..Batch::default() };
        let gathered = self.gather(io, slot, endpoint, parser, &mut batch);
        let mut flight = Flight { end: batch.end, is_in: endpoint.dci.is_in(), ..Flight::new(TransferId(0)) };
        flight.items = std::mem::take(&mut batch.items);
        match gathered {
            Gathered::Nothing => {
                self.spare.keep_items(flight.items);
                self.spare.keep_payload(Payload::Guest(batch.segments));
                let waits_for_frame = endpoint.deadline.is_some();
                if let Some(Some(ring)) = endpoint.rings.first_mut() {
                    ring.rung = waits_for_frame;
                }
                return false;
            }
            Gathered::Answered { outcome, missed } => {
                flight.outcome = Some(outcome);
                if missed {
                    flight.packets = vec![PacketResult { status: UrbStatus::NotRun, actual: 0 }];
                }
                self.spare.keep_payload(Payload::Guest(batch.segments));
            }
            Gathered::Intervals => {
                flight.id = self.new_transfer(slot, endpoint.dci);
                self.submit_intervals(io, slot, endpoint, &mut flight, batch);
            }
        }
        self.trbs_in_flight += flight.items.len();
        if let Some(Some(ring)) = endpoint.rings.first_mut() {
            ring.cursor = flight.end;
            ring.queue.push_back(flight);
        }
        true
    }

    /// Reads TDs as long as they fit into one transfer.
    fn gather<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
        endpoint: &mut Endpoint,
        parser: &mut Parser<'_, M>,
        batch: &mut Batch,
    ) -> Gathered {
        let malformed = Outcome { status: Ended::Malformed, actual: 0 };
        while batch.packets.len() < INTERVALS && parser.trbs < TRBS_PER_KICK && batch.immediate.is_none() {
            let is_first = batch.packets.is_empty();
            let mark = batch.mark();
            match parser.parse(batch.end, &mut batch.items, &mut batch.segments) {
                Ok(Parsed::Transfer { immediate, len, first, end, .. })
                    if is_first || immediate.is_none() =>
                {
                    let start =
                        if endpoint.streaming { Start::Now } else { self.isoch_start(io.now, &first) };
                    match start {
                        Start::Now => {
                            endpoint.streaming = true;
                            batch.packets.push(len);
                            batch.immediate = immediate;
                            batch.end = end;
                        }
                        Start::In(delay) => {
                            self.set_timer(slot, endpoint, Some(io.now + delay));
                            return Gathered::Nothing;
                        }
                        Start::Missed => {
                            batch.end = end;
                            return Gathered::Answered { outcome: Outcome::COMPLETED, missed: true };
                        }
                    }
                }
                Ok(Parsed::Idle { end }) if is_first => {
                    batch.end = end;
                    return Gathered::Answered { outcome: Outcome::COMPLETED, missed: false };
                }
                Ok(Parsed::Malformed { .. }) if is_first => {
                    return Gathered::Answered { outcome: malformed, missed: false };
                }
                Err(_) if is_first => {
                    batch.items.push(Item::unreadable(batch.end));
                    return Gathered::Answered { outcome: malformed, missed: false };
                }
                _ => {
                    batch.undo(mark);
                    break;
                }
            }
        }
        if batch.packets.is_empty() { Gathered::Nothing } else { Gathered::Intervals }
    }

    fn submit_intervals<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
        endpoint: &Endpoint,
        flight: &mut Flight,
        batch: Batch,
    ) {
        flight.len = batch.packets.iter().fold(0, |sum, len| sum.saturating_add(*len));
        let Some(device) = self.slot_device(slot) else {
            flight.outcome = Some(Outcome { status: Ended::Device(UrbStatus::Gone), actual: 0 });
            let gone = PacketResult { status: UrbStatus::Gone, actual: 0 };
            flight.packets = vec![gone; batch.packets.len()];
            return;
        };
        device.touched = true;
        flight.submitted = true;
        io.effects.push(Effect::Submit(UrbRequest {
            id: flight.id,
            device: device.handle,
            endpoint: endpoint.dci.address(),
            kind: TransferKind::Isochronous { packets: batch.packets },
            payload: batch.immediate.unwrap_or(Payload::Guest(batch.segments)),
            len: flight.len,
            follows: false,
        }));
    }

    /// Whether the frame of the first TD is now, to come or past. Without Frame ID (SIA) it is now.
    fn isoch_start(&self, now: Duration, first: &Trb) -> Start {
        let upper = first.control().upper();
        if upper >> 15 == 1 {
            return Start::Now;
        }
        let frame = u32::from(upper >> 4 & 0x7ff);
        let current = self.microframe(now) / 8;
        match frame.wrapping_sub(current) % FRAME_RANGE {
            0 | 1 => Start::Now,
            ahead if ahead <= FRAMES_AHEAD => Start::In(Duration::from_millis(u64::from(ahead) - 1)),
            _ => Start::Missed,
        }
    }

    /// The deadline of an isochronous endpoint has come: a TD waited for its frame, or the ring has run dry (§4.10.3.1).
    pub(super) fn isoch_deadline<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
        endpoint: &mut Endpoint,
    ) {
        let is_dry = endpoint.rings.first().and_then(Option::as_ref).is_some_and(TransferRing::is_idle);
        if !endpoint.streaming || !is_dry || endpoint.state != EndpointState::Running {
            return self.requeue(slot, endpoint);
        }
        endpoint.streaming = false;
        let code =
            if endpoint.dci.is_in() { CompletionCode::RingOverrun } else { CompletionCode::RingUnderrun };
        let at = endpoint.rings[0].as_ref().map_or(0, |ring| ring.cursor.at);
        let event = Trb::transfer_event(at, 0, code, slot, endpoint.dci.get(), false);
        self.post(io, 0, event, false);
    }
}

impl TransferRing {
    fn is_idle(&self) -> bool {
        self.queue.is_empty() && !self.rung
    }
}
