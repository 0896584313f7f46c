//! The broker in its made-up world: named situations, all short sequences of moves, and long random ones.

use proptest::prelude::*;

use super::world::{Move, World, vm};
use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// One device for `vm0`, which runs; everything attached.
fn attached() -> World {
    let mut world = World::new(1, 2);
    world.run([Move::Want(0, Some(0)), Move::Plug(0), Move::StartVm(0), Move::StartVm(1)]);
    world.calm_down();
    assert_eq!(world.holder(0), Some(0));
    world
}

#[test]
fn device_before_vm_and_vm_before_device_end_alike() {
    for moves in [
        [Move::Plug(0), Move::Read, Move::StartVm(0), Move::Dial(0)],
        [Move::StartVm(0), Move::Dial(0), Move::Plug(0), Move::Read],
    ] {
        let mut world = World::new(1, 1);
        world.make(Move::Want(0, Some(0)));
        world.run(moves);
        world.calm_down();
        assert_eq!(world.holder(0), Some(0));
    }
}

#[test]
fn device_counts_as_attached_only_after_the_answer() {
    let mut world = World::new(1, 1);
    world.run([Move::Want(0, Some(0)), Move::Plug(0), Move::StartVm(0), Move::Dial(0), Move::Read]);
    world.run([Move::Job(true), Move::InstanceReads(0, true)]);
    assert_eq!(world.broker.state(world.now, world.id(0)), Some(State::Attaching(vm(0))));
    world.make(Move::DaemonReads(0));
    assert_eq!(world.broker.state(world.now, world.id(0)), Some(State::Attached(vm(0), 1)));
}

#[test]
fn device_nobody_wants_stays_untouched() {
    let mut world = World::new(1, 1);
    world.run([Move::Plug(0), Move::StartVm(0), Move::Dial(0), Move::Read]);
    assert_eq!(world.events, []);
    assert_eq!(world.broker.state(world.now, world.id(0)), Some(State::Host));
}

#[test]
fn device_for_another_vm_moves_from_hand_to_hand() {
    let mut world = attached();
    world.run([Move::Want(0, Some(1)), Move::Read]);
    world.calm_down();
    assert_eq!(world.holder(0), Some(1));
    // From hand to hand: the host's drivers never saw it in between.
    assert!(!world.events.iter().any(|event| matches!(event, Event::Released(..))));
}

#[test]
fn restarted_daemon_finds_everything_as_it_was() {
    let mut world = attached();
    world.events.clear();
    world.make(Move::DaemonDies);
    world.calm_down();
    let detached = world.events.iter().any(|event| matches!(event, Event::Detached(..)));
    assert!(!detached && world.holder(0) == Some(0), "{:?}", world.events);
}

#[test]
fn device_returns_to_the_host_when_its_vm_stops() {
    let mut world = attached();
    let id = world.id(0);
    world.make(Move::CrashVm(0));
    world.calm_down();
    assert!(world.events.contains(&Event::Released(id, OnRelease::Host)));
    assert_eq!(world.broker.state(world.now, id), Some(State::VmDown(vm(0))));
}

#[test]
fn release_that_fails_is_told_and_tried_again() {
    let mut world = attached();
    let id = world.id(0);
    world.run([Move::CrashVm(0), Move::Dial(0), Move::Job(false)]);
    assert!(
        world.events.contains(&Event::NotReleased(id, "job failed".into(), SECOND)),
        "{:?}",
        world.events
    );
    let state = world.broker.state(world.now, id);
    assert_eq!(state, Some(State::NotReleased("job failed".into(), SECOND)));
    world.run([Move::Pass(SECOND), Move::Job(true)]);
    assert!(world.events.contains(&Event::Released(id, OnRelease::Host)));
    assert_eq!(world.broker.state(world.now, id), Some(State::VmDown(vm(0))));
}

#[test]
fn cut_connection_frees_nothing() {
    let mut world = attached();
    world.events.clear();
    world.make(Move::CutLink(0));
    assert_eq!(world.broker.holder(world.id(0)), Some(&vm(0)));
    world.make(Move::Dial(0));
    assert!(!world.events.iter().any(|event| matches!(event, Event::Detached(..))));
}

#[test]
fn refusals_back_off_and_are_visible() {
    let mut world = World::new(1, 1);
    world.run([Move::Want(0, Some(0)), Move::Plug(0), Move::StartVm(0), Move::Dial(0), Move::Read]);
    let mut pauses = Vec::new();
    for _ in 0..11 {
        world.run([Move::Job(true), Move::InstanceReads(0, false), Move::DaemonReads(0)]);
        let Some(State::Failed(_, text, pause)) = world.broker.state(world.now, world.id(0)) else {
            panic!("not failed: {world:#?}");
        };
        assert_eq!(text, "no port");
        pauses.push(pause.as_secs());
        world.make(Move::Pass(pause));
    }
    assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
}

#[test]
fn silent_instance_is_asked_back_and_then_stuck() {
    let mut world = World::new(1, 2);
    world.run([Move::Want(0, Some(0)), Move::Plug(0), Move::StartVm(0), Move::Dial(0), Move::Read]);
    world.run([Move::Job(true), Move::Pass(ATTACH_DEADLINE)]);
    assert_eq!(world.broker.state(world.now, world.id(0)), Some(State::Detaching(vm(0))));
    world.make(Move::Pass(DETACH_DEADLINE));
    assert_eq!(world.broker.state(world.now, world.id(0)), Some(State::Stuck(vm(0))));
    // Nobody else gets it now, whoever wants it.
    world.run([Move::StartVm(1), Move::Dial(1), Move::Want(0, Some(1)), Move::Read]);
    assert_eq!(world.broker.state(world.now, world.id(0)), Some(State::Stuck(vm(0))));
    world.calm_down();
    assert_eq!(world.holder(0), Some(1));
}

#[test]
fn device_that_is_let_go_again_and_again_is_not_handed_over_in_a_circle() {
    let mut world = attached();
    let mut sent = 0;
    for _ in 0..100 {
        world.run([Move::LetGo(0), Move::DaemonReads(0), Move::Job(true), Move::Job(true)]);
        world.run([Move::InstanceReads(0, true), Move::DaemonReads(0)]);
        sent += usize::from(world.holder(0).is_some());
        world.make(Move::Pass(Duration::from_millis(100)));
    }
    assert!(sent <= 4, "{sent} hand-overs in 10 s");
}

#[test]
fn device_that_proved_itself_starts_with_a_short_pause_again() {
    let mut world = attached();
    world.run([Move::LetGo(0), Move::DaemonReads(0)]);
    world.calm_down();
    world.run([Move::Pass(STEADY_AFTER), Move::LetGo(0), Move::DaemonReads(0)]);
    let state = world.broker.state(world.now, world.id(0));
    assert!(matches!(state, Some(State::Failed(_, _, SECOND))), "{state:?}");
}

#[test]
fn limit_of_a_vm_leaves_the_later_device_waiting() {
    let entry = |id: u64| Entry {
        id: DeviceId(id),
        address: BusAddress { bus: 1, device: id as u32 },
        ports: PortChain::new(&[id as u8]).unwrap(),
        want: Some(vm(0)),
        on_release: OnRelease::Host,
        quota: None,
        authorized: true,
        recalled: None,
    };
    let mut broker = Broker::default();
    broker.step(SECOND, Input::Up(vm(0), LinkId(1), vec![]));
    let effects =
        broker.step(SECOND, Input::Inventory(vec![entry(1), entry(2)], BTreeMap::from([(vm(0), 1)])));
    assert_eq!(effects, [Effect::Prepare(DeviceId(1))]);
    assert_eq!(broker.state(SECOND, DeviceId(2)), Some(State::VmFull(vm(0))));
}

#[test]
fn limit_of_a_rule_leaves_the_later_device_waiting_until_the_first_is_gone() {
    let entry = |id: u64| Entry {
        id: DeviceId(id),
        address: BusAddress { bus: 1, device: id as u32 },
        ports: PortChain::new(&[id as u8]).unwrap(),
        want: Some(vm((id % 2) as usize)),
        on_release: OnRelease::Host,
        quota: Some(("sticks".into(), 1)),
        authorized: true,
        recalled: None,
    };
    let mut broker = Broker::default();
    broker.step(SECOND, Input::Up(vm(0), LinkId(1), vec![]));
    broker.step(SECOND, Input::Up(vm(1), LinkId(2), vec![]));
    let both = vec![entry(1), entry(2)];
    let effects = broker.step(SECOND, Input::Inventory(both, BTreeMap::new()));
    assert_eq!(effects, [Effect::Prepare(DeviceId(1))]);
    assert_eq!(broker.state(SECOND, DeviceId(2)), Some(State::VmFull(vm(0))));
    broker.step(SECOND, Input::Prepared(DeviceId(1), Ok(())));
    broker.step(SECOND, Input::Attached(LinkId(2), DeviceId(1), 1));
    broker.step(SECOND, Input::Inventory(vec![entry(2)], BTreeMap::new()));
    let effects = broker.step(SECOND, Input::Detached(LinkId(2), DeviceId(1)));
    assert!(effects.contains(&Effect::Prepare(DeviceId(2))), "{effects:?}");
}

#[test]
fn deadline_of_the_policy_is_that_of_a_detach() {
    let mut world = attached();
    world.broker.set_detach_deadline(5 * SECOND);
    world.run([Move::Want(0, None), Move::Read, Move::Pass(4 * SECOND)]);
    assert_eq!(world.broker.state(world.now, world.id(0)), Some(State::Detaching(vm(0))));
    world.make(Move::Pass(SECOND));
    assert_eq!(world.broker.state(world.now, world.id(0)), Some(State::Stuck(vm(0))));
}

#[test]
fn device_that_gets_authorized_is_tried_at_once() {
    let entry = |authorized| Entry {
        id: DeviceId(1),
        address: BusAddress { bus: 1, device: 4 },
        ports: PortChain::new(&[1]).unwrap(),
        want: Some(vm(0)),
        on_release: OnRelease::Host,
        quota: None,
        authorized,
        recalled: None,
    };
    let inventory = |authorized| Input::Inventory(vec![entry(authorized)], BTreeMap::new());
    let mut broker = Broker::default();
    broker.step(SECOND, Input::Up(vm(0), LinkId(1), vec![]));
    broker.step(SECOND, inventory(false));
    let failure = Failure { text: "it waits for authorization".to_owned(), stale: false };
    broker.step(SECOND, Input::Prepared(DeviceId(1), Err(failure)));
    assert_eq!(broker.step(SECOND, inventory(false)), []);
    assert_eq!(broker.step(SECOND, inventory(true)), [Effect::Prepare(DeviceId(1))]);
}

#[test]
fn unknown_device_in_a_list_is_adopted_by_its_place_and_detached_without_one() {
    let hold = |device: u32| Hold {
        id: DeviceId(u64::from(device) + 7000),
        address: BusAddress { bus: 1, device },
        ports: PortChain::new(&[1]).unwrap(),
        guest_port: 3,
    };
    let mut broker = Broker::default();
    let entry = Entry {
        id: DeviceId(1),
        address: BusAddress { bus: 1, device: 4 },
        ports: PortChain::new(&[1]).unwrap(),
        want: Some(vm(0)),
        on_release: OnRelease::Host,
        quota: None,
        authorized: true,
        recalled: None,
    };
    broker.step(SECOND, Input::Inventory(vec![entry], BTreeMap::new()));
    let effects = broker.step(SECOND, Input::Up(vm(0), LinkId(1), vec![hold(4), hold(5)]));
    assert!(effects.contains(&Effect::Rename(DeviceId(1), DeviceId(7004))));
    assert!(effects.contains(&Effect::Detach(LinkId(1), DeviceId(7005))));
    assert_eq!(broker.state(SECOND, DeviceId(7004)), Some(State::Attached(vm(0), 3)));
}

#[test]
fn nothing_is_handed_over_before_the_instances_told_what_they_hold() {
    let mut world = World::new(1, 2);
    world.run([Move::Want(0, Some(0)), Move::Plug(0), Move::StartVm(0), Move::StartVm(1)]);
    world.run([Move::DaemonDies, Move::Dial(0), Move::Read]);
    assert_eq!(world.broker.state(world.now, world.id(0)), Some(State::Starting));
    world.make(Move::Dial(1));
    assert_eq!(world.broker.state(world.now, world.id(0)), Some(State::Attaching(vm(0))));
}

#[test]
fn hung_instance_holds_up_the_others_for_the_barrier_only() {
    let mut world = World::new(1, 2);
    world.run([Move::Want(0, Some(0)), Move::Plug(0), Move::StartVm(0), Move::StartVm(1)]);
    world.run([Move::DaemonDies, Move::Dial(0), Move::Read, Move::Pass(START_BARRIER)]);
    assert_eq!(world.broker.state(world.now, world.id(0)), Some(State::Attaching(vm(0))));
}

#[test]
fn instance_that_claims_a_neighbours_device_does_not_get_it() {
    let mut world = attached();
    let id = world.id(0);
    let hold = Hold {
        id,
        address: BusAddress { bus: 1, device: 0 },
        ports: PortChain::new(&[1]).unwrap(),
        guest_port: 9,
    };
    let effects = world.broker.step(world.now, Input::Up(vm(1), LinkId(77), vec![hold]));
    assert_eq!(effects, [Effect::Report(Event::Foreign(id, vm(1))), Effect::Detach(LinkId(77), id)]);
    assert_eq!(world.broker.holder(id), Some(&vm(0)));
    let effects = world.broker.step(world.now, Input::Gone(LinkId(77), id, "mine".into()));
    assert_eq!((effects, world.broker.holder(id)), (vec![], Some(&vm(0))));
}

#[test]
fn drained_vm_loses_its_devices_and_gets_them_back() {
    let mut world = attached();
    world.make(Move::Serve(0, Service::Drained));
    world.calm_down();
    assert_eq!(world.holder(0), None);
    world.make(Move::Serve(0, Service::Running));
    world.calm_down();
    assert_eq!(world.holder(0), Some(0));
}

fn any_move() -> impl Strategy<Value = Move> {
    let socket = 0..2_usize;
    let at = 0..2_usize;
    let want = (socket.clone(), proptest::option::of(at.clone()));
    let service = prop_oneof![Just(Service::Running), Just(Service::Paused), Just(Service::Drained)];
    prop_oneof![
        4 => socket.clone().prop_map(Move::Plug),
        2 => socket.prop_map(Move::Pull),
        6 => Just(Move::Read),
        3 => want.prop_map(|(socket, vm)| Move::Want(socket, vm)),
        3 => at.clone().prop_map(Move::StartVm),
        1 => at.clone().prop_map(Move::CrashVm),
        4 => at.clone().prop_map(Move::Dial),
        1 => at.clone().prop_map(Move::CutLink),
        6 => (at.clone(), proptest::bool::weighted(0.8)).prop_map(|(vm, take)| Move::InstanceReads(vm, take)),
        6 => at.clone().prop_map(Move::DaemonReads),
        1 => at.clone().prop_map(Move::LetGo),
        6 => proptest::bool::weighted(0.8).prop_map(Move::Job),
        1 => (at, service).prop_map(|(vm, service)| Move::Serve(vm, service)),
        3 => (0..7000_u64).prop_map(|ms| Move::Pass(Duration::from_millis(ms))),
        1 => Just(Move::DaemonDies),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn any_sequence_keeps_one_holder_and_settles(moves in proptest::collection::vec(any_move(), 0..80)) {
        let mut world = World::new(2, 2);
        world.run(moves);
        world.calm_down();
        world.assert_settled();
    }
}
