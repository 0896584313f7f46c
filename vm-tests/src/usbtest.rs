//! Drives the kernel's host controller test `usbtest.ko` through its ioctl (kernel `drivers/usb/misc/usbtest.c`,
//! `tools/usb/testusb.c`). What each case does is told in that driver; here are parameters under which it passes on a
//! correct host with a device of zeros (a SourceSink gadget, or [`crate::usbip::models::usbtest`]).

use std::ffi::c_int;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::{ioctl_readwrite, request_code_readwrite};
use serde::{Deserialize, Serialize};

/// `struct usbtest_param_64`.
#[repr(C)]
#[derive(Default)]
struct Param {
    case: u32,
    iterations: u32,
    length: u32,
    vary: u32,
    sglen: u32,
    seconds: i64,
    microseconds: i64,
}

/// `struct usbdevfs_ioctl`: an ioctl of the driver of an interface.
#[repr(C)]
struct DriverIoctl {
    interface: c_int,
    code: c_int,
    data: *mut Param,
}

const USBTEST_REQUEST: c_int = request_code_readwrite!(b'U', 100, size_of::<Param>()) as c_int;

mod raw {
    use super::{DriverIoctl, ioctl_readwrite};

    ioctl_readwrite!(driver_ioctl, b'U', 18, DriverIoctl);
}

/// One call of one case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Number of the case.
    pub case: u32,
    /// How often.
    pub iterations: u32,
    /// Bytes of a transfer.
    pub length: u32,
    /// By how many bytes the length changes from one transfer to the next.
    pub vary: u32,
    /// Scatter list entries, or transfers in flight.
    pub sglen: u32,
}

/// How a call ended.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// The call.
    pub call: Call,
    /// 0 or the errno.
    pub errno: i32,
    /// What the errno is called, or `ok`.
    pub result: String,
    /// Time that the kernel took.
    pub seconds: f64,
}

/// Which cases a device can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// Control and bulk: a SourceSink gadget, or alternate setting 0.
    Bulk,
    /// Isochronous, and control: `modprobe usbtest alt=1`.
    Isochronous,
    /// Interrupt, and control: `modprobe usbtest alt=2`.
    Interrupt,
}

const fn call(case: u32, iterations: u32, length: u32, vary: u32, sglen: u32) -> Call {
    Call { case, iterations, length, vary, sglen }
}

/// Each case with two or more sizes. Lengths of reads and their steps are whole packets at every speed, else the device
/// would babble by design; lengths of writes need not be. Few rounds: where two levels of processors are emulated and
/// busy, a transfer takes a quarter of a second.
const BULK: &[Call] = &[
    call(0, 1, 512, 0, 0),
    call(0, 100, 1024, 0, 0),
    call(1, 25, 512, 0, 0),
    call(1, 5, 65_536, 0, 0),
    call(2, 25, 1024, 0, 0),
    call(2, 5, 65_536, 0, 0),
    call(3, 25, 4096, 1024, 0),
    call(3, 10, 20_011, 1431, 0),
    call(4, 25, 4096, 1024, 0),
    call(4, 10, 65_536, 9216, 0),
    call(5, 5, 1024, 0, 32),
    call(5, 5, 65_536, 0, 16),
    call(6, 5, 1024, 0, 32),
    call(6, 5, 65_536, 0, 16),
    call(7, 5, 4096, 1024, 32),
    call(7, 5, 32_768, 3072, 16),
    call(8, 5, 4096, 1024, 32),
    call(8, 5, 32_768, 3072, 16),
    call(9, 1, 512, 0, 0),
    call(9, 3, 512, 0, 0),
    call(10, 5, 512, 0, 5),
    call(10, 5, 512, 0, 32),
    call(11, 5, 1024, 0, 0),
    call(11, 5, 65_536, 0, 0),
    call(12, 5, 1024, 0, 0),
    call(12, 5, 65_536, 0, 0),
    call(13, 1, 512, 0, 0),
    call(13, 4, 512, 0, 0),
    call(14, 10, 255, 17, 0),
    call(14, 10, 1024, 501, 0),
    call(17, 10, 1024, 0, 0),
    call(17, 5, 65_536, 0, 0),
    call(18, 10, 1024, 0, 0),
    call(18, 5, 65_536, 0, 0),
    call(19, 10, 1024, 0, 0),
    call(19, 5, 65_536, 0, 0),
    call(20, 10, 1024, 0, 0),
    call(20, 5, 65_536, 0, 0),
    call(21, 10, 255, 17, 0),
    call(21, 10, 1024, 501, 0),
    call(24, 5, 1024, 0, 8),
    call(24, 5, 16_384, 0, 32),
    call(27, 10, 65_536, 0, 8),
    call(27, 10, 131_072, 0, 32),
    call(28, 10, 65_536, 0, 8),
    call(28, 10, 131_072, 0, 32),
    call(29, 1, 512, 0, 0),
    call(29, 4, 512, 0, 0),
];

const ISOCHRONOUS: &[Call] = &[
    call(9, 1, 512, 0, 0),
    call(9, 3, 512, 0, 0),
    call(15, 10, 8192, 0, 4),
    call(15, 10, 32_768, 0, 8),
    call(16, 10, 8192, 0, 4),
    call(16, 10, 32_768, 0, 8),
    call(22, 10, 8192, 0, 4),
    call(22, 10, 32_768, 0, 8),
    call(23, 10, 8192, 0, 4),
    call(23, 10, 32_768, 0, 8),
];

const INTERRUPT: &[Call] = &[
    call(9, 1, 512, 0, 0),
    call(9, 3, 512, 0, 0),
    call(25, 25, 64, 0, 0),
    call(25, 25, 1024, 0, 0),
    call(26, 25, 64, 0, 0),
    call(26, 25, 1024, 0, 0),
];

impl Suite {
    /// The calls of the suite, by case.
    pub const fn calls(self) -> &'static [Call] {
        match self {
            Self::Bulk => BULK,
            Self::Isochronous => ISOCHRONOUS,
            Self::Interrupt => INTERRUPT,
        }
    }
}

/// The node of the first device that the `usbtest` driver is bound to.
pub fn find_node() -> Result<PathBuf> {
    let driver = Path::new("/sys/bus/usb/drivers/usbtest");
    let entries =
        fs::read_dir(driver).with_context(|| format!("read {} (is usbtest loaded?)", driver.display()))?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some((device, _)) = name.to_str().and_then(|name| name.split_once(':')) else { continue };
        let number = |file: &str| -> Result<u32> {
            let path = Path::new("/sys/bus/usb/devices").join(device).join(file);
            let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            text.trim().parse().with_context(|| format!("number in {}", path.display()))
        };
        return Ok(PathBuf::from(format!("/dev/bus/usb/{:03}/{:03}", number("busnum")?, number("devnum")?)));
    }
    bail!("no device is bound to usbtest")
}

/// An open device that `usbtest` is bound to.
pub struct Device(File);

impl Device {
    /// Opens a node below `/dev/bus/usb`.
    pub fn open(path: &Path) -> Result<Self> {
        let open = OpenOptions::new().read(true).write(true).open(path);
        open.map(Self).with_context(|| format!("open {}", path.display()))
    }

    /// Lets the kernel run one case on interface 0, and waits for it.
    pub fn run(&self, call: Call) -> Outcome {
        let Call { case, iterations, length, vary, sglen } = call;
        let mut param = Param { case, iterations, length, vary, sglen, ..Param::default() };
        let mut ioctl = DriverIoctl { interface: 0, code: USBTEST_REQUEST, data: &raw mut param };
        #[expect(unsafe_code, reason = "usbfs ioctls")]
        // SAFETY: `ioctl` is a struct usbdevfs_ioctl, and the kernel copies as many bytes of `data` in and out as its
        // code tells: the size of `Param`, which lives until the end of this function.
        let result = unsafe { raw::driver_ioctl(self.0.as_raw_fd(), &raw mut ioctl) };
        let errno = result.err();
        Outcome {
            call,
            errno: errno.map_or(0, |errno| errno as i32),
            result: errno.map_or_else(|| "ok".to_owned(), |errno: Errno| format!("{errno:?}")),
            seconds: param.seconds as f64 + param.microseconds as f64 / 1e6,
        }
    }
}

impl Outcome {
    /// One line of a table.
    pub fn line(&self) -> String {
        let Call { case, iterations, length, vary, sglen } = self.call;
        let (result, seconds) = (&self.result, self.seconds);
        format!("{case:4} {iterations:6} {length:8} {vary:6} {sglen:6}  {result:10} {seconds:9.6}")
    }

    /// What stands above [`Self::line`].
    pub const HEADING: &str = "case  times    bytes   vary  sglen  result       seconds";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_number_is_that_of_the_64_bit_structure() {
        assert_eq!(USBTEST_REQUEST.cast_unsigned(), 0xc028_5564);
    }

    #[test]
    fn each_case_has_two_sizes() {
        for suite in [Suite::Bulk, Suite::Isochronous, Suite::Interrupt] {
            for call in suite.calls() {
                assert!(
                    suite.calls().iter().filter(|other| other.case == call.case).count() >= 2,
                    "{call:?}"
                );
            }
        }
    }

    #[test]
    fn reads_are_whole_packets_at_every_speed() {
        let reads = BULK.iter().filter(|call| matches!(call.case, 2 | 4 | 6 | 8 | 11 | 18 | 20 | 28));
        for call in reads {
            assert_eq!((call.length % 1024, call.vary % 1024), (0, 0), "{call:?}");
        }
    }
}
