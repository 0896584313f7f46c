//! Made-up hosts: a stick with a partition, and what may be stacked on it.

use std::os::unix::fs::symlink;

use super::*;
use crate::sysfs::tests::{Tree, put};

struct Host {
    tree: Tree,
    stick: PathBuf,
}

impl Host {
    /// A stick at 1-1 with `sdb` (8:16) and `sdb1` (8:17); nothing mounted; one keyboard that is not on USB.
    fn new() -> Self {
        let tree = Tree::new();
        let stick = tree.plug("1-1", 3);
        for class in ["block", "net", "input", "tty/console"] {
            fs::create_dir_all(tree.path("class").join(class)).unwrap();
        }
        for directory in ["proc/1/net", "proc/self"] {
            fs::create_dir_all(tree.path(directory)).unwrap();
        }
        let host = Self { tree, stick };
        let disk = host.stick.join("1-1:1.0/host0/block/sdb");
        host.block(&disk, "8:16");
        host.block(&disk.join("sdb1"), "8:17");
        host.proc("1/mountinfo", "20 1 254:0 / / rw - ext4 /dev/vda rw\n");
        host.proc("swaps", "Filename Type Size Used Priority\n");
        host.proc("1/net/route", "Iface\tDestination\n");
        host.proc("1/net/ipv6_route", "");
        host.keyboard(&host.tree.path("devices/platform/i8042/input/input0/event0"));
        host
    }

    fn class(&self, class: &str, path: &Path) {
        symlink(path, self.tree.path("class").join(class).join(path.file_name().unwrap())).unwrap();
    }

    fn block(&self, path: &Path, number: &str) {
        fs::create_dir_all(path.join("holders")).unwrap();
        put(path, "dev", &format!("{number}\n"));
        self.class("block", path);
    }

    fn keyboard(&self, path: &Path) {
        fs::create_dir_all(path.join("device/capabilities")).unwrap();
        put(
            &path.join("device/capabilities"),
            "key",
            "402000007 ff9f207ac14057ff febeffdfffefffff fffffffffffffffe\n",
        );
        self.class("input", path);
    }

    fn link(&self, name: &str, flags: &str, carrier: &str) -> PathBuf {
        let path = self.stick.join("1-1:1.0/net").join(name);
        fs::create_dir_all(&path).unwrap();
        put(&path, "flags", flags);
        put(&path, "carrier", carrier);
        self.class("net", &path);
        path
    }

    fn proc(&self, name: &str, content: &str) {
        fs::write(self.tree.path("proc").join(name), content).unwrap();
    }

    fn uses(&self) -> Vec<HostUse> {
        let mut scan = self.tree.scan();
        Guards::new(self.tree.path(""), self.tree.path("proc")).assess(&mut scan);
        scan.devices[0].facts.host_use.clone()
    }

    fn only(&self) -> (HostUseKind, HostUseLevel, String) {
        let mut uses = self.uses();
        assert_eq!(uses.len(), 1, "{uses:?}");
        let one = uses.remove(0);
        (one.kind, one.level, one.why)
    }
}

#[test]
fn unused_stick_is_free() {
    assert_eq!(Host::new().uses(), []);
}

#[test]
fn partition_mounted_as_home_is_protected_and_as_medium_is_busy() {
    let host = Host::new();
    let mount =
        |point: &str| host.proc("1/mountinfo", &format!("40 20 8:17 / {point} rw - ext4 /dev/sdb1 rw\n"));
    mount("/home");
    let why = "sdb1 is mounted on /home".to_owned();
    assert_eq!(host.uses()[0], HostUse { kind: HostUseKind::Storage, level: HostUseLevel::Protected, why });
    mount("/run/media/me/STICK");
    assert_eq!(host.uses()[0].level, HostUseLevel::Busy);
    mount("/mntx");
    assert_eq!(host.uses()[0].level, HostUseLevel::Protected);
}

#[test]
fn root_on_lvm_on_luks_on_the_stick_is_protected() {
    let host = Host::new();
    let (luks, volume) =
        (host.tree.path("devices/virtual/block/dm-0"), host.tree.path("devices/virtual/block/dm-1"));
    host.block(&luks, "253:0");
    host.block(&volume, "253:1");
    put(&host.stick.join("1-1:1.0/host0/block/sdb/sdb1/holders"), "dm-0", "");
    put(&luks.join("holders"), "dm-1", "");
    let part_of = host.uses();
    assert!(part_of.iter().all(|one| one.kind == HostUseKind::StorageUnmounted), "{part_of:?}");
    host.proc("1/mountinfo", "40 20 253:1 / / rw - ext4 /dev/mapper/root rw\n");
    let why = "dm-1 on sdb1 is mounted on /".to_owned();
    assert!(host.uses().contains(&HostUse {
        kind: HostUseKind::Storage,
        level: HostUseLevel::Protected,
        why
    }));
}

#[test]
fn holders_in_a_circle_come_to_an_end() {
    let host = Host::new();
    let disk = host.stick.join("1-1:1.0/host0/block/sdb");
    put(&disk.join("holders"), "sdb1", "");
    put(&disk.join("sdb1/holders"), "sdb", "");
    assert!(!host.uses().is_empty());
}

#[test]
fn list_of_mounts_that_cannot_be_read_frees_nothing() {
    let host = Host::new();
    host.proc("1/mountinfo", "40 20 8:17 / /home rw - ext4 /dev/sdb1 rw\n");
    let mut guards = Guards::new(host.tree.path(""), host.tree.path("proc"));
    let mut scan = host.tree.scan();
    guards.assess(&mut scan);
    fs::remove_file(host.tree.path("proc/1/mountinfo")).unwrap();
    let mut scan = host.tree.scan();
    guards.assess(&mut scan);
    assert!(!scan.devices[0].facts.host_use.is_empty());
}

#[test]
fn network_stick_with_the_default_route_is_protected() {
    let host = Host::new();
    host.link("eth1", "0x1003\n", "1\n");
    assert_eq!(host.only(), (HostUseKind::Network, HostUseLevel::Busy, "eth1 is up".into()));
    host.proc(
        "1/net/route",
        "Iface\tDestination\neth1\t00000000\t0102A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n",
    );
    assert_eq!(host.only().1, HostUseLevel::Protected);
}

#[test]
fn network_stick_in_a_bridge_is_protected_and_a_quiet_one_free() {
    let host = Host::new();
    let path = host.link("eth1", "0x1002\n", "0\n");
    assert_eq!(host.uses(), []);
    symlink("../br0", path.join("master")).unwrap();
    assert_eq!(host.only(), (HostUseKind::NetDown, HostUseLevel::Busy, "eth1 is part of br0".into()));
    put(&path, "flags", "0x1003\n");
    assert_eq!(host.only().1, HostUseLevel::Protected);
}

#[test]
fn ipv6_default_route_counts() {
    let host = Host::new();
    host.link("wwan0", "0x1003\n", "1\n");
    let zeros = "0".repeat(32);
    host.proc(
        "1/net/ipv6_route",
        &format!("{zeros} 00 {zeros} 00 fe80{} 400 1 0 00000003    wwan0\n", "0".repeat(28)),
    );
    assert_eq!(host.only().2, "wwan0 carries the default route");
}

#[test]
fn serial_console_is_protected() {
    let host = Host::new();
    let device = host.stick.join("1-1:1.0/ttyUSB0");
    let tty = device.join("tty/ttyUSB0");
    fs::create_dir_all(&tty).unwrap();
    symlink(&device, tty.join("device")).unwrap();
    host.class("tty", &tty);
    put(&host.tree.path("class/tty/console"), "active", "tty0 ttyUSB0\n");
    assert_eq!(host.only().0, HostUseKind::Console);
}

#[test]
fn keyboards_are_counted_by_device() {
    let host = Host::new();
    host.keyboard(&host.stick.join("1-1:1.0/input/input5/event5"));
    host.keyboard(&host.stick.join("1-1:1.0/input/input6/event6"));
    let mouse = host.stick.join("1-1:1.0/input/input7/event7");
    fs::create_dir_all(mouse.join("device/capabilities")).unwrap();
    put(&mouse.join("device/capabilities"), "key", "70000 0 0 0 0\n");
    host.class("input", &mouse);
    let mut scan = host.tree.scan();
    let keyboards = Guards::new(host.tree.path(""), host.tree.path("proc")).assess(&mut scan);
    assert_eq!(keyboards, Keyboards { other: 1, usb: vec![host.stick.canonicalize().unwrap()] });
}
