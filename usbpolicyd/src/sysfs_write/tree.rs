//! From an order to a write below `/sys/devices`: nothing but the three attributes of the device that was named, and only
//! if it still is the device that was meant. The order is not trusted; sysfs, which is the kernel's, is.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use common::ids::BusAddress;

use super::{Order, Verb};
use crate::facts::CLASS_HUB;
use crate::sysfs::{number, text};

/// How long a port stays off, so that the device notices.
const PORT_OFF: Duration = Duration::from_millis(200);
/// How often switching a port on again is tried, and the pause between tries: a port that stays off is the worst end.
const PORT_ON_TRIES: u32 = 10;
const PORT_ON_PAUSE: Duration = Duration::from_millis(100);

/// An order is not carried out.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// Nothing is plugged in there.
    #[error("no device {device} is plugged in")]
    Missing {
        /// Kernel name.
        device: String,
    },
    /// It is no directory of a USB device, whatever its name says.
    #[error("{path} is no USB device below /sys/devices")]
    Elsewhere {
        /// Where the name led.
        path: PathBuf,
    },
    /// Something else is plugged in there now.
    #[error("{device} is another device now: {found}, not {wanted}")]
    OtherDevice {
        /// Kernel name.
        device: String,
        /// What is there.
        found: BusAddress,
        /// What was meant.
        wanted: BusAddress,
    },
    /// Hubs are never touched: everything below them would go too.
    #[error("{device} is a hub; hubs are left alone")]
    Hub {
        /// Kernel name.
        device: String,
    },
    /// The kernel does not say which port the device is on, or the port cannot be switched.
    #[error("the port of {device} cannot be switched by this kernel: it needs Linux 6.0 or newer")]
    NoPort {
        /// Kernel name.
        device: String,
    },
    /// A write failed.
    #[error("cannot write {value} to {path}")]
    Write {
        /// Which attribute.
        path: PathBuf,
        /// What.
        value: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// One sysfs.
#[derive(Clone, Debug)]
pub struct Tree {
    root: PathBuf,
}

impl Default for Tree {
    fn default() -> Self {
        Self { root: "/sys".into() }
    }
}

impl Tree {
    /// A sysfs that is mounted at `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Checks the order and does what it says.
    pub fn carry_out(&self, order: &Order) -> Result<(), TreeError> {
        let device = self.device(order)?;
        match order.verb {
            Verb::Authorize => write(&device.join("authorized"), "1"),
            Verb::Deauthorize => write(&device.join("authorized"), "0"),
            Verb::CyclePort => cycle(&self.port(order, &device)?),
        }
    }

    /// The directory of the device that is meant.
    fn device(&self, order: &Order) -> Result<PathBuf, TreeError> {
        let name = order.device.to_string();
        let link = self.root.join("bus/usb/devices").join(&name);
        let path = fs::canonicalize(link).map_err(|_| TreeError::Missing { device: name.clone() })?;
        if !self.is_below(&path) || path.file_name() != Some(name.as_ref()) {
            return Err(TreeError::Elsewhere { path });
        }
        let (Some(bus), Some(device)) = (number(&path, "busnum"), number(&path, "devnum")) else {
            return Err(TreeError::Elsewhere { path });
        };
        let found = BusAddress { bus, device };
        if found != order.address {
            return Err(TreeError::OtherDevice { device: name, found, wanted: order.address });
        }
        let class = text(&path, "bDeviceClass").and_then(|class| u8::from_str_radix(class.trim(), 16).ok());
        let ports: u32 = number(&path, "maxchild").unwrap_or(0);
        // A device that does not say its class is none to be touched.
        if class.is_none_or(|class| class == CLASS_HUB) || ports > 0 {
            return Err(TreeError::Hub { device: name });
        }
        Ok(path)
    }

    /// The directory of the port that the device is plugged into. It outlives the device.
    fn port(&self, order: &Order, device: &Path) -> Result<PathBuf, TreeError> {
        let no_port = || TreeError::NoPort { device: order.device.to_string() };
        let path = fs::canonicalize(device.join("port")).map_err(|_| no_port())?;
        if !self.is_below(&path) {
            return Err(TreeError::Elsewhere { path });
        }
        let number = order.device.chain.ports().last().ok_or_else(no_port)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_it = name.ends_with(&format!("-port{number}")) && path.join("disable").exists();
        if is_it { Ok(path) } else { Err(no_port()) }
    }

    /// Whether a path, links resolved, is inside `devices`.
    fn is_below(&self, path: &Path) -> bool {
        fs::canonicalize(self.root.join("devices")).is_ok_and(|devices| path.starts_with(devices))
    }
}

/// Off and on. Not only the device goes: so does every link that leads to the port from it.
fn cycle(port: &Path) -> Result<(), TreeError> {
    let switch = port.join("disable");
    write(&switch, "1")?;
    sleep(PORT_OFF);
    let mut tries = 1;
    loop {
        match write(&switch, "0") {
            Err(_) if tries < PORT_ON_TRIES => {
                tries += 1;
                sleep(PORT_ON_PAUSE);
            }
            result => return result,
        }
    }
}

/// Writes to an attribute that is there; makes and follows nothing.
fn write(path: &Path, value: &'static str) -> Result<(), TreeError> {
    let open = || -> io::Result<File> {
        let file = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
        let is_file = file.metadata()?.is_file();
        if is_file { Ok(file) } else { Err(io::ErrorKind::InvalidInput.into()) }
    };
    open().and_then(|mut file| file.write_all(value.as_bytes())).map_err(|source| TreeError::Write {
        path: path.to_owned(),
        value,
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::sysfs::tests::{Tree as MadeUp, put};

    /// A made-up host with a stick in port 4, and the order for it.
    fn stick(verb: Verb) -> (MadeUp, PathBuf, Order) {
        let tree = MadeUp::new();
        let device = tree.plug("1-4", 3);
        put(&device, "bDeviceClass", "00\n");
        let port = tree.controller().join("usb1/1-0:1.0/usb1-port4");
        put(&port, "disable", "2\n");
        symlink("../1-0:1.0/usb1-port4", device.join("port")).unwrap();
        let address = BusAddress { bus: 1, device: 3 };
        (tree, device, Order { device: "1-4".parse().unwrap(), address, verb })
    }

    fn carry_out(tree: &MadeUp, order: &Order) -> Result<(), TreeError> {
        Tree::new(tree.dir.path()).carry_out(order)
    }

    fn attribute(directory: &Path, name: &str) -> String {
        fs::read_to_string(directory.join(name)).unwrap()
    }

    #[test]
    fn authorization_is_taken_and_given() {
        let (tree, device, mut order) = stick(Verb::Deauthorize);
        carry_out(&tree, &order).unwrap();
        assert_eq!(attribute(&device, "authorized"), "0\n");
        order.verb = Verb::Authorize;
        carry_out(&tree, &order).unwrap();
        assert_eq!(attribute(&device, "authorized"), "1\n");
    }

    #[test]
    fn port_is_on_again_after_it_was_off() {
        let (tree, _, order) = stick(Verb::CyclePort);
        carry_out(&tree, &order).unwrap();
        assert_eq!(attribute(&tree.controller().join("usb1/1-0:1.0/usb1-port4"), "disable"), "0\n");
    }

    #[test]
    fn device_that_took_the_place_of_the_one_that_was_meant_is_left_alone() {
        let (tree, device, mut order) = stick(Verb::Deauthorize);
        order.address.device = 4;
        let error = carry_out(&tree, &order).unwrap_err();
        assert!(matches!(error, TreeError::OtherDevice { .. }), "{error}");
        assert_eq!(attribute(&device, "authorized"), "1\n");
    }

    #[test]
    fn hub_is_left_alone() {
        let (tree, device, order) = stick(Verb::CyclePort);
        put(&device, "bDeviceClass", "09\n");
        assert!(matches!(carry_out(&tree, &order), Err(TreeError::Hub { .. })));
        fs::remove_file(device.join("bDeviceClass")).unwrap();
        assert!(matches!(carry_out(&tree, &order), Err(TreeError::Hub { .. })));
        // One whose class hides what it is.
        put(&device, "bDeviceClass", "00\n");
        put(&device, "maxchild", "4\n");
        assert!(matches!(carry_out(&tree, &order), Err(TreeError::Hub { .. })));
    }

    #[test]
    fn name_that_leads_out_of_devices_is_refused() {
        let (tree, device, order) = stick(Verb::Deauthorize);
        let outside = tree.path("kernel/1-4");
        fs::create_dir_all(outside.parent().unwrap()).unwrap();
        fs::rename(&device, &outside).unwrap();
        fs::remove_file(tree.path("bus/usb/devices/1-4")).unwrap();
        symlink(&outside, tree.path("bus/usb/devices/1-4")).unwrap();
        assert!(matches!(carry_out(&tree, &order), Err(TreeError::Elsewhere { .. })));
        assert_eq!(attribute(&outside, "authorized"), "1\n");
    }

    #[test]
    fn name_that_leads_to_another_device_is_refused() {
        let (tree, _, order) = stick(Verb::Deauthorize);
        let other = tree.plug("1-3", 3);
        fs::remove_file(tree.path("bus/usb/devices/1-4")).unwrap();
        symlink(&other, tree.path("bus/usb/devices/1-4")).unwrap();
        assert!(matches!(carry_out(&tree, &order), Err(TreeError::Elsewhere { .. })));
    }

    #[test]
    fn port_of_another_number_is_not_switched() {
        let (tree, device, order) = stick(Verb::CyclePort);
        fs::remove_file(device.join("port")).unwrap();
        symlink("../1-0:1.0/usb1-port3", device.join("port")).unwrap();
        put(&tree.controller().join("usb1/1-0:1.0/usb1-port3"), "disable", "2\n");
        assert!(matches!(carry_out(&tree, &order), Err(TreeError::NoPort { .. })));
        assert_eq!(attribute(&tree.controller().join("usb1/1-0:1.0/usb1-port3"), "disable"), "2\n");
    }

    #[test]
    fn attribute_that_is_a_link_is_not_followed() {
        let (tree, device, order) = stick(Verb::Deauthorize);
        let target = tree.path("target");
        fs::write(&target, "1").unwrap();
        fs::remove_file(device.join("authorized")).unwrap();
        symlink(&target, device.join("authorized")).unwrap();
        assert!(matches!(carry_out(&tree, &order), Err(TreeError::Write { .. })));
        assert_eq!(fs::read_to_string(target).unwrap(), "1");
    }

    #[test]
    fn missing_attribute_is_not_made() {
        let (tree, device, order) = stick(Verb::Deauthorize);
        fs::remove_file(device.join("authorized")).unwrap();
        assert!(matches!(carry_out(&tree, &order), Err(TreeError::Write { .. })));
        assert!(!device.join("authorized").exists());
    }
}
