//! Slots against a small reference model: whatever commands come in whatever order, code and slot state are those of
//! the specification's slot state machine (xHCI 1.2 Figure 4-2).

use common::ids::Speed;
use proptest::prelude::*;

use super::super::fixture::{Guest, command_trb};
use super::super::trb::Trb;
use crate::urb::{DeviceOp, OpError};

const SUCCESS: u8 = 1;
const TRANSACTION: u8 = 4;
const SLOT_NOT_ENABLED: u8 = 11;
const ENDPOINT_NOT_ENABLED: u8 = 12;
const CONTEXT_STATE: u8 = 19;

/// Slots and ports the model plays with; slot `n` is for port `n`.
const SLOTS: u8 = 3;
const DCI: u8 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Disabled,
    Enabled,
    Default,
    Addressed,
    Configured,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ep {
    Disabled,
    Running,
    Stopped,
}

#[derive(Clone, Debug)]
enum Step {
    Enable,
    Disable(u8),
    Address { slot: u8, block: bool },
    Configure { slot: u8, add: bool },
    Deconfigure(u8),
    Evaluate(u8),
    ResetDevice { slot: u8, works: bool },
    Stop(u8),
    ResetEndpoint(u8),
    SetDequeue(u8),
    Doorbell(u8),
    HostReset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let slot = 1..=SLOTS;
    let step = prop_oneof![
        3 => Just(Step::Enable),
        1 => slot.clone().prop_map(Step::Disable),
        4 => (slot.clone(), any::<bool>()).prop_map(|(slot, block)| Step::Address { slot, block }),
        4 => (slot.clone(), any::<bool>()).prop_map(|(slot, add)| Step::Configure { slot, add }),
        1 => slot.clone().prop_map(Step::Deconfigure),
        1 => slot.clone().prop_map(Step::Evaluate),
        2 => (slot.clone(), any::<bool>()).prop_map(|(slot, works)| Step::ResetDevice { slot, works }),
        2 => slot.clone().prop_map(Step::Stop),
        1 => slot.clone().prop_map(Step::ResetEndpoint),
        2 => slot.clone().prop_map(Step::SetDequeue),
        2 => slot.prop_map(Step::Doorbell),
        1 => Just(Step::HostReset),
    ];
    prop::collection::vec(step, 1..100)
}

struct Model {
    guest: Guest,
    slots: [(State, Ep); SLOTS as usize],
}

impl Model {
    fn new() -> Self {
        let mut guest = Guest::new();
        for _ in 0..SLOTS {
            let (_, port) = guest.plug(Speed::High);
            guest.reset_port(port);
        }
        guest.events();
        guest.write32(super::super::regs::OPERATIONAL + 0x38, u32::from(SLOTS));
        Self { guest, slots: [(State::Disabled, Ep::Disabled); SLOTS as usize] }
    }

    fn slot(&mut self, slot: u8) -> &mut (State, Ep) {
        &mut self.slots[usize::from(slot) - 1]
    }

    /// Runs a command; `allowed` are the states it is for, `then` the state after.
    fn expect(&mut self, slot: u8, allowed: &[State], code: u8) {
        let state = self.slot(slot).0;
        let expected = match state {
            State::Disabled => SLOT_NOT_ENABLED,
            _ if allowed.contains(&state) => SUCCESS,
            _ => CONTEXT_STATE,
        };
        assert_eq!(code, expected, "slot {slot} in {state:?}");
    }

    fn step(&mut self, step: Step) {
        use State::{Addressed, Configured, Default, Disabled, Enabled};
        match step {
            Step::Enable => {
                let free = (1..=SLOTS).find(|slot| self.slot(*slot).0 == Disabled);
                let (code, slot) = self.guest.command(command_trb(9, 0, 0, 0));
                assert_eq!(code, if free.is_some() { SUCCESS } else { 9 });
                if let Some(free) = free {
                    assert_eq!(slot, free);
                    *self.slot(slot) = (Enabled, Ep::Disabled);
                    let context = 0x8000 + u64::from(slot) * 0x400;
                    self.guest.mem.put(context, &[0u8; 0x400]);
                    self.guest.mem.put(0x1000 + u64::from(slot) * 8, &context.to_le_bytes());
                }
            }
            Step::Disable(slot) => {
                let code = self.guest.slot_command(10, slot, 0, 0);
                self.expect(slot, &[Enabled, Default, Addressed, Configured], code);
                *self.slot(slot) = (Disabled, Ep::Disabled);
            }
            Step::Address { slot, block } => {
                let input = self.guest.address_input(slot, slot);
                let flag = u32::from(block) << 9;
                let trb = Trb::new(input, 0, command_trb(11, slot, 0, 0).control().into_bits() | flag);
                let code = self.guest.command(trb).0;
                let allowed: &[State] = if block { &[Enabled] } else { &[Enabled, Default] };
                self.expect(slot, allowed, code);
                if code == SUCCESS {
                    self.slot(slot).0 = if block { Default } else { Addressed };
                }
            }
            Step::Configure { slot, add } => {
                let endpoints: &[(u8, u32, u32, u32)] = if add { &[(DCI, 6, 512, 0)] } else { &[] };
                let input = self.guest.configure_input(slot, endpoints);
                let code = self.guest.slot_command(12, slot, 0, input);
                self.expect(slot, &[Addressed, Configured], code);
                if code == SUCCESS && add {
                    *self.slot(slot) = (Configured, Ep::Running);
                }
            }
            Step::Deconfigure(slot) => {
                let control = command_trb(12, slot, 0, 0).control().into_bits() | 1 << 9;
                let code = self.guest.command(Trb::new(0, 0, control)).0;
                self.expect(slot, &[Addressed, Configured], code);
                if code == SUCCESS {
                    *self.slot(slot) = (Addressed, Ep::Disabled);
                }
            }
            Step::Evaluate(slot) => {
                self.guest.clear_input();
                self.guest.mem.put(0x6004, &1u32.to_le_bytes());
                let code = self.guest.slot_command(13, slot, 0, 0x6000);
                self.expect(slot, &[Default, Addressed, Configured], code);
            }
            Step::ResetDevice { slot, works } => self.reset_device(slot, works),
            Step::Stop(slot) => {
                let code = self.guest.slot_command(15, slot, DCI, 0);
                if self.expect_endpoint(slot, Ep::Running, code) {
                    self.slot(slot).1 = Ep::Stopped;
                }
            }
            Step::ResetEndpoint(slot) => {
                let code = self.guest.slot_command(14, slot, DCI, 0);
                let endpoint = *self.slot(slot);
                let expected = match endpoint {
                    (Disabled, _) => SLOT_NOT_ENABLED,
                    (_, Ep::Disabled) => ENDPOINT_NOT_ENABLED,
                    _ => CONTEXT_STATE,
                };
                assert_eq!(code, expected, "none is halted");
            }
            Step::SetDequeue(slot) => {
                let code = self.guest.slot_command(16, slot, DCI, 0x50_0001);
                self.expect_endpoint(slot, Ep::Stopped, code);
            }
            Step::Doorbell(slot) => {
                self.guest.ring(slot, DCI);
                if self.slot(slot).1 == Ep::Stopped {
                    self.slot(slot).1 = Ep::Running;
                }
            }
            Step::HostReset => {
                self.guest.write32(super::super::regs::OPERATIONAL, 2);
                self.guest.start();
                self.guest.write32(super::super::regs::OPERATIONAL + 0x38, u32::from(SLOTS));
                for port in (0..usize::from(SLOTS)).map(super::super::PortNumber::from_index) {
                    self.guest.reset_port(port);
                }
                self.guest.events();
                self.slots = [(Disabled, Ep::Disabled); SLOTS as usize];
            }
        }
        self.check();
    }

    fn reset_device(&mut self, slot: u8, works: bool) {
        let at = self.guest.post_command(command_trb(17, slot, 0, 0));
        let mut expected = SUCCESS;
        if let [(id, op)] = &self.guest.operations()[..] {
            assert_eq!(*op, DeviceOp::Reset);
            self.guest.operation_done(*id, if works { Ok(()) } else { Err(OpError::Failed) });
            expected = if works { SUCCESS } else { TRANSACTION };
        }
        let code = self.guest.answer(at).unwrap().0;
        if code == TRANSACTION {
            assert_eq!(code, expected);
            return;
        }
        self.expect(slot, &[State::Addressed, State::Configured], code);
        if code == SUCCESS {
            *self.slot(slot) = (State::Default, Ep::Disabled);
        }
    }

    fn expect_endpoint(&mut self, slot: u8, needed: Ep, code: u8) -> bool {
        let expected = match *self.slot(slot) {
            (State::Disabled, _) => SLOT_NOT_ENABLED,
            (_, Ep::Disabled) => ENDPOINT_NOT_ENABLED,
            (_, state) if state == needed => SUCCESS,
            _ => CONTEXT_STATE,
        };
        assert_eq!(code, expected);
        code == SUCCESS
    }

    /// What the contexts in memory say.
    fn check(&mut self) {
        for slot in 1..=SLOTS {
            let (state, endpoint) = *self.slot(slot);
            let shown = self.guest.slot(slot);
            match state {
                State::Disabled | State::Enabled => continue,
                State::Default => assert_eq!(shown, (1, 0)),
                State::Addressed => assert_eq!(shown, (2, slot)),
                State::Configured => assert_eq!(shown, (3, slot)),
            }
            let expected = match endpoint {
                Ep::Disabled => 0,
                Ep::Running => 1,
                Ep::Stopped => 3,
            };
            assert_eq!(self.guest.endpoint(slot, DCI).0, expected);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: super::cases(60), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn slots_follow_their_state_machine(steps in steps()) {
        let mut model = Model::new();
        for step in steps {
            model.step(step);
        }
    }
}
