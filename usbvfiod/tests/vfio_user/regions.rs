//! REGION_READ and REGION_WRITE: full-size success wherever Cloud Hypervisor would hang.

use crate::server::Server;
use crate::wire::{Answer, CONFIG, EINVAL, MSIX, REGION_READ, REGION_WRITE, ROM, Raw, access};

fn client() -> (Server, Raw) {
    let server = Server::start();
    let raw = Raw::negotiated(&server);
    (server, raw)
}

fn requests(server: &Server) -> usize {
    server.device().log.len()
}

#[test]
fn what_was_written_is_read_at_any_size_and_alignment() {
    let (_server, mut raw) = client();
    for (offset, len) in [(0, 1), (1, 2), (3, 3), (5, 8), (0xfff0, 16), (7, 333)] {
        let data: Vec<u8> = (0..len).map(|byte| byte as u8 ^ 0x5a).collect();
        raw.write(0, offset, &data);
        assert_eq!(raw.read(0, offset, len), data);
    }
}

#[test]
fn access_outside_a_region_reads_ones_and_writes_nothing() {
    let (server, mut raw) = client();
    for (region, offset) in [(0, 0x1_0000), (0, u64::MAX), (CONFIG, 256), (MSIX, 0x2000), (0, 1 << 63)] {
        assert_eq!(raw.read(region, offset, 8), [0xff; 8]);
        raw.write(region, offset, &[0; 8]);
    }
    assert_eq!(requests(&server), 0, "the device never hears of it");
    raw.assert_in_step();
}

#[test]
fn access_across_the_end_is_cut() {
    let (server, mut raw) = client();
    raw.write(0, 0xfffc, &[1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(raw.read(0, 0xfffc, 8), [1, 2, 3, 4, 0xff, 0xff, 0xff, 0xff]);
    let log = server.device().log.clone();
    assert_eq!(log, ["write Bar(0) 0xfffc 4", "read Bar(0) 0xfffc 4"]);
}

#[test]
fn absent_regions_read_ones_and_swallow_writes() {
    let (server, mut raw) = client();
    for region in [1, 3, 4, 5, ROM, 8, 9, 1000, u32::MAX] {
        assert_eq!(raw.read(region, 0, 4), [0xff; 4], "region {region}");
        raw.write(region, 0, &[1, 2, 3]);
    }
    assert_eq!(requests(&server), 0);
    raw.assert_in_step();
}

#[test]
fn access_of_no_bytes_succeeds() {
    let (_server, mut raw) = client();
    for (region, offset) in [(0, 0), (0, 0x1_0000), (0, u64::MAX), (CONFIG, 3), (ROM, 0), (99, 0)] {
        assert!(raw.read(region, offset, 0).is_empty());
        raw.write(region, offset, &[]);
    }
    raw.assert_in_step();
}

#[test]
fn access_larger_than_max_data_xfer_size_is_refused() {
    let (_server, mut raw) = client();
    for count in [(1 << 20) + 1, 1 << 31, u32::MAX] {
        assert_eq!(raw.ask(REGION_READ, &access(0, 0, count)), EINVAL);
        assert_eq!(raw.ask(REGION_WRITE, &access(0, 0, count)), EINVAL);
    }
    raw.assert_in_step();
}

#[test]
fn largest_access_succeeds() {
    let (_server, mut raw) = client();
    raw.write(0, 0, &[0x11; 1 << 20]);
    let data = raw.read(0, 0, 1 << 20);
    let (inside, outside) = data.split_at(64 << 10);
    assert!(inside.iter().all(|&byte| byte == 0x11) && outside.iter().all(|&byte| byte == 0xff));
}

#[test]
fn write_with_more_or_less_data_than_it_says_is_refused() {
    let (server, mut raw) = client();
    let send = |raw: &mut Raw, count, len| -> Answer {
        raw.ask(REGION_WRITE, &[access(0, 0, count), vec![1; len]].concat())
    };
    for (count, len) in [(4, 3), (4, 5), (0, 1), (1, 0)] {
        assert_eq!(send(&mut raw, count, len), EINVAL);
    }
    assert_eq!(requests(&server), 0);
    raw.assert_in_step();
}

#[test]
fn config_reads_of_1_2_3_4_and_256_bytes_agree() {
    let (_server, mut raw) = client();
    let whole = raw.read(CONFIG, 0, 256);
    for len in [1, 2, 3, 4] {
        for offset in 0..=256 - len {
            let part = raw.read(CONFIG, u64::from(offset), len);
            assert_eq!(part, whole[offset as usize..][..len as usize]);
        }
    }
}

#[test]
fn config_write_of_any_length_is_bytewise() {
    let (_server, mut raw) = client();
    raw.write(CONFIG, 0x10, &[0xff; 12]);
    assert_eq!(raw.read(CONFIG, 0x10, 12), [4, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0xe0, 0xff, 0xff]);
    raw.write(CONFIG, 0x12, &[0x34, 0x12, 0x01]);
    assert_eq!(raw.read(CONFIG, 0x10, 8), [4, 0, 0x34, 0x12, 0x01, 0xff, 0xff, 0xff]);
}

#[test]
fn pci_capability_writes_change_what_can_be_changed() {
    let (_server, mut raw) = client();
    let msix = u64::from(raw.read(CONFIG, 0x34, 1)[0]);
    raw.write(CONFIG, msix, &[0xff; 12]);
    assert_eq!(raw.read(CONFIG, msix + 2, 2), [19, 0xc0]);
    assert_eq!(raw.read(CONFIG, msix + 4, 8), [2, 0, 0, 0, 2, 0x10, 0, 0]);
    let power = u64::from(raw.read(CONFIG, msix + 1, 1)[0]);
    raw.write(CONFIG, power + 4, &[0xff, 0xff]);
    assert_eq!(raw.read(CONFIG, power + 4, 2), [0b1011, 0], "D3hot, without soft reset");
}

#[test]
fn msix_table_keeps_what_is_written_and_the_pending_bits_do_not() {
    let (_server, mut raw) = client();
    assert_eq!(raw.read(MSIX, 12, 4), [1, 0, 0, 0], "masked");
    raw.write(MSIX, 16, &[0xff; 16]);
    assert_eq!(
        raw.read(MSIX, 16, 16),
        [0xfc, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1, 0, 0, 0]
    );
    raw.write(MSIX, 0x1000, &[0xff; 8]);
    assert_eq!(raw.read(MSIX, 0x1000, 8), [0; 8]);
    raw.write(MSIX, 20 * 16, &[0xff; 4]);
    assert_eq!(raw.read(MSIX, 20 * 16, 4), [0; 4], "hole behind the table");
}
