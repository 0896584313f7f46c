//! Commands on contexts: slots are addressed, configured, reset and given back (xHCI 1.2 §4.6.4–§4.6.7, §4.6.11). Input
//! contexts are checked in full before anything changes.

use zerocopy::IntoBytes;

use super::GuestMem;
use super::command::{Step, Wait};
use super::context::{
    CONTEXT_BYTES, Context, Dci, EndpointContext, EndpointKind, EndpointState, InputControl, SlotContext,
    SlotState,
};
use super::controller::{Controller, Io, Purpose};
use super::port::{PortNumber, ResetPolicy, speed_id};
use super::regs::MAX_PSA_SIZE;
use super::ring::read_object;
use super::slot::{Endpoint, Slot};
use super::trb::CompletionCode;
use crate::urb::{DeviceOp, Effect};

/// Longest service interval: 2^18 × 125 µs, full-speed isochronous (Table 6-12).
pub(super) const INTERVAL_MAX: u8 = 18;
/// Largest packet of any endpoint (USB 3.2 §9.6.6).
const MAX_PACKET: u16 = 1024;

/// A Configure Endpoint command that has been found good.
#[derive(Debug)]
pub(super) struct Plan {
    drop: Vec<Dci>,
    add: Vec<(Dci, EndpointKind, EndpointContext)>,
    slot_context: Option<SlotContext>,
    /// Endpoint addresses that get streams, and the highest stream id.
    streams: (Vec<u8>, u16),
}

/// An Input Context in guest memory (§6.2.5).
struct Input<'m, M> {
    mem: &'m M,
    at: u64,
    control: InputControl,
}

impl<'m, M: GuestMem> Input<'m, M> {
    fn read(mem: &'m M, at: u64) -> Result<Self, CompletionCode> {
        let context: Context = read_object(mem, at).map_err(|_| CompletionCode::Trb)?;
        Ok(Self { mem, at, control: InputControl::new(&context) })
    }

    fn context(&self, index: u8) -> Result<Context, CompletionCode> {
        let at = self.at.wrapping_add((u64::from(index) + 1) * CONTEXT_BYTES);
        read_object(self.mem, at).map_err(|_| CompletionCode::Trb)
    }

    fn slot(&self) -> Result<SlotContext, CompletionCode> {
        self.context(0).map(SlotContext)
    }

    fn endpoint(&self, dci: Dci) -> Result<EndpointContext, CompletionCode> {
        self.context(dci.get()).map(EndpointContext)
    }
}

impl Controller {
    fn named_slot(&mut self, slot: u8) -> Result<&mut Slot, CompletionCode> {
        self.slot_mut(slot).ok_or(CompletionCode::SlotNotEnabled)
    }

    /// Address Device (§4.6.5). The host kernel has addressed the device already, so the device is not asked.
    pub(super) fn address_device<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
        input: u64,
        block_set_address: bool,
    ) -> Result<(), CompletionCode> {
        let state = self.named_slot(slot)?.state;
        let allowed = state == SlotState::Enabled || (state == SlotState::Default && !block_set_address);
        if !allowed {
            return Err(CompletionCode::ContextState);
        }
        let input = Input::read(io.mem, input)?;
        if input.control.drop != 0 || input.control.add != 0b11 {
            return Err(CompletionCode::Trb);
        }
        let mut context = input.slot()?;
        let mut control = input.endpoint(Dci::CONTROL)?;
        let kind = control.kind(Dci::CONTROL).ok_or(CompletionCode::Parameter)?;
        if !(8..=512).contains(&control.dword1().max_packet()) || context.dword0().route() != 0 {
            return Err(CompletionCode::Parameter);
        }
        self.check_interrupter(&context)?;
        let port = PortNumber::new(context.dword1().root_port())
            .filter(|port| port.index() < self.ports.len())
            .ok_or(CompletionCode::Parameter)?;
        let mut others = (1..=self.capabilities.slots).filter(|other| *other != slot);
        if others.any(|other| self.slot(other).is_some_and(|other| other.port == Some(port))) {
            return Err(CompletionCode::Trb);
        }
        let found = &self.ports[port.index()];
        let device =
            found.device.as_ref().filter(|_| found.is_enabled()).ok_or(CompletionCode::Transaction)?;
        let (handle, speed) = (device.handle, speed_id(device.speed));
        let entry: [u8; 8] = read_object(io.mem, self.dcbaap.wrapping_add(u64::from(slot) * 8))
            .map_err(|_| CompletionCode::Trb)?;
        let context_at = u64::from_le_bytes(entry) & !0x3f;

        context.set_speed(speed);
        control.set_state(EndpointState::Running);
        let address = if block_set_address { 0 } else { slot };
        self.close_endpoints(slot, |_| true, io.effects);
        let entered = self.named_slot(slot)?;
        entered.state = if block_set_address { SlotState::Default } else { SlotState::Addressed };
        entered.context_at = context_at;
        entered.context = context;
        entered.port = Some(port);
        entered.device = Some(handle);
        let endpoint = Endpoint::new(Dci::CONTROL, kind, control);
        let control_at = entered.endpoint_at(Dci::CONTROL);
        let written = entered
            .write_context(io.mem, address)
            .and_then(|()| io.mem.write(control_at, endpoint.context.0.as_bytes()));
        if written.is_err() {
            entered.state = state;
            return Err(CompletionCode::Trb);
        }
        entered.endpoints[Dci::CONTROL.index()] = Some(Box::new(endpoint));
        Ok(())
    }

    fn check_interrupter(&self, context: &SlotContext) -> Result<(), CompletionCode> {
        let is_there = usize::from(context.dword2().interrupter()) < self.interrupters.len();
        if is_there { Ok(()) } else { Err(CompletionCode::Parameter) }
    }

    /// Evaluate Context (§4.6.7): exit latency and interrupter of the slot, packet size of the default pipe.
    pub(super) fn evaluate_context<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
        input: u64,
    ) -> Result<(), CompletionCode> {
        if !self.named_slot(slot)?.has_context() {
            return Err(CompletionCode::ContextState);
        }
        let input = Input::read(io.mem, input)?;
        if input.control.drop != 0 || input.control.add == 0 {
            return Err(CompletionCode::Trb);
        }
        let given = input.slot()?;
        let max_packet = input.endpoint(Dci::CONTROL)?.dword1().max_packet();
        let evaluates_slot = input.control.add & 1 == 1;
        let evaluates_control = input.control.adds(Dci::CONTROL);
        if evaluates_slot {
            self.check_interrupter(&given)?;
        }
        if evaluates_control && !(8..=512).contains(&max_packet) {
            return Err(CompletionCode::Parameter);
        }
        if evaluates_control {
            let at = self.named_slot(slot)?.endpoint_at(Dci::CONTROL);
            let endpoint = self.endpoint_mut(slot, Dci::CONTROL).ok_or(CompletionCode::EndpointNotEnabled)?;
            endpoint.context.set_max_packet(max_packet);
            endpoint.write_context(io.mem, at);
        }
        if evaluates_slot {
            let entered = self.named_slot(slot)?;
            entered.context.set_latency(given.dword1().max_exit_latency());
            entered.context.set_interrupter(given.dword2().interrupter());
            self.write_slot(io, slot)?;
        }
        Ok(())
    }

    /// Configure Endpoint (§4.6.6).
    pub(super) fn configure_endpoint<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
        input: u64,
        deconfigure: bool,
    ) -> Result<Step, CompletionCode> {
        let state = self.named_slot(slot)?.state;
        if !matches!(state, SlotState::Addressed | SlotState::Configured) {
            return Err(CompletionCode::ContextState);
        }
        let mut plan = if deconfigure {
            let drop = (2..=31).filter_map(Dci::new).filter(|dci| self.endpoint(slot, *dci).is_some());
            Plan { drop: drop.collect(), add: Vec::new(), slot_context: None, streams: (Vec::new(), 0) }
        } else {
            self.plan(&Input::read(io.mem, input)?, slot)?
        };
        if plan.streams.0.is_empty() {
            self.apply(io, slot, &mut plan);
            return Ok(Step::Done(CompletionCode::Success));
        }
        let device = self.slot_device(slot).ok_or(CompletionCode::Transaction)?;
        if !device.options.host_streams {
            return Err(CompletionCode::Resource);
        }
        let handle = device.handle;
        self.free_streams(slot, |dci| plan.drop.contains(&dci), io.effects);
        let (endpoints, streams) = plan.streams.clone();
        let purpose = Purpose::Streams(endpoints.clone());
        let op = DeviceOp::AllocStreams { endpoints, streams };
        let id = self.operate(handle, op, purpose, io.effects).ok_or(CompletionCode::Transaction)?;
        Ok(Step::Wait(Wait::Streams(id, Box::new(plan))))
    }

    /// Checks the input context of Configure Endpoint.
    fn plan<M: GuestMem>(&mut self, input: &Input<'_, M>, slot: u8) -> Result<Plan, CompletionCode> {
        let control = input.control;
        if control.drop & 0b11 != 0 || control.add & 0b10 != 0 {
            return Err(CompletionCode::Trb);
        }
        let given = input.slot()?;
        let takes_slot = control.add & 1 == 1;
        let mut plan =
            Plan { drop: Vec::new(), add: Vec::new(), slot_context: None, streams: (Vec::new(), 0) };
        for dci in (2..=31).filter_map(Dci::new) {
            if control.drops(dci) || control.adds(dci) {
                plan.drop.push(dci);
            }
            if !control.adds(dci) {
                continue;
            }
            if takes_slot && dci.get() > given.dword0().entries() {
                return Err(CompletionCode::Parameter);
            }
            let context = input.endpoint(dci)?;
            let kind = self.check_endpoint(slot, dci, &context)?;
            let max_streams = context.dword0().max_streams();
            if kind == EndpointKind::Bulk && max_streams > 0 {
                plan.streams.0.push(dci.address());
                plan.streams.1 = plan.streams.1.max((2 << max_streams) - 1);
            }
            plan.add.push((dci, kind, context));
        }
        if takes_slot {
            self.check_interrupter(&given)?;
            plan.slot_context = Some(given);
        }
        Ok(plan)
    }

    /// Range checks of an endpoint context (§6.2.3).
    fn check_endpoint(
        &mut self,
        slot: u8,
        dci: Dci,
        context: &EndpointContext,
    ) -> Result<EndpointKind, CompletionCode> {
        let kind = context.kind(dci).ok_or(CompletionCode::Parameter)?;
        let (first, second) = (context.dword0(), context.dword1());
        let is_usb3 = self.slot_device(slot).is_some_and(|device| device.speed.is_usb3());
        let is_bulk = kind == EndpointKind::Bulk;
        let packet_fits = second.max_packet() <= MAX_PACKET && (second.max_packet() > 0 || !is_bulk);
        let burst_fits = second.max_burst() <= 15;
        let interval_fits = is_bulk || first.interval() <= INTERVAL_MAX;
        let mult_fits = first.mult() <= 2;
        let streams_fit = match first.max_streams() {
            0 => true,
            _ if !is_bulk => false,
            count => is_usb3 && self.capabilities.streams && count <= MAX_PSA_SIZE && first.linear_streams(),
        };
        let fits = packet_fits && burst_fits && interval_fits && mult_fits && streams_fit;
        if fits { Ok(kind) } else { Err(CompletionCode::Parameter) }
    }

    /// Carries out a checked Configure Endpoint.
    pub(super) fn apply<M: GuestMem>(&mut self, io: &mut Io<'_, M>, slot: u8, plan: &mut Plan) {
        let keeps_streams = !plan.streams.0.is_empty();
        if !keeps_streams {
            self.free_streams(slot, |dci| plan.drop.contains(&dci), io.effects);
        }
        self.close_endpoints(slot, |dci| plan.drop.contains(&dci), io.effects);
        let Some(entered) = self.slot_mut(slot) else { return };
        for dci in &plan.drop {
            let disabled = Context::default();
            if let Err(fault) = io.mem.write(entered.endpoint_at(*dci), disabled.as_bytes()) {
                common::limited!(debug, %fault, "endpoint context not written");
            }
        }
        for (dci, kind, context) in plan.add.drain(..) {
            let mut endpoint = Box::new(Endpoint::new(dci, kind, context));
            let at = entered.endpoint_at(dci);
            endpoint.write_context(io.mem, at);
            entered.endpoints[dci.index()] = Some(endpoint);
        }
        let last = entered.endpoints.iter().rposition(Option::is_some).unwrap_or(0) as u8 + 1;
        entered.state = if last > 1 { SlotState::Configured } else { SlotState::Addressed };
        let entries = plan.slot_context.map_or(last, |given| given.dword0().entries().max(last));
        entered.context.set_entries(entries);
        if let Some(given) = plan.slot_context {
            entered.context.set_latency(given.dword1().max_exit_latency());
            entered.context.set_interrupter(given.dword2().interrupter());
        }
        if self.write_slot(io, slot).is_err() {
            common::limited!(debug, slot, "slot context not written");
        }
    }

    fn write_slot<M: GuestMem>(&mut self, io: &mut Io<'_, M>, slot: u8) -> Result<(), CompletionCode> {
        let entered = self.named_slot(slot)?;
        let has_address = matches!(entered.state, SlotState::Addressed | SlotState::Configured);
        let address = if has_address { slot } else { 0 };
        entered.write_context(io.mem, address).map_err(|_| CompletionCode::Trb)
    }

    /// Reset Device (§4.6.11). The guest has reset the port before; when it has not, and has talked to the device since,
    /// the device is really reset.
    pub(super) fn reset_device<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
    ) -> Result<Step, CompletionCode> {
        if !matches!(self.named_slot(slot)?.state, SlotState::Addressed | SlotState::Configured) {
            return Err(CompletionCode::ContextState);
        }
        if let Some(device) = self.slot_device(slot)
            && device.touched
            && device.options.reset != ResetPolicy::Never
        {
            let handle = device.handle;
            let id = self
                .operate(handle, DeviceOp::Reset, Purpose::Command, io.effects)
                .ok_or(CompletionCode::Transaction)?;
            return Ok(Step::Wait(Wait::Reset(id)));
        }
        self.device_was_reset(io, slot);
        Ok(Step::Done(CompletionCode::Success))
    }

    /// The slot after a reset of its device: Default, all endpoints but the default pipe gone.
    pub(super) fn device_was_reset<M: GuestMem>(&mut self, io: &mut Io<'_, M>, slot: u8) {
        if let Some(device) = self.slot_device(slot) {
            device.touched = false;
        }
        self.free_streams(slot, |_| true, io.effects);
        let gone: Vec<Dci> =
            (2..=31).filter_map(Dci::new).filter(|dci| self.endpoint(slot, *dci).is_some()).collect();
        self.close_endpoints(slot, |dci| dci != Dci::CONTROL, io.effects);
        self.with_endpoint(slot, Dci::CONTROL, |controller, endpoint| {
            controller.abandon(endpoint, slot, io.effects);
            endpoint.drain = None;
        });
        let Some(entered) = self.slot_mut(slot) else { return };
        for dci in gone {
            if let Err(fault) = io.mem.write(entered.endpoint_at(dci), Context::default().as_bytes()) {
                common::limited!(debug, %fault, "endpoint context not written");
            }
        }
        entered.state = SlotState::Default;
        entered.context.set_entries(1);
        if self.write_slot(io, slot).is_err() {
            common::limited!(debug, slot, "slot context not written");
        }
    }

    /// Disable Slot (§4.6.4).
    pub(super) fn disable_slot<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
    ) -> Result<(), CompletionCode> {
        let entered = self.named_slot(slot)?;
        if entered.has_context() {
            entered.state = SlotState::Enabled;
            if let Err(fault) = entered.write_context(io.mem, 0) {
                common::limited!(debug, %fault, "slot context not written");
            }
        }
        self.free_slot(slot, io.effects);
        Ok(())
    }

    /// Gives a slot and all its transfers up.
    pub(super) fn free_slot(&mut self, slot: u8, effects: &mut Vec<Effect>) {
        self.free_streams(slot, |_| true, effects);
        self.close_endpoints(slot, |_| true, effects);
        if let Some(place) = usize::from(slot).checked_sub(1).and_then(|index| self.slots.get_mut(index)) {
            *place = None;
        }
    }

    /// Takes endpoints out of a slot; their transfers are given up.
    fn close_endpoints(&mut self, slot: u8, which: impl Fn(Dci) -> bool, effects: &mut Vec<Effect>) {
        for dci in (1..=31).filter_map(Dci::new).filter(|dci| which(*dci)) {
            let Some(mut endpoint) = self.slot_mut(slot).and_then(|slot| slot.endpoints[dci.index()].take())
            else {
                continue;
            };
            self.abandon(&mut endpoint, slot, effects);
            self.set_timer(slot, &mut endpoint, None);
        }
    }

    /// Takes the host's streams of these endpoints away. Nobody waits for it; operations of a device keep their order.
    fn free_streams(&mut self, slot: u8, which: impl Fn(Dci) -> bool, effects: &mut Vec<Effect>) {
        let Some(entered) = self.slot(slot) else { return };
        let endpoints: Vec<u8> = entered
            .endpoints
            .iter()
            .flatten()
            .filter(|endpoint| endpoint.streams.is_some() && which(endpoint.dci))
            .map(|endpoint| endpoint.dci.address())
            .collect();
        let device = self.slot_device(slot).map(|device| device.handle);
        if let Some(device) = device
            && !endpoints.is_empty()
        {
            self.operate(device, DeviceOp::FreeStreams { endpoints }, Purpose::Nothing, effects);
        }
    }

    /// The device of a slot is pulled: the slot stays until the guest disables it, nothing of it is in flight any more.
    pub(super) fn device_left<M: GuestMem>(&mut self, io: &mut Io<'_, M>, slot: u8) {
        for dci in (1..=31).filter_map(Dci::new) {
            self.with_endpoint(slot, dci, |controller, endpoint| {
                controller.abandon(endpoint, slot, io.effects);
                if endpoint.drain == Some(super::slot::Drain::Pause) {
                    endpoint.drain = None;
                }
            });
        }
        self.fail_pending(io, slot);
    }
}
