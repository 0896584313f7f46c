//! A bulk IN ring against a small reference model: whatever order a driver queues, stops, recovers and restarts in, each
//! TD has one outcome, in order, with the right residue, and the dequeue pointer is where the model has it.

use proptest::prelude::*;

use super::super::fixture::{CHAIN, DATA, Guest, IOC, ISP, command_trb, normal};
use crate::urb::{TransferId, UrbRequest, UrbStatus};

const DCI: u8 = 3;

#[derive(Clone, Debug)]
enum Step {
    Queue(Vec<u16>),
    Ring,
    End { permille: u32, status: UrbStatus },
    Stop { permille: u32 },
    SkipStopped,
    Recover { soft: bool },
    GiveBack,
    Pause,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let status = prop_oneof![
        8 => Just(UrbStatus::Completed),
        1 => Just(UrbStatus::Stalled),
        1 => Just(UrbStatus::Babble),
        1 => Just(UrbStatus::TransactionError),
        1 => Just(UrbStatus::Cancelled),
    ];
    let step = prop_oneof![
        6 => prop::collection::vec(0u16..2000, 1..4).prop_map(Step::Queue),
        4 => Just(Step::Ring),
        8 => (0u32..=1000, status).prop_map(|(permille, status)| Step::End { permille, status }),
        2 => (0u32..=1000).prop_map(|permille| Step::Stop { permille }),
        1 => Just(Step::SkipStopped),
        3 => any::<bool>().prop_map(|soft| Step::Recover { soft }),
        3 => Just(Step::GiveBack),
        1 => Just(Step::Pause),
    ];
    prop::collection::vec(step, 1..80)
}

/// A TD as the driver queued it.
struct Td {
    trbs: Vec<(u64, u32)>,
    /// Dequeue pointer field of its first TRB.
    field: u64,
    moved: u32,
    /// Nothing is left to move, only to report.
    ended: bool,
    done: bool,
}

impl Td {
    fn len(&self) -> u32 {
        self.trbs.iter().map(|trb| trb.1).sum()
    }

    fn is_full(&self) -> bool {
        self.moved > 0 && self.moved == self.len()
    }

    /// A transfer came back cancelled that had moved this much.
    fn move_on(&mut self, actual: u32) {
        self.moved += actual;
        self.ended = !actual.is_multiple_of(512) || self.is_full();
    }

    /// The TRB in which byte `moved` lies, and its residue; the last when all were moved.
    fn position(&self, moved: u32) -> (u64, u32) {
        let mut before = 0;
        for (at, len) in &self.trbs {
            if before + len > moved {
                return (*at, len - (moved - before));
            }
            before += len;
        }
        (self.trbs[self.trbs.len() - 1].0, 0)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Running,
    Halted,
    Stopped,
}

struct Model {
    guest: Guest,
    slot: u8,
    tds: Vec<Td>,
    /// First TD without outcome.
    head: usize,
    /// Of those started: the request and its TD.
    flying: Vec<(UrbRequest, usize)>,
    /// Given up by the controller, not given back yet.
    lingering: Vec<TransferId>,
    state: State,
    /// Device failures are retried where they were.
    soft: bool,
    /// TRBs have been queued since the last doorbell.
    unrung: bool,
}

impl Model {
    fn new() -> Self {
        let mut guest = Guest::new();
        let (_, slot) = guest.bulk();
        Self {
            guest,
            slot,
            tds: Vec::new(),
            head: 0,
            flying: Vec::new(),
            lingering: Vec::new(),
            state: State::Running,
            soft: false,
            unrung: false,
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Queue(lens) => self.queue(&lens),
            Step::Ring => self.ring(),
            Step::End { permille, status } => self.end(permille, status),
            Step::Stop { permille } => self.stop(permille),
            Step::SkipStopped => self.skip_stopped(),
            Step::Recover { soft } => self.recover(soft),
            Step::GiveBack => self.give_back(),
            Step::Pause => self.pause(),
        }
        self.collect();
    }

    fn queue(&mut self, lens: &[u16]) {
        let waiting: usize = self.tds[self.head..].iter().map(|td| td.trbs.len()).sum();
        if waiting > 50 {
            return;
        }
        let field = self.guest.enqueue_field(self.slot, DCI);
        let mut trbs = Vec::new();
        for (index, len) in lens.iter().enumerate() {
            let last = index + 1 == lens.len();
            let flags = if last { IOC | ISP } else { CHAIN | ISP };
            let at = self.guest.push(self.slot, DCI, normal(DATA, u32::from(*len), flags));
            trbs.push((at, u32::from(*len)));
        }
        self.tds.push(Td { trbs, field, moved: 0, ended: false, done: false });
        self.unrung = true;
    }

    fn ring(&mut self) {
        if self.state == State::Halted {
            return;
        }
        self.guest.ring(self.slot, DCI);
        self.state = State::Running;
        self.unrung = false;
        self.report_ended();
    }

    /// A TD that had nothing left when it was stopped is only reported.
    fn report_ended(&mut self) {
        let runs = self.state == State::Running && self.lingering.is_empty();
        if runs && self.flying.is_empty() && self.tds.get(self.head).is_some_and(|td| td.ended) {
            let expected = self.expected(self.tds[self.head].moved);
            assert_eq!(self.guest.transfers(), expected);
        }
    }

    /// Takes over what the controller started, and checks it.
    fn collect(&mut self) {
        let (_, abandoned) = self.guest.cancelled();
        self.lingering.extend(abandoned);
        for request in self.guest.submitted() {
            let index = self.flying.last().map_or(self.head, |flying| flying.1 + 1);
            let td = &self.tds[index];
            assert_eq!(self.state, State::Running);
            assert!(self.lingering.is_empty(), "started while old transfers are out");
            assert_eq!(request.len, td.len() - td.moved);
            assert_eq!(request.follows, !self.flying.is_empty());
            self.flying.push((request, index));
        }
        assert!(self.flying.len() <= 8);
        assert_ne!(
            self.guest.controller.next_deadline(),
            Some(std::time::Duration::ZERO),
            "nothing to do at once"
        );
        if self.state == State::Running && !self.unrung && self.lingering.is_empty() {
            let waiting = self.tds.len() - self.head;
            assert_eq!(self.flying.len(), waiting.min(8), "all that was rung for is started");
        }
    }

    /// The TD at the head ends well with this many bytes in all; the events it has.
    fn expected(&mut self, moved: u32) -> Vec<(u64, u8, u32)> {
        let td = &mut self.tds[self.head];
        td.done = true;
        let (at, residue) = td.position(moved);
        self.head += 1;
        let code = if residue > 0 { 13 } else { 1 };
        vec![(at, code, residue)]
    }

    fn end(&mut self, permille: u32, status: UrbStatus) {
        if self.flying.is_empty() {
            return;
        }
        let (request, index) = self.flying.remove(0);
        assert_eq!(index, self.head);
        let actual = (u64::from(request.len) * u64::from(permille) / 1000) as u32;
        if status == UrbStatus::Cancelled {
            self.cancelled_by_somebody(request, actual);
            return;
        }
        let moved = self.tds[self.head].moved + actual;
        self.guest.complete(request.id, status, actual);
        let code = match status {
            UrbStatus::Completed => {
                let expected = self.expected(moved);
                assert_eq!(self.guest.transfers(), expected);
                return;
            }
            UrbStatus::Stalled => 6,
            UrbStatus::Babble => 3,
            _ => 4,
        };
        let td = &mut self.tds[self.head];
        let (at, residue) = td.position(moved);
        assert_eq!(self.guest.transfers(), [(at, code, residue)]);
        assert_eq!(self.guest.endpoint(self.slot, DCI), (2, td.field));
        self.soft = code == 4;
        td.moved = if self.soft { moved } else { 0 };
        td.ended = self.soft && td.is_full();
        self.state = State::Halted;
        self.flying.clear();
    }

    /// A cancel nobody asked for: everything comes back and goes on.
    fn cancelled_by_somebody(&mut self, request: UrbRequest, actual: u32) {
        self.guest.complete(request.id, UrbStatus::Cancelled, actual);
        for (other, _) in std::mem::take(&mut self.flying).into_iter().rev() {
            self.guest.complete(other.id, UrbStatus::NotRun, 0);
        }
        self.tds[self.head].move_on(actual);
        self.report_ended();
    }

    fn stop(&mut self, permille: u32) {
        let at = self.guest.post_command(command_trb(15, self.slot, DCI, 0));
        if self.state != State::Running {
            assert_eq!(self.guest.answer(at).map(|answer| answer.0), Some(19));
            return;
        }
        self.state = State::Stopped;
        let flying = std::mem::take(&mut self.flying);
        let (cancelled, _) = self.guest.cancelled();
        assert_eq!(cancelled, flying.iter().map(|flying| flying.0.id).collect::<Vec<_>>());
        let mut is_short = false;
        for (request, index) in flying.iter().rev() {
            let mut actual = 0;
            if *index == self.head {
                actual = (u64::from(request.len) * u64::from(permille) / 1000) as u32;
                self.tds[self.head].move_on(actual);
                is_short = !actual.is_multiple_of(512) && !self.tds[self.head].is_full();
            }
            self.guest.complete(request.id, UrbStatus::Cancelled, actual);
        }
        let events = self.guest.events();
        let answer = events.last().map(|event| (event.kind, event.code, event.pointer));
        assert_eq!(answer, Some((33, 1, at)));
        let (state, dequeue) = self.guest.endpoint(self.slot, DCI);
        assert_eq!(state, 3);
        if flying.is_empty() {
            assert_eq!(events.len(), 1);
            return;
        }
        let td = &self.tds[self.head];
        let (stopped_at, residue) = td.position(td.moved);
        let (code, length) = if is_short { (28, td.moved) } else { (26, residue) };
        let event = events[0];
        assert_eq!((event.kind, event.code, event.pointer, event.length), (32, code, stopped_at, length));
        assert_eq!(dequeue & !0xf, if td.moved > 0 { stopped_at } else { td.trbs[0].0 });
    }

    /// The driver takes the TD that was stopped off the ring.
    fn skip_stopped(&mut self) {
        if self.state != State::Stopped || self.head == self.tds.len() {
            return;
        }
        self.head += 1;
        self.dequeue_to_head();
    }

    fn dequeue_to_head(&mut self) {
        let end = self.guest.enqueue_field(self.slot, DCI);
        let field = self.tds.get(self.head).map_or(end, |td| td.field);
        assert_eq!(self.guest.slot_command(16, self.slot, DCI, field), 1);
        assert_eq!(self.guest.endpoint(self.slot, DCI), (3, field));
    }

    fn recover(&mut self, soft: bool) {
        if self.state != State::Halted {
            return;
        }
        let soft = soft && self.soft;
        let preserve = u32::from(soft) << 9;
        let reset = command_trb(14, self.slot, DCI, 0).control().into_bits() | preserve;
        let reset = super::super::trb::Trb::new(0, 0, reset);
        assert_eq!(self.guest.command(reset).0, 1);
        self.state = State::Stopped;
        if !soft {
            self.head += 1;
            self.dequeue_to_head();
        }
        self.ring();
    }

    /// The device gives back what the controller gave up.
    fn give_back(&mut self) {
        for id in std::mem::take(&mut self.lingering) {
            self.guest.complete(id, UrbStatus::NotRun, 0);
        }
        self.report_ended();
    }

    /// R/S = 0 and 1 again.
    fn pause(&mut self) {
        self.guest.write32(super::super::regs::OPERATIONAL, 4);
        let (cancelled, _) = self.guest.cancelled();
        assert_eq!(cancelled.len(), self.flying.len());
        for (request, _) in std::mem::take(&mut self.flying).into_iter().rev() {
            self.guest.complete(request.id, UrbStatus::Cancelled, 0);
        }
        assert!(self.guest.events().is_empty(), "a halted controller is silent");
        self.guest.write32(super::super::regs::OPERATIONAL, 5);
        self.guest.events();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: super::cases(100), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_td_of_a_bulk_ring_has_one_outcome_in_order(steps in steps()) {
        let mut model = Model::new();
        for step in steps {
            model.step(step);
        }
    }
}
