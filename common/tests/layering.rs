//! Which room of the house may know which: reads the sources and fails on a broken arrow (`ARCHITECTURE.md`).

#![expect(clippy::unwrap_used, reason = "a test says by its panic what went wrong")]

use std::fs;
use std::path::{Path, PathBuf};

/// Ways to write to the log without end. (`error` is for us: what an outsider cannot reach. `trace` is switched on to see
/// each TRB.)
const UNLIMITED: &[&str] = &["tracing::debug", "tracing::info", "tracing::warn", "tracing::{"];

/// A room (file or folder below the workspace) and texts that its code may not contain.
const NEVER: &[(&str, &[&str])] = &[
    // The controller is pure: it knows transfers and guest memory, no device, no socket, no clock.
    (
        "usbvfiod/src/xhci",
        &[
            "crate::usb::",
            "crate::vfio_user",
            "crate::pci",
            "crate::guest_memory",
            "crate::daemon",
            "nix::",
            "libc::",
            "std::fs",
            "std::net",
            "std::os",
            "std::thread",
            "std::sync::Arc",
            "std::sync::Mutex",
            "std::sync::mpsc",
            "Instant::now",
            "SystemTime",
            "unsafe",
        ],
    ),
    ("usbvfiod/src/urb.rs", &["crate::", "nix::", "libc::", "std::os"]),
    (
        "usbvfiod/src/usb",
        &[
            "crate::xhci::controller",
            "crate::xhci::Controller",
            "crate::vfio_user",
            "crate::pci",
            "crate::daemon",
        ],
    ),
    ("usbvfiod/src/vfio_user", &["crate::xhci", "crate::usb::", "crate::urb", "crate::daemon"]),
    ("usbvfiod/src/pci", &["crate::xhci", "crate::usb::", "crate::urb", "crate::daemon"]),
    // Policy and broker decide; they touch nothing.
    (
        "usbpolicyd/src/policy",
        &[
            "std::fs",
            "std::net",
            "std::os",
            "std::thread",
            "nix::",
            "libc::",
            "udev::",
            "Instant::now",
            "SystemTime",
            "unsafe",
        ],
    ),
    (
        "usbpolicyd/src/broker",
        &[
            "std::fs",
            "std::net",
            "std::os",
            "std::thread",
            "nix::",
            "libc::",
            "udev::",
            "Instant::now",
            "SystemTime",
            "unsafe",
        ],
    ),
    // What a guest, a device or a VMM can make appear in the log goes through `common::limited!`.
    ("usbvfiod/src/xhci", UNLIMITED),
    ("usbvfiod/src/usb", UNLIMITED),
    ("usbvfiod/src/vfio_user", UNLIMITED),
    ("usbvfiod/src/pci", UNLIMITED),
    ("usbvfiod/src/guest_memory", UNLIMITED),
    ("usbvfiod/src/daemon/vmm.rs", UNLIMITED),
    // What runs as root knows sysfs and nothing of what the daemon thinks.
    (
        "usbpolicyd/src/sysfs_write",
        &["crate::daemon", "crate::broker", "crate::policy", "crate::admin", "crate::usbnode", "unsafe"],
    ),
    ("usbpolicyd/src", &["usbvfiod::"]),
    ("usbvfiod/src", &["usbpolicyd::"]),
    ("common/src", &["usbpolicyd::", "usbvfiod::"]),
];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Rust files of a room: `room`, `room.rs`, and all below; tests may know more than the code.
fn sources(room: &Path) -> Vec<PathBuf> {
    if room.is_file() {
        return vec![room.to_owned()];
    }
    let mut found: Vec<_> =
        Some(room.with_extension("rs")).filter(|file| file.is_file()).into_iter().collect();
    let mut folders = vec![room.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() && name != "tests" {
                folders.push(path);
            } else if name.ends_with(".rs") && name != "tests.rs" {
                found.push(path);
            }
        }
    }
    found
}

/// The code of a file: without comments, and without a test module at its end.
fn code(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap();
    let code = text.split("#[cfg(test)]").next().unwrap();
    code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

#[test]
fn no_room_knows_what_it_may_not() {
    let mut broken = Vec::new();
    for (room, words) in NEVER {
        let files = sources(&workspace().join(room));
        assert!(!files.is_empty(), "{room} has no sources: was it moved? Then move its rule too");
        for file in files {
            let code = code(&file);
            broken.extend(
                words
                    .iter()
                    .filter(|word| code.contains(**word))
                    .map(|word| format!("{}: {word}", file.display())),
            );
        }
    }
    assert!(broken.is_empty(), "broken arrows:\n{}", broken.join("\n"));
}

#[test]
fn unsafe_code_stays_in_its_places() {
    let places = ["common/src/usbfs", "common/src/channel.rs", "usbvfiod/src/usb/pool"];
    let mut broken = Vec::new();
    for member in ["common/src", "usbpolicyd/src", "usbvfiod/src"] {
        for file in sources(&workspace().join(member)) {
            let path = file.strip_prefix(workspace()).unwrap().to_string_lossy().into_owned();
            let allowed = places.iter().any(|place| path.starts_with(place));
            if !allowed && code(&file).contains("unsafe_code") {
                broken.push(path);
            }
        }
    }
    assert!(broken.is_empty(), "unsafe code allowed in: {broken:?}");
}
