//! Disks: what is mounted or swapped to on them, or on what is stacked on them (partitions, LUKS, LVM, md, bcache, loop).

use std::collections::BTreeSet;
use std::fs;
use std::io::Read as _;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use crate::facts::{HostUse, HostUseKind, HostUseLevel};
use crate::sysfs::text;

/// Largest list of mounts or swaps that is read.
const LIST_MAX: u64 = 4 << 20;
/// Below these, people mount what they plug in: such a device is in use, but the host does not need it.
const MEDIA: [&str; 3] = ["/media", "/run/media", "/mnt"];

/// Major and minor number of a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct DeviceNumber {
    major: u64,
    minor: u64,
}

impl DeviceNumber {
    fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }

    /// The number of the block device node at `path`, or of the file system that a file at `path` is on.
    fn behind(path: &Path) -> Option<Self> {
        let meta = fs::metadata(path).ok()?;
        let raw = if meta.file_type().is_block_device() { meta.rdev() } else { meta.dev() };
        Some(Self { major: major(raw), minor: minor(raw) })
    }
}

/// One line of mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    number: DeviceNumber,
    point: String,
}

/// One disk, partition or stacked block device.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    pub(super) path: PathBuf,
    name: String,
    number: DeviceNumber,
    /// Names of what is stacked on it.
    holders: Vec<String>,
    /// The node or file that a loop device is made of.
    backing: Option<PathBuf>,
}

/// The mounts of the host: those of process 1, whatever name space we are in.
pub(super) fn read_mounts(proc: &Path) -> Option<Vec<Mount>> {
    let list = read_list(&proc.join("1/mountinfo")).or_else(|| read_list(&proc.join("self/mountinfo")))?;
    Some(list.lines().filter_map(parse_mount).collect())
}

/// `36 35 98:0 /root /mount/point options optional - type source super-options` (proc_pid_mountinfo(5)).
fn parse_mount(line: &str) -> Option<Mount> {
    let mut words = line.split(' ');
    let number = DeviceNumber::parse(words.nth(2)?)?;
    let point = unescape(words.nth(1)?);
    // btrfs and others mount under a number of their own; the source names the disk.
    let source = line.split_once(" - ").and_then(|(_, rest)| rest.split(' ').nth(1)).map(unescape);
    let number = match source {
        Some(source) if number.major == 0 && source.starts_with("/dev/") => {
            DeviceNumber::behind(Path::new(&source)).unwrap_or(number)
        }
        _ => number,
    };
    Some(Mount { number, point })
}

/// Space, tab, line end and backslash stand as three octal digits.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let digits = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if first == b'\\' => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).to_string_lossy().into_owned()
}

/// The devices that are swapped to, those behind swap files included.
pub(super) fn read_swaps(proc: &Path) -> Option<Vec<DeviceNumber>> {
    let list = read_list(&proc.join("swaps"))?;
    let paths = list.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    Some(paths.filter_map(|path| DeviceNumber::behind(Path::new(&unescape(path)))).collect())
}

fn read_list(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(LIST_MAX).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// What block devices are made of, by their directories.
pub(super) fn read_disks(paths: Vec<PathBuf>) -> Vec<Disk> {
    let read = |path: PathBuf| {
        let name = path.file_name()?.to_str()?.to_owned();
        let number = DeviceNumber::parse(&text(&path, "dev")?)?;
        let holders = fs::read_dir(path.join("holders")).ok();
        let holders = holders.into_iter().flatten();
        let holders = holders.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        let backing = text(&path, "loop/backing_file").map(|file| PathBuf::from(file.trim_end_matches('\n')));
        Some(Disk { path, name, number, holders, backing })
    };
    paths.into_iter().filter_map(read).collect()
}

/// What the host does with a disk and with all that is stacked on it.
pub(super) fn uses(disk: &Disk, all: &[Disk], mounts: &[Mount], swaps: &[DeviceNumber]) -> Vec<HostUse> {
    let mut found = Vec::new();
    let mut seen: BTreeSet<&str> = BTreeSet::new();
    let mut todo = vec![disk];
    while let Some(one) = todo.pop() {
        if !seen.insert(&one.name) {
            continue;
        }
        for mount in mounts.iter().filter(|mount| mount.number == one.number) {
            let is_media = MEDIA.iter().any(|media| Path::new(&mount.point).starts_with(media));
            let level = if is_media { HostUseLevel::Busy } else { HostUseLevel::Protected };
            let why = format!("{}{} is mounted on {}", one.name, via(disk, one), mount.point);
            found.push(HostUse { kind: HostUseKind::Storage, level, why });
        }
        if swaps.contains(&one.number) {
            let why = format!("{}{} is swapped to", one.name, via(disk, one));
            found.push(HostUse { kind: HostUseKind::Storage, level: HostUseLevel::Protected, why });
        }
        let is_above = |other: &&Disk| {
            one.holders.contains(&other.name)
                || other.path.parent() == Some(&one.path)
                || other.backing.as_deref().and_then(DeviceNumber::behind) == Some(one.number)
        };
        todo.extend(all.iter().filter(is_above));
    }
    let stacked: Vec<&str> = disk.holders.iter().map(String::as_str).collect();
    if found.is_empty() && !stacked.is_empty() {
        let why = format!("{} is part of {}", disk.name, stacked.join(", "));
        let (kind, level) = (HostUseKind::StorageUnmounted, HostUseLevel::Busy);
        found.push(HostUse { kind, level, why });
    }
    found
}

/// ` on sdb1` when something else than the disk itself is in use.
fn via(disk: &Disk, one: &Disk) -> String {
    if disk.name == one.name { String::new() } else { format!(" on {}", disk.name) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_with_spaces_are_read() {
        let line = r"40 29 8:17 / /media/my\040stick rw,nosuid shared:20 - vfat /dev/sdb1 rw";
        let mount = parse_mount(line).unwrap();
        assert_eq!(
            (mount.number, mount.point.as_str()),
            (DeviceNumber { major: 8, minor: 17 }, "/media/my stick")
        );
    }

    #[test]
    fn lines_that_are_no_mounts_are_left_out() {
        for line in ["", "a b c", "40 29 8 / /x rw - vfat x rw", "40 29 x:y / /x rw", "\\"] {
            assert_eq!(parse_mount(line), None, "{line}");
        }
        assert_eq!(unescape(r"\04"), r"\04");
        assert_eq!(unescape(r"\999"), r"\999");
    }
}
