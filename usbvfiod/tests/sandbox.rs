//! What a taken-over usbvfiod could still do: each forbidden call is tried inside the sandbox and refused.
//!
//! The sandbox cannot be left, so the test runs itself again as a child (`USBVFIOD_SANDBOX_CHILD`) and tries there.

#![expect(clippy::unwrap_used, reason = "a test says by its panic what went wrong")]

use std::process::Command;

use nix::errno::Errno;

const CHILD: &str = "USBVFIOD_SANDBOX_CHILD";

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

fn enter() {
    usbvfiod::sandbox::close_file_system().unwrap();
    usbvfiod::sandbox::close_system_calls().unwrap();
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
    enter();
    for (name, number, arguments) in [
        ("openat", libc::SYS_openat, [cwd, path, 0, 0]),
        ("openat2", libc::SYS_openat2, [cwd, path, 0, 0]),
        ("socket", libc::SYS_socket, [libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0, 0]),
        ("connect", libc::SYS_connect, [0, 0, 0, 0]),
        ("bind", libc::SYS_bind, [0, 0, 0, 0]),
        ("execve", libc::SYS_execve, [path, 0, 0, 0]),
        ("execveat", libc::SYS_execveat, [cwd, path, 0, 0]),
        ("clone", libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0, 0]),
        ("clone3", libc::SYS_clone3, [0, 0, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [0, 0, 0, 0]),
        ("kill", libc::SYS_kill, [1, 0, 0, 0]),
        ("unlinkat", libc::SYS_unlinkat, [cwd, path, 0, 0]),
        ("mmap executable", libc::SYS_mmap, [0, 4096, libc::PROT_EXEC.into(), libc::MAP_PRIVATE.into()]),
        ("fcntl(F_DUPFD)", libc::SYS_fcntl, [0, libc::F_DUPFD.into(), 0, 0]),
        ("tgkill(SIGKILL)", libc::SYS_tgkill, [1, 1, libc::SIGKILL.into(), 0]),
        ("process_vm_readv of another", libc::SYS_process_vm_readv, [1, 0, 0, 0]),
        ("process_vm_writev of another", libc::SYS_process_vm_writev, [1, 0, 0, 0]),
    ] {
        assert_eq!(try_call(number, arguments), Err(Errno::EPERM), "{name}");
    }
    let ourselves = libc::c_long::from(std::process::id());
    assert_ne!(
        try_call(libc::SYS_process_vm_writev, [ourselves, 0, 0, 0]),
        Err(Errno::EPERM),
        "our own memory"
    );
    println!("all tried");
}

#[test]
fn forbidden_ioctls_are_refused_and_listed_ones_reach_the_kernel() {
    if !is_child() {
        return run_child("forbidden_ioctls_are_refused_and_listed_ones_reach_the_kernel");
    }
    enter();
    let forbidden: [libc::c_long; 7] = [
        0xc010_5512, // IOCTL: connect and disconnect drivers
        0x8004_5518, // CLAIM_PORT
        0x8004_5519, // RELEASE_PORT
        0xc018_5502, // BULK, synchronous
        0x4008_550c, // REAPURB, blocking
        0x4004_551e, // DROP_PRIVILEGES
        0x5413,      // TIOCGWINSZ
    ];
    for request in forbidden {
        assert_eq!(try_call(libc::SYS_ioctl, [0, request, 0, 0]), Err(Errno::EPERM), "{request:#x}");
    }
    for request in usbvfiod::sandbox::USBFS_IOCTLS {
        // fd 0 is no usbfs node; the kernel itself says so.
        let answer = try_call(libc::SYS_ioctl, [0, request.into(), 0, 0]);
        assert!(matches!(answer, Err(Errno::ENOTTY | Errno::EINVAL)), "{request:#x}: {answer:?}");
    }
    println!("all tried");
}

#[test]
fn the_file_system_is_closed_by_landlock_alone() {
    if !is_child() {
        return run_child("the_file_system_is_closed_by_landlock_alone");
    }
    usbvfiod::sandbox::close_file_system().unwrap();
    for path in ["/etc/hostname", "/dev/null", "/proc/self/status", "/sys", "/"] {
        let error = std::fs::File::open(path).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EACCES), "{path}");
    }
    println!("all tried");
}

#[test]
fn no_capability_is_left_and_none_can_come_back() {
    if !is_child() {
        return run_child("no_capability_is_left_and_none_can_come_back");
    }
    let status = std::fs::File::open("/proc/thread-self/status").unwrap();
    enter();
    let text = std::io::read_to_string(status).unwrap();
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert!(text.contains(&format!("{set}:\t0000000000000000")), "{text}");
    }
    assert!(text.contains("NoNewPrivs:\t1"), "{text}");
    println!("all tried");
}

#[test]
fn threads_started_before_are_confined_too() {
    if !is_child() {
        return run_child("threads_started_before_are_confined_too");
    }
    usbvfiod::sandbox::close_file_system().unwrap();
    let (ready, started) = std::sync::mpsc::channel();
    let (go, wait) = std::sync::mpsc::channel();
    let lane = std::thread::spawn(move || {
        // A thread that is not through libc's own start yet (rseq) would be killed by the filter.
        ready.send(()).unwrap();
        wait.recv().unwrap();
        try_call(libc::SYS_socket, [libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0, 0])
    });
    started.recv().unwrap();
    usbvfiod::sandbox::close_system_calls().unwrap();
    go.send(()).unwrap();
    assert_eq!(lane.join().unwrap(), Err(Errno::EPERM));
    println!("all tried");
}
