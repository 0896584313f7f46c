//! The kernel's half of a device: its file, its URBs, its claims. Travels between the event loop and a lane, so that
//! only one of them can make calls on the device.

use std::os::fd::OwnedFd;

use common::ids::{BusAddress, PortChain, Speed, VendorProduct};
use common::limited;
use common::usbfs::{Capabilities, INTERFACES_MAX, NotUsbfs, UrbQueue, UrbToken, UsbfsFile};
use nix::errno::Errno;

use super::descriptors::Descriptors;
use super::{status, uas};
use crate::urb::{DeviceOp, OpError};

/// `bDeviceClass` of hubs, which reach devices of others.
const CLASS_HUB: u8 = 9;
/// Stream ids asked for when we look whether the host has streams: as many as the controller's largest stream array has.
const STREAMS_TO_PROBE: u16 = 31;

/// What usbpolicyd says about a file it hands over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handover {
    /// Where the device was when it was opened.
    pub address: BusAddress,
    /// `bConfigurationValue` that is active, 0 for none.
    pub configuration: u8,
}

/// What we found out about a device from its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Bus and device number.
    pub address: BusAddress,
    /// Way from the root port.
    pub path: PortChain,
    /// Speed on the host.
    pub speed: Speed,
    /// Vendor and product.
    pub ids: VendorProduct,
    /// Whether the guest is not shown UAS, because the host has no streams for this device.
    pub uas_hidden: bool,
}

/// Why a device is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The file is not what it should be.
    #[error("not a usable USB device node")]
    BadFile(#[source] NotUsbfs),
    /// The file is of another device.
    #[error("the file is device {found}, not {expected}")]
    WrongDevice {
        /// As handed over.
        expected: BusAddress,
        /// As the file says.
        found: BusAddress,
    },
    /// The kernel refuses a call that each device allows.
    #[error("the kernel refuses {what}")]
    Kernel {
        /// The call.
        what: &'static str,
        /// Why.
        #[source]
        errno: Errno,
    },
    /// A driver or another program holds an interface.
    #[error("interface {interface} cannot be claimed")]
    Claim {
        /// `bInterfaceNumber`.
        interface: u8,
        /// Why.
        #[source]
        errno: Errno,
    },
    /// A device we never serve, or none we understand.
    #[error("{0}")]
    Unusable(&'static str),
}

/// File, URBs and claims of an open device.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) urbs: UrbQueue,
    pub(super) capabilities: Capabilities,
    /// Interfaces whose UAS setting the guest must not see.
    pub(super) uas_hidden: Vec<u8>,
    descriptors: Descriptors,
    /// `bConfigurationValue`, 0 for none.
    configuration: u8,
    /// Nothing has set the configuration since the device was handed over or reset, so that setting the same value
    /// again would change nothing and needs no call.
    fresh: bool,
    /// Bit `n`: interface `n` is claimed.
    claimed: u64,
}

impl Link {
    /// Takes a file: looks whether it is what it should be, claims all interfaces. Can wait.
    pub(super) fn open(fd: OwnedFd, handover: &Handover) -> Result<(Self, DeviceInfo), Refused> {
        let kernel = |what| move |errno| Refused::Kernel { what, errno };
        let file = UsbfsFile::new(fd).map_err(Refused::BadFile)?;
        let found = file.connection_info().map_err(kernel("CONNINFO_EX"))?;
        if found.address != handover.address {
            return Err(Refused::WrongDevice { expected: handover.address, found: found.address });
        }
        let path = found.ports.ok_or(Refused::Unusable("a root hub is not for a guest"))?;
        let speed = found.speed.ok_or(Refused::Unusable("the device runs at a speed we do not know"))?;
        let capabilities = file.capabilities().map_err(kernel("GET_CAPABILITIES"))?;
        let bytes = file.descriptors().map_err(kernel("to read the descriptors"))?;
        let descriptors = Descriptors::parse(&bytes)
            .map_err(|_| Refused::Unusable("the device has no device descriptor"))?;
        if descriptors.class == CLASS_HUB {
            return Err(Refused::Unusable("a hub is not for a guest"));
        }
        if handover.configuration != 0 && descriptors.configuration(handover.configuration).is_none() {
            return Err(Refused::Unusable("the active configuration has no descriptor"));
        }
        let ids = VendorProduct { vendor: descriptors.vendor, product: descriptors.product };
        let mut link = Self {
            urbs: UrbQueue::new(file),
            capabilities,
            uas_hidden: Vec::new(),
            descriptors,
            configuration: handover.configuration,
            fresh: true,
            claimed: 0,
        };
        link.claim_all().map_err(|(interface, errno)| Refused::Claim { interface, errno })?;
        if speed.is_usb3() && !link.has_streams() {
            link.uas_hidden = uas::interfaces_with_a_choice(&link.descriptors);
        }
        let uas_hidden = !link.uas_hidden.is_empty();
        Ok((link, DeviceInfo { address: found.address, path, speed, ids, uas_hidden }))
    }

    /// Cancels transfers in this order. Can wait.
    pub(super) fn discard(&mut self, tokens: &[UrbToken]) {
        for &token in tokens {
            match self.urbs.discard(token) {
                Ok(_) => {}
                Err(Errno::ENODEV) => return,
                Err(error) => limited!(debug, %error, "a transfer could not be cancelled"),
            }
        }
    }

    /// Carries out an operation. Can wait.
    pub(super) fn operate(&mut self, op: &DeviceOp) -> Result<(), OpError> {
        let result = match op {
            DeviceOp::SetConfiguration { value } => self.set_configuration(*value),
            DeviceOp::SetInterface { interface, alternate } => self.set_interface(*interface, *alternate),
            DeviceOp::ClearHalt { endpoint } => self.urbs.file().clear_halt(*endpoint),
            DeviceOp::Reset => self.reset(),
            DeviceOp::AllocStreams { endpoints, streams } => self.alloc_streams(endpoints, *streams),
            DeviceOp::FreeStreams { endpoints } => self.urbs.file().free_streams(endpoints),
            DeviceOp::Suspend if self.capabilities.has_suspend() => self.urbs.file().allow_suspend(),
            DeviceOp::Resume if self.capabilities.has_suspend() => self.urbs.file().forbid_suspend(),
            DeviceOp::Suspend | DeviceOp::Resume => Ok(()),
        };
        result.map_err(|errno| {
            limited!(debug, ?op, %errno, "operation failed");
            status::of_operation(errno)
        })
    }

    fn set_configuration(&mut self, value: u8) -> nix::Result<()> {
        // A guest's first SET_CONFIGURATION mostly names what the host has set. Setting it again would reset all
        // endpoints, and some devices do not like that.
        if std::mem::take(&mut self.fresh) && value == self.configuration {
            return Ok(());
        }
        // The kernel refuses while anything is claimed, also by us (`devio.c proc_setconfig`).
        self.release_all();
        let result = self.urbs.file().set_configuration(value);
        if result.is_ok() {
            self.configuration = value;
        }
        let claims = self.claim_all();
        result.and(claims.map_err(|(_, errno)| busy(errno)))
    }

    fn set_interface(&mut self, interface: u8, alternate: u8) -> nix::Result<()> {
        self.fresh = false;
        self.urbs.file().set_interface(interface, alternate)
    }

    fn reset(&mut self) -> nix::Result<()> {
        // The kernel takes all usbfs claims away in a reset, and host drivers may come back (`hub.c
        // usb_reset_device`: usbfs has no pre_reset).
        self.release_all();
        let result = self.urbs.file().reset();
        let claims = self.claim_all();
        self.fresh = true;
        match result {
            // EINVAL and the like mean nothing to the controller here; only a device that is gone does.
            Err(errno @ (Errno::ENODEV | Errno::ESHUTDOWN | Errno::ENOTCONN)) => Err(errno),
            Err(_) => Err(Errno::EIO),
            Ok(()) => claims.map_err(|(_, errno)| busy(errno)),
        }
    }

    fn alloc_streams(&mut self, endpoints: &[u8], streams: u16) -> nix::Result<()> {
        let file = self.urbs.file();
        let configuration = self.descriptors.configuration(self.configuration);
        let needed = configuration.map_or(streams, |active| active.usable_streams(endpoints, streams));
        let granted = file.alloc_streams(endpoints, needed)?;
        if granted < u32::from(needed) {
            file.free_streams(endpoints)?;
            return Err(Errno::ENOSPC);
        }
        Ok(())
    }

    /// Takes every interface of the active configuration. Those that the kernel cannot claim (it knows 32 at most) are
    /// left out: their endpoints will not work.
    fn claim_all(&mut self) -> Result<(), (u8, Errno)> {
        let Some(configuration) = self.descriptors.configuration(self.configuration) else { return Ok(()) };
        let file = self.urbs.file();
        let mut first_error = Ok(());
        let mut unknown = 0;
        for interface in configuration.interfaces() {
            if interface >= INTERFACES_MAX {
                continue;
            }
            let claimed = match file.claim_interface(interface) {
                Err(Errno::EBUSY) => file.disconnect_and_claim(interface),
                other => other,
            };
            match claimed {
                Ok(()) => self.claimed |= 1 << interface,
                Err(Errno::ENOENT | Errno::EINVAL) => unknown += 1,
                Err(errno) => first_error = first_error.and(Err((interface, errno))),
            }
        }
        if unknown > 0 {
            limited!(warn, unknown, "the kernel does not know some of the interfaces");
        }
        first_error
    }

    fn release_all(&mut self) {
        for interface in 0..INTERFACES_MAX {
            if self.claimed & (1 << interface) != 0
                && let Err(error) = self.urbs.file().release_interface(interface)
            {
                limited!(debug, interface, %error, "interface could not be released");
            }
        }
        self.claimed = 0;
    }

    /// Whether the host gives streams to a UAS setting of the active configuration. True when there is no such thing.
    fn has_streams(&self) -> bool {
        let file = self.urbs.file();
        let Some(configuration) = self.descriptors.configuration(self.configuration) else { return true };
        uas::settings(configuration).all(|setting| {
            let endpoints: Vec<u8> = setting
                .endpoints
                .iter()
                .filter(|endpoint| endpoint.is_bulk() && endpoint.streams_exponent > 0)
                .map(|endpoint| endpoint.address)
                .collect();
            if endpoints.is_empty() || file.set_interface(setting.interface, setting.setting).is_err() {
                return false;
            }
            let needed = configuration.usable_streams(&endpoints, STREAMS_TO_PROBE);
            let granted = file.alloc_streams(&endpoints, needed);
            limited!(debug, interface = setting.interface, needed, ?granted, "looked for streams");
            if granted.is_ok()
                && let Err(error) = file.free_streams(&endpoints)
            {
                limited!(warn, %error, "streams could not be given back");
            }
            if let Err(error) = file.set_interface(setting.interface, 0) {
                limited!(warn, %error, "alternate setting 0 could not be restored");
            }
            granted.is_ok_and(|count| count >= u32::from(needed))
        })
    }
}

/// A claim that fails is trouble on the host, whatever its number says.
fn busy(errno: Errno) -> Errno {
    if matches!(errno, Errno::ENODEV | Errno::ESHUTDOWN) { errno } else { Errno::EBUSY }
}
