//! Root hub ports: status register and link states (xHCI 1.2 §4.15, §4.19, §5.4.8). A port does not know slots or
//! transfers; what needs the real device is left to the caller.

use std::time::Duration;

use common::ids::Speed;

use super::regs::Portsc;
use crate::urb::{DeviceHandle, OpId, TransferId};

/// Number of a root hub port, 1 and up, as the guest counts them (§5.4.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortNumber(u8);

impl PortNumber {
    /// The port at this place of the controller's table.
    pub(super) fn from_index(index: usize) -> Self {
        Self(index as u8 + 1)
    }

    /// Takes a Root Hub Port Number field. 0 is no port.
    pub(super) fn new(raw: u8) -> Option<Self> {
        (raw != 0).then_some(Self(raw))
    }

    /// The number, 1 and up.
    pub fn get(self) -> u8 {
        self.0
    }

    pub(super) fn index(self) -> usize {
        usize::from(self.0) - 1
    }
}

impl std::fmt::Display for PortNumber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// What a reset of the port by the guest does to the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ResetPolicy {
    /// Nothing: the device only seems to be reset. For devices that do not survive a reset.
    Never,
    /// A reset of a fresh device does nothing, as the host has just reset it; others are real. A device is fresh after
    /// attach and after a real reset, as long as the guest only reads descriptors and all goes well (a Linux guest resets a
    /// port twice while it does so).
    #[default]
    FirstFree,
    /// Every reset is real.
    Always,
}

/// What the daemon knows of a device and the controller needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttachOptions {
    /// What a reset by the guest does.
    pub reset: ResetPolicy,
    /// `bConfigurationValue` that is active on the host. A first SET_CONFIGURATION to it is not carried out: in the kernel
    /// it would reset the device lightly. None: always carried out.
    pub configuration: Option<u8>,
    /// Whether the host can give streams to the device's bulk endpoints.
    pub host_streams: bool,
}

/// Bits of PORTSC.CSC and up, as in [`Portsc::changes`].
pub(super) mod change {
    pub(in super::super) const CONNECT: u8 = 1 << 0;
    pub(in super::super) const WARM_RESET: u8 = 1 << 2;
    pub(in super::super) const RESET: u8 = 1 << 4;
    pub(in super::super) const LINK: u8 = 1 << 5;
}

/// Port Link State (Table 5-27), those a port of ours can be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Link {
    U0 = 0,
    U3 = 3,
    Disabled = 4,
    RxDetect = 5,
    Inactive = 6,
    Polling = 7,
    Resume = 15,
}

/// A reset in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reset {
    /// WPR, or PR.
    pub(super) warm: bool,
    /// The real reset that goes with it.
    pub(super) op: OpId,
    /// The port answers by then, whatever the device does.
    pub(super) deadline: Duration,
}

/// A device in its port.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) handle: DeviceHandle,
    pub(super) speed: Speed,
    pub(super) options: AttachOptions,
    /// The device is not fresh any more, see [`ResetPolicy::FirstFree`].
    pub(super) touched: bool,
    /// Transfers the guest has given up, that the device has not given back: nothing new goes to their endpoint.
    pub(super) lingering: Vec<(TransferId, u8)>,
    /// Operations whose outcome is not known yet.
    pub(super) operations: u8,
    /// It was told that the guest sleeps, and not yet that it is awake again.
    pub(super) asleep: bool,
}

impl Device {
    pub(super) fn new(handle: DeviceHandle, speed: Speed, options: AttachOptions) -> Self {
        Self { handle, speed, options, touched: false, lingering: Vec::new(), operations: 0, asleep: false }
    }
}

/// What a write of PORTSC asks of the caller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PortWrite {
    /// A reset of the device; [`Port::reset_done`] follows.
    pub(super) reset: Option<ResetKind>,
    /// A change bit was set: a Port Status Change Event is due.
    pub(super) changed: bool,
    /// The link went into U3.
    pub(super) suspended: bool,
    /// The link left U3.
    pub(super) resumed: bool,
}

/// PR or WPR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ResetKind {
    Hot,
    Warm,
}

/// One root hub port.
#[derive(Debug)]
pub(super) struct Port {
    usb3: bool,
    powered: bool,
    enabled: bool,
    link: Link,
    changes: u8,
    wake_enables: u8,
    indicator: u8,
    power_management: u32,
    /// Set while PR reads 1.
    pub(super) reset: Option<Reset>,
    pub(super) device: Option<Device>,
}

impl Port {
    /// A powered, empty port.
    pub(super) fn new(usb3: bool) -> Self {
        Self {
            usb3,
            powered: true,
            enabled: false,
            link: Link::RxDetect,
            changes: 0,
            wake_enables: 0,
            indicator: 0,
            power_management: 0,
            reset: None,
            device: None,
        }
    }

    pub(super) fn is_usb3(&self) -> bool {
        self.usb3
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Whether the guest has still to look at changes here.
    pub(super) fn has_changes(&self) -> bool {
        self.changes != 0
    }

    /// PORTSC as read.
    pub(super) fn status(&self) -> u32 {
        let connected = self.powered && self.device.is_some();
        let speed = match &self.device {
            Some(device) if self.powered => speed_id(device.speed),
            _ => 0,
        };
        Portsc::new()
            .with_connected(connected)
            .with_enabled(self.enabled)
            .with_reset(self.reset.is_some())
            .with_link_state(self.link as u8)
            .with_power(self.powered)
            .with_speed(speed)
            .with_indicator(self.indicator)
            .with_changes(self.changes)
            .with_wake_enables(self.wake_enables)
            .into_bits()
    }

    /// The value that changes nothing when it is written, for bytes that a narrow write leaves out.
    pub(super) fn neutral(&self) -> u32 {
        Portsc::new()
            .with_power(self.powered)
            .with_indicator(self.indicator)
            .with_wake_enables(self.wake_enables)
            .into_bits()
    }

    /// PORTPMSC as read.
    pub(super) fn power_management(&self) -> u32 {
        self.power_management
    }

    /// A write of PORTPMSC (§5.4.9): kept for the guest; without LPM and test modes it has no effect.
    pub(super) fn write_power_management(&mut self, value: u32) {
        self.power_management = value & if self.usb3 { 0xffff } else { 0xfff8 };
    }

    /// As after power-on. A device that is there shows as a new connection. True when a change bit was set.
    pub(super) fn power_on(&mut self) -> bool {
        *self = Self { device: self.device.take(), ..Self::new(self.usb3) };
        self.device.is_some() && self.connect()
    }

    /// Puts a device in. True when a change bit was set.
    pub(super) fn attach(&mut self, device: Device) -> bool {
        self.device = Some(device);
        self.powered && self.connect()
    }

    /// Takes the device out. True when a change bit was set.
    pub(super) fn detach(&mut self) -> bool {
        self.device = None;
        self.reset = None;
        self.enabled = false;
        if !self.powered {
            return false;
        }
        self.link = Link::RxDetect;
        self.change(change::CONNECT)
    }

    /// A USB 3 link trains by itself; a USB 2 port waits for a reset (§4.19.1.1, §4.19.1.2).
    fn connect(&mut self) -> bool {
        self.enabled = self.usb3;
        self.link = if self.usb3 { Link::U0 } else { Link::Polling };
        self.change(change::CONNECT)
    }

    fn change(&mut self, bits: u8) -> bool {
        let is_new = bits & !self.changes != 0;
        self.changes |= bits;
        is_new
    }

    /// A write of PORTSC.
    pub(super) fn write_status(&mut self, value: u32) -> PortWrite {
        let value = Portsc::from_bits(value);
        let mut result = PortWrite::default();
        self.changes &= !value.changes();
        self.wake_enables = value.wake_enables();
        self.indicator = value.indicator();
        if value.power() != self.powered {
            result.resumed = self.link == Link::U3;
            result.changed |= self.switch_power(value.power());
            return result;
        }
        if self.device.is_none() || !self.powered {
            return result;
        }
        if value.warm_reset() && self.usb3 {
            result.resumed = self.link == Link::U3;
            result.reset = self.reset.is_none().then_some(ResetKind::Warm);
        } else if value.reset() {
            result.resumed = self.link == Link::U3;
            result.reset = self.reset.is_none().then_some(ResetKind::Hot);
        } else if value.enabled() {
            if self.enabled {
                result.resumed = self.link == Link::U3;
                self.enabled = false;
                self.link = if self.usb3 { Link::Disabled } else { Link::Polling };
            }
        } else if value.link_write() && self.reset.is_none() {
            self.write_link(value.link_state(), &mut result);
        }
        result
    }

    /// PP. Power off takes connection and changes away; power on shows the device anew.
    fn switch_power(&mut self, on: bool) -> bool {
        self.powered = on;
        if on {
            return self.device.is_some() && self.connect();
        }
        self.enabled = false;
        self.reset = None;
        self.link = Link::Disabled;
        self.changes = 0;
        false
    }

    /// PLS with LWS (§4.19.1, Table 5-27). Transitions the port cannot make are ignored.
    fn write_link(&mut self, state: u8, result: &mut PortWrite) {
        match (state, self.link) {
            (0, Link::U3 | Link::Resume) if self.enabled => {
                result.resumed = self.link == Link::U3;
                self.link = Link::U0;
                result.changed |= self.change(change::LINK);
            }
            (3, Link::U0) if self.enabled => {
                self.link = Link::U3;
                result.suspended = true;
            }
            (15, Link::U3) if self.enabled && !self.usb3 => {
                self.link = Link::Resume;
                result.resumed = true;
            }
            (4, _) if self.usb3 => {
                result.resumed = self.link == Link::U3;
                self.enabled = false;
                self.link = Link::Disabled;
            }
            (5, Link::Disabled | Link::Inactive) if self.usb3 => result.changed |= self.connect(),
            _ => {}
        }
    }

    /// The device asks to be resumed (§4.15.2). True when a change bit was set. The port stays in Resume until the guest
    /// writes U0.
    pub(super) fn wake(&mut self) -> bool {
        if self.link != Link::U3 || !self.enabled {
            return false;
        }
        self.link = Link::Resume;
        self.change(change::LINK)
    }

    /// PR or WPR was written and the device takes its time.
    pub(super) fn reset_started(&mut self, reset: Reset) {
        self.reset = Some(reset);
        if !self.usb3 {
            self.enabled = false;
        }
    }

    /// The reset is over. True when a change bit was set. After a failure the port is not enabled: the guest sees a
    /// device that does not come back.
    pub(super) fn reset_done(&mut self, kind: ResetKind, succeeded: bool) -> bool {
        self.reset = None;
        self.enabled = succeeded && self.device.is_some() && self.powered;
        self.link = match (self.enabled, self.usb3) {
            (true, _) => Link::U0,
            (false, true) => Link::Inactive,
            (false, false) => Link::Polling,
        };
        let warm = if kind == ResetKind::Warm { change::WARM_RESET } else { 0 };
        self.change(change::RESET | warm)
    }
}

/// Protocol Speed ID, the default ones (Table 7-13).
pub(super) fn speed_id(speed: Speed) -> u8 {
    match speed {
        Speed::Full => 1,
        Speed::Low => 2,
        Speed::High => 3,
        Speed::Super => 4,
        Speed::SuperPlus => 5,
    }
}

#[cfg(test)]
mod tests;
