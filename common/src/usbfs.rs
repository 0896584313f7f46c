//! The kernel's usbfs interface: one safe function for each ioctl of a `/dev/bus/usb` node (`drivers/usb/core/devio.c`),
//! asynchronous transfers ([`UrbQueue`]) and memory the host controller can reach ([`MappedBuffer`]).
//!
//! All `unsafe` of both daemons is below this module. What it offers is safe to misuse: a wrong call gets an error from
//! the kernel, never memory that is written behind somebody's back. It keeps no policy: no retries, no deadlines.

#![expect(unsafe_code, reason = "usbfs ioctls")]

mod memory;
mod queue;
mod sys;

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc::{self, c_int, c_uint};
use nix::sys::stat::{SFlag, fstat, major};

pub use memory::{MappedBuffer, UrbBuffer};
pub use queue::{IN_FLIGHT_MAX, PacketOutcome, ReapError, Reaped, SubmitError, UrbKind, UrbQueue, UrbToken};
pub use sys::number;

use crate::ids::{BusAddress, PORT_CHAIN_MAX, PortChain, Speed};
use sys::call;

/// The most packets of one isochronous URB (`devio.c proc_do_submiturb`).
pub const ISO_PACKETS_MAX: usize = 128;

/// Interfaces from this number on cannot be claimed (`devio.c claimintf`, bits of a long).
pub const INTERFACES_MAX: u8 = 64;

/// Major number of USB device nodes (`USB_DEVICE_MAJOR`).
const USB_DEVICE_MAJOR: u64 = 189;

/// Where the descriptors of a node end for us: device descriptor and eight configurations of 64 KiB would be more, but
/// no device comes near, and the bytes are the device's word.
const DESCRIPTORS_MAX: usize = 128 * 1024;

/// What the kernel or the host controller offers for a device (`USBDEVFS_GET_CAPABILITIES`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities(pub u32);

impl Capabilities {
    /// A short packet stops what follows on the host side (`USBDEVFS_CAP_BULK_CONTINUATION`).
    pub const fn has_bulk_continuation(self) -> bool {
        self.0 & 0x02 != 0
    }

    /// Large bulk transfers need no contiguous memory (`USBDEVFS_CAP_BULK_SCATTER_GATHER`).
    pub const fn has_scatter_gather(self) -> bool {
        self.0 & 0x08 != 0
    }

    /// URBs can be reaped when the device is gone (`USBDEVFS_CAP_REAP_AFTER_DISCONNECT`).
    pub const fn has_reap_after_disconnect(self) -> bool {
        self.0 & 0x10 != 0
    }

    /// [`UsbfsFile::allow_suspend`] works (`USBDEVFS_CAP_SUSPEND`).
    pub const fn has_suspend(self) -> bool {
        self.0 & 0x100 != 0
    }

    /// [`UsbfsFile::map`] works (`USBDEVFS_CAP_MMAP`).
    pub const fn has_mmap(self) -> bool {
        self.0 & 0x20 != 0
    }
}

/// Which device an open file belongs to (`USBDEVFS_CONNINFO_EX`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionInfo {
    /// Bus and device number.
    pub address: BusAddress,
    /// Speed, unless it is one we do not serve.
    pub speed: Option<Speed>,
    /// Way from the root hub; none for a root hub itself.
    pub ports: Option<PortChain>,
}

/// A file is not an open USB device we can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotUsbfs {
    /// It is a regular file, a socket, a pipe or a block device.
    #[error("the file is no character device")]
    NoCharacterDevice,
    /// It is another character device.
    #[error("the file is a character device of major {0}, USB devices have 189")]
    OtherDevice(u64),
    /// It was opened without write access, so the kernel would refuse every ioctl.
    #[error("the device node is not open for reading and writing")]
    NotReadWrite,
    /// The kernel does not answer as usbfs does, or the device has gone.
    #[error("the kernel does not say which device this is")]
    Kernel(#[source] Errno),
}

/// An open file of a USB device node. Claims belong to the open file description, so a duplicate shares them.
#[derive(Clone, Debug)]
pub struct UsbfsFile {
    /// Shared with whoever watches the file in an epoll set; the last one closes it.
    fd: Arc<OwnedFd>,
}

impl AsFd for UsbfsFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl UsbfsFile {
    /// Takes a file that somebody handed us, after a look at what it is.
    pub fn new(fd: OwnedFd) -> Result<Self, NotUsbfs> {
        let stat = fstat(&fd).map_err(NotUsbfs::Kernel)?;
        if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFCHR {
            return Err(NotUsbfs::NoCharacterDevice);
        }
        if major(stat.st_rdev) != USB_DEVICE_MAJOR {
            return Err(NotUsbfs::OtherDevice(major(stat.st_rdev)));
        }
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(NotUsbfs::Kernel)?;
        if OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE != OFlag::O_RDWR {
            return Err(NotUsbfs::NotReadWrite);
        }
        let file = Self { fd: Arc::new(fd) };
        file.connection_info().map_err(NotUsbfs::Kernel)?;
        Ok(file)
    }

    fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// What kernel and host controller can do for this device.
    pub fn capabilities(&self) -> nix::Result<Capabilities> {
        let mut bits = 0_u32;
        // SAFETY: the kernel writes one u32, and `bits` is one.
        unsafe { call::get_capabilities(self.raw(), &raw mut bits) }?;
        Ok(Capabilities(bits))
    }

    /// Which device the file belongs to. Trustworthy: it comes from the kernel, not from a path or the device.
    pub fn connection_info(&self) -> nix::Result<ConnectionInfo> {
        let mut info = sys::ConnInfoEx::default();
        // SAFETY: the number says 24 bytes, and `info` is 24 bytes.
        unsafe { call::conninfo_ex(self.raw(), &raw mut info) }?;
        let count = usize::from(info.port_count).min(PORT_CHAIN_MAX);
        Ok(ConnectionInfo {
            address: BusAddress { bus: info.bus, device: info.device },
            speed: Speed::from_kernel(info.speed),
            ports: PortChain::new(&info.ports[..count]),
        })
    }

    /// The speed the device runs at, unless it is one we do not serve.
    pub fn speed(&self) -> nix::Result<Option<Speed>> {
        // SAFETY: no argument.
        let speed = unsafe { call::get_speed(self.raw()) }?;
        Ok(u32::try_from(speed).ok().and_then(Speed::from_kernel))
    }

    /// The kernel's copy of the descriptors: the device descriptor, then each configuration with what belongs to it.
    /// At most 128 KiB. The bytes are the device's word.
    pub fn descriptors(&self) -> nix::Result<Vec<u8>> {
        const STEP: usize = 4096;
        let mut bytes = Vec::new();
        while bytes.len() < DESCRIPTORS_MAX {
            let start = bytes.len();
            bytes.resize(start + STEP, 0);
            let offset = libc::off_t::try_from(start).map_err(|_| Errno::EOVERFLOW)?;
            let got = nix::sys::uio::pread(&self.fd, &mut bytes[start..], offset)?;
            bytes.truncate(start + got);
            if got == 0 {
                break;
            }
        }
        Ok(bytes)
    }

    /// Takes an interface that no driver holds. `EBUSY`: one does.
    pub fn claim_interface(&self, interface: u8) -> nix::Result<()> {
        let number = c_uint::from(interface);
        // SAFETY: the kernel reads one unsigned int, and `number` is one.
        unsafe { call::claim_interface(self.raw(), &raw const number) }.map(drop)
    }

    /// Gives an interface back. Its URBs are cancelled, its alternate setting becomes 0; no host driver is bound.
    pub fn release_interface(&self, interface: u8) -> nix::Result<()> {
        let number = c_uint::from(interface);
        // SAFETY: the kernel reads one unsigned int, and `number` is one.
        unsafe { call::release_interface(self.raw(), &raw const number) }.map(drop)
    }

    /// Takes an interface away from a host driver and claims it, unless another usbfs user holds it (`EBUSY`).
    /// `EACCES` after [`Self::drop_privileges`].
    pub fn disconnect_and_claim(&self, interface: u8) -> nix::Result<()> {
        let mut arg =
            sys::DisconnectClaim { interface: interface.into(), flags: sys::EXCEPT_DRIVER, driver: [0; 256] };
        for (to, from) in arg.driver.iter_mut().zip(b"usbfs") {
            *to = from.cast_signed();
        }
        // SAFETY: the kernel reads one `struct usbdevfs_disconnect_claim`, and `arg` is one.
        unsafe { call::disconnect_claim(self.raw(), &raw const arg) }.map(drop)
    }

    /// Takes an interface away from its host driver. `ENODATA`: it has none.
    pub fn disconnect_driver(&self, interface: u8) -> nix::Result<()> {
        self.driver_ioctl(interface, sys::DISCONNECT)
    }

    /// Lets host drivers look at an interface again.
    pub fn connect_driver(&self, interface: u8) -> nix::Result<()> {
        self.driver_ioctl(interface, sys::CONNECT)
    }

    fn driver_ioctl(&self, interface: u8, code: c_int) -> nix::Result<()> {
        let mut arg = sys::DriverIoctl { interface: interface.into(), code, data: std::ptr::null_mut() };
        // SAFETY: the kernel reads one `struct usbdevfs_ioctl`, and `arg` is one; DISCONNECT and CONNECT carry no data.
        unsafe { call::driver_ioctl(self.raw(), &raw mut arg) }.map(drop)
    }

    /// Name of the driver that holds an interface, `usbfs` for us. `ENODATA`: none does.
    pub fn driver(&self, interface: u8) -> nix::Result<String> {
        let mut arg = sys::GetDriver { interface: interface.into(), driver: [0; 256] };
        // SAFETY: the kernel reads and writes one `struct usbdevfs_getdriver`, and `arg` is one.
        unsafe { call::get_driver(self.raw(), &raw mut arg) }?;
        let bytes = arg.driver.map(i8::cast_unsigned);
        let name = CStr::from_bytes_until_nul(&bytes).map_err(|_| Errno::EILSEQ)?;
        Ok(name.to_string_lossy().into_owned())
    }

    /// SET_INTERFACE. Cancels the URBs of the interface first. Can wait 5 s for the device.
    pub fn set_interface(&self, interface: u8, alternate: u8) -> nix::Result<()> {
        let arg = sys::SetInterface { interface: interface.into(), alternate: alternate.into() };
        // SAFETY: the kernel reads one `struct usbdevfs_setinterface`, and `arg` is one.
        unsafe { call::set_interface(self.raw(), &raw const arg) }.map(drop)
    }

    /// SET_CONFIGURATION; 0 unconfigures. `EBUSY` while any interface is claimed, also by ourselves. Can wait 5 s.
    pub fn set_configuration(&self, value: u8) -> nix::Result<()> {
        let value = c_uint::from(value);
        // SAFETY: the kernel reads one int, and `value` has its size.
        unsafe { call::set_configuration(self.raw(), &raw const value) }.map(drop)
    }

    /// CLEAR_FEATURE(ENDPOINT_HALT), and the host's toggle back to 0. Not with URBs in flight there. Can wait 5 s.
    pub fn clear_halt(&self, endpoint: u8) -> nix::Result<()> {
        let endpoint = c_uint::from(endpoint);
        // SAFETY: the kernel reads one unsigned int, and `endpoint` is one.
        unsafe { call::clear_halt(self.raw(), &raw const endpoint) }.map(drop)
    }

    /// Resets the device on its port. **All claims are lost.** `ENODEV`: it came back as another device. Can wait
    /// many seconds.
    pub fn reset(&self) -> nix::Result<()> {
        // SAFETY: no argument.
        unsafe { call::reset(self.raw()) }.map(drop)
    }

    /// Lets the host suspend the device although its file is open. It does if its `power/control` is `auto`.
    pub fn allow_suspend(&self) -> nix::Result<()> {
        // SAFETY: no argument.
        unsafe { call::allow_suspend(self.raw()) }.map(drop)
    }

    /// Wakes the device, and takes [`Self::allow_suspend`] back. Can wait.
    pub fn forbid_suspend(&self) -> nix::Result<()> {
        // SAFETY: no argument.
        unsafe { call::forbid_suspend(self.raw()) }.map(drop)
    }

    /// Allocates stream ids 1..=`streams` for bulk endpoints of one interface; says how many there are now.
    pub fn alloc_streams(&self, endpoints: &[u8], streams: u16) -> nix::Result<u32> {
        let arg = streams_argument(endpoints, streams.into())?;
        // SAFETY: the kernel reads the two counts and as many endpoints as they say, which `arg` holds.
        let granted = unsafe { call::alloc_streams(self.raw(), &raw const arg) }?;
        Ok(granted.unsigned_abs())
    }

    /// Gives the streams of these endpoints back. Cancels the URBs of the interface.
    pub fn free_streams(&self, endpoints: &[u8]) -> nix::Result<()> {
        let arg = streams_argument(endpoints, 0)?;
        // SAFETY: the kernel reads the two counts and as many endpoints as they say, which `arg` holds.
        unsafe { call::free_streams(self.raw(), &raw const arg) }.map(drop)
    }

    /// On the file of a hub: no host driver gets a device on this port. `EINVAL`: no hub. `EBUSY`: claimed already.
    pub fn claim_port(&self, port: u8) -> nix::Result<()> {
        let port = c_uint::from(port);
        // SAFETY: the kernel reads one unsigned int, and `port` is one.
        unsafe { call::claim_port(self.raw(), &raw const port) }.map(drop)
    }

    /// Takes [`Self::claim_port`] back.
    pub fn release_port(&self, port: u8) -> nix::Result<()> {
        let port = c_uint::from(port);
        // SAFETY: the kernel reads one unsigned int, and `port` is one.
        unsafe { call::release_port(self.raw(), &raw const port) }.map(drop)
    }

    /// For good, and for all duplicates of the file: no interface outside of the mask can be claimed, no host driver
    /// can be detached, no reset while others hold an interface.
    pub fn drop_privileges(&self, interfaces: u32) -> nix::Result<()> {
        // SAFETY: the kernel reads one u32, and `interfaces` is one.
        unsafe { call::drop_privileges(self.raw(), &raw const interfaces) }.map(drop)
    }

    /// A control transfer from the device, waited for. Returns how many bytes came. At most a page.
    pub fn control_in(&self, setup: [u8; 8], buf: &mut [u8], timeout: Duration) -> nix::Result<usize> {
        if setup[0] & 0x80 == 0 {
            return Err(Errno::EINVAL);
        }
        self.control(setup, buf, timeout)
    }

    /// A control transfer to the device, waited for. At most a page.
    pub fn control_out(&self, setup: [u8; 8], data: &[u8], timeout: Duration) -> nix::Result<usize> {
        if setup[0] & 0x80 != 0 {
            return Err(Errno::EINVAL);
        }
        self.control(setup, &mut data.to_vec(), timeout)
    }

    fn control(&self, setup: [u8; 8], buf: &mut [u8], timeout: Duration) -> nix::Result<usize> {
        let word = |at: usize| u16::from_le_bytes([setup[at], setup[at + 1]]);
        if buf.len() < usize::from(word(6)) {
            return Err(Errno::EINVAL);
        }
        let mut arg = sys::ControlTransfer {
            request_type: setup[0],
            request: setup[1],
            value: word(2),
            index: word(4),
            length: word(6),
            timeout_ms: u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX).max(1),
            data: buf.as_mut_ptr().cast(),
        };
        // SAFETY: `data` points to `buf`, which is at least `length` bytes long (checked above) and ours until the
        // call returns.
        let moved = unsafe { call::control(self.raw(), &raw mut arg) }?;
        Ok(usize::try_from(moved).unwrap_or(0).min(buf.len()))
    }
}

fn streams_argument(endpoints: &[u8], streams: c_uint) -> nix::Result<sys::Streams> {
    let mut arg = sys::Streams { streams, endpoint_count: 0, endpoints: [0; sys::STREAM_ENDPOINTS_MAX] };
    let room = arg.endpoints.get_mut(..endpoints.len()).ok_or(Errno::EINVAL)?;
    room.copy_from_slice(endpoints);
    arg.endpoint_count = c_uint::try_from(endpoints.len()).map_err(|_| Errno::EINVAL)?;
    Ok(arg)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &str, flags: OFlag) -> OwnedFd {
        nix::fcntl::open(path, flags | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty()).unwrap()
    }

    #[test]
    fn files_of_other_kinds_are_refused() {
        let regular = OwnedFd::from(tempfile::tempfile().unwrap());
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let null = open("/dev/null", OFlag::O_RDWR);

        assert_eq!(UsbfsFile::new(regular).unwrap_err(), NotUsbfs::NoCharacterDevice);
        assert_eq!(UsbfsFile::new(socket.into()).unwrap_err(), NotUsbfs::NoCharacterDevice);
        assert_eq!(UsbfsFile::new(null).unwrap_err(), NotUsbfs::OtherDevice(1));
    }

    #[test]
    fn more_stream_endpoints_than_an_interface_has_are_refused() {
        assert_eq!(streams_argument(&[1; 31], 4).err(), Some(Errno::EINVAL));
        assert_eq!(streams_argument(&[0x81, 0x02], 4).unwrap().endpoints[..3], [0x81, 0x02, 0]);
    }
}
