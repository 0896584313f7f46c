//! What does not show on the wire; the rest is in `tests/vfio_user`.

use proptest::prelude::*;

use super::*;
use crate::vfio_user::message::command;

const LAYOUT: Layout = Layout { region_sizes: [0x1000, 0, 0x2000, 0, 0, 0, 0, 256, 0], msix_vectors: 3 };

fn message(command: u16, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = (message::HEADER_SIZE + payload.len()) as u32;
    let header = Header { id: 1, command, size, flags, error: 0 };
    [header.as_bytes(), payload].concat()
}

fn feed(session: &mut Session, bytes: &[u8]) {
    let spare = session.inbox().spare();
    spare[..bytes.len()].copy_from_slice(bytes);
    session.inbox().received(bytes.len(), Vec::new(), false);
}

fn negotiated(serial: u32) -> Session {
    let mut session = Session::new(LAYOUT, serial);
    feed(&mut session, &message(command::VERSION, 0, &[0, 0, 1, 0]));
    assert!(session.next_request().is_none());
    assert!(session.is_negotiated());
    drain(&mut session);
    session
}

/// Sends everything; returns the replies.
fn drain(session: &mut Session) -> Vec<Vec<u8>> {
    let outbox = session.outbox();
    let mut replies = Vec::new();
    while !outbox.is_empty() {
        replies.push(outbox.next().to_vec());
        outbox.sent(outbox.next().len());
    }
    replies
}

fn reset_token(session: &mut Session) -> Token {
    feed(session, &message(command::DEVICE_RESET, 0, &[]));
    match session.next_request() {
        Some(Request::Reset { token }) => token,
        other => panic!("{other:?}"),
    }
}

#[test]
fn token_of_an_earlier_connection_finishes_nothing() {
    let old = reset_token(&mut negotiated(1));
    let mut session = negotiated(2);
    let token = reset_token(&mut session);
    session.finish(old, Ok(()));
    assert!(session.is_waiting() && !session.wants_to_send());
    session.finish(token, Ok(()));
    assert_eq!(drain(&mut session).len(), 1);
}

#[test]
fn token_finishes_once() {
    let mut session = negotiated(1);
    let token = reset_token(&mut session);
    session.finish(token, Ok(()));
    session.finish(token, Ok(()));
    assert_eq!(drain(&mut session).len(), 1);
}

#[test]
fn reset_and_unmap_succeed_even_when_finished_with_an_error() {
    let mut session = negotiated(1);
    let token = reset_token(&mut session);
    session.finish(token, Err(Errno::EIO));
    let replies = drain(&mut session);
    assert_eq!(Header::parse(&replies[0]).map(|header| header.flags), Some(1));
}

#[test]
fn read_is_answered_with_what_the_device_fills_in() {
    let mut session = negotiated(1);
    let access = RegionAccess { offset: 0x10, region: 0, count: 4 };
    feed(&mut session, &message(command::REGION_READ, 0, access.as_bytes()));
    match session.next_request() {
        Some(Request::RegionRead { region: Region::Bar(0), offset: 0x10, data }) => {
            data.copy_from_slice(b"abcd")
        }
        other => panic!("{other:?}"),
    }
    let replies = drain(&mut session);
    assert!(replies[0].ends_with(b"abcd"));
    assert_eq!(replies[0].len(), 36);
}

#[test]
fn each_reply_is_sent_on_its_own() {
    let mut session = negotiated(1);
    let info = message(command::DEVICE_GET_INFO, 0, &[16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    feed(&mut session, &[info.clone(), info].concat());
    assert!(session.next_request().is_none());
    assert_eq!(drain(&mut session).iter().map(Vec::len).collect::<Vec<_>>(), [32, 32]);
}

#[test]
fn reply_that_is_sent_in_pieces_goes_on_where_it_stopped() {
    let mut session = negotiated(1);
    let access = RegionAccess { offset: 0, region: 7, count: 64 };
    feed(&mut session, &message(command::REGION_READ, 0, access.as_bytes()));
    assert!(session.next_request().is_some());
    let whole = session.outbox().next().to_vec();
    let mut pieces = Vec::new();
    while session.wants_to_send() {
        let outbox = session.outbox();
        let len = outbox.next().len().min(7);
        pieces.extend_from_slice(&outbox.next()[..len]);
        outbox.sent(len);
    }
    assert_eq!(pieces, whole);
}

proptest! {
    /// Any messages after (or instead of) VERSION: no panic, bounded replies, and each message that wants one gets
    /// exactly one.
    #[test]
    fn any_messages_are_answered_once(
        negotiate in any::<bool>(),
        messages in prop::collection::vec(
            (prop_oneof![0_u16..20, any::<u16>()], prop_oneof![Just(0_u32), Just(16), 0_u32..64],
             prop::collection::vec(prop_oneof![0_u32..70, any::<u32>()], 0..10)),
            0..40,
        ),
    ) {
        let mut session = if negotiate { negotiated(1) } else { Session::new(LAYOUT, 1) };
        for (number, flags, words) in messages {
            let payload: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            feed(&mut session, &message(number, flags, &payload));
            let was_over = session.phase == Phase::Over;
            let mut finish = None;
            while let Some(request) = session.next_request() {
                match request {
                    Request::RegionRead { data, .. } => prop_assert!(!data.is_empty() && data.len() <= 0x2000),
                    Request::RegionWrite { data, .. } => prop_assert!(!data.is_empty() && data.len() <= 0x2000),
                    Request::SetIrqs(IrqChange::Trigger(vectors) | IrqChange::Mask(vectors)) => {
                        prop_assert!(vectors.iter().all(|&vector| vector < 3));
                    }
                    Request::SetIrqs(_) => {}
                    Request::DmaMap { token, .. } | Request::DmaUnmap { token, .. } | Request::Reset { token } => {
                        finish = Some(token);
                    }
                }
                if let Some(token) = finish.take() {
                    session.finish(token, Err(Errno::ENOSPC));
                }
            }
            let expected = usize::from(flags & 16 == 0 && !was_over);
            prop_assert_eq!(drain(&mut session).len(), expected);
        }
    }
}
