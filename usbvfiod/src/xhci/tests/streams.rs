//! Bulk streams (hostile input I2, CVE-2021-3713).

use super::super::fixture::{DATA, Guest, IOC, ISP, command_trb, normal};
use super::super::trb::Trb;
use crate::urb::{DeviceOp, TransferKind, UrbStatus};

const SUCCESS: u8 = 1;
const TRB: u8 = 5;
const STREAM_TYPE: u8 = 10;
const STREAM_ID: u8 = 34;

const DCI: u8 = 3;

fn queue(guest: &mut Guest, slot: u8, stream: u16) -> u64 {
    let at = guest.push_stream(slot, DCI, stream, normal(DATA, 512, IOC | ISP));
    guest.ring_stream(slot, DCI, stream);
    at
}

/// The entry of a stream in the Stream Context Array.
fn context(guest: &Guest, slot: u8, stream: u64) -> u64 {
    let array = guest.endpoint(slot, DCI).1 & !0xf;
    u64::from_le_bytes(guest.mem.get(array + stream * 16))
}

fn set_dequeue(guest: &mut Guest, slot: u8, pointer: u64, stream: u32) -> u8 {
    let control = command_trb(16, slot, DCI, 0).control().into_bits();
    guest.command(Trb::new(pointer, stream << 16, control)).0
}

#[test]
fn each_stream_has_its_own_transfers() {
    let mut guest = Guest::new();
    let (_, slot) = guest.streams();
    let at: Vec<u64> = (1..=15).map(|stream| queue(&mut guest, slot, stream)).collect();
    let requests = guest.submitted();
    let streams: Vec<_> = requests.iter().map(|request| request.kind.clone()).collect();
    let expected: Vec<_> = (1..=15).map(|stream| TransferKind::Bulk { stream }).collect();
    assert_eq!(streams, expected, "all are out, so that the device can choose");
    guest.complete(requests[6].id, UrbStatus::Completed, 512);
    assert_eq!(guest.transfers(), [(at[6], SUCCESS, 0)]);
    guest.complete(requests[0].id, UrbStatus::Completed, 512);
    assert_eq!(guest.transfers(), [(at[0], SUCCESS, 0)]);
}

#[test]
fn streams_out_of_range_are_ignored() {
    let mut guest = Guest::new();
    let (_, slot) = guest.streams();
    for stream in [0, 32, 33, 0xfffd, 0xfffe, 0xffff] {
        guest.ring_stream(slot, DCI, stream);
    }
    assert!(guest.submitted().is_empty() && guest.transfers().is_empty());
    assert_eq!(guest.endpoint(slot, DCI).0, 1);
}

#[test]
fn stream_id_on_an_endpoint_without_streams_is_ignored() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.push(slot, 4, normal(DATA, 8, IOC));
    guest.ring_stream(slot, 4, 1);
    assert!(guest.submitted().is_empty());
    assert_eq!(guest.slot_command(15, slot, 4, 0), SUCCESS);
    let control = command_trb(16, slot, 4, 0).control().into_bits();
    assert_eq!(guest.command(Trb::new(DATA | 1, 1 << 16, control)).0, TRB);
}

#[test]
fn stream_context_of_another_type_stops_the_endpoint_until_set_tr_dequeue() {
    let mut guest = Guest::new();
    let (_, slot) = guest.streams();
    guest.ring_stream(slot, DCI, 20);
    assert_eq!(guest.transfers(), [(0, STREAM_TYPE, 0)]);
    assert_eq!(guest.endpoint(slot, DCI).0, 4);
    guest.ring_stream(slot, DCI, 20);
    assert!(guest.transfers().is_empty(), "told once");
    let ring = guest.new_ring(slot, DCI, 1);
    assert_eq!(set_dequeue(&mut guest, slot, ring | 2 | 1, 1), SUCCESS);
    queue(&mut guest, slot, 1);
    assert_eq!(guest.submitted().len(), 1);
}

#[test]
fn set_tr_dequeue_is_for_the_streams_there_are() {
    let mut guest = Guest::new();
    let (_, slot) = guest.streams();
    assert_eq!(guest.slot_command(15, slot, DCI, 0), SUCCESS);
    for stream in [0, 32, 65535] {
        assert_eq!(set_dequeue(&mut guest, slot, DATA | 3, stream), STREAM_ID);
    }
    assert_eq!(set_dequeue(&mut guest, slot, DATA | 3, 5), SUCCESS);
    assert_eq!(context(&guest, slot, 5), DATA | 3);
}

#[test]
fn stall_on_one_stream_halts_all_and_each_goes_on_where_it_was() {
    let mut guest = Guest::new();
    let (_, slot) = guest.streams();
    let at: Vec<u64> = (1..=3).map(|stream| queue(&mut guest, slot, stream)).collect();
    let requests = guest.submitted();
    guest.complete(requests[1].id, UrbStatus::Stalled, 0);
    assert_eq!(guest.transfers(), [(at[1], 6, 512)]);
    assert_eq!(guest.endpoint(slot, DCI).0, 2);
    assert_eq!(guest.cancelled().1, [requests[0].id, requests[2].id]);
    guest.complete(requests[0].id, UrbStatus::NotRun, 0);
    guest.complete(requests[2].id, UrbStatus::NotRun, 0);
    assert_eq!(guest.slot_command(14, slot, DCI, 0), SUCCESS);
    assert_eq!(set_dequeue(&mut guest, slot, (at[1] + 16) | 3, 2), SUCCESS);
    for stream in [1, 2, 3] {
        guest.ring_stream(slot, DCI, stream);
    }
    let again = guest.submitted();
    assert_eq!(again.len(), 2, "stream 2 has nothing left");
    guest.complete(again[1].id, UrbStatus::Completed, 512);
    assert_eq!(guest.transfers(), [(at[2], SUCCESS, 0)]);
}

#[test]
fn stop_writes_the_stream_contexts() {
    let mut guest = Guest::new();
    let (_, slot) = guest.streams();
    let at = queue(&mut guest, slot, 4);
    let request = guest.request();
    let stop = guest.post_command(command_trb(15, slot, DCI, 0));
    guest.complete(request.id, UrbStatus::Cancelled, 0);
    assert_eq!(guest.answer(stop), Some((SUCCESS, slot)));
    assert_eq!(context(&guest, slot, 4), at | 3);
}

#[test]
fn dropping_the_endpoint_frees_the_streams_of_the_host() {
    let mut guest = Guest::new();
    let (_, slot) = guest.streams();
    let input = guest.configure_input(slot, &[(DCI, 6, 1024, 0)]);
    assert_eq!(guest.slot_command(12, slot, 0, input), SUCCESS);
    assert_eq!(guest.operation().1, DeviceOp::FreeStreams { endpoints: vec![0x81] });
}

#[test]
fn stream_array_outside_memory_stops_the_endpoint_only() {
    let mut guest = Guest::new();
    let (_, slot) = guest.enumerate(common::ids::Speed::Super);
    let input = guest.configure_input(slot, &[(DCI, 6, 1024, 1 << 10 | 1 << 15)]);
    guest.mem.put(input + 0x88, &(1u64 << 50).to_le_bytes());
    let at = guest.post_command(command_trb(12, slot, 0, input));
    let (id, _) = guest.operation();
    guest.operation_done(id, Ok(()));
    assert_eq!(guest.answer(at), Some((SUCCESS, slot)));
    guest.ring_stream(slot, DCI, 1);
    assert_eq!(guest.endpoint(slot, DCI).0, 4);
}
