//! What the kernel calls things: the structures and numbers of `linux/usbdevice_fs.h`, nothing else.

use nix::libc::{c_char, c_int, c_uint, c_void};
use nix::{
    ioctl_none, ioctl_readwrite_bad, ioctl_write_ptr_bad, request_code_none, request_code_read,
    request_code_readwrite, request_code_write,
};

/// `struct usbdevfs_ctrltransfer`.
#[repr(C)]
pub(super) struct ControlTransfer {
    pub(super) request_type: u8,
    pub(super) request: u8,
    pub(super) value: u16,
    pub(super) index: u16,
    pub(super) length: u16,
    pub(super) timeout_ms: u32,
    pub(super) data: *mut c_void,
}

/// `struct usbdevfs_setinterface`.
#[repr(C)]
pub(super) struct SetInterface {
    pub(super) interface: c_uint,
    pub(super) alternate: c_uint,
}

/// `struct usbdevfs_getdriver`.
#[repr(C)]
pub(super) struct GetDriver {
    pub(super) interface: c_uint,
    pub(super) driver: [c_char; 256],
}

/// `struct usbdevfs_ioctl`.
#[repr(C)]
pub(super) struct DriverIoctl {
    pub(super) interface: c_int,
    pub(super) code: c_int,
    pub(super) data: *mut c_void,
}

/// `struct usbdevfs_disconnect_claim`.
#[repr(C)]
pub(super) struct DisconnectClaim {
    pub(super) interface: c_uint,
    pub(super) flags: c_uint,
    pub(super) driver: [c_char; 256],
}

/// `struct usbdevfs_streams` with room for every endpoint an interface can have.
#[repr(C)]
pub(super) struct Streams {
    pub(super) streams: c_uint,
    pub(super) endpoint_count: c_uint,
    pub(super) endpoints: [u8; STREAM_ENDPOINTS_MAX],
}

/// `struct usbdevfs_conninfo_ex`.
#[repr(C)]
#[derive(Default)]
pub(super) struct ConnInfoEx {
    pub(super) size: u32,
    pub(super) bus: u32,
    pub(super) device: u32,
    pub(super) speed: u32,
    pub(super) port_count: u8,
    pub(super) ports: [u8; 7],
}

/// `struct usbdevfs_iso_packet_desc`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct IsoPacket {
    pub(super) length: c_uint,
    pub(super) actual: c_uint,
    pub(super) status: c_uint,
}

/// `struct usbdevfs_urb` without its flexible array, 56 bytes.
#[repr(C)]
pub(super) struct UrbHead {
    pub(super) kind: u8,
    pub(super) endpoint: u8,
    pub(super) status: c_int,
    pub(super) flags: c_uint,
    pub(super) buffer: *mut c_void,
    pub(super) buffer_length: c_int,
    pub(super) actual_length: c_int,
    pub(super) start_frame: c_int,
    /// A union with `stream_id`, which only bulk endpoints have.
    pub(super) packet_count: c_int,
    pub(super) error_count: c_int,
    pub(super) signal: c_uint,
    pub(super) user_context: *mut c_void,
}

/// `struct usbdevfs_urb` with as many packets as the kernel takes.
#[repr(C)]
pub(super) struct RawUrb {
    pub(super) head: UrbHead,
    pub(super) packets: [IsoPacket; super::ISO_PACKETS_MAX],
}

/// `USB_MAXENDPOINTS` in both directions.
pub(super) const STREAM_ENDPOINTS_MAX: usize = 30;

/// `USBDEVFS_DISCONNECT_CLAIM_EXCEPT_DRIVER`.
pub(super) const EXCEPT_DRIVER: c_uint = 2;

/// `USBDEVFS_DISCONNECT`, carried by [`DriverIoctl`].
pub(super) const DISCONNECT: c_int = request_code_none!(b'U', 22) as c_int;
/// `USBDEVFS_CONNECT`, carried by [`DriverIoctl`].
pub(super) const CONNECT: c_int = request_code_none!(b'U', 23) as c_int;

/// The request numbers, for a seccomp filter that names each one.
pub mod number {
    use super::*;

    macro_rules! numbers {
        ($($name:ident = $code:expr;)*) => {$(
            #[doc = concat!("`USBDEVFS_", stringify!($name), "`.")]
            pub const $name: u64 = $code as u64;
        )*};
    }

    const UINT: usize = size_of::<c_uint>();

    numbers! {
        CONTROL = request_code_readwrite!(b'U', 0, size_of::<ControlTransfer>());
        SETINTERFACE = request_code_read!(b'U', 4, size_of::<SetInterface>());
        SETCONFIGURATION = request_code_read!(b'U', 5, UINT);
        GETDRIVER = request_code_write!(b'U', 8, size_of::<GetDriver>());
        SUBMITURB = request_code_read!(b'U', 10, size_of::<UrbHead>());
        DISCARDURB = request_code_none!(b'U', 11);
        REAPURBNDELAY = request_code_write!(b'U', 13, size_of::<*mut c_void>());
        CLAIMINTERFACE = request_code_read!(b'U', 15, UINT);
        RELEASEINTERFACE = request_code_read!(b'U', 16, UINT);
        IOCTL = request_code_readwrite!(b'U', 18, size_of::<DriverIoctl>());
        RESET = request_code_none!(b'U', 20);
        CLEAR_HALT = request_code_read!(b'U', 21, UINT);
        CLAIM_PORT = request_code_read!(b'U', 24, UINT);
        RELEASE_PORT = request_code_read!(b'U', 25, UINT);
        GET_CAPABILITIES = request_code_read!(b'U', 26, UINT);
        DISCONNECT_CLAIM = request_code_read!(b'U', 27, size_of::<DisconnectClaim>());
        ALLOC_STREAMS = request_code_read!(b'U', 28, 2 * UINT);
        FREE_STREAMS = request_code_read!(b'U', 29, 2 * UINT);
        DROP_PRIVILEGES = request_code_write!(b'U', 30, UINT);
        GET_SPEED = request_code_none!(b'U', 31);
        CONNINFO_EX = request_code_read!(b'U', 32, size_of::<ConnInfoEx>());
        FORBID_SUSPEND = request_code_none!(b'U', 33);
        ALLOW_SUSPEND = request_code_none!(b'U', 34);
    }
}

/// The calls. The direction bits of many numbers are the wrong way round in the kernel's header, so most of these
/// name their number outright.
pub(super) mod call {
    use super::*;

    ioctl_readwrite_bad!(control, number::CONTROL, ControlTransfer);
    ioctl_write_ptr_bad!(set_interface, number::SETINTERFACE, SetInterface);
    ioctl_write_ptr_bad!(set_configuration, number::SETCONFIGURATION, c_uint);
    ioctl_readwrite_bad!(get_driver, number::GETDRIVER, GetDriver);
    ioctl_readwrite_bad!(submit_urb, number::SUBMITURB, RawUrb);
    ioctl_readwrite_bad!(discard_urb, number::DISCARDURB, RawUrb);
    ioctl_readwrite_bad!(reap_urb_ndelay, number::REAPURBNDELAY, *mut c_void);
    ioctl_write_ptr_bad!(claim_interface, number::CLAIMINTERFACE, c_uint);
    ioctl_write_ptr_bad!(release_interface, number::RELEASEINTERFACE, c_uint);
    ioctl_readwrite_bad!(driver_ioctl, number::IOCTL, DriverIoctl);
    ioctl_none!(reset, b'U', 20);
    ioctl_write_ptr_bad!(clear_halt, number::CLEAR_HALT, c_uint);
    ioctl_write_ptr_bad!(claim_port, number::CLAIM_PORT, c_uint);
    ioctl_write_ptr_bad!(release_port, number::RELEASE_PORT, c_uint);
    ioctl_readwrite_bad!(get_capabilities, number::GET_CAPABILITIES, u32);
    ioctl_write_ptr_bad!(disconnect_claim, number::DISCONNECT_CLAIM, DisconnectClaim);
    ioctl_write_ptr_bad!(alloc_streams, number::ALLOC_STREAMS, Streams);
    ioctl_write_ptr_bad!(free_streams, number::FREE_STREAMS, Streams);
    ioctl_write_ptr_bad!(drop_privileges, number::DROP_PRIVILEGES, u32);
    ioctl_none!(get_speed, b'U', 31);
    ioctl_none!(forbid_suspend, b'U', 33);
    ioctl_none!(allow_suspend, b'U', 34);
    ioctl_readwrite_bad!(conninfo_ex, number::CONNINFO_EX, ConnInfoEx);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_numbers_are_those_of_the_kernel_header() {
        let expected: [(u64, u64); 23] = [
            (number::CONTROL, 0xc018_5500),
            (number::SETINTERFACE, 0x8008_5504),
            (number::SETCONFIGURATION, 0x8004_5505),
            (number::GETDRIVER, 0x4104_5508),
            (number::SUBMITURB, 0x8038_550a),
            (number::DISCARDURB, 0x550b),
            (number::REAPURBNDELAY, 0x4008_550d),
            (number::CLAIMINTERFACE, 0x8004_550f),
            (number::RELEASEINTERFACE, 0x8004_5510),
            (number::IOCTL, 0xc010_5512),
            (number::RESET, 0x5514),
            (number::CLEAR_HALT, 0x8004_5515),
            (number::CLAIM_PORT, 0x8004_5518),
            (number::RELEASE_PORT, 0x8004_5519),
            (number::GET_CAPABILITIES, 0x8004_551a),
            (number::DISCONNECT_CLAIM, 0x8108_551b),
            (number::ALLOC_STREAMS, 0x8008_551c),
            (number::FREE_STREAMS, 0x8008_551d),
            (number::DROP_PRIVILEGES, 0x4004_551e),
            (number::GET_SPEED, 0x551f),
            (number::CONNINFO_EX, 0x8018_5520),
            (number::FORBID_SUSPEND, 0x5521),
            (number::ALLOW_SUSPEND, 0x5522),
        ];
        for (ours, kernel) in expected {
            assert_eq!(ours, kernel, "{ours:#x} is not {kernel:#x}");
        }
        assert_eq!((DISCONNECT, CONNECT), (0x5516, 0x5517));
    }

    #[test]
    fn packets_follow_the_urb_without_a_gap() {
        assert_eq!(size_of::<UrbHead>(), 56);
        assert_eq!(std::mem::offset_of!(RawUrb, packets), 56);
        assert_eq!(size_of::<IsoPacket>(), 12);
    }
}
