//! DMA_MAP and DMA_UNMAP.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use nix::fcntl::SealFlag;
use usbvfiod::urb::GuestMem;

use crate::requests::assert_peer_closed;
use crate::server::Server;
use crate::wire::{
    Answer, DMA_MAP, DMA_UNMAP, EINVAL, Raw, borrow, dma_map, dma_unmap, memfd, sealed_memfd, words,
};

const RW: u32 = 3;
const READ_ONLY: u32 = 1;
const ALL: u32 = 2;
const DONE: Answer = Ok(Vec::new());
const PAGE: u64 = 0x1000;

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

    fn map(&mut self, address: u64, size: u64, file: &File) -> Answer {
        self.raw.ask_with(DMA_MAP, &dma_map(RW, 0, address, size), &borrow(&[file]))
    }

    fn unmap(&mut self, flags: u32, address: u64, size: u64) {
        let payload = dma_unmap(flags, address, size);
        assert_eq!(self.raw.ask(DMA_UNMAP, &payload), Ok(payload), "the request comes back, 40 bytes");
    }

    fn can_reach(&self, address: u64) -> bool {
        self.server.device().dma_read(address, 4).is_ok()
    }

    fn maps(&self) -> usize {
        self.server.device().memory.len()
    }
}

#[test]
fn device_reads_and_writes_mapped_memory() {
    for seals in [SealFlag::empty(), SealFlag::F_SEAL_SHRINK] {
        let mut client = Client::new();
        let file = sealed_memfd(0x4000, seals);
        let payload = dma_map(RW, 0x1000, 0x8000_0000, 0x3000);
        assert_eq!(client.raw.ask_with(DMA_MAP, &payload, &borrow(&[&file])), DONE);
        file.write_all_at(b"from guest", 0x1ff8).unwrap();
        assert_eq!(client.server.device().dma_read(0x8000_0ff8, 10).as_deref(), Ok(&b"from guest"[..]));
        client.server.device().memory.write(0x8000_2ffc, b"to g").unwrap();
        let mut data = [0; 4];
        file.read_exact_at(&mut data, 0x3ffc).unwrap();
        assert_eq!(&data, b"to g");
        assert!(!client.can_reach(0x8000_2ffd), "beyond the end");
    }
}

#[test]
fn short_struct_or_argsz_is_refused() {
    let mut client = Client::new();
    assert_eq!(client.raw.ask(DMA_MAP, &dma_map(RW, 0, PAGE, PAGE)[..28]), EINVAL);
    let mut payload = dma_map(RW, 0, PAGE, PAGE);
    payload[..4].copy_from_slice(&words(&[31]));
    assert_eq!(client.raw.ask(DMA_MAP, &payload), EINVAL);
    assert_eq!(client.maps(), 0);
}

#[test]
fn unknown_flags_are_refused_and_no_flags_are_no_access() {
    let mut client = Client::new();
    assert_eq!(client.raw.ask(DMA_MAP, &dma_map(4, 0, PAGE, PAGE)), EINVAL);
    assert_eq!(client.raw.ask_with(DMA_MAP, &dma_map(0, 0, PAGE, PAGE), &borrow(&[memfd(PAGE)])), DONE);
    assert!(!client.can_reach(PAGE));
}

#[test]
fn size_zero_and_wrapping_ranges_are_refused() {
    let mut client = Client::new();
    for (offset, address, size) in
        [(0, PAGE, 0), (0, u64::MAX - 10, 12), (u64::MAX - 10, 0, PAGE), (0, 2, u64::MAX)]
    {
        assert_eq!(client.raw.ask(DMA_MAP, &dma_map(RW, offset, address, size)), EINVAL);
    }
    assert_eq!(client.raw.ask(DMA_MAP, &dma_map(RW, 0, u64::MAX - 0xfff, PAGE)), DONE, "up to the last byte");
}

#[test]
fn too_big_is_refused() {
    let mut client = Client::new();
    assert_eq!(client.raw.ask(DMA_MAP, &dma_map(RW, 0, 0, (8 << 40) + PAGE)), Err(libc::ENOSPC));
    assert_eq!(client.raw.ask(DMA_MAP, &dma_map(RW, 0, 0, 8 << 40)), DONE);
}

#[test]
fn too_many_are_refused_and_those_there_work_on() {
    let mut client = Client::new();
    let file = memfd(PAGE);
    assert_eq!(client.map(0, PAGE, &file), DONE);
    for index in 1..16384_u64 {
        client.raw.send(DMA_MAP, crate::wire::NO_REPLY, &dma_map(RW, 0, index * 2 * PAGE, PAGE), &[]);
    }
    assert_eq!(client.raw.ask(DMA_MAP, &dma_map(RW, 0, 1 << 40, PAGE)), EINVAL);
    assert_eq!(client.maps(), 16384);
    assert!(client.can_reach(0));
}

#[test]
fn thousand_maps_of_one_file_need_one_descriptor() {
    let mut client = Client::new();
    let file = memfd(4 << 20);
    for index in 0..1024 {
        let payload = dma_map(RW, index * PAGE, index * 2 * PAGE, PAGE);
        assert_eq!(client.raw.ask_with(DMA_MAP, &payload, &borrow(&[&file])), DONE, "map {index}");
    }
    file.write_all_at(b"last", 1023 * PAGE).unwrap();
    assert_eq!(client.server.device().dma_read(1023 * 2 * PAGE, 4).as_deref(), Ok(&b"last"[..]));
}

#[test]
fn overlap_is_refused_and_the_old_map_stays() {
    let mut client = Client::new();
    let file = memfd(4 * PAGE);
    assert_eq!(client.map(2 * PAGE, 2 * PAGE, &file), DONE);
    for (address, size) in
        [(2 * PAGE, 2 * PAGE), (PAGE, 2 * PAGE), (3 * PAGE, 2 * PAGE), (0, 4 * PAGE), (3 * PAGE, PAGE)]
    {
        assert_eq!(client.map(address, size, &file), Err(libc::EEXIST));
    }
    assert_eq!(client.map(PAGE, PAGE, &file), DONE, "adjacent");
    assert_eq!(client.map(4 * PAGE, PAGE, &file), DONE, "adjacent");
    assert!(client.can_reach(2 * PAGE));
}

#[test]
fn map_without_file_is_taken_and_not_reachable() {
    let mut client = Client::new();
    assert_eq!(client.raw.ask(DMA_MAP, &dma_map(RW, 0, PAGE, PAGE)), DONE);
    assert!(!client.can_reach(PAGE));
    assert_eq!(client.map(PAGE, PAGE, &memfd(PAGE)), Err(libc::EEXIST));
}

#[test]
fn two_descriptors_are_refused_and_closed() {
    let mut client = Client::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let fds = [theirs, UnixStream::pair().unwrap().0];
    assert_eq!(client.raw.ask_with(DMA_MAP, &dma_map(RW, 0, PAGE, PAGE), &borrow(&fds)), EINVAL);
    drop(fds);
    assert_peer_closed(&ours);
}

#[test]
fn descriptor_that_is_no_file_is_refused_and_closed() {
    let mut client = Client::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    assert_eq!(client.raw.ask_with(DMA_MAP, &dma_map(RW, 0, PAGE, PAGE), &borrow(&[theirs])), EINVAL);
    assert_peer_closed(&ours);
    let device = File::options().read(true).write(true).open("/dev/zero").unwrap();
    assert_eq!(client.map(PAGE, PAGE, &device), EINVAL);
}

#[test]
fn file_shorter_than_the_map_is_refused() {
    let mut client = Client::new();
    assert_eq!(client.map(0, 2 * PAGE, &memfd(2 * PAGE - 1)), EINVAL);
    let payload = dma_map(RW, PAGE, 0, PAGE);
    assert_eq!(client.raw.ask_with(DMA_MAP, &payload, &borrow(&[memfd(PAGE)])), EINVAL);
}

#[test]
fn read_only_map_cannot_be_written() {
    for seals in [SealFlag::empty(), SealFlag::F_SEAL_SHRINK] {
        let mut client = Client::new();
        let file = sealed_memfd(PAGE, seals);
        assert_eq!(client.raw.ask_with(DMA_MAP, &dma_map(READ_ONLY, 0, 0, PAGE), &borrow(&[&file])), DONE);
        assert!(client.can_reach(0));
        assert!(client.server.device().memory.write(0, &[1]).is_err());
    }
}

#[test]
fn file_truncated_under_us_fails_the_access_and_nothing_else() {
    let mut client = Client::new();
    let (file, other) = (memfd(4 * PAGE), memfd(PAGE));
    assert_eq!(client.map(0, 4 * PAGE, &file), DONE);
    assert_eq!(client.map(1 << 30, PAGE, &other), DONE);
    file.set_len(PAGE).unwrap();
    assert!(client.can_reach(0));
    assert!(!client.can_reach(2 * PAGE));
    assert!(!client.can_reach(PAGE - 2), "half of it is gone");
    assert!(client.can_reach(1 << 30));
    client.raw.assert_in_step();
}

#[test]
fn unmap_that_is_short_or_has_bad_flags_is_refused() {
    let mut client = Client::new();
    assert_eq!(client.map(0, PAGE, &memfd(PAGE)), DONE);
    assert_eq!(client.raw.ask(DMA_UNMAP, &dma_unmap(0, 0, PAGE)[..20]), EINVAL);
    let mut short = dma_unmap(0, 0, PAGE);
    short[..4].copy_from_slice(&words(&[23]));
    assert_eq!(client.raw.ask(DMA_UNMAP, &short), EINVAL);
    for flags in [1, 4, 1 << 31, ALL | 4] {
        assert_eq!(client.raw.ask(DMA_UNMAP, &dma_unmap(flags, 0, PAGE)), EINVAL, "flags {flags:#x}");
    }
    assert_eq!(client.raw.ask(DMA_UNMAP, &dma_unmap(ALL, PAGE, 0)), EINVAL);
    assert_eq!(client.raw.ask(DMA_UNMAP, &dma_unmap(ALL, 0, PAGE)), EINVAL);
    assert!(client.can_reach(0));
}

#[test]
fn unmap_of_what_is_not_mapped_succeeds_and_changes_nothing() {
    let mut client = Client::new();
    assert_eq!(client.map(PAGE, PAGE, &memfd(PAGE)), DONE);
    for (address, size) in [(0, PAGE), (2 * PAGE, PAGE), (PAGE, 0), (u64::MAX, u64::MAX)] {
        client.unmap(0, address, size);
    }
    assert!(client.can_reach(PAGE));
}

#[test]
fn exact_unmap_closes_the_file() {
    let mut client = Client::new();
    let file = memfd(PAGE);
    assert_eq!(client.map(PAGE, PAGE, &file), DONE);
    client.unmap(0, PAGE, PAGE);
    assert!(!client.can_reach(PAGE));
    assert_eq!(client.map(PAGE, PAGE, &file), DONE, "and can be mapped again");
    assert!(client.can_reach(PAGE));
}

#[test]
fn unmap_covering_several_maps_takes_them_all() {
    let mut client = Client::new();
    let file = memfd(8 * PAGE);
    for index in [1, 2, 4, 6] {
        assert_eq!(client.map(index * PAGE, PAGE, &file), DONE);
    }
    client.unmap(0, PAGE, 4 * PAGE);
    assert_eq!([1, 2, 4, 6].map(|index| client.can_reach(index * PAGE)), [false, false, false, true]);
}

#[test]
fn unmap_of_a_part_leaves_the_rest_where_it_was() {
    let mut client = Client::new();
    let file = memfd(4 * PAGE);
    file.write_all_at(b"3333", 3 * PAGE).unwrap();
    assert_eq!(client.map(0, 4 * PAGE, &file), DONE);
    client.unmap(0, PAGE, PAGE);
    assert_eq!([0, 1, 2, 3].map(|index| client.can_reach(index * PAGE)), [true, false, true, true]);
    assert_eq!(client.server.device().dma_read(3 * PAGE, 4).as_deref(), Ok(&b"3333"[..]));
}

#[test]
fn unmap_all_takes_everything() {
    let mut client = Client::new();
    let file = memfd(2 * PAGE);
    for address in [0, 1 << 32, u64::MAX - 0xfff] {
        assert_eq!(client.map(address, PAGE, &file), DONE);
    }
    client.unmap(ALL, 0, 0);
    assert_eq!(client.maps(), 0);
    client.unmap(ALL, 0, 0);
}
