//! What a taken-over usbpolicyd could still do: what it must not is tried inside the sandbox and refused.
//!
//! The sandbox cannot be left, so each test runs itself again as a child (`USBPOLICYD_SANDBOX_CHILD`) and tries there.

#![expect(clippy::unwrap_used, reason = "a test says by its panic what went wrong")]

use std::process::Command;

use clap::Parser as _;
use nix::errno::Errno;
use usbpolicyd::cli::Cli;
use usbpolicyd::sandbox;

const CHILD: &str = "USBPOLICYD_SANDBOX_CHILD";

/// Runs the test named `test` again, alone and as the child.
fn run_child(test: &str) {
    let program = std::env::current_exe().unwrap();
    let output =
        Command::new(program).args(["--exact", test, "--nocapture"]).env(CHILD, "1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("all tried"), "the child did not get to its end: {text}");
}

fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

fn cli(state: &std::path::Path) -> Cli {
    let state = state.to_str().unwrap();
    Cli::try_parse_from(["usbpolicyd", "--state-dir", state, "--order-dir", state]).unwrap()
}

#[expect(unsafe_code, reason = "the calls under test have no safe form that reaches the kernel unchanged")]
fn try_call(number: libc::c_long, arguments: [libc::c_long; 4]) -> Result<libc::c_long, Errno> {
    let [a, b, c, d] = arguments;
    // SAFETY: each caller passes null or static pointers; a call that is refused touches nothing.
    Errno::result(unsafe { libc::syscall(number, a, b, c, d) })
}

#[test]
fn forbidden_system_calls_are_refused() {
    if !is_child() {
        return run_child("forbidden_system_calls_are_refused");
    }
    let path = c"/etc/hostname".as_ptr() as libc::c_long;
    let cwd = libc::AT_FDCWD.into();
    let dir = tempfile::tempdir().unwrap();
    sandbox::close_file_system(&cli(dir.path())).unwrap();
    sandbox::close_system_calls().unwrap();
    for (name, number, arguments) in [
        ("socket(AF_INET)", libc::SYS_socket, [libc::AF_INET.into(), libc::SOCK_STREAM.into(), 0, 0]),
        ("socket(AF_PACKET)", libc::SYS_socket, [libc::AF_PACKET.into(), libc::SOCK_RAW.into(), 0, 0]),
        ("bind", libc::SYS_bind, [0, 0, 0, 0]),
        ("execve", libc::SYS_execve, [path, 0, 0, 0]),
        ("clone3", libc::SYS_clone3, [0, 0, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [0, 0, 0, 0]),
        ("kill", libc::SYS_kill, [1, 0, 0, 0]),
        ("unlinkat", libc::SYS_unlinkat, [cwd, path, 0, 0]),
        ("mmap executable", libc::SYS_mmap, [0, 4096, libc::PROT_EXEC.into(), libc::MAP_PRIVATE.into()]),
        ("ioctl SUBMITURB", libc::SYS_ioctl, [0, 0x8038_550a, 0, 0]),
        ("ioctl CONTROL", libc::SYS_ioctl, [0, 0xc018_5500, 0, 0]),
        ("ioctl CLAIMINTERFACE", libc::SYS_ioctl, [0, 0x8004_550f, 0, 0]),
    ] {
        assert_eq!(try_call(number, arguments), Err(Errno::EPERM), "{name}");
    }
    for request in sandbox::USBFS_IOCTLS {
        // fd 0 is no usbfs node; the kernel itself says so.
        let answer = try_call(libc::SYS_ioctl, [0, request.into(), 0, 0]);
        assert!(matches!(answer, Err(Errno::ENOTTY | Errno::EINVAL)), "{request:#x}: {answer:?}");
    }
    println!("all tried");
}

#[test]
fn only_its_own_files_can_be_made_and_secrets_cannot_be_read() {
    if !is_child() {
        return run_child("only_its_own_files_can_be_made_and_secrets_cannot_be_read");
    }
    let dir = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    std::fs::write(other.path().join("secret"), "x").unwrap();
    sandbox::close_file_system(&cli(dir.path())).unwrap();
    for path in ["/etc/shadow", "/etc/hostname", "/root", "/dev/null"] {
        let error = std::fs::File::open(path).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EACCES), "{path}");
    }
    assert!(std::fs::read(other.path().join("secret")).is_err());
    assert!(std::fs::write(other.path().join("new"), "x").is_err());
    std::fs::write(dir.path().join("draft"), "x").unwrap();
    std::fs::rename(dir.path().join("draft"), dir.path().join("given.json")).unwrap();
    assert!(std::fs::read_to_string("/proc/swaps").is_ok());
    println!("all tried");
}

#[test]
fn what_the_sysfs_service_does_not_need_is_refused() {
    if !is_child() {
        return run_child("what_the_sysfs_service_does_not_need_is_refused");
    }
    let made_up = tempfile::tempdir().unwrap();
    for directory in ["devices", "bus", "kernel"] {
        std::fs::create_dir(made_up.path().join(directory)).unwrap();
        std::fs::write(made_up.path().join(directory).join("attribute"), "1\n").unwrap();
    }
    usbpolicyd::sysfs_write::service::confine(made_up.path().to_str().unwrap()).unwrap();
    let write = |place: &str| {
        let path = made_up.path().join(place).join("attribute");
        std::fs::OpenOptions::new().write(true).open(path).map(drop).map_err(|error| error.raw_os_error())
    };
    assert_eq!(write("devices"), Ok(()));
    for place in ["bus", "kernel"] {
        assert_eq!(write(place), Err(Some(libc::EACCES)), "{place}");
    }
    assert!(std::fs::read(made_up.path().join("bus/attribute")).is_ok());
    assert!(std::fs::read(made_up.path().join("kernel/attribute")).is_err());
    assert!(std::fs::read("/etc/passwd").is_err());
    let path = c"/sys".as_ptr() as libc::c_long;
    for (name, number, arguments) in [
        ("socket", libc::SYS_socket, [libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0, 0]),
        ("connect", libc::SYS_connect, [0, 0, 0, 0]),
        ("execve", libc::SYS_execve, [path, 0, 0, 0]),
        ("clone3", libc::SYS_clone3, [0, 0, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [0, 0, 0, 0]),
        ("kill", libc::SYS_kill, [1, 0, 0, 0]),
        ("mount", libc::SYS_mount, [path, path, path, 0]),
        ("renameat2", libc::SYS_renameat2, [0, path, 0, path]),
        ("unlinkat", libc::SYS_unlinkat, [0, path, 0, 0]),
        ("fchownat", libc::SYS_fchownat, [0, path, 0, 0]),
        ("ioctl", libc::SYS_ioctl, [0, 0, 0, 0]),
    ] {
        assert_eq!(try_call(number, arguments), Err(Errno::EPERM), "{name}");
    }
    println!("all tried");
}
