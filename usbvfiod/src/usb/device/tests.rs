//! The half that needs no device. What the kernel does is shown on real kernels in `vm-tests`.

use std::cell::RefCell;

use super::super::pool::Limits;
use super::*;
use crate::urb::Segment;

const LATER: Duration = Duration::from_secs(4);

/// Guest memory from address 0 on.
struct Memory(RefCell<Vec<u8>>);

impl Memory {
    fn new(len: usize) -> Self {
        let pattern = (0..len).map(|index| u8::try_from(index % 251).unwrap());
        Self(RefCell::new(pattern.collect()))
    }

    fn range(&self, addr: u64, len: usize) -> Result<std::ops::Range<usize>, DmaFault> {
        let start = usize::try_from(addr).map_err(|_| DmaFault { addr, len })?;
        let end = start.checked_add(len).filter(|&end| end <= self.0.borrow().len());
        end.map(|end| start..end).ok_or(DmaFault { addr, len })
    }
}

impl GuestMem for Memory {
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), DmaFault> {
        let range = self.range(addr, buf.len())?;
        buf.copy_from_slice(&self.0.borrow()[range]);
        Ok(())
    }

    fn write(&self, addr: u64, buf: &[u8]) -> Result<(), DmaFault> {
        let range = self.range(addr, buf.len())?;
        self.0.borrow_mut()[range].copy_from_slice(buf);
        Ok(())
    }
}

fn segments(pieces: &[(u64, u32)]) -> Payload {
    Payload::Guest(pieces.iter().map(|&(addr, len)| Segment { addr, len }).collect())
}

fn bulk(id: u64, endpoint: u8, payload: Payload, len: u32) -> UrbRequest {
    UrbRequest {
        id: TransferId(id),
        device: DeviceHandle(1),
        endpoint,
        kind: TransferKind::Bulk { stream: 0 },
        payload,
        len,
        follows: false,
    }
}

fn control(setup: [u8; 8], len: u32) -> UrbRequest {
    UrbRequest { kind: TransferKind::Control { setup }, ..bulk(1, 0, segments(&[(0, len)]), len) }
}

fn device() -> Device {
    Device::new(DeviceHandle(1), Budget::new(Limits::default()))
}

/// What was reported, in words.
fn words(event: &DeviceEvent) -> String {
    match event {
        DeviceEvent::Completed { completion, .. } => format!("{} {:?}", completion.id.0, completion.status),
        DeviceEvent::Operated { id, result, .. } => format!("op {} {result:?}", id.0),
        other => format!("{other:?}"),
    }
}

#[test]
fn out_payload_is_gathered_from_its_segments_in_order() {
    let memory = Memory::new(64);
    let request = bulk(1, 0x02, segments(&[(10, 2), (0, 0), (40, 3)]), 5);
    let mut buffer = [0xff; 8];

    fill(&request, &memory, &mut buffer).unwrap();

    assert_eq!(buffer, [10, 11, 40, 41, 42, 0xff, 0xff, 0xff]);
}

#[test]
fn out_payload_outside_of_guest_memory_or_too_short_is_a_fault() {
    let memory = Memory::new(64);
    for pieces in [&[(63, 2)][..], &[(u64::MAX, 2)], &[(0, 1)], &[]] {
        let request = bulk(1, 0x02, segments(pieces), 2);
        assert!(fill(&request, &memory, &mut [0; 2]).is_err(), "{pieces:?}");
    }
}

#[test]
fn immediate_bytes_are_sent_as_they_are() {
    let payload = Payload::Immediate { bytes: [1, 2, 3, 4, 5, 6, 7, 8], len: 3 };
    let mut buffer = [0; 3];
    fill(&bulk(1, 0x02, payload, 3), &Memory::new(0), &mut buffer).unwrap();
    assert_eq!(buffer, [1, 2, 3]);
}

#[test]
fn immediate_length_that_lies_is_a_fault() {
    let payload = Payload::Immediate { bytes: [0; 8], len: 9 };
    assert!(fill(&bulk(1, 0x02, payload, 9), &Memory::new(0), &mut [0; 9]).is_err());
}

#[test]
fn in_payload_is_scattered_and_bytes_that_did_not_come_stay() {
    let memory = Memory::new(16);
    let payload = segments(&[(8, 2), (0, 4)]);

    copy_to_guest(&memory, &payload, 0, &[0xa0, 0xa1, 0xa2]).unwrap();

    assert_eq!(memory.0.borrow()[..10], [0xa2, 1, 2, 3, 4, 5, 6, 7, 0xa0, 0xa1]);
}

#[test]
fn packets_land_at_their_own_places_with_holes_between() {
    let memory = Memory(RefCell::new(vec![0; 12]));
    let mut request = bulk(1, 0x81, segments(&[(0, 6), (6, 6)]), 12);
    request.kind = TransferKind::Isochronous { packets: vec![4, 4, 4] };
    let packet = |actual| PacketOutcome { status: Ok(()), actual };
    let data: Vec<u8> = (1..=12).collect();

    copy_packets_to_guest(&memory, &request, &[packet(2), packet(0), packet(4)], &data).unwrap();

    assert_eq!(memory.0.borrow()[..], [1, 2, 0, 0, 0, 0, 0, 0, 9, 10, 11, 12]);
}

#[test]
fn control_buffer_has_room_for_what_the_setup_packet_says() {
    let get_descriptor = [0x80, 6, 0, 1, 0, 0, 18, 0];
    assert_eq!(urb_len(&control(get_descriptor, 18)), Ok(26));
    assert_eq!(urb_len(&control(get_descriptor, 8)), Ok(26));
    assert_eq!(urb_len(&control([0x80, 6, 0, 1, 0, 0, 0xff, 0xff], 0)), Ok(8 + 65535));
}

#[test]
fn control_that_usbfs_cannot_carry_is_refused() {
    let longer_than_its_setup = control([0x80, 6, 0, 1, 0, 0, 18, 0], 19);
    let shorter_out = control([0x21, 9, 0, 2, 0, 0, 8, 0], 7);
    let set_address = control([0x00, 5, 9, 0, 0, 0, 0, 0], 0);

    for request in [longer_than_its_setup, shorter_out, set_address] {
        assert_eq!(urb_len(&request), Err(UrbStatus::TransactionError), "{request:?}");
    }
}

#[test]
fn waiting_transfers_are_cancelled_newest_first_and_the_others_stay() {
    let mut device = device();
    let mut log = Vec::new();
    let now = Instant::now();
    let memory = Memory::new(0);
    for id in 1..=4 {
        device.submit(bulk(id, 0x81, segments(&[]), 0), now, &memory, &mut |_| {});
    }

    device.cancel(&[TransferId(1), TransferId(4), TransferId(3)], false, now, &mut |event| {
        log.push(words(&event))
    });

    assert_eq!(log, ["4 Cancelled", "3 Cancelled", "1 Cancelled"]);
    assert_eq!(device.waiting.len(), 1);
}

#[test]
fn operation_that_takes_too_long_is_answered_once() {
    let mut device = device();
    let mut log = Vec::new();
    let now = Instant::now();
    device.operate(OpId(7), DeviceOp::Reset, now, &mut |_| {});
    let deadline = device.next_deadline().unwrap();

    device.on_deadline(now + LATER, &Memory::new(0), &mut |event| log.push(words(&event)));
    device.operated(OpId(7), Ok(()), &mut |event| log.push(words(&event)));

    assert_eq!(deadline, now + ANSWER_WITHIN);
    assert_eq!(log, ["op 7 Err(Failed)"]);
    assert!(device.jobs.is_empty(), "an operation that has not begun must not begin");
    assert_eq!(device.next_deadline(), None);
}

#[test]
fn device_that_is_gone_answers_everything_at_once() {
    let mut device = device();
    let mut log = Vec::new();
    let now = Instant::now();
    let memory = Memory::new(0);
    device.submit(bulk(1, 0x81, segments(&[]), 0), now, &memory, &mut |_| {});

    device.set_gone(&mut |event| log.push(words(&event)));
    device.set_gone(&mut |event| log.push(words(&event)));
    device.submit(bulk(2, 0x81, segments(&[]), 0), now, &memory, &mut |event| log.push(words(&event)));
    device.operate(OpId(3), DeviceOp::Reset, now, &mut |event| log.push(words(&event)));

    assert_eq!(log, ["1 Gone", "Gone { device: DeviceHandle(1) }", "2 Gone", "op 3 Err(Gone)"]);
}

#[test]
fn operations_that_pile_up_are_refused() {
    let mut device = device();
    let mut refused = 0;
    for id in 0..100 {
        device.operate(OpId(id), DeviceOp::Reset, Instant::now(), &mut |_| refused += 1);
    }
    assert_eq!((device.jobs.len(), refused), (JOBS_MAX, 100 - JOBS_MAX));
}

#[test]
fn endpoints_of_both_directions_have_places_of_their_own() {
    let mut seen = 0_u32;
    for number in 0..16 {
        for direction in [0, 0x80] {
            assert_eq!(seen & endpoint_bit(number | direction), 0);
            seen |= endpoint_bit(number | direction);
        }
    }
    assert_eq!(seen, u32::MAX);
}
