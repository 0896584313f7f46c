//! A guest at the registers and in the memory of the controller, with devices that answer as they like.
//!
//! The input is a list of steps, a byte for the kind and what it needs. The controller starts as a driver leaves it, with
//! rings in place, so that short inputs reach far.

#![no_main]

use std::cell::RefCell;
use std::time::Duration;

use common::ids::Speed;
use libfuzzer_sys::fuzz_target;
use usbvfiod::urb::{
    DeviceHandle, DmaFault, Effect, GuestMem, OpError, OpId, PacketResult, Payload, TransferKind,
    UrbCompletion, UrbRequest, UrbStatus,
};
use usbvfiod::xhci::{AttachOptions, Controller, ControllerConfig, ResetPolicy};

const MEMORY: usize = 1 << 18;
const DCBAA: u64 = 0x1000;
const COMMANDS: u64 = 0x2000;
const TABLE: u64 = 0x3000;
const EVENTS: u64 = 0x4000;
const OPERATIONAL: u64 = 0x40;
const INTERRUPTER: u64 = 0x4020;
const DOORBELLS: u64 = 0x8000;
/// Most effects of one step: what one endpoint or a reset can start or take back.
const EFFECTS_MAX: usize = 4096;

struct Memory(RefCell<Vec<u8>>);

impl Memory {
    fn range(at: u64, len: usize) -> Result<std::ops::Range<usize>, DmaFault> {
        let end = at.checked_add(len as u64).filter(|end| *end <= MEMORY as u64);
        end.map(|end| at as usize..end as usize).ok_or(DmaFault { addr: at, len })
    }
}

impl GuestMem for Memory {
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), DmaFault> {
        buf.copy_from_slice(&self.0.borrow()[Self::range(addr, buf.len())?]);
        Ok(())
    }

    fn write(&self, addr: u64, buf: &[u8]) -> Result<(), DmaFault> {
        self.0.borrow_mut()[Self::range(addr, buf.len())?].copy_from_slice(buf);
        Ok(())
    }
}

struct Machine {
    memory: Memory,
    controller: Controller,
    now: Duration,
    effects: Vec<Effect>,
    flying: Vec<UrbRequest>,
    operations: Vec<OpId>,
    devices: u32,
    last: u64,
}

impl Machine {
    fn new() -> Self {
        let mut machine = Self {
            memory: Memory(RefCell::new(vec![0; MEMORY])),
            controller: Controller::new(ControllerConfig::default()),
            now: Duration::from_secs(1),
            effects: Vec::new(),
            flying: Vec::new(),
            operations: Vec::new(),
            devices: 0,
            last: 0,
        };
        machine.start();
        machine
    }

    /// What a driver does after HCRST.
    fn start(&mut self) {
        for at in [COMMANDS, EVENTS] {
            self.memory.write(at, &[0; 0x1000]).expect("in memory");
        }
        self.memory.write(TABLE, &EVENTS.to_le_bytes()).expect("in memory");
        self.memory.write(TABLE + 8, &256u64.to_le_bytes()).expect("in memory");
        for slot in 1..8u64 {
            let context = 0x8000 + slot * 0x400;
            self.memory.write(DCBAA + slot * 8, &context.to_le_bytes()).expect("in memory");
        }
        self.write(OPERATIONAL + 0x38, &64u32.to_le_bytes());
        self.write(OPERATIONAL + 0x30, &DCBAA.to_le_bytes());
        self.write(OPERATIONAL + 0x18, &(COMMANDS | 1).to_le_bytes());
        self.write(INTERRUPTER + 0x08, &1u32.to_le_bytes());
        self.write(INTERRUPTER + 0x18, &EVENTS.to_le_bytes());
        self.write(INTERRUPTER + 0x10, &TABLE.to_le_bytes());
        self.write(INTERRUPTER, &2u32.to_le_bytes());
        self.write(OPERATIONAL, &5u32.to_le_bytes());
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.controller.write(self.now, &self.memory, offset, data, &mut self.effects);
        self.controller.settle(self.now, &self.memory, &mut self.effects);
    }

    /// One step; none when the input is at its end.
    fn step(&mut self, input: &mut &[u8]) -> Option<()> {
        match take::<1>(input)?[0] % 12 {
            0 => {
                let [low, high, value @ ..] = take::<6>(input)?;
                self.write(u64::from(u16::from_le_bytes([low, high])), &value);
            }
            1 => {
                let [low, high, len] = take::<3>(input)?;
                let mut data = vec![0; usize::from(len)];
                self.controller.read(self.now, u64::from(u16::from_le_bytes([low, high])), &mut data);
            }
            2 | 3 => {
                let [low, high, bytes @ ..] = take::<18>(input)?;
                let at = u64::from(u16::from_le_bytes([low, high])) * 16;
                let _ = self.memory.write(at, &bytes);
            }
            4 => {
                let [slot, value @ ..] = take::<5>(input)?;
                self.write(DOORBELLS + u64::from(slot % 9) * 4, &value);
            }
            5 => self.write(DOORBELLS, &[0; 4]),
            6 | 7 => {
                let [which, status, actual @ ..] = take::<6>(input)?;
                self.end(usize::from(which), status, u32::from_le_bytes(actual));
            }
            8 => {
                let [which, result] = take::<2>(input)?;
                self.done(usize::from(which), result);
            }
            9 => {
                let [ms] = take::<1>(input)?;
                self.now += Duration::from_millis(u64::from(ms) * 16);
                self.controller.tick(self.now, &self.memory, &mut self.effects);
            }
            10 => self.plug(take::<1>(input)?[0]),
            _ => {
                let device = DeviceHandle(u32::from(take::<1>(input)?[0]));
                if device.0 & 0x80 == 0 {
                    self.controller.detach(self.now, &self.memory, device, &mut self.effects);
                } else {
                    let device = DeviceHandle(device.0 & 0x7f);
                    self.controller.wake(self.now, &self.memory, device, &mut self.effects);
                }
                self.controller.settle(self.now, &self.memory, &mut self.effects);
            }
        }
        self.collect();
        Some(())
    }

    fn plug(&mut self, kind: u8) {
        self.devices += 1;
        let speeds = [Speed::Low, Speed::Full, Speed::High, Speed::Super, Speed::SuperPlus];
        let resets = [ResetPolicy::Never, ResetPolicy::FirstFree, ResetPolicy::Always];
        let options = AttachOptions {
            reset: resets[usize::from(kind / 8) % 3],
            configuration: (kind & 0x80 != 0).then_some(1),
            host_streams: kind & 0x40 != 0,
        };
        let (device, speed) = (DeviceHandle(self.devices), speeds[usize::from(kind % 8) % 5]);
        let _ = self.controller.attach(self.now, &self.memory, device, speed, options, &mut self.effects);
        self.controller.settle(self.now, &self.memory, &mut self.effects);
    }

    fn end(&mut self, which: usize, status: u8, actual: u32) {
        use UrbStatus::*;
        const ALL: [UrbStatus; 10] = [
            Completed,
            Stalled,
            Babble,
            TransactionError,
            Cancelled,
            NotRun,
            Gone,
            NoBandwidth,
            DataBuffer,
            GuestMemory,
        ];
        if self.flying.is_empty() {
            return;
        }
        let UrbRequest { id, kind, payload, len, .. } = self.flying.swap_remove(which % self.flying.len());
        let status = ALL[usize::from(status) % ALL.len()];
        let packets = match kind {
            TransferKind::Isochronous { packets } => packets,
            _ => Vec::new(),
        };
        let packets = packets.iter().map(|len| PacketResult { status, actual: actual % (len + 1) }).collect();
        let completion = UrbCompletion { id, status, actual: actual % (len + 1), packets, payload };
        self.controller.complete(self.now, &self.memory, completion, &mut self.effects);
        self.controller.settle(self.now, &self.memory, &mut self.effects);
    }

    fn done(&mut self, which: usize, result: u8) {
        if self.operations.is_empty() {
            return;
        }
        let id = self.operations.swap_remove(which % self.operations.len());
        let errors = [OpError::Stalled, OpError::Failed, OpError::Gone, OpError::NoResources];
        let result = errors.get(usize::from(result % 8)).map_or(Ok(()), |error| Err(*error));
        self.controller.operation_done(self.now, &self.memory, id, result, &mut self.effects);
        self.controller.settle(self.now, &self.memory, &mut self.effects);
    }

    fn collect(&mut self) {
        assert!(self.effects.len() <= EFFECTS_MAX);
        for effect in self.effects.drain(..) {
            match effect {
                Effect::Submit(request) => {
                    assert!(request.id.0 >> 16 > self.last, "ids are never used again");
                    self.last = request.id.0 >> 16;
                    let bytes = match &request.payload {
                        Payload::Guest(segments) => {
                            segments.iter().map(|segment| u64::from(segment.len)).sum()
                        }
                        Payload::Immediate { len, .. } => u64::from(*len),
                    };
                    assert_eq!(bytes, u64::from(request.len), "the payload is as long as the transfer");
                    self.flying.push(request);
                }
                Effect::Cancel { ids, .. } | Effect::Abandon { ids, .. } => {
                    let known = |id| self.flying.iter().any(|flying| flying.id == id);
                    assert!(ids.into_iter().all(known), "only what is out is taken back");
                }
                Effect::Operate { id, .. } => self.operations.push(id),
                Effect::Interrupt { vector } => assert!(vector < 8),
            }
        }
    }

    /// HCRST brings back a controller that answers a No Op command.
    fn recover(mut self) {
        self.write(OPERATIONAL, &2u32.to_le_bytes());
        self.start();
        self.memory.write(COMMANDS + 12, &(23u32 << 10 | 1).to_le_bytes()).expect("in memory");
        self.write(DOORBELLS, &[0; 4]);
        let mut event = [0; 16];
        let answered = (0..256).any(|index| {
            self.memory.read(EVENTS + index * 16, &mut event).expect("in memory");
            u32::from_le_bytes([event[12], event[13], event[14], event[15]]) >> 10 & 0x3f == 33
        });
        assert!(answered);
    }
}

fn take<const N: usize>(input: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = input.split_first_chunk::<N>()?;
    *input = tail;
    Some(*head)
}

fuzz_target!(|input: &[u8]| {
    let mut input = input;
    let mut machine = Machine::new();
    while machine.step(&mut input).is_some() {}
    machine.recover();
});
