//! Real sockets in a temporary directory; the test plays `usbvfiod`.

use std::fs;

use common::channel::Listener;
use common::wire::RefusedCode;

use super::*;

const NOW: Duration = Duration::from_secs(100);

struct Host {
    dir: tempfile::TempDir,
    instances: Instances,
}

/// One fake `usbvfiod` that is connected.
struct Peer {
    listener: Listener,
    channel: Option<Channel>,
}

fn vm() -> VmName {
    "work".parse().unwrap()
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let instances = Instances::new(dir.path());
        Self { dir, instances }
    }

    fn listen(&self) -> Peer {
        let directory = self.dir.path().join("work");
        fs::create_dir_all(&directory).unwrap();
        Peer { listener: Listener::bind(&directory.join(rundir::SOCKET), 0o660).unwrap(), channel: None }
    }

    fn link(&self) -> LinkId {
        self.instances.sockets().next().unwrap().0
    }

    fn receive(&mut self) -> Vec<Input> {
        let link = self.link();
        self.instances.receive(NOW, link)
    }

    /// Dials `peer` and lets it answer with these pages of devices.
    fn bring_up(&mut self, peer: &mut Peer, pages: &[&[u64]]) -> Vec<Input> {
        let mut inputs = self.instances.look(NOW);
        peer.accept();
        peer.send(&hello(PROTOCOL_VERSION));
        inputs.extend(self.receive());
        for (index, page) in pages.iter().enumerate() {
            let devices = page.iter().map(|id| device(*id)).collect();
            peer.send(&FromInstance::Devices { devices, more: index + 1 < pages.len() });
            inputs.extend(self.receive());
        }
        inputs
    }
}

impl Peer {
    fn accept(&mut self) {
        self.channel = Some(self.listener.accept().unwrap().unwrap());
    }

    fn send(&self, message: &FromInstance) {
        self.channel.as_ref().unwrap().send(message, None).unwrap();
    }

    fn read(&mut self) -> ToInstance {
        self.channel.as_mut().unwrap().receive::<ToInstance>().unwrap().unwrap().0
    }
}

fn hello(version: u32) -> FromInstance {
    FromInstance::Hello { version, usb2_ports: 15, usb3_ports: 15, vmm_connected: false }
}

fn device(id: u64) -> AttachedDevice {
    AttachedDevice {
        id: DeviceId(id),
        port: 1,
        address: common::ids::BusAddress { bus: 1, device: 2 },
        path: "1".parse().unwrap(),
    }
}

#[test]
fn instance_is_up_when_hello_and_list_are_answered() {
    let mut host = Host::new();
    let mut peer = host.listen();
    let inputs = host.bring_up(&mut peer, &[&[5], &[9]]);
    let [Input::Up(name, _, holds)] = &inputs[..] else { panic!("{inputs:?}") };
    assert_eq!((name, holds.len()), (&vm(), 2));
    assert_eq!(peer.read(), ToInstance::Hello { version: PROTOCOL_VERSION });
    assert_eq!(peer.read(), ToInstance::List { after: None });
    assert_eq!(peer.read(), ToInstance::List { after: Some(DeviceId(5)) });
}

#[test]
fn connecting_alone_is_not_up() {
    let mut host = Host::new();
    let _peer = host.listen();
    assert_eq!(host.instances.look(NOW), []);
    assert_eq!(host.instances.deadline(), Some(NOW + GREETING_DEADLINE));
}

#[test]
fn silent_instance_is_given_up_and_tried_again() {
    let mut host = Host::new();
    let _peer = host.listen();
    host.instances.look(NOW);
    host.instances.tick(NOW + GREETING_DEADLINE);
    assert_eq!(host.instances.sockets().count(), 0);
    host.instances.tick(NOW + GREETING_DEADLINE + RETRY_MAX);
    assert_eq!(host.instances.sockets().count(), 1);
}

#[test]
fn other_version_is_refused_with_both_numbers() {
    let mut host = Host::new();
    let mut peer = host.listen();
    host.instances.look(NOW);
    peer.accept();
    peer.send(&hello(7));
    assert_eq!(host.receive(), []);
    let complaint = host.instances.complaint(&vm()).unwrap();
    assert!(complaint.contains("version 7") && complaint.contains("daemon 1"), "{complaint}");
}

#[test]
fn connection_that_ends_is_dialled_again_at_once() {
    let mut host = Host::new();
    let mut peer = host.listen();
    host.bring_up(&mut peer, &[&[]]);
    let old = host.link();
    peer.channel = None;
    assert_eq!(host.receive(), [Input::Lost(vm(), old)]);
    peer.accept();
    assert_eq!(peer.read(), ToInstance::Hello { version: PROTOCOL_VERSION });
    assert_ne!(host.link(), old);
}

#[test]
fn instance_that_died_is_down() {
    let mut host = Host::new();
    let mut peer = host.listen();
    host.bring_up(&mut peer, &[&[]]);
    let old = host.link();
    // The dead process leaves its socket file behind.
    drop(peer);
    assert_eq!(host.receive(), [Input::Lost(vm(), old), Input::Down(vm())]);
}

#[test]
fn instance_that_comes_back_at_a_stale_socket_is_found_without_an_event() {
    let mut host = Host::new();
    drop(host.listen());
    assert_eq!(host.instances.look(NOW), [Input::Down(vm())]);
    let mut peer = host.listen();
    let at = host.instances.deadline().unwrap();
    host.instances.tick(at);
    peer.accept();
}

#[test]
fn second_instance_at_the_path_is_not_dialled_while_the_first_lives() {
    let mut host = Host::new();
    let mut peer = host.listen();
    host.bring_up(&mut peer, &[&[]]);
    fs::remove_file(host.dir.path().join("work").join(rundir::SOCKET)).unwrap();
    let second = host.listen();
    host.instances.look(NOW);
    assert!(second.listener.accept().unwrap().is_none());
    drop(peer);
    host.receive();
    assert!(second.listener.accept().unwrap().is_some());
}

#[test]
fn directories_that_are_no_vm_names_are_left_alone() {
    let host = Host::new();
    for name in ["UPPER", "-x", "a.b", "0123456789012345678901234567890123"] {
        fs::create_dir(host.dir.path().join(name)).unwrap();
    }
    assert_eq!(rundir::vms(host.dir.path()), []);
}

#[test]
fn flood_is_taken_in_turns() {
    let mut host = Host::new();
    let mut peer = host.listen();
    host.bring_up(&mut peer, &[&[]]);
    for _ in 0..MESSAGES_PER_TURN + 10 {
        peer.send(&FromInstance::Detached { id: DeviceId(1) });
    }
    assert_eq!(host.receive().len(), MESSAGES_PER_TURN);
    assert_eq!(host.receive().len(), 10);
}

#[test]
fn text_of_an_instance_is_escaped() {
    let mut host = Host::new();
    let mut peer = host.listen();
    host.bring_up(&mut peer, &[&[]]);
    let text = "\u{1b}[2Jbad".to_owned();
    peer.send(&FromInstance::Refused { id: DeviceId(1), code: RefusedCode::NoPort, text });
    let inputs = host.receive();
    let [Input::Refused(_, _, text)] = &inputs[..] else { panic!("{inputs:?}") };
    assert_eq!(text, "\\u{1b}[2Jbad (NoPort)");
}

#[test]
fn message_out_of_turn_closes() {
    let mut host = Host::new();
    let mut peer = host.listen();
    host.instances.look(NOW);
    peer.accept();
    peer.send(&FromInstance::Attached { id: DeviceId(1), port: 1 });
    host.receive();
    assert_eq!(host.instances.sockets().count(), 0);
}

#[test]
fn endless_list_is_cut() {
    let mut host = Host::new();
    let mut peer = host.listen();
    host.instances.look(NOW);
    peer.accept();
    peer.send(&hello(PROTOCOL_VERSION));
    host.receive();
    for page in 0..HOLDS_MAX as u64 {
        if host.instances.sockets().count() == 0 {
            break;
        }
        let devices = (0..16).map(|at| device(page * 16 + at)).collect();
        peer.send(&FromInstance::Devices { devices, more: true });
        host.receive();
    }
    assert_eq!(host.instances.sockets().count(), 0);
}
