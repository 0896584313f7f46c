//! A host without emulation: Linux as a process on this machine's real processor (User-Mode Linux), with the root file
//! system, the udev and the USB stack of a Debian host, and the kernel's own virtual devices. It has no KVM, so no guests.
//!
//! For measurements of what happens in the host alone. A system call costs it some microseconds more than a usual kernel.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::image::{self, Image};
use crate::{binaries, mirror, progress};

/// Beyond the defaults of the architecture. USB wants PCI, which User-Mode Linux has only over virtio. It can sleep, and
/// its clock wakes it, on one processor only.
const CONFIG: &str = "\
VIRTIO_UML PCI UML_PCI_OVER_VIRTIO SUSPEND RTC_CLASS UML_RTC USB_SUPPORT USB USB_ANNOUNCE_NEW_DEVICES USB_GADGET USB_DUMMY_HCD \
USB_CONFIGFS USB_CONFIGFS_MASS_STORAGE USB_CONFIGFS_F_HID USB_CONFIGFS_ACM USB_CONFIGFS_F_LB_SS USB_STORAGE SCSI \
BLK_DEV_SD USBIP_CORE USBIP_VHCI_HCD CONFIGFS_FS HID HIDRAW HID_GENERIC USB_HID INPUT INPUT_EVDEV DEVTMPFS TMPFS \
HOSTFS OVERLAY_FS NET UNIX INOTIFY_USER SIGNALFD TIMERFD EPOLL FHANDLE CGROUPS MEMFD_CREATE SECCOMP \
SECCOMP_FILTER SECURITY SECURITYFS SECURITY_LANDLOCK HIGH_RES_TIMERS DEBUG_FS";
/// Without what takes time to compile and has no use here.
const CONFIG_OFF: &str = "WIRELESS WLAN ETHERNET NETDEVICES SOUND DRM VT IP_PNP MODULES";
/// Landlock has to be named.
const SECURITY_MODULES: &str = "landlock";

/// The newest kernel of the backports: since 6.16 a system call of User-Mode Linux needs no ptrace.
const BUILD: &str = r#"
set -e
cd "$1"
mkdir -p lists/partial archives/partial
printf 'deb %s %s main\n' "$MIRROR" trixie-backports > sources.list
apt() {
    command="$1"; shift
    "$command" -o Dir::Etc::sourcelist="$PWD/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State::lists="$PWD/lists" \
        -o Dir::Cache="$PWD" -o APT::Sandbox::User=root "$@"
}
for program in flex bison bc make gcc xz; do
    command -v $program >/dev/null || { echo "no $program: apt-get install flex bison bc make gcc xz-utils" >&2; exit 1; }
done
apt apt-get --quiet update
package=$(apt apt-cache search --names-only '^linux-source-[0-9.]*$' | cut -d ' ' -f 1 | sort --version-sort | tail -n 1)
apt apt-get --quiet download "$package"
dpkg --extract "$package"_*.deb .
tar --extract --file usr/src/"$package".tar.xz
cd "$package"
export ARCH=um
make --silent defconfig
for option in $CONFIG_OFF; do scripts/config --disable $option; done
for option in $CONFIG; do scripts/config --enable $option; done
scripts/config --set-str LSM "$SECURITY_MODULES"
make --silent olddefconfig
for option in $CONFIG; do
    grep -q "^CONFIG_$option=y" .config || { echo "$package has no $option" >&2; exit 1; }
done
make --silent --jobs="$(nproc)" linux
strip -o ../linux linux
"#;

/// First process: Debian's root with a writable layer in memory. `$IMAGE` and `$STAGE` are directories of this machine.
const INIT: &str = r#"#!/bin/busybox sh
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t sysfs sysfs /sys
$bb mount -t hostfs -o $IMAGE none /image
$bb mount -t tmpfs tmpfs /layer
$bb mkdir /layer/upper /layer/work
$bb mount -t overlay -o lowerdir=/image,upperdir=/layer/upper,workdir=/layer/work overlay /root
$bb mount -t devtmpfs devtmpfs /root/dev
for place in proc sys; do $bb mount --move /$place /root/$place; done
$bb mount -t hostfs -o $STAGE none /root/stage
exec $bb chroot /root /bin/sh /stage/start
"#;

/// Second part: as `host-start.sh` does, as far as it is needed.
const START: &str = r#"
export PATH=/stage/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 NO_COLOR=1
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t configfs configfs /sys/kernel/config
mount -t debugfs debugfs /sys/kernel/debug
# Everything is in the kernel.
ln -sf /bin/true /usr/sbin/modprobe
ip link set lo up
/usr/lib/systemd/systemd-udevd --daemon
udevadm trigger --action=add
udevadm settle
sh -e /stage/script > /stage/output 2>&1
echo $? > /stage/status
sync
echo o > /proc/sysrq-trigger
sleep 60
"#;

/// Boot and shutdown, beside what the script takes.
const BOOT_WITHIN: Duration = Duration::from_secs(60);

/// The kernel, made now if it was not yet; that takes ten minutes or so.
fn kernel() -> Result<PathBuf> {
    let recipe = (CONFIG, CONFIG_OFF, SECURITY_MODULES, BUILD);
    let cache = image::cache_directory()?;
    let place = cache.join(format!("uml-{:016x}", image::hash_of(&recipe)));
    let kernel = place.join("linux");
    let _alone = image::lock(&cache.join("uml.lock"))?;
    if kernel.exists() {
        return Ok(kernel);
    }
    progress("making User-Mode Linux, once (ten minutes or so)");
    let directory = tempfile::Builder::new().prefix("uml-").tempdir_in(&cache)?;
    let mut build = Command::new("sh");
    build.args(["-c", BUILD, "sh"]).arg(directory.path()).stdin(Stdio::null());
    build.env("MIRROR", mirror::find(Path::new("/etc/apt"))?);
    for (name, value) in
        [("CONFIG", CONFIG), ("CONFIG_OFF", CONFIG_OFF), ("SECURITY_MODULES", SECURITY_MODULES)]
    {
        build.env(name, value);
    }
    let status = build.status().context("start sh")?;
    ensure!(status.success(), "User-Mode Linux could not be made: {status}; see above");
    std::fs::create_dir_all(&place)?;
    std::fs::rename(directory.path().join("linux"), &kernel).context("keep the kernel")?;
    Ok(kernel)
}

/// Boots, runs a script with these programs of ours, and gives what it said. `files`: more of `/stage`, by name.
pub fn run(programs: &[&str], files: &[(&str, &str)], script: &str, within: Duration) -> Result<String> {
    let (kernel, image) = (kernel()?, Image::get()?);
    let directory = tempfile::Builder::new().prefix("uml-").tempdir()?;
    let at = |name: &str| directory.path().join(name);
    let (root, stage) = (at("root"), at("stage"));
    for place in ["bin", "proc", "sys", "dev", "image", "layer", "root"] {
        std::fs::create_dir_all(root.join(place))?;
    }
    std::fs::copy(image.root.join("usr/bin/busybox"), root.join("bin/busybox")).context("copy busybox")?;
    let of = |path: &Path| path.display().to_string();
    let init = INIT.replace("$IMAGE", &of(&image.root)).replace("$STAGE", &of(&stage));
    std::fs::write(root.join("init"), init)?;
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(root.join("init"), executable)?;
    std::fs::create_dir_all(stage.join("bin"))?;
    for program in programs {
        binaries::stage(&binaries::directory()?.join(program), &stage.join("bin").join(program))?;
    }
    binaries::stage_packaging(&stage)?;
    for (name, text) in [("start", START), ("script", script)].iter().chain(files) {
        std::fs::write(stage.join(name), text).with_context(|| format!("write {name}"))?;
    }
    progress("booting User-Mode Linux");
    let console = std::fs::File::create(at("console"))?;
    let mut linux = Command::new(kernel)
        .args(["mem=1G", "root=/dev/root", "rootfstype=hostfs", "rw", "init=/init", "quiet", "seccomp=on"])
        .args(["con=null", "con0=fd:0,fd:1", "dummy_hcd.num=4", "dummy_hcd.is_super_speed=1"])
        .arg(format!("rootflags={}", root.display()))
        .current_dir(directory.path())
        .stdin(Stdio::null())
        .stdout(console.try_clone()?)
        .stderr(console)
        .spawn()
        .context("start User-Mode Linux")?;
    let deadline = Instant::now() + BOOT_WITHIN + within;
    while linux.try_wait()?.is_none() {
        if Instant::now() > deadline {
            // Its process is the whole machine.
            let _ = kill(Pid::from_raw(linux.id().cast_signed()), Signal::SIGKILL);
            linux.wait()?;
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let read = |path: PathBuf| {
        let mut text = String::new();
        let _ = std::fs::File::open(path).and_then(|mut file| file.read_to_string(&mut text));
        text
    };
    let output = read(stage.join("output"));
    match read(stage.join("status")).trim() {
        "0" => Ok(output),
        status => bail!("the script ended with `{status}`:\n{output}\nconsole:\n{}", read(at("console"))),
    }
}
