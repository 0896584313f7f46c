//! From doorbells and outcomes to what an endpoint does next: events for what has ended, then new transfers (xHCI 1.2
//! §4.7, §4.9, §4.10). How transfers are started stands in `start`, how they are halted and taken back in `halt`.

use super::GuestMem;
use super::context::{Dci, EndpointKind, EndpointState};
use super::controller::{Controller, Io};
use super::slot::{Drain, Endpoint};
use super::td::{Ended, Flight, Outcome, Progress};
use crate::urb::{OpError, PacketResult, TransferId, UrbCompletion, UrbStatus};

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
            if !matches!(completion.status, UrbStatus::Completed | UrbStatus::Stalled)
                && let Some(device) = self.slot_device(slot)
            {
                device.touched = true;
            }
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

    /// Gives each interval a result, whatever the transport handed back.
    fn fill_packets(&mut self) {
        let Some(outcome) = self.outcome else { return };
        let Ended::Device(status) = outcome.status else { return };
        let intervals = self.items.iter().filter(|item| item.ends_td).count();
        let status = if status == UrbStatus::Completed { UrbStatus::TransactionError } else { status };
        self.packets.resize(intervals, PacketResult { status, actual: 0 });
    }
}
