//! Random registers, random memory, random devices: nothing panics, and work and memory stay bounded.

use common::ids::Speed;
use proptest::prelude::*;

use super::super::fixture::{Guest, IOC, command_trb, normal};
use super::super::trb::Trb;
use crate::urb::{Effect, OpError, OpId, PacketResult, Payload, TransferId, TransferKind, UrbStatus};

/// Most effects of one input: all that one endpoint or a reset can start or take back.
const EFFECTS_MAX: usize = 4096;

#[derive(Clone, Debug)]
enum Input {
    Write { offset: u64, data: Vec<u8> },
    Read { offset: u64, len: usize },
    Poke { at: u64, trb: (u64, u32, u32) },
    Command { trb_type: u32, slot: u8, dci: u8, flags: u32 },
    Doorbell { slot: u8, target: u8, stream: u16 },
    Configure { kind: u32, dci: u8, max_packet: u16, dword0: u32 },
    Plug { usb3: bool },
    Unplug { which: u32 },
    Wake { which: u32 },
    End { which: usize, status: u8, actual: u32 },
    Done { which: usize, result: u8 },
    Stray { id: u64 },
    Wait { us: u64 },
    Acknowledge,
    Restart,
}

fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => (0u64..0x40).prop_map(|x| 0x40 + x),
        3 => (0u64..0x200).prop_map(|x| 0x440 + x),
        2 => (0u64..0x140).prop_map(|x| 0x4000 + x),
        2 => (0u64..0x180).prop_map(|x| 0x8000 + x),
        1 => 0u64..0x1_0010,
        1 => any::<u64>(),
    ]
}

/// Addresses where the fixture keeps its structures, and some where nothing is.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        2 => (0u64..0x800).prop_map(|x| 0x1000 + x * 16),
        8 => (1u64..4, 1u64..6, 0u64..64)
            .prop_map(|(slot, dci, index)| 0x10_0000 + (slot * 32 + dci) * 0x4000 + index * 16),
        1 => Just(0xff_fff0u64),
        1 => any::<u64>(),
    ]
}

fn trb() -> impl Strategy<Value = (u64, u32, u32)> {
    let control = (0u32..64, any::<u32>()).prop_map(|(kind, bits)| bits & 0xffff_03ff | kind << 10);
    let plain = (prop_oneof![1u32..=8, 9u32..=23], 0u32..0x400, any::<bool>())
        .prop_map(|(kind, flags, cycle)| kind << 10 | flags & !1 | u32::from(cycle));
    (address(), any::<u32>(), prop_oneof![control, plain])
}

fn inputs() -> impl Strategy<Value = Vec<Input>> {
    let input = prop_oneof![
        2 => (offset(), prop::collection::vec(any::<u8>(), 0..10))
            .prop_map(|(offset, data)| Input::Write { offset, data }),
        1 => (offset(), 0usize..20).prop_map(|(offset, len)| Input::Read { offset, len }),
        8 => (address(), trb()).prop_map(|(at, trb)| Input::Poke { at: at & !0xf, trb }),
        6 => (9u32..=23, 0u8..6, 0u8..32, any::<u32>())
            .prop_map(|(trb_type, slot, dci, flags)| Input::Command { trb_type, slot, dci, flags }),
        8 => (0u8..6, 0u8..33, prop_oneof![3 => Just(0u16), 1 => 0u16..40, 1 => any::<u16>()])
            .prop_map(|(slot, target, stream)| Input::Doorbell { slot, target, stream }),
        3 => (0u32..8, 0u8..32, prop_oneof![Just(0u16), Just(512), Just(1024), any::<u16>()], any::<u32>())
            .prop_map(|(kind, dci, max_packet, dword0)| Input::Configure { kind, dci, max_packet, dword0 }),
        2 => any::<bool>().prop_map(|usb3| Input::Plug { usb3 }),
        1 => (1u32..8).prop_map(|which| Input::Unplug { which }),
        1 => (1u32..8).prop_map(|which| Input::Wake { which }),
        8 => (any::<usize>(), 0u8..10, any::<u32>())
            .prop_map(|(which, status, actual)| Input::End { which, status, actual }),
        4 => (any::<usize>(), 0u8..5).prop_map(|(which, result)| Input::Done { which, result }),
        1 => any::<u64>().prop_map(|id| Input::Stray { id }),
        2 => (0u64..5_000_000).prop_map(|us| Input::Wait { us }),
        4 => Just(Input::Acknowledge),
        1 => Just(Input::Restart),
    ];
    prop::collection::vec(input, 1..150)
}

const STATUSES: [UrbStatus; 10] = [
    UrbStatus::Completed,
    UrbStatus::Stalled,
    UrbStatus::Babble,
    UrbStatus::TransactionError,
    UrbStatus::Cancelled,
    UrbStatus::NotRun,
    UrbStatus::Gone,
    UrbStatus::NoBandwidth,
    UrbStatus::DataBuffer,
    UrbStatus::GuestMemory,
];

struct Machine {
    guest: Guest,
    flying: Vec<(TransferId, u32, usize)>,
    operations: Vec<OpId>,
    last: u64,
}

impl Machine {
    fn new() -> Self {
        let mut guest = Guest::new();
        let (_, slot) = guest.bulk();
        guest.configured(Speed::Super, &[(4, 1, 1024, 0), (3, 5, 1024, 0), (5, 7, 64, 3 << 16)]);
        let (_, streams) = guest.streams();
        guest.push_stream(streams, 3, 1, normal(0x80_0000, 512, IOC));
        guest.ring_stream(streams, 3, 1);
        for dci in [3, 4] {
            guest.normal(slot, dci, 0x80_0000, 4096);
        }
        Self { guest, flying: Vec::new(), operations: Vec::new(), last: 0 }
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::Write { offset, data } => self.guest.write_bytes(offset, &data),
            Input::Read { offset, len } => {
                self.guest.controller.read(self.guest.now, offset, &mut vec![0; len]);
            }
            Input::Poke { at, trb } => {
                let _ = super::super::GuestMem::write(
                    &self.guest.mem,
                    at,
                    zerocopy::IntoBytes::as_bytes(&Trb::new(trb.0, trb.1, trb.2)),
                );
            }
            Input::Command { trb_type, slot, dci, flags } => {
                let plain = command_trb(trb_type, slot, dci, 0x6000);
                let control = plain.control().into_bits() | flags & 0x200;
                self.guest.post_command(Trb::new(0x6000, 0, control));
            }
            Input::Doorbell { slot, target, stream } => {
                let value = u32::from(target) | u32::from(stream) << 16;
                self.guest.write32(0x8000 + u64::from(slot) * 4, value);
            }
            Input::Configure { kind, dci, max_packet, dword0 } => {
                self.guest.configure_input(1, &[(dci, kind, u32::from(max_packet), dword0)]);
                self.guest.post_command(command_trb(12, 1, 0, 0x6000));
            }
            Input::Plug { usb3 } => {
                let speed = if usb3 { Speed::Super } else { Speed::High };
                let (_, port) = self.guest.plug(speed);
                self.guest.reset_port(port);
            }
            Input::Unplug { which } => self.guest.unplug(crate::urb::DeviceHandle(which)),
            Input::Wake { which } => {
                let device = crate::urb::DeviceHandle(which);
                let guest = &mut self.guest;
                guest.controller.wake(guest.now, &guest.mem, device, &mut guest.effects);
            }
            Input::End { which, status, actual } => self.end(which, status, actual),
            Input::Done { which, result } => self.done(which, result),
            Input::Stray { id } => self.guest.complete(TransferId(id), UrbStatus::Completed, 0),
            Input::Wait { us } => {
                let guest = &mut self.guest;
                guest.now += std::time::Duration::from_micros(us);
                guest.controller.tick(guest.now, &guest.mem, &mut guest.effects);
            }
            Input::Acknowledge => drop(self.guest.events()),
            Input::Restart => {
                self.guest.write32(0x40, 2);
                self.guest.start();
            }
        }
        self.collect();
    }

    fn end(&mut self, which: usize, status: u8, actual: u32) {
        if self.flying.is_empty() {
            return;
        }
        let (id, len, intervals) = self.flying.swap_remove(which % self.flying.len());
        let status = STATUSES[usize::from(status)];
        let actual = if len == 0 { 0 } else { actual % (len + 1) };
        let packets = vec![PacketResult { status, actual: actual / (intervals as u32 + 1) }; intervals];
        self.guest.end_packets(id, status, actual, packets);
        self.guest.settle();
    }

    fn done(&mut self, which: usize, result: u8) {
        if self.operations.is_empty() {
            return;
        }
        let id = self.operations.swap_remove(which % self.operations.len());
        let errors = [OpError::Stalled, OpError::Failed, OpError::Gone, OpError::NoResources];
        let result = errors.get(usize::from(result)).map_or(Ok(()), |error| Err(*error));
        self.guest.operation_done(id, result);
    }

    fn collect(&mut self) {
        const NEVER_CHANGED: u32 = 1 << 18 | 1 << 20 | 1 << 23;
        for port in 0..30 {
            let status = self.guest.read32(super::super::regs::PORTS + port * 16);
            assert_eq!(status & NEVER_CHANGED, 0, "PEC, OCC, CEC of port {}", port + 1);
        }
        assert!(self.guest.effects.len() <= EFFECTS_MAX);
        for effect in std::mem::take(&mut self.guest.effects) {
            match effect {
                Effect::Submit(request) => {
                    assert!(request.id.0 >> 16 > self.last, "ids are never used again");
                    self.last = request.id.0 >> 16;
                    let bytes = match &request.payload {
                        Payload::Guest(pieces) => pieces.iter().map(|piece| u64::from(piece.len)).sum(),
                        Payload::Immediate { len, .. } => u64::from(*len),
                    };
                    assert_eq!(bytes, u64::from(request.len), "the payload is as long as the transfer");
                    assert!(
                        request.len <= 16 << 20 || matches!(request.kind, TransferKind::Isochronous { .. })
                    );
                    let intervals = match &request.kind {
                        TransferKind::Isochronous { packets } => {
                            assert!((1..=32).contains(&packets.len()));
                            assert_eq!(packets.iter().sum::<u32>(), request.len);
                            packets.len()
                        }
                        _ => 0,
                    };
                    self.flying.push((request.id, request.len, intervals));
                }
                Effect::Operate { id, .. } => self.operations.push(id),
                Effect::Cancel { ids, .. } | Effect::Abandon { ids, .. } => {
                    let known = |id: &TransferId| self.flying.iter().any(|flying| flying.0 == *id);
                    assert!(ids.iter().all(known), "only what is out is taken back");
                }
                Effect::Interrupt { vector } => assert!(vector < 8),
            }
        }
        let devices = 30;
        assert!(self.operations.len() <= devices * 8 + 64);
        assert!(self.flying.len() <= 4096);
    }

    /// HCRST always brings a controller that works.
    fn recover(mut self) {
        self.guest.write32(0x40, 2);
        self.guest.start();
        self.guest.events();
        let at = self.guest.post_command(command_trb(23, 0, 0, 0));
        assert_eq!(self.guest.answer(at), Some((1, 0)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: super::cases(60), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_registers_and_memory_do_no_harm_and_reset_recovers(inputs in inputs()) {
        let mut machine = Machine::new();
        for input in inputs {
            machine.input(input);
        }
        machine.recover();
    }
}
