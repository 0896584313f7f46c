//! The controller as the daemon sees it: its inputs, the batch, the deadlines. What each input does stands in the
//! modules named after the chapters.

use std::collections::VecDeque;
use std::time::Duration;

use super::GuestMem;
use super::command::CommandRing;
use super::context::Dci;
use super::event_ring::Position;
use super::interrupter::Interrupter;
use super::port::{Device, Port, PortNumber, ResetKind};
use super::regs::{Capabilities, Usbcmd, Usbsts};
use super::slot::{Endpoint, Slot};
use super::td::{Flight, Item};
use crate::urb::{
    DeviceHandle, DeviceOp, Effect, OpError, OpId, Payload, Segment, TransferId, UrbCompletion,
};

/// Most vectors kept for use again.
const SPARE_MAX: usize = 64;
/// Vectors that grew beyond this many elements are not kept.
const SPARE_ELEMENTS: usize = 1024;
/// Most operations of one device whose outcome is not known. More are refused.
pub(super) const OPERATIONS_MAX: u8 = 8;
/// Doorbells and commands that follow from each other are carried out in one batch up to this often.
const ROUNDS: usize = 4;
/// Ids of slots as the guest counts them.
const SLOTS_MAX: u8 = 127;
/// What the controller offers. Values out of range are brought into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControllerConfig {
    /// Root ports for low, full and high speed; 0..=127.
    pub usb2_ports: u8,
    /// Root ports for SuperSpeed; 0..=127.
    pub usb3_ports: u8,
    /// Device slots, 1..=127.
    pub slots: u8,
    /// Interrupters, and MSI-X vectors; 1..=8.
    pub interrupters: u16,
    /// Whether bulk streams are offered.
    pub streams: bool,
}

impl Default for ControllerConfig {
    fn default() -> Self {
        Self { usb2_ports: 15, usb3_ports: 15, slots: 64, interrupters: 8, streams: true }
    }
}

/// What every input brings along.
pub(super) struct Io<'a, M> {
    pub(super) now: Duration,
    pub(super) mem: &'a M,
    pub(super) effects: &'a mut Vec<Effect>,
}

/// What an operation is done for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A control transfer of the guest, which ends with it.
    Control(TransferId),
    /// The command in execution.
    Command,
    /// The command in execution, which gives streams to these endpoints. When nobody waits any more they are taken away
    /// again.
    Streams(Vec<u8>),
    /// A reset of the port.
    Port(PortNumber, ResetKind),
    /// Nobody waits.
    Nothing,
}

/// An operation in flight.
#[derive(Debug)]
pub(super) struct Operation {
    pub(super) id: OpId,
    pub(super) device: DeviceHandle,
    pub(super) purpose: Purpose,
}

/// Memory for use again, so that a running transfer allocates nothing.
#[derive(Debug, Default)]
pub(super) struct Spare {
    items: Vec<Vec<Item>>,
    segments: Vec<Vec<Segment>>,
}

impl Spare {
    pub(super) fn items(&mut self) -> Vec<Item> {
        self.items.pop().unwrap_or_default()
    }

    pub(super) fn segments(&mut self) -> Vec<Segment> {
        self.segments.pop().unwrap_or_default()
    }

    pub(super) fn keep_items(&mut self, items: Vec<Item>) {
        keep(&mut self.items, items);
    }

    pub(super) fn keep_payload(&mut self, payload: Payload) {
        if let Payload::Guest(segments) = payload {
            keep(&mut self.segments, segments);
        }
    }
}

fn keep<T>(spare: &mut Vec<Vec<T>>, mut vector: Vec<T>) {
    if spare.len() < SPARE_MAX && (1..=SPARE_ELEMENTS).contains(&vector.capacity()) {
        vector.clear();
        spare.push(vector);
    }
}

/// An xHCI 1.2 host controller.
#[derive(Debug)]
pub struct Controller {
    pub(super) capabilities: Capabilities,
    pub(super) usbcmd: Usbcmd,
    pub(super) usbsts: Usbsts,
    pub(super) dnctrl: u32,
    pub(super) config: u32,
    pub(super) dcbaap: u64,
    pub(super) commands: CommandRing,
    pub(super) interrupters: Vec<Interrupter>,
    pub(super) ports: Vec<Port>,
    /// By slot id less 1.
    pub(super) slots: Vec<Option<Box<Slot>>>,
    /// Endpoints to look at in the next batch, each once.
    ready: VecDeque<(u8, Dci)>,
    /// Endpoints that wait for room on an event ring, or for transfers of others to end.
    blocked: Vec<(u8, Dci)>,
    /// Endpoints with a deadline.
    timed: Vec<(u8, Dci)>,
    pub(super) operations: Vec<Operation>,
    pub(super) spare: Spare,
    /// TRBs of all transfers in flight.
    pub(super) trbs_in_flight: usize,
    /// Event ring positions at Save State.
    pub(super) saved: Option<Vec<Position>>,
    /// Since when MFINDEX counts.
    pub(super) frames_since: Duration,
    pub(super) next_wrap: Option<Duration>,
    last_transfer: u64,
    last_operation: u64,
    pub(super) again: bool,
}

impl Controller {
    /// Size of the register window in bytes. Capability and operational registers, extended capabilities, runtime
    /// registers and doorbells are on pages of their own.
    pub const BAR_SIZE: u64 = 0x1_0000;

    /// A halted controller with empty ports.
    pub fn new(config: ControllerConfig) -> Self {
        let capabilities = Capabilities {
            usb2_ports: config.usb2_ports.min(127),
            usb3_ports: config.usb3_ports.min(127),
            slots: config.slots.clamp(1, SLOTS_MAX),
            interrupters: config.interrupters.clamp(1, 8),
            streams: config.streams,
        };
        let usb2 = (0..capabilities.usb2_ports).map(|_| Port::new(false));
        let usb3 = (0..capabilities.usb3_ports).map(|_| Port::new(true));
        Self {
            capabilities,
            usbcmd: Usbcmd::new(),
            usbsts: Usbsts::new(),
            dnctrl: 0,
            config: 0,
            dcbaap: 0,
            commands: CommandRing::default(),
            interrupters: (0..capabilities.interrupters).map(|_| Interrupter::default()).collect(),
            ports: usb2.chain(usb3).collect(),
            slots: (0..capabilities.slots).map(|_| None).collect(),
            ready: VecDeque::new(),
            blocked: Vec::new(),
            timed: Vec::new(),
            operations: Vec::new(),
            spare: Spare::default(),
            trbs_in_flight: 0,
            saved: None,
            frames_since: Duration::ZERO,
            next_wrap: None,
            last_transfer: 0,
            last_operation: 0,
            again: false,
        }
    }

    /// The outcome of a transfer. Its events are written by the next [`Self::settle`], so that a batch of outcomes costs
    /// one interrupt.
    pub fn complete<M: GuestMem>(
        &mut self,
        now: Duration,
        mem: &M,
        completion: UrbCompletion,
        effects: &mut Vec<Effect>,
    ) {
        self.transfer_ended(&mut Io { now, mem, effects }, completion);
    }

    /// The outcome of an operation.
    pub fn operation_done<M: GuestMem>(
        &mut self,
        now: Duration,
        mem: &M,
        id: OpId,
        result: Result<(), OpError>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(index) = self.operations.iter().position(|operation| operation.id == id) else { return };
        let operation = self.operations.swap_remove(index);
        if let Some(device) = self.device_mut(operation.device) {
            device.operations = device.operations.saturating_sub(1);
        }
        let io = &mut Io { now, mem, effects };
        match operation.purpose {
            Purpose::Control(transfer) => self.control_operation_done(transfer, result),
            Purpose::Command => {
                self.command_operation_done(io, id, result);
            }
            Purpose::Streams(endpoints) => {
                if !self.command_operation_done(io, id, result) && result.is_ok() {
                    let op = DeviceOp::FreeStreams { endpoints };
                    self.operate(operation.device, op, Purpose::Nothing, io.effects);
                }
            }
            Purpose::Port(port, kind) => self.port_reset_done(io, port, kind, result),
            Purpose::Nothing => {}
        }
    }

    /// Ends a batch of inputs: reports what has ended, runs commands, refills the rings, and decides once for each
    /// interrupter whether to signal.
    pub fn settle<M: GuestMem>(&mut self, now: Duration, mem: &M, effects: &mut Vec<Effect>) {
        let io = &mut Io { now, mem, effects };
        self.again = false;
        self.flush_events(io);
        for _ in 0..ROUNDS {
            self.service_ready(io);
            self.run_commands(io);
            if self.ready.is_empty() && !self.commands.is_due() {
                break;
            }
        }
        let enabled = self.usbcmd.interrupter_enable();
        for (vector, interrupter) in (0..).zip(&mut self.interrupters) {
            let decision = interrupter.decide(io.now, enabled);
            if decision.raised {
                self.usbsts.set_event_interrupt(true);
            }
            if decision.signal {
                io.effects.push(Effect::Interrupt { vector });
            }
        }
    }

    /// Time has passed. Does what is due, including [`Self::settle`].
    pub fn tick<M: GuestMem>(&mut self, now: Duration, mem: &M, effects: &mut Vec<Effect>) {
        let io = &mut Io { now, mem, effects };
        self.expire_command(io);
        self.expire_port_resets(io);
        self.expire_endpoints(io);
        self.expire_wrap(io);
        self.settle(now, mem, effects);
    }

    /// When to call [`Self::tick`]; none when nothing is due. May lie in the past: then at once.
    pub fn next_deadline(&self) -> Option<Duration> {
        if self.again || !self.ready.is_empty() {
            return Some(Duration::ZERO);
        }
        let interrupters = self.interrupters.iter().filter_map(Interrupter::deadline);
        let resets = self.ports.iter().filter_map(|port| port.reset.map(|reset| reset.deadline));
        let endpoints = self.timed.iter().filter_map(|(slot, dci)| self.endpoint(*slot, *dci)?.deadline);
        let command = self.commands.deadline();
        interrupters.chain(resets).chain(endpoints).chain(command).chain(self.next_wrap).min()
    }

    /// As after power-on (PCI reset, DEVICE_RESET, the VMM went away). Devices stay in their ports. Guest memory is not
    /// touched any more.
    pub fn reset(&mut self, _now: Duration, effects: &mut Vec<Effect>) {
        self.reset_controller(effects);
    }

    /// Everything back to its start value except the ports' devices; transfers in flight are given up.
    pub(super) fn reset_controller(&mut self, effects: &mut Vec<Effect>) {
        for slot in 1..=self.capabilities.slots {
            self.free_slot(slot, effects);
        }
        for operation in &mut self.operations {
            if !matches!(operation.purpose, Purpose::Streams(_)) {
                operation.purpose = Purpose::Nothing;
            }
        }
        self.usbcmd = Usbcmd::new();
        self.usbsts = Usbsts::new();
        self.dnctrl = 0;
        self.config = 0;
        self.dcbaap = 0;
        self.commands = CommandRing::default();
        self.interrupters.fill_with(Interrupter::default);
        self.ready.clear();
        self.blocked.clear();
        self.timed.clear();
        self.saved = None;
        self.next_wrap = None;
        self.again = false;
        for index in 0..self.ports.len() {
            self.resume_device(index, effects);
            self.ports[index].power_on();
        }
    }

    /// Whether the controller executes (R/S = 1 and no error has stopped it).
    pub(super) fn is_running(&self) -> bool {
        self.usbcmd.run()
    }

    /// The endpoint is looked at in this batch, or the next.
    pub(super) fn make_ready(&mut self, slot: u8, dci: Dci) {
        let Some(endpoint) = self.endpoint_mut(slot, dci) else { return };
        if !endpoint.queued {
            endpoint.queued = true;
            self.ready.push_back((slot, dci));
        }
    }

    /// As [`Self::make_ready`] for an endpoint that is taken out of its slot.
    pub(super) fn requeue(&mut self, slot: u8, endpoint: &mut Endpoint) {
        if !endpoint.queued {
            endpoint.queued = true;
            self.ready.push_back((slot, endpoint.dci));
        }
    }

    /// The endpoint waits until an event ring has room again or other transfers have ended.
    pub(super) fn block(&mut self, slot: u8, dci: Dci) {
        if !self.blocked.contains(&(slot, dci)) {
            self.blocked.push((slot, dci));
        }
    }

    /// Has another look at all that was blocked.
    pub(super) fn unblock(&mut self) {
        for (slot, dci) in std::mem::take(&mut self.blocked) {
            self.make_ready(slot, dci);
        }
    }

    /// Sets the deadline of an endpoint that is taken out of its slot.
    pub(super) fn set_timer(&mut self, slot: u8, endpoint: &mut Endpoint, deadline: Option<Duration>) {
        endpoint.deadline = deadline;
        let key = (slot, endpoint.dci);
        match (deadline, self.timed.iter().position(|timed| *timed == key)) {
            (Some(_), None) => self.timed.push(key),
            (None, Some(index)) => drop(self.timed.swap_remove(index)),
            _ => {}
        }
    }

    fn service_ready<M: GuestMem>(&mut self, io: &mut Io<'_, M>) {
        for _ in 0..self.ready.len() {
            let Some((slot, dci)) = self.ready.pop_front() else { return };
            self.with_endpoint(slot, dci, |controller, endpoint| {
                endpoint.queued = false;
                controller.service(io, slot, endpoint);
            });
        }
    }

    fn expire_endpoints<M: GuestMem>(&mut self, io: &mut Io<'_, M>) {
        let due = |controller: &Self, slot, dci| {
            controller
                .endpoint(slot, dci)
                .is_none_or(|endpoint| endpoint.deadline.is_none_or(|at| at <= io.now))
        };
        let mut expired = Vec::new();
        for (slot, dci) in &self.timed {
            if due(self, *slot, *dci) {
                expired.push((*slot, *dci));
            }
        }
        for (slot, dci) in expired {
            self.timed.retain(|timed| *timed != (slot, dci));
            self.with_endpoint(slot, dci, |controller, endpoint| {
                if endpoint.deadline.take().is_some() {
                    controller.isoch_deadline(io, slot, endpoint);
                }
            });
        }
    }

    /// Takes an endpoint out of its slot for as long as `work` takes, so that both can be used.
    pub(super) fn with_endpoint(&mut self, slot: u8, dci: Dci, work: impl FnOnce(&mut Self, &mut Endpoint)) {
        let Some(mut endpoint) = self.slot_mut(slot).and_then(|slot| slot.endpoints[dci.index()].take())
        else {
            return;
        };
        work(self, &mut endpoint);
        if let Some(slot) = self.slot_mut(slot) {
            slot.endpoints[dci.index()] = Some(endpoint);
        }
    }

    pub(super) fn slot(&self, slot: u8) -> Option<&Slot> {
        self.slots.get(usize::from(slot).checked_sub(1)?)?.as_deref()
    }

    pub(super) fn slot_mut(&mut self, slot: u8) -> Option<&mut Slot> {
        self.slots.get_mut(usize::from(slot).checked_sub(1)?)?.as_deref_mut()
    }

    pub(super) fn endpoint(&self, slot: u8, dci: Dci) -> Option<&Endpoint> {
        self.slot(slot)?.endpoints[dci.index()].as_deref()
    }

    pub(super) fn endpoint_mut(&mut self, slot: u8, dci: Dci) -> Option<&mut Endpoint> {
        self.slot_mut(slot)?.endpoints[dci.index()].as_deref_mut()
    }

    pub(super) fn device_mut(&mut self, handle: DeviceHandle) -> Option<&mut Device> {
        self.ports.iter_mut().filter_map(|port| port.device.as_mut()).find(|device| device.handle == handle)
    }

    /// The device a slot was addressed to, while it is still in its port.
    pub(super) fn slot_device(&mut self, slot: u8) -> Option<&mut Device> {
        let slot = self.slot(slot)?;
        let (port, handle) = (slot.port?, slot.device?);
        self.ports.get_mut(port.index())?.device.as_mut().filter(|device| device.handle == handle)
    }

    /// A name for a transfer that also tells its endpoint.
    pub(super) fn new_transfer(&mut self, slot: u8, dci: Dci) -> TransferId {
        self.last_transfer = self.last_transfer.wrapping_add(1);
        TransferId(self.last_transfer << 16 | u64::from(slot) << 8 | u64::from(dci.get()))
    }

    /// The endpoint a transfer was named for.
    pub(super) fn endpoint_of(id: TransferId) -> Option<(u8, Dci)> {
        Some(((id.0 >> 8) as u8, Dci::new(id.0 as u8)?))
    }

    /// Starts an operation, unless the device has too many already.
    pub(super) fn operate(
        &mut self,
        handle: DeviceHandle,
        op: DeviceOp,
        purpose: Purpose,
        effects: &mut Vec<Effect>,
    ) -> Option<OpId> {
        let device = self.device_mut(handle)?;
        let most = match op {
            DeviceOp::Suspend => OPERATIONS_MAX / 2,
            // One for each Suspend: a device must not sleep on because of others.
            DeviceOp::Resume => OPERATIONS_MAX + OPERATIONS_MAX / 2,
            _ => OPERATIONS_MAX,
        };
        if device.operations >= most {
            return None;
        }
        device.operations += 1;
        self.last_operation = self.last_operation.wrapping_add(1);
        let id = OpId(self.last_operation);
        self.operations.push(Operation { id, device: handle, purpose });
        effects.push(Effect::Operate { id, device: handle, op });
        Some(id)
    }

    /// Takes a transfer's memory back.
    pub(super) fn retire(&mut self, flight: Flight) {
        self.trbs_in_flight = self.trbs_in_flight.saturating_sub(flight.items.len());
        self.spare.keep_items(flight.items);
    }
}
