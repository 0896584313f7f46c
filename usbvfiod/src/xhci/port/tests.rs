//! Ports alone, without a controller.

use super::*;

fn attached(usb3: bool) -> Port {
    let speed = if usb3 { Speed::Super } else { Speed::High };
    let mut port = Port::new(usb3);
    assert!(port.attach(Device::new(DeviceHandle(1), speed, AttachOptions::default())));
    port
}

fn running(usb3: bool) -> Port {
    let mut port = attached(usb3);
    port.reset_done(ResetKind::Hot, true);
    port.write_status(port.neutral() | 0x7f << 17);
    port
}

fn link(port: &mut Port, state: u32) -> PortWrite {
    port.write_status(port.neutral() | 1 << 16 | state << 5)
}

fn read(port: &Port) -> Portsc {
    Portsc::from_bits(port.status())
}

#[test]
fn usb2_device_waits_in_polling_for_its_reset() {
    let mut port = attached(false);
    let status = read(&port);
    assert!(status.connected() && !status.enabled());
    assert_eq!((status.link_state(), status.speed(), status.changes()), (7, 3, change::CONNECT));

    let write = port.write_status(port.neutral() | 1 << 4);
    assert_eq!(write.reset, Some(ResetKind::Hot));
    assert!(port.reset_done(ResetKind::Hot, true));
    let status = read(&port);
    assert!(status.enabled() && !status.reset());
    assert_eq!((status.link_state(), status.changes()), (0, change::CONNECT | change::RESET));
}

#[test]
fn usb3_device_is_enabled_without_reset() {
    let status = read(&attached(true));
    assert!(status.enabled());
    assert_eq!((status.link_state(), status.speed()), (0, 4));
}

#[test]
fn change_bits_are_cleared_by_writing_one_and_only_those() {
    let mut port = attached(false);
    port.reset_done(ResetKind::Hot, true);
    port.write_status(port.neutral() | 1 << 17);
    assert_eq!(read(&port).changes(), change::RESET);
}

#[test]
fn writing_enabled_disables() {
    let mut port = running(false);
    port.write_status(port.neutral() | 1 << 1);
    assert!(!read(&port).enabled());
}

#[test]
fn warm_reset_sets_its_own_change_too_and_is_ignored_on_usb2() {
    let mut port = running(true);
    assert_eq!(port.write_status(port.neutral() | 1 << 31).reset, Some(ResetKind::Warm));
    port.reset_done(ResetKind::Warm, true);
    assert_eq!(read(&port).changes(), change::RESET | change::WARM_RESET);
    let mut port = running(false);
    assert_eq!(port.write_status(port.neutral() | 1 << 31).reset, None);
}

#[test]
fn link_state_needs_the_write_strobe() {
    let mut port = running(true);
    port.write_status(port.neutral() | 3 << 5);
    assert_eq!(read(&port).link_state(), 0);
}

#[test]
fn usb2_suspend_and_resume_go_through_resume_state() {
    let mut port = running(false);
    assert!(link(&mut port, 3).suspended);
    assert_eq!((read(&port).link_state(), read(&port).changes()), (3, 0));
    assert!(link(&mut port, 15).resumed);
    assert_eq!(read(&port).link_state(), 15);
    assert!(link(&mut port, 0).changed);
    assert_eq!((read(&port).link_state(), read(&port).changes()), (0, change::LINK));
}

#[test]
fn usb3_resume_is_one_write() {
    let mut port = running(true);
    link(&mut port, 3);
    let write = link(&mut port, 0);
    assert!(write.resumed && write.changed);
    assert_eq!(read(&port).link_state(), 0);
}

#[test]
fn device_wakes_a_suspended_port_only() {
    let mut port = running(false);
    assert!(!port.wake());
    link(&mut port, 3);
    assert!(port.wake());
    assert_eq!((read(&port).link_state(), read(&port).changes()), (15, change::LINK));
    let mut port = running(true);
    link(&mut port, 3);
    assert!(port.wake());
    assert_eq!((read(&port).link_state(), read(&port).changes()), (15, change::LINK));
    assert!(!link(&mut port, 0).resumed, "the device is awake already");
    assert_eq!(read(&port).link_state(), 0);
}

#[test]
fn failed_reset_leaves_the_port_disabled() {
    let mut port = running(true);
    port.reset_done(ResetKind::Hot, false);
    assert_eq!((read(&port).enabled(), read(&port).link_state()), (false, 6));
    let mut port = running(false);
    port.reset_done(ResetKind::Hot, false);
    assert_eq!((read(&port).enabled(), read(&port).link_state()), (false, 7));
}

#[test]
fn disabled_usb3_link_trains_again_on_rx_detect() {
    let mut port = running(true);
    link(&mut port, 4);
    assert_eq!((read(&port).enabled(), read(&port).link_state()), (false, 4));
    assert!(link(&mut port, 5).changed);
    assert!(read(&port).enabled());
}

#[test]
fn power_off_hides_the_device_and_power_on_shows_it_again() {
    let mut port = running(false);
    port.write_status(0);
    assert_eq!(port.status() & 0x203, 0);
    assert!(port.write_status(1 << 9).changed);
    assert!(read(&port).connected());
}

#[test]
fn detach_and_attach_in_ten_milliseconds_stay_one_connect_change() {
    let mut port = running(false);
    assert!(port.detach());
    let device = Device::new(DeviceHandle(2), Speed::Full, AttachOptions::default());
    assert!(!port.attach(device), "the bit is set already");
    assert_eq!((read(&port).speed(), read(&port).changes()), (1, change::CONNECT));
}

#[test]
fn writes_to_an_empty_port_change_nothing() {
    let mut port = Port::new(true);
    for value in [u32::MAX, 1 << 4, 1 << 31, 1 << 16 | 3 << 5] {
        assert_eq!(port.write_status(value | 1 << 9).reset, None);
    }
    assert!(!read(&port).connected() && !read(&port).enabled());
}
