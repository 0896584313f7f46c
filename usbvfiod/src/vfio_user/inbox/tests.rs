use std::fs::File;

use proptest::prelude::*;

use super::*;

fn header(size: u32) -> Vec<u8> {
    let mut bytes = vec![1, 0, 2, 0];
    bytes.extend_from_slice(&size.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes
}

/// A message with `payload` bytes of `fill`.
fn message(payload: usize, fill: u8) -> Vec<u8> {
    let mut bytes = header((HEADER_SIZE + payload) as u32);
    bytes.resize(HEADER_SIZE + payload, fill);
    bytes
}

fn fds(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| File::open("/dev/null").expect("null").into()).collect()
}

/// Puts `bytes` in as one read, as far as they fit; returns how many did.
fn feed(inbox: &mut Inbox, bytes: &[u8], fds: Vec<OwnedFd>) -> usize {
    let spare = inbox.spare();
    let len = spare.len().min(bytes.len());
    spare[..len].copy_from_slice(&bytes[..len]);
    inbox.received(len, fds, false);
    len
}

fn feed_all(inbox: &mut Inbox, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        bytes = &bytes[feed(inbox, bytes, Vec::new())..];
    }
}

fn payload(inbox: &Inbox, frame: &Frame) -> Vec<u8> {
    inbox.bytes(frame.payload.clone()).to_vec()
}

#[test]
fn several_messages_in_one_read_come_out_one_by_one() {
    let mut inbox = Inbox::default();
    feed(&mut inbox, &[message(4, 1), message(0, 0), message(8, 2)].concat(), Vec::new());
    let lengths: Vec<usize> = std::iter::from_fn(|| inbox.pop()).map(|frame| frame.payload.len()).collect();
    assert_eq!(lengths, [4, 0, 8]);
}

#[test]
fn message_in_single_bytes_comes_out_when_it_is_whole() {
    let mut inbox = Inbox::default();
    let bytes = message(20, 9);
    for byte in &bytes[..bytes.len() - 1] {
        feed(&mut inbox, &[*byte], Vec::new());
        assert!(inbox.pop().is_none());
    }
    feed(&mut inbox, &[9], Vec::new());
    let frame = inbox.pop().expect("whole");
    assert_eq!(payload(&inbox, &frame), [9; 20]);
}

#[test]
fn descriptors_belong_to_the_last_message_of_their_read() {
    let mut inbox = Inbox::default();
    feed(&mut inbox, &[message(4, 1), message(4, 2)].concat(), fds(2));
    let counts: Vec<usize> = std::iter::from_fn(|| inbox.pop()).map(|frame| frame.fds.len()).collect();
    assert_eq!(counts, [0, 2]);
}

#[test]
fn descriptors_wait_for_the_rest_of_their_message() {
    let mut inbox = Inbox::default();
    let bytes = message(40, 1);
    feed(&mut inbox, &[&message(0, 0)[..], &bytes[..10]].concat(), fds(3));
    feed(&mut inbox, &[&bytes[10..], &message(0, 0)].concat(), Vec::new());
    let counts: Vec<usize> = std::iter::from_fn(|| inbox.pop()).map(|frame| frame.fds.len()).collect();
    assert_eq!(counts, [0, 3, 0]);
}

#[test]
fn descriptors_trickling_in_with_one_message_are_bounded() {
    let mut inbox = Inbox::default();
    let bytes = message(1000, 1);
    for byte in &bytes {
        feed(&mut inbox, &[*byte], fds(4));
    }
    let frame = inbox.pop().expect("whole");
    assert_eq!((frame.fds.len(), frame.fds_lost), (MAX_FDS, true));
}

#[test]
fn descriptors_the_kernel_could_not_deliver_mark_the_message() {
    let mut inbox = Inbox::default();
    let bytes = message(0, 0);
    inbox.spare()[..bytes.len()].copy_from_slice(&bytes);
    inbox.received(bytes.len(), fds(1), true);
    assert!(inbox.pop().expect("whole").fds_lost);
}

#[test]
fn too_long_message_is_kept_as_a_header_and_skipped() {
    let mut inbox = Inbox::default();
    let size = MAX_MESSAGE + 1;
    feed(&mut inbox, &header(size as u32), Vec::new());
    let frame = inbox.pop().expect("its header");
    assert_eq!((frame.header.size as usize, frame.payload.len()), (size, 0));
    feed_all(&mut inbox, &vec![7; size - HEADER_SIZE]);
    assert!(inbox.pop().is_none());
    feed(&mut inbox, &message(3, 5), Vec::new());
    let frame = inbox.pop().expect("the next one");
    assert_eq!(payload(&inbox, &frame), [5; 3]);
}

#[test]
fn rest_of_a_too_long_message_may_share_a_read_with_its_neighbours() {
    let mut inbox = Inbox::default();
    let size = MAX_MESSAGE + 100;
    let mut bytes = message(1, 1);
    bytes.extend(header(size as u32));
    bytes.resize(bytes.len() + size - HEADER_SIZE, 7);
    bytes.extend(message(2, 2));
    feed_all(&mut inbox, &bytes);
    let sizes: Vec<u32> = std::iter::from_fn(|| inbox.pop()).map(|frame| frame.header.size).collect();
    assert_eq!(sizes, [17, size as u32, 18]);
}

#[test]
fn descriptors_with_the_rest_of_a_too_long_message_that_is_taken_are_closed() {
    let mut inbox = Inbox::default();
    feed(&mut inbox, &header(u32::MAX), Vec::new());
    assert!(inbox.pop().is_some());
    feed(&mut inbox, &[0; 100], fds(2));
    assert!(inbox.arrived.is_empty());
}

#[test]
fn size_below_a_header_counts_as_a_header() {
    let mut inbox = Inbox::default();
    feed(&mut inbox, &[header(0), header(15), message(1, 1)].concat(), Vec::new());
    let sizes: Vec<u32> = std::iter::from_fn(|| inbox.pop()).map(|frame| frame.header.size).collect();
    assert_eq!(sizes, [0, 15, 17]);
}

#[test]
fn buffer_grows_for_a_long_message_and_shrinks_again() {
    let mut inbox = Inbox::default();
    feed_all(&mut inbox, &message(MAX_MESSAGE - HEADER_SIZE, 3));
    assert_eq!(inbox.pop().expect("whole").payload.len(), MAX_MESSAGE - HEADER_SIZE);
    assert_eq!(inbox.spare().len(), IDLE_LEN);
}

#[test]
fn messages_that_are_not_taken_stop_the_reading() {
    let mut inbox = Inbox::default();
    let mut fed = 0;
    while inbox.wants_bytes() {
        feed(&mut inbox, &message(16, 1), Vec::new());
        fed += 1;
    }
    assert!(fed * 32 <= IDLE_LEN + 32, "{fed} messages");
    assert!(inbox.pop().is_some());
}

#[test]
fn messages_with_descriptors_that_are_not_taken_stop_the_reading() {
    let mut inbox = Inbox::default();
    let mut fed = 0;
    while inbox.wants_bytes() {
        feed(&mut inbox, &message(0, 1), fds(1));
        fed += 1;
    }
    assert_eq!(fed, MAX_WAITING_FDS);
}

proptest! {
    /// However the stream is cut into reads, the same messages come out, and memory stays bounded.
    #[test]
    fn cut_of_the_stream_does_not_matter(
        lengths in prop::collection::vec(0_usize..3000, 1..20),
        cuts in prop::collection::vec(1_usize..5000, 1..40),
    ) {
        let mut bytes = Vec::new();
        for (fill, &len) in lengths.iter().enumerate() {
            bytes.extend(message(len, fill as u8));
        }
        let mut inbox = Inbox::default();
        let mut out = Vec::new();
        let (mut rest, mut cuts) = (&bytes[..], cuts.iter().cycle());
        while !rest.is_empty() {
            let len = rest.len().min(*cuts.next().expect("endless"));
            rest = &rest[feed(&mut inbox, &rest[..len], Vec::new())..];
            while let Some(frame) = inbox.pop() {
                out.push(payload(&inbox, &frame));
            }
            prop_assert!(inbox.buf.len() <= IDLE_LEN + MAX_MESSAGE);
        }
        let expected: Vec<Vec<u8>> =
            lengths.iter().enumerate().map(|(fill, &len)| vec![fill as u8; len]).collect();
        prop_assert_eq!(out, expected);
    }

    /// Any bytes, with descriptors anywhere: no panic, bounded memory, bounded descriptors.
    #[test]
    fn any_bytes_are_survived(
        reads in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..200), 0_usize..3, any::<bool>()), 0..60),
    ) {
        let mut inbox = Inbox::default();
        for (bytes, fd_count, take) in reads {
            if inbox.wants_bytes() {
                feed(&mut inbox, &bytes, fds(fd_count));
            }
            if take {
                while let Some(frame) = inbox.pop() {
                    prop_assert!(frame.fds.len() <= MAX_FDS);
                    prop_assert!(inbox.bytes(frame.payload).len() <= MAX_MESSAGE);
                }
            }
            prop_assert!(inbox.buf.len() <= IDLE_LEN + MAX_MESSAGE);
            prop_assert!(inbox.arrived.len() <= MAX_WAITING_FDS + 1);
        }
    }
}
