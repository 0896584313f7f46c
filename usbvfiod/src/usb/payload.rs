//! Payload: between the pieces of guest memory and a transfer's buffer. One copy each way, and every address and length
//! is the guest's word.

use common::usbfs::PacketOutcome;

use crate::urb::{DmaFault, GuestMem, Payload, TransferKind, UrbRequest, UrbStatus};

/// How many bytes the URB's buffer has, or why there is no such URB.
pub(super) fn urb_len(request: &UrbRequest) -> Result<usize, UrbStatus> {
    let len = request.len as usize;
    let TransferKind::Control { setup } = request.kind else { return Ok(len) };
    let stage = usize::from(u16::from_le_bytes([setup[6], setup[7]]));
    let set_address = setup[..2] == [0x00, 0x05];
    // The host owns the address. And an OUT data stage can be no shorter on usbfs than its setup packet says.
    if set_address || len > stage || (!request.is_in() && len < stage) {
        return Err(UrbStatus::TransactionError);
    }
    Ok(8 + stage)
}

/// Puts the setup packet and the bytes for the device into the buffer.
pub(super) fn fill<M: GuestMem + ?Sized>(
    request: &UrbRequest,
    mem: &M,
    buffer: &mut [u8],
) -> Result<(), DmaFault> {
    let data = match &request.kind {
        TransferKind::Control { setup } => {
            let (head, data) = buffer.split_at_mut(8);
            head.copy_from_slice(setup);
            data
        }
        _ => buffer,
    };
    if request.is_in() {
        return Ok(());
    }
    let data = &mut data[..request.len as usize];
    match &request.payload {
        Payload::Immediate { bytes, len } => {
            let bytes = bytes.get(..data.len()).filter(|bytes| bytes.len() == usize::from(*len));
            data.copy_from_slice(bytes.ok_or(DmaFault { addr: 0, len: data.len() })?);
            Ok(())
        }
        Payload::Guest(segments) => mem.gather(segments, data),
    }
}

/// Copies bytes to the guest's payload, from `offset` bytes into it.
pub(super) fn copy_to_guest<M: GuestMem + ?Sized>(
    mem: &M,
    payload: &Payload,
    offset: usize,
    bytes: &[u8],
) -> Result<(), DmaFault> {
    let Payload::Guest(segments) = payload else { return Ok(()) };
    mem.scatter(segments, offset, bytes)
}

/// Copies each packet to its place. A packet that came short leaves a hole.
pub(super) fn copy_packets_to_guest<M: GuestMem + ?Sized>(
    mem: &M,
    request: &UrbRequest,
    packets: &[PacketOutcome],
    data: &[u8],
) -> Result<(), DmaFault> {
    let TransferKind::Isochronous { packets: lengths } = &request.kind else { return Ok(()) };
    let mut at = 0;
    for (packet, &length) in packets.iter().zip(lengths) {
        let bytes = data.get(at..).and_then(|rest| rest.get(..packet.actual as usize));
        copy_to_guest(mem, &request.payload, at, bytes.unwrap_or_default())?;
        at += length as usize;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::super::device::tests::{Memory, bulk, control, segments};
    use super::*;

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
}
