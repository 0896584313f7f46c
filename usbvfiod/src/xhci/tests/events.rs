//! Events as a driver sees them: full rings, moderation, several interrupters (hostile inputs R4, R5, F7, S5).

use std::time::Duration;

use super::super::fixture::{CHAIN, DATA, Guest, IOC, command_trb, event_data, normal};
use super::super::regs::{INTERRUPTERS, OPERATIONAL};
use super::super::trb::Trb;
use crate::urb::{Effect, UrbStatus};

const SUCCESS: u8 = 1;
const RING_FULL: u8 = 21;

const IMAN: u64 = INTERRUPTERS;
const IMOD: u64 = INTERRUPTERS + 4;
const ERDP: u64 = INTERRUPTERS + 0x18;

#[test]
fn full_ring_holds_transfers_and_commands_back_and_loses_nothing() {
    let mut guest = Guest::with_events(16);
    let (_, slot) = guest.bulk();
    let mut expected = Vec::new();
    let mut told = Vec::new();
    for _ in 0..40 {
        expected.push(guest.normal(slot, 4, DATA, 8));
        for request in guest.submitted() {
            guest.complete(request.id, UrbStatus::Completed, 8);
        }
    }
    let command = guest.post_command(command_trb(23, 0, 0, 0));
    let mut full = 0;
    let mut answered = false;
    for _ in 0..20 {
        for event in guest.events() {
            match event.kind {
                32 => told.push(event.pointer),
                33 => answered |= event.pointer == command,
                37 => full += usize::from(event.code == RING_FULL),
                kind => panic!("event {kind}"),
            }
        }
        for request in guest.submitted() {
            guest.complete(request.id, UrbStatus::Completed, 8);
        }
    }
    assert_eq!(told, expected, "every TD once and in order");
    assert!(answered);
    assert!((1..=20).contains(&full), "told once each time: {full}");
}

#[test]
fn td_with_more_events_than_the_ring_is_told_in_pieces() {
    let mut guest = Guest::with_events(16);
    let (_, slot) = guest.bulk();
    let at: Vec<u64> = (0..50)
        .map(|index| guest.push(slot, 4, normal(DATA, 8, if index < 49 { CHAIN | IOC } else { IOC })))
        .collect();
    guest.ring(slot, 4);
    let request = guest.request();
    guest.complete(request.id, UrbStatus::Completed, 400);
    let told: Vec<u64> = (0..20).flat_map(|_| guest.transfers()).map(|event| event.0).collect();
    assert_eq!(told, at);
}

#[test]
fn port_changes_while_the_ring_is_full_come_later() {
    let mut guest = Guest::with_events(16);
    let (_, slot) = guest.bulk();
    (0..20).for_each(|_| {
        guest.normal(slot, 4, DATA, 8);
        for request in guest.submitted() {
            guest.complete(request.id, UrbStatus::Completed, 8);
        }
    });
    let (_, port) = guest.plug(common::ids::Speed::Low);
    let ports: Vec<u64> = (0..5)
        .flat_map(|_| guest.events())
        .filter(|event| event.kind == 34)
        .map(|event| event.pointer >> 24)
        .collect();
    assert_eq!(ports, [u64::from(port.get())]);
}

#[test]
fn batch_of_outcomes_costs_one_interrupt() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.events();
    guest.interrupts();
    for _ in 0..8 {
        guest.normal(slot, 4, DATA, 8);
    }
    for request in guest.submitted() {
        guest.end(request.id, UrbStatus::Completed, 8);
    }
    guest.settle();
    assert_eq!(guest.interrupts(), 1);
    assert_eq!(guest.transfers().len(), 8);
}

#[test]
fn no_interrupt_while_the_guest_is_busy_and_none_is_lost() {
    let mut guest = Guest::new();
    guest.events();
    guest.interrupts();
    guest.write32(IMOD, 0);
    let one = guest.post_command(command_trb(23, 0, 0, 0));
    assert_eq!(guest.interrupts(), 1);
    guest.post_command(command_trb(23, 0, 0, 0));
    guest.post_command(command_trb(23, 0, 0, 0));
    assert_eq!(guest.interrupts(), 0, "EHB is set");
    guest.write64(ERDP, (0x4000 + 16) | 8);
    assert_eq!(guest.interrupts(), 1, "more has come since");
    assert_eq!(guest.events().first().map(|event| event.pointer), Some(one));
}

#[test]
fn moderation_counts_interrupts_but_loses_none() {
    for ticks in [0u32, 1, 160, 65535] {
        let mut guest = Guest::new();
        guest.write32(IMOD, ticks);
        guest.events();
        guest.interrupts();
        let (mut commands, mut answers, mut interrupts) = (0, 0, 0);
        for _ in 0..200 {
            guest.post_command(command_trb(23, 0, 0, 0));
            commands += 1;
            guest.wait(Duration::from_micros(10));
            if guest.interrupts() > 0 {
                interrupts += 1;
                answers += guest.events().len();
            }
        }
        guest.wait(Duration::from_millis(50));
        if guest.interrupts() > 0 {
            interrupts += 1;
            answers += guest.events().len();
        }
        assert_eq!(answers, commands, "IMODI {ticks}");
        let fastest = 2000 * 1000 / (u64::from(ticks).max(1) * 250) + 2;
        assert!(interrupts <= fastest.min(200), "IMODI {ticks}: {interrupts}");
        assert_eq!(guest.controller.next_deadline(), None);
    }
}

#[test]
fn interrupt_waits_for_its_enable_bits() {
    let mut guest = Guest::new();
    guest.events();
    guest.interrupts();
    guest.write32(IMAN, 0);
    guest.post_command(command_trb(23, 0, 0, 0));
    assert_eq!((guest.interrupts(), guest.read32(IMAN)), (0, 1));
    assert_eq!(guest.read32(OPERATIONAL + 4) >> 3 & 1, 1, "EINT");
    guest.write32(OPERATIONAL, 1);
    guest.write32(IMAN, 2);
    assert_eq!(guest.interrupts(), 0, "INTE");
    guest.write32(OPERATIONAL, 5);
    assert_eq!(guest.interrupts(), 1);
    guest.write32(OPERATIONAL + 4, 8);
    assert_eq!(guest.read32(OPERATIONAL + 4) >> 3 & 1, 0);
}

#[test]
fn events_go_to_the_interrupter_their_trb_names() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    let second = INTERRUPTERS + 3 * 32;
    guest.mem.put(0x3100, &Trb::new(0x5000, 64, 0));
    guest.write32(second + 8, 1);
    guest.write64(second + 0x18, 0x5000);
    guest.write64(second + 0x10, 0x3100);
    guest.write32(second, 2);
    guest.events();
    guest.effects.clear();
    let at = guest.push(slot, 4, Trb::new(DATA, 8 | 3 << 22, 1 << 10 | IOC));
    guest.ring(slot, 4);
    let request = guest.request();
    guest.complete(request.id, UrbStatus::Completed, 8);
    assert_eq!(guest.effects, [Effect::Interrupt { vector: 3 }]);
    let event: Trb = guest.mem.get(0x5000);
    assert_eq!((event.parameter(), event.control().cycle()), (at, true));
    assert!(guest.transfers().is_empty(), "not on the first ring");
}

#[test]
fn event_ring_outside_memory_is_a_host_system_error_until_reset() {
    for table in [1u64 << 40, !0x3f] {
        let mut guest = Guest::new();
        guest.write64(INTERRUPTERS + 0x10, table);
        guest.post_command(command_trb(23, 0, 0, 0));
        assert_eq!(guest.read32(OPERATIONAL + 4) & 5, 5, "{table:#x}");
        guest.write32(OPERATIONAL, 2);
        guest.start();
        assert_eq!(guest.command(command_trb(23, 0, 0, 0)).0, SUCCESS);
    }
}

#[test]
fn ring_table_of_no_segments_swallows_events() {
    let mut guest = Guest::new();
    guest.write32(INTERRUPTERS + 8, 0);
    guest.post_command(command_trb(23, 0, 0, 0));
    assert!(guest.events().is_empty());
    assert_eq!(guest.read32(OPERATIONAL + 4) & 5, 0);
}

#[test]
fn event_data_reports_the_bytes_since_the_last_one() {
    let mut guest = Guest::new();
    let (_, slot) = guest.bulk();
    guest.push(slot, 4, normal(DATA, 100, CHAIN));
    guest.push(slot, 4, normal(DATA, 50, CHAIN));
    guest.push(slot, 4, event_data(0xa, CHAIN));
    guest.push(slot, 4, normal(DATA, 7, CHAIN));
    guest.push(slot, 4, event_data(0xb, 0));
    guest.ring(slot, 4);
    let request = guest.request();
    guest.complete(request.id, UrbStatus::Completed, 157);
    let events = guest.events();
    assert!(events.iter().all(|event| event.event_data));
    let lengths: Vec<_> = events.iter().map(|event| (event.pointer, event.length)).collect();
    assert_eq!(lengths, [(0xa, 150), (0xb, 7)]);
}

#[test]
fn event_ring_moved_while_running_goes_on_at_the_new_place() {
    let mut guest = Guest::new();
    guest.command(command_trb(23, 0, 0, 0));
    guest.mem.put(0x3200, &Trb::new(0x5400, 64, 0));
    guest.write64(ERDP, 0x5400);
    guest.write64(INTERRUPTERS + 0x10, 0x3200);
    let at = guest.post_command(command_trb(23, 0, 0, 0));
    let event: Trb = guest.mem.get(0x5400);
    assert_eq!((event.parameter(), event.control().trb_type(), event.control().cycle()), (at, 33, true));
    assert!(guest.events().is_empty(), "nothing at the old place");
}

/// What a table of two segments in the same place does to the guest is its own business.
#[test]
fn overlapping_segments_do_no_harm_and_reset_recovers() {
    let mut guest = Guest::new();
    guest.mem.put(0x3200, &[Trb::new(0x5400, 16, 0), Trb::new(0x5440, 16, 0)]);
    guest.write32(INTERRUPTERS + 8, 2);
    guest.write64(ERDP, 0x5400);
    guest.write64(INTERRUPTERS + 0x10, 0x3200);
    for round in 0..200u64 {
        guest.post_command(command_trb(23, 0, 0, 0));
        guest.write64(ERDP, (0x5400 + round % 32 * 16) | 8);
    }
    guest.write32(OPERATIONAL, 2);
    guest.start();
    assert_eq!(guest.command(command_trb(23, 0, 0, 0)).0, SUCCESS);
}

#[test]
fn dequeue_pointer_going_backwards_does_no_harm_and_reset_recovers() {
    let mut guest = Guest::with_events(16);
    for round in 0..200u64 {
        guest.post_command(command_trb(23, 0, 0, 0));
        guest.write64(ERDP, (0x4000 + (200 - round) % 16 * 16) | 8);
    }
    assert_eq!(guest.read32(OPERATIONAL + 4) & 5, 0, "no error, and not halted");
    guest.write32(OPERATIONAL, 2);
    guest.start();
    assert_eq!(guest.command(command_trb(23, 0, 0, 0)).0, SUCCESS);
}
