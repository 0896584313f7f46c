//! What usbvfiod keeps after start: the files it has and is handed, memory, time, and the calls to use them.
//!
//! No file system, no new sockets, no programs, no threads. The device ioctls are named one by one, so even a process
//! taken over by a guest can do to a device only what the emulation does; it cannot give ports or drivers away.

use common::confine::{self, Allow, ConfineError};

/// usbfs ioctls by number (`linux/usbdevice_fs.h`), the same on x86-64 and aarch64. Not in here, on purpose: IOCTL
/// (driver connect and disconnect), CLAIM_PORT, RELEASE_PORT, the synchronous CONTROL and BULK, the blocking REAPURB,
/// DROP_PRIVILEGES, DISCSIGNAL, GETDRIVER.
pub const USBFS_IOCTLS: [u32; 17] = [
    0x8038_550a, // SUBMITURB
    0x4008_550d, // REAPURBNDELAY
    0x0000_550b, // DISCARDURB
    0x8004_550f, // CLAIMINTERFACE
    0x8004_5510, // RELEASEINTERFACE
    0x8108_551b, // DISCONNECT_CLAIM
    0x8008_5504, // SETINTERFACE
    0x8004_5505, // SETCONFIGURATION
    0x8004_5515, // CLEAR_HALT
    0x0000_5514, // RESET
    0x8004_551a, // GET_CAPABILITIES
    0x0000_551f, // GET_SPEED
    0x8018_5520, // CONNINFO_EX
    0x8008_551c, // ALLOC_STREAMS
    0x8008_551d, // FREE_STREAMS
    0x0000_5521, // FORBID_SUSPEND
    0x0000_5522, // ALLOW_SUSPEND
];

/// File descriptor commands: look at what was handed over, nothing that makes files.
const FCNTL_COMMANDS: [u32; 5] = [
    libc::F_GETFL as u32,
    libc::F_SETFL as u32,
    libc::F_GETFD as u32,
    libc::F_SETFD as u32,
    libc::F_GET_SEALS as u32,
];

/// The system calls that stay, beside those of every daemon, each with the reason it is needed.
const CALLS: &[(libc::c_long, Allow)] = &[
    // The event loop and what it waits for.
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_epoll_wait, Allow::Any),
    (libc::SYS_epoll_pwait, Allow::Any),
    (libc::SYS_epoll_ctl, Allow::Any),
    (libc::SYS_timerfd_settime, Allow::Any),
    // vfio-user and the policy channel: connections come in, none go out.
    (libc::SYS_accept4, Allow::Any),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_poll, Allow::Any),
    (libc::SYS_ppoll, Allow::Any),
    (libc::SYS_recvmsg, Allow::Any),
    (libc::SYS_sendmsg, Allow::Any),
    (libc::SYS_getsockopt, Allow::Any),
    (libc::SYS_shutdown, Allow::Any),
    (libc::SYS_fcntl, Allow::OneOf(1, &FCNTL_COMMANDS)),
    // signalfd, log lines, descriptors of a device, guest memory that is not safe to map.
    (libc::SYS_pread64, Allow::Any),
    (libc::SYS_pwrite64, Allow::Any),
    (libc::SYS_process_vm_readv, Allow::OnOurselves(0)),
    (libc::SYS_process_vm_writev, Allow::OnOurselves(0)),
    (libc::SYS_lseek, Allow::Any),
    (libc::SYS_writev, Allow::Any),
    (libc::SYS_fstat, Allow::Any),
    (libc::SYS_fstatfs, Allow::Any),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_newfstatat, Allow::Without(3, !(libc::AT_EMPTY_PATH as u32))),
    (libc::SYS_statx, Allow::Any),
    // Devices.
    (libc::SYS_ioctl, Allow::OneOf(1, &USBFS_IOCTLS)),
];

/// First half, before the lanes start: no capability, no new privilege, no file system, no network. Threads inherit it.
pub fn close_file_system() -> Result<(), ConfineError> {
    confine::drop_privileges()?;
    confine::landlock(&[])
}

/// Second half, when all sockets are bound and all threads run: only the listed system calls, in every thread.
pub fn close_system_calls() -> Result<(), ConfineError> {
    confine::seccomp(CALLS)
}
