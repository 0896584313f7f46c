//! How long usbpolicyd needs from an event to a decision on a host with a full bus: twelve hubs and 114 devices, without the
//! emulation under which the scenarios run: `cargo bench -p usbpolicyd --bench reading`.
//!
//! sysfs is a made-up tree in a temporary directory, and nothing is opened or sent.

#![expect(clippy::unwrap_used, reason = "the input is made here")]

use std::fs;
use std::hint::black_box;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use usbpolicyd::guards::Guards;
use usbpolicyd::policy::compile::compile;
use usbpolicyd::policy::decide::{Context, decide};
use usbpolicyd::policy::load::load_one;
use usbpolicyd::strings::StringCache;
use usbpolicyd::sysfs::{Scan, Sysfs};

const HUBS: u8 = 12;
const PORTS: u8 = 10;
const ROUNDS: usize = 100;

const POLICY: &str =
    "schema = 1\n[vms.a]\n[[assign]]\nvm = 'a'\nmatch = { id = '0781:5581', serial = 'S7*' }\n";

/// The tree below one directory.
struct Tree(PathBuf);

impl Tree {
    fn put(directory: &Path, files: &[(&str, String)]) {
        fs::create_dir_all(directory).unwrap();
        for (name, value) in files {
            fs::write(directory.join(name), format!("{value}\n")).unwrap();
        }
    }

    fn link(&self, directory: &Path) {
        let name = directory.file_name().unwrap();
        symlink(directory, self.0.join("bus/usb/devices").join(name)).unwrap();
    }

    /// The interface of a hub with its ports, each with a peer on the other bus.
    fn hub(&self, directory: &Path, interface: &str, prefix: &str, peer: &str) {
        let interface = directory.join(interface);
        for port in 1..=PORTS.max(HUBS) {
            let directory = interface.join(format!("{prefix}-port{port}"));
            Self::put(&directory, &[("connect_type", "hotplug".into())]);
            symlink(format!("../{peer}-port{port}"), directory.join("peer")).unwrap();
        }
        self.link(&interface);
    }

    /// A device with one interface; a hub if `class` is 9.
    fn device(&self, directory: &Path, number: u8, class: u8) {
        let name = directory.file_name().unwrap().to_str().unwrap();
        let files = [
            ("busnum", "1".into()),
            ("devnum", number.to_string()),
            ("dev", format!("189:{}", number - 1)),
            ("speed", "480".into()),
            ("authorized", "1".into()),
            ("removable", "removable".into()),
            ("serial", format!("S{number}")),
            ("product", format!("Stick {number}")),
            ("manufacturer", "Maker".into()),
        ];
        Self::put(directory, &files);
        let mut blob = vec![18, 1, 0, 2, class, 0, 0, 64, 0x81, 0x07, 0x81, 0x55, 0x00, 0x01, 1, 2, 3, 1];
        blob.extend([9, 2, 18, 0, 1, 1, 0, 0x80, 50, 9, 4, 0, 0, 0, class, 6, 80, 0]);
        fs::write(directory.join("descriptors"), blob).unwrap();
        let interface = directory.join(format!("{name}:1.0"));
        Self::put(&interface, &[("bAlternateSetting", " 0".into())]);
        symlink("../../drivers/usb-storage", interface.join("driver")).unwrap();
        self.link(directory);
        if class != 9 {
            self.link(&interface);
        }
    }

    fn make(root: &Path) -> Self {
        let tree = Self(root.to_owned());
        let controller = root.join("devices/pci0000:00/0000:00:14.0");
        for directory in ["bus/usb/devices", "bus/pci"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        fs::create_dir_all(&controller).unwrap();
        symlink("../../../bus/pci", controller.join("subsystem")).unwrap();
        for (bus, speed) in [(1, "480"), (2, "5000")] {
            let hub = controller.join(format!("usb{bus}"));
            let files = [("busnum", bus.to_string()), ("devnum", "1".into()), ("speed", speed.into())];
            Self::put(&hub, &files);
            tree.link(&hub);
            tree.hub(&hub, &format!("{bus}-0:1.0"), &format!("usb{bus}"), &format!("usb{}", 3 - bus));
        }
        let mut number = 1;
        for hub in 1..=HUBS {
            number += 1;
            let directory = controller.join(format!("usb1/1-{hub}"));
            tree.device(&directory, number, 9);
            tree.hub(&directory, &format!("1-{hub}:1.0"), &format!("1-{hub}"), &format!("2-{hub}"));
            // A bus has 127 numbers.
            for port in 1..=PORTS.min(127 - number) {
                number += 1;
                tree.device(&directory.join(format!("1-{hub}.{port}")), number, 0);
            }
        }
        tree
    }
}

fn main() {
    let directory = tempfile::tempdir().unwrap();
    let tree = Tree::make(directory.path());
    let sysfs = Sysfs::new(&tree.0);
    let (mut cache, mut guards) = (StringCache::default(), Guards::new(&tree.0, "/proc"));
    let first = sysfs.scan().unwrap();
    for one in &first.devices {
        cache.recall(one.plug.clone(), one.facts.authorized, one.facts.strings());
    }
    let policy = compile(&load_one("policy.toml", POLICY).unwrap().policy, &first.topology);
    println!("{} devices, {} hubs with ports, {ROUNDS} rounds", first.devices.len(), first.hubs.len());
    let read = || sysfs.scan_without_strings().unwrap();
    let mut steps: [Vec<Duration>; 3] = Default::default();
    for _ in 0..ROUNDS {
        let mut scan = Scan::default();
        let mut time = |step: usize, work: &mut dyn FnMut(&mut Scan)| {
            let start = Instant::now();
            work(&mut scan);
            steps[step].push(start.elapsed());
        };
        time(0, &mut |scan| *scan = read());
        time(1, &mut |scan| {
            assert!(cache.complete(Duration::ZERO, scan).is_empty());
            black_box(guards.assess(scan));
        });
        time(2, &mut |scan| {
            for device in &scan.devices {
                black_box(decide(&policy, &device.facts, &Context::default()));
            }
        });
    }
    println!("{:24} {:>10} {:>10}", "step", "median", "worst");
    for (name, mut step) in ["sysfs without strings", "strings and guards", "decide"].into_iter().zip(steps) {
        step.sort();
        println!("{name:24} {:>10.1?} {:>10.1?}", step[ROUNDS / 2], step[ROUNDS - 1]);
    }
}
