//! TD semantics: residues, short packets, retries (hostile inputs F4, F5, S7).

use common::ids::Speed;

use super::super::fixture::{CHAIN, DATA, Guest, IOC, ISP, command_trb, event_data, normal};
use super::super::trb::Trb;
use crate::urb::{Effect, Payload, Segment, UrbRequest, UrbStatus};

const SUCCESS: u8 = 1;
const BABBLE: u8 = 3;
const TRANSACTION: u8 = 4;
const SHORT: u8 = 13;

/// An IN TD of three TRBs of 1000 bytes with these flags, and its transfer.
fn three(guest: &mut Guest, slot: u8, flags: [u32; 3]) -> (Vec<u64>, UrbRequest) {
    let at = (0..3)
        .zip(flags)
        .map(|(index, flags)| guest.push(slot, 3, normal(DATA + index * 0x1000, 1000, flags)))
        .collect();
    guest.ring(slot, 3);
    (at, guest.request())
}

#[test]
fn short_packet_in_the_middle_with_isp_is_told_there_and_only_there() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let (at, request) = three(&mut guest, slot, [CHAIN | ISP, CHAIN | ISP, IOC | ISP]);
    guest.complete(request.id, UrbStatus::Completed, 1300);
    assert_eq!(guest.transfers(), [(at[1], SHORT, 700)]);
}

#[test]
fn short_packet_in_the_middle_without_isp_is_told_at_the_end() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let (at, request) = three(&mut guest, slot, [CHAIN, CHAIN, IOC]);
    guest.complete(request.id, UrbStatus::Completed, 1300);
    assert_eq!(guest.transfers(), [(at[2], SHORT, 1000)]);
}

#[test]
fn short_packet_at_the_border_of_two_trbs_belongs_to_the_second() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let (at, request) = three(&mut guest, slot, [CHAIN | ISP, CHAIN | ISP, IOC | ISP]);
    guest.complete(request.id, UrbStatus::Completed, 1000);
    assert_eq!(guest.transfers(), [(at[1], SHORT, 1000)]);
}

#[test]
fn trbs_with_ioc_before_the_short_one_are_told_as_done() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let (at, request) = three(&mut guest, slot, [CHAIN | IOC, CHAIN | ISP, IOC]);
    guest.complete(request.id, UrbStatus::Completed, 1300);
    assert_eq!(guest.transfers(), [(at[0], SUCCESS, 0), (at[1], SHORT, 700)]);
}

#[test]
fn td_without_ioc_or_isp_is_silent_and_the_next_one_runs() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let (_, request) = three(&mut guest, slot, [CHAIN, CHAIN, 0]);
    guest.complete(request.id, UrbStatus::Completed, 1300);
    assert!(guest.transfers().is_empty());
    guest.normal(slot, 3, DATA, 64);
    assert_eq!(guest.request().len, 64);
}

#[test]
fn zero_length_td_is_a_transfer_of_its_own() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let first = guest.normal(slot, 4, DATA, 512);
    let second = guest.normal(slot, 4, 0, 0);
    let requests = guest.submitted();
    assert_eq!((requests[0].len, requests[1].len), (512, 0));
    assert_eq!(requests[1].payload, Payload::Guest(vec![]));
    guest.end(requests[0].id, UrbStatus::Completed, 512);
    guest.complete(requests[1].id, UrbStatus::Completed, 0);
    assert_eq!(guest.transfers(), [(first, SUCCESS, 0), (second, SUCCESS, 0)]);
}

#[test]
fn zero_length_trbs_within_a_td_count_nothing() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.push(slot, 3, normal(DATA, 0, CHAIN | ISP));
    guest.push(slot, 3, normal(DATA, 512, CHAIN | ISP));
    let last = guest.push(slot, 3, normal(DATA, 0, IOC | ISP));
    guest.ring(slot, 3);
    let request = guest.request();
    assert_eq!(request.payload, Payload::Guest(vec![Segment { addr: DATA, len: 512 }]));
    guest.complete(request.id, UrbStatus::Completed, 512);
    assert_eq!(guest.transfers(), [(last, SUCCESS, 0)]);
}

#[test]
fn event_data_after_a_short_packet_has_the_sum_and_the_code() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.push(slot, 3, normal(DATA, 1024, CHAIN));
    guest.push(slot, 3, normal(DATA, 1024, CHAIN));
    guest.push(slot, 3, event_data(0x42, 0));
    guest.ring(slot, 3);
    let request = guest.request();
    guest.complete(request.id, UrbStatus::Completed, 1030);
    assert_eq!(guest.transfers(), [(0x42, SHORT, 1030)]);
}

#[test]
fn outcomes_out_of_order_are_told_in_order() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let first = guest.normal(slot, 4, DATA, 8);
    let second = guest.normal(slot, 4, DATA, 8);
    let requests = guest.submitted();
    guest.complete(requests[1].id, UrbStatus::Completed, 8);
    assert!(guest.transfers().is_empty());
    assert_eq!(guest.controller.next_deadline(), None);
    guest.complete(requests[0].id, UrbStatus::Completed, 8);
    assert_eq!(guest.transfers(), [(first, SUCCESS, 0), (second, SUCCESS, 0)]);
}

#[test]
fn second_outcome_of_a_transfer_is_dropped() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.normal(slot, 4, DATA, 8);
    let request = guest.request();
    guest.complete(request.id, UrbStatus::Completed, 8);
    guest.complete(request.id, UrbStatus::Stalled, 8);
    assert_eq!(guest.transfers().len(), 1);
    assert_eq!(guest.endpoint(slot, 4).0, 1);
}

#[test]
fn device_that_moved_more_than_asked_is_not_believed() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let at = guest.normal(slot, 3, DATA, 64);
    let request = guest.request();
    guest.complete(request.id, UrbStatus::Completed, u32::MAX);
    assert_eq!(guest.transfers(), [(at, SUCCESS, 0)]);
}

#[test]
fn babble_halts_at_the_trb_it_came_in() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let (at, request) = three(&mut guest, slot, [CHAIN, CHAIN, IOC]);
    guest.complete(request.id, UrbStatus::Babble, 3000);
    assert_eq!(guest.transfers(), [(at[2], BABBLE, 0)]);
    assert_eq!(guest.endpoint(slot, 3), (2, at[0] | 1));
}

#[test]
fn each_failure_has_its_code_and_state() {
    let cases = [
        (UrbStatus::Stalled, 6, 2),
        (UrbStatus::Babble, 3, 2),
        (UrbStatus::TransactionError, 4, 2),
        (UrbStatus::Gone, 4, 2),
        (UrbStatus::NoBandwidth, 8, 2),
        (UrbStatus::DataBuffer, 2, 2),
        (UrbStatus::GuestMemory, 5, 4),
    ];
    for (status, code, state) in cases {
        let mut guest = Guest::new();
        let (_, slot) = guest.bulk();
        let at = guest.normal(slot, 3, DATA, 64);
        let request = guest.request();
        guest.complete(request.id, status, 0);
        assert_eq!(guest.transfers(), [(at, code, 64)], "{status:?}");
        assert_eq!(guest.endpoint(slot, 3).0, state, "{status:?}");
    }
}

#[test]
fn soft_retry_goes_on_where_the_transfer_failed() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let at = guest.normal(slot, 3, DATA, 4096);
    let request = guest.request();
    guest.complete(request.id, UrbStatus::TransactionError, 1024);
    assert_eq!(guest.transfers(), [(at, TRANSACTION, 3072)]);
    assert_eq!(guest.endpoint(slot, 3), (2, at | 1));
    let reset = Trb::new(0, 0, command_trb(14, slot, 3, 0).control().into_bits() | 1 << 9);
    assert_eq!(guest.command(reset).0, SUCCESS);
    guest.ring(slot, 3);
    let retry = guest.request();
    assert_eq!(retry.payload, Payload::Guest(vec![Segment { addr: DATA + 1024, len: 3072 }]));
    guest.complete(retry.id, UrbStatus::Completed, 100);
    assert_eq!(guest.transfers(), [(at, SHORT, 2972)]);
}

#[test]
fn reset_without_preserve_starts_the_td_over() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.normal(slot, 3, DATA, 4096);
    let request = guest.request();
    guest.complete(request.id, UrbStatus::TransactionError, 1024);
    assert_eq!(guest.slot_command(14, slot, 3, 0), SUCCESS);
    assert_eq!(guest.slot_command(14, slot, 3, 0), 19, "it is not halted any more");
    guest.ring(slot, 3);
    assert_eq!(guest.request().len, 4096);
}

#[test]
fn cancel_nobody_asked_for_starts_the_rest_again_and_three_in_a_row_fail() {
    let mut guest = Guest::new();
    let (_, slot) = guest.configured(Speed::High, &[(3, 7, 64, 0)]);
    let at = guest.normal(slot, 3, DATA, 64);
    for _ in 0..3 {
        let request = guest.request();
        guest.complete(request.id, UrbStatus::Cancelled, 0);
        assert!(guest.transfers().is_empty());
    }
    let request = guest.request();
    guest.complete(request.id, UrbStatus::Cancelled, 0);
    assert_eq!(guest.transfers(), [(at, TRANSACTION, 64)]);
    assert!(guest.submitted().is_empty());
}

#[test]
fn interrupt_endpoint_has_two_transfers_out_and_no_more() {
    let mut guest = Guest::new();
    let (_, slot) = guest.configured(Speed::High, &[(3, 7, 64, 0)]);
    for _ in 0..5 {
        guest.normal(slot, 3, DATA, 64);
    }
    let requests = guest.submitted();
    assert_eq!(requests.len(), 2);
    assert!(requests.iter().all(|request| !request.follows));
}

#[test]
fn bulk_endpoint_has_four_mib_out_and_no_more() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    for _ in 0..6 {
        for index in 0..8u64 {
            let flags = if index == 7 { IOC } else { CHAIN };
            guest.push(slot, 4, normal(DATA, 0x1_ffff, flags));
        }
    }
    guest.ring(slot, 4);
    assert_eq!(guest.submitted().len(), 5, "the fifth begins below the limit");
}

#[test]
fn memory_of_an_ended_transfer_is_used_again() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.normal(slot, 3, DATA, 64);
    let request = guest.request();
    let Payload::Guest(mut segments) = request.payload else { panic!("not in memory") };
    segments.reserve_exact(100);
    let place = segments.as_ptr();
    let completion = crate::urb::UrbCompletion {
        id: request.id,
        status: UrbStatus::Completed,
        actual: 64,
        packets: Vec::new(),
        payload: Payload::Guest(segments),
    };
    guest.controller.complete(guest.now, &guest.mem, completion, &mut guest.effects);
    guest.settle();
    guest.normal(slot, 3, DATA, 64);
    let is_it = |effect: &Effect| match effect {
        Effect::Submit(UrbRequest { payload: Payload::Guest(segments), .. }) => segments.as_ptr() == place,
        _ => false,
    };
    assert!(guest.effects.iter().any(is_it));
}

/// Stops an IN TD of a Normal and an Event Data TRB after `actual` of 1024 bytes; its Stopped event and the TRBs.
fn stop_after(guest: &mut Guest, actual: u32) -> (u8, (u64, u8, u32), [u64; 2]) {
    let (_, slot) = guest.bulk();
    let data = guest.push(slot, 3, normal(DATA, 1024, CHAIN));
    let event = guest.push(slot, 3, event_data(0x42, 0));
    guest.ring(slot, 3);
    let request = guest.request();
    guest.post_command(command_trb(15, slot, 3, 0));
    guest.complete(request.id, UrbStatus::Cancelled, actual);
    let stopped = guest.transfers();
    assert_eq!(stopped.len(), 1);
    (slot, stopped[0], [data, event])
}

#[test]
fn stop_behind_all_data_stands_at_the_event_data_trb_and_its_length_is_invalid() {
    let mut guest = Guest::new();
    let (slot, stopped, [_, event]) = stop_after(&mut guest, 1024);
    assert_eq!(stopped, (event, 27, 0));
    guest.ring(slot, 3);
    assert!(guest.submitted().is_empty(), "nothing is left to move");
    assert_eq!(guest.transfers(), [(0x42, SUCCESS, 1024)]);
}

#[test]
fn stop_behind_a_short_packet_tells_the_bytes_moved() {
    let mut guest = Guest::new();
    let (slot, stopped, [data, _]) = stop_after(&mut guest, 600);
    assert_eq!(stopped, (data, 28, 600));
    guest.ring(slot, 3);
    assert!(guest.submitted().is_empty(), "the device has ended it");
    assert_eq!(guest.transfers(), [(0x42, SHORT, 600)]);
}

#[test]
fn stop_in_the_middle_tells_the_residue() {
    let mut guest = Guest::new();
    let (slot, stopped, [data, _]) = stop_after(&mut guest, 512);
    assert_eq!(stopped, (data, 26, 512));
    guest.ring(slot, 3);
    let rest = guest.request();
    guest.complete(rest.id, UrbStatus::Completed, 512);
    assert_eq!(guest.transfers(), [(0x42, SUCCESS, 1024)]);
}
