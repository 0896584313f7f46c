//! The broker explored: every interleaving of so many moves, and every state that a daemon may find when it starts.
//!
//! Plug, pull, events lost and read later (a pull and a plug before one reading), a changed policy, ack and nack of
//! instances, deadlines, a crash of an instance, of a connection, of the daemon, jobs that fail, and VMs that stop being
//! served. States that were seen before are not followed again.

use std::collections::HashSet;

use proptest::prelude::*;

use super::world::{Found, Move, World};
use super::*;

/// How many moves deep from each start.
const DEPTH: usize = 5;

const MOVES: [Move; 22] = [
    Move::Plug(0),
    Move::Pull(0),
    Move::Read,
    Move::Want(0, Some(0)),
    Move::Want(0, Some(1)),
    Move::Want(0, None),
    Move::StartVm(0),
    Move::CrashVm(0),
    Move::Dial(0),
    Move::Dial(1),
    Move::CutLink(0),
    Move::InstanceReads(0, true),
    Move::InstanceReads(0, false),
    Move::InstanceReads(1, true),
    Move::DaemonReads(0),
    Move::DaemonReads(1),
    Move::LetGo(0),
    Move::Job(true),
    Move::Job(false),
    Move::Serve(0, Service::Drained),
    Move::Pass(ATTACH_DEADLINE),
    Move::DaemonDies,
];

/// Where exploring starts: nothing, all well, an offer under way, a move under way, and an instance that falls silent.
fn starts() -> Vec<World> {
    let mut all_well = World::new(1, 2);
    all_well.run([Move::Want(0, Some(0)), Move::Plug(0), Move::StartVm(0), Move::StartVm(1)]);
    all_well.calm_down();
    let mut offered = World::new(1, 2);
    offered.run([Move::Want(0, Some(0)), Move::Plug(0), Move::StartVm(0), Move::StartVm(1)]);
    offered.run([Move::Dial(0), Move::Dial(1), Move::Read, Move::Job(true)]);
    let mut leaving = all_well.clone();
    leaving.run([Move::Want(0, Some(1)), Move::Read]);
    let mut stuck = leaving.clone();
    stuck.make(Move::Pass(DETACH_DEADLINE));
    vec![World::new(1, 2), all_well, offered, leaving, stuck]
}

#[test]
fn every_interleaving_of_so_many_moves_keeps_one_holder_and_settles() {
    let mut seen = HashSet::new();
    let mut edge = starts();
    for depth in 0..=DEPTH {
        let mut next = Vec::new();
        for world in edge {
            let mut end = world.clone();
            end.calm_down();
            end.assert_settled();
            for one in MOVES.iter().filter(|_| depth < DEPTH) {
                let mut after = world.clone();
                after.make(*one);
                after.events.clear();
                if seen.insert(after.fingerprint()) {
                    next.push(after);
                }
            }
        }
        edge = next;
    }
    println!("{} states", seen.len());
    assert!(seen.len() > 20_000, "only {} states: do the moves still do something?", seen.len());
}

fn found() -> impl Strategy<Value = Found> {
    let vm = || proptest::option::of(0..2_usize);
    (any::<bool>(), vm(), vm(), vm()).prop_map(|(plugged, want, holder, recorded)| Found {
        plugged,
        want,
        holder,
        recorded,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever the instances hold, whatever the record says or lacks, whatever is wanted: it ends as wanted, and once
    /// there nothing more is done. Then the policy changes to anything else, and the same again.
    #[test]
    fn from_any_actual_to_any_desired_state(
        sockets in proptest::collection::vec(found(), 3),
        alive in proptest::collection::vec(any::<bool>(), 2),
        wants in proptest::collection::vec(proptest::option::of(0..2_usize), 3),
    ) {
        let mut world = World::found(&sockets, &alive);
        world.make(Move::DaemonDies);
        world.calm_down();
        world.assert_settled();
        for (socket, want) in wants.into_iter().enumerate() {
            world.make(Move::Want(socket, want));
        }
        world.calm_down();
        world.assert_settled();
    }
}
