//! The root hub: devices come and go, ports are reset, suspended and resumed, and the guest is told (xHCI 1.2 §4.3, §4.15,
//! §4.19).

use std::time::Duration;

use common::ids::Speed;

use super::GuestMem;
use super::controller::{Controller, Io, Purpose};
use super::port::{AttachOptions, Device, PortNumber, Reset, ResetKind, ResetPolicy};
use super::trb::Trb;
use crate::urb::{DeviceHandle, DeviceOp, Effect, OpError};

/// A port answers a reset in this time, whatever the device does.
const RESET_DEADLINE: Duration = Duration::from_secs(4);

/// Why a device did not get a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// All root ports of its kind are taken.
    #[error("no free root port for a device of {0} speed")]
    NoFreePort(Speed),
    /// The handle is in use.
    #[error("device handle {} is attached already", .0.0)]
    Attached(DeviceHandle),
}

impl Controller {
    /// Puts a device into a free root port of its protocol, also while the controller is halted.
    pub fn attach<M: GuestMem>(
        &mut self,
        now: Duration,
        mem: &M,
        device: DeviceHandle,
        speed: Speed,
        options: AttachOptions,
        effects: &mut Vec<Effect>,
    ) -> Result<PortNumber, AttachError> {
        if self.device_mut(device).is_some() {
            return Err(AttachError::Attached(device));
        }
        let free = |index: &usize| {
            let port = &self.ports[*index];
            port.device.is_none() && port.is_usb3() == speed.is_usb3()
        };
        // A port whose last change the guest has not looked at could hide the new one from it.
        let quiet = (0..self.ports.len()).filter(free).find(|index| !self.ports[*index].has_changes());
        let any = (0..self.ports.len()).find(free);
        let index = quiet.or(any).ok_or(AttachError::NoFreePort(speed))?;
        let port = PortNumber::from_index(index);
        self.ports[index].attach(Device::new(device, speed, options));
        self.port_changed(&mut Io { now, mem, effects }, port);
        Ok(port)
    }

    /// Takes a device out of its port. Its transfers are given up; what still comes of them is dropped.
    pub fn detach<M: GuestMem>(
        &mut self,
        now: Duration,
        mem: &M,
        device: DeviceHandle,
        effects: &mut Vec<Effect>,
    ) {
        let holds =
            |port: &super::port::Port| port.device.as_ref().is_some_and(|found| found.handle == device);
        let Some(index) = self.ports.iter().position(holds) else { return };
        let io = &mut Io { now, mem, effects };
        for slot in 1..=self.capabilities.slots {
            if self.slot(slot).is_some_and(|slot| slot.device == Some(device)) {
                self.device_left(io, slot);
            }
        }
        self.operations.retain(|operation| operation.device != device);
        self.ports[index].detach();
        self.port_changed(io, PortNumber::from_index(index));
    }

    /// A device in a suspended port asks to be resumed (remote wake-up, §4.15.2.3).
    pub fn wake<M: GuestMem>(
        &mut self,
        now: Duration,
        mem: &M,
        device: DeviceHandle,
        effects: &mut Vec<Effect>,
    ) {
        let holds =
            |port: &super::port::Port| port.device.as_ref().is_some_and(|found| found.handle == device);
        let Some(index) = self.ports.iter().position(holds) else { return };
        if self.ports[index].wake() {
            self.resume_device(index, effects);
            self.port_changed(&mut Io { now, mem, effects }, PortNumber::from_index(index));
        }
    }

    /// The port a device is in.
    pub fn port_of(&self, device: DeviceHandle) -> Option<PortNumber> {
        let holds =
            |port: &super::port::Port| port.device.as_ref().is_some_and(|found| found.handle == device);
        self.ports.iter().position(holds).map(PortNumber::from_index)
    }

    /// A change bit was set: USBSTS.PCD and an event (§4.19.2). A halted controller tells it when it starts.
    pub(super) fn port_changed<M: GuestMem>(&mut self, io: &mut Io<'_, M>, port: PortNumber) {
        self.usbsts.set_port_change(true);
        self.post(io, 0, Trb::port_status_change(port.get()), false);
    }

    /// The controller starts: every port with a change the guest has not seen gets its event.
    pub(super) fn announce_ports<M: GuestMem>(&mut self, io: &mut Io<'_, M>) {
        for index in 0..self.ports.len() {
            if self.ports[index].has_changes() {
                self.port_changed(io, PortNumber::from_index(index));
            }
        }
    }

    /// A write of PORTSC.
    pub(super) fn write_portsc<M: GuestMem>(&mut self, io: &mut Io<'_, M>, index: usize, value: u32) {
        let port = PortNumber::from_index(index);
        let write = self.ports[index].write_status(value);
        if write.changed {
            self.port_changed(io, port);
        }
        if write.suspended
            && let Some(device) = &self.ports[index].device
            && self.operate(device.handle, DeviceOp::Suspend, Purpose::Nothing, io.effects).is_some()
            && let Some(device) = &mut self.ports[index].device
        {
            device.asleep = true;
        }
        if write.resumed {
            self.resume_device(index, io.effects);
        }
        if let Some(kind) = write.reset {
            self.reset_port(io, port, kind);
        }
    }

    /// The guest is awake, however the port has left U3.
    pub(super) fn resume_device(&mut self, index: usize, effects: &mut Vec<Effect>) {
        if let Some(device) = &mut self.ports[index].device
            && std::mem::take(&mut device.asleep)
        {
            let handle = device.handle;
            self.operate(handle, DeviceOp::Resume, Purpose::Nothing, effects);
        }
    }

    /// PR or WPR: a real reset unless the policy has it otherwise.
    fn reset_port<M: GuestMem>(&mut self, io: &mut Io<'_, M>, port: PortNumber, kind: ResetKind) {
        let index = port.index();
        let Some(device) = &mut self.ports[index].device else { return };
        let is_real = match device.options.reset {
            ResetPolicy::Never => false,
            ResetPolicy::FirstFree => device.touched,
            ResetPolicy::Always => true,
        };
        let handle = device.handle;
        if is_real {
            let purpose = Purpose::Port(port, kind);
            if let Some(op) = self.operate(handle, DeviceOp::Reset, purpose, io.effects) {
                let deadline = io.now + RESET_DEADLINE;
                let warm = kind == ResetKind::Warm;
                self.ports[index].reset_started(Reset { warm, op, deadline });
                return;
            }
        }
        self.finish_port_reset(io, port, kind, !is_real);
    }

    /// The outcome of the real reset behind PR or WPR.
    pub(super) fn port_reset_done<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        port: PortNumber,
        kind: ResetKind,
        result: Result<(), OpError>,
    ) {
        if self.ports[port.index()].reset.is_some() {
            self.finish_port_reset(io, port, kind, result.is_ok());
        }
    }

    fn finish_port_reset<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        port: PortNumber,
        kind: ResetKind,
        succeeded: bool,
    ) {
        let index = port.index();
        if let Some(device) = &mut self.ports[index].device {
            device.touched = false;
        }
        if self.ports[index].reset_done(kind, succeeded) {
            self.port_changed(io, port);
        }
    }

    /// Ends resets the device does not answer; a late answer finds nothing.
    pub(super) fn expire_port_resets<M: GuestMem>(&mut self, io: &mut Io<'_, M>) {
        for index in 0..self.ports.len() {
            let Some(reset) = self.ports[index].reset.filter(|reset| reset.deadline <= io.now) else {
                continue;
            };
            for operation in self.operations.iter_mut().filter(|operation| operation.id == reset.op) {
                operation.purpose = Purpose::Nothing;
            }
            let kind = if reset.warm { ResetKind::Warm } else { ResetKind::Hot };
            self.finish_port_reset(io, PortNumber::from_index(index), kind, false);
        }
    }
}
