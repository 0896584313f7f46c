//! Flow: halts and recovery, stops, resets, devices that leave.

use std::time::Duration;

use common::ids::Speed;

use super::super::fixture::{BEI, DATA, Guest, IOC, ISP, command_trb, normal};
use super::super::regs::OPERATIONAL;
use super::super::{AttachOptions, PortNumber, ResetPolicy};
use crate::urb::{DeviceOp, OpError, UrbStatus};

const SUCCESS: u8 = 1;
const TRANSACTION: u8 = 4;
const STALL: u8 = 6;
const CONTEXT_STATE: u8 = 19;

const RESET_ENDPOINT: u32 = 14;
const STOP_ENDPOINT: u32 = 15;
const RESET_DEVICE: u32 = 17;
const SET_TR_DEQUEUE: u32 = 16;

#[test]
fn stall_in_the_first_of_eight_stops_the_others_until_recovery() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let at: Vec<u64> = (0..8).map(|i| guest.normal(slot, 4, DATA + i * 512, 512)).collect();
    let requests = guest.submitted();
    assert_eq!(requests.len(), 8);
    assert!(!requests[0].follows && requests[1..].iter().all(|request| request.follows));

    guest.complete(requests[0].id, UrbStatus::Stalled, 0);
    assert_eq!(guest.transfers(), [(at[0], STALL, 512)]);
    assert_eq!(guest.endpoint(slot, 4), (2, at[0] | 1));
    let rest: Vec<_> = requests[1..].iter().map(|request| request.id).collect();
    assert_eq!(guest.cancelled().1, rest);

    guest.ring(slot, 4);
    assert!(guest.submitted().is_empty(), "a halted endpoint does not hear its doorbell");
    assert_eq!(guest.slot_command(RESET_ENDPOINT, slot, 4, 0), SUCCESS);
    assert_eq!(guest.slot_command(SET_TR_DEQUEUE, slot, 4, at[1] | 1), SUCCESS);
    guest.ring(slot, 4);
    assert!(guest.submitted().is_empty(), "the device has not given the old transfers back");
    for id in rest {
        guest.complete(id, UrbStatus::NotRun, 0);
    }
    let again = guest.submitted();
    assert_eq!(again.len(), 7);
    assert!(!again[0].follows && again[1].follows);
    for (index, request) in again.iter().enumerate() {
        guest.complete(request.id, UrbStatus::Completed, 512);
        assert_eq!(guest.transfers(), [(at[index + 1], SUCCESS, 0)]);
    }
}

#[test]
fn stop_endpoint_on_a_silent_device_is_answered_within_four_seconds() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.normal(slot, 3, DATA, 512);
    let request = guest.request();
    let stop = guest.post_command(command_trb(STOP_ENDPOINT, slot, 3, 0));
    guest.wait(Duration::from_secs(3));
    assert_eq!(guest.answer(stop), None);
    guest.wait(Duration::from_secs(1));
    assert_eq!(guest.answer(stop), Some((SUCCESS, slot)));
    let (cancelled, abandoned) = guest.cancelled();
    assert_eq!((cancelled, abandoned), (vec![request.id], vec![request.id]));
    assert_eq!(guest.endpoint(slot, 3).0, 3);
}

#[test]
fn stop_endpoint_on_a_stopped_one_is_a_context_state_error() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    assert_eq!(guest.slot_command(STOP_ENDPOINT, slot, 3, 0), SUCCESS);
    assert_eq!(guest.slot_command(STOP_ENDPOINT, slot, 3, 0), CONTEXT_STATE);
}

#[test]
fn set_tr_dequeue_while_running_is_a_context_state_error() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    assert_eq!(guest.slot_command(SET_TR_DEQUEUE, slot, 3, 0x1000), CONTEXT_STATE);
}

#[test]
fn reset_with_a_pending_interrupt_in_ends_at_once() {
    let mut guest = Guest::new();
    let (_, slot) = guest.configured(Speed::Full, &[(3, 7, 8, 0)]);
    guest.normal(slot, 3, DATA, 8);
    let request = guest.request();
    guest.write32(OPERATIONAL, 2);
    assert_eq!(guest.read32(OPERATIONAL), 0);
    assert_eq!(guest.read32(OPERATIONAL + 4) & 1, 1, "halted");
    assert_eq!(guest.cancelled().1, [request.id]);
    guest.complete(request.id, UrbStatus::Cancelled, 0);
    guest.start();
    let events = guest.events();
    assert_eq!(events.iter().map(|event| event.kind).collect::<Vec<_>>(), [34], "the device is still there");
}

#[test]
fn unplugged_device_is_told_and_its_transfers_are_given_up() {
    let mut guest = Guest::new();
    let (device, slot) = guest.bulk();
    guest.normal(slot, 3, DATA, 512);
    let request = guest.request();
    guest.unplug(device);
    assert_eq!(guest.cancelled().1, [request.id]);
    assert_eq!(guest.events().iter().map(|event| event.kind).collect::<Vec<_>>(), [34]);
    guest.complete(request.id, UrbStatus::Gone, 0);
    assert!(guest.events().is_empty());

    assert_eq!(guest.slot_command(STOP_ENDPOINT, slot, 3, 0), SUCCESS);
    let at = guest.normal(slot, 3, DATA, 512);
    assert!(guest.submitted().is_empty());
    let events = guest.transfers();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].1, TRANSACTION);
    assert!(events[0].0 <= at);
    assert_eq!(guest.slot_command(10, slot, 0, 0), SUCCESS);
}

/// A device that the guest has used, and its port.
fn used_device(guest: &mut Guest) -> PortNumber {
    let (device, slot) = guest.bulk();
    guest.normal(slot, 4, DATA, 8);
    let request = guest.request();
    guest.complete(request.id, UrbStatus::Completed, 8);
    guest.events();
    guest.controller.port_of(device).unwrap()
}

#[test]
fn resets_while_descriptors_are_read_are_free() {
    let mut guest = Guest::new();
    let (_, port) = guest.plug(Speed::High);
    guest.reset_port(port);
    let slot = guest.address(port);
    guest.control(slot, [0x80, 6, 0, 1, 0, 0, 64, 0], DATA);
    let request = guest.request();
    guest.complete(request.id, UrbStatus::Completed, 18);
    guest.reset_port(port);
    assert!(guest.operations().is_empty());
}

#[test]
fn reset_of_a_device_that_does_not_answer_is_a_real_one() {
    let mut guest = Guest::new();
    let (_, port) = guest.plug(Speed::High);
    guest.reset_port(port);
    let slot = guest.address(port);
    guest.control(slot, [0x80, 6, 0, 1, 0, 0, 64, 0], DATA);
    let request = guest.request();
    guest.complete(request.id, UrbStatus::TransactionError, 0);
    guest.reset_port(port);
    assert_eq!(guest.operation().1, DeviceOp::Reset);
}

#[test]
fn reset_of_a_used_device_is_a_real_one() {
    let mut guest = Guest::new();
    let port = used_device(&mut guest);
    guest.write32(Guest::portsc(port), 1 << 9 | 1 << 4);
    assert_eq!(guest.read32(Guest::portsc(port)) >> 4 & 1, 1, "PR stays set");
    let (id, op) = guest.operation();
    assert_eq!(op, DeviceOp::Reset);
    guest.operation_done(id, Ok(()));
    let status = guest.read32(Guest::portsc(port));
    assert_eq!((status >> 4 & 1, status >> 1 & 1, status >> 21 & 1), (0, 1, 1));
}

#[test]
fn reset_policies_never_and_always_are_kept() {
    let mut guest = Guest::new();
    for (reset, expected) in [(ResetPolicy::Never, 0), (ResetPolicy::Always, 1)] {
        let (_, port) = guest.plug_with(Speed::High, AttachOptions { reset, ..AttachOptions::default() });
        guest.reset_port(port);
        assert_eq!(guest.operations().len(), expected, "{reset:?}");
    }
}

#[test]
fn port_reset_the_device_does_not_answer_ends_disabled() {
    let mut guest = Guest::new();
    let port = used_device(&mut guest);
    guest.write32(Guest::portsc(port), 1 << 9 | 1 << 4);
    let (id, _) = guest.operation();
    guest.wait(Duration::from_secs(5));
    let status = guest.read32(Guest::portsc(port));
    assert_eq!((status >> 4 & 1, status >> 1 & 1, status >> 21 & 1), (0, 0, 1));
    guest.operation_done(id, Err(OpError::Failed));
    assert_eq!(guest.read32(Guest::portsc(port)), status);
}

#[test]
fn reset_device_without_a_port_reset_is_a_real_one_and_answered_in_time() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.normal(slot, 4, DATA, 8);
    let request = guest.request();
    let at = guest.post_command(command_trb(RESET_DEVICE, slot, 0, 0));
    let (id, op) = guest.operation();
    assert_eq!((op, guest.answer(at)), (DeviceOp::Reset, None));
    guest.complete(request.id, UrbStatus::Cancelled, 0);
    guest.operation_done(id, Ok(()));
    assert_eq!(guest.answer(at), Some((SUCCESS, slot)));
    assert_eq!(guest.slot(slot), (1, 0));
    assert_eq!(guest.endpoint(slot, 4).0, 0);

    let input = guest.address_input(slot, 1);
    assert_eq!(guest.slot_command(11, slot, 0, input), SUCCESS);
    guest.control(slot, [0x21, 9, 0, 2, 0, 0, 0, 0], 0);
    let at = guest.post_command(command_trb(RESET_DEVICE, slot, 0, 0));
    guest.wait(Duration::from_secs(4));
    assert_eq!(guest.answer(at), Some((TRANSACTION, slot)));
}

#[test]
fn configured_slot_says_so_and_dropping_all_endpoints_takes_it_back() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    assert_eq!(guest.slot(slot), (3, slot));
    assert_eq!(guest.slot_command(12, slot, 0, 1 << 40), 5, "no input context");
    let mut deconfigure = command_trb(12, slot, 0, 0);
    deconfigure = super::super::trb::Trb::new(0, 0, deconfigure.control().into_bits() | 1 << 9);
    assert_eq!(guest.command(deconfigure).0, SUCCESS);
    assert_eq!(guest.slot(slot), (2, slot));
    assert_eq!(guest.endpoint(slot, 3).0, 0);
}

#[test]
fn event_with_bei_costs_no_interrupt() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.interrupts();
    guest.push(slot, 4, normal(DATA, 8, IOC | BEI | ISP));
    guest.ring(slot, 4);
    let request = guest.request();
    guest.complete(request.id, UrbStatus::Completed, 8);
    assert_eq!(guest.interrupts(), 0);
    assert_eq!(guest.transfers().len(), 1);
}

#[test]
fn dequeue_moved_past_everything_starts_at_the_new_place() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.normal(slot, 4, DATA, 64);
    let old = guest.request();
    let stop = guest.post_command(command_trb(STOP_ENDPOINT, slot, 4, 0));
    guest.complete(old.id, UrbStatus::Cancelled, 0);
    assert!(guest.answer(stop).is_some());
    let field = guest.enqueue_field(slot, 4);
    assert_eq!(guest.slot_command(SET_TR_DEQUEUE, slot, 4, field), SUCCESS);
    assert_eq!(guest.endpoint(slot, 4), (3, field));
    guest.normal(slot, 4, DATA, 32);
    assert_eq!(guest.request().len, 32);
}
