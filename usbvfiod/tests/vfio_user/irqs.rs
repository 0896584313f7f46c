//! SET_IRQS: what is refused, and what vectors do.

use std::os::unix::net::UnixStream;

use nix::sys::eventfd::EventFd;

use crate::requests::assert_peer_closed;
use crate::server::Server;
use crate::wire::{
    ACTION_MASK, ACTION_TRIGGER, ACTION_UNMASK, Answer, DATA_BOOL, DATA_EVENTFD, DATA_NONE, EINVAL, MSIX,
    Raw, SET_IRQS, borrow, eventfd, set_irqs, signals, words,
};

const INTX: u32 = 0;
const MSI: u32 = 1;
const ERR: u32 = 3;
const REQ: u32 = 4;

const DONE: Answer = Ok(Vec::new());

struct Client {
    server: Server,
    raw: Raw,
}

impl Client {
    fn new() -> Self {
        let server = Server::start();
        let raw = Raw::negotiated(&server);
        Self { server, raw }
    }

    fn set(&mut self, flags: u32, index: u32, start: u32, count: u32) -> Answer {
        self.raw.ask(SET_IRQS, &set_irqs(flags, index, start, count))
    }

    fn set_flags(&mut self, action: u32, start: u32, only: &[u8]) -> Answer {
        let head = set_irqs(DATA_BOOL | action, MSIX, start, only.len() as u32);
        self.raw.ask(SET_IRQS, &[&head, only].concat())
    }

    fn assign(&mut self, start: u32, eventfds: &[EventFd]) -> Answer {
        let payload = set_irqs(DATA_EVENTFD | ACTION_TRIGGER, MSIX, start, eventfds.len() as u32);
        self.raw.ask_with(SET_IRQS, &payload, &borrow(eventfds))
    }

    fn refused(&mut self, flags: u32, index: u32, start: u32, count: u32) {
        assert_eq!(self.set(flags, index, start, count), EINVAL, "{flags:#x} {index} {start} {count}");
    }
}

fn eventfds(count: usize) -> Vec<EventFd> {
    (0..count).map(|_| eventfd()).collect()
}

#[test]
fn short_struct_is_refused() {
    let mut client = Client::new();
    assert_eq!(client.raw.ask(SET_IRQS, &words(&[20, DATA_NONE | ACTION_TRIGGER, MSIX, 0])), EINVAL);
    client.raw.assert_in_step();
}

#[test]
fn bad_argsz_is_refused() {
    let mut client = Client::new();
    let payload = words(&[19, DATA_NONE | ACTION_TRIGGER, MSIX, 0, 0]);
    assert_eq!(client.raw.ask(SET_IRQS, &payload), EINVAL);
}

#[test]
fn bad_index_is_refused() {
    let mut client = Client::new();
    for index in [ERR, REQ, 5, u32::MAX] {
        client.refused(DATA_NONE | ACTION_TRIGGER, index, 0, 0);
        client.refused(DATA_EVENTFD | ACTION_TRIGGER, index, 0, 1);
    }
}

#[test]
fn several_actions_or_none_are_refused() {
    let mut client = Client::new();
    client.refused(DATA_NONE | ACTION_MASK | ACTION_UNMASK, MSIX, 0, 1);
    client.refused(DATA_NONE | ACTION_MASK | ACTION_TRIGGER, MSIX, 0, 1);
    client.refused(DATA_NONE | ACTION_MASK | ACTION_UNMASK | ACTION_TRIGGER, MSIX, 0, 1);
    client.refused(DATA_NONE, MSIX, 0, 1);
}

#[test]
fn several_data_types_or_none_are_refused() {
    let mut client = Client::new();
    client.refused(ACTION_MASK | DATA_NONE | DATA_BOOL, MSIX, 0, 1);
    client.refused(ACTION_TRIGGER | DATA_NONE | DATA_EVENTFD, MSIX, 0, 1);
    client.refused(ACTION_TRIGGER | DATA_BOOL | DATA_EVENTFD, MSIX, 0, 1);
    client.refused(ACTION_TRIGGER, MSIX, 0, 1);
}

#[test]
fn unknown_flags_are_refused() {
    let mut client = Client::new();
    client.refused(1 << 6 | DATA_NONE | ACTION_TRIGGER, MSIX, 0, 1);
    client.refused(1 << 31 | DATA_NONE | ACTION_TRIGGER, MSIX, 0, 0);
}

#[test]
fn vectors_beyond_the_last_are_refused() {
    let mut client = Client::new();
    for (start, count) in
        [(19, 2), (20, 1), (21, 1), (0, 21), (5, u32::MAX), (u32::MAX, 1), (u32::MAX, u32::MAX)]
    {
        client.refused(DATA_NONE | ACTION_TRIGGER, MSIX, start, count);
        client.refused(DATA_NONE | ACTION_MASK, MSIX, start, count);
        client.refused(DATA_EVENTFD | ACTION_TRIGGER, MSIX, start, count);
    }
}

#[test]
fn interrupts_without_vectors_cannot_be_used() {
    let mut client = Client::new();
    for index in [INTX, MSI] {
        client.refused(DATA_NONE | ACTION_TRIGGER, index, 0, 1);
        client.refused(DATA_NONE | ACTION_MASK, index, 0, 1);
        client.refused(DATA_NONE | ACTION_UNMASK, index, 0, 1);
        client.refused(DATA_EVENTFD | ACTION_TRIGGER, index, 0, 1);
        client.refused(DATA_NONE | ACTION_TRIGGER, index, 0, 2);
    }
}

#[test]
fn interrupts_without_vectors_can_be_disabled() {
    let mut client = Client::new();
    for index in [INTX, MSI] {
        assert_eq!(client.set(DATA_NONE | ACTION_TRIGGER, index, 0, 0), DONE);
    }
}

#[test]
fn count_zero_is_only_for_disable() {
    let mut client = Client::new();
    client.refused(DATA_NONE | ACTION_TRIGGER, MSIX, 1, 0);
    client.refused(DATA_NONE | ACTION_MASK, MSIX, 0, 0);
    client.refused(DATA_NONE | ACTION_UNMASK, MSIX, 0, 0);
    client.refused(DATA_BOOL | ACTION_TRIGGER, MSIX, 0, 0);
    client.refused(DATA_EVENTFD | ACTION_TRIGGER, MSIX, 0, 0);
}

#[test]
fn descriptors_with_another_data_type_are_refused_and_closed() {
    let mut client = Client::new();
    for flags in [DATA_NONE | ACTION_TRIGGER, DATA_NONE | ACTION_MASK] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let answer = client.raw.ask_with(SET_IRQS, &set_irqs(flags, MSIX, 0, 1), &borrow(&[theirs]));
        assert_eq!(answer, EINVAL);
        assert_peer_closed(&ours);
    }
    let payload = [set_irqs(DATA_BOOL | ACTION_TRIGGER, MSIX, 0, 1), vec![0]].concat();
    assert_eq!(client.raw.ask_with(SET_IRQS, &payload, &borrow(&[eventfd()])), EINVAL);
}

#[test]
fn eventfds_to_mask_or_unmask_are_refused() {
    let mut client = Client::new();
    for action in [ACTION_MASK, ACTION_UNMASK] {
        let payload = set_irqs(DATA_EVENTFD | action, MSIX, 0, 1);
        assert_eq!(client.raw.ask_with(SET_IRQS, &payload, &borrow(&[eventfd()])), EINVAL);
    }
}

#[test]
fn number_of_descriptors_must_be_the_count() {
    let mut client = Client::new();
    for count in [1, 3] {
        let payload = set_irqs(DATA_EVENTFD | ACTION_TRIGGER, MSIX, 0, count);
        assert_eq!(client.raw.ask_with(SET_IRQS, &payload, &borrow(&eventfds(2))), EINVAL);
    }
}

#[test]
fn flags_must_be_one_for_each_vector() {
    let mut client = Client::new();
    for flags in [&[][..], &[1], &[1, 1, 1]] {
        let payload = [&set_irqs(DATA_BOOL | ACTION_TRIGGER, MSIX, 0, 2), flags].concat();
        assert_eq!(client.raw.ask(SET_IRQS, &payload), EINVAL);
    }
    client.raw.assert_in_step();
}

#[test]
fn refused_request_changes_no_vector() {
    let mut client = Client::new();
    let kept = eventfds(1);
    assert_eq!(client.assign(0, &kept), DONE);
    let payload = set_irqs(DATA_EVENTFD | ACTION_TRIGGER, MSIX, 0, 2);
    assert_eq!(client.raw.ask_with(SET_IRQS, &payload, &borrow(&[eventfd()])), EINVAL);
    client.server.device().msix.signal(0);
    assert_eq!(signals(&kept[0]), 1);
}

#[test]
fn batch_of_16_then_the_rest_enables_all() {
    let mut client = Client::new();
    let fds = eventfds(20);
    assert_eq!(client.assign(0, &fds[..16]), DONE);
    assert_eq!(client.assign(16, &fds[16..]), DONE);
    for vector in 0..20 {
        client.server.device().msix.signal(vector);
    }
    assert!(fds.iter().all(|fd| signals(fd) == 1));
}

#[test]
fn update_replaces_the_eventfd_and_closes_the_old_one() {
    let mut client = Client::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let payload = set_irqs(DATA_EVENTFD | ACTION_TRIGGER, MSIX, 3, 1);
    assert_eq!(client.raw.ask_with(SET_IRQS, &payload, &borrow(&[theirs])), DONE);
    let new = eventfds(1);
    assert_eq!(client.assign(3, &new), DONE);
    assert_peer_closed(&ours);
    client.server.device().msix.signal(3);
    assert_eq!(signals(&new[0]), 1);
}

#[test]
fn eventfd_without_descriptor_takes_the_old_one_away() {
    let mut client = Client::new();
    let fds = eventfds(3);
    assert_eq!(client.assign(0, &fds), DONE);
    assert_eq!(client.set(DATA_EVENTFD | ACTION_TRIGGER, MSIX, 1, 1), DONE);
    for vector in 0..3 {
        client.server.device().msix.signal(vector);
    }
    assert_eq!([signals(&fds[0]), signals(&fds[1]), signals(&fds[2])], [1, 0, 1]);
}

#[test]
fn disable_takes_all_eventfds_away() {
    let mut client = Client::new();
    let fds = eventfds(4);
    assert_eq!(client.assign(0, &fds), DONE);
    assert_eq!(client.set(DATA_NONE | ACTION_TRIGGER, MSIX, 0, 0), DONE);
    for vector in 0..4 {
        client.server.device().msix.signal(vector);
    }
    assert!(fds.iter().all(|fd| signals(fd) == 0));
}

#[test]
fn trigger_none_signals_the_range() {
    let mut client = Client::new();
    let fds = eventfds(4);
    assert_eq!(client.assign(0, &fds), DONE);
    assert_eq!(client.set(DATA_NONE | ACTION_TRIGGER, MSIX, 1, 2), DONE);
    assert_eq!(fds.iter().map(signals).collect::<Vec<_>>(), [0, 1, 1, 0]);
}

#[test]
fn trigger_bool_signals_where_it_says_so() {
    let mut client = Client::new();
    let fds = eventfds(4);
    assert_eq!(client.assign(0, &fds), DONE);
    assert_eq!(client.set_flags(ACTION_TRIGGER, 1, &[0, 1, 1]), DONE);
    assert_eq!(fds.iter().map(signals).collect::<Vec<_>>(), [0, 0, 1, 1]);
}

#[test]
fn masked_vector_waits_for_unmask() {
    let mut client = Client::new();
    let fds = eventfds(2);
    assert_eq!(client.assign(0, &fds), DONE);
    assert_eq!(client.set_flags(ACTION_MASK, 0, &[1, 0]), DONE);
    client.server.device().msix.signal(0);
    client.server.device().msix.signal(1);
    assert_eq!([signals(&fds[0]), signals(&fds[1])], [0, 1]);
    assert_eq!(client.set(DATA_NONE | ACTION_UNMASK, MSIX, 0, 2), DONE);
    assert_eq!([signals(&fds[0]), signals(&fds[1])], [1, 0]);
}

#[test]
fn vector_raised_without_eventfd_is_pending_and_not_lost() {
    let mut client = Client::new();
    client.server.device().msix.signal(9);
    assert_eq!(client.raw.read(MSIX, 0x1000, 4), [0, 0b10, 0, 0], "pending bits");
    let fds = eventfds(1);
    assert_eq!(client.assign(9, &fds), DONE);
    assert_eq!(signals(&fds[0]), 1);
    assert_eq!(client.raw.read(MSIX, 0x1000, 4), [0; 4]);
}
