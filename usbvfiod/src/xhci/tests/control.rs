//! The default pipe (hostile inputs T1–T4, S7–S9, CVE-2020-14364, CVE-2024-8354).

use common::ids::Speed;

use super::super::AttachOptions;
use super::super::fixture::{CHAIN, DATA, Guest, IDT, IOC, ISP, event_data, normal, setup_trb};
use super::super::trb::Trb;
use crate::urb::{DeviceOp, OpError, Payload, Segment, TransferKind, UrbStatus};

const SUCCESS: u8 = 1;
const TRB: u8 = 5;
const STALL: u8 = 6;
const SHORT: u8 = 13;

const ERROR: u8 = 4;
const IN: u32 = 1 << 16;

fn setup(request_type: u8, request: u8, length: u16) -> [u8; 8] {
    let [low, high] = length.to_le_bytes();
    [request_type, request, 0, 0, 0, 0, low, high]
}

fn data(len: u32, flags: u32) -> Trb {
    Trb::new(DATA, len, 3 << 10 | flags)
}

fn status(flags: u32) -> Trb {
    Trb::new(0, 0, 4 << 10 | flags)
}

fn addressed() -> (Guest, u8) {
    let mut guest = Guest::new();
    let (_, slot) = guest.enumerate(Speed::High);
    guest.effects.clear();
    (guest, slot)
}

/// Queues these TRBs on a fresh default pipe; whether the device was asked, and the state of the endpoint.
fn outcome(trbs: &[Trb]) -> (usize, u8) {
    let (mut guest, slot) = addressed();
    for trb in trbs {
        guest.push(slot, 1, *trb);
    }
    guest.ring(slot, 1);
    (guest.submitted().len(), guest.endpoint(slot, 1).0)
}

#[test]
fn stages_out_of_order_are_trb_errors() {
    let get = setup_trb(setup(0x80, 6, 8));
    let short_setup = Trb::new(0, 7, 2 << 10 | IDT);
    let setup_elsewhere = Trb::new(DATA, 8, 2 << 10);
    let bad: [&[Trb]; 8] = [
        &[short_setup],
        &[setup_elsewhere],
        &[status(IN)],
        &[data(8, IN)],
        &[get, get],
        &[normal(DATA, 8, 0)],
        &[get, data(8, IN), data(8, IN)],
        &[get, Trb::new(0, 0, 5 << 10)],
    ];
    for trbs in bad {
        assert_eq!(outcome(trbs), (0, ERROR), "{trbs:?}");
    }
    assert_eq!(outcome(&[get]), (0, 1), "the rest may still come");
    assert_eq!(outcome(&[get, data(8, IN)]), (0, 1));
}

#[test]
fn directions_of_the_stages_must_agree_with_the_setup_packet() {
    for setup_in in [false, true] {
        for data_in in [false, true] {
            for status_in in [false, true] {
                for has_data in [false, true] {
                    let direction = |is_in| if is_in { IN } else { 0 };
                    let request_type = if setup_in { 0xc0 } else { 0x40 };
                    let mut trbs = vec![setup_trb(setup(request_type, 1, if has_data { 8 } else { 0 }))];
                    if has_data {
                        trbs.push(data(8, direction(data_in)));
                    }
                    trbs.push(status(direction(status_in)));
                    let expects_in = !(has_data && setup_in);
                    let fits = status_in == expects_in && (!has_data || data_in == setup_in);
                    let expected = if fits { (1, 1) } else { (0, ERROR) };
                    assert_eq!(outcome(&trbs), expected, "{setup_in} {data_in} {status_in} {has_data}");
                }
            }
        }
    }
}

#[test]
fn data_stage_longer_than_wlength_is_an_error_and_a_shorter_one_is_not() {
    let trbs = |len| [setup_trb(setup(0xc0, 1, 64)), data(len, IN), status(0)];
    assert_eq!(outcome(&trbs(65)), (0, ERROR));
    assert_eq!(outcome(&trbs(0x1_ffff)), (0, ERROR));
    assert_eq!(outcome(&trbs(64)), (1, 1));
    assert_eq!(outcome(&trbs(10)), (1, 1));
    assert_eq!(outcome(&[setup_trb(setup(0xc0, 1, 0)), data(8, IN), status(0)]), (0, ERROR));
}

#[test]
fn data_stage_of_65535_bytes_in_several_trbs_is_one_transfer() {
    let (mut guest, slot) = addressed();
    guest.push(slot, 1, setup_trb(setup(0x40, 1, 65535)));
    guest.push(slot, 1, data(0x8000, CHAIN));
    guest.push(slot, 1, normal(DATA + 0x10000, 0x7fff, 0));
    let last = guest.push(slot, 1, status(IN | IOC));
    guest.ring(slot, 1);
    let request = guest.request();
    let segments = vec![Segment { addr: DATA, len: 0x8000 }, Segment { addr: DATA + 0x10000, len: 0x7fff }];
    assert_eq!((request.len, request.payload), (65535, Payload::Guest(segments)));
    guest.complete(request.id, UrbStatus::Completed, 65535);
    assert_eq!(guest.transfers(), [(last, SUCCESS, 0)]);
}

#[test]
fn setup_packet_never_goes_to_another_endpoint() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let at = guest.push(slot, 4, setup_trb(setup(0x80, 6, 8)));
    guest.ring(slot, 4);
    assert!(guest.submitted().is_empty());
    assert_eq!(guest.transfers(), [(at, TRB, 0)]);
}

#[test]
fn immediate_data_is_for_out_and_eight_bytes() {
    let send = setup_trb(setup(0x40, 1, 8));
    let get = setup_trb(setup(0xc0, 1, 8));
    assert_eq!(outcome(&[send, data(8, IDT), status(IN)]), (1, 1));
    assert_eq!(outcome(&[send, data(9, IDT), status(IN)]), (0, ERROR));
    assert_eq!(outcome(&[get, data(8, IDT | IN), status(0)]), (0, ERROR));
    assert_eq!(outcome(&[send, data(4, IDT | CHAIN), normal(DATA, 4, 0), status(IN)]), (0, ERROR));

    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.push(slot, 4, Trb::new(0x0807_0605_0403_0201, 3, 1 << 10 | IDT | IOC));
    guest.ring(slot, 4);
    let request = guest.request();
    assert_eq!(request.payload, Payload::Immediate { bytes: [1, 2, 3, 4, 5, 6, 7, 8], len: 3 });
    assert_eq!(request.len, 3);
}

#[test]
fn event_data_reports_each_stage() {
    let (mut guest, slot) = addressed();
    guest.push(slot, 1, setup_trb(setup(0xc0, 1, 64)));
    guest.push(slot, 1, data(64, IN | CHAIN));
    guest.push(slot, 1, event_data(0x1111, 0));
    guest.push(slot, 1, status(CHAIN));
    guest.push(slot, 1, event_data(0x2222, 0));
    guest.ring(slot, 1);
    let request = guest.request();
    guest.complete(request.id, UrbStatus::Completed, 10);
    assert_eq!(guest.transfers(), [(0x1111, SHORT, 10), (0x2222, SUCCESS, 0)]);
}

#[test]
fn event_data_first_or_alone_does_no_harm() {
    assert_eq!(outcome(&[event_data(1, 0)]), (0, 1));
    assert_eq!(outcome(&[event_data(1, CHAIN), setup_trb(setup(0, 1, 0)), status(IN)]), (1, 1));
}

#[test]
fn stall_is_told_of_the_data_stage_or_the_status_stage() {
    let (mut guest, slot) = addressed();
    let at = guest.control(slot, setup(0xc0, 1, 64), DATA);
    let request = guest.request();
    guest.complete(request.id, UrbStatus::Stalled, 0);
    assert_eq!(guest.transfers(), [(at[1], STALL, 64)]);
    assert_eq!(guest.endpoint(slot, 1), (2, at[0] | 1));

    let (mut guest, slot) = addressed();
    let at = guest.control(slot, setup(0x40, 1, 0), 0);
    let request = guest.request();
    guest.complete(request.id, UrbStatus::Stalled, 0);
    assert_eq!(guest.transfers(), [(at[1], STALL, 0)]);
}

#[test]
fn control_transfers_go_to_the_device_one_at_a_time() {
    let (mut guest, slot) = addressed();
    guest.control(slot, setup(0xc0, 1, 8), DATA);
    guest.control(slot, setup(0xc0, 2, 8), DATA);
    let first = guest.request();
    guest.complete(first.id, UrbStatus::Completed, 8);
    let second = guest.request();
    assert_eq!(second.kind, TransferKind::Control { setup: setup(0xc0, 2, 8) });
}

#[test]
fn set_address_never_reaches_the_device() {
    let (mut guest, slot) = addressed();
    let at = guest.control(slot, [0, 5, 9, 0, 0, 0, 0, 0], 0);
    assert!(guest.submitted().is_empty() && guest.operations().is_empty());
    assert_eq!(guest.transfers(), [(at[1], SUCCESS, 0)]);
}

#[test]
fn standard_requests_out_of_range_stall_without_the_device() {
    for setup in [[0, 9, 0, 1, 0, 0, 0, 0], [1, 11, 0, 0, 0, 1, 0, 0], [1, 11, 0, 1, 0, 0, 0, 0]] {
        let (mut guest, slot) = addressed();
        let at = guest.control(slot, setup, 0);
        assert!(guest.submitted().is_empty() && guest.operations().is_empty());
        assert_eq!(guest.transfers(), [(at[1], STALL, 0)]);
    }
    let (mut guest, slot) = addressed();
    let at = guest.control(slot, [0, 9, 1, 0, 0, 0, 4, 0], DATA);
    assert_eq!(guest.transfers(), [(at[1], STALL, 4)]);
}

#[test]
fn requests_to_odd_recipients_go_to_the_device() {
    for request_type in [0x03, 0x1f, 0x60, 0x7f] {
        let (mut guest, slot) = addressed();
        guest.control(slot, setup(request_type, 9, 0), 0);
        assert_eq!(guest.submitted().len(), 1, "{request_type:#x}");
    }
}

#[test]
fn first_set_configuration_to_the_active_value_is_not_carried_out() {
    let mut guest = Guest::new();
    let options = AttachOptions { configuration: Some(1), ..AttachOptions::default() };
    let (_, port) = guest.plug_with(Speed::High, options);
    guest.reset_port(port);
    let slot = guest.address(port);
    let at = guest.control(slot, [0, 9, 1, 0, 0, 0, 0, 0], 0);
    assert!(guest.operations().is_empty());
    assert_eq!(guest.transfers(), [(at[1], SUCCESS, 0)]);
    guest.control(slot, [0, 9, 1, 0, 0, 0, 0, 0], 0);
    assert_eq!(guest.operation().1, DeviceOp::SetConfiguration { value: 1 });
}

#[test]
fn clear_halt_takes_transfers_of_the_endpoint_back_first_and_starts_them_again() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.normal(slot, 3, DATA, 512);
    let first = guest.request();
    let at = guest.control(slot, [2, 1, 0, 0, 0x81, 0, 0, 0], 0);
    assert_eq!(guest.cancelled().0, [first.id]);
    let (id, op) = guest.operation();
    assert_eq!(op, DeviceOp::ClearHalt { endpoint: 0x81 });
    guest.complete(first.id, UrbStatus::Cancelled, 0);
    assert_eq!(guest.request().len, 512);
    guest.operation_done(id, Ok(()));
    assert_eq!(guest.transfers(), [(at[1], SUCCESS, 0)]);
}

#[test]
fn stopped_operation_is_forgotten_and_its_late_outcome_dropped() {
    let (mut guest, slot) = addressed();
    let at = guest.control(slot, [1, 11, 1, 0, 0, 0, 0, 0], 0);
    let (id, _) = guest.operation();
    assert_eq!(guest.slot_command(15, slot, 1, 0), SUCCESS);
    assert_eq!(guest.endpoint(slot, 1), (3, at[0] | 1));
    guest.operation_done(id, Err(OpError::Failed));
    assert!(guest.transfers().is_empty());
}

#[test]
fn operations_of_a_stuck_device_are_bounded() {
    let (mut guest, slot) = addressed();
    for _ in 0..20 {
        guest.control(slot, [1, 11, 1, 0, 0, 0, 0, 0], 0);
        guest.slot_command(15, slot, 1, 0);
        guest.slot_command(14, slot, 1, 0);
        let field = guest.enqueue_field(slot, 1);
        guest.slot_command(16, slot, 1, field);
    }
    assert_eq!(guest.operations().len(), 8);
}

#[test]
fn stopped_control_transfer_is_told_of_its_data_stage_and_starts_over() {
    let (mut guest, slot) = addressed();
    let at = guest.control(slot, setup(0xc0, 1, 64), DATA);
    let first = guest.request();
    let stop = guest.post_command(super::super::fixture::command_trb(15, slot, 1, 0));
    guest.complete(first.id, UrbStatus::Cancelled, 0);
    let events = guest.events();
    assert_eq!((events[0].pointer, events[0].code, events[0].length), (at[1], 26, 64));
    assert_eq!(events[1].pointer, stop);
    assert_eq!(guest.endpoint(slot, 1), (3, at[0] | 1));
    guest.ring(slot, 1);
    assert_eq!(guest.request().len, 64);
}

#[test]
fn setup_stage_with_ioc_is_reported() {
    let (mut guest, slot) = addressed();
    let packet = Trb::new(u64::from_le_bytes(setup(0xc0, 1, 8)), 8, 2 << 10 | IDT | IOC);
    let first = guest.push(slot, 1, packet);
    let second = guest.push(slot, 1, data(8, IN | IOC | ISP));
    let third = guest.push(slot, 1, status(IOC));
    guest.ring(slot, 1);
    let request = guest.request();
    guest.complete(request.id, UrbStatus::Completed, 8);
    assert_eq!(guest.transfers(), [(first, SUCCESS, 0), (second, SUCCESS, 0), (third, SUCCESS, 0)]);
}
