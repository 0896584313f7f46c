//! What can be shown without a USB device: a queue over a file that is none. The rest runs against real kernels in
//! `vm-tests`.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::*;

/// A queue whose ioctls all fail.
fn queue_over_a_regular_file() -> UrbQueue {
    let fd = OwnedFd::from(tempfile::tempfile().unwrap());
    UrbQueue::new(UsbfsFile { fd: Arc::new(fd) })
}

#[test]
fn refused_urb_gives_its_buffer_back_and_leaves_nothing_in_flight() {
    let mut queue = queue_over_a_regular_file();

    let error = queue
        .submit(0x81, UrbKind::Bulk { stream: 0, follows: false }, 3, UrbBuffer::Heap(vec![1, 2, 3]))
        .unwrap_err();

    assert_eq!(error.errno, Errno::ENOTTY);
    assert_eq!(error.buffer.as_slice(), [1, 2, 3]);
    assert_eq!(queue.in_flight(), 0);
}

#[test]
fn buffer_shorter_than_the_transfer_never_reaches_the_kernel() {
    let mut queue = queue_over_a_regular_file();

    let bulk = queue.submit(0x81, UrbKind::Interrupt, 4, UrbBuffer::Heap(vec![0; 3])).unwrap_err();
    let control = queue.submit(0, UrbKind::Control, 7, UrbBuffer::Heap(vec![0; 7])).unwrap_err();

    assert_eq!((bulk.errno, control.errno), (Errno::EINVAL, Errno::EINVAL));
}

#[test]
fn isochronous_packets_beyond_count_or_buffer_never_reach_the_kernel() {
    let mut queue = queue_over_a_regular_file();

    for packets in [&[][..], &[1; ISO_PACKETS_MAX + 1], &[u32::MAX, 2], &[600, 600]] {
        let kind = UrbKind::Isochronous { packets };
        let error = queue.submit(0x81, kind, 1024, UrbBuffer::Heap(vec![0; 1024])).unwrap_err();
        assert_eq!(error.errno, Errno::EINVAL, "{} packets", packets.len());
    }
}

#[test]
fn tokens_of_nothing_are_not_cancelled() {
    let mut queue = queue_over_a_regular_file();

    assert_eq!(queue.discard(UrbToken { slot: 0, generation: 1 }), Ok(false));
    assert_eq!(queue.discard(UrbToken { slot: u16::MAX, generation: 0 }), Ok(false));
    assert_eq!(queue.reap(&mut Vec::new()).map(|reaped| reaped.is_some()), Ok(false));
}

#[test]
fn kernel_status_becomes_the_error_number() {
    assert_eq!(status(0), Ok(()));
    assert_eq!(status(-32), Err(Errno::EPIPE));
    assert_eq!(status(i32::MIN), Err(Errno::UnknownErrno));
}
