//! VERSION: refused with an error and then closed, or agreed on.

use crate::server::Server;
use crate::wire::{DMA_MAP, EINVAL, NO_REPLY, Raw, VERSION, borrow, header, version};

fn assert_refused(payload: &[u8]) {
    let server = Server::start();
    let mut raw = Raw::connect(&server);
    assert_eq!(raw.ask(VERSION, payload), EINVAL);
    raw.assert_closed();
    Raw::negotiated(&server).assert_in_step();
}

fn reply_to(payload: &[u8]) -> Vec<u8> {
    let server = Server::start();
    let mut raw = Raw::connect(&server);
    let reply = raw.ask(VERSION, payload).unwrap();
    raw.assert_in_step();
    reply
}

#[test]
fn short_version_is_refused_and_closed() {
    assert_refused(&[]);
    assert_refused(&[0, 0, 1]);
}

#[test]
fn version_longer_than_any_message_is_refused_and_closed() {
    let server = Server::start();
    let mut raw = Raw::connect(&server);
    raw.send_bytes(&header(1, VERSION, u32::MAX, 0), &[]);
    assert_eq!(raw.receive(), (1, VERSION, EINVAL));
    raw.assert_closed();
}

#[test]
fn other_command_first_is_refused_and_closed() {
    let server = Server::start();
    for command in [DMA_MAP, 0, 999, u16::MAX] {
        let mut raw = Raw::connect(&server);
        assert_eq!(raw.ask(command, &version(0, 1, b"{}\0")), EINVAL);
        raw.assert_closed();
    }
}

#[test]
fn other_major_is_refused_and_closed() {
    assert_refused(&version(1, 0, b"{}\0"));
    assert_refused(&version(999, 1, b""));
}

#[test]
fn json_without_nul_is_refused_and_closed() {
    assert_refused(&version(0, 1, b"{}"));
}

#[test]
fn bad_json_is_refused_and_closed() {
    assert_refused(&version(0, 1, b"{\0"));
    assert_refused(&version(0, 1, b"\"\0"));
    assert_refused(&version(0, 1, b"\0"));
    assert_refused(&version(0, 1, b"\xff\xfe\0"));
}

#[test]
fn bad_capability_types_are_refused_and_closed() {
    assert_refused(&version(0, 1, b"{\"capabilities\":\"23\"}\0"));
    assert_refused(&version(0, 1, b"{\"capabilities\":{\"max_msg_fds\":\"foo\"}}\0"));
    assert_refused(&version(0, 1, b"{\"capabilities\":{\"migration\":{\"pgsize\":4095}}}\0"));
}

#[test]
fn no_json_and_empty_json_are_accepted() {
    for payload in [version(0, 1, b""), version(0, 1, b"{}\0")] {
        let reply = reply_to(&payload);
        assert_eq!(reply[..4], version(0, 1, b""));
    }
}

#[test]
fn reply_has_the_lower_minor_and_json_with_nul() {
    for (theirs, ours) in [(0, 0), (1, 1), (2, 1)] {
        let reply = reply_to(&version(0, theirs, b"{\"capabilities\":{}}\0"));
        assert_eq!(reply[..4], version(0, ours, b""));
        let text = reply[4..].strip_suffix(&[0]).unwrap();
        let json: serde_json::Value = serde_json::from_slice(text).unwrap();
        assert!(json["capabilities"].is_object());
    }
}

#[test]
fn second_version_is_refused_and_the_session_goes_on() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    assert_eq!(raw.ask(VERSION, &version(0, 1, b"{}\0")), EINVAL);
    raw.assert_in_step();
}

#[test]
fn version_without_reply_is_agreed_on_in_silence() {
    let server = Server::start();
    let mut raw = Raw::connect(&server);
    raw.send(VERSION, NO_REPLY, &version(0, 1, b"{}\0"), &[]);
    raw.assert_in_step();
}

#[test]
fn version_with_descriptors_is_accepted_and_they_are_closed() {
    let server = Server::start();
    let mut raw = Raw::connect(&server);
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    raw.ask_with(VERSION, &version(0, 1, b"{}\0"), &borrow(&[theirs, eventfd_stream()])).unwrap();
    crate::requests::assert_peer_closed(&ours);
    raw.assert_in_step();
}

fn eventfd_stream() -> std::os::unix::net::UnixStream {
    std::os::unix::net::UnixStream::pair().unwrap().0
}
