//! The device node in `/dev/bus/usb`: opened, verified on the open file, freed from the host's drivers, given back.
//!
//! Paths, numbers and sysfs may speak of another device by the time the file is open (device numbers wrap at 127), so
//! what counts is what the kernel says of the file itself. Every function here can wait for the device (an open wakes
//! it up, SET_CONFIGURATION takes up to 5 s): they run on the workers (`jobs`), never in the daemon's loop.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use common::ids::BusAddress;
use common::usbfs::{NotUsbfs, UsbfsFile};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, fstat, major, minor};

use crate::broker::Failure;
use crate::sysfs::{Hub, HubPlace, Present, descriptors};
use crate::sysfs_write::{self, AskError, Order, Verb};

/// How often an interface that a dying process still claims is tried again, and after what pause.
const STILL_CLAIMED_TRIES: u32 = 20;
const STILL_CLAIMED_PAUSE: Duration = Duration::from_millis(50);
/// How often a node that is not ours is tried again, and after what pause: the kernel makes it for root, and udev gives it
/// to us some milliseconds later.
const NOT_OURS_YET_TRIES: u32 = 40;
const NOT_OURS_YET_PAUSE: Duration = Duration::from_millis(50);
/// The mask of `USBDEVFS_DROP_PRIVILEGES`: whoever gets the file may claim each interface of the device.
const ALL_INTERFACES: u32 = u32::MAX;
/// Class of interfaces that only their vendor's driver knows (USB class code list).
const CLASS_VENDOR: u8 = 0xff;

/// A device cannot be handed over, or not be given back.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The node is not there: the device is gone.
    #[error("{node} is gone")]
    Gone {
        /// Path of the node.
        node: PathBuf,
    },
    /// The file is not the device that sysfs showed.
    #[error("{node} is another device now: {what} differs")]
    OtherDevice {
        /// Path of the node.
        node: PathBuf,
        /// What was compared.
        what: &'static str,
    },
    /// No right to open the node.
    #[error(
        "no right to open {node} for reading and writing: install 70-usbpolicyd.rules in /etc/udev/rules.d, which \
         gives the nodes to user usbpolicyd, then run `udevadm trigger --subsystem-match=usb`"
    )]
    Denied {
        /// Path of the node.
        node: PathBuf,
    },
    /// It is no usbfs node.
    #[error("{node} cannot be used")]
    NotUsbfs {
        /// Path of the node.
        node: PathBuf,
        /// Why.
        source: NotUsbfs,
    },
    /// Another program has claimed it.
    #[error(
        "interface {interface} of {node} is claimed by another program through usbfs; close that program"
    )]
    Claimed {
        /// Path of the node.
        node: PathBuf,
        /// Number of the interface.
        interface: u8,
    },
    /// The host has not authorized the device.
    #[error(
        "{name} waits for authorization on the host: allow it in USBGuard, or write 1 to its `authorized` in sysfs"
    )]
    Unauthorized {
        /// Kernel name of the device.
        name: String,
    },
    /// The kernel or the device says no.
    #[error("{what} failed on {node}")]
    Kernel {
        /// Path of the node.
        node: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// sysfs was not written.
    #[error(transparent)]
    Sysfs(#[from] AskError),
}

impl NodeError {
    /// Whether the inventory is out of date.
    const fn is_stale(&self) -> bool {
        matches!(self, Self::Gone { .. } | Self::OtherDevice { .. })
    }
}

impl From<&NodeError> for Failure {
    fn from(error: &NodeError) -> Self {
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(source) = cause {
            text = format!("{text}: {source}");
            cause = source.source();
        }
        Self { text, stale: error.is_stale() }
    }
}

/// How a device is made ready.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Reset it first, so that the guest finds it as after power-on.
    pub reset: bool,
    /// The configuration to set when it has none.
    pub configuration: Option<u8>,
    /// Make the file one that cannot detach drivers of the host (`USBDEVFS_DROP_PRIVILEGES`). Only for a device on a port
    /// that stays claimed: after a reset on any other port the host's driver would come back, and such a file could
    /// never get the device again.
    pub confine: bool,
    /// Authorize it if it is not: we took the authorization away, or the rule says that it is ours to give.
    pub authorize: bool,
}

/// A device that can be sent.
#[derive(Debug)]
pub struct Ready {
    /// The open file.
    pub file: UsbfsFile,
    /// The configuration that is set now.
    pub configuration: u8,
    /// The host drivers that were taken off, by interface.
    pub drivers: Vec<(u8, String)>,
}

/// Where the nodes are.
#[derive(Clone, Debug)]
pub struct Nodes {
    root: PathBuf,
    /// Where the service that writes to sysfs listens.
    sysfs_service: PathBuf,
}

impl Default for Nodes {
    fn default() -> Self {
        Self { root: "/dev/bus/usb".into(), sysfs_service: sysfs_write::SOCKET.into() }
    }
}

impl Nodes {
    /// Path of a device's node.
    pub fn path(&self, address: BusAddress) -> PathBuf {
        self.root.join(format!("{:03}/{:03}", address.bus, address.device))
    }

    /// Opens the node and makes sure that the open file is the device that sysfs showed.
    pub fn open(&self, device: &Present) -> Result<UsbfsFile, NodeError> {
        let node = self.path(device.facts.address);
        let file = self.open_fd(device.facts.address)?;
        let numbers = fstat(&file).map_err(|errno| kernel(&node, "fstat", errno))?.st_rdev;
        let expected = (u64::from(device.facts.node.major), u64::from(device.facts.node.minor));
        let other = |what| Err(NodeError::OtherDevice { node: node.clone(), what });
        if (major(numbers), minor(numbers)) != expected {
            return other("device number");
        }
        let file = UsbfsFile::new(file).map_err(|source| match source {
            NotUsbfs::Kernel(Errno::ENODEV) => NodeError::Gone { node: node.clone() },
            source => NodeError::NotUsbfs { node: node.clone(), source },
        })?;
        let info = file.connection_info().map_err(|errno| kernel(&node, "USBDEVFS_CONNINFO_EX", errno))?;
        if info.address != device.facts.address {
            return other("bus and device number");
        }
        if info.ports.as_ref() != Some(&device.facts.chain) {
            return other("port chain");
        }
        let bytes = file.descriptors().map_err(|errno| kernel(&node, "reading descriptors", errno))?;
        if !descriptors::same_device(&device.descriptors, &bytes) {
            return other("descriptors");
        }
        if fs::metadata(&device.plug.syspath).ok().map(|meta| meta.ino()) != Some(device.plug.inode) {
            return other("its sysfs directory");
        }
        Ok(file)
    }

    /// Opens the node of a hub, for its ports.
    pub fn open_hub(&self, hub: &Hub) -> Result<UsbfsFile, NodeError> {
        let node = self.path(hub.plug.address);
        let not_usbfs = |source| NodeError::NotUsbfs { node: node.clone(), source };
        let file = UsbfsFile::new(self.open_fd(hub.plug.address)?).map_err(not_usbfs)?;
        let info = file.connection_info().map_err(|errno| kernel(&node, "USBDEVFS_CONNINFO_EX", errno))?;
        let chain = match &hub.place {
            HubPlace::Root(_) => None,
            HubPlace::Port(port) => Some(port.chain.clone()),
        };
        if (info.address, info.ports) != (hub.plug.address, chain) {
            return Err(NodeError::OtherDevice { node, what: "place" });
        }
        Ok(file)
    }

    /// Gives an unconfigured hub the configuration in which it has ports.
    pub fn configure(&self, device: &Present) -> Result<(), NodeError> {
        let file = self.open(device)?;
        let value = usual_configuration(device).unwrap_or(1);
        let node = self.path(device.facts.address);
        file.set_configuration(value).map_err(|errno| kernel(&node, "setting the configuration", errno))
    }

    fn open_fd(&self, address: BusAddress) -> Result<OwnedFd, NodeError> {
        while_denied(NOT_OURS_YET_PAUSE, || self.try_open_fd(address))
    }

    /// Follows no symbolic link on the way. Not by `openat2`: `RestrictSUIDSGID=` of systemd makes it `ENOSYS`.
    fn try_open_fd(&self, address: BusAddress) -> Result<OwnedFd, NodeError> {
        let node = &self.path(address);
        let failed = |errno| match errno {
            Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => NodeError::Gone { node: node.to_owned() },
            Errno::EACCES | Errno::EPERM => NodeError::Denied { node: node.to_owned() },
            errno => kernel(node, "open", errno),
        };
        let directory = OFlag::O_DIRECTORY | OFlag::O_PATH | OFlag::O_CLOEXEC;
        let root = nix::fcntl::open(&self.root, directory, Mode::empty())
            .map_err(|errno| kernel(&self.root, "open", errno))?;
        let bus = format!("{:03}", address.bus);
        let bus =
            openat(&root, bus.as_str(), directory | OFlag::O_NOFOLLOW, Mode::empty()).map_err(failed)?;
        let device = format!("{:03}", address.device);
        let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        openat(&bus, device.as_str(), flags, Mode::empty()).map_err(failed)
    }

    /// All that comes before sending: open, verify, take the host's drivers off, make sure of a configuration. On
    /// failure the drivers are put back.
    pub fn prepare(&self, device: &Present, options: Options) -> Result<Ready, NodeError> {
        if !is_authorized(device) {
            if !options.authorize {
                return Err(NodeError::Unauthorized { name: device.facts.sys_name.clone() });
            }
            // The kernel sets a configuration now, and drivers may come: they are taken off like any others.
            self.write_sysfs(device, Verb::Authorize)?;
        }
        let file = self.open(device)?;
        let node = self.path(device.facts.address);
        let mut ready = Ready { file, configuration: 0, drivers: Vec::new() };
        let result = self.make_ready(device, options, &node, &mut ready);
        if let Err(error) = result {
            for (interface, _) in &ready.drivers {
                // Nothing more can be done if this fails: the device is going, or its driver does not want it.
                let _ = ready.file.connect_driver(*interface);
            }
            return Err(error);
        }
        Ok(ready)
    }

    fn make_ready(
        &self,
        device: &Present,
        options: Options,
        node: &Path,
        ready: &mut Ready,
    ) -> Result<(), NodeError> {
        // Opening waited until the kernel was done with the device, so this is newer than the facts.
        let active = active_configuration(device);
        if let Some(active) = active {
            ready.configuration = active;
            detach_drivers(device, node, ready)?;
        }
        if options.reset {
            ready.file.reset().map_err(|errno| kernel(node, "reset", errno))?;
            let bytes =
                ready.file.descriptors().map_err(|errno| kernel(node, "reading descriptors", errno))?;
            if !descriptors::same_device(&device.descriptors, &bytes) {
                return Err(NodeError::OtherDevice {
                    node: node.to_owned(),
                    what: "descriptors after reset",
                });
            }
        }
        if active.is_none() {
            let value = options.configuration.or_else(|| usual_configuration(device)).unwrap_or(1);
            let result = ready.file.set_configuration(value);
            result.map_err(|errno| kernel(node, "setting the configuration", errno))?;
            ready.configuration = value;
        }
        if options.reset || active.is_none() {
            // Both let host drivers have another look, unless the port is claimed.
            detach_drivers(device, node, ready)?;
        }
        if options.confine {
            let result = ready.file.drop_privileges(ALL_INTERFACES);
            result.map_err(|errno| kernel(node, "USBDEVFS_DROP_PRIVILEGES", errno))?;
        }
        Ok(())
    }

    /// Gives the device to the host's drivers again, reset before if `reset`.
    pub fn give_back(&self, device: &Present, reset: bool) -> Result<(), NodeError> {
        if !is_authorized(device) {
            return self.write_sysfs(device, Verb::Authorize);
        }
        let file = self.open(device)?;
        let node = self.path(device.facts.address);
        if reset {
            file.reset().map_err(|errno| kernel(&node, "reset", errno))?;
        }
        let Some(active) = active_configuration(device) else {
            // Setting a configuration makes the drivers look.
            let value = usual_configuration(device).unwrap_or(1);
            let result = file.set_configuration(value);
            return result.map_err(|errno| kernel(&node, "setting the configuration", errno));
        };
        for interface in interfaces_of(device, active) {
            connect(&file, interface, &node)?;
        }
        Ok(())
    }

    /// Cuts the device off: its port is switched off and on again, which ends every open file of it. On some hardware it
    /// comes back only when it is plugged in again.
    pub fn cycle_port(&self, device: &Present) -> Result<(), NodeError> {
        self.write_sysfs(device, Verb::CyclePort)
    }

    /// Makes the kernel forget the configuration of the device, so that no driver has it.
    pub fn deauthorize(&self, device: &Present) -> Result<(), NodeError> {
        self.write_sysfs(device, Verb::Deauthorize)
    }

    /// By the service that may: we may not.
    fn write_sysfs(&self, device: &Present, verb: Verb) -> Result<(), NodeError> {
        let gone = || NodeError::Gone { node: self.path(device.facts.address) };
        let name = device.facts.sys_name.parse().map_err(|_| gone())?;
        let order = Order { device: name, address: device.facts.address, verb };
        Ok(sysfs_write::ask(&self.sysfs_service, &order)?)
    }
}

/// Tries again, with pauses, what is denied.
fn while_denied<T>(
    pause: Duration,
    mut attempt: impl FnMut() -> Result<T, NodeError>,
) -> Result<T, NodeError> {
    for _ in 0..NOT_OURS_YET_TRIES {
        match attempt() {
            Err(NodeError::Denied { .. }) => sleep(pause),
            outcome => return outcome,
        }
    }
    attempt()
}

/// Lets the host's drivers look at one interface. A process that just died may hold its claim a moment longer.
fn connect(file: &UsbfsFile, interface: u8, node: &Path) -> Result<(), NodeError> {
    for _ in 0..STILL_CLAIMED_TRIES {
        match file.connect_driver(interface) {
            // No driver wants it, or it has one already.
            Ok(()) | Err(Errno::ENODEV | Errno::ENXIO | Errno::ENODATA) => return Ok(()),
            Err(Errno::EBUSY) if file.driver(interface).is_ok_and(|name| name != "usbfs") => return Ok(()),
            Err(Errno::EBUSY) => sleep(STILL_CLAIMED_PAUSE),
            Err(errno) => return Err(kernel(node, "giving an interface to the host's drivers", errno)),
        }
    }
    Err(NodeError::Claimed { node: node.to_owned(), interface })
}

fn detach_drivers(device: &Present, node: &Path, ready: &mut Ready) -> Result<(), NodeError> {
    for interface in interfaces_of(device, ready.configuration) {
        let mut tries = 0;
        loop {
            match ready.file.driver(interface) {
                Err(Errno::ENODATA) => break,
                Ok(name) if name == "usbfs" => {
                    tries += 1;
                    if tries >= STILL_CLAIMED_TRIES {
                        return Err(NodeError::Claimed { node: node.to_owned(), interface });
                    }
                    sleep(STILL_CLAIMED_PAUSE);
                }
                Ok(name) => {
                    match ready.file.disconnect_driver(interface) {
                        Ok(()) => ready.drivers.push((interface, name)),
                        Err(Errno::ENODATA) => {}
                        Err(errno) => return Err(kernel(node, "detaching a host driver", errno)),
                    }
                    break;
                }
                // The interface of another configuration than sysfs showed a moment ago.
                Err(Errno::EINVAL | Errno::ENOENT) => break,
                Err(errno) => return Err(kernel(node, "asking for the driver of an interface", errno)),
            }
        }
    }
    Ok(())
}

/// Whether the host has authorized it: as it is now, or as the inventory says when that cannot be read.
fn is_authorized(device: &Present) -> bool {
    let now = crate::sysfs::number::<u8>(&device.plug.syspath, "authorized").map(|value| value != 0);
    now.unwrap_or(device.facts.authorized)
}

/// The configuration that is set now.
fn active_configuration(device: &Present) -> Option<u8> {
    crate::sysfs::number::<u8>(&device.plug.syspath, "bConfigurationValue").filter(|value| *value != 0)
}

/// Numbers of the interfaces of one configuration, each once.
fn interfaces_of(device: &Present, configuration: u8) -> Vec<u8> {
    let of_it = device.facts.interfaces.iter().filter(|one| one.configuration == configuration);
    let mut numbers: Vec<u8> = of_it.map(|one| one.number).collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

/// The configuration that Linux would choose: the first whose first interface is not the vendor's own
/// (`generic.c usb_choose_configuration`).
fn usual_configuration(device: &Present) -> Option<u8> {
    let all: Vec<u8> = descriptors::configurations(&device.descriptors).collect();
    let first_class = |value: u8| {
        let mut of_it = device.facts.interfaces.iter().filter(|one| one.configuration == value);
        of_it.next().map(|one| one.class.class)
    };
    all.iter().copied().find(|value| first_class(*value) != Some(CLASS_VENDOR)).or(all.first().copied())
}

fn kernel(node: &Path, what: &'static str, errno: Errno) -> NodeError {
    match errno {
        Errno::ENODEV => NodeError::Gone { node: node.to_owned() },
        errno => NodeError::Kernel { node: node.to_owned(), what, source: errno.into() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sysfs::tests::Tree;

    /// A made-up tree with one device whose "node" is `target` (a link or a file made by the caller).
    fn device(tree: &Tree) -> (Present, Nodes) {
        tree.plug("1-1", 3);
        let nodes = Nodes { root: tree.path("nodes"), sysfs_service: tree.path("no-service") };
        fs::create_dir_all(nodes.root.join("001")).unwrap();
        (tree.scan().devices.remove(0), nodes)
    }

    #[test]
    fn node_that_is_a_link_is_not_followed() {
        let tree = Tree::new();
        let (device, nodes) = device(&tree);
        std::os::unix::fs::symlink("/dev/null", nodes.path(device.facts.address)).unwrap();
        let error = nodes.prepare(&device, Options::default()).unwrap_err();
        assert!(matches!(error, NodeError::Kernel { what: "open", .. }), "{error:?}");
    }

    #[test]
    fn node_of_another_number_is_another_device() {
        let tree = Tree::new();
        let (device, nodes) = device(&tree);
        fs::write(nodes.path(device.facts.address), "").unwrap();
        let error = nodes.prepare(&device, Options::default()).unwrap_err();
        assert!(matches!(error, NodeError::OtherDevice { what: "device number", .. }), "{error:?}");
        assert!(Failure::from(&error).stale);
    }

    #[test]
    fn missing_node_is_a_device_that_is_gone() {
        let tree = Tree::new();
        let (device, nodes) = device(&tree);
        let error = nodes.prepare(&device, Options::default()).unwrap_err();
        assert!(matches!(error, NodeError::Gone { .. }) && error.is_stale());
    }

    #[test]
    fn node_that_udev_gives_to_us_a_moment_later_is_opened() {
        let denied = || Err(NodeError::Denied { node: "/dev/bus/usb/001/002".into() });
        let mut answers = [denied(), denied(), Ok(7)].into_iter();
        assert_eq!(while_denied(Duration::ZERO, || answers.next().unwrap()).unwrap(), 7);
        let mut tries = 0;
        let never: Result<(), _> = while_denied(Duration::ZERO, || {
            tries += 1;
            Err(NodeError::Denied { node: "/dev/bus/usb/001/002".into() })
        });
        assert!(matches!(never, Err(NodeError::Denied { .. })) && tries == NOT_OURS_YET_TRIES + 1);
    }

    #[test]
    fn unauthorized_device_is_not_opened() {
        let tree = Tree::new();
        let (device, nodes) = device(&tree);
        fs::write(device.plug.syspath.join("authorized"), "0\n").unwrap();
        let error = nodes.prepare(&device, Options::default()).unwrap_err();
        assert!(matches!(error, NodeError::Unauthorized { .. }));
        // Unless that is ours to change; then it is asked for, here of nobody.
        let options = Options { authorize: true, ..Options::default() };
        let error = nodes.prepare(&device, options).unwrap_err();
        assert!(matches!(error, NodeError::Sysfs(AskError::NotThere { .. })), "{error:?}");
    }

    #[test]
    fn without_the_service_the_message_tells_how_to_switch_it_on() {
        let tree = Tree::new();
        let (device, nodes) = device(&tree);
        let failure = Failure::from(&nodes.cycle_port(&device).unwrap_err());
        assert!(failure.text.contains("systemctl enable --now usbpolicyd-sysfs.socket"), "{}", failure.text);
        assert!(!failure.stale);
    }

    #[test]
    fn vendors_own_configuration_is_not_the_usual_one() {
        let tree = Tree::new();
        let (mut device, _) = device(&tree);
        device.descriptors = vec![0; 18];
        device.descriptors.extend([9, 2, 18, 0, 1, 1, 0, 0x80, 50, 9, 2, 18, 0, 1, 2, 0, 0x80, 50]);
        let mut second = device.facts.interfaces[0].clone();
        second.configuration = 2;
        device.facts.interfaces[0].class.class = CLASS_VENDOR;
        device.facts.interfaces.push(second);
        assert_eq!(usual_configuration(&device), Some(2));
    }
}
