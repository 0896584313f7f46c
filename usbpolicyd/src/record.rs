//! What outlives the daemon: which plug-in was taken from the host's drivers, which VM has it, and under which name.
//!
//! The file is written before a device is touched, so after a crash at any moment each device that an instance may hold,
//! or that waits for the host's drivers, is in it. It lives in `/run` and dies with the boot. A file that cannot be read
//! is set aside, never fatal: the instances still tell what they hold.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use common::ids::{BusAddress, DeviceId, VmName};
use serde::{Deserialize, Serialize};

use crate::broker::Touched;
use crate::facts::Strings;
use crate::sysfs::Plug;

/// Version of the file's format.
const VERSION: u32 = 1;
/// Largest file that is read. A thousand devices with the usual strings take a third of it.
const FILE_MAX: u64 = 1 << 20;

/// One device that the host's drivers may not have, by our doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Given {
    /// Its name.
    pub id: DeviceId,
    /// To whom; none while no VM has it.
    #[serde(default)]
    pub vm: Option<VmName>,
    /// We took its authorization.
    #[serde(default)]
    pub deauthorized: bool,
    /// Directory of the plug-in.
    pub syspath: PathBuf,
    /// Inode of that directory.
    pub inode: u64,
    /// Bus and device number.
    pub address: BusAddress,
    /// Its file cannot take it from the host's drivers: its port has to stay claimed.
    #[serde(default)]
    pub confined: bool,
    /// What it calls itself, and whether it was authorized when that was read: it may hang, in a request of its VM, when
    /// the next run starts.
    #[serde(default)]
    pub strings: Option<(bool, Strings)>,
}

impl Given {
    fn plug(&self) -> Plug {
        Plug { syspath: self.syspath.clone(), inode: self.inode, address: self.address }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Content {
    version: u32,
    boot_id: String,
    given: Vec<Given>,
}

/// The file.
#[derive(Debug)]
pub struct Record {
    path: PathBuf,
    boot_id: String,
    written: Vec<Given>,
}

impl Record {
    /// The file at `path`, and what a former run left in it. `boot_id` tells entries of an earlier boot.
    pub fn open(path: &Path, boot_id: &str) -> (Self, BTreeMap<Plug, (DeviceId, Touched)>) {
        let given = match read(path) {
            Ok(content) if content.version == VERSION && content.boot_id == boot_id => content.given,
            Ok(_) => Vec::new(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => {
                let aside = path.with_extension("json.corrupt");
                let moved = fs::rename(path, &aside);
                tracing::error!(
                    path = %path.display(), %error, aside = %aside.display(), moved = moved.is_ok(),
                    "cannot read the record of given devices; going on without it"
                );
                Vec::new()
            }
        };
        let recalled = given.iter().map(|one| {
            let touched = match (&one.vm, one.deauthorized) {
                (Some(vm), _) => Touched::Given(vm.clone()),
                (None, true) => Touched::Deauthorized,
                (None, false) => Touched::Taken,
            };
            (one.plug(), (one.id, touched))
        });
        let recalled = recalled.collect();
        let record = Self { path: path.to_owned(), boot_id: boot_id.to_owned(), written: given };
        (record, recalled)
    }

    /// The devices whose files are confined, of those that a former run left or that were written last.
    pub fn confined(&self) -> BTreeSet<DeviceId> {
        self.written.iter().filter(|one| one.confined).map(|one| one.id).collect()
    }

    /// The strings of the devices that a former run left, or that were written last.
    pub fn strings(&self) -> impl Iterator<Item = (Plug, bool, Strings)> {
        self.written.iter().filter_map(|one| {
            let (authorized, strings) = one.strings.clone()?;
            Some((one.plug(), authorized, strings))
        })
    }

    /// Replaces the content, in one step. Does nothing when it is the same.
    pub fn write(&mut self, given: Vec<Given>) -> io::Result<()> {
        if given == self.written {
            return Ok(());
        }
        let content = Content { version: VERSION, boot_id: self.boot_id.clone(), given };
        let text = serde_json::to_vec(&content)?;
        let draft = self.path.with_extension("json.new");
        let mut file = fs::File::create(&draft)?;
        file.write_all(&text)?;
        fs::rename(&draft, &self.path)?;
        self.written = content.given;
        Ok(())
    }
}

fn read(path: &Path) -> io::Result<Content> {
    let mut text = Vec::new();
    fs::File::open(path)?.take(FILE_MAX).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// The kernel's name of this boot.
pub fn boot_id() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given() -> Given {
        Given {
            id: DeviceId(7),
            vm: Some("work".parse().unwrap()),
            deauthorized: false,
            syspath: "/sys/devices/x/usb1/1-1".into(),
            inode: 99,
            address: BusAddress { bus: 1, device: 2 },
            confined: false,
            strings: Some((true, Strings { serial: Some("4C53".to_owned()), ..Strings::default() })),
        }
    }

    #[test]
    fn record_is_found_again_in_the_same_boot_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("given.json");
        let (mut record, recalled) = Record::open(&path, "boot-1");
        assert!(recalled.is_empty());
        record.write(vec![given()]).unwrap();
        let (record, recalled) = Record::open(&path, "boot-1");
        assert_eq!(
            record.strings().map(|(_, _, strings)| Some(strings)).collect::<Vec<_>>(),
            [given().strings.map(|(_, strings)| strings)]
        );
        let work = Touched::Given("work".parse().unwrap());
        assert_eq!(recalled.into_values().collect::<Vec<_>>(), [(DeviceId(7), work)]);
        assert!(Record::open(&path, "boot-2").1.is_empty());
    }

    #[test]
    fn device_on_its_way_back_is_found_again() {
        for (deauthorized, touched) in [(false, Touched::Taken), (true, Touched::Deauthorized)] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("given.json");
            let (mut record, _) = Record::open(&path, "boot-1");
            record.write(vec![Given { vm: None, deauthorized, ..given() }]).unwrap();
            let (_, recalled) = Record::open(&path, "boot-1");
            assert_eq!(recalled.into_values().collect::<Vec<_>>(), [(DeviceId(7), touched)]);
        }
    }

    #[test]
    fn corrupt_record_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("given.json");
        fs::write(&path, "{\"version\":1,").unwrap();
        let (mut record, recalled) = Record::open(&path, "boot-1");
        assert!(recalled.is_empty() && dir.path().join("given.json.corrupt").exists());
        record.write(vec![given()]).unwrap();
        assert_eq!(Record::open(&path, "boot-1").1.len(), 1);
    }
}
