//! The command ring: commands one after another, each answered in less than four seconds (xHCI 1.2 §4.6, §4.9.3). What the
//! commands on contexts do stands in `configure`.

use std::time::Duration;

use super::GuestMem;
use super::configure::Plan;
use super::context::{Dci, EndpointState};
use super::controller::{Controller, Io};
use super::regs::Crcr;
use super::ring::{Cursor, Reader};
use super::slot::{Drain, Slot, TransferRing};
use super::trb::{Command, CompletionCode, LINK, Trb};
use crate::urb::{OpError, OpId};

/// A command that waits for a device is answered by then; Linux gives up after 5 s.
const COMMAND_DEADLINE: Duration = Duration::from_millis(3500);
/// Commands carried out in one go; what is left comes in the next batch.
const COMMANDS_PER_KICK: usize = 64;
/// Links that may follow each other.
const LINKS_MAX: usize = 32;

/// CRCR and what is behind it (§5.4.5).
#[derive(Debug, Default)]
pub(super) struct CommandRing {
    pub(super) cursor: Cursor,
    /// CRR.
    pub(super) running: bool,
    /// CS was written while a command waits for its device.
    stopping: bool,
    /// The doorbell was rung since the ring was last found empty.
    rung: bool,
    pending: Option<Pending>,
}

impl CommandRing {
    pub(super) fn deadline(&self) -> Option<Duration> {
        self.pending.as_ref().map(|pending| pending.deadline)
    }

    /// Whether a command may be waiting on the ring and none is in execution.
    pub(super) fn is_due(&self) -> bool {
        self.running && self.rung && self.pending.is_none()
    }
}

/// A command that waits for a device.
#[derive(Debug)]
struct Pending {
    /// Where its TRB lies.
    at: u64,
    slot: u8,
    deadline: Duration,
    wait: Wait,
}

#[derive(Debug)]
pub(super) enum Wait {
    /// Stop Endpoint: the transfers come back.
    Stop(Dci),
    /// Reset Device: the real reset.
    Reset(OpId),
    /// Configure Endpoint: streams are allocated.
    Streams(OpId, Box<Plan>),
}

/// How far a command came.
#[derive(Debug)]
pub(super) enum Step {
    Done(CompletionCode),
    /// Enable Slot names the slot it gave.
    Enabled(u8),
    Wait(Wait),
}

impl Step {
    pub(super) fn from_result(result: Result<(), CompletionCode>) -> Self {
        Self::Done(result.err().unwrap_or(CompletionCode::Success))
    }
}

impl Controller {
    /// Doorbell 0.
    pub(super) fn ring_commands(&mut self) {
        if self.is_running() {
            self.commands.running = true;
            self.commands.rung = true;
        }
    }

    /// The low half of CRCR. Pointer and cycle can be set only while the ring does not run.
    pub(super) fn write_crcr_low<M: GuestMem>(&mut self, io: &mut Io<'_, M>, value: u32) {
        let value = Crcr::from_bits(value);
        if !self.commands.running {
            let low = u64::from(value.pointer()) << 6;
            let cursor = &mut self.commands.cursor;
            *cursor = Cursor { at: cursor.at & !0xffff_ffff | low, cycle: value.cycle() };
            return;
        }
        if value.abort() {
            self.abort_command(io);
        }
        if value.abort() || value.stop() {
            self.commands.stopping = true;
            self.stop_commands(io);
        }
    }

    /// The high half of CRCR.
    pub(super) fn write_crcr_high(&mut self, value: u32) {
        if !self.commands.running {
            let cursor = &mut self.commands.cursor;
            cursor.at = cursor.at & 0xffff_ffff | u64::from(value) << 32;
        }
    }

    /// CRCR as read: only CRR can be seen.
    pub(super) fn crcr(&self) -> u32 {
        Crcr::new().with_running(self.commands.running).into_bits()
    }

    /// Stops the ring after the command in execution (§4.6.1.1).
    fn stop_commands<M: GuestMem>(&mut self, io: &mut Io<'_, M>) {
        if !self.commands.stopping || self.commands.pending.is_some() {
            return;
        }
        self.commands.stopping = false;
        self.commands.running = false;
        self.commands.rung = false;
        let event = Trb::command_completion(self.commands.cursor.at, CompletionCode::CommandRingStopped, 0);
        self.post(io, 0, event, false);
    }

    /// Ends the command in execution (§4.6.1.2).
    fn abort_command<M: GuestMem>(&mut self, io: &mut Io<'_, M>) {
        if let Some(pending) = self.commands.pending.take() {
            self.finish_pending(io, pending, CompletionCode::CommandAborted);
        }
    }

    /// Runs what is on the command ring.
    pub(super) fn run_commands<M: GuestMem>(&mut self, io: &mut Io<'_, M>) {
        if !self.commands.is_due() {
            return;
        }
        let mut reader = Reader::new(io.mem);
        let (mut commands, mut links) = (0, 0);
        while self.is_running()
            && self.commands.running
            && self.commands.rung
            && self.commands.pending.is_none()
            && self.has_room(io, 0)
        {
            if commands == COMMANDS_PER_KICK {
                self.again = true;
                return;
            }
            let at = self.commands.cursor;
            let trb = match reader.fetch(at) {
                Ok(Some(trb)) => trb,
                Ok(None) => {
                    self.commands.rung = false;
                    return;
                }
                Err(fault) => return self.host_system_error(&fault.into()),
            };
            if trb.control().trb_type() == LINK {
                links += 1;
                if links > LINKS_MAX {
                    return self.host_controller_error("command ring is all links");
                }
                self.commands.cursor = at.follow(&trb);
                if trb.control().interrupt() {
                    let event = Trb::command_completion(at.at, CompletionCode::Success, 0);
                    self.post(io, 0, event, false);
                }
                continue;
            }
            (commands, links) = (commands + 1, 0);
            self.commands.cursor = at.next();
            let command = Command::parse(&trb);
            tracing::trace!(?command, "command");
            match self.execute(io, command) {
                Step::Done(code) => self.answer(io, at.at, code, command.slot()),
                Step::Enabled(slot) => self.answer(io, at.at, CompletionCode::Success, slot),
                Step::Wait(wait) => {
                    let deadline = io.now + COMMAND_DEADLINE;
                    let slot = command.slot();
                    self.commands.pending = Some(Pending { at: at.at, slot, deadline, wait });
                }
            }
        }
    }

    fn answer<M: GuestMem>(&mut self, io: &mut Io<'_, M>, at: u64, code: CompletionCode, slot: u8) {
        self.post(io, 0, Trb::command_completion(at, code, slot), false);
    }

    /// Answers a command that waited.
    fn answer_pending<M: GuestMem>(&mut self, io: &mut Io<'_, M>, pending: &Pending, code: CompletionCode) {
        self.answer(io, pending.at, code, pending.slot);
        self.stop_commands(io);
    }

    fn execute<M: GuestMem>(&mut self, io: &mut Io<'_, M>, command: Command) -> Step {
        match command {
            Command::NoOp => Step::Done(CompletionCode::Success),
            Command::EnableSlot { slot_type } => self.enable_slot(slot_type),
            Command::DisableSlot { slot } => Step::from_result(self.disable_slot(io, slot)),
            Command::AddressDevice { slot, input, block_set_address } => {
                Step::from_result(self.address_device(io, slot, input, block_set_address))
            }
            Command::ConfigureEndpoint { slot, input, deconfigure } => {
                self.configure_endpoint(io, slot, input, deconfigure).unwrap_or_else(Step::Done)
            }
            Command::EvaluateContext { slot, input } => {
                Step::from_result(self.evaluate_context(io, slot, input))
            }
            Command::ResetDevice { slot } => self.reset_device(io, slot).unwrap_or_else(Step::Done),
            Command::StopEndpoint { slot, dci } => {
                self.stop_endpoint(io, slot, dci).unwrap_or_else(Step::Done)
            }
            Command::ResetEndpoint { slot, dci, preserve } => {
                Step::from_result(self.reset_endpoint(io, slot, dci, preserve))
            }
            Command::SetTrDequeue { slot, dci, pointer, stream } => {
                Step::from_result(self.set_tr_dequeue(io, slot, dci, pointer, stream))
            }
            Command::GetPortBandwidth { .. } | Command::ForceHeader | Command::Unknown { .. } => {
                Step::Done(CompletionCode::Trb)
            }
        }
    }

    /// Enable Slot (§4.6.3). Only slot type 0 exists.
    fn enable_slot(&mut self, slot_type: u8) -> Step {
        if slot_type != 0 {
            return Step::Done(CompletionCode::Trb);
        }
        let enabled = usize::from(self.config as u8).min(self.slots.len());
        let Some(index) = self.slots[..enabled].iter().position(Option::is_none) else {
            return Step::Done(CompletionCode::NoSlots);
        };
        self.slots[index] = Some(Box::new(Slot::new()));
        Step::Enabled(index as u8 + 1)
    }

    /// The endpoint a command names, when slot and endpoint are enabled.
    fn named_endpoint(&self, slot: u8, dci: u8) -> Result<Dci, CompletionCode> {
        if self.slot(slot).is_none() {
            return Err(CompletionCode::SlotNotEnabled);
        }
        let dci = Dci::new(dci).ok_or(CompletionCode::Trb)?;
        self.endpoint(slot, dci).map(|_| dci).ok_or(CompletionCode::EndpointNotEnabled)
    }

    /// Stop Endpoint (§4.6.9). Transfers come back with what they moved; the answer waits for them.
    fn stop_endpoint<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
        dci: u8,
    ) -> Result<Step, CompletionCode> {
        let dci = self.named_endpoint(slot, dci)?;
        let mut step = Step::Done(CompletionCode::ContextState);
        self.with_endpoint(slot, dci, |controller, endpoint| {
            if endpoint.state != EndpointState::Running {
                return;
            }
            if endpoint.has_flights() {
                controller.start_drain(endpoint, slot, Drain::Stop, io.effects);
                controller.requeue(slot, endpoint);
                step = Step::Wait(Wait::Stop(dci));
                return;
            }
            endpoint.state = EndpointState::Stopped;
            endpoint.streaming = false;
            for ring in endpoint.rings_mut() {
                ring.rung = false;
            }
            controller.set_timer(slot, endpoint, None);
            controller.write_dequeue(io, slot, endpoint);
            step = Step::Done(CompletionCode::Success);
        });
        Ok(step)
    }

    /// The endpoint of a Stop Endpoint command has come to rest.
    pub(super) fn stop_finished<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
        dci: Dci,
        code: CompletionCode,
    ) {
        let is_it = |pending: &mut Pending| {
            pending.slot == slot && matches!(pending.wait, Wait::Stop(waiting) if waiting == dci)
        };
        if let Some(pending) = self.commands.pending.take_if(is_it) {
            self.answer_pending(io, &pending, code);
        }
    }

    /// Reset Endpoint (§4.6.8). With Transfer State Preserve the failed TD goes on where it was (soft retry).
    fn reset_endpoint<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
        dci: u8,
        preserve: bool,
    ) -> Result<(), CompletionCode> {
        let dci = self.named_endpoint(slot, dci)?;
        let mut result = Err(CompletionCode::ContextState);
        self.with_endpoint(slot, dci, |controller, endpoint| {
            if endpoint.state != EndpointState::Halted {
                return;
            }
            endpoint.state = EndpointState::Stopped;
            for ring in endpoint.rings_mut() {
                ring.rung = false;
                if !preserve {
                    ring.resume = None;
                }
            }
            controller.write_dequeue(io, slot, endpoint);
            result = Ok(());
        });
        result
    }

    /// Set TR Dequeue Pointer (§4.6.10).
    fn set_tr_dequeue<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
        dci: u8,
        pointer: u64,
        stream: u16,
    ) -> Result<(), CompletionCode> {
        let dci = self.named_endpoint(slot, dci)?;
        let mut result = Err(CompletionCode::ContextState);
        self.with_endpoint(slot, dci, |controller, endpoint| {
            if !matches!(endpoint.state, EndpointState::Stopped | EndpointState::Error) {
                return;
            }
            let cursor = Cursor::from_field(pointer);
            result = if endpoint.streams.is_some() {
                endpoint.set_stream(io.mem, stream, cursor)
            } else if stream != 0 {
                Err(CompletionCode::Trb)
            } else {
                endpoint.rings[0] = Some(TransferRing::new(cursor));
                Ok(())
            };
            if result.is_ok() {
                endpoint.state = EndpointState::Stopped;
                endpoint.streaming = false;
                controller.set_timer(slot, endpoint, None);
                controller.write_dequeue(io, slot, endpoint);
            }
        });
        result
    }

    /// The outcome of the operation a command waits for. False when none does any more.
    pub(super) fn command_operation_done<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        id: OpId,
        result: Result<(), OpError>,
    ) -> bool {
        let is_it = |pending: &mut Pending| match &pending.wait {
            Wait::Reset(op) | Wait::Streams(op, _) => *op == id,
            Wait::Stop(_) => false,
        };
        let Some(pending) = self.commands.pending.take_if(is_it) else { return false };
        let code = match result {
            Ok(()) => CompletionCode::Success,
            Err(OpError::NoResources) => CompletionCode::Resource,
            Err(OpError::Stalled | OpError::Failed | OpError::Gone) => CompletionCode::Transaction,
        };
        self.finish_pending(io, pending, code);
        true
    }

    /// A command has waited long enough.
    pub(super) fn expire_command<M: GuestMem>(&mut self, io: &mut Io<'_, M>) {
        let is_due = |pending: &mut Pending| pending.deadline <= io.now;
        if let Some(pending) = self.commands.pending.take_if(is_due) {
            let code = match pending.wait {
                Wait::Stop(_) => CompletionCode::Success,
                Wait::Reset(_) | Wait::Streams(..) => CompletionCode::Transaction,
            };
            self.finish_pending(io, pending, code);
        }
    }

    /// The device is gone that the command in execution waits for.
    pub(super) fn fail_pending<M: GuestMem>(&mut self, io: &mut Io<'_, M>, slot: u8) {
        if let Some(pending) = self.commands.pending.take_if(|pending| pending.slot == slot) {
            let code = match pending.wait {
                Wait::Stop(_) => CompletionCode::Success,
                Wait::Reset(_) | Wait::Streams(..) => CompletionCode::Transaction,
            };
            self.finish_pending(io, pending, code);
        }
    }

    /// Carries out what is left of a command that waited, and answers it.
    fn finish_pending<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        mut pending: Pending,
        code: CompletionCode,
    ) {
        let slot = pending.slot;
        match &mut pending.wait {
            // The transfers do not come back: the guest gets its buffers without them.
            Wait::Stop(dci) => {
                let dci = *dci;
                self.with_endpoint(slot, dci, |controller, endpoint| {
                    controller.abandon(endpoint, slot, io.effects);
                    endpoint.drain = None;
                    endpoint.state = EndpointState::Stopped;
                    endpoint.streaming = false;
                    for ring in endpoint.rings_mut() {
                        ring.rung = false;
                    }
                    controller.set_timer(slot, endpoint, None);
                    controller.write_dequeue(io, slot, endpoint);
                });
            }
            Wait::Reset(_) if code == CompletionCode::Success => self.device_was_reset(io, slot),
            Wait::Streams(_, plan) if code == CompletionCode::Success => self.apply(io, slot, plan),
            Wait::Reset(_) | Wait::Streams(..) => {}
        }
        self.answer_pending(io, &pending, code);
    }
}
