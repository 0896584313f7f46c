//! Bulk and control transfers: what is started, what is reported.

use common::ids::Speed;

use super::super::fixture::{CHAIN, DATA, Guest, IOC, ISP, event_data, normal};
use super::super::trb::Trb;
use crate::urb::{DeviceOp, OpError, Payload, Segment, TransferKind, UrbStatus};

const SUCCESS: u8 = 1;
const STALL: u8 = 6;
const SHORT: u8 = 13;

const GET_DESCRIPTOR: [u8; 8] = [0x80, 6, 0, 1, 0, 0, 64, 0];

#[test]
fn bulk_out_goes_to_the_device_and_ends_with_success() {
    let mut guest = Guest::new();
    let (device, slot) = guest.bulk();
    let at = guest.normal(slot, 4, DATA, 1000);
    let request = guest.request();
    assert_eq!((request.device, request.endpoint, request.len), (device, 2, 1000));
    assert_eq!(request.kind, TransferKind::Bulk { stream: 0 });
    assert_eq!(request.payload, Payload::Guest(vec![Segment { addr: DATA, len: 1000 }]));
    guest.complete(request.id, UrbStatus::Completed, 1000);
    assert_eq!(guest.transfers(), [(at, SUCCESS, 0)]);
    assert_eq!(guest.interrupts(), 1);
}

#[test]
fn short_in_is_reported_with_its_residue() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let at = guest.normal(slot, 3, DATA, 512);
    let request = guest.request();
    assert_eq!(request.endpoint, 0x81);
    guest.complete(request.id, UrbStatus::Completed, 13);
    assert_eq!(guest.transfers(), [(at, SHORT, 499)]);
}

#[test]
fn control_in_reports_the_short_data_stage_and_the_status_stage() {
    let mut guest = Guest::new();
    let (_, slot) = guest.enumerate(Speed::High);
    let at = guest.control(slot, GET_DESCRIPTOR, DATA);
    let request = guest.request();
    assert_eq!((request.endpoint, request.len), (0, 64));
    assert_eq!(request.kind, TransferKind::Control { setup: GET_DESCRIPTOR });
    guest.complete(request.id, UrbStatus::Completed, 18);
    assert_eq!(guest.transfers(), [(at[1], SHORT, 46), (at[2], SUCCESS, 0)]);
}

#[test]
fn set_configuration_is_an_operation_and_the_status_stage_waits_for_it() {
    let mut guest = Guest::new();
    let (_, slot) = guest.enumerate(Speed::High);
    let at = guest.control(slot, [0, 9, 1, 0, 0, 0, 0, 0], 0);
    assert!(guest.submitted().is_empty());
    let (id, op) = guest.operation();
    assert_eq!(op, DeviceOp::SetConfiguration { value: 1 });
    assert!(guest.transfers().is_empty());
    guest.operation_done(id, Ok(()));
    assert_eq!(guest.transfers(), [(at[1], SUCCESS, 0)]);

    let at = guest.control(slot, [1, 11, 1, 0, 2, 0, 0, 0], 0);
    let (id, op) = guest.operation();
    assert_eq!(op, DeviceOp::SetInterface { interface: 2, alternate: 1 });
    guest.operation_done(id, Err(OpError::Stalled));
    assert_eq!(guest.transfers(), [(at[1], STALL, 0)]);
    assert_eq!(guest.endpoint(slot, 1).0, 2);
}

#[test]
fn td_over_several_trbs_is_one_transfer() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.push(slot, 3, normal(DATA, 1024, CHAIN | ISP));
    let second = guest.push(slot, 3, normal(DATA + 0x10000, 1024, CHAIN | ISP));
    guest.push(slot, 3, normal(DATA + 0x10400, 1024, CHAIN | ISP));
    guest.push(slot, 3, event_data(0x1234_5678_9abc, 0));
    guest.ring(slot, 3);
    let request = guest.request();
    assert_eq!(request.len, 3072);
    let expected = [Segment { addr: DATA, len: 1024 }, Segment { addr: DATA + 0x10000, len: 2048 }];
    assert_eq!(request.payload, Payload::Guest(expected.to_vec()));
    guest.complete(request.id, UrbStatus::Completed, 1100);
    assert_eq!(guest.transfers(), [(second, SHORT, 948), (0x1234_5678_9abc, SHORT, 1100)]);
}

#[test]
fn stop_endpoint_delivers_what_came_and_says_where_it_stands() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.push(slot, 3, normal(DATA, 1024, CHAIN));
    let second = guest.push(slot, 3, normal(DATA + 1024, 1024, IOC));
    guest.ring(slot, 3);
    let request = guest.request();
    let stop = guest.post_command(super::super::fixture::command_trb(15, slot, 3, 0));
    assert_eq!(guest.answer(stop), None);
    assert_eq!(guest.cancelled().0, [request.id]);
    guest.complete(request.id, UrbStatus::Cancelled, 1536);
    let events = guest.events();
    assert_eq!((events[0].pointer, events[0].code, events[0].length), (second, 26, 512));
    assert_eq!((events[1].pointer, events[1].code), (stop, SUCCESS));
    assert_eq!(guest.endpoint(slot, 3), (3, second | 1));

    guest.ring(slot, 3);
    let rest = guest.request();
    assert_eq!(rest.len, 512);
    assert_eq!(rest.payload, Payload::Guest(vec![Segment { addr: DATA + 1536, len: 512 }]));
    guest.complete(rest.id, UrbStatus::Completed, 512);
    assert_eq!(guest.transfers(), [(second, SUCCESS, 0)]);
}

#[test]
fn hints_in_a_trb_change_nothing() {
    const TD_SIZE: u32 = 31 << 17;
    const EVALUATE_NEXT: u32 = 1 << 1;
    const NO_SNOOP: u32 = 1 << 3;
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let flags = 1 << 10 | EVALUATE_NEXT | NO_SNOOP;
    guest.push(slot, 3, Trb::new(DATA, 512 | TD_SIZE, flags | CHAIN));
    let last = guest.push(slot, 3, Trb::new(DATA + 512, 512 | TD_SIZE, flags | IOC));
    guest.ring(slot, 3);
    let request = guest.request();
    assert_eq!(request.payload, Payload::Guest(vec![Segment { addr: DATA, len: 1024 }]));
    guest.complete(request.id, UrbStatus::Completed, 1024);
    assert_eq!(guest.transfers(), [(last, SUCCESS, 0)]);
}
