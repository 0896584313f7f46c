//! Guest memory and, on it, a small guest driver for tests.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use common::ids::Speed;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::context::EndpointContext;
use super::regs::{DOORBELLS, INTERRUPTERS, OPERATIONAL, PORTS};
use super::trb::Trb;
use super::{AttachOptions, Controller, ControllerConfig, DmaFault, GuestMem, PortNumber};
use crate::urb::{
    DeviceHandle, DeviceOp, Effect, OpError, OpId, PacketResult, Payload, TransferId, UrbCompletion,
    UrbRequest, UrbStatus,
};

/// Guest memory from 0 up to its size.
pub(super) struct Memory(RefCell<Vec<u8>>);

impl Memory {
    pub(super) fn new(size: usize) -> Self {
        Self(RefCell::new(vec![0; size]))
    }

    pub(super) fn put<T: IntoBytes + Immutable>(&self, at: u64, value: &T) {
        self.write(at, value.as_bytes()).unwrap();
    }

    pub(super) fn get<T: FromBytes + IntoBytes>(&self, at: u64) -> T {
        super::ring::read_object(self, at).unwrap()
    }
}

fn range(at: u64, len: usize, size: usize) -> Result<std::ops::Range<usize>, DmaFault> {
    let end = at.checked_add(len as u64).filter(|end| *end <= size as u64);
    end.map(|end| at as usize..end as usize).ok_or(DmaFault { addr: at, len })
}

impl GuestMem for Memory {
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), DmaFault> {
        let memory = self.0.borrow();
        buf.copy_from_slice(&memory[range(addr, buf.len(), memory.len())?]);
        Ok(())
    }

    fn write(&self, addr: u64, buf: &[u8]) -> Result<(), DmaFault> {
        let mut memory = self.0.borrow_mut();
        let range = range(addr, buf.len(), memory.len())?;
        memory[range].copy_from_slice(buf);
        Ok(())
    }
}

const DCBAA: u64 = 0x1000;
const COMMANDS: u64 = 0x2000;
const ERST: u64 = 0x3000;
const EVENTS: u64 = 0x4000;
const INPUT: u64 = 0x6000;
const DEVICES: u64 = 0x8000;
const RINGS: u64 = 0x10_0000;
/// Where tests may put data.
pub(super) const DATA: u64 = 0x80_0000;
const MEMORY: usize = 16 << 20;
/// TRBs of a ring, the Link included.
const RING_TRBS: u64 = 64;

/// Where a driver writes its next TRB.
#[derive(Clone, Copy)]
struct Producer {
    base: u64,
    index: u64,
    cycle: bool,
}

impl Producer {
    fn new(base: u64) -> Self {
        Self { base, index: 0, cycle: true }
    }

    /// Puts a TRB on the ring, and the Link where the ring ends, chained like the TRB before it.
    fn push(&mut self, mem: &Memory, trb: Trb) -> u64 {
        let at = self.base + self.index * 16;
        mem.put(at, &trb.with_cycle(self.cycle));
        self.index += 1;
        if self.index == RING_TRBS - 1 {
            let chain = u32::from(trb.control().chain()) << 4;
            let link = Trb::new(self.base, 0, 6 << 10 | 2 | chain);
            mem.put(self.base + self.index * 16, &link.with_cycle(self.cycle));
            self.index = 0;
            self.cycle = !self.cycle;
        }
        at
    }
}

/// An event as the driver sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) kind: u8,
    pub(super) pointer: u64,
    pub(super) code: u8,
    pub(super) length: u32,
    pub(super) slot: u8,
    pub(super) dci: u8,
    pub(super) event_data: bool,
}

/// A guest with a driver, and devices that answer when a test says so.
pub(super) struct Guest {
    pub(super) mem: Memory,
    pub(super) controller: Controller,
    pub(super) now: Duration,
    /// What the controller asked for, not looked at yet.
    pub(super) effects: Vec<Effect>,
    commands: Producer,
    rings: BTreeMap<(u8, u8, u16), Producer>,
    event_index: u64,
    event_cycle: bool,
    devices: u32,
    pub(super) event_trbs: u64,
}

impl Guest {
    /// A controller with default settings, running, with an event ring of 256 TRBs.
    pub(super) fn new() -> Self {
        Self::with_events(256)
    }

    pub(super) fn with_events(event_trbs: u64) -> Self {
        let mut guest = Self {
            mem: Memory::new(MEMORY),
            controller: Controller::new(ControllerConfig::default()),
            now: Duration::from_secs(1),
            effects: Vec::new(),
            commands: Producer::new(COMMANDS),
            rings: BTreeMap::new(),
            event_index: 0,
            event_cycle: true,
            devices: 0,
            event_trbs,
        };
        guest.start();
        guest
    }

    /// What a driver does after HCRST.
    pub(super) fn start(&mut self) {
        self.commands = Producer::new(COMMANDS);
        self.rings.clear();
        (self.event_index, self.event_cycle) = (0, true);
        let zeroes = vec![0u8; 0x1000];
        for at in [DCBAA, COMMANDS, EVENTS] {
            self.mem.write(at, &zeroes).unwrap();
        }
        self.mem.put(ERST, &Trb::new(EVENTS, self.event_trbs as u32, 0));
        self.write32(OPERATIONAL + 0x38, 64);
        self.write64(OPERATIONAL + 0x30, DCBAA);
        self.write64(OPERATIONAL + 0x18, COMMANDS | 1);
        self.write32(INTERRUPTERS + 0x08, 1);
        self.write64(INTERRUPTERS + 0x18, EVENTS);
        self.write64(INTERRUPTERS + 0x10, ERST);
        self.write32(INTERRUPTERS, 2);
        self.write32(OPERATIONAL, 5);
    }

    pub(super) fn read32(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.controller.read(self.now, offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(super) fn write32(&mut self, offset: u64, value: u32) {
        self.write_bytes(offset, &value.to_le_bytes());
    }

    pub(super) fn write64(&mut self, offset: u64, value: u64) {
        self.write_bytes(offset, &value.to_le_bytes());
    }

    pub(super) fn write_bytes(&mut self, offset: u64, data: &[u8]) {
        self.controller.write(self.now, &self.mem, offset, data, &mut self.effects);
        self.settle();
    }

    pub(super) fn settle(&mut self) {
        self.controller.settle(self.now, &self.mem, &mut self.effects);
    }

    /// Lets time pass up to the controller's deadline or `limit`, whichever comes first.
    pub(super) fn wait(&mut self, limit: Duration) {
        let until = self.now + limit;
        while let Some(at) = self.controller.next_deadline().filter(|at| *at <= until) {
            self.now = self.now.max(at);
            self.controller.tick(self.now, &self.mem, &mut self.effects);
            if self.now >= until {
                break;
            }
        }
        self.now = until;
    }

    pub(super) fn plug(&mut self, speed: Speed) -> (DeviceHandle, PortNumber) {
        self.plug_with(speed, AttachOptions { host_streams: true, ..AttachOptions::default() })
    }

    pub(super) fn plug_with(&mut self, speed: Speed, options: AttachOptions) -> (DeviceHandle, PortNumber) {
        self.devices += 1;
        let device = DeviceHandle(self.devices);
        let port =
            self.controller.attach(self.now, &self.mem, device, speed, options, &mut self.effects).unwrap();
        self.settle();
        (device, port)
    }

    pub(super) fn unplug(&mut self, device: DeviceHandle) {
        self.controller.detach(self.now, &self.mem, device, &mut self.effects);
        self.settle();
    }

    pub(super) fn portsc(port: PortNumber) -> u64 {
        PORTS + port.index() as u64 * 16
    }

    /// Takes all new events and tells the controller so.
    pub(super) fn events(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        loop {
            let trb: Trb = self.mem.get(EVENTS + self.event_index * 16);
            if trb.control().cycle() != self.event_cycle || events.len() as u64 > 2 * self.event_trbs {
                break;
            }
            let upper = trb.control().upper();
            events.push(Event {
                kind: trb.control().trb_type(),
                pointer: trb.parameter(),
                code: (trb.status_bits() >> 24) as u8,
                length: trb.status_bits() & 0xff_ffff,
                slot: (upper >> 8) as u8,
                dci: (upper & 0x1f) as u8,
                event_data: trb.control().short_interrupt(),
            });
            self.event_index += 1;
            if self.event_index == self.event_trbs {
                self.event_index = 0;
                self.event_cycle = !self.event_cycle;
            }
        }
        self.write64(INTERRUPTERS + 0x18, (EVENTS + self.event_index * 16) | 8);
        events
    }

    /// The new Transfer Events as (pointer, code, length).
    pub(super) fn transfers(&mut self) -> Vec<(u64, u8, u32)> {
        let events = self.events().into_iter().filter(|event| event.kind == 32);
        events.map(|event| (event.pointer, event.code, event.length)).collect()
    }

    /// Queues a command and rings.
    pub(super) fn post_command(&mut self, trb: Trb) -> u64 {
        let at = self.commands.push(&self.mem, trb);
        self.write32(DOORBELLS, 0);
        at
    }

    /// Runs a command that is answered at once; the code and the slot.
    pub(super) fn command(&mut self, trb: Trb) -> (u8, u8) {
        let at = self.post_command(trb);
        self.answer(at).unwrap_or_else(|| panic!("command {trb:?} was not answered"))
    }

    /// The answer to the command at `at`, if it has come. Other events are lost.
    pub(super) fn answer(&mut self, at: u64) -> Option<(u8, u8)> {
        let events = self.events();
        let answer = events.iter().find(|event| event.kind == 33 && event.pointer == at);
        answer.map(|event| (event.code, event.slot))
    }

    /// A command of this type for a slot; `upper` is what stands between type and slot id.
    pub(super) fn slot_command(&mut self, trb_type: u32, slot: u8, dci: u8, parameter: u64) -> u8 {
        self.command(command_trb(trb_type, slot, dci, parameter)).0
    }

    /// Resets the port and clears its changes.
    pub(super) fn reset_port(&mut self, port: PortNumber) {
        self.write32(Self::portsc(port), 1 << 9 | 1 << 4);
        self.write32(Self::portsc(port), 1 << 9 | 0x7f << 17);
    }

    /// Enable Slot.
    pub(super) fn enable_slot(&mut self) -> u8 {
        let (code, slot) = self.command(command_trb(9, 0, 0, 0));
        assert_eq!(code, 1);
        let context = DEVICES + u64::from(slot) * 0x400;
        self.mem.put(DCBAA + u64::from(slot) * 8, &context.to_le_bytes());
        slot
    }

    /// Writes the input context of Address Device.
    pub(super) fn address_input(&mut self, slot: u8, port: u8) -> u64 {
        self.clear_input();
        let ring = self.new_ring(slot, 1, 0);
        self.mem.put(INPUT + 4, &3u32.to_le_bytes());
        self.mem.put(INPUT + 0x20, &(1u32 << 27).to_le_bytes());
        self.mem.put(INPUT + 0x24, &(u32::from(port) << 16).to_le_bytes());
        self.mem.put(INPUT + 0x44, &(3u32 << 1 | 4 << 3 | 64 << 16).to_le_bytes());
        self.mem.put(INPUT + 0x48, &(ring | 1).to_le_bytes());
        INPUT
    }

    pub(super) fn clear_input(&mut self) {
        self.mem.write(INPUT, &[0; 0x420]).unwrap();
    }

    /// Plugs a device in and brings it to the Addressed state.
    pub(super) fn enumerate(&mut self, speed: Speed) -> (DeviceHandle, u8) {
        let (device, port) = self.plug(speed);
        self.reset_port(port);
        (device, self.address(port))
    }

    pub(super) fn address(&mut self, port: PortNumber) -> u8 {
        let slot = self.enable_slot();
        let input = self.address_input(slot, port.get());
        assert_eq!(self.slot_command(11, slot, 0, input), 1);
        slot
    }

    /// Starts a ring for an endpoint anew.
    pub(super) fn new_ring(&mut self, slot: u8, dci: u8, stream: u16) -> u64 {
        let place = (u64::from(slot) * 32 + u64::from(dci)) * 16 + u64::from(stream % 16);
        let base = RINGS + place * RING_TRBS * 16;
        self.mem.write(base, &vec![0; (RING_TRBS * 16) as usize]).unwrap();
        self.rings.insert((slot, dci, stream), Producer::new(base));
        base
    }

    /// Writes an input context that adds endpoints, each as (dci, type, max packet size, dword 0).
    pub(super) fn configure_input(&mut self, slot: u8, endpoints: &[(u8, u32, u32, u32)]) -> u64 {
        self.clear_input();
        let add = endpoints.iter().fold(1u32, |add, endpoint| add | 1 << endpoint.0);
        self.mem.put(INPUT + 4, &add.to_le_bytes());
        self.mem.put(INPUT + 0x20, &(31u32 << 27).to_le_bytes());
        for (dci, kind, max_packet, dword0) in endpoints {
            let at = INPUT + 0x20 + u64::from(*dci) * 0x20;
            let ring = self.new_ring(slot, *dci, 0);
            self.mem.put(at, &dword0.to_le_bytes());
            self.mem.put(at + 4, &(3u32 << 1 | kind << 3 | max_packet << 16).to_le_bytes());
            self.mem.put(at + 8, &(ring | 1).to_le_bytes());
        }
        INPUT
    }

    /// A configured device with these endpoints.
    pub(super) fn configured(
        &mut self,
        speed: Speed,
        endpoints: &[(u8, u32, u32, u32)],
    ) -> (DeviceHandle, u8) {
        let (device, slot) = self.enumerate(speed);
        let input = self.configure_input(slot, endpoints);
        assert_eq!(self.slot_command(12, slot, 0, input), 1);
        self.effects.clear();
        (device, slot)
    }

    /// A SuperSpeed device whose bulk IN endpoint (DCI 3) has stream ids up to 31, the first 15 with a ring. The
    /// operation that allocates them on the host is answered.
    pub(super) fn streams(&mut self) -> (DeviceHandle, u8) {
        let (device, slot) = self.enumerate(Speed::Super);
        let input = self.configure_input(slot, &[(3, 6, 1024, 4 << 10 | 1 << 15)]);
        let array = self.new_ring(slot, 3, 0);
        self.mem.put(input + 0x88, &array.to_le_bytes());
        for stream in 1..16 {
            let ring = self.new_ring(slot, 3, stream);
            self.mem.put(array + u64::from(stream) * 16, &(ring | 2 | 1).to_le_bytes());
        }
        let at = self.post_command(command_trb(12, slot, 0, input));
        let (id, op) = self.operation();
        assert_eq!(op, DeviceOp::AllocStreams { endpoints: vec![0x81], streams: 31 });
        self.operation_done(id, Ok(()));
        assert_eq!(self.answer(at), Some((1, slot)));
        self.effects.clear();
        (device, slot)
    }

    pub(super) fn ring_stream(&mut self, slot: u8, dci: u8, stream: u16) {
        self.write32(DOORBELLS + u64::from(slot) * 4, u32::from(dci) | u32::from(stream) << 16);
    }

    /// A high-speed device with bulk OUT (DCI 4) and bulk IN (DCI 3).
    pub(super) fn bulk(&mut self) -> (DeviceHandle, u8) {
        self.configured(Speed::High, &[(4, 2, 512, 0), (3, 6, 512, 0)])
    }

    /// Puts a TRB on a transfer ring without ringing.
    pub(super) fn push(&mut self, slot: u8, dci: u8, trb: Trb) -> u64 {
        self.push_stream(slot, dci, 0, trb)
    }

    pub(super) fn push_stream(&mut self, slot: u8, dci: u8, stream: u16, trb: Trb) -> u64 {
        self.rings.get_mut(&(slot, dci, stream)).expect("no such ring").push(&self.mem, trb)
    }

    /// Where the next TRB goes, as a dequeue pointer field.
    pub(super) fn enqueue_field(&self, slot: u8, dci: u8) -> u64 {
        let ring = &self.rings[&(slot, dci, 0)];
        (ring.base + ring.index * 16) | u64::from(ring.cycle)
    }

    pub(super) fn ring(&mut self, slot: u8, dci: u8) {
        self.write32(DOORBELLS + u64::from(slot) * 4, u32::from(dci));
    }

    /// Queues a TD of one Normal TRB with IOC and ISP, and rings.
    pub(super) fn normal(&mut self, slot: u8, dci: u8, at: u64, len: u32) -> u64 {
        let pointer = self.push(slot, dci, normal(at, len, IOC | ISP));
        self.ring(slot, dci);
        pointer
    }

    /// Queues a control transfer as Linux does; the pointers of its TRBs.
    pub(super) fn control(&mut self, slot: u8, setup: [u8; 8], at: u64) -> Vec<u64> {
        let length = u32::from(u16::from_le_bytes([setup[6], setup[7]]));
        let is_in = setup[0] & 0x80 != 0;
        let mut pointers = vec![self.push(slot, 1, setup_trb(setup))];
        if length > 0 {
            let direction = u32::from(is_in) << 16;
            pointers.push(self.push(slot, 1, Trb::new(at, length, 3 << 10 | ISP | direction)));
        }
        let status_in = u32::from(length == 0 || !is_in) << 16;
        pointers.push(self.push(slot, 1, Trb::new(0, 0, 4 << 10 | IOC | status_in)));
        self.ring(slot, 1);
        pointers
    }

    /// Takes the transfers that were started.
    pub(super) fn submitted(&mut self) -> Vec<UrbRequest> {
        let mut requests = Vec::new();
        self.effects.retain(|effect| match effect {
            Effect::Submit(request) => {
                requests.push(request.clone());
                false
            }
            _ => true,
        });
        requests
    }

    /// The one transfer that was started.
    pub(super) fn request(&mut self) -> UrbRequest {
        let mut requests = self.submitted();
        assert_eq!(requests.len(), 1, "{requests:?}");
        requests.remove(0)
    }

    /// Takes the operations that were started.
    pub(super) fn operations(&mut self) -> Vec<(OpId, DeviceOp)> {
        let mut operations = Vec::new();
        self.effects.retain(|effect| match effect {
            Effect::Operate { id, op, .. } => {
                operations.push((*id, op.clone()));
                false
            }
            _ => true,
        });
        operations
    }

    pub(super) fn operation(&mut self) -> (OpId, DeviceOp) {
        let mut operations = self.operations();
        assert_eq!(operations.len(), 1, "{operations:?}");
        operations.remove(0)
    }

    /// Takes the ids that were cancelled and those that were abandoned.
    pub(super) fn cancelled(&mut self) -> (Vec<TransferId>, Vec<TransferId>) {
        let (mut cancelled, mut abandoned) = (Vec::new(), Vec::new());
        self.effects.retain(|effect| match effect {
            Effect::Cancel { ids, .. } => {
                cancelled.extend(ids);
                false
            }
            Effect::Abandon { ids, .. } => {
                abandoned.extend(ids);
                false
            }
            _ => true,
        });
        (cancelled, abandoned)
    }

    /// Takes the interrupts.
    pub(super) fn interrupts(&mut self) -> usize {
        let before = self.effects.len();
        self.effects.retain(|effect| !matches!(effect, Effect::Interrupt { .. }));
        before - self.effects.len()
    }

    /// The device ends a transfer; the batch is not over.
    pub(super) fn end(&mut self, id: TransferId, status: UrbStatus, actual: u32) {
        self.end_packets(id, status, actual, Vec::new());
    }

    pub(super) fn end_packets(
        &mut self,
        id: TransferId,
        status: UrbStatus,
        actual: u32,
        packets: Vec<PacketResult>,
    ) {
        let completion =
            UrbCompletion { id, status, actual, packets, payload: Payload::Guest(Vec::with_capacity(4)) };
        self.controller.complete(self.now, &self.mem, completion, &mut self.effects);
    }

    /// The device ends a transfer, and the batch is over.
    pub(super) fn complete(&mut self, id: TransferId, status: UrbStatus, actual: u32) {
        self.end(id, status, actual);
        self.settle();
    }

    pub(super) fn operation_done(&mut self, id: OpId, result: Result<(), OpError>) {
        self.controller.operation_done(self.now, &self.mem, id, result, &mut self.effects);
        self.settle();
    }

    /// The endpoint context: state and dequeue pointer field.
    pub(super) fn endpoint(&self, slot: u8, dci: u8) -> (u8, u64) {
        let at = DEVICES + u64::from(slot) * 0x400 + u64::from(dci) * 0x20;
        let context: EndpointContext = EndpointContext(self.mem.get(at));
        (context.dword0().state(), context.dequeue())
    }

    /// State and address of the slot context.
    pub(super) fn slot(&self, slot: u8) -> (u8, u8) {
        let dword: [u8; 4] = self.mem.get(DEVICES + u64::from(slot) * 0x400 + 12);
        (dword[3] >> 3, dword[0])
    }
}

pub(super) const IOC: u32 = 1 << 5;
pub(super) const ISP: u32 = 1 << 2;
pub(super) const CHAIN: u32 = 1 << 4;
pub(super) const IDT: u32 = 1 << 6;
pub(super) const BEI: u32 = 1 << 9;

pub(super) fn normal(at: u64, len: u32, flags: u32) -> Trb {
    Trb::new(at, len, 1 << 10 | flags)
}

pub(super) fn setup_trb(setup: [u8; 8]) -> Trb {
    Trb::new(u64::from_le_bytes(setup), 8, 2 << 10 | IDT)
}

/// Event Data with IOC.
pub(super) fn event_data(parameter: u64, flags: u32) -> Trb {
    Trb::new(parameter, 0, 7 << 10 | IOC | flags)
}

pub(super) fn command_trb(trb_type: u32, slot: u8, dci: u8, parameter: u64) -> Trb {
    Trb::new(parameter, 0, trb_type << 10 | u32::from(dci) << 16 | u32::from(slot) << 24)
}
