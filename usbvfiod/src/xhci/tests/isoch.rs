//! Isochronous endpoints (hostile inputs F6, S1).

use std::time::Duration;

use common::ids::Speed;

use super::super::fixture::{BEI, CHAIN, DATA, Guest, IOC, ISP, command_trb, event_data, normal};
use super::super::regs::RUNTIME;
use super::super::trb::Trb;
use crate::urb::{PacketResult, Payload, Segment, TransferKind, UrbRequest, UrbStatus};

const SUCCESS: u8 = 1;
const TRANSACTION: u8 = 4;
const TRB: u8 = 5;
const SHORT: u8 = 13;
const UNDERRUN: u8 = 14;
const OVERRUN: u8 = 15;
const MISSED: u8 = 23;

const OUT: u8 = 4;
const IN: u8 = 3;
const SIA: u32 = 1 << 31;

/// One Isoch TRB to be sent as soon as possible.
fn isoch(at: u64, len: u32, flags: u32) -> Trb {
    Trb::new(at, len, 5 << 10 | SIA | flags)
}

fn guest() -> (Guest, u8) {
    let mut guest = Guest::new();
    let (_, slot) = guest.configured(Speed::High, &[(OUT, 1, 192, 3 << 16), (IN, 5, 1024, 0)]);
    (guest, slot)
}

fn queue(guest: &mut Guest, slot: u8, dci: u8, count: u64, len: u32) -> Vec<u64> {
    (0..count).map(|i| guest.push(slot, dci, isoch(DATA + i * u64::from(len), len, IOC | ISP))).collect()
}

fn intervals(request: &UrbRequest) -> Vec<u32> {
    match &request.kind {
        TransferKind::Isochronous { packets } => packets.clone(),
        other => panic!("{other:?} is not isochronous"),
    }
}

fn packets(results: &[(UrbStatus, u32)]) -> Vec<PacketResult> {
    results.iter().map(|(status, actual)| PacketResult { status: *status, actual: *actual }).collect()
}

fn end(guest: &mut Guest, request: &UrbRequest, results: &[(UrbStatus, u32)]) {
    let actual = results.iter().map(|result| result.1).sum();
    guest.end_packets(request.id, UrbStatus::Completed, actual, packets(results));
    guest.settle();
}

#[test]
fn what_is_queued_at_the_doorbell_becomes_one_transfer_and_each_td_has_its_event() {
    let (mut guest, slot) = guest();
    let at = queue(&mut guest, slot, OUT, 8, 192);
    guest.ring(slot, OUT);
    let first = guest.request();
    assert_eq!(intervals(&first), [192; 8]);
    assert_eq!(first.payload, Payload::Guest(vec![Segment { addr: DATA, len: 8 * 192 }]));
    queue(&mut guest, slot, OUT, 8, 192);
    guest.ring(slot, OUT);
    assert_eq!(intervals(&guest.request()), [192; 8], "two ahead");
    end(&mut guest, &first, &[(UrbStatus::Completed, 192); 8]);
    let expected: Vec<_> = at.iter().map(|at| (*at, SUCCESS, 0)).collect();
    assert_eq!(guest.transfers(), expected);
}

#[test]
fn results_of_the_intervals_go_to_their_tds() {
    let (mut guest, slot) = guest();
    let at = queue(&mut guest, slot, IN, 5, 1024);
    guest.ring(slot, IN);
    let request = guest.request();
    let results = [
        (UrbStatus::Completed, 1024),
        (UrbStatus::Completed, 10),
        (UrbStatus::TransactionError, 0),
        (UrbStatus::NotRun, 0),
        (UrbStatus::Completed, 1024),
    ];
    end(&mut guest, &request, &results);
    let expected = [
        (at[0], SUCCESS, 0),
        (at[1], SHORT, 1014),
        (at[2], TRANSACTION, 1024),
        (at[3], MISSED, 1024),
        (at[4], SUCCESS, 0),
    ];
    assert_eq!(guest.transfers(), expected);
    assert_eq!(guest.endpoint(slot, IN).0, 1, "isochronous endpoints do not halt");
}

#[test]
fn td_of_several_trbs_is_one_interval() {
    let (mut guest, slot) = guest();
    guest.push(slot, IN, isoch(DATA, 512, CHAIN));
    let second = guest.push(slot, IN, normal(DATA + 0x1000, 512, CHAIN | ISP));
    guest.push(slot, IN, event_data(0x99, 0));
    guest.ring(slot, IN);
    let request = guest.request();
    assert_eq!(intervals(&request), [1024]);
    end(&mut guest, &request, &[(UrbStatus::Completed, 700)]);
    assert_eq!(guest.transfers(), [(second, SHORT, 324), (0x99, SHORT, 700)]);
}

#[test]
fn long_queues_go_out_in_bounded_pieces() {
    let (mut guest, slot) = guest();
    queue(&mut guest, slot, OUT, 60, 8);
    guest.ring(slot, OUT);
    let sizes: Vec<usize> = guest.submitted().iter().map(|request| intervals(request).len()).collect();
    assert_eq!(sizes, [32, 28]);
}

#[test]
fn doorbells_for_single_tds_are_bounded_too_and_the_rest_is_gathered() {
    let (mut guest, slot) = guest();
    for _ in 0..40 {
        guest.push(slot, OUT, isoch(DATA, 8, IOC));
        guest.ring(slot, OUT);
    }
    let requests = guest.submitted();
    assert_eq!(requests.len(), 16);
    end(&mut guest, &requests[0], &[(UrbStatus::Completed, 8)]);
    assert_eq!(intervals(&guest.request()).len(), 24);
}

#[test]
fn ring_that_runs_dry_is_told_once_and_goes_on_at_the_next_doorbell() {
    for (dci, code) in [(OUT, UNDERRUN), (IN, OVERRUN)] {
        let (mut guest, slot) = guest();
        queue(&mut guest, slot, dci, 1, 8);
        guest.ring(slot, dci);
        let request = guest.request();
        end(&mut guest, &request, &[(UrbStatus::Completed, 8)]);
        assert_eq!(guest.transfers().len(), 1);
        guest.wait(Duration::from_millis(20));
        let events = guest.transfers();
        assert_eq!(events.iter().map(|event| event.1).collect::<Vec<_>>(), [code]);
        guest.wait(Duration::from_secs(5));
        assert!(guest.transfers().is_empty());
        queue(&mut guest, slot, dci, 1, 8);
        guest.ring(slot, dci);
        assert_eq!(guest.submitted().len(), 1);
        assert_eq!(guest.controller.next_deadline(), None);
    }
}

#[test]
fn ring_that_is_refilled_in_time_has_no_underrun() {
    let (mut guest, slot) = guest();
    queue(&mut guest, slot, OUT, 1, 8);
    guest.ring(slot, OUT);
    let request = guest.request();
    end(&mut guest, &request, &[(UrbStatus::Completed, 8)]);
    queue(&mut guest, slot, OUT, 1, 8);
    guest.ring(slot, OUT);
    guest.wait(Duration::from_millis(50));
    assert_eq!(guest.transfers().len(), 1);
}

/// An Isoch TRB for this frame.
fn framed(frame: u32) -> Trb {
    Trb::new(DATA, 8, 5 << 10 | IOC | (frame & 0x7ff) << 20)
}

#[test]
fn frame_to_come_delays_the_start() {
    let (mut guest, slot) = guest();
    let frame = guest.read32(RUNTIME) / 8;
    guest.push(slot, OUT, framed(frame + 20));
    guest.ring(slot, OUT);
    assert!(guest.submitted().is_empty());
    guest.wait(Duration::from_millis(15));
    assert!(guest.submitted().is_empty());
    guest.wait(Duration::from_millis(6));
    assert_eq!(guest.submitted().len(), 1);
}

#[test]
fn frame_that_has_passed_is_a_missed_service() {
    let (mut guest, slot) = guest();
    guest.now += Duration::from_millis(100);
    let frame = guest.read32(RUNTIME) / 8;
    let missed = guest.push(slot, OUT, framed(frame.wrapping_sub(5)));
    guest.push(slot, OUT, isoch(DATA, 8, IOC));
    guest.ring(slot, OUT);
    guest.wait(Duration::ZERO);
    assert_eq!(guest.transfers(), [(missed, MISSED, 8)]);
    assert_eq!(guest.submitted().len(), 1, "the next one goes out");
}

#[test]
fn stop_in_the_middle_reports_what_was_served_and_stands_at_the_rest() {
    let (mut guest, slot) = guest();
    let at = queue(&mut guest, slot, OUT, 8, 192);
    guest.ring(slot, OUT);
    let request = guest.request();
    let stop = guest.post_command(command_trb(15, slot, OUT, 0));
    let mut results = packets(&[(UrbStatus::Completed, 192); 3]);
    results.extend(packets(&[(UrbStatus::Cancelled, 0); 5]));
    guest.end_packets(request.id, UrbStatus::Cancelled, 3 * 192, results);
    guest.settle();
    let events = guest.events();
    let codes: Vec<_> = events.iter().map(|event| (event.pointer, event.code)).collect();
    assert_eq!(codes, [(at[0], 1), (at[1], 1), (at[2], 1), (at[3], 26), (stop, 1)]);
    assert_eq!(guest.endpoint(slot, OUT), (3, at[3] | 1));
    guest.ring(slot, OUT);
    assert_eq!(intervals(&guest.request()).len(), 5);
}

#[test]
fn device_pulled_during_a_stream_leaves_nothing_behind() {
    let mut guest = Guest::new();
    let (device, slot) = guest.configured(Speed::High, &[(OUT, 1, 192, 0)]);
    queue(&mut guest, slot, OUT, 8, 192);
    guest.ring(slot, OUT);
    let request = guest.request();
    guest.unplug(device);
    assert_eq!(guest.cancelled().1, [request.id]);
    end(&mut guest, &request, &[(UrbStatus::Gone, 0); 8]);
    assert!(guest.transfers().is_empty());
    guest.ring(slot, OUT);
    guest.wait(Duration::from_millis(100));
    assert!(guest.transfers().iter().all(|event| event.1 == TRANSACTION || event.1 == UNDERRUN));
    assert_eq!(guest.controller.trbs_in_flight, 0);
    assert_eq!(guest.controller.next_deadline(), None);
}

#[test]
fn transport_that_gives_too_few_results_does_not_lose_a_td() {
    let (mut guest, slot) = guest();
    let at = queue(&mut guest, slot, IN, 3, 64);
    guest.ring(slot, IN);
    let request = guest.request();
    end(&mut guest, &request, &[(UrbStatus::Completed, 64)]);
    assert_eq!(guest.transfers(), [(at[0], SUCCESS, 0), (at[1], TRANSACTION, 64), (at[2], TRANSACTION, 64)]);
}

#[test]
fn bei_on_all_but_the_last_td_costs_one_interrupt() {
    let (mut guest, slot) = guest();
    guest.interrupts();
    for index in 0..8 {
        let flags = if index == 7 { IOC } else { IOC | BEI };
        guest.push(slot, OUT, isoch(DATA, 8, flags));
    }
    guest.ring(slot, OUT);
    let request = guest.request();
    end(&mut guest, &request, &[(UrbStatus::Completed, 8); 8]);
    assert_eq!(guest.interrupts(), 1);
    assert_eq!(guest.transfers().len(), 8);
}

#[test]
fn normal_trb_without_isoch_trb_is_an_error() {
    let (mut guest, slot) = guest();
    let at = guest.push(slot, OUT, normal(DATA, 8, IOC));
    guest.ring(slot, OUT);
    assert_eq!(guest.transfers(), [(at, TRB, 0)]);
    assert_eq!(guest.endpoint(slot, OUT).0, 4);
}
