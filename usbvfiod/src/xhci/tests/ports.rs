//! Root ports as a driver sees them (hostile inputs I5, D4; issue: ports and power).

use common::ids::Speed;

use super::super::fixture::{DATA, Guest};
use super::super::regs::OPERATIONAL;
use super::super::{AttachError, AttachOptions};
use crate::urb::{DeviceHandle, DeviceOp};

const POWER: u32 = 1 << 9;
const LINK_WRITE: u32 = 1 << 16;
const CONNECT_CHANGE: u32 = 1 << 17;
const LINK_CHANGE: u32 = 1 << 22;
const RESUME: u32 = 15 << 5;
const U3: u32 = 3 << 5;

#[test]
fn each_speed_gets_a_port_of_its_protocol_and_shows_there() {
    let mut guest = Guest::new();
    let speeds =
        [(Speed::Low, 2), (Speed::Full, 1), (Speed::High, 3), (Speed::Super, 4), (Speed::SuperPlus, 5)];
    for (speed, id) in speeds {
        let (_, port) = guest.plug(speed);
        assert_eq!(port.get() > 15, speed.is_usb3(), "{speed}");
        assert_eq!(guest.read32(Guest::portsc(port)) >> 10 & 0xf, id, "{speed}");
    }
}

#[test]
fn fifteen_devices_of_a_protocol_fit_and_the_next_is_refused() {
    let mut guest = Guest::new();
    for _ in 0..15 {
        guest.plug(Speed::High);
        guest.plug(Speed::Super);
    }
    let options = AttachOptions::default();
    for speed in [Speed::Full, Speed::SuperPlus] {
        let device = DeviceHandle(1000);
        let result =
            guest.controller.attach(guest.now, &guest.mem, device, speed, options, &mut guest.effects);
        assert_eq!(result, Err(AttachError::NoFreePort(speed)));
    }
    let (device, port) = (DeviceHandle(1), guest.controller.port_of(DeviceHandle(1)).unwrap());
    guest.unplug(device);
    assert_eq!(guest.plug(Speed::High).1, port);
}

#[test]
fn device_is_attached_once() {
    let mut guest = Guest::new();
    let (device, _) = guest.plug(Speed::High);
    let options = AttachOptions::default();
    let result =
        guest.controller.attach(guest.now, &guest.mem, device, Speed::High, options, &mut guest.effects);
    assert_eq!(result, Err(AttachError::Attached(device)));
}

#[test]
fn device_plugged_while_halted_is_announced_at_the_start() {
    let mut guest = Guest::new();
    guest.write32(OPERATIONAL, 2);
    let (_, port) = guest.plug(Speed::High);
    assert!(guest.effects.is_empty());
    guest.start();
    let events = guest.events();
    assert_eq!(events.len(), 1);
    assert_eq!((events[0].kind, events[0].pointer >> 24), (34, u64::from(port.get())));
    assert_eq!(guest.interrupts(), 1);
}

#[test]
fn replugged_device_takes_a_port_whose_change_the_guest_has_seen() {
    let mut guest = Guest::new();
    let (device, first) = guest.plug(Speed::High);
    guest.unplug(device);
    let (device, second) = guest.plug(Speed::High);
    assert_ne!(first, second, "the guest has not looked at the first yet");
    guest.unplug(device);
    for port in [first, second] {
        guest.write32(Guest::portsc(port), POWER | CONNECT_CHANGE);
    }
    assert_eq!(guest.plug(Speed::High).1, first);
}

#[test]
fn plug_and_pull_are_told_without_any_guest_activity() {
    let mut guest = Guest::new();
    guest.events();
    guest.interrupts();
    let (device, _) = guest.plug(Speed::High);
    assert_eq!(guest.interrupts(), 1);
    guest.events();
    guest.wait(std::time::Duration::from_millis(50));
    guest.unplug(device);
    assert_eq!(guest.interrupts(), 1);
    assert_eq!(guest.events().len(), 1);
}

#[test]
fn suspend_and_resume_reach_the_device_and_the_guest_is_told_of_u0() {
    let mut guest = Guest::new();
    let (_, port) = guest.plug(Speed::High);
    guest.reset_port(port);
    guest.events();
    let portsc = Guest::portsc(port);
    guest.write32(portsc, POWER | LINK_WRITE | U3);
    assert_eq!(guest.operation().1, DeviceOp::Suspend);
    assert_eq!(guest.read32(portsc) >> 5 & 0xf, 3);
    guest.write32(portsc, POWER | LINK_WRITE | RESUME);
    assert_eq!(guest.operation().1, DeviceOp::Resume);
    assert!(guest.events().is_empty());
    guest.write32(portsc, POWER | LINK_WRITE);
    assert_eq!(guest.events().len(), 1);
    assert_eq!(guest.read32(portsc) & (LINK_CHANGE | 0xf << 5), LINK_CHANGE);
}

#[test]
fn device_that_wakes_up_is_told() {
    for speed in [Speed::High, Speed::Super] {
        let mut guest = Guest::new();
        let (device, port) = guest.plug(speed);
        guest.reset_port(port);
        guest.write32(Guest::portsc(port), POWER | LINK_WRITE | U3);
        guest.events();
        guest.operations();
        guest.controller.wake(guest.now, &guest.mem, device, &mut guest.effects);
        guest.settle();
        assert_eq!(guest.events().len(), 1, "{speed}");
        assert_eq!(guest.operation().1, DeviceOp::Resume);
        assert_ne!(guest.read32(Guest::portsc(port)) & LINK_CHANGE, 0);
    }
}

/// A suspended device, and how the port leaves U3: each way wakes the device.
#[test]
fn each_way_out_of_u3_wakes_the_device() {
    const PORT_RESET: u32 = 1 << 4;
    const PORT_ENABLED: u32 = 1 << 1;
    const WARM_RESET: u32 = 1 << 31;
    let ways = [
        (Speed::High, POWER | PORT_RESET),
        (Speed::High, POWER | PORT_ENABLED),
        (Speed::High, 0),
        (Speed::High, POWER | LINK_WRITE | RESUME),
        (Speed::Super, POWER | WARM_RESET),
        (Speed::Super, POWER | LINK_WRITE),
        (Speed::Super, POWER | LINK_WRITE | 4 << 5),
    ];
    for (speed, value) in ways {
        let (mut guest, portsc) = suspended(speed);
        guest.write32(portsc, value);
        assert_eq!(guest.operation().1, DeviceOp::Resume, "{speed} {value:#x}");
    }
    let (mut guest, _) = suspended(Speed::High);
    guest.write32(OPERATIONAL, 1 << 1);
    assert_eq!(guest.operation().1, DeviceOp::Resume, "reset of the controller");
}

fn suspended(speed: Speed) -> (Guest, u64) {
    let mut guest = Guest::new();
    let (_, port) = guest.plug(speed);
    guest.reset_port(port);
    guest.write32(Guest::portsc(port), POWER | LINK_WRITE | U3);
    guest.operations();
    guest.effects.clear();
    (guest, Guest::portsc(port))
}

#[test]
fn storm_of_suspends_ends_awake_and_piles_nothing_up() {
    let (mut guest, portsc) = suspended(Speed::Super);
    for _ in 0..1000 {
        guest.write32(portsc, POWER | LINK_WRITE);
        guest.write32(portsc, POWER | LINK_WRITE | U3);
    }
    guest.write32(portsc, POWER | LINK_WRITE);
    let operations: Vec<_> = guest.operations().into_iter().map(|(_, op)| op).collect();
    assert!(operations.len() < 16, "{}", operations.len());
    assert_eq!(operations.last(), Some(&DeviceOp::Resume));
}

#[test]
fn wake_of_a_device_that_is_awake_or_unknown_does_nothing() {
    let mut guest = Guest::new();
    let (device, _) = guest.plug(Speed::High);
    guest.effects.clear();
    for device in [device, DeviceHandle(77)] {
        guest.controller.wake(guest.now, &guest.mem, device, &mut guest.effects);
    }
    assert!(guest.effects.is_empty());
}

#[test]
fn warm_reset_of_a_used_device_sets_both_changes_when_it_is_done() {
    let mut guest = Guest::new();
    let (device, slot) = guest.configured(Speed::Super, &[(4, 2, 1024, 0)]);
    guest.normal(slot, 4, DATA, 8);
    let portsc = Guest::portsc(guest.controller.port_of(device).unwrap());
    guest.write32(portsc, POWER | 1 << 31);
    let status = guest.read32(portsc);
    assert_eq!((status >> 4 & 1, status >> 19 & 1), (1, 0));
    guest.effects.retain(|effect| matches!(effect, crate::urb::Effect::Operate { .. }));
    let (id, _) = guest.operation();
    guest.operation_done(id, Ok(()));
    let status = guest.read32(portsc);
    assert_eq!((status >> 4 & 1, status >> 19 & 1, status >> 21 & 1, status >> 1 & 1), (0, 1, 1, 1));
}

#[test]
fn device_pulled_during_its_reset_ends_it() {
    let mut guest = Guest::new();
    let options = AttachOptions { reset: super::super::ResetPolicy::Always, ..AttachOptions::default() };
    let (device, port) = guest.plug_with(Speed::High, options);
    guest.write32(Guest::portsc(port), POWER | 1 << 4);
    let (id, _) = guest.operation();
    guest.unplug(device);
    assert_eq!(guest.read32(Guest::portsc(port)) & (1 | 2 | 1 << 4), 0);
    guest.operation_done(id, Ok(()));
    assert_eq!(guest.read32(Guest::portsc(port)) & (1 | 2 | 1 << 4), 0);
    assert_eq!(guest.controller.next_deadline(), None);
}

#[test]
fn another_device_in_the_port_is_not_the_slots() {
    let mut guest = Guest::new();
    let (device, slot) = guest.bulk();
    let port = guest.controller.port_of(device).unwrap();
    guest.unplug(device);
    guest.write32(Guest::portsc(port), POWER | 0x7f << 17);
    let (_, again) = guest.plug(Speed::High);
    assert_eq!(again, port);
    guest.events();
    guest.normal(slot, 4, DATA, 8);
    assert!(guest.submitted().is_empty());
    assert_eq!(guest.transfers().len(), 1);
}
