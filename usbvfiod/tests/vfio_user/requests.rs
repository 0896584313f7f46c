//! Messages that are wrong, unknown or unwanted: an error or silence, and the stream stays in step.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::server::Server;
use crate::wire::{
    ACTION_TRIGGER, Answer, CONFIG, DATA_BOOL, DMA_MAP, DMA_UNMAP, EINVAL, GET_INFO, GET_IRQ_INFO,
    GET_REGION_INFO, MSIX, NO_REPLY, REGION_READ, REGION_WRITE, RESET, ROM, Raw, SET_IRQS, VERSION, access,
    borrow, header, message, set_irqs, words,
};

/// The other end of `ours` has no descriptor left anywhere.
pub(crate) fn assert_peer_closed(mut ours: &UnixStream) {
    ours.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    assert!(matches!(ours.read(&mut [0]), Ok(0)), "the descriptor is still open");
}

#[test]
fn size_below_a_header_is_refused() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    for size in [0, 1, 15] {
        raw.send_bytes(&header(7, SET_IRQS, size, 0), &[]);
        assert_eq!(raw.receive(), (7, SET_IRQS, EINVAL));
    }
    raw.assert_in_step();
}

#[test]
fn too_long_message_is_refused_at_once_and_skipped() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    let size = 3 << 20;
    raw.send_bytes(&header(7, REGION_WRITE, size, 0), &[]);
    assert_eq!(raw.receive(), (7, REGION_WRITE, EINVAL), "before the rest is there");
    raw.stream.write_all(&vec![0x55; size as usize - 16]).unwrap();
    raw.assert_in_step();
}

#[test]
fn longest_message_is_taken() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    raw.write(0, 0, &vec![0x55; 1 << 20]);
    assert_eq!(raw.read(0, 0xffff, 2), [0x55, 0xff]);
    raw.assert_in_step();
}

#[test]
fn unsolicited_reply_is_refused() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    for flags in [1, 2, 0xf] {
        raw.send_bytes(&message(9, RESET, flags, &[]), &[]);
        assert_eq!(raw.receive(), (9, RESET, EINVAL));
    }
    raw.assert_in_step();
    assert!(!server.device().log.iter().any(|line| line == "reset"));
}

#[test]
fn unknown_command_is_refused_and_its_payload_consumed() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    for command in [0, 14, 19, 999, u16::MAX] {
        assert_eq!(raw.ask(command, &[0xaa; 100]), Err(libc::ENOTSUP));
    }
    raw.assert_in_step();
}

#[test]
fn what_is_not_advertised_is_refused_and_its_payload_consumed() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    let (io_fds, dma_read, dma_write, dirty_pages, write_multi, feature, migration) =
        (6, 11, 12, 14, 15, 16, 17);
    for command in [io_fds, dma_read, dma_write, dirty_pages, write_multi, feature, migration, migration + 1]
    {
        assert_eq!(raw.ask(command, &[0; 64]), Err(libc::ENOTSUP), "command {command}");
    }
    raw.assert_in_step();
}

#[test]
fn request_without_payload_is_refused() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    for command in
        [DMA_MAP, DMA_UNMAP, GET_INFO, GET_REGION_INFO, GET_IRQ_INFO, SET_IRQS, REGION_READ, REGION_WRITE]
    {
        assert_eq!(raw.ask(command, &[]), EINVAL, "command {command}");
    }
    raw.assert_in_step();
}

#[test]
fn descriptors_of_a_refused_request_are_closed() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    let pairs: Vec<_> = (0..2).map(|_| UnixStream::pair().unwrap()).collect();
    let (ours, theirs): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    let payload = set_irqs(DATA_BOOL | ACTION_TRIGGER, MSIX, 0, 1);
    assert_eq!(raw.ask_with(SET_IRQS, &payload, &borrow(&theirs)), EINVAL);
    drop(theirs);
    ours.iter().for_each(assert_peer_closed);
    raw.assert_in_step();
}

#[test]
fn descriptors_of_a_request_that_takes_none_are_closed() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let answer = raw.ask_with(GET_INFO, &words(&[32, 0, 0, 0]), &borrow(&[theirs]));
    assert!(answer.is_ok());
    assert_peer_closed(&ours);
}

#[test]
fn more_than_16_descriptors_are_refused_and_closed() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    let pairs: Vec<_> = (0..17).map(|_| UnixStream::pair().unwrap()).collect();
    let (ours, theirs): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    let payload = set_irqs(crate::wire::DATA_EVENTFD | ACTION_TRIGGER, MSIX, 0, 17);
    assert_eq!(raw.ask_with(SET_IRQS, &payload, &borrow(&theirs)), EINVAL);
    drop(theirs);
    ours.iter().for_each(assert_peer_closed);
    raw.assert_in_step();
}

#[test]
fn device_info_needs_a_full_struct_and_argsz() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    assert_eq!(raw.ask(GET_INFO, &words(&[16, 0, 0])), EINVAL);
    assert_eq!(raw.ask(GET_INFO, &words(&[15, 0, 0, 0])), EINVAL);
    for argsz in [16, 32, u32::MAX] {
        // PCI and RESET, 9 regions, 3 interrupts; 32 bytes with the header.
        assert_eq!(raw.ask(GET_INFO, &words(&[argsz, 0, 0, 0])), Ok(words(&[16, 3, 9, 3])));
    }
}

fn region_info(raw: &mut Raw, argsz: u32, index: u32) -> Answer {
    raw.ask(GET_REGION_INFO, &words(&[argsz, 0, index, 0, 0, 0, 0, 0]))
}

#[test]
fn region_info_that_is_short_or_of_no_region_is_refused() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    assert_eq!(raw.ask(GET_REGION_INFO, &words(&[32, 0, 0, 0])), EINVAL);
    assert_eq!(region_info(&mut raw, 31, 0), EINVAL);
    for index in [9, 10, u32::MAX] {
        assert_eq!(region_info(&mut raw, 32, index), EINVAL);
    }
    raw.assert_in_step();
}

#[test]
fn region_info_of_all_nine_regions_has_48_bytes() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    let sizes = [64 << 10, 0, 8 << 10, 0, 0, 0, 0, 256, 0];
    for (index, size) in (0..).zip(sizes) {
        let flags = if size > 0 { 3 } else { 0 };
        for argsz in [32, 4096] {
            let info = region_info(&mut raw, argsz, index);
            assert_eq!(info, Ok(words(&[32, flags, index, 0, size, 0, 0, 0])), "region {index}");
        }
    }
}

#[test]
fn irq_info_that_is_short_or_of_no_index_is_refused() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    assert_eq!(raw.ask(GET_IRQ_INFO, &words(&[16, 0, 0])), EINVAL);
    assert_eq!(raw.ask(GET_IRQ_INFO, &words(&[15, 0, 0, 0])), EINVAL);
    for index in [3, 4, 5, u32::MAX] {
        assert_eq!(raw.ask(GET_IRQ_INFO, &words(&[16, 0, index, 0])), EINVAL);
    }
    raw.assert_in_step();
}

#[test]
fn irq_info_counts_msix_and_nothing_else() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    for (index, count) in (0..).zip([0, 0, 20]) {
        let info = raw.ask(GET_IRQ_INFO, &words(&[16, 0, index, 0]));
        assert_eq!(info, Ok(words(&[16, 1, index, count])));
    }
}

#[test]
fn no_reply_means_no_reply_whatever_comes_of_it() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    let good = [
        (GET_INFO, words(&[16, 0, 0, 0])),
        (GET_REGION_INFO, words(&[32, 0, 0, 0, 0, 0, 0, 0])),
        (GET_IRQ_INFO, words(&[16, 0, 2, 0])),
        (SET_IRQS, set_irqs(1 | ACTION_TRIGGER, MSIX, 0, 0)),
        (DMA_MAP, crate::wire::dma_map(3, 0, 0x1000, 0x1000)),
        (DMA_UNMAP, crate::wire::dma_unmap(0, 0x1000, 0x1000)),
        (REGION_READ, access(CONFIG, 0, 4)),
        (REGION_WRITE, [access(0, 0x40, 2), vec![0xab, 0xcd]].concat()),
        (RESET, Vec::new()),
        (REGION_WRITE, [access(ROM, 0, 1), vec![1]].concat()),
    ];
    for (command, payload) in &good {
        raw.send(*command, NO_REPLY, payload, &[]);
    }
    for command in [VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, SET_IRQS, REGION_READ, REGION_WRITE, 14, 999] {
        raw.send(command, NO_REPLY, &[1, 2, 3], &[]);
    }
    raw.send_bytes(&header(3, REGION_WRITE, 5, NO_REPLY), &[]);
    raw.send_bytes(&message(3, RESET, NO_REPLY | 1, &[]), &[]);
    raw.assert_in_step();
    let log = &server.device().log;
    for expected in ["map 0x1000 0x1000 file=false", "write Bar(0) 0x40 2", "reset", "irqs"] {
        assert!(log.iter().any(|line| line == expected), "{expected} in {log:?}");
    }
}

#[test]
fn message_may_come_in_pieces_of_any_length() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    let bytes = message(0x77, REGION_WRITE, 0, &[access(0, 0x100, 4), vec![1, 2, 3, 4]].concat());
    for cut in 1..bytes.len() {
        let (first, second) = bytes.split_at(cut);
        raw.stream.write_all(first).unwrap();
        // Only here so that the pieces are not read together each time; the result does not depend on it.
        std::thread::yield_now();
        raw.stream.write_all(second).unwrap();
        assert_eq!(raw.receive(), (0x77, REGION_WRITE, Ok(access(0, 0x100, 4))), "cut at {cut}");
    }
    assert_eq!(raw.read(0, 0x100, 4), [1, 2, 3, 4]);
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    let ids: Vec<u16> =
        (0..500u16).map(|n| raw.send(REGION_READ, 0, &access(CONFIG, u64::from(n % 64), 4), &[])).collect();
    for id in ids {
        let (reply_id, _, answer) = raw.receive();
        assert_eq!(reply_id, id);
        assert_eq!(answer.unwrap().len(), 20);
    }
}

#[test]
fn client_that_takes_no_replies_is_not_read_further() {
    let server = Server::start();
    let mut raw = Raw::negotiated(&server);
    raw.stream.set_nonblocking(true).unwrap();
    let request = message(1, REGION_READ, 0, &access(0, 0, 1 << 20));
    let mut sent = 0_usize;
    let quiet_since = |sent: usize, raw: &mut Raw| {
        let deadline = std::time::Instant::now() + Duration::from_millis(200);
        let mut now = sent;
        while std::time::Instant::now() < deadline {
            now += raw.stream.write(&request).unwrap_or(0);
        }
        now
    };
    loop {
        let now = quiet_since(sent, &mut raw);
        if now == sent {
            break;
        }
        sent = now;
        assert!(sent < 16 << 20, "the server reads on and on");
    }
    drop(raw);
    Raw::negotiated(&server).assert_in_step();
}
