//! How a daemon gives up power: capabilities, new privileges, the file system (Landlock), system calls (seccomp).
//!
//! The mechanism only; what each daemon keeps is in its own `sandbox.rs`. Every step either works or is an error that
//! says what to do: a daemon that cannot confine itself does not start.

use std::collections::BTreeMap;
use std::path::PathBuf;

use caps::{CapSet, CapsHashSet};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// The process could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// Capabilities stay.
    #[error("cannot drop capabilities")]
    Capabilities(#[source] caps::errors::CapsError),
    /// no_new_privs is not set.
    #[error("cannot set no_new_privs")]
    NoNewPrivileges(#[source] nix::Error),
    /// The kernel has no Landlock or it is off.
    #[error(
        "this kernel has no Landlock: it needs Linux 5.13 or newer with \"landlock\" in the lsm= list \
         (see /sys/kernel/security/lsm)"
    )]
    NoLandlock,
    /// A path that must stay usable cannot be opened.
    #[error("cannot keep access to {path}")]
    Path {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: landlock::PathFdError,
    },
    /// Landlock refuses the rule set.
    #[error("Landlock refuses the rule set")]
    Landlock(#[from] landlock::RulesetError),
    /// The filter does not compile: our bug, or an architecture we have no table for.
    #[error("the seccomp filter does not compile for this architecture")]
    Filter(#[source] seccompiler::BackendError),
    /// The kernel refuses the filter.
    #[error("the kernel refuses the seccomp filter: it needs CONFIG_SECCOMP_FILTER")]
    Seccomp(#[source] seccompiler::Error),
}

/// Drops every capability from every set of the calling thread and forbids new privileges. Threads started afterwards
/// inherit both.
pub fn drop_privileges() -> Result<(), ConfineError> {
    let none = CapsHashSet::new();
    // The bounding set can only shrink, and only with CAP_SETPCAP; without it there is nothing to regain anyway
    // once no_new_privs is set.
    if caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP).unwrap_or(false) {
        caps::clear(None, CapSet::Bounding).map_err(ConfineError::Capabilities)?;
    }
    caps::clear(None, CapSet::Ambient).map_err(ConfineError::Capabilities)?;
    // A service manager may have taken the capabilities and capset() with them: what is empty is left alone.
    for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        if !caps::read(None, set).map_err(ConfineError::Capabilities)?.is_empty() {
            caps::set(None, set, &none).map_err(ConfineError::Capabilities)?;
        }
    }
    nix::sys::prctl::set_no_new_privs().map_err(ConfineError::NoNewPrivileges)
}

/// A place in the file system that stays usable under Landlock.
#[derive(Clone, Debug)]
pub enum Keep {
    /// Read files and list directories.
    Read(PathBuf),
    /// Also write to files and devices that exist.
    Write(PathBuf),
    /// Also make, rename and remove files.
    Manage(PathBuf),
}

/// Takes the file system, TCP and abstract sockets and signals to other processes away from the calling thread, except
/// for `keep`. Threads started afterwards inherit it. Paths are opened now: what does not exist is an error.
///
/// Newer rights are taken where the kernel knows them; a kernel without any Landlock is an error.
pub fn landlock(keep: &[Keep]) -> Result<(), ConfineError> {
    const ABI_KNOWN: ABI = ABI::V6;
    let read = AccessFs::from_read(ABI_KNOWN) & !BitFlags::from(AccessFs::Execute);
    let write = read | AccessFs::WriteFile | AccessFs::IoctlDev;
    let manage = write
        | AccessFs::MakeReg
        | AccessFs::MakeDir
        | AccessFs::MakeSock
        | AccessFs::RemoveFile
        | AccessFs::RemoveDir
        | AccessFs::Truncate;
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI_KNOWN))?
        .handle_access(AccessNet::from_all(ABI_KNOWN))?
        .scope(Scope::from_all(ABI_KNOWN))?
        .create()?;
    for place in keep {
        let (path, access) = match place {
            Keep::Read(path) => (path, read),
            Keep::Write(path) => (path, write),
            Keep::Manage(path) => (path, manage),
        };
        let fd = PathFd::new(path).map_err(|source| ConfineError::Path { path: path.clone(), source })?;
        ruleset = ruleset.add_rule(PathBeneath::new(fd, access))?;
    }
    match ruleset.restrict_self()?.ruleset {
        RulesetStatus::NotEnforced => Err(ConfineError::NoLandlock),
        RulesetStatus::PartiallyEnforced | RulesetStatus::FullyEnforced => Ok(()),
    }
}

/// How far a system call is allowed.
#[derive(Clone, Copy, Debug)]
pub enum Allow {
    /// With any arguments.
    Any,
    /// When the low 32 bits of argument `.0` (0 and up) are one of `.1`.
    OneOf(u8, &'static [u32]),
    /// When none of the bits `.1` is set in argument `.0`.
    Without(u8, u32),
    /// When argument `.0` is this process.
    OnOurselves(u8),
}

/// What every Rust program on this C library calls while it runs, whatever it is for.
const EVERY_DAEMON: &[(libc::c_long, Allow)] = &[
    (libc::SYS_read, Allow::Any),
    (libc::SYS_write, Allow::Any),
    (libc::SYS_close, Allow::Any),
    // Memory, never executable.
    (libc::SYS_mmap, Allow::Without(2, libc::PROT_EXEC as u32)),
    (libc::SYS_mprotect, Allow::Without(2, libc::PROT_EXEC as u32)),
    (libc::SYS_munmap, Allow::Any),
    (libc::SYS_mremap, Allow::Any),
    (libc::SYS_madvise, Allow::Any),
    (libc::SYS_brk, Allow::Any),
    // Threads sleep and wake; they were started before.
    (libc::SYS_futex, Allow::Any),
    (libc::SYS_sched_yield, Allow::Any),
    (libc::SYS_clock_gettime, Allow::Any),
    (libc::SYS_clock_nanosleep, Allow::Any),
    (libc::SYS_restart_syscall, Allow::Any),
    // Keys of hash tables.
    (libc::SYS_getrandom, Allow::Any),
    // Signals and the end. tgkill only for abort().
    (libc::SYS_rt_sigreturn, Allow::Any),
    (libc::SYS_rt_sigprocmask, Allow::Any),
    (libc::SYS_rt_sigaction, Allow::Any),
    (libc::SYS_sigaltstack, Allow::Any),
    (libc::SYS_getpid, Allow::Any),
    (libc::SYS_gettid, Allow::Any),
    (libc::SYS_tgkill, Allow::OneOf(2, &[libc::SIGABRT as u32])),
    (libc::SYS_exit, Allow::Any),
    (libc::SYS_exit_group, Allow::Any),
];

/// Refuses with EPERM, in all threads of the process, every system call that is neither in `own` nor among those of
/// every daemon: memory without execution, time, sleeping and waking, signals, the end. It cannot be undone.
///
/// Refused calls do not kill: for a guest's only USB controller, a library that probes for something is no reason to
/// end, and a call that never runs does no harm.
pub fn seccomp(own: &[(libc::c_long, Allow)]) -> Result<(), ConfineError> {
    let compile = || -> Result<BpfProgram, seccompiler::BackendError> {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for &(call, allow) in EVERY_DAEMON.iter().chain(own) {
            let conditions = match allow {
                Allow::Any => Vec::new(),
                Allow::OneOf(argument, values) => values
                    .iter()
                    .map(|&value| condition(argument, SeccompCmpOp::Eq, value))
                    .collect::<Result<_, _>>()?,
                Allow::Without(argument, bits) => {
                    vec![condition(argument, SeccompCmpOp::MaskedEq(bits.into()), 0)?]
                }
                Allow::OnOurselves(argument) => {
                    vec![condition(argument, SeccompCmpOp::Eq, std::process::id())?]
                }
            };
            rules.entry(call).or_default().extend(conditions);
        }
        let architecture = std::env::consts::ARCH.try_into()?;
        let refuse = SeccompAction::Errno(libc::EPERM as u32);
        SeccompFilter::new(rules, refuse, SeccompAction::Allow, architecture)?.try_into()
    };
    let program = compile().map_err(ConfineError::Filter)?;
    seccompiler::apply_filter_all_threads(&program).map_err(ConfineError::Seccomp)
}

fn condition(
    argument: u8,
    operator: SeccompCmpOp,
    value: u32,
) -> Result<SeccompRule, seccompiler::BackendError> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value.into())?;
    SeccompRule::new(vec![condition])
}
