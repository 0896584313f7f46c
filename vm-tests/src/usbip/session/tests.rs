use super::*;
use crate::usbip::catalogue::{Choice, make};
use crate::usbip::models::delayed::{Delayed, Delays};
use crate::usbip::wire::{HEADER_BYTES, Setup};

const MILLISECOND: Duration = Duration::from_millis(1);

/// A configured device of the catalogue.
fn session(name: &str) -> Session {
    let choice = Choice { speed: Speed::High, serial: "1".to_owned(), iso_packet: 16, iso_interval: 4 };
    let mut session = Session::new(Device::new(make(name, &choice).unwrap()));
    session.take(Instant::now(), control(1, 0x00, 9, 1, 0, 0));
    session.take_output();
    session
}

fn control(seqnum: u32, request_type: u8, request: u8, value: u16, index: u16, length: u16) -> Command {
    let setup = Setup { request_type, request, value, index, length };
    let is_in = request_type & 0x80 != 0;
    Command::Submit(Submit { seqnum, is_in, setup, length: length.into(), ..Submit::default() })
}

fn read(seqnum: u32, endpoint: u8, length: u32) -> Command {
    Command::Submit(Submit { seqnum, is_in: true, endpoint, length, ..Submit::default() })
}

fn write(seqnum: u32, endpoint: u8, data: &[u8]) -> Command {
    let length = data.len() as u32;
    Command::Submit(Submit { seqnum, endpoint, length, data: data.to_vec(), ..Submit::default() })
}

fn iso_read(seqnum: u32, count: u32) -> Command {
    let packets =
        (0..count).map(|at| IsoPacket { offset: 16 * at, length: 16, ..IsoPacket::default() }).collect();
    let submit = Submit {
        seqnum,
        is_in: true,
        endpoint: 1,
        length: 16 * count,
        interval: 8,
        packets,
        ..Submit::default()
    };
    Command::Submit(submit)
}

/// Kind, number and status of each answer that carries no data.
fn answers(output: &[u8]) -> Vec<(u32, u32, i32)> {
    let word =
        |bytes: &[u8], index: usize| u32::from_be_bytes(bytes[4 * index..4 * index + 4].try_into().unwrap());
    output
        .chunks(HEADER_BYTES)
        .map(|answer| (word(answer, 0), word(answer, 1), word(answer, 5).cast_signed()))
        .collect()
}

#[test]
fn descriptor_is_cut_to_what_was_asked_for() {
    let mut session = session("bulk");
    session.take(Instant::now(), control(2, 0x80, 6, 0x0100, 0, 8));
    let output = session.take_output();
    assert_eq!(output[HEADER_BYTES..], [18, 1, 0, 2, 0xff, 0, 0, 64]);
}

#[test]
fn echo_waits_until_there_is_something() {
    let mut session = session("serial");
    let now = Instant::now();
    session.take(now, read(2, 1, 64));
    assert!(session.take_output().is_empty());
    session.take(now, write(3, 1, b"hello"));
    let output = session.take_output();
    assert_eq!(output.len(), 2 * HEADER_BYTES + 5);
    assert!(output.ends_with(b"hello"));
}

#[test]
fn unlinked_transfer_is_answered_once() {
    let mut session = session("serial");
    let now = Instant::now();
    session.take(now, read(2, 1, 64));
    session.take(now, Command::Unlink { seqnum: 3, victim: 2 });
    session.take(now, write(4, 1, b"late"));
    assert_eq!(answers(&session.take_output()), [(4, 3, -ECONNRESET), (3, 4, 0)]);
}

#[test]
fn unlink_after_the_end_says_so() {
    let mut session = session("bulk");
    let now = Instant::now();
    session.take(now, write(2, 2, &[]));
    session.take(now, Command::Unlink { seqnum: 3, victim: 2 });
    assert_eq!(answers(&session.take_output()), [(3, 2, 0), (4, 3, 0)]);
}

#[test]
fn unlink_that_overtakes_its_victim_waits_for_it() {
    let mut session = session("bulk");
    let now = Instant::now();
    session.take(now, Command::Unlink { seqnum: 3, victim: 2 });
    assert!(session.take_output().is_empty());
    session.take(now, write(2, 2, &[]));
    assert_eq!(answers(&session.take_output()), [(4, 3, -ECONNRESET)]);
}

#[test]
fn halted_endpoint_stalls_until_it_is_cleared() {
    let mut session = session("usbtest");
    let now = Instant::now();
    session.take(now, control(2, 0x02, 3, 0, 0x01, 0));
    session.take(now, write(3, 1, &[0]));
    session.take(now, control(4, 0x02, 1, 0, 0x01, 0));
    session.take(now, write(5, 1, &[0]));
    assert_eq!(answers(&session.take_output()), [(3, 2, 0), (3, 3, -EPIPE), (3, 4, 0), (3, 5, 0)]);
}

#[test]
fn endpoint_of_another_setting_does_not_answer() {
    let mut session = session("usbtest");
    let now = Instant::now();
    session.take(now, write(2, 3, &[0]));
    session.take(now, control(3, 0x01, 11, 2, 0, 0));
    session.take(now, write(4, 3, &[0]));
    assert_eq!(answers(&session.take_output()), [(3, 2, -EPROTO), (3, 3, 0), (3, 4, 0)]);
}

#[test]
fn isochronous_transfers_take_their_time_and_lose_nothing() {
    let mut session = session("isochronous");
    let start = Instant::now();
    session.take(start, control(2, 0x01, 11, 1, 0, 0));
    session.take_output();
    session.take(start, iso_read(3, 4));
    session.take(start, iso_read(4, 4));
    assert_eq!(session.next_due(), Some(start + 4 * MILLISECOND));
    session.run(start + 4 * MILLISECOND);
    let output = session.take_output();
    assert_eq!(output.len(), HEADER_BYTES + 4 * 16 + 4 * 16);
    assert_eq!(session.next_due(), Some(start + 8 * MILLISECOND));
    session.run(start + 8 * MILLISECOND);
    let output = session.take_output();
    assert_eq!(output[HEADER_BYTES..HEADER_BYTES + 4], 4u32.to_le_bytes());
}

#[test]
fn host_that_comes_late_is_counted() {
    let mut session = session("isochronous");
    let start = Instant::now();
    session.take(start, control(2, 0x01, 11, 1, 0, 0));
    session.take(start, iso_read(3, 1));
    session.run(start + MILLISECOND);
    session.take(start + 3 * MILLISECOND, iso_read(4, 1));
    assert_eq!(session.statistics()["underruns"], 1);
}

#[test]
fn slow_set_interface_leaves_other_endpoints_alone() {
    let choice = Choice { speed: Speed::High, serial: "1".to_owned(), iso_packet: 16, iso_interval: 4 };
    let delays = Delays { set_interface: 5000 * MILLISECOND, ..Delays::default() };
    let model = Delayed::new(make("usbtest", &choice).unwrap(), delays);
    let mut session = Session::new(Device::new(Box::new(model)));
    let start = Instant::now();
    session.take(start, control(1, 0x00, 9, 1, 0, 0));
    session.take(start, control(2, 0x01, 11, 1, 0, 0));
    session.take(start, write(3, 1, &[0]));
    assert_eq!(answers(&session.take_output()), [(3, 1, 0), (3, 3, 0)]);
    session.run(start + 5000 * MILLISECOND);
    assert_eq!(answers(&session.take_output()), [(3, 2, 0)]);
}

#[test]
fn babble_fills_the_room_and_is_an_overflow() {
    let mut session = session("babble");
    session.take(Instant::now(), read(2, 1, 4));
    let output = session.take_output();
    assert_eq!(answers(&output[..HEADER_BYTES]), [(3, 2, -EOVERFLOW)]);
    assert_eq!(output.len(), HEADER_BYTES + 4);
}

#[test]
fn short_answer_is_an_error_only_for_drivers_that_say_so() {
    let mut session = session("usbtest");
    let mut strict = control(2, 0x80, 6, 0x0100, 0, 64);
    if let Command::Submit(submit) = &mut strict {
        submit.is_short_an_error = true;
    }
    session.take(Instant::now(), strict);
    assert_eq!(answers(&session.take_output()[..HEADER_BYTES]), [(3, 2, -EREMOTEIO)]);
}
