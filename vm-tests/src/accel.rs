//! How the host under test gets its processor: from KVM if that can run a stock kernel that can run guests, else emulated.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::image;

/// A way to run a virtual machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// The real processor.
    Kvm,
    /// QEMU's emulation, with AMD SVM and nested paging inside.
    Tcg,
}

impl Accel {
    /// For QEMU's command line. Linux copies and clears memory by `rep movsb` and `rep stosb` where the processor says that
    /// it is good at them; the emulation does them byte by byte, and is better at plain moves. And QEMU before 8.0 takes the
    /// flags behind `cmpxchg16b`, on the fast path of the kernel's allocator, from a register that may hold anything: an
    /// interrupt there saves and restores garbage ("Oops" with `EFLAGS: 04da8742` in `kmem_cache_alloc_node`).
    pub fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max,-erms,-fsrm,-la57,-smap,-cx16"],
        }
    }

    /// Number of processors, for QEMU's `-smp`. One when emulated: Linux rewrites its own code while it runs (static
    /// branches, `arch/x86/kernel/alternative.c text_poke_bp`), and QEMU lets another emulated processor run the
    /// half-written instruction when this machine is busy. The kernel under test then dies of "Oops: int3".
    pub fn processors(self) -> &'static str {
        match self {
            Self::Kvm => "2",
            Self::Tcg => "1",
        }
    }
}

/// What to try, in this order. KVM is tried once per boot of this machine: it may be there and still be of no use.
pub fn candidates() -> Result<Vec<Accel>> {
    let usable = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    let known = std::fs::read_to_string(memory()?).ok();
    Ok(match known.as_deref() {
        Some("no") => vec![Accel::Tcg],
        _ if usable => vec![Accel::Kvm, Accel::Tcg],
        _ => vec![Accel::Tcg],
    })
}

/// Keeps what came out.
pub fn remember(accel: Accel, works: bool) -> Result<()> {
    if accel == Accel::Kvm {
        std::fs::write(memory()?, if works { "yes" } else { "no" })?;
    }
    Ok(())
}

fn memory() -> Result<PathBuf> {
    let boot = std::fs::read_to_string(Path::new("/proc/sys/kernel/random/boot_id")).unwrap_or_default();
    Ok(image::cache_directory()?.join(format!("kvm-{}", boot.trim())))
}
