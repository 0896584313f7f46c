//! Many rings and a small event ring that the driver empties when it likes: each TD is told once and in the order of its
//! ring, whatever order the device answers in.

use std::collections::BTreeMap;

use common::ids::Speed;
use proptest::prelude::*;

use super::super::fixture::{CHAIN, DATA, Guest, IOC, command_trb, event_data, normal};
use super::super::trb::Trb;
use crate::urb::{PacketResult, TransferKind, UrbRequest, UrbStatus};

/// Bulk OUT, bulk IN, interrupt IN, isochronous OUT.
const ENDPOINTS: [(u8, u32, u32, u32); 4] = [(4, 2, 512, 0), (3, 6, 512, 0), (5, 7, 64, 0), (6, 1, 192, 0)];
const EVENTS: u64 = 16;

#[derive(Clone, Debug)]
enum Step {
    /// One TD: which endpoint, how many TRBs, whether an Event Data TRB ends it.
    Queue { which: usize, trbs: u32, event_data: bool },
    /// The device ends one of the transfers it has.
    End { which: usize },
    /// The driver takes its events.
    Take,
    /// A command in between.
    Command,
    /// A TRB that is no transfer.
    NoOp { which: usize },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let which = 0..ENDPOINTS.len();
    let step = prop_oneof![
        8 => (which.clone(), 1u32..4, any::<bool>())
            .prop_map(|(which, trbs, event_data)| Step::Queue { which, trbs, event_data }),
        8 => any::<usize>().prop_map(|which| Step::End { which }),
        2 => Just(Step::Take),
        1 => Just(Step::Command),
        1 => which.prop_map(|which| Step::NoOp { which }),
    ];
    prop::collection::vec(step, 1..200)
}

struct Model {
    guest: Guest,
    slot: u8,
    flying: Vec<UrbRequest>,
    /// Pointers that events will have, by endpoint and in order.
    queued: BTreeMap<u8, Vec<u64>>,
    told: BTreeMap<u8, Vec<u64>>,
    trbs: BTreeMap<u8, u32>,
    commands: Vec<u64>,
    answered: Vec<u64>,
    tag: u64,
}

impl Model {
    fn new() -> Self {
        let mut guest = Guest::with_events(EVENTS);
        let (_, slot) = guest.configured(Speed::High, &ENDPOINTS);
        Self {
            guest,
            slot,
            flying: Vec::new(),
            queued: BTreeMap::new(),
            told: BTreeMap::new(),
            trbs: BTreeMap::new(),
            commands: Vec::new(),
            answered: Vec::new(),
            tag: 1 << 40,
        }
    }

    /// Whether the ring has room for a few TRBs more; the model never comes round to what is in use.
    fn has_room(&mut self, dci: u8) -> bool {
        let all_told = self.queued.get(&dci).map_or(0, Vec::len) == self.told.get(&dci).map_or(0, Vec::len);
        let used = self.trbs.entry(dci).or_default();
        if all_told {
            *used = 0;
        }
        *used += 5;
        *used < 55
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Queue { which, trbs, event_data } => self.queue(ENDPOINTS[which].0, trbs, event_data),
            Step::End { which } => self.end(which),
            Step::Take => self.take(),
            Step::Command if self.commands.len() - self.answered.len() < 20 => {
                let at = self.guest.post_command(command_trb(23, 0, 0, 0));
                self.commands.push(at);
            }
            Step::Command => {}
            Step::NoOp { which } => {
                let dci = ENDPOINTS[which].0;
                if self.has_room(dci) {
                    let at = self.guest.push(self.slot, dci, Trb::new(0, 0, 8 << 10 | IOC));
                    self.queued.entry(dci).or_default().push(at);
                    self.guest.ring(self.slot, dci);
                }
            }
        }
        self.flying.extend(self.guest.submitted());
    }

    fn queue(&mut self, dci: u8, trbs: u32, with_event_data: bool) {
        if !self.has_room(dci) {
            return;
        }
        let mut told_at = 0;
        for index in 0..trbs {
            let ends = index + 1 == trbs && !with_event_data;
            let flags = if ends { IOC } else { CHAIN };
            let first_isoch = dci == 6 && index == 0;
            let trb = if first_isoch {
                Trb::new(DATA, 48, 5 << 10 | 1 << 31 | flags)
            } else {
                normal(DATA, 48, flags)
            };
            told_at = self.guest.push(self.slot, dci, trb);
        }
        if with_event_data {
            self.tag += 1;
            told_at = self.tag;
            self.guest.push(self.slot, dci, event_data(self.tag, 0));
        }
        self.queued.entry(dci).or_default().push(told_at);
        self.guest.ring(self.slot, dci);
    }

    fn end(&mut self, which: usize) {
        if self.flying.is_empty() {
            return;
        }
        let request = self.flying.swap_remove(which % self.flying.len());
        let packets = match &request.kind {
            TransferKind::Isochronous { packets } => packets
                .iter()
                .map(|len| PacketResult { status: UrbStatus::Completed, actual: *len })
                .collect(),
            _ => Vec::new(),
        };
        self.guest.end_packets(request.id, UrbStatus::Completed, request.len, packets);
        self.guest.settle();
    }

    fn take(&mut self) {
        for event in self.guest.events() {
            match event.kind {
                32 => {
                    assert_eq!(event.code, 1);
                    self.told.entry(event.dci).or_default().push(event.pointer);
                }
                33 => self.answered.push(event.pointer),
                37 => assert_eq!(event.code, 21),
                kind => panic!("event {kind}"),
            }
        }
    }

    /// The device answers all, the driver takes all.
    fn finish(mut self) {
        for _ in 0..2000 {
            self.end(0);
            self.take();
            self.flying.extend(self.guest.submitted());
        }
        assert!(self.flying.is_empty());
        assert_eq!(self.told, self.queued);
        assert_eq!(self.answered, self.commands);
        assert_eq!(self.guest.controller.trbs_in_flight, 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: super::cases(60), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_td_is_told_once_and_in_order_on_a_small_event_ring(steps in steps()) {
        let mut model = Model::new();
        for step in steps {
            model.step(step);
        }
        model.finish();
    }
}
