//! Busy devices, clients that go and come, and clients that come too early.

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use crate::requests::assert_peer_closed;
use crate::server::Server;
use crate::wire::{
    ACTION_TRIGGER, CONFIG, DATA_EVENTFD, DMA_MAP, DMA_UNMAP, GET_INFO, MSIX, REGION_READ, REGION_WRITE,
    RESET, Raw, SET_IRQS, access, borrow, dma_map, dma_unmap, memfd, message, set_irqs, words,
};

fn assert_silent(raw: &mut Raw) {
    raw.stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(raw.stream.read(&mut [0]).is_err(), "answered too early");
    raw.stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
}

#[test]
fn map_unmap_and_reset_are_answered_after_the_quiesce() {
    let memory = [memfd(0x1000)];
    let unmap = dma_unmap(0, 0x1000, 0x1000);
    let cases = [(DMA_MAP, dma_map(3, 0, 0x1000, 0x1000)), (DMA_UNMAP, unmap.clone()), (RESET, Vec::new())];
    for (command, payload) in cases {
        let server = Server::start();
        let mut raw = Raw::negotiated(&server);
        server.device().is_busy = true;
        let fds = if command == DMA_MAP { borrow(&memory) } else { Vec::new() };
        let id = raw.send(command, 0, &payload, &fds);
        let next = raw.send(REGION_READ, 0, &access(CONFIG, 0, 2), &[]);
        assert_silent(&mut raw);
        server.become_idle();
        let expected = if command == DMA_UNMAP { unmap.clone() } else { Vec::new() };
        assert_eq!(raw.receive(), (id, command, Ok(expected)));
        assert_eq!(raw.receive().0, next, "what came after it follows in order");
    }
}

#[test]
fn messages_that_wait_for_a_busy_device_are_bounded() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    server.device().is_busy = true;
    let reset = raw.send(RESET, 0, &[], &[]);
    raw.stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let write = message(5, REGION_WRITE, 0, &[access(0, 0, 4), vec![7; 4]].concat());
    let mut sent = 0;
    while std::io::Write::write(&mut raw.stream, &write).is_ok_and(|len| len == write.len()) {
        sent += 1;
        assert!(sent < 1 << 20, "the server reads on and on");
    }
    server.become_idle();
    assert_eq!(raw.receive().0, reset);
    for _ in 0..sent {
        assert_eq!(raw.receive().1, REGION_WRITE);
    }
}

#[test]
fn client_that_goes_while_the_device_is_busy_is_noticed() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    server.device().is_busy = true;
    raw.send(RESET, 0, &[], &[]);
    drop(raw);
    server.wait_for(|device| device.log.last().is_some_and(|line| line == "gone"));
    server.become_idle();
    Raw::negotiated(&server).assert_in_step();
}

#[test]
fn disconnect_drops_maps_and_eventfds_and_the_next_client_is_served() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    let memory = memfd(0x1000);
    raw.ask_with(DMA_MAP, &dma_map(3, 0, 0, 0x1000), &borrow(&[&memory])).unwrap();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let payload = set_irqs(DATA_EVENTFD | ACTION_TRIGGER, MSIX, 0, 1);
    raw.ask_with(SET_IRQS, &payload, &borrow(&[theirs])).unwrap();
    drop(raw);
    assert_peer_closed(&ours);
    server.wait_for(|device| device.memory.is_empty());
    let mut raw = Raw::negotiated(&server);
    memory.write_all_at(b"new", 0).unwrap();
    raw.ask_with(DMA_MAP, &dma_map(3, 0, 0, 0x1000), &borrow(&[&memory])).unwrap();
    assert_eq!(server.device().dma_read(0, 3).as_deref(), Ok(&b"new"[..]));
}

#[test]
fn hundred_connections_one_after_the_other_are_served() {
    let server = Server::start();
    for _ in 0..100 {
        Raw::negotiated(&server).assert_in_step();
    }
    assert_eq!(server.device().connections, 100);
}

#[test]
fn second_client_is_accepted_and_closed_at_once() {
    let server = Server::start();
    let mut first = Raw::negotiated(&server);
    let mut second = Raw::connect(&server);
    let closed = second.stream.read(&mut [0]);
    assert!(
        matches!(closed, Ok(0))
            || closed.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset)
    );
    first.assert_in_step();
}

#[test]
fn client_that_says_nothing_or_half_a_header_and_goes_is_forgotten() {
    let server = Server::start();
    for half in [&[][..], &[1, 2, 3], &message(1, GET_INFO, 0, &words(&[16, 0, 0, 0]))[..20]] {
        let raw = Raw::connect(&server);
        raw.send_bytes(half, &[]);
        drop(raw);
    }
    Raw::negotiated(&server).assert_in_step();
}

#[test]
fn client_that_goes_without_taking_its_replies_does_no_harm() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    for _ in 0..50 {
        raw.send(REGION_READ, 0, &access(0, 0, 4096), &[]);
    }
    drop(raw);
    Raw::negotiated(&server).assert_in_step();
}
