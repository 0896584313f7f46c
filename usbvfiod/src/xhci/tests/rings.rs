//! Transfer rings that a hostile or careless driver builds (hostile inputs R1–R3, R7, R8, I3).

use super::super::fixture::{CHAIN, DATA, Guest, IDT, IOC, command_trb, event_data, normal};
use super::super::td::{TD_BYTES, TD_TRBS};
use super::super::trb::Trb;
use crate::urb::{Segment, UrbStatus};

const SUCCESS: u8 = 1;
const TRB: u8 = 5;

const RUNNING: u8 = 1;
const ERROR: u8 = 4;

/// An unused piece of memory for rings of our own.
const ELSEWHERE: u64 = 0x60_0000;
const TOGGLE: u32 = 2;

/// A device whose OUT ring starts at `ELSEWHERE`.
fn with_ring(guest: &mut Guest, at: u64) -> u8 {
    let (_, slot) = guest.bulk();
    assert_eq!(guest.slot_command(15, slot, 4, 0), SUCCESS);
    assert_eq!(guest.slot_command(16, slot, 4, at | 1), SUCCESS);
    slot
}

fn link(to: u64, flags: u32) -> Trb {
    Trb::new(to, 0, 6 << 10 | flags | 1)
}

fn owned(trb: Trb) -> Trb {
    trb.with_cycle(true)
}

#[test]
fn self_linked_ring_is_endless() {
    let mut guest = Guest::new();
    let slot = with_ring(&mut guest, ELSEWHERE);
    guest.mem.put(ELSEWHERE, &link(ELSEWHERE, 0));
    guest.ring(slot, 4);
    assert_eq!(guest.transfers(), [(ELSEWHERE, TRB, 0)]);
    assert_eq!(guest.endpoint(slot, 4), (ERROR, ELSEWHERE | 1));
}

#[test]
fn two_links_to_each_other_are_endless() {
    let mut guest = Guest::new();
    let slot = with_ring(&mut guest, ELSEWHERE);
    guest.mem.put(ELSEWHERE, &link(ELSEWHERE + 0x100, 0));
    guest.mem.put(ELSEWHERE + 0x100, &link(ELSEWHERE, 0));
    guest.ring(slot, 4);
    assert_eq!(guest.transfers().len(), 1);
    assert_eq!(guest.endpoint(slot, 4).0, ERROR);
}

#[test]
fn ten_thousand_links_are_too_many() {
    let mut guest = Guest::new();
    let slot = with_ring(&mut guest, ELSEWHERE);
    for index in 0..10_000u64 {
        let at = ELSEWHERE + index * 16;
        guest.mem.put(at, &link(at + 16, 0));
    }
    guest.ring(slot, 4);
    assert_eq!(guest.endpoint(slot, 4).0, ERROR);
}

#[test]
fn self_link_with_toggle_waits_for_the_other_cycle() {
    let mut guest = Guest::new();
    let slot = with_ring(&mut guest, ELSEWHERE);
    guest.mem.put(ELSEWHERE, &link(ELSEWHERE, TOGGLE));
    guest.ring(slot, 4);
    assert!(guest.transfers().is_empty());
    assert_eq!(guest.endpoint(slot, 4).0, RUNNING);
}

#[test]
fn chain_that_never_ends_is_cut() {
    let mut guest = Guest::new();
    let slot = with_ring(&mut guest, ELSEWHERE);
    for index in 0..63u64 {
        guest.mem.put(ELSEWHERE + index * 16, &owned(normal(DATA, 1, CHAIN)));
    }
    guest.mem.put(ELSEWHERE + 63 * 16, &link(ELSEWHERE, CHAIN));
    guest.ring(slot, 4);
    assert_eq!(guest.transfers().len(), 1);
    assert_eq!(guest.endpoint(slot, 4).0, ERROR);
    assert!(guest.submitted().is_empty());
}

#[test]
fn td_of_more_trbs_or_bytes_than_allowed_is_an_error() {
    let many = (TD_TRBS + 1, 0);
    let large = ((TD_BYTES / 0x1_0000) as usize + 1, 0x1_0000);
    for (trbs, len) in [many, large, (65_536, 0), (65_536, 0x1_ffff)] {
        let mut guest = Guest::new();
        let slot = with_ring(&mut guest, ELSEWHERE);
        for index in 0..trbs {
            let chain = if index + 1 == trbs { IOC } else { CHAIN };
            guest.mem.put(ELSEWHERE + index as u64 * 16, &owned(normal(DATA, len, chain)));
        }
        guest.ring(slot, 4);
        assert_eq!(guest.transfers().len(), 1, "{trbs} {len}");
        assert_eq!(guest.endpoint(slot, 4).0, ERROR);
    }
}

#[test]
fn td_of_16_mib_is_one_transfer() {
    let mut guest = Guest::new();
    let slot = with_ring(&mut guest, ELSEWHERE);
    for index in 0..256u64 {
        let flags = if index == 255 { IOC } else { CHAIN };
        guest.mem.put(ELSEWHERE + index * 16, &owned(normal(DATA + (index % 2) * 0x2_0000, 0x1_0000, flags)));
    }
    guest.ring(slot, 4);
    assert_eq!(u64::from(guest.request().len), TD_BYTES);
}

#[test]
fn td_without_an_end_yet_waits_for_the_rest() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.push(slot, 4, normal(DATA, 100, CHAIN));
    guest.ring(slot, 4);
    assert!(guest.submitted().is_empty());
    guest.push(slot, 4, normal(DATA + 100, 100, IOC));
    guest.ring(slot, 4);
    assert_eq!(guest.request().len, 200);
}

#[test]
fn rings_in_impossible_places_stop_the_endpoint_only() {
    for at in [0xfff_fff0u64, 1 << 40, 1 << 63, !0xf] {
        let mut guest = Guest::new();
        let slot = with_ring(&mut guest, at);
        guest.ring(slot, 4);
        assert_eq!(guest.transfers(), [(at, TRB, 0)]);
        assert_eq!(guest.endpoint(slot, 4).0, ERROR);
        guest.normal(slot, 3, DATA, 8);
        assert_eq!(guest.submitted().len(), 1, "the other endpoint goes on");
    }
}

#[test]
fn payload_pointers_are_passed_on_as_they_are_and_their_fault_is_the_tds() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let at = guest.normal(slot, 4, u64::MAX - 10, 512);
    let request = guest.request();
    assert_eq!(request.payload, crate::urb::Payload::Guest(vec![Segment { addr: u64::MAX - 10, len: 512 }]));
    guest.complete(request.id, UrbStatus::GuestMemory, 0);
    assert_eq!(guest.transfers(), [(at, TRB, 512)]);
    assert_eq!(guest.endpoint(slot, 4).0, ERROR);
}

#[test]
fn trb_changed_after_it_was_read_changes_nothing() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let at = guest.normal(slot, 3, DATA, 512);
    let request = guest.request();
    guest.mem.put(at, &Trb::new(0, 8, 6 << 10 | 1));
    guest.complete(request.id, UrbStatus::Completed, 512);
    assert_eq!(guest.transfers(), [(at, SUCCESS, 0)]);
}

#[test]
fn doorbell_storm_starts_nothing_twice() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    for _ in 0..20 {
        guest.push(slot, 4, normal(DATA, 64, IOC));
    }
    for _ in 0..10_000 {
        guest.ring(slot, 4);
    }
    assert_eq!(guest.submitted().len(), 8);
    assert!(guest.effects.is_empty());
}

#[test]
fn doorbell_during_a_pending_in_loses_nothing() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let at = guest.normal(slot, 3, DATA, 512);
    let request = guest.request();
    guest.ring(slot, 3);
    guest.ring(slot, 3);
    assert!(guest.submitted().is_empty());
    guest.complete(request.id, UrbStatus::Completed, 512);
    assert_eq!(guest.transfers(), [(at, SUCCESS, 0)]);
}

#[test]
fn events_for_interrupters_that_do_not_exist_go_to_the_first() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let at = guest.push(slot, 4, Trb::new(DATA, 8 | 0x3ff << 22, 1 << 10 | IOC | CHAIN));
    guest.push(slot, 4, Trb::new(7, 8 << 22, 7 << 10 | IOC));
    guest.ring(slot, 4);
    let request = guest.request();
    guest.complete(request.id, UrbStatus::Completed, 8);
    assert_eq!(guest.transfers(), [(at, SUCCESS, 0), (7, SUCCESS, 8)]);
}

#[test]
fn trb_types_that_do_not_belong_on_a_bulk_ring_are_errors() {
    for trb_type in (0..64u32).filter(|kind| !matches!(kind, 1 | 6 | 7 | 8)) {
        let mut guest = Guest::new();
        let (_, slot) = guest.bulk();
        let at = guest.push(slot, 4, Trb::new(DATA, 8, trb_type << 10 | IOC | IDT));
        guest.ring(slot, 4);
        assert_eq!(guest.transfers(), [(at, TRB, 0)], "{trb_type}");
        assert_eq!(guest.endpoint(slot, 4).0, ERROR);
    }
}

#[test]
fn endpoint_in_error_goes_on_after_set_tr_dequeue() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.push(slot, 4, Trb::new(DATA, 8, 2 << 10));
    guest.ring(slot, 4);
    assert_eq!(guest.endpoint(slot, 4).0, ERROR);
    assert_eq!(guest.slot_command(14, slot, 4, 0), 19, "Reset Endpoint is for halted ones");
    let field = guest.enqueue_field(slot, 4);
    assert_eq!(guest.slot_command(16, slot, 4, field), SUCCESS);
    guest.normal(slot, 4, DATA, 8);
    assert_eq!(guest.request().len, 8);
}

#[test]
fn ring_of_no_ops_that_never_ends_leaves_the_controller_responsive() {
    let mut guest = Guest::new();
    let slot = with_ring(&mut guest, ELSEWHERE);
    for index in 0..63u64 {
        guest.mem.put(ELSEWHERE + index * 16, &owned(Trb::new(0, 0, 8 << 10)));
    }
    guest.mem.put(ELSEWHERE + 63 * 16, &link(ELSEWHERE, 0));
    guest.ring(slot, 4);
    assert_eq!(guest.controller.next_deadline(), Some(std::time::Duration::ZERO), "the rest comes later");
    assert_eq!(guest.command(command_trb(23, 0, 0, 0)).0, SUCCESS);
}

#[test]
fn no_op_is_no_transfer() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let no_op = guest.push(slot, 4, Trb::new(0, 0, 8 << 10 | IOC));
    guest.push(slot, 4, Trb::new(0, 0, 8 << 10));
    guest.push(slot, 4, event_data(0x77, 0));
    guest.ring(slot, 4);
    assert!(guest.submitted().is_empty());
    assert_eq!(guest.transfers(), [(no_op, SUCCESS, 0), (0x77, SUCCESS, 0)]);
    assert_eq!(guest.endpoint(slot, 4).0, RUNNING);
}

#[test]
fn no_op_behind_a_pending_transfer_waits_without_wake_ups() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let first = guest.normal(slot, 3, DATA, 8);
    let request = guest.request();
    let second = guest.push(slot, 3, Trb::new(0, 0, 8 << 10 | IOC));
    guest.ring(slot, 3);
    assert!(guest.transfers().is_empty());
    assert_eq!(guest.controller.next_deadline(), None);
    guest.complete(request.id, UrbStatus::Completed, 8);
    assert_eq!(guest.transfers(), [(first, SUCCESS, 0), (second, SUCCESS, 0)]);
}

#[test]
fn link_with_ioc_is_reported() {
    let mut guest = Guest::new();
    let slot = with_ring(&mut guest, ELSEWHERE);
    guest.mem.put(ELSEWHERE, &link(ELSEWHERE + 0x100, IOC));
    guest.mem.put(ELSEWHERE + 0x100, &owned(normal(DATA, 8, CHAIN)));
    guest.mem.put(ELSEWHERE + 0x110, &link(ELSEWHERE + 0x200, IOC | CHAIN));
    guest.mem.put(ELSEWHERE + 0x200, &owned(normal(DATA, 8, IOC)));
    guest.ring(slot, 4);
    let request = guest.request();
    assert_eq!(request.len, 16);
    assert_eq!(guest.transfers(), [(ELSEWHERE, SUCCESS, 0)]);
    guest.complete(request.id, UrbStatus::Completed, 16);
    assert_eq!(guest.transfers(), [(ELSEWHERE + 0x110, SUCCESS, 0), (ELSEWHERE + 0x200, SUCCESS, 0)]);
}
