//! From a ring to transfers in flight: how much is read, how much is started (xHCI 1.2 §4.9, §4.10). Isochronous rings
//! have a way of their own, in `isoch`.

use super::GuestMem;
use super::context::EndpointKind;
use super::controller::{Controller, Io};
use super::port::Device;
use super::request::Start;
use super::slot::{Endpoint, TransferRing};
use super::td::{Ended, Flight, Item, Outcome, Parsed, Parser};
use crate::urb::Payload;

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

impl Controller {
    /// Starts what the guest has queued, within the limits of the kind of endpoint.
    pub(super) fn fill<M: GuestMem>(&mut self, io: &mut Io<'_, M>, slot: u8, endpoint: &mut Endpoint) {
        let address = endpoint.dci.address();
        let is_held = |device: &Device| device.lingering.iter().any(|(_, at)| *at == address);
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
        if endpoint.has_ended() {
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
                common::limited!(debug, slot, %fault, "transfer ring not readable");
                items.clear();
                items.push(Item::unreadable(at));
                Parsed::Malformed { end: at }
            }
        };
        let mut flight = Flight {
            items,
            is_in: endpoint.dci.is_in(),
            ..Flight::new(self.new_transfer(slot, endpoint.dci))
        };
        if !matches!(parsed, Parsed::Transfer { immediate: None, .. }) {
            self.spare.keep_payload(Payload::Guest(std::mem::take(&mut segments)));
        }
        match parsed {
            Parsed::Nothing => {
                self.spare.keep_items(flight.items);
                return false;
            }
            Parsed::Idle { end } if !flight.items.iter().any(|item| item.interrupt) => {
                self.spare.keep_items(flight.items);
                if let Some(Some(ring)) = endpoint.rings.get_mut(stream) {
                    ring.cursor = end;
                    ring.resume = None;
                }
                return true;
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
                let payload = immediate.unwrap_or(Payload::Guest(segments));
                let resume = resume.filter(|resume| resume.start == flight.start());
                let start = Start { slot, stream: stream as u16, setup, payload, resume };
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
