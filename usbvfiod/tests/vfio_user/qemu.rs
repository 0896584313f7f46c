//! What QEMU sends, in its order (`hw/vfio-user`, and the order its functional test looks for in the log).

use crate::server::Server;
use crate::wire::{
    ACTION_TRIGGER, CONFIG, DATA_EVENTFD, DATA_NONE, DMA_MAP, DMA_UNMAP, GET_INFO, GET_IRQ_INFO,
    GET_REGION_INFO, MSIX, NO_REPLY, REGION_READ, REGION_WRITE, RESET, Raw, SET_IRQS, VERSION, access,
    borrow, dma_map, dma_unmap, eventfd, sealed_memfd, set_irqs, signals, version, words,
};

use nix::fcntl::SealFlag;

const JSON: &[u8] = b"{\"capabilities\": {\"migration\": {\"max_bitmap_size\": 33554432, \"pgsize\": 4096}, \
    \"max_msg_fds\": 8, \"write_multiple\": true, \"max_data_xfer_size\": 1048576}}\0";

#[test]
fn start_interrupts_traffic_and_end_as_qemu_does_it() {
    let server = Server::start();
    let mut raw = Raw::connect(&server);

    // It speaks 0.0, and its receive buffer for the reply is small.
    let reply = raw.ask(VERSION, &version(0, 0, JSON)).unwrap();
    assert_eq!(reply[..4], version(0, 0, b""));
    assert!(reply.len() < 512);

    // Memory first, without waiting: RAM with a file, ROM read-only, and what is not shared without a file.
    let ram = sealed_memfd(1 << 20, SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL);
    let maps = [
        raw.send(DMA_MAP, 0, &dma_map(3, 0, 0, 0xa_0000), &borrow(&[&ram])),
        raw.send(DMA_MAP, 0, &dma_map(1, 0xc_0000, 0xc_0000, 0x1_0000), &borrow(&[&ram])),
        raw.send(DMA_MAP, 0, &dma_map(3, 0, 0xfd00_0000, 0x100_0000), &[]),
        raw.send(DMA_MAP, 0, &dma_map(1, 0, 0xfffc_0000, 0x4_0000), &[]),
    ];
    for id in maps {
        assert_eq!(raw.receive(), (id, DMA_MAP, Ok(Vec::new())));
    }

    // The device.
    assert_eq!(raw.ask(GET_INFO, &words(&[16, 0, 0, 0])), Ok(words(&[16, 3, 9, 3])));
    for region in [0, 1, 2, 3, 4, 5, CONFIG] {
        let info = raw.ask(GET_REGION_INFO, &words(&[32, 0, region, 0, 0, 0, 0, 0])).unwrap();
        assert_eq!(info.len(), 32);
    }
    let config = raw.read(CONFIG, 0, 256);
    assert_eq!(config[..4], [0x36, 0x1b, 0x0d, 0x00]);
    for bar in (0x10..0x28).step_by(4).chain([0x30]) {
        raw.write(CONFIG, bar, &[0xff; 4]);
        raw.read(CONFIG, bar, 4);
        raw.write(CONFIG, bar, &[0; 4]);
    }
    raw.ask(GET_IRQ_INFO, &words(&[16, 0, MSIX, 0])).unwrap();
    for absent in [3, 4] {
        assert!(raw.ask(GET_IRQ_INFO, &words(&[16, 0, absent, 0])).is_err());
    }

    // MSI-X: enabled without a vector, then one by one.
    raw.ask(SET_IRQS, &set_irqs(DATA_EVENTFD | ACTION_TRIGGER, MSIX, 0, 1)).unwrap();
    let vectors = [eventfd(), eventfd()];
    for (start, vector) in vectors.iter().enumerate() {
        let payload = set_irqs(DATA_EVENTFD | ACTION_TRIGGER, MSIX, start as u32, 1);
        raw.ask_with(SET_IRQS, &payload, &borrow(&[vector])).unwrap();
    }
    server.device().msix.signal(1);
    assert_eq!([signals(&vectors[0]), signals(&vectors[1])], [0, 1]);

    // Registers: writes are posted, a read waits for them.
    for value in 0..100_u8 {
        raw.send(REGION_WRITE, NO_REPLY, &[access(0, 0x20, 4), vec![value; 4]].concat(), &[]);
    }
    assert_eq!(raw.read(0, 0x20, 4), [99; 4]);

    // Machine reset, and a change of the memory map.
    assert_eq!(raw.ask(RESET, &[]), Ok(Vec::new()));
    assert_eq!(raw.read(0, 0x20, 4), [0; 4]);
    let unmap = dma_unmap(0, 0xc_0000, 0x1_0000);
    assert_eq!(raw.ask(DMA_UNMAP, &unmap), Ok(unmap));

    // The end.
    raw.ask(SET_IRQS, &set_irqs(DATA_NONE | ACTION_TRIGGER, MSIX, 0, 0)).unwrap();
    let all = dma_unmap(2, 0, 0);
    assert_eq!(raw.ask(DMA_UNMAP, &all), Ok(all));
    assert!(server.device().memory.is_empty());
}

#[test]
fn order_in_the_log_is_the_order_of_the_messages() {
    let server = Server::start();
    let mut raw = Raw::connect(&server);
    raw.ask(VERSION, &version(0, 0, JSON)).unwrap();
    raw.send(DMA_MAP, 0, &dma_map(3, 0, 0, 0x1000), &[]);
    raw.send(GET_INFO, 0, &words(&[16, 0, 0, 0]), &[]);
    raw.send(REGION_READ, 0, &access(CONFIG, 0, 256), &[]);
    raw.send(REGION_WRITE, NO_REPLY, &[access(0, 8, 4), vec![0; 4]].concat(), &[]);
    raw.send(DMA_UNMAP, 0, &dma_unmap(2, 0, 0), &[]);
    let order: Vec<u16> = (0..4).map(|_| raw.receive().1).collect();
    assert_eq!(order, [DMA_MAP, GET_INFO, REGION_READ, DMA_UNMAP]);
    assert_eq!(
        server.device().log,
        ["map 0x0 0x1000 file=false", "read Config 0x0 256", "write Bar(0) 0x8 4", "unmap All"]
    );
}
