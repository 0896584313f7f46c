//! The half that needs no device. What the kernel does is shown on real kernels in `vm-tests`.

use std::cell::RefCell;

use super::super::pool::Limits;
use super::*;
use crate::urb::Segment;

const LATER: Duration = Duration::from_secs(4);

/// Guest memory from address 0 on.
pub(in crate::usb) struct Memory(pub(in crate::usb) RefCell<Vec<u8>>);

impl Memory {
    pub(in crate::usb) fn new(len: usize) -> Self {
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

pub(in crate::usb) fn segments(pieces: &[(u64, u32)]) -> Payload {
    Payload::Guest(pieces.iter().map(|&(addr, len)| Segment { addr, len }).collect())
}

pub(in crate::usb) fn bulk(id: u64, endpoint: u8, payload: Payload, len: u32) -> UrbRequest {
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

pub(in crate::usb) fn control(setup: [u8; 8], len: u32) -> UrbRequest {
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

#[test]
fn resume_that_waits_too_long_is_still_carried_out() {
    let mut device = device();
    let mut log = Vec::new();
    let now = Instant::now();
    device.operate(OpId(1), DeviceOp::Suspend, now, &mut |_| {});
    device.operate(OpId(2), DeviceOp::Resume, now, &mut |_| {});

    device.on_deadline(now + LATER, &Memory::new(0), &mut |event| log.push(words(&event)));

    assert_eq!(log, ["op 1 Err(Failed)", "op 2 Err(Failed)"]);
    assert!(matches!(device.jobs.make_contiguous(), [Work::Operate { id: OpId(2), .. }]));
}

#[test]
fn what_was_heard_while_the_guest_slept_is_its_next_transfer() {
    let mut device = device();
    let mut log = Vec::new();
    let memory = Memory::new(64);
    device.wake.heard(0x81, &[7, 8, 9]);
    let request = UrbRequest { kind: TransferKind::Interrupt, ..bulk(5, 0x81, segments(&[(16, 8)]), 8) };

    // As when the link comes back from the lane that has resumed the device.
    device.start(request, &memory, &mut |event| log.push(words(&event)));

    assert_eq!(log, ["5 Completed"]);
    assert_eq!(memory.0.borrow()[16..20], [7, 8, 9, 19], "and nothing behind it is written");
    assert_eq!(device.counters.bytes_in, 3);
}

#[test]
fn device_that_may_wake_the_guest_is_kept_awake() {
    let mut device = device();
    let now = Instant::now();
    device.operate(OpId(1), DeviceOp::Suspend, now, &mut |_| {});
    device.wake.control_done([0, 3, 1, 0, 0, 0, 0, 0]);
    device.operate(OpId(2), DeviceOp::Suspend, now, &mut |_| {});

    let ops: Vec<_> = device
        .jobs
        .iter()
        .map(|work| match work {
            Work::Operate { op, .. } => op.clone(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(ops, [DeviceOp::Suspend, DeviceOp::Resume]);
}
