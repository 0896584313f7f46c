//! Transfer Request Blocks: layout, types, completion codes, and how events are put together (xHCI 1.2 §6.4).

use bitfield_struct::bitfield;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a TRB.
pub(super) const TRB_BYTES: u64 = 16;

/// A TRB as it lies in guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct Trb {
    parameter: U64,
    status: U32,
    control: U32,
}

/// The control dword. Bits above the type mean different things to each type.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub(super) struct Control {
    /// C.
    pub(super) cycle: bool,
    /// ENT; in a Link TRB: TC, Toggle Cycle.
    pub(super) toggle: bool,
    /// ISP; in an event: ED.
    pub(super) short_interrupt: bool,
    /// NS.
    pub(super) no_snoop: bool,
    /// CH.
    pub(super) chain: bool,
    /// IOC.
    pub(super) interrupt: bool,
    /// IDT.
    pub(super) immediate: bool,
    #[bits(2)]
    __: u8,
    /// BEI; in commands BSR, DC or TSP.
    pub(super) flag9: bool,
    /// TRB Type.
    #[bits(6)]
    pub(super) trb_type: u8,
    /// What follows the type.
    pub(super) upper: u16,
}

/// The status dword of a transfer TRB.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub(super) struct Status {
    /// TRB Transfer Length.
    #[bits(17)]
    pub(super) length: u32,
    /// TD Size: a hint we do not need.
    #[bits(5)]
    pub(super) td_size: u8,
    /// Interrupter Target.
    #[bits(10)]
    pub(super) interrupter: u16,
}

impl Trb {
    /// Puts a TRB together.
    pub(super) fn new(parameter: u64, status: u32, control: u32) -> Self {
        Self { parameter: parameter.into(), status: status.into(), control: control.into() }
    }

    /// The first eight bytes.
    pub(super) fn parameter(&self) -> u64 {
        self.parameter.get()
    }

    /// The status dword as transfer TRBs use it.
    pub(super) fn status(&self) -> Status {
        Status::from_bits(self.status.get())
    }

    /// The status dword, raw.
    pub(super) fn status_bits(&self) -> u32 {
        self.status.get()
    }

    /// The control dword.
    pub(super) fn control(&self) -> Control {
        Control::from_bits(self.control.get())
    }

    /// The same TRB with this cycle bit.
    pub(super) fn with_cycle(mut self, cycle: bool) -> Self {
        self.control = self.control().with_cycle(cycle).into_bits().into();
        self
    }

    /// A Transfer Event (§6.4.2.1).
    pub(super) fn transfer_event(
        pointer: u64,
        length: u32,
        code: CompletionCode,
        slot: u8,
        dci: u8,
        event_data: bool,
    ) -> Self {
        let control = u32::from(event_data) << 2
            | u32::from(event_type::TRANSFER) << 10
            | u32::from(dci) << 16
            | u32::from(slot) << 24;
        Self::new(pointer, length & 0xff_ffff | (code as u32) << 24, control)
    }

    /// A Command Completion Event (§6.4.2.2).
    pub(super) fn command_completion(pointer: u64, code: CompletionCode, slot: u8) -> Self {
        let control = u32::from(event_type::COMMAND_COMPLETION) << 10 | u32::from(slot) << 24;
        Self::new(pointer, (code as u32) << 24, control)
    }

    /// A Port Status Change Event (§6.4.2.3).
    pub(super) fn port_status_change(port: u8) -> Self {
        let code = CompletionCode::Success as u32;
        Self::new(u64::from(port) << 24, code << 24, u32::from(event_type::PORT_STATUS_CHANGE) << 10)
    }

    /// A Host Controller Event (§6.4.2.6).
    pub(super) fn host_controller(code: CompletionCode) -> Self {
        Self::new(0, (code as u32) << 24, u32::from(event_type::HOST_CONTROLLER) << 10)
    }

    /// An MFINDEX Wrap Event (§6.4.2.8).
    pub(super) fn mfindex_wrap() -> Self {
        let code = CompletionCode::Success as u32;
        Self::new(0, code << 24, u32::from(event_type::MFINDEX_WRAP) << 10)
    }
}

/// Event TRB types (Table 6-91).
pub(super) mod event_type {
    pub(in super::super) const TRANSFER: u8 = 32;
    pub(in super::super) const COMMAND_COMPLETION: u8 = 33;
    pub(in super::super) const PORT_STATUS_CHANGE: u8 = 34;
    pub(in super::super) const HOST_CONTROLLER: u8 = 37;
    pub(in super::super) const MFINDEX_WRAP: u8 = 39;
}

/// A TRB type that may stand on a transfer ring (Table 6-91).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TransferType {
    Normal,
    Setup,
    Data,
    Status,
    Isoch,
    Link,
    EventData,
    NoOp,
}

impl TransferType {
    /// Takes the TRB Type field; the guest may write any value.
    pub(super) fn new(raw: u8) -> Option<Self> {
        Some(match raw {
            1 => Self::Normal,
            2 => Self::Setup,
            3 => Self::Data,
            4 => Self::Status,
            5 => Self::Isoch,
            6 => Self::Link,
            7 => Self::EventData,
            8 => Self::NoOp,
            _ => return None,
        })
    }
}

/// TRB type of a Link TRB on any ring.
pub(super) const LINK: u8 = 6;

/// A command (§6.4.3), parsed. Fields are the guest's word and not checked yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    EnableSlot {
        slot_type: u8,
    },
    DisableSlot {
        slot: u8,
    },
    AddressDevice {
        slot: u8,
        input: u64,
        block_set_address: bool,
    },
    ConfigureEndpoint {
        slot: u8,
        input: u64,
        deconfigure: bool,
    },
    EvaluateContext {
        slot: u8,
        input: u64,
    },
    ResetEndpoint {
        slot: u8,
        dci: u8,
        preserve: bool,
    },
    StopEndpoint {
        slot: u8,
        dci: u8,
    },
    SetTrDequeue {
        slot: u8,
        dci: u8,
        pointer: u64,
        stream: u16,
    },
    ResetDevice {
        slot: u8,
    },
    GetPortBandwidth {
        slot: u8,
        context: u64,
    },
    ForceHeader,
    NoOp,
    /// A type we do not offer (§4.6: virtualisation, latency tolerance, extended properties, vendor) or that is no
    /// command at all.
    Unknown {
        trb_type: u8,
    },
}

impl Command {
    /// Takes a TRB of the command ring. Never fails: what is no command becomes [`Command::Unknown`].
    pub(super) fn parse(trb: &Trb) -> Self {
        let control = trb.control();
        let slot = (control.upper() >> 8) as u8;
        let dci = (control.upper() & 0x1f) as u8;
        let pointer = trb.parameter() & !0xf;
        match control.trb_type() {
            9 => Self::EnableSlot { slot_type: (control.upper() & 0x1f) as u8 },
            10 => Self::DisableSlot { slot },
            11 => Self::AddressDevice { slot, input: pointer, block_set_address: control.flag9() },
            12 => Self::ConfigureEndpoint { slot, input: pointer, deconfigure: control.flag9() },
            13 => Self::EvaluateContext { slot, input: pointer },
            14 => Self::ResetEndpoint { slot, dci, preserve: control.flag9() },
            15 => Self::StopEndpoint { slot, dci },
            16 => Self::SetTrDequeue {
                slot,
                dci,
                pointer: trb.parameter(),
                stream: (trb.status_bits() >> 16) as u16,
            },
            17 => Self::ResetDevice { slot },
            21 => Self::GetPortBandwidth { slot, context: pointer },
            22 => Self::ForceHeader,
            23 => Self::NoOp,
            trb_type => Self::Unknown { trb_type },
        }
    }

    /// The slot a completion event names; 0 where none is meant.
    pub(super) fn slot(&self) -> u8 {
        match *self {
            Self::DisableSlot { slot }
            | Self::AddressDevice { slot, .. }
            | Self::ConfigureEndpoint { slot, .. }
            | Self::EvaluateContext { slot, .. }
            | Self::ResetEndpoint { slot, .. }
            | Self::StopEndpoint { slot, .. }
            | Self::SetTrDequeue { slot, .. }
            | Self::ResetDevice { slot } => slot,
            _ => 0,
        }
    }
}

/// TRB Completion Codes (Table 6-90), those that we give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum CompletionCode {
    Success = 1,
    DataBuffer = 2,
    Babble = 3,
    Transaction = 4,
    Trb = 5,
    Stall = 6,
    Resource = 7,
    Bandwidth = 8,
    NoSlots = 9,
    InvalidStreamType = 10,
    SlotNotEnabled = 11,
    EndpointNotEnabled = 12,
    ShortPacket = 13,
    RingUnderrun = 14,
    RingOverrun = 15,
    Parameter = 17,
    BandwidthOverrun = 18,
    ContextState = 19,
    EventRingFull = 21,
    MissedService = 23,
    CommandRingStopped = 24,
    CommandAborted = 25,
    Stopped = 26,
    StoppedLengthInvalid = 27,
    StoppedShortPacket = 28,
    InvalidStreamId = 34,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transfer_event_has_its_fields_where_the_spec_wants_them() {
        let event = Trb::transfer_event(0x1_2345_6780, 0x12_3456, CompletionCode::ShortPacket, 7, 3, true);
        assert_eq!(event.parameter(), 0x1_2345_6780);
        assert_eq!(event.status_bits(), 0x0d12_3456);
        assert_eq!(event.control().into_bits(), 0x0703_8004);
    }

    #[test]
    fn set_tr_dequeue_keeps_cycle_and_stream_type_bits() {
        let trb = Trb::new(0x1003, 5 << 16, 16 << 10 | 3 << 16 | 2 << 24);
        let parsed = Command::parse(&trb);
        assert_eq!(parsed, Command::SetTrDequeue { slot: 2, dci: 3, pointer: 0x1003, stream: 5 });
    }

    #[test]
    fn every_type_number_parses_to_something() {
        for trb_type in 0..64u32 {
            let command = Command::parse(&Trb::new(u64::MAX, u32::MAX, trb_type << 10));
            let known = matches!(trb_type, 9..=17 | 21..=23);
            assert_eq!(!matches!(command, Command::Unknown { .. }), known, "{trb_type}");
        }
    }

    #[test]
    fn with_cycle_changes_nothing_else() {
        let trb = Trb::new(1, 2, 0xffff_fffe);
        assert_eq!(trb.with_cycle(true).control().into_bits(), 0xffff_ffff);
        assert_eq!(trb.with_cycle(false), trb);
    }
}
