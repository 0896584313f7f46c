//! Devices made of the kernel's own gadget functions, plugged into `dummy_hcd` (kernel `Documentation/usb/
//! gadget_configfs.rst`, `Documentation/ABI/testing/configfs-usb-gadget*`).
//!
//! `dummy_hcd` moves bulk, interrupt and control at high speed or SuperSpeed, 16 streams, and no isochronous transfers.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use common::ids::VendorProduct;

/// Where configfs shows gadgets.
const GADGETS: &str = "/sys/kernel/config/usb_gadget";

/// Controllers that are made when the module is loaded: one gadget each.
const CONTROLLERS: u32 = 4;

/// What a gadget does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Function {
    /// Source and sink of zeros, the peer of `usbtest`.
    SourceSink,
    /// Gives back what it gets.
    Loopback,
    /// A disk, bulk-only, on this file.
    Storage(PathBuf),
    /// A serial adapter; the other end is `/dev/ttyGS0`.
    Acm,
    /// A network adapter.
    Ncm,
    /// A simpler network adapter.
    Ecm,
    /// A boot keyboard; reports are written to `/dev/hidg0`.
    Keyboard,
}

/// The fastest speed the gadget offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speed {
    /// 12 Mbit/s.
    Full,
    /// 480 Mbit/s.
    High,
    /// 5 Gbit/s.
    Super,
}

impl Speed {
    const fn name(self) -> &'static str {
        match self {
            Self::Full => "full-speed",
            Self::High => "high-speed",
            Self::Super => "super-speed",
        }
    }
}

/// The report descriptor of a boot keyboard (HID 1.11 appendix B.1).
const KEYBOARD_REPORT: &[u8] = &[
    0x05, 0x01, 0x09, 0x06, 0xa1, 0x01, 0x05, 0x07, 0x19, 0xe0, 0x29, 0xe7, 0x15, 0x00, 0x25, 0x01, 0x75,
    0x01, 0x95, 0x08, 0x81, 0x02, 0x95, 0x01, 0x75, 0x08, 0x81, 0x03, 0x95, 0x05, 0x75, 0x01, 0x05, 0x08,
    0x19, 0x01, 0x29, 0x05, 0x91, 0x02, 0x95, 0x01, 0x75, 0x03, 0x91, 0x03, 0x95, 0x06, 0x75, 0x08, 0x15,
    0x00, 0x25, 0x65, 0x05, 0x07, 0x19, 0x00, 0x29, 0x65, 0x81, 0x00, 0xc0,
];

impl Function {
    /// Module and configfs name of the function, idVendor and idProduct of its gadget.
    const fn facts(&self) -> (&'static str, &'static str, u16, u16) {
        match self {
            Self::SourceSink => ("usb_f_ss_lb", "SourceSink.0", 0x0525, 0xa4a0),
            Self::Loopback => ("usb_f_ss_lb", "Loopback.0", 0x0525, 0xa4a0),
            Self::Storage(_) => ("usb_f_mass_storage", "mass_storage.0", 0x1d6b, 0x0104),
            Self::Acm => ("usb_f_acm", "acm.0", 0x1d6b, 0x0105),
            Self::Ncm => ("usb_f_ncm", "ncm.0", 0x1d6b, 0x0106),
            Self::Ecm => ("usb_f_ecm", "ecm.0", 0x1d6b, 0x0107),
            Self::Keyboard => ("usb_f_hid", "hid.0", 0x1d6b, 0x0108),
        }
    }

    /// Attributes of the function.
    fn set_up(&self, directory: &Path) -> Result<()> {
        match self {
            Self::SourceSink => write(&directory.join("pattern"), "0"),
            Self::Storage(file) => {
                let file = file.to_str().context("path of the disk is not text")?;
                write(&directory.join("lun.0/removable"), "0")?;
                write(&directory.join("lun.0/file"), file)
            }
            Self::Keyboard => {
                for (attribute, value) in [("protocol", "1"), ("subclass", "1"), ("report_length", "8")] {
                    write(&directory.join(attribute), value)?;
                }
                let path = directory.join("report_desc");
                fs::write(&path, KEYBOARD_REPORT).with_context(|| format!("write {}", path.display()))
            }
            Self::Loopback | Self::Acm | Self::Ncm | Self::Ecm => Ok(()),
        }
    }
}

/// Makes a gadget of one or more functions and plugs it in; the name of its controller (`dummy_udc.0`). The first function
/// gives it its ids.
pub fn up(name: &str, functions: &[Function], speed: Speed) -> Result<String> {
    let (_, instance, vendor, product) = functions.first().context("a gadget does something")?.facts();
    load("libcomposite", &[])?;
    load("dummy_hcd", &["is_super_speed=Y".to_owned(), format!("num={CONTROLLERS}")])?;
    let gadget = gadget_path(name)?;
    make(&gadget)?;
    set_ids(&gadget, vendor, product)?;
    let attributes = [
        ("max_speed", speed.name().to_owned()),
        // Bluetooth's and most others' value for "look at the interfaces".
        ("bDeviceClass", if functions == [Function::SourceSink] { "0xff" } else { "0" }.to_owned()),
    ];
    for (attribute, value) in attributes {
        write(&gadget.join(attribute), &value)?;
    }
    let strings = gadget.join("strings/0x409");
    make(&strings)?;
    write(&strings.join("manufacturer"), "vm-tests")?;
    write(&strings.join("product"), instance)?;
    write(&strings.join("serialnumber"), name)?;
    let configuration = gadget.join("configs/c.1");
    make(&configuration)?;
    for function in functions {
        let (module, instance, ..) = function.facts();
        load(module, &[])?;
        let directory = gadget.join("functions").join(instance);
        make(&directory)?;
        function.set_up(&directory)?;
        let link = configuration.join(instance);
        symlink(&directory, &link).with_context(|| format!("link {}", link.display()))?;
    }
    let controller = free_controller()?;
    write(&gadget.join("UDC"), &controller)?;
    Ok(controller)
}

/// Pulls a gadget without forgetting it.
pub fn unplug(name: &str) -> Result<()> {
    write(&gadget_path(name)?.join("UDC"), "\n")
}

/// Plugs a gadget in again, as another `vendor:product` if one is given.
pub fn plug(name: &str, ids: Option<VendorProduct>) -> Result<String> {
    let gadget = gadget_path(name)?;
    if let Some(ids) = ids {
        set_ids(&gadget, ids.vendor, ids.product)?;
    }
    let controller = free_controller()?;
    write(&gadget.join("UDC"), &controller)?;
    Ok(controller)
}

fn set_ids(gadget: &Path, vendor: u16, product: u16) -> Result<()> {
    write(&gadget.join("idVendor"), &format!("{vendor:#06x}"))?;
    write(&gadget.join("idProduct"), &format!("{product:#06x}"))
}

/// Pulls and removes a gadget.
pub fn down(name: &str) -> Result<()> {
    let gadget = gadget_path(name)?;
    // It may be unplugged already: then the kernel says ENODEV.
    let _ = fs::write(gadget.join("UDC"), "\n");
    let configuration = gadget.join("configs/c.1");
    for entry in fs::read_dir(&configuration).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_symlink()) {
            fs::remove_file(entry.path()).with_context(|| format!("remove {}", entry.path().display()))?;
        }
    }
    remove(&configuration)?;
    for entry in fs::read_dir(gadget.join("functions")).into_iter().flatten().flatten() {
        remove(&entry.path())?;
    }
    remove(&gadget.join("strings/0x409"))?;
    remove(&gadget)
}

/// The first device controller that no gadget uses.
fn free_controller() -> Result<String> {
    let mut names: Vec<String> = fs::read_dir("/sys/class/udc")
        .context("read /sys/class/udc")?
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    let used: Vec<String> = fs::read_dir(GADGETS)
        .with_context(|| format!("read {GADGETS}"))?
        .flatten()
        .filter_map(|gadget| fs::read_to_string(gadget.path().join("UDC")).ok())
        .map(|name| name.trim().to_owned())
        .collect();
    names.into_iter().find(|name| !used.contains(name)).context("every device controller is in use")
}

fn gadget_path(name: &str) -> Result<PathBuf> {
    if !Path::new(GADGETS).exists() {
        let _ = Command::new("mount").args(["-t", "configfs", "none", "/sys/kernel/config"]).status();
    }
    if name.is_empty() || name.contains(['/', '.']) {
        bail!("{name:?} is no name for a gadget");
    }
    Ok(Path::new(GADGETS).join(name))
}

fn load(module: &str, parameters: &[String]) -> Result<()> {
    if Path::new("/sys/module").join(module).exists() {
        return Ok(());
    }
    let status = Command::new("modprobe").arg(module).args(parameters).status().context("start modprobe")?;
    if !status.success() {
        bail!("modprobe {module}: {status}");
    }
    Ok(())
}

fn write(path: &Path, value: &str) -> Result<()> {
    fs::write(path, value).with_context(|| format!("write {value:?} to {}", path.display()))
}

fn make(path: &Path) -> Result<()> {
    fs::create_dir(path).with_context(|| format!("make {}", path.display()))
}

fn remove(path: &Path) -> Result<()> {
    fs::remove_dir(path).with_context(|| format!("remove {}", path.display()))
}
