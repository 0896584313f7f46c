//! Device, slot, endpoint and stream contexts, 32 bytes each (xHCI 1.2 §6.2). Layout and range checks; what the
//! contexts mean to a slot stands in `slot` and `command`.

use bitfield_struct::bitfield;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a context (CSZ = 0).
pub(super) const CONTEXT_BYTES: u64 = 32;

/// Device Context Index: one endpoint of a slot, 1..=31 (xHCI 1.2 §4.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Dci(u8);

impl Dci {
    /// The default pipe.
    pub(super) const CONTROL: Self = Self(1);

    /// Takes the DB Target byte of a doorbell (§5.6) or an Endpoint ID. The guest may write any value.
    pub(super) const fn new(raw: u8) -> Option<Self> {
        if matches!(raw, 1..=31) { Some(Self(raw)) } else { None }
    }

    /// The number, 1..=31.
    pub(super) const fn get(self) -> u8 {
        self.0
    }

    /// Place in a table of 31 endpoints.
    pub(super) const fn index(self) -> usize {
        self.0 as usize - 1
    }

    /// `bEndpointAddress` with the direction in bit 7.
    pub(super) const fn address(self) -> u8 {
        if self.0 == 1 { 0 } else { (self.0 / 2) | ((self.0 & 1) << 7) }
    }

    /// The index of the endpoint with this address; none for the default pipe and for numbers above 15.
    pub(super) const fn from_address(address: u8) -> Option<Self> {
        let number = address & 0x7f;
        if number == 0 || number > 15 { None } else { Some(Self(number * 2 + (address >> 7))) }
    }

    /// Whether the device sends.
    pub(super) const fn is_in(self) -> bool {
        self.0 & 1 == 1
    }
}

/// Eight dwords of guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct Context(pub(super) [U32; 8]);

impl Context {
    fn get(&self, dword: usize) -> u32 {
        self.0[dword].get()
    }

    fn set(&mut self, dword: usize, value: u32) {
        self.0[dword] = value.into();
    }
}

/// Slot state as the guest reads it (§6.2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum SlotState {
    /// Disabled or Enabled: both read 0.
    Enabled = 0,
    Default = 1,
    Addressed = 2,
    Configured = 3,
}

#[bitfield(u32)]
pub(super) struct Slot0 {
    #[bits(20)]
    pub(super) route: u32,
    #[bits(4)]
    pub(super) speed: u8,
    __: bool,
    pub(super) multi_tt: bool,
    pub(super) hub: bool,
    #[bits(5)]
    pub(super) entries: u8,
}

#[bitfield(u32)]
pub(super) struct Slot1 {
    pub(super) max_exit_latency: u16,
    pub(super) root_port: u8,
    pub(super) ports: u8,
}

#[bitfield(u32)]
pub(super) struct Slot2 {
    pub(super) parent_slot: u8,
    pub(super) parent_port: u8,
    #[bits(2)]
    pub(super) think_time: u8,
    #[bits(4)]
    __: u8,
    #[bits(10)]
    pub(super) interrupter: u16,
}

#[bitfield(u32)]
pub(super) struct Slot3 {
    pub(super) address: u8,
    #[bits(19)]
    __: u32,
    #[bits(5)]
    pub(super) state: u8,
}

/// Slot Context (§6.2.2).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SlotContext(pub(super) Context);

impl SlotContext {
    pub(super) fn dword0(&self) -> Slot0 {
        Slot0::from_bits(self.0.get(0))
    }

    pub(super) fn dword1(&self) -> Slot1 {
        Slot1::from_bits(self.0.get(1))
    }

    pub(super) fn dword2(&self) -> Slot2 {
        Slot2::from_bits(self.0.get(2))
    }

    pub(super) fn set_entries(&mut self, entries: u8) {
        self.0.set(0, self.dword0().with_entries(entries & 0x1f).into_bits());
    }

    pub(super) fn set_speed(&mut self, speed: u8) {
        self.0.set(0, self.dword0().with_speed(speed & 0xf).into_bits());
    }

    pub(super) fn set_latency(&mut self, max_exit_latency: u16) {
        self.0.set(1, self.dword1().with_max_exit_latency(max_exit_latency).into_bits());
    }

    pub(super) fn set_interrupter(&mut self, interrupter: u16) {
        self.0.set(2, self.dword2().with_interrupter(interrupter & 0x3ff).into_bits());
    }

    /// Sets address and state, both ours to write.
    pub(super) fn set_state(&mut self, state: SlotState, address: u8) {
        self.0.set(3, Slot3::new().with_address(address).with_state(state as u8).into_bits());
    }
}

/// Endpoint state as the guest reads it (§6.2.3). A disabled endpoint does not exist here; its context reads 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum EndpointState {
    Running = 1,
    Halted = 2,
    Stopped = 3,
    Error = 4,
}

/// Sort of endpoint; the direction is in the [`Dci`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EndpointKind {
    Control,
    Bulk,
    Interrupt,
    Isochronous,
}

#[bitfield(u32)]
pub(super) struct Endpoint0 {
    #[bits(3)]
    pub(super) state: u8,
    #[bits(5)]
    __: u8,
    #[bits(2)]
    pub(super) mult: u8,
    #[bits(5)]
    pub(super) max_streams: u8,
    pub(super) linear_streams: bool,
    pub(super) interval: u8,
    pub(super) max_esit_high: u8,
}

#[bitfield(u32)]
pub(super) struct Endpoint1 {
    __: bool,
    #[bits(2)]
    pub(super) error_count: u8,
    #[bits(3)]
    pub(super) endpoint_type: u8,
    __: bool,
    pub(super) host_initiate_disable: bool,
    pub(super) max_burst: u8,
    pub(super) max_packet: u16,
}

/// Endpoint Context (§6.2.3).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct EndpointContext(pub(super) Context);

impl EndpointContext {
    pub(super) fn dword0(&self) -> Endpoint0 {
        Endpoint0::from_bits(self.0.get(0))
    }

    pub(super) fn dword1(&self) -> Endpoint1 {
        Endpoint1::from_bits(self.0.get(1))
    }

    /// TR Dequeue Pointer with the cycle state in bit 0.
    pub(super) fn dequeue(&self) -> u64 {
        u64::from(self.0.get(2)) | u64::from(self.0.get(3)) << 32
    }

    pub(super) fn set_state(&mut self, state: EndpointState) {
        self.0.set(0, self.dword0().with_state(state as u8).into_bits());
    }

    pub(super) fn set_dequeue(&mut self, dequeue: u64) {
        self.0.set(2, dequeue as u32);
        self.0.set(3, (dequeue >> 32) as u32);
    }

    pub(super) fn set_max_packet(&mut self, max_packet: u16) {
        self.0.set(1, self.dword1().with_max_packet(max_packet).into_bits());
    }

    /// The kind, when type and direction fit the index (§6.2.3, EP Type). None for reserved types, and for control
    /// endpoints other than the default pipe, which usbfs cannot drive.
    pub(super) fn kind(&self, dci: Dci) -> Option<EndpointKind> {
        let (kind, device_sends) = match self.dword1().endpoint_type() {
            1 => (EndpointKind::Isochronous, false),
            2 => (EndpointKind::Bulk, false),
            3 => (EndpointKind::Interrupt, false),
            4 => (EndpointKind::Control, true),
            5 => (EndpointKind::Isochronous, true),
            6 => (EndpointKind::Bulk, true),
            7 => (EndpointKind::Interrupt, true),
            _ => return None,
        };
        let is_default = dci == Dci::CONTROL;
        (device_sends == dci.is_in() && is_default == (kind == EndpointKind::Control)).then_some(kind)
    }
}

/// Input Control Context (§6.2.5.1): which contexts to drop (bits of dword 0) and to add (dword 1).
#[derive(Clone, Copy, Debug)]
pub(super) struct InputControl {
    pub(super) drop: u32,
    pub(super) add: u32,
}

impl InputControl {
    pub(super) fn new(context: &Context) -> Self {
        Self { drop: context.get(0), add: context.get(1) }
    }

    pub(super) fn drops(&self, dci: Dci) -> bool {
        self.drop >> dci.get() & 1 == 1
    }

    pub(super) fn adds(&self, dci: Dci) -> bool {
        self.add >> dci.get() & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(endpoint_type: u8) -> EndpointContext {
        let mut context = Context::default();
        context.set(1, Endpoint1::new().with_endpoint_type(endpoint_type).into_bits());
        EndpointContext(context)
    }

    #[test]
    fn dci_0_and_32_do_not_exist() {
        assert!(Dci::new(0).is_none());
        assert!(Dci::new(32).is_none());
        assert_eq!(Dci::new(31).map(Dci::index), Some(30));
    }

    #[test]
    fn dci_and_endpoint_address_go_both_ways() {
        for raw in 2..=31 {
            let dci = Dci::new(raw).unwrap();
            assert_eq!(Dci::from_address(dci.address()), Some(dci));
        }
        assert_eq!(Dci::new(3).unwrap().address(), 0x81);
        assert_eq!(Dci::from_address(0x80), None);
        assert_eq!(Dci::from_address(0x10), None);
    }

    #[test]
    fn endpoint_type_must_fit_the_direction() {
        let (out, input) = (Dci::new(4).unwrap(), Dci::new(5).unwrap());
        assert_eq!(endpoint(2).kind(out), Some(EndpointKind::Bulk));
        assert_eq!(endpoint(2).kind(input), None);
        assert_eq!(endpoint(6).kind(input), Some(EndpointKind::Bulk));
        assert_eq!(endpoint(6).kind(out), None);
        assert_eq!(endpoint(0).kind(out), None);
        assert_eq!(endpoint(4).kind(input), None);
        assert_eq!(endpoint(4).kind(Dci::CONTROL), Some(EndpointKind::Control));
    }

    #[test]
    fn dequeue_pointer_has_both_halves() {
        let mut context = EndpointContext::default();
        context.set_dequeue(0x1234_5678_9abc_def1);
        assert_eq!(context.dequeue(), 0x1234_5678_9abc_def1);
    }
}
