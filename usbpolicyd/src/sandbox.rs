//! What usbpolicyd keeps after start: sysfs and procfs to read, device nodes to open, its own files, sockets to
//! usbvfiods. No programs, no network, no other files; of the device ioctls only those that hand devices over and back,
//! so a usbpolicyd that was taken over cannot read a keyboard or write a disk by them.

use std::path::{Path, PathBuf};

use common::confine::{self, Allow, ConfineError, Keep};
use nix::unistd::{Gid, Group, User, getgrouplist};

use crate::cli::Cli;
use crate::policy_files::{LOCAL_DIR, VENDOR_DIR};

/// usbfs ioctls by number (`linux/usbdevice_fs.h`), the same on x86-64 and aarch64. Not in here: all that moves data.
pub const USBFS_IOCTLS: [u32; 9] = [
    0x4104_5508, // GETDRIVER
    0xc010_5512, // IOCTL: driver connect and disconnect
    0x8018_5520, // CONNINFO_EX
    0x8004_5505, // SETCONFIGURATION
    0x0000_5514, // RESET
    0x8004_5518, // CLAIM_PORT
    0x8004_5519, // RELEASE_PORT
    0x8004_551a, // GET_CAPABILITIES
    0x4004_551e, // DROP_PRIVILEGES
];

/// Sockets it may make: UNIX to usbvfiods and to the service manager, netlink for what the name service asks.
const FAMILIES: [u32; 2] = [libc::AF_UNIX as u32, libc::AF_NETLINK as u32];

const FCNTL_COMMANDS: [u32; 5] = [
    libc::F_GETFL as u32,
    libc::F_SETFL as u32,
    libc::F_GETFD as u32,
    libc::F_SETFD as u32,
    libc::F_DUPFD_CLOEXEC as u32,
];

/// The system calls that stay, beside those of every daemon.
const CALLS: &[(libc::c_long, Allow)] = &[
    // The loop.
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_poll, Allow::Any),
    (libc::SYS_ppoll, Allow::Any),
    (libc::SYS_writev, Allow::Any),
    (libc::SYS_fcntl, Allow::OneOf(1, &FCNTL_COMMANDS)),
    // Sockets: usbvfiods, usbpolicyctl, udev, routes, the service manager, the journal.
    (libc::SYS_socket, Allow::OneOf(0, &FAMILIES)),
    (libc::SYS_connect, Allow::Any),
    (libc::SYS_accept4, Allow::Any),
    (libc::SYS_sendmsg, Allow::Any),
    (libc::SYS_sendto, Allow::Any),
    (libc::SYS_recvmsg, Allow::Any),
    (libc::SYS_recvfrom, Allow::Any),
    (libc::SYS_getsockopt, Allow::Any),
    (libc::SYS_setsockopt, Allow::Any),
    (libc::SYS_getsockname, Allow::Any),
    (libc::SYS_inotify_add_watch, Allow::Any),
    (libc::SYS_timerfd_settime, Allow::Any),
    // sysfs, procfs, the policy, its own files; Landlock says which.
    (libc::SYS_openat, Allow::Any),
    (libc::SYS_getdents64, Allow::Any),
    (libc::SYS_readlinkat, Allow::Any),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_readlink, Allow::Any),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_newfstatat, Allow::Any),
    (libc::SYS_statx, Allow::Any),
    (libc::SYS_fstat, Allow::Any),
    (libc::SYS_fstatfs, Allow::Any),
    (libc::SYS_faccessat, Allow::Any),
    (libc::SYS_faccessat2, Allow::Any),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_access, Allow::Any),
    (libc::SYS_lseek, Allow::Any),
    (libc::SYS_pread64, Allow::Any),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_rename, Allow::Any),
    (libc::SYS_renameat, Allow::Any),
    (libc::SYS_renameat2, Allow::Any),
    (libc::SYS_fsync, Allow::Any),
    // Devices: hand over and back, nothing that moves data.
    (libc::SYS_ioctl, Allow::OneOf(1, &USBFS_IOCTLS)),
    (libc::SYS_getuid, Allow::Any),
    (libc::SYS_geteuid, Allow::Any),
    (libc::SYS_getgid, Allow::Any),
    (libc::SYS_getegid, Allow::Any),
];

/// First half, before the workers start: no capability, no new privilege, only the files it needs. Threads inherit it.
pub fn close_file_system(cli: &Cli) -> Result<(), ConfineError> {
    load_name_service();
    confine::drop_privileges()?;
    confine::landlock(&keep(cli))
}

/// Second half, when everything is open and all threads run: only the listed system calls, in every thread.
pub fn close_system_calls() -> Result<(), ConfineError> {
    confine::seccomp(CALLS)
}

/// What stays. Paths that do not exist cannot be kept; they are of no use either until the next start.
fn keep(cli: &Cli) -> Vec<Keep> {
    let policy = cli.policy.as_deref().map(|file| match file.parent() {
        // The directory and not the file, which is replaced when it is edited.
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    });
    let vendor = Path::new(VENDOR_DIR).parent().map(Path::to_owned);
    let local = Path::new(LOCAL_DIR).parent().map(Path::to_owned);
    let read =
        ["/proc", "/sys", "/run", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf"].map(PathBuf::from);
    let read = read.into_iter().chain([cli.run_dir.clone()]).chain(policy).chain(vendor).chain(local);
    let write = ["/dev/bus/usb"].map(PathBuf::from);
    let manage = [cli.state_dir.clone(), cli.order_dir.clone()];
    let all = read
        .map(Keep::Read)
        .chain(write.into_iter().map(Keep::Write))
        .chain(manage.into_iter().map(Keep::Manage));
    all.filter(|one| match one {
        Keep::Read(path) | Keep::Write(path) | Keep::Manage(path) => path.exists(),
    })
    .collect()
}

/// Makes the C library load its name service modules now: later it could not.
fn load_name_service() {
    const NOBODY: &str = "usbpolicyd-looks-for-nobody";
    let _ = User::from_name(NOBODY);
    let _ = Group::from_name(NOBODY);
    if let Ok(name) = std::ffi::CString::new(NOBODY) {
        let _ = getgrouplist(&name, Gid::from_raw(0));
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[test]
    fn ioctls_that_move_data_are_not_kept() {
        // CONTROL, BULK, SUBMITURB, CLAIMINTERFACE, DISCONNECT_CLAIM, SETINTERFACE.
        for number in [0xc018_5500, 0xc018_5502, 0x8038_550a, 0x8004_550f, 0x8108_551b, 0x8008_5504] {
            assert!(!USBFS_IOCTLS.contains(&number));
        }
    }

    #[test]
    fn directory_of_the_policy_is_kept_to_read_only() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("policy.toml");
        let cli = Cli::try_parse_from(["usbpolicyd", "--policy", file.to_str().unwrap()]).unwrap();
        let kept = keep(&cli);
        assert!(kept.iter().any(|one| matches!(one, Keep::Read(path) if path == dir.path())));
        assert!(!kept.iter().any(|one| matches!(one, Keep::Manage(path) if path == Path::new("/etc"))));
    }
}
