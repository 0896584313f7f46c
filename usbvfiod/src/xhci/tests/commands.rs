//! The command ring and the commands (hostile inputs R6, I4, I5, C1–C5, S10).

use common::ids::Speed;

use super::super::AttachOptions;
use super::super::fixture::{DATA, Guest, command_trb};
use super::super::regs::{DOORBELLS, OPERATIONAL};
use super::super::trb::Trb;
use crate::urb::{DeviceOp, OpError, UrbStatus};

const SUCCESS: u8 = 1;
const TRANSACTION: u8 = 4;
const TRB: u8 = 5;
const RESOURCE: u8 = 7;
const NO_SLOTS: u8 = 9;
const SLOT_NOT_ENABLED: u8 = 11;
const ENDPOINT_NOT_ENABLED: u8 = 12;
const PARAMETER: u8 = 17;
const CONTEXT_STATE: u8 = 19;
const RING_STOPPED: u8 = 24;
const ABORTED: u8 = 25;

const ENABLE_SLOT: u32 = 9;
const DISABLE_SLOT: u32 = 10;
const ADDRESS_DEVICE: u32 = 11;
const CONFIGURE: u32 = 12;
const EVALUATE: u32 = 13;
const STOP: u32 = 15;
const RESET_DEVICE: u32 = 17;

const CRCR: u64 = OPERATIONAL + 0x18;
const INPUT: u64 = 0x6000;

#[test]
fn commands_that_are_none_of_ours_are_trb_errors() {
    let mut guest = Guest::new();
    for trb_type in (0..64).filter(|kind| !matches!(kind, 6 | 9..=17 | 23)) {
        assert_eq!(guest.slot_command(trb_type, 1, 1, 0), TRB, "{trb_type}");
    }
}

#[test]
fn commands_with_all_reserved_bits_set_are_answered() {
    let mut guest = Guest::new();
    for trb_type in (0..64u32).filter(|kind| *kind != 6) {
        let trb = Trb::new(u64::MAX, u32::MAX, 0xffff_03ff | trb_type << 10);
        guest.command(trb);
    }
}

#[test]
fn slots_that_are_not_enabled_are_told_so_by_every_command() {
    let mut guest = Guest::new();
    for trb_type in 10..=17 {
        for slot in [0, 1, 64, 65, 255] {
            assert_eq!(guest.slot_command(trb_type, slot, 1, INPUT), SLOT_NOT_ENABLED, "{trb_type} {slot}");
        }
    }
}

#[test]
fn endpoints_that_do_not_exist_are_told_so() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    for trb_type in 14..=16 {
        assert_eq!(guest.slot_command(trb_type, slot, 0, 0), TRB);
        assert_eq!(guest.slot_command(trb_type, slot, 31, 0), ENDPOINT_NOT_ENABLED);
    }
}

#[test]
fn slots_run_out_at_the_number_the_guest_enabled() {
    let mut guest = Guest::new();
    guest.write32(OPERATIONAL + 0x38, 2);
    assert_eq!(guest.command(command_trb(ENABLE_SLOT, 0, 0, 0)), (SUCCESS, 1));
    assert_eq!(guest.command(command_trb(ENABLE_SLOT, 0, 0, 0)), (SUCCESS, 2));
    assert_eq!(guest.command(command_trb(ENABLE_SLOT, 0, 0, 0)).0, NO_SLOTS);
    assert_eq!(guest.slot_command(DISABLE_SLOT, 1, 0, 0), SUCCESS);
    assert_eq!(guest.command(command_trb(ENABLE_SLOT, 0, 0, 0)), (SUCCESS, 1));
    guest.write32(OPERATIONAL + 0x38, 255);
    let enabled = (0..300).filter(|_| guest.command(command_trb(ENABLE_SLOT, 0, 0, 0)).0 == SUCCESS).count();
    assert_eq!(enabled, 62);
}

#[test]
fn enable_slot_of_another_slot_type_is_refused() {
    let mut guest = Guest::new();
    assert_eq!(guest.command(command_trb(ENABLE_SLOT, 0, 1, 0)).0, TRB);
}

#[test]
fn address_device_follows_the_slot_states() {
    let mut guest = Guest::new();
    let (_, port) = guest.plug(Speed::High);
    guest.reset_port(port);
    let slot = guest.enable_slot();
    let input = guest.address_input(slot, port.get());
    let blocked = Trb::new(input, 0, command_trb(ADDRESS_DEVICE, slot, 0, 0).control().into_bits() | 1 << 9);
    assert_eq!(guest.command(blocked).0, SUCCESS);
    assert_eq!(guest.slot(slot), (1, 0));
    assert_eq!(guest.command(blocked).0, CONTEXT_STATE);
    assert_eq!(guest.slot_command(ADDRESS_DEVICE, slot, 0, input), SUCCESS);
    assert_eq!(guest.slot(slot), (2, slot));
    assert_eq!(guest.endpoint(slot, 1).0, 1);
    assert_eq!(guest.slot_command(ADDRESS_DEVICE, slot, 0, input), CONTEXT_STATE);
}

#[test]
fn address_device_checks_its_input_context() {
    let mut guest = Guest::new();
    let (_, port) = guest.plug(Speed::High);
    guest.reset_port(port);
    let slot = guest.enable_slot();
    let broken: [(u64, u32, u8); 9] = [
        (0x00, 1 << 3, TRB),
        (0x04, 1, TRB),
        (0x04, 2, TRB),
        (0x20, 1 << 27 | 1, PARAMETER),
        (0x24, 0, PARAMETER),
        (0x24, 31 << 16, PARAMETER),
        (0x24, 2 << 16, TRANSACTION),
        (0x44, 3 << 1 | 4 << 3, PARAMETER),
        (0x44, 3 << 1 | 6 << 3 | 64 << 16, PARAMETER),
    ];
    for (offset, value, code) in broken {
        let input = guest.address_input(slot, port.get());
        guest.mem.put(input + offset, &value.to_le_bytes());
        assert_eq!(guest.slot_command(ADDRESS_DEVICE, slot, 0, input), code, "{offset:#x} {value:#x}");
        assert_eq!(guest.slot(slot), (0, 0));
    }
    for input in [1 << 40, !0xf] {
        assert_eq!(guest.slot_command(ADDRESS_DEVICE, slot, 0, input), TRB);
    }
}

#[test]
fn port_serves_one_slot_only() {
    let mut guest = Guest::new();
    let (device, slot) = guest.enumerate(Speed::High);
    let port = guest.controller.port_of(device).unwrap();
    let other = guest.enable_slot();
    let input = guest.address_input(other, port.get());
    assert_eq!(guest.slot_command(ADDRESS_DEVICE, other, 0, input), TRB);
    assert_eq!(guest.slot_command(DISABLE_SLOT, slot, 0, 0), SUCCESS);
    let input = guest.address_input(other, port.get());
    assert_eq!(guest.slot_command(ADDRESS_DEVICE, other, 0, input), SUCCESS);
}

#[test]
fn device_that_left_is_a_transaction_error_for_address_device() {
    let mut guest = Guest::new();
    let (device, port) = guest.plug(Speed::High);
    guest.reset_port(port);
    let slot = guest.enable_slot();
    guest.unplug(device);
    let input = guest.address_input(slot, port.get());
    assert_eq!(guest.slot_command(ADDRESS_DEVICE, slot, 0, input), TRANSACTION);
}

#[test]
fn device_context_outside_memory_is_refused() {
    let mut guest = Guest::new();
    let (_, port) = guest.plug(Speed::High);
    guest.reset_port(port);
    let slot = guest.enable_slot();
    for context in [1u64 << 40, 1 << 63, !0x3f] {
        guest.mem.put(0x1000 + u64::from(slot) * 8, &context.to_le_bytes());
        let input = guest.address_input(slot, port.get());
        assert_eq!(guest.slot_command(ADDRESS_DEVICE, slot, 0, input), TRB);
        assert_eq!(guest.slot_command(CONFIGURE, slot, 0, input), CONTEXT_STATE, "still Enabled");
    }
}

#[test]
fn evaluate_context_changes_the_packet_size_of_the_default_pipe() {
    let mut guest = Guest::new();
    let (_, slot) = guest.enumerate(Speed::Full);
    for (max_packet, code) in [(8, SUCCESS), (0, PARAMETER), (4096, PARAMETER)] {
        guest.clear_input();
        guest.mem.put(INPUT + 4, &2u32.to_le_bytes());
        guest.mem.put(INPUT + 0x44, &(4u32 << 3 | max_packet << 16).to_le_bytes());
        assert_eq!(guest.slot_command(EVALUATE, slot, 0, INPUT), code, "{max_packet}");
    }
    guest.mem.put(INPUT + 4, &0u32.to_le_bytes());
    assert_eq!(guest.slot_command(EVALUATE, slot, 0, INPUT), TRB);
    let fresh = guest.enable_slot();
    assert_eq!(guest.slot_command(EVALUATE, fresh, 0, INPUT), CONTEXT_STATE);
}

#[test]
fn configure_endpoint_checks_each_endpoint_context() {
    let mut guest = Guest::new();
    let (_, slot) = guest.enumerate(Speed::High);
    let bad: [(u8, u32, u32, u32); 12] = [
        (3, 0, 512, 0),
        (3, 2, 512, 0),
        (4, 6, 512, 0),
        (3, 4, 512, 0),
        (3, 6, 0, 0),
        (3, 6, 65535, 0),
        (3, 7, 64, 255 << 16),
        (3, 7, 64, 31 << 16),
        (3, 5, 1024, 3 << 8),
        (3, 6, 512, 4 << 10 | 1 << 15),
        (3, 7, 64, 1 << 10 | 1 << 15),
        (3, 6, 512, 31 << 10),
    ];
    for endpoint in bad {
        let input = guest.configure_input(slot, &[endpoint]);
        assert_eq!(guest.slot_command(CONFIGURE, slot, 0, input), PARAMETER, "{endpoint:?}");
        assert_eq!(guest.endpoint(slot, 3).0, 0);
    }
    assert_eq!(guest.slot(slot).0, 2, "nothing has changed");
    let good = [(3, 6, 512, 0), (4, 2, 512, 0), (5, 7, 1024, 18 << 16), (7, 5, 1024, 2 << 8), (31, 6, 64, 0)];
    let input = guest.configure_input(slot, &good);
    assert_eq!(guest.slot_command(CONFIGURE, slot, 0, input), SUCCESS);
}

#[test]
fn configure_endpoint_checks_its_flags() {
    let mut guest = Guest::new();
    let (_, slot) = guest.enumerate(Speed::High);
    for (drop, add) in [(1u32, 1u32), (2, 1), (0, 3), (0, 2)] {
        let input = guest.configure_input(slot, &[]);
        guest.mem.put(input, &[drop.to_le_bytes(), u32::to_le_bytes(add)]);
        assert_eq!(guest.slot_command(CONFIGURE, slot, 0, input), TRB, "{drop} {add}");
    }
    let input = guest.configure_input(slot, &[(3, 6, 512, 0)]);
    for entries in [0u32, 2] {
        guest.mem.put(input + 0x20, &(entries << 27).to_le_bytes());
        assert_eq!(guest.slot_command(CONFIGURE, slot, 0, input), PARAMETER, "entries {entries}");
    }
    guest.mem.put(input + 0x20, &(3u32 << 27).to_le_bytes());
    guest.mem.put(input + 0x28, &(8u32 << 22).to_le_bytes());
    assert_eq!(guest.slot_command(CONFIGURE, slot, 0, input), PARAMETER, "interrupter 8 of 8");
}

#[test]
fn endpoint_dropped_and_added_starts_anew() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.normal(slot, 3, DATA, 512);
    let old = guest.request();
    let input = guest.configure_input(slot, &[(3, 6, 512, 0)]);
    guest.mem.put(input, &(1u32 << 3).to_le_bytes());
    assert_eq!(guest.slot_command(CONFIGURE, slot, 0, input), SUCCESS);
    assert_eq!(guest.cancelled().1, [old.id]);
    let at = guest.normal(slot, 3, DATA, 64);
    assert!(guest.submitted().is_empty(), "the endpoint is not free yet");
    guest.complete(old.id, UrbStatus::Cancelled, 100);
    assert!(guest.transfers().is_empty());
    let new = guest.request();
    guest.complete(new.id, UrbStatus::Completed, 64);
    assert_eq!(guest.transfers(), [(at, SUCCESS, 0)]);
}

#[test]
fn configure_endpoint_in_the_wrong_state_is_refused() {
    let mut guest = Guest::new();
    let slot = guest.enable_slot();
    assert_eq!(guest.slot_command(CONFIGURE, slot, 0, INPUT), CONTEXT_STATE);
    assert_eq!(guest.slot_command(RESET_DEVICE, slot, 0, 0), CONTEXT_STATE);
}

#[test]
fn disable_slot_with_100_transfers_pending_ends_at_once_again_and_again() {
    let mut guest = Guest::new();
    for _ in 0..200 {
        let (device, slot) = guest.configured(Speed::High, &[(4, 2, 512, 0), (6, 2, 512, 0), (3, 6, 512, 0)]);
        for dci in [4, 6, 3] {
            for _ in 0..20 {
                guest.normal(slot, dci, DATA, 512);
            }
        }
        guest.control(slot, [0x80, 6, 0, 1, 0, 0, 64, 0], DATA);
        let requests = guest.submitted();
        assert_eq!(requests.len(), 25);
        assert_eq!(guest.slot_command(DISABLE_SLOT, slot, 0, 0), SUCCESS);
        assert_eq!(guest.cancelled().1.len(), 25);
        assert_eq!(guest.slot(slot), (0, 0));
        assert_eq!(guest.controller.trbs_in_flight, 0);
        requests.iter().for_each(|request| guest.complete(request.id, UrbStatus::Cancelled, 0));
        assert!(guest.events().is_empty());
        guest.unplug(device);
        guest.events();
    }
    assert!(guest.controller.operations.is_empty());
}

#[test]
fn command_ring_stop_and_abort_say_where_they_stopped() {
    let mut guest = Guest::new();
    assert_eq!(guest.command(command_trb(23, 0, 0, 0)).0, SUCCESS);
    assert_eq!(guest.read32(CRCR), 8, "CRR");
    guest.write64(CRCR, 2);
    assert_eq!(guest.read32(CRCR), 0);
    let events = guest.events();
    assert_eq!((events[0].code, events[0].pointer), (RING_STOPPED, 0x2010));

    let (_, slot) = guest.bulk();
    guest.normal(slot, 3, DATA, 512);
    let stop = guest.post_command(command_trb(STOP, slot, 3, 0));
    guest.write64(CRCR, 4);
    assert_eq!(guest.read32(CRCR), 0);
    let events = guest.events();
    assert_eq!((events[0].code, events[0].pointer), (ABORTED, stop));
    assert_eq!((events[1].code, events[1].pointer), (RING_STOPPED, stop + 16));
}

#[test]
fn command_stop_waits_for_the_command_in_execution() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.normal(slot, 3, DATA, 512);
    let request = guest.request();
    guest.post_command(command_trb(STOP, slot, 3, 0));
    guest.write64(CRCR, 2);
    assert_eq!(guest.read32(CRCR), 8);
    guest.complete(request.id, UrbStatus::Cancelled, 0);
    assert_eq!(guest.read32(CRCR), 0);
    let codes: Vec<u8> = guest.events().iter().map(|event| event.code).collect();
    assert_eq!(codes, [26, SUCCESS, RING_STOPPED]);
}

#[test]
fn pointer_written_while_the_ring_runs_is_ignored() {
    let mut guest = Guest::new();
    assert_eq!(guest.command(command_trb(23, 0, 0, 0)).0, SUCCESS);
    guest.write64(CRCR, 0x7_0000_5000);
    assert_eq!(guest.command(command_trb(23, 0, 0, 0)).0, SUCCESS);
}

#[test]
fn command_ring_of_links_only_is_a_host_controller_error_until_reset() {
    let mut guest = Guest::new();
    guest.mem.put(0x2000, &Trb::new(0x2000, 0, 6 << 10 | 1));
    guest.write32(DOORBELLS, 0);
    assert_eq!(guest.read32(OPERATIONAL + 4) & (1 << 12 | 1), 1 << 12 | 1);
    guest.write32(OPERATIONAL, 5);
    assert_eq!(guest.read32(OPERATIONAL + 4) & 1, 1, "stays halted");
    guest.write32(OPERATIONAL, 2);
    guest.start();
    assert_eq!(guest.read32(OPERATIONAL + 4) & (1 << 12 | 1), 0);
    assert_eq!(guest.command(command_trb(23, 0, 0, 0)).0, SUCCESS);
}

#[test]
fn command_ring_outside_memory_is_a_host_system_error() {
    for at in [1u64 << 40, 1 << 63, !0x3f] {
        let mut guest = Guest::new();
        guest.write32(OPERATIONAL, 2);
        guest.start();
        guest.write64(CRCR, at | 1);
        guest.write32(DOORBELLS, 0);
        assert_eq!(guest.read32(OPERATIONAL + 4) & (1 << 2 | 1), 1 << 2 | 1, "{at:#x}");
    }
}

#[test]
fn streams_the_host_cannot_give_are_a_resource_error() {
    let mut guest = Guest::new();
    let options = AttachOptions { host_streams: false, ..AttachOptions::default() };
    let (_, port) = guest.plug_with(Speed::Super, options);
    let slot = guest.address(port);
    let input = guest.configure_input(slot, &[(3, 6, 1024, 4 << 10 | 1 << 15)]);
    assert_eq!(guest.slot_command(CONFIGURE, slot, 0, input), RESOURCE);
    assert_eq!(guest.slot(slot).0, 2);
}

#[test]
fn failed_stream_allocation_leaves_the_slot_as_it_was() {
    let mut guest = Guest::new();
    let (_, slot) = guest.enumerate(Speed::Super);
    let input = guest.configure_input(slot, &[(3, 6, 1024, 4 << 10 | 1 << 15)]);
    let at = guest.post_command(command_trb(CONFIGURE, slot, 0, input));
    let (id, op) = guest.operation();
    assert_eq!(op, DeviceOp::AllocStreams { endpoints: vec![0x81], streams: 31 });
    guest.operation_done(id, Err(OpError::NoResources));
    assert_eq!(guest.answer(at), Some((RESOURCE, slot)));
    assert_eq!((guest.slot(slot).0, guest.endpoint(slot, 3).0), (2, 0));
}

#[test]
fn streams_that_come_too_late_are_taken_away_again() {
    let mut guest = Guest::new();
    let (_, slot) = guest.enumerate(Speed::Super);
    let input = guest.configure_input(slot, &[(3, 6, 1024, 4 << 10 | 1 << 15)]);
    let at = guest.post_command(command_trb(CONFIGURE, slot, 0, input));
    let (id, _) = guest.operation();
    guest.wait(std::time::Duration::from_secs(4));
    assert_eq!(guest.answer(at), Some((TRANSACTION, slot)));
    guest.operation_done(id, Ok(()));
    assert_eq!(guest.operation().1, DeviceOp::FreeStreams { endpoints: vec![0x81] });
}

#[test]
fn commands_of_a_batch_longer_than_the_budget_all_run() {
    let mut guest = Guest::new();
    let mut last = 0;
    for index in 0..62u64 {
        guest.mem.put(0x2000 + index * 16, &command_trb(23, 0, 0, 0).with_cycle(true));
        last = 0x2000 + index * 16;
    }
    guest.write32(DOORBELLS, 0);
    guest.wait(std::time::Duration::ZERO);
    let events = guest.events();
    assert_eq!((events.len(), events[61].pointer), (62, last));
}

#[test]
fn controller_reset_with_100_transfers_pending_leaves_nothing_again_and_again() {
    let mut guest = Guest::new();
    for _ in 0..200 {
        let (device, slot) = guest.configured(Speed::High, &[(4, 2, 512, 0), (6, 2, 512, 0), (3, 6, 512, 0)]);
        for dci in [4, 6, 3] {
            for _ in 0..32 {
                guest.normal(slot, dci, DATA, 512);
            }
        }
        guest.control(slot, [0x80, 6, 0, 1, 0, 0, 64, 0], DATA);
        let requests = guest.submitted();
        guest.write32(OPERATIONAL, 2);
        assert_eq!(guest.cancelled().1.len(), requests.len());
        assert_eq!(guest.controller.trbs_in_flight, 0);
        requests.iter().for_each(|request| guest.complete(request.id, UrbStatus::Cancelled, 0));
        guest.unplug(device);
        guest.start();
        guest.effects.clear();
    }
    assert!(guest.controller.operations.is_empty());
    assert_eq!(guest.controller.next_deadline(), None);
}

#[test]
fn cycle_state_is_taken_with_the_pointer_while_the_ring_stands() {
    let mut guest = Guest::new();
    assert_eq!(guest.command(command_trb(23, 0, 0, 0)).0, SUCCESS);
    guest.write64(CRCR, 2);
    guest.events();
    // A ring whose TRBs are ours when the cycle bit is 0.
    guest.mem.put(0x5400, &command_trb(23, 0, 0, 0));
    guest.write64(CRCR, 0x5400 | 1);
    guest.write32(DOORBELLS, 0);
    assert!(guest.events().is_empty(), "the cycle bit does not match");
    guest.write64(CRCR, 2);
    guest.events();
    guest.write64(CRCR, 0x5400);
    guest.write32(DOORBELLS, 0);
    let events = guest.events();
    assert_eq!((events[0].code, events[0].pointer), (SUCCESS, 0x5400));
}
