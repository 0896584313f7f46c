//! What the host itself does with a USB device: a mounted disk, the way to the network, the last keyboard, a console.
//!
//! Everything is read from sysfs and procfs, nothing is asked of the device. A device that the host cannot do without is
//! [`HostUseLevel::Protected`], one that is merely in use is [`HostUseLevel::Busy`]; the policy decides what follows.
//! What cannot be read counts as not there, except that a device is never called free because a *list* could not be
//! read: then the last list stays in force.

mod block;
mod net;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::facts::{HostUse, HostUseKind, HostUseLevel};
use crate::sysfs::{Scan, resolve, text};

/// Most entries of one directory of `/sys/class` that are looked at.
const ENTRIES_MAX: usize = 16_384;
/// Bits 1 to 31 of a key bitmap: Escape, digits, the letters up to S. udev calls what has all of them a keyboard
/// (`udev-builtin-input_id.c`).
const KEYBOARD_KEYS: u64 = 0xffff_fffe;

/// Reads what the host does with its devices.
#[derive(Debug)]
pub struct Guards {
    sys: PathBuf,
    proc: PathBuf,
    mounts: Vec<block::Mount>,
    swaps: Vec<block::DeviceNumber>,
}

/// Keyboards of the host, those that USB brings apart from all others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keyboards {
    /// Keyboards that are not on USB.
    pub other: usize,
    /// USB devices that have a keyboard which the host uses, by syspath.
    pub usb: Vec<PathBuf>,
}

impl Default for Guards {
    fn default() -> Self {
        Self::new("/sys", "/proc")
    }
}

impl Guards {
    /// Reads from these trees.
    pub fn new(sys: impl Into<PathBuf>, proc: impl Into<PathBuf>) -> Self {
        Self { sys: sys.into(), proc: proc.into(), mounts: Vec::new(), swaps: Vec::new() }
    }

    /// Notes in each device of `scan` what the host does with it, and counts the keyboards.
    pub fn assess(&mut self, scan: &mut Scan) -> Keyboards {
        if let Some(mounts) = block::read_mounts(&self.proc) {
            self.mounts = mounts;
        }
        if let Some(swaps) = block::read_swaps(&self.proc) {
            self.swaps = swaps;
        }
        let disks = class_devices(&self.sys, "block");
        // What is stacked on what is asked only where a stack may stand on USB.
        let has_disk = disks.iter().any(|path| owner(scan, path).is_some());
        let disks = if has_disk { block::read_disks(disks) } else { Vec::new() };
        let links = net::read_links(&self.sys, &self.proc);
        let consoles = self.consoles();
        let mut uses: BTreeMap<PathBuf, Vec<HostUse>> = BTreeMap::new();
        for disk in &disks {
            if let Some(device) = owner(scan, &disk.path) {
                let found = block::uses(disk, &disks, &self.mounts, &self.swaps);
                uses.entry(device).or_default().extend(found);
            }
        }
        for link in &links {
            if let Some(device) = owner(scan, &link.path) {
                uses.entry(device).or_default().extend(link.host_use());
            }
        }
        for (name, path) in &consoles {
            if let Some(device) = owner(scan, path) {
                let why = format!("{name} is a console of the kernel");
                let host_use = HostUse { kind: HostUseKind::Console, level: HostUseLevel::Protected, why };
                uses.entry(device).or_default().push(host_use);
            }
        }
        for present in &mut scan.devices {
            let mut found = uses.remove(&present.plug.syspath).unwrap_or_default();
            found.sort_by(|left, right| (right.level, &left.why).cmp(&(left.level, &right.why)));
            found.dedup();
            present.facts.host_use = found;
        }
        self.keyboards(scan)
    }

    /// The kernel's consoles with the devices behind them.
    fn consoles(&self) -> Vec<(String, PathBuf)> {
        let active = text(&self.sys.join("class/tty/console"), "active").unwrap_or_default();
        let path = |name: &str| fs::canonicalize(self.sys.join("class/tty").join(name).join("device")).ok();
        active.split_whitespace().filter_map(|name| Some((name.to_owned(), path(name)?))).collect()
    }

    fn keyboards(&self, scan: &Scan) -> Keyboards {
        let mut found = Keyboards::default();
        for path in class_devices(&self.sys, "input") {
            let is_event = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"event"));
            if !is_event || !has_keyboard_keys(&path.join("device/capabilities")) {
                continue;
            }
            match owner(scan, &path) {
                Some(device) if !found.usb.contains(&device) => found.usb.push(device),
                Some(_) => {}
                None => found.other += 1,
            }
        }
        found
    }
}

/// What a device gets that would be the last keyboard to leave the host.
pub fn last_keyboard() -> HostUse {
    let why = "it is the last keyboard of this host".to_owned();
    HostUse { kind: HostUseKind::Input, level: HostUseLevel::Protected, why }
}

fn has_keyboard_keys(capabilities: &Path) -> bool {
    let keys = text(capabilities, "key").unwrap_or_default();
    // The last word has the lowest keys.
    let low = keys.split_whitespace().next_back().and_then(|word| u64::from_str_radix(word, 16).ok());
    low.is_some_and(|low| low & KEYBOARD_KEYS == KEYBOARD_KEYS)
}

/// The USB device that a path below `/sys/devices` belongs to: the deepest one above it.
fn owner(scan: &Scan, path: &Path) -> Option<PathBuf> {
    let above =
        scan.devices.iter().map(|present| &present.plug.syspath).filter(|device| path.starts_with(device));
    above.max_by_key(|device| device.as_os_str().len()).cloned()
}

/// Real paths of all devices of one class.
fn class_devices(sys: &Path, class: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(sys.join("class").join(class)) else { return Vec::new() };
    let paths = entries.take(ENTRIES_MAX).filter_map(|entry| resolve(&entry.ok()?.path()));
    paths.collect()
}
