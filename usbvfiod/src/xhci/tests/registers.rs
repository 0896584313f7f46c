//! The register window (hostile inputs I6, G1–G5, F8).

use common::ids::Speed;

use super::super::fixture::{DATA, Guest, command_trb};
use super::super::regs::{DOORBELLS, INTERRUPTERS, OPERATIONAL, PORTS, RUNTIME};
use crate::urb::UrbStatus;

const USBCMD: u64 = OPERATIONAL;
const USBSTS: u64 = OPERATIONAL + 4;
const CRCR: u64 = OPERATIONAL + 0x18;
const CONFIG: u64 = OPERATIONAL + 0x38;

const SRE: u32 = 1 << 10;

#[test]
fn capability_registers_lead_to_the_others() {
    let mut guest = Guest::new();
    let length = guest.read32(0) & 0xff;
    assert_eq!(u64::from(length), OPERATIONAL);
    assert_eq!(guest.read32(0) >> 16, 0x110);
    assert_eq!(u64::from(guest.read32(0x14)), DOORBELLS);
    assert_eq!(u64::from(guest.read32(0x18)), RUNTIME);
    assert_eq!(guest.read32(4), 64 | 8 << 8 | 30 << 24);
    let extended = u64::from(guest.read32(0x10) >> 16) * 4;
    assert_eq!(guest.read32(extended + 4), u32::from_le_bytes(*b"USB "));
}

#[test]
fn accesses_of_any_size_and_place_are_sane() {
    let mut guest = Guest::new();
    for offset in [0, 1, 3, 0x3e, 0x40, 0x441, 0x1fff, 0x4021, 0x8002, 0xfffe, 0xffff, 0x1_0000, u64::MAX - 2]
    {
        for len in [0, 1, 2, 3, 4, 5, 7, 8, 16, 64] {
            let mut data = vec![0xaa; len];
            guest.controller.read(guest.now, offset, &mut data);
            if offset >= 0x1_0000 {
                assert!(data.iter().all(|byte| *byte == 0));
            }
            guest.write_bytes(offset, &vec![0; len]);
        }
    }
}

#[test]
fn unaligned_reads_show_the_bytes_of_whole_registers() {
    let mut guest = Guest::new();
    let mut data = [0; 6];
    guest.controller.read(guest.now, 2, &mut data);
    let (first, second) = (guest.read32(0).to_le_bytes(), guest.read32(4).to_le_bytes());
    assert_eq!(data, [first[2], first[3], second[0], second[1], second[2], second[3]]);
}

#[test]
fn eight_byte_writes_reach_both_halves() {
    let mut guest = Guest::new();
    guest.write64(OPERATIONAL + 0x30, 0x1234_5678_9abc_def0);
    assert_eq!(guest.read32(OPERATIONAL + 0x30), 0x9abc_dec0);
    assert_eq!(guest.read32(OPERATIONAL + 0x34), 0x1234_5678);
}

#[test]
fn narrow_writes_leave_the_other_bytes_alone() {
    let mut guest = Guest::new();
    let (_, port) = guest.plug(Speed::High);
    guest.write_bytes(Guest::portsc(port) + 3, &[0x02]);
    let status = guest.read32(Guest::portsc(port));
    assert_eq!((status >> 17 & 1, status >> 9 & 1, status >> 25 & 7), (1, 1, 1));
    guest.write_bytes(USBCMD + 1, &[0x04]);
    assert_eq!(guest.read32(USBCMD), 0x405, "R/S and INTE stay");
}

#[test]
fn values_out_of_range_are_kept_within_the_registers() {
    let mut guest = Guest::new();
    for value in [9, 65, 255, 0x3ff, u32::MAX] {
        guest.write32(CONFIG, value);
        assert_eq!(guest.read32(CONFIG), value & 0x3ff);
    }
    guest.write32(OPERATIONAL + 0x14, u32::MAX);
    assert_eq!(guest.read32(OPERATIONAL + 0x14), 0xffff);
    guest.write32(OPERATIONAL + 8, 7);
    assert_eq!(guest.read32(OPERATIONAL + 8), 1, "page size is read-only");
    guest.write32(PORTS + 12, u32::MAX);
    assert_eq!(guest.read32(PORTS + 12), 0, "no hardware LPM");
}

#[test]
fn event_ring_registers_read_back_what_was_written() {
    let mut guest = Guest::new();
    guest.write32(INTERRUPTERS + 0x28, 0x1_0003);
    guest.write64(INTERRUPTERS + 0x30, 0x5_0000_1000);
    guest.write64(INTERRUPTERS + 0x38, 0x6_0000_2345);
    assert_eq!(guest.read32(INTERRUPTERS + 0x28), 3);
    assert_eq!((guest.read32(INTERRUPTERS + 0x30), guest.read32(INTERRUPTERS + 0x34)), (0x1000, 5));
    assert_eq!((guest.read32(INTERRUPTERS + 0x38), guest.read32(INTERRUPTERS + 0x3c)), (0x2345, 6));
}

#[test]
fn ports_and_interrupters_that_do_not_exist_read_0() {
    let mut guest = Guest::new();
    for offset in [PORTS + 30 * 16, PORTS + 255 * 16, INTERRUPTERS + 8 * 32, INTERRUPTERS + 1023 * 32] {
        guest.write32(offset, u32::MAX);
        assert_eq!(guest.read32(offset), 0, "{offset:#x}");
    }
}

#[test]
fn doorbells_read_0_and_all_targets_of_all_slots_do_no_harm() {
    let mut guest = Guest::new();
    guest.bulk();
    for slot in 0..=255u64 {
        for target in [0, 1, 2, 31, 32, 255] {
            guest.write32(DOORBELLS + slot * 4, target);
            guest.write32(DOORBELLS + slot * 4, target | 0xffff_0000);
        }
        assert_eq!(guest.read32(DOORBELLS + slot * 4), 0);
    }
    guest.write32(DOORBELLS + 256 * 4, 0);
    assert!(guest.submitted().is_empty());
    assert!(guest.events().is_empty());
}

#[test]
fn doorbell_with_dci_32_is_ignored() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.push(slot, 4, super::super::fixture::normal(DATA, 8, 0));
    guest.ring(slot, 32 | 4);
    assert!(guest.submitted().is_empty());
}

#[test]
fn command_doorbell_with_a_target_is_ignored() {
    let mut guest = Guest::new();
    guest.write32(DOORBELLS, 1);
    assert_eq!(guest.read32(CRCR), 0);
}

#[test]
fn halting_takes_transfers_back_and_starting_goes_on() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let at = guest.normal(slot, 3, DATA, 512);
    let first = guest.request();
    guest.write32(USBCMD, 4);
    assert_eq!(guest.read32(USBSTS) & 1, 1);
    assert_eq!(guest.cancelled().0, [first.id]);
    guest.complete(first.id, UrbStatus::Cancelled, 0);
    guest.ring(slot, 3);
    assert!(guest.submitted().is_empty() && guest.events().is_empty());
    guest.write32(USBCMD, 5);
    let second = guest.request();
    guest.complete(second.id, UrbStatus::Completed, 512);
    assert_eq!(guest.transfers(), [(at, 1, 0)]);
}

#[test]
fn transfer_that_ended_while_halted_is_told_after_the_start() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let at = guest.normal(slot, 3, DATA, 512);
    let request = guest.request();
    guest.write32(USBCMD, 4);
    guest.complete(request.id, UrbStatus::Completed, 100);
    assert!(guest.events().is_empty());
    guest.write32(USBCMD, 5);
    assert_eq!(guest.transfers(), [(at, 13, 412)]);
}

#[test]
fn saved_state_is_restored_and_lost_state_sets_sre() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let at = guest.normal(slot, 3, DATA, 512);
    let first = guest.request();
    guest.write32(USBCMD, 4);
    guest.complete(first.id, UrbStatus::Cancelled, 0);
    guest.write32(USBCMD, 4 | 1 << 8);
    assert_eq!(guest.read32(USBSTS) & (1 << 8), 0, "SSS clears at once");
    guest.write64(INTERRUPTERS + 0x10, 0x3000);
    guest.write32(USBCMD, 4 | 1 << 9);
    assert_eq!(guest.read32(USBSTS) & SRE, 0);
    guest.write32(USBCMD, 5);
    let second = guest.request();
    guest.complete(second.id, UrbStatus::Completed, 512);
    assert_eq!(guest.transfers(), [(at, 1, 0)], "events go on where they were");

    guest.write32(USBCMD, 2);
    guest.write32(USBCMD, 1 << 9);
    assert_eq!(guest.read32(USBSTS) & SRE, SRE);
    guest.write32(USBSTS, SRE);
    assert_eq!(guest.read32(USBSTS) & SRE, 0);
}

#[test]
fn reset_during_a_command_that_waits_forgets_it() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.normal(slot, 3, DATA, 512);
    guest.post_command(command_trb(15, slot, 3, 0));
    guest.write32(USBCMD, 2);
    guest.start();
    guest.events();
    assert_eq!(guest.command(command_trb(23, 0, 0, 0)), (1, 0));
    assert_eq!(guest.controller.next_deadline(), None);
}

#[test]
fn vmm_that_goes_away_and_comes_back_finds_the_devices() {
    let mut guest = Guest::new();
    let (device, slot) = guest.bulk();
    guest.normal(slot, 3, DATA, 512);
    let request = guest.request();
    guest.controller.reset(guest.now, &mut guest.effects);
    assert_eq!(guest.cancelled().1, [request.id]);
    assert_eq!(guest.read32(USBSTS) & 1, 1);
    guest.start();
    let port = guest.controller.port_of(device).unwrap();
    assert_eq!(guest.read32(Guest::portsc(port)) & 1, 1);
    assert_eq!(guest.events().len(), 1);
}

#[test]
fn mfindex_moves_with_the_clock_and_wraps() {
    let mut guest = Guest::new();
    let first = guest.read32(RUNTIME);
    guest.now += std::time::Duration::from_micros(125 * 10);
    assert_eq!(guest.read32(RUNTIME), first + 10);
    guest.now += std::time::Duration::from_micros(125 * 16384);
    assert_eq!(guest.read32(RUNTIME), first + 10);
}

#[test]
fn mfindex_wrap_event_comes_only_when_enabled() {
    let mut guest = Guest::new();
    assert_eq!(guest.controller.next_deadline(), None);
    guest.write32(USBCMD, 5 | 1 << 10);
    guest.wait(std::time::Duration::from_millis(2048 * 2 + 10));
    let wraps = guest.events().into_iter().filter(|event| event.kind == 39).count();
    assert_eq!(wraps, 2);
}

#[test]
fn idle_controller_has_no_deadline() {
    let mut guest = Guest::new();
    let (_, slot) = guest.configured(Speed::Full, &[(3, 7, 8, 0)]);
    guest.normal(slot, 3, DATA, 8);
    guest.events();
    assert_eq!(guest.controller.next_deadline(), None);
}

#[test]
fn what_is_not_there_is_not_offered_and_its_switches_do_nothing() {
    const HSEE_AND_LHCRST: u32 = 1 << 3 | 1 << 7;
    let mut guest = Guest::new();
    assert_eq!(guest.read32(0x0c), 0, "HCSPARAMS3: no U1, U2");
    assert_eq!(guest.read32(0x1c), 0, "HCCPARAMS2");
    guest.write32(USBCMD, 5 | HSEE_AND_LHCRST);
    assert_eq!(guest.read32(USBSTS) & 5, 0, "runs on");
    assert_eq!(guest.command(command_trb(23, 0, 0, 0)).0, 1);
}

#[test]
fn wake_enables_indicator_and_power_management_are_kept_without_effect() {
    const POWER: u32 = 1 << 9;
    const KEPT: u32 = 7 << 25 | 3 << 14;
    let mut guest = Guest::new();
    for (speed, lpm) in [(Speed::High, 0xfff8), (Speed::Super, 0xffff)] {
        let (_, port) = guest.plug(speed);
        guest.reset_port(port);
        let portsc = Guest::portsc(port);
        let before = guest.read32(portsc);
        guest.write32(portsc, POWER | KEPT);
        guest.write32(portsc + 4, u32::MAX);
        assert_eq!(guest.read32(portsc), before | KEPT, "{speed}");
        assert_eq!(guest.read32(portsc + 4), lpm, "{speed}");
        assert!(guest.operations().is_empty());
    }
}
