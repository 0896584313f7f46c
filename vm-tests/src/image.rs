//! The root file system of the host under test: Debian 13 with QEMU from its backports, made once and kept.
//!
//! It lives outside version control, in `.vm-cache/` of the workspace or where `VM_TESTS_CACHE` says, under a name
//! that is a hash of the recipe below: a changed recipe makes a new image, an unchanged one is never rebuilt.

use std::fs::{File, OpenOptions, Permissions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::mirror;
use crate::modules::Dependencies;

const SUITE: &str = "trixie";
const BACKPORTS: &str = "trixie-backports";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

const PACKAGES: &[&str] = &[
    "linux-image-amd64",
    "udev",
    "systemd",
    "usbutils",
    "busybox-static",
    "strace",
    "usbip",
    "procps",
    "iproute2",
    "kmod",
    "e2fsprogs",
    "dmsetup",
    "dosfstools",
    "alsa-utils",
    "usbguard",
    "qemu-system-x86",
    "qemu-system-common",
    "qemu-system-data",
    "seabios",
    "ovmf",
];

/// Only these come from backports: QEMU 10.1 brought `vfio-user-pci`.
const PIN: &str = "Package: qemu-* seabios\\nPin: release n=trixie-backports\\nPin-Priority: 990\\n";

/// Drivers that no virtual machine here has hardware for: two thirds of the modules.
const PRUNED: &str = "drivers/gpu drivers/net/wireless drivers/net/ethernet drivers/infiniband drivers/staging \
    drivers/iio drivers/isdn drivers/platform drivers/hwmon drivers/media/pci drivers/media/tuners drivers/media/dvb-frontends \
    sound/soc sound/pci fs/xfs fs/btrfs fs/ocfs2 fs/ceph fs/gfs2 fs/smb fs/nfs fs/nfsd";

/// Runs on the finished tree (`$1`). Modules are unpacked once here instead of at each load under emulation.
const CUSTOMIZE: &str = r#"#!/bin/sh
set -e
kernel=$(echo "$1"/lib/modules/*)
for directory in $PRUNED; do rm -rf "$kernel/kernel/$directory"; done
find "$kernel" -name '*.ko.xz' -print0 | xargs -0 -P2 -n50 xz -d
chroot "$1" depmod "${kernel##*/}"
rm -rf "$1"/boot/initrd* "$1"/boot/System.map* "$1"/usr/share/locale/* "$1"/usr/share/doc/*
mkdir -p "$1/stage"
"#;

/// A root file system that is ready to boot.
#[derive(Clone, Debug)]
pub struct Image {
    /// The tree.
    pub root: PathBuf,
    /// Version of the kernel in it.
    pub kernel_version: String,
}

impl Image {
    /// The kept image, made now if it does not exist. A second process waits for the first.
    pub fn get() -> Result<Self> {
        let cache = cache_directory()?;
        let place = cache.join(format!("debian-{SUITE}-{:016x}", recipe_hash()));
        if !place.exists() {
            let _alone = lock(&cache.join("image.lock"))?;
            if !place.exists() {
                build(&place).with_context(|| format!("make the image {}", place.display()))?;
            }
        }
        let mut kernels = std::fs::read_dir(place.join("lib/modules"))?;
        let kernel = kernels.next().context("no kernel in the image")??;
        let kernel_version = kernel.file_name().to_string_lossy().into_owned();
        Ok(Self { root: place, kernel_version })
    }

    /// Its kernel, bootable by QEMU and Cloud Hypervisor.
    pub fn kernel(&self) -> PathBuf {
        self.root.join("boot").join(format!("vmlinuz-{}", self.kernel_version))
    }

    /// Where its modules lie.
    pub fn modules(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.kernel_version)
    }

    /// What its modules need.
    pub fn dependencies(&self) -> Result<Dependencies> {
        let path = self.modules().join("modules.dep");
        let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        Ok(Dependencies::parse(&text))
    }
}

/// Where images and locks are kept.
pub fn cache_directory() -> Result<PathBuf> {
    let directory = match std::env::var_os("VM_TESTS_CACHE") {
        Some(directory) => PathBuf::from(directory),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../.vm-cache"),
    };
    std::fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    directory.canonicalize().with_context(|| format!("find {}", directory.display()))
}

/// An exclusive lock on a file, which is made if needed; held until the result is dropped.
pub fn lock(path: &Path) -> Result<Flock<File>> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    let file = file.with_context(|| format!("open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error).context("lock")
}

fn recipe_hash() -> u64 {
    hash_of(&(SUITE, BACKPORTS, PACKAGES, PIN, PRUNED, CUSTOMIZE))
}

/// Of a recipe, for the name of what it makes.
pub(crate) fn hash_of(recipe: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    recipe.hash(&mut hasher);
    hasher.finish()
}

fn build(place: &Path) -> Result<()> {
    let start = Instant::now();
    eprintln!(
        "vm-tests: making the root file system of the virtual host, once (about a minute): {}",
        place.display()
    );
    let uri = mirror::find(Path::new("/etc/apt"))?;
    let partial = place.with_extension("partial");
    remove_tree(&partial)?;
    std::fs::create_dir(&partial)?;

    let mut debootstrap = Command::new("mmdebstrap");
    debootstrap.args(["--variant=minbase", "--format=tar", "--quiet"]);
    debootstrap.arg(if nix::unistd::geteuid().is_root() { "--mode=root" } else { "--mode=unshare" });
    debootstrap.arg(format!("--include={}", PACKAGES.join(",")));
    debootstrap
        .args(["--aptopt=APT::Install-Recommends \"false\"", "--dpkgopt=path-exclude=/usr/share/man/*"]);
    debootstrap.arg("--dpkgopt=path-exclude=/usr/share/locale/*");
    debootstrap.args(proxy_settings().into_iter().map(|setting| format!("--aptopt={setting}")));
    debootstrap.arg(format!("--essential-hook=printf '{PIN}' > \"$1/etc/apt/preferences.d/backports\""));
    let customize = place.with_extension("customize");
    std::fs::write(&customize, CUSTOMIZE)?;
    std::fs::set_permissions(&customize, Permissions::from_mode(0o755))?;
    debootstrap.env("PRUNED", PRUNED).arg(format!("--customize-hook={}", customize.display()));
    debootstrap.args([SUITE, "-"]);
    debootstrap.args([SUITE, BACKPORTS].map(|suite| format!("deb [signed-by={KEYRING}] {uri} {suite} main")));
    let mut debootstrap = debootstrap
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start mmdebstrap (`vm-tests/setup.sh` installs it)")?;
    let archive = debootstrap.stdout.take().context("output of mmdebstrap")?;

    // Device nodes need root and are not needed: the kernel makes its own.
    let mut unpack = Command::new("tar");
    unpack.args(["--extract", "--exclude=./dev/*", "--directory"]).arg(&partial).stdin(archive);
    let unpacked = unpack.status().context("start tar")?;
    let made = debootstrap.wait()?;
    if !made.success() || !unpacked.success() {
        bail!("mmdebstrap: {made}, tar: {unpacked}; the archive was {uri}");
    }
    std::fs::rename(&partial, place)?;
    eprintln!("vm-tests: made it in {:.0?}", start.elapsed());
    Ok(())
}

/// Package tools leave directories without write permission behind; `rm` as their owner copes where `remove_dir_all` may not.
fn remove_tree(path: &Path) -> Result<()> {
    if path.exists() {
        let _ = Command::new("chmod").args(["--recursive", "u+rwX"]).arg(path).status();
        std::fs::remove_dir_all(path).with_context(|| format!("remove {}", path.display()))?;
    }
    Ok(())
}

/// How apt reaches the archive on this machine.
fn proxy_settings() -> Vec<String> {
    let Ok(output) = Command::new("apt-config").arg("dump").output() else { return Vec::new() };
    let settings = String::from_utf8_lossy(&output.stdout).into_owned();
    let wanted = |line: &&str| line.starts_with("Acquire::http") && !line.contains("\"\"");
    settings.lines().filter(wanted).map(|line| line.trim_end_matches(';').to_owned()).collect()
}
