//! The two initramfs archives: one that mounts the root of the host under test, one that is the whole guest.

use std::path::Path;

use anyhow::{Context, Result};

use crate::binaries;
use crate::cpio::Archive;
use crate::image::Image;

const HOST_MODULES: &[&str] = &["9pnet_virtio", "9p", "overlay"];

/// Loaded when a guest starts.
pub const GUEST_MODULES_AT_START: &[&str] =
    &["xhci_pci", "usb_storage", "uas", "sd_mod", "usbhid", "hid_generic", "evdev"];

/// Present in each guest, for `modprobe` by the tests that need them.
const GUEST_MODULES_ON_DEMAND: &[&str] = &[
    "ext4",
    // What ext4 asks the kernel for by name, not by symbol.
    "crc32c_generic",
    "vfat",
    "nls_cp437",
    "nls_ascii",
    "loop",
    "usbtest",
    "usbmon",
    "usbserial",
    "ftdi_sio",
    "cdc_acm",
    "cp210x",
    "pl2303",
    "usbnet",
    "cdc_ether",
    "cdc_ncm",
    "cdc_subset",
    "rndis_host",
    "snd_usb_audio",
    "snd_pcm",
    "uvcvideo",
    "usblp",
    "joydev",
    "hidraw",
    "virtio_blk",
    "virtio_net",
    "virtio_balloon",
    "virtio_mem",
    "acpiphp",
    "pciehp",
    "sg",
];

/// Libraries of the image that our agent is linked to.
const LIBRARIES: &[&str] = &[
    "lib64/ld-linux-x86-64.so.2",
    "usr/lib/x86_64-linux-gnu/libc.so.6",
    "usr/lib/x86_64-linux-gnu/libm.so.6",
    "usr/lib/x86_64-linux-gnu/libgcc_s.so.1",
];

/// Something for guests that only some scenarios need; each costs a moment of every guest's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extra {
    /// `mkfs.ext4`.
    Ext4,
    /// `aplay`.
    Player,
    /// A program of this crate.
    Program(&'static str),
}

impl Extra {
    /// What it takes of the image, by its path there; libraries come to the other libraries.
    const fn files(self) -> &'static [&'static str] {
        match self {
            Self::Ext4 => &[
                "usr/sbin/mkfs.ext4",
                "usr/lib/x86_64-linux-gnu/libext2fs.so.2",
                "usr/lib/x86_64-linux-gnu/libcom_err.so.2",
                "usr/lib/x86_64-linux-gnu/libblkid.so.1",
                "usr/lib/x86_64-linux-gnu/libuuid.so.1",
                "usr/lib/x86_64-linux-gnu/libe2p.so.2",
                "etc/mke2fs.conf",
            ],
            Self::Player => &[
                "usr/bin/aplay",
                "usr/lib/x86_64-linux-gnu/libasound.so.2",
                "usr/share/alsa/alsa.conf",
                "usr/share/alsa/cards/aliases.conf",
            ],
            Self::Program(_) => &[],
        }
    }
}

/// The archive that leads the host under test to its root.
pub fn for_host(image: &Image) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    add_file(&mut archive, &image.root.join("usr/bin/busybox"), "bin/busybox")?;
    for directory in ["proc", "sys", "dev"] {
        archive.directory(directory);
    }
    let order = image.dependencies()?.load_order(HOST_MODULES)?;
    for path in &order {
        add_file(&mut archive, &image.modules().join(path), &format!("lib/modules/{path}"))?;
    }
    archive.file("load-order", (order.join("\n") + "\n").as_bytes(), false);
    archive.file("init", include_bytes!("host-init.sh"), true);
    Ok(archive.finish())
}

/// The archive that is a guest: busybox, drivers, the agent.
pub fn for_guest(image: &Image, agent: &Path, extras: &[Extra]) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    add_file(&mut archive, &image.root.join("usr/bin/busybox"), "bin/busybox")?;
    archive.link("bin/sh", "busybox");
    for library in LIBRARIES {
        let name = library.rsplit('/').next().unwrap_or(library);
        let place = if name.starts_with("ld-") {
            format!("lib64/{name}")
        } else {
            format!("lib/x86_64-linux-gnu/{name}")
        };
        add_file(&mut archive, &image.root.join(library), &place)?;
    }
    archive.file("bin/vm-agent", &binaries::stripped(agent)?, true);
    for extra in extras {
        for path in extra.files() {
            let place = if path.starts_with("usr/share/") { path } else { path.trim_start_matches("usr/") };
            add_file(&mut archive, &image.root.join(path), place)?;
        }
        if let Extra::Program(name) = extra {
            archive.file(
                &format!("bin/{name}"),
                &binaries::stripped(&binaries::directory()?.join(name))?,
                true,
            );
        }
    }
    let dependencies = image.dependencies()?;
    let mut wanted = GUEST_MODULES_AT_START.to_vec();
    // Some of these are built into one kernel and modules of another.
    wanted.extend(dependencies.known(GUEST_MODULES_ON_DEMAND));
    let base = format!("lib/modules/{}", image.kernel_version);
    for path in dependencies.load_order(&wanted)? {
        add_file(&mut archive, &image.modules().join(&path), &format!("{base}/{path}"))?;
    }
    for index in ["modules.dep", "modules.alias", "modules.symbols", "modules.builtin", "modules.softdep"] {
        add_file(&mut archive, &image.modules().join(index), &format!("{base}/{index}"))?;
    }
    archive.file("load-at-start", GUEST_MODULES_AT_START.join(" ").as_bytes(), false);
    archive.file("init", include_bytes!("guest-init.sh"), true);
    Ok(archive.finish())
}

fn add_file(archive: &mut Archive, from: &Path, to: &str) -> Result<()> {
    let content = std::fs::read(from).with_context(|| format!("read {}", from.display()))?;
    archive.file(to, &content, !to.contains("/modules/"));
    Ok(())
}
