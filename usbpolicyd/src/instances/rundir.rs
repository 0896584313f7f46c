//! `/run/usbvfiod`: which directories are VMs, and word when something there changes.
//!
//! inotify is a hint like a uevent: whatever it says, the directories are looked at again. Its queue may overflow, a
//! directory may appear and get its socket before it is watched: the look comes after the watch.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use common::ids::VmName;
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

/// Name of the socket in a VM's directory.
pub const SOCKET: &str = "policy.sock";
/// Most VMs that are looked at; a host has memory for fewer.
const VMS_MAX: usize = 1024;

/// The VMs that have a directory below `run_dir`. What is no VM name is not ours.
pub fn vms(run_dir: &Path) -> Vec<VmName> {
    let Ok(entries) = fs::read_dir(run_dir) else { return Vec::new() };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.parse().ok());
    names.take(VMS_MAX).collect()
}

/// Watches the directory and the directory of each VM in it.
pub struct Watch {
    inotify: Inotify,
    run_dir: PathBuf,
    extra: BTreeSet<PathBuf>,
}

impl Watch {
    /// A watch on `run_dir`, which may be missing for now.
    pub fn new(run_dir: &Path) -> nix::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        Ok(Self { inotify, run_dir: run_dir.to_owned(), extra: BTreeSet::new() })
    }

    /// Watches these directories too: those of sockets that the policy names.
    pub fn set_extra(&mut self, directories: BTreeSet<PathBuf>) {
        self.extra = directories;
    }

    /// Watches what is there now. Watching twice is the same as once. Look at the sockets after this.
    pub fn refresh(&self) {
        let flags = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_DELETE_SELF;
        // While `run_dir` is missing its parent tells when it appears.
        let parent = self.run_dir.parent().filter(|_| !self.run_dir.exists());
        let own = vms(&self.run_dir).into_iter().map(|vm| self.run_dir.join(vm.as_str()));
        let all =
            own.chain([self.run_dir.clone()]).chain(parent.map(Path::to_owned)).chain(self.extra.clone());
        for directory in all {
            match self.inotify.add_watch(&directory, flags) {
                Ok(_) | Err(Errno::ENOENT | Errno::ENOTDIR) => {}
                Err(errno) => tracing::warn!(directory = %directory.display(), %errno, "cannot watch"),
            }
        }
    }

    /// Forgets the events that are there: that there were some is all that counts.
    pub fn drain(&self) {
        while self.inotify.read_events().is_ok_and(|events| !events.is_empty()) {}
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}
