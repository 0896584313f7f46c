//! Made-up trees in a temporary directory, built as the kernel builds them: real directories below `devices`, links
//! below `bus/usb/devices`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use super::*;

/// One made-up `/sys`.
pub(crate) struct Tree {
    pub(crate) dir: tempfile::TempDir,
}

impl Tree {
    /// A host with one xHCI at 0000:00:14.0: `usb1` with ports 1 to 4 and `usb2` with ports 1 to 4, where `usb2-portN`
    /// and `usb1-portN` are one socket.
    pub(crate) fn new() -> Self {
        let tree = Self { dir: tempfile::tempdir().unwrap() };
        let controller = tree.controller();
        fs::create_dir_all(&controller).unwrap();
        fs::create_dir_all(tree.path("bus/usb/devices")).unwrap();
        fs::create_dir_all(tree.path("bus/pci")).unwrap();
        symlink("../../../bus/pci", controller.join("subsystem")).unwrap();
        for (bus, speed) in [(1, "480"), (2, "5000")] {
            let hub = controller.join(format!("usb{bus}"));
            let interface = hub.join(format!("{bus}-0:1.0"));
            fs::create_dir_all(&interface).unwrap();
            put(&hub, "busnum", &format!("{bus}\n"));
            put(&hub, "devnum", "1\n");
            put(&hub, "speed", &format!("{speed}\n"));
            for port in 1..=4 {
                let directory = interface.join(format!("usb{bus}-port{port}"));
                fs::create_dir(&directory).unwrap();
                put(&directory, "connect_type", "hotplug\n");
                let other = 3 - bus;
                let peer = format!("../../../usb{other}/{other}-0:1.0/usb{other}-port{port}");
                symlink(peer, directory.join("peer")).unwrap();
            }
            tree.link(&hub);
            tree.link(&interface);
        }
        tree
    }

    pub(crate) fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    pub(crate) fn controller(&self) -> PathBuf {
        self.path("devices/pci0000:00/0000:00:14.0")
    }

    fn link(&self, target: &Path) {
        let name = target.file_name().unwrap();
        symlink(target, self.path("bus/usb/devices").join(name)).unwrap();
    }

    /// Plugs a storage device in, `name` like `1-4` or `1-4.2`.
    pub(crate) fn plug(&self, name: &str, devnum: u32) -> PathBuf {
        let kernel: KernelName = name.parse().unwrap();
        let mut directory = self.controller().join(format!("usb{}", kernel.bus));
        let ports: Vec<String> = kernel.chain.ports().iter().map(u8::to_string).collect();
        for depth in 1..=ports.len() {
            directory.push(format!("{}-{}", kernel.bus, ports[..depth].join(".")));
        }
        let interface = directory.join(format!("{name}:1.0"));
        fs::create_dir_all(&interface).unwrap();
        for (attribute, value) in [
            ("busnum", format!("{}\n", kernel.bus)),
            ("devnum", format!("{devnum}\n")),
            ("dev", format!("189:{}\n", (kernel.bus - 1) * 128 + devnum - 1)),
            ("speed", if kernel.bus == 2 { "5000\n".into() } else { "480\n".into() }),
            ("authorized", "1\n".into()),
            ("removable", "removable\n".into()),
            ("serial", "4C53\n".into()),
            ("product", "Ultra\n".into()),
            ("manufacturer", "SanDisk\n".into()),
        ] {
            put(&directory, attribute, &value);
        }
        fs::write(directory.join("descriptors"), blob()).unwrap();
        put(&interface, "bAlternateSetting", " 0\n");
        symlink("../../drivers/usb-storage", interface.join("driver")).unwrap();
        self.link(&directory);
        self.link(&interface);
        directory
    }

    pub(crate) fn scan(&self) -> Scan {
        Sysfs::new(self.dir.path()).scan().unwrap()
    }

    fn only(&self) -> Present {
        let mut devices = self.scan().devices;
        assert_eq!(devices.len(), 1);
        devices.remove(0)
    }
}

pub(crate) fn put(directory: &Path, name: &str, value: &str) {
    fs::write(directory.join(name), value).unwrap();
}

fn blob() -> Vec<u8> {
    let mut blob = vec![18, 1, 0, 2, 0, 0, 0, 64, 0x81, 0x07, 0x81, 0x55, 0x00, 0x01, 1, 2, 3, 1];
    blob.extend([9, 2, 18, 0, 1, 1, 0, 0x80, 50, 9, 4, 0, 0, 0, 8, 6, 80, 0]);
    blob
}

#[test]
fn device_is_read_with_its_socket_and_driver() {
    let tree = Tree::new();
    tree.plug("2-4", 7);
    let device = tree.only();
    assert_eq!(device.facts.connector.to_string(), "pci-0000:00:14.0/usb2:4");
    assert_eq!(device.facts.connector.halves.len(), 2);
    assert_eq!(device.facts.id.to_string(), "0781:5581");
    assert_eq!(device.facts.serial.as_deref(), Some("4C53"));
    assert_eq!(device.facts.speed, Speed::Super);
    assert_eq!(device.facts.interfaces[0].driver.as_deref(), Some("usb-storage"));
    assert_eq!(device.facts.connect_type, ConnectType::Hotplug);
    assert_eq!(device.facts.node, NodeNumber { major: 189, minor: 134 });
}

#[test]
fn device_behind_a_hub_has_the_whole_chain() {
    let tree = Tree::new();
    tree.plug("1-4.2", 9);
    let names: Vec<_> = tree.scan().devices.iter().map(|one| one.facts.sys_name.clone()).collect();
    assert_eq!(names, ["1-4.2"]);
    assert_eq!(tree.only().facts.connector.to_string(), "pci-0000:00:14.0/usb2:4.2");
}

#[test]
fn ports_of_an_external_hub_are_found_with_their_peers() {
    let tree = Tree::new();
    let hub = tree.plug("1-4", 2);
    let port = hub.join("1-4:1.0/1-4-port2");
    fs::create_dir(&port).unwrap();
    symlink("../../../../usb2/2-4/2-4:1.0/2-4-port2", port.join("peer")).unwrap();
    let scan = tree.scan();
    let address = "pci-0000:00:14.0/usb2:4.2".parse().unwrap();
    let peer = scan.topology.ports[&address].peer.as_ref().unwrap();
    assert_eq!(peer.to_string(), "pci-0000:00:14.0/usb3:4.2");
    let found = scan.hubs.iter().find(|one| one.name == "1-4").unwrap();
    assert_eq!((found.plug.syspath.clone(), found.ports), (hub.canonicalize().unwrap(), 1));
    assert_eq!(scan.hubs.len(), 3);
}

#[test]
fn unconfigured_device_has_no_driver_and_no_configuration() {
    let tree = Tree::new();
    let directory = tree.plug("1-1", 3);
    put(&directory, "authorized", "0\n");
    fs::remove_dir_all(directory.join("1-1:1.0")).unwrap();
    fs::remove_file(tree.path("bus/usb/devices/1-1:1.0")).unwrap();
    let device = tree.only();
    assert_eq!((device.facts.active_configuration, device.facts.authorized), (None, false));
    assert_eq!(device.facts.interfaces[0].driver, None);
}

#[test]
fn device_that_holds_its_lock_is_not_waited_for() {
    let tree = Tree::new();
    let directory = tree.plug("1-1", 3);
    // Whoever opens one of these waits, as for a device that hangs in a request.
    mkfifo(&directory.join("bConfigurationValue"), Mode::S_IRWXU).unwrap();
    for attribute in ["serial", "product", "manufacturer"] {
        fs::remove_file(directory.join(attribute)).unwrap();
        mkfifo(&directory.join(attribute), Mode::S_IRWXU).unwrap();
    }
    let sysfs = Sysfs::new(tree.dir.path());
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || tell.send(sysfs.scan_without_strings().unwrap().devices).unwrap());
    let devices = told.recv_timeout(std::time::Duration::from_secs(60)).unwrap();
    assert_eq!((devices.len(), &devices[0].facts.serial), (1, &None));
}

#[test]
fn strings_of_a_plug_in_that_was_replaced_are_not_taken() {
    let tree = Tree::new();
    tree.plug("1-1", 3);
    let mut plug = tree.only().plug;
    assert_eq!(read_strings(&plug).unwrap().serial.as_deref(), Some("4C53"));
    plug.inode += 1;
    assert_eq!(read_strings(&plug), None);
}

#[test]
fn device_that_is_replugged_is_another_plug() {
    let tree = Tree::new();
    let directory = tree.plug("1-1", 3);
    let first = tree.only().plug;
    assert_eq!(tree.only().plug, first);
    // The old directory stays until the new one exists, as in kernfs, where numbers are not reused at once.
    fs::rename(&directory, tree.path("gone")).unwrap();
    for name in ["1-1", "1-1:1.0"] {
        fs::remove_file(tree.path("bus/usb/devices").join(name)).unwrap();
    }
    tree.plug("1-1", 3);
    let second = tree.only().plug;
    assert_eq!((second.address, second.syspath.clone()), (first.address, first.syspath.clone()));
    assert_ne!(second, first);
}

#[test]
fn files_that_vanish_cost_the_device_and_nothing_else() {
    for missing in ["busnum", "devnum", "dev", "speed", "descriptors"] {
        let tree = Tree::new();
        let broken = tree.plug("1-1", 3);
        tree.plug("1-2", 4);
        fs::remove_file(broken.join(missing)).unwrap();
        assert_eq!(tree.only().facts.sys_name, "1-2", "{missing}");
    }
}

#[test]
fn files_that_may_be_missing_cost_only_their_fact() {
    let tree = Tree::new();
    let directory = tree.plug("1-1", 3);
    for missing in ["serial", "product", "manufacturer", "removable", "authorized"] {
        fs::remove_file(directory.join(missing)).unwrap();
    }
    let facts = tree.only().facts;
    assert_eq!((facts.serial, facts.removable, facts.authorized), (None, Removable::Unknown, true));
}

#[test]
fn huge_and_garbled_attributes_are_cut_and_replaced() {
    let tree = Tree::new();
    let directory = tree.plug("1-1", 3);
    fs::write(directory.join("product"), vec![0xff; 100_000]).unwrap();
    put(&directory, "serial", "a\u{1b}[2J\u{202e}b\n");
    let facts = tree.only().facts;
    assert_eq!(facts.product.unwrap(), "\u{fffd}".repeat(STRING_MAX));
    assert_eq!(facts.serial.as_deref(), Some("a\u{1b}[2J\u{202e}b"));
}

#[test]
fn relative_links_as_the_kernel_makes_them_lead_to_the_same_plug_in() {
    let tree = Tree::new();
    tree.plug("1-4.2", 4);
    let absolute = tree.only();
    let link = tree.path("bus/usb/devices/1-4.2");
    fs::remove_file(&link).unwrap();
    symlink("../../../devices/pci0000:00/0000:00:14.0/usb1/1-4/1-4.2", link).unwrap();
    assert_eq!(tree.only(), absolute);
}

#[test]
fn links_to_nowhere_are_skipped() {
    let tree = Tree::new();
    tree.plug("1-2", 4);
    symlink("/nowhere", tree.path("bus/usb/devices/1-3")).unwrap();
    symlink("/nowhere", tree.path("bus/usb/devices/usb9")).unwrap();
    symlink("/nowhere", tree.path("bus/usb/devices/1-3:1.0")).unwrap();
    let interface = tree.controller().join("usb1/1-0:1.0/usb1-port2");
    fs::remove_file(interface.join("peer")).unwrap();
    symlink("/nowhere", interface.join("peer")).unwrap();
    assert_eq!(tree.only().facts.connector.halves.len(), 1);
}

#[test]
fn platform_controller_is_named_by_its_device() {
    let tree = Tree::new();
    fs::remove_file(tree.controller().join("subsystem")).unwrap();
    fs::rename(tree.controller(), tree.path("devices/vhci_hcd.0")).unwrap();
    let devices = tree.path("bus/usb/devices");
    for name in ["usb1", "usb2"] {
        fs::remove_file(devices.join(name)).unwrap();
        symlink(tree.path("devices/vhci_hcd.0").join(name), devices.join(name)).unwrap();
    }
    let controllers: Vec<_> =
        tree.scan().topology.buses.into_values().map(|root| root.controller.to_string()).collect();
    assert_eq!(controllers, ["platform-vhci_hcd.0", "platform-vhci_hcd.0"]);
}
