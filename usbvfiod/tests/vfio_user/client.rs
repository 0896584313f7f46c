//! The client that Cloud Hypervisor runs, against the server of the tests and against the program.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vfio_user::Client;

use crate::server::{Target, VECTORS};
use crate::wire::{
    ACTION_TRIGGER, CONFIG, DATA_EVENTFD, DATA_NONE, DMA_MAP, MSIX, NO_REPLY, ROM, Raw, VERSION, borrow,
    dma_map, eventfd, memfd, signals, version,
};

macro_rules! on_both {
    ($($name:ident,)*) => {
        mod in_process {
            $(#[test] fn $name() { super::$name(&super::Target::in_process()); })*
        }
        mod program {
            $(#[test] fn $name() { super::$name(&super::Target::program()); })*
        }
    };
}

on_both! {
    negotiates_and_finds_the_regions,
    walks_the_capability_list_and_sizes_the_bars,
    interrupts_are_msix_alone,
    memory_is_mapped_used_and_unmapped,
    interrupts_are_enabled_in_batches_of_16_signalled_and_disabled,
    reset_is_answered_and_forgets_what_was_written,
    nonsense_does_not_hang_the_client,
    second_connection_after_the_first_ended_finds_the_device_again,
    second_client_is_turned_away_and_the_first_goes_on,
    client_that_posts_and_goes_makes_room_at_once,
}

fn connect(target: &Target) -> Client {
    Client::new(target.path()).unwrap()
}

fn read32(client: &mut Client, region: u32, offset: u64) -> u32 {
    let mut data = [0; 4];
    client.region_read(region, offset, &mut data).unwrap();
    u32::from_le_bytes(data)
}

fn negotiates_and_finds_the_regions(target: &Target) {
    let client = connect(target);
    assert_eq!(client.region(0).unwrap().size, 64 << 10);
    assert_eq!(client.region(2).unwrap().size, 8 << 10);
    assert_eq!(client.region(CONFIG).unwrap().size, 256);
    for absent in [1, 3, 4, 5, ROM, 8] {
        assert_eq!(client.region(absent).unwrap().size, 0, "region {absent}");
    }
    assert!(client.region(0).unwrap().file_offset.is_none(), "nothing can be mapped");
    // The crate means the opposite of what it says, so that Cloud Hypervisor resets exactly devices that cannot.
    assert!(!client.resettable());
}

fn walks_the_capability_list_and_sizes_the_bars(target: &Target) {
    let mut client = connect(target);
    assert_eq!(read32(&mut client, CONFIG, 0x08) >> 8, 0x000c_0330);
    let first = u64::from(read32(&mut client, CONFIG, 0x34) & 0xff);
    assert_eq!(read32(&mut client, CONFIG, first) & 0xff, 0x11, "MSI-X comes first");
    for (offset, size) in
        [(0x10, 0xffff_0004), (0x14, 0xffff_ffff), (0x18, 0xffff_e000), (0x1c, 0), (0x30, 0)]
    {
        client.region_write(CONFIG, offset, &[0xff; 4]).unwrap();
        assert_eq!(read32(&mut client, CONFIG, offset), size, "{offset:#x}");
    }
}

fn interrupts_are_msix_alone(target: &Target) {
    let mut client = connect(target);
    for absent in [0, 1] {
        assert_eq!(client.get_irq_info(absent).unwrap().count, 0, "index {absent}");
    }
    let msix = client.get_irq_info(MSIX).unwrap();
    let first = u64::from(read32(&mut client, CONFIG, 0x34) & 0xff);
    let in_config = (read32(&mut client, CONFIG, first) >> 16 & 0x7ff) + 1;
    assert_eq!(msix.count, in_config);
    assert_eq!(msix.flags & 1, 1, "by event fd");
}

fn memory_is_mapped_used_and_unmapped(target: &Target) {
    let mut client = connect(target);
    let memory = memfd(1 << 20);
    memory.write_all_at(b"hello", 0x2000).unwrap();
    client.dma_map(0x1000, 0x10_0000, 0x8000, memory.as_raw_fd()).unwrap();
    let read = |target: &Target| target.server().map(|server| server.device().dma_read(0x10_1000, 5));
    assert!(read(target).is_none_or(|data| data.as_deref() == Ok(b"hello")));
    client.dma_unmap(0x10_0000, 0x8000).unwrap();
    assert!(read(target).is_none_or(|data| data.is_err()));
    client.dma_unmap(0xdead_0000, 0x1000).unwrap();
    assert_eq!(read32(&mut client, CONFIG, 0) & 0xffff, 0x1b36, "in step");
}

fn interrupts_are_enabled_in_batches_of_16_signalled_and_disabled(target: &Target) {
    let mut client = connect(target);
    let count = client.get_irq_info(MSIX).unwrap().count;
    let eventfds: Vec<_> = (0..count).map(|_| eventfd()).collect();
    let numbers: Vec<_> = eventfds.iter().map(AsRawFd::as_raw_fd).collect();
    for (batch, fds) in numbers.chunks(16).enumerate() {
        let start = batch as u32 * 16;
        client.set_irqs(MSIX, DATA_EVENTFD | ACTION_TRIGGER, start, fds.len() as u32, fds).unwrap();
    }
    for (vector, eventfd) in eventfds.iter().enumerate() {
        client.set_irqs(MSIX, DATA_NONE | ACTION_TRIGGER, vector as u32, 1, &[]).unwrap();
        assert_eq!(signals(eventfd), 1, "vector {vector}");
    }
    client.set_irqs(MSIX, DATA_NONE | ACTION_TRIGGER, 0, 0, &[]).unwrap();
    if let Some(server) = target.server() {
        assert_eq!(u32::from(VECTORS), count);
        server.device().msix.signal(0);
    }
    assert_eq!(signals(&eventfds[0]), 0);
}

fn reset_is_answered_and_forgets_what_was_written(target: &Target) {
    let mut client = connect(target);
    client.region_write(CONFIG, 0x3c, &[0x0b]).unwrap();
    client.reset().unwrap();
    assert_eq!(read32(&mut client, CONFIG, 0x3c), 0);
}

fn nonsense_does_not_hang_the_client(target: &Target) {
    let mut client = connect(target);
    let mut data = [0; 8];
    for (region, offset) in
        [(0, 0x1_0000), (0, u64::MAX - 2), (1, 0), (ROM, 0), (CONFIG, 255), (8, 0), (77, 0)]
    {
        client.region_read(region, offset, &mut data).unwrap();
        client.region_write(region, offset, &[0; 8]).unwrap();
        client.region_read(region, offset, &mut []).unwrap();
    }
    for len in [1, 2, 3, 5, 8] {
        client.region_read(0, 1, &mut data[..len]).unwrap();
        client.region_write(2, 4095, &data[..len]).unwrap();
    }
    assert_eq!(read32(&mut client, CONFIG, 0) & 0xffff, 0x1b36, "in step");
}

fn second_connection_after_the_first_ended_finds_the_device_again(target: &Target) {
    let mut client = connect(target);
    client.region_write(CONFIG, 0x3c, &[0x0b]).unwrap();
    client.shutdown().unwrap();
    drop(client);
    let mut client = connect(target);
    assert_eq!(read32(&mut client, CONFIG, 0), 0x000d_1b36);
    assert_eq!(read32(&mut client, CONFIG, 0x3c), 0, "as after power-on");
}

fn second_client_is_turned_away_and_the_first_goes_on(target: &Target) {
    let mut client = connect(target);
    assert!(Client::new(target.path()).is_err());
    assert_eq!(read32(&mut client, CONFIG, 0) & 0xffff, 0x1b36);
}

/// Each message with a descriptor takes a read of its own, so the end of the first client is far behind.
fn client_that_posts_and_goes_makes_room_at_once(target: &Target) {
    let memory = [memfd(0x1000)];
    let mut first = Raw::connect_to(target.path());
    first.ask(VERSION, &version(0, 0, b"")).unwrap();
    let mut second = target.while_stopped(|| {
        let second = Raw::connect_to(target.path());
        for page in 0..60 {
            first.send(DMA_MAP, NO_REPLY, &dma_map(3, 0, page << 12, 0x1000), &borrow(&memory));
        }
        drop(first);
        second
    });
    second.ask(VERSION, &version(0, 0, b"")).unwrap();
    second.assert_in_step();
}
