//! The hinge between the controller and the devices: what the controller wants from a device and what came of it.
//!
//! Plain data. The controller ([`crate::xhci`]) makes these from transfer descriptors and commands; the transport
//! (`crate::usb`) carries them out on usbfs. Neither knows the other.

/// A device as the daemon gave it to the controller. Opaque, never reused within a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceHandle(pub u32);

/// One transfer in flight. Never reused: an outcome that comes late finds nothing and is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransferId(pub u64);

/// One [`DeviceOp`] in flight. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u64);

/// A piece of guest memory. The range is the guest's word: it may lie anywhere and wrap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address of the first byte.
    pub addr: u64,
    /// Length in bytes; zero is legal.
    pub len: u32,
}

/// Where the payload of a transfer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// In guest memory, piece after piece. The transport copies from here (OUT) or to here (IN). Empty: no payload.
    Guest(Vec<Segment>),
    /// In the TRB itself (xHCI 1.2 §4.11.7, Immediate Data): the first `len` (0..=8) of `bytes`. OUT only.
    Immediate {
        /// The TRB's parameter field.
        bytes: [u8; 8],
        /// How many of them count.
        len: u8,
    },
}

/// What sort of transfer, with what only that sort needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TransferKind {
    /// On the default pipe. Direction and wLength are those of the setup packet; the controller has checked that the
    /// payload is not longer than wLength, it may be shorter.
    Control {
        /// The setup packet as on the bus (USB 2.0 §9.3).
        setup: [u8; 8],
    },
    /// Bulk; `stream` is 0 without streams.
    Bulk {
        /// Stream id, 1..=65533.
        stream: u16,
    },
    /// Interrupt.
    Interrupt,
    /// One packet for each service interval. Packet `i` starts in the payload at the sum of the lengths before it,
    /// also when earlier packets came short.
    Isochronous {
        /// Length of each packet in bytes; 1..=128 packets.
        packets: Vec<u32>,
    },
}

/// A transfer for a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UrbRequest {
    /// Names the transfer in [`UrbCompletion`] and in a cancel.
    pub id: TransferId,
    /// The device.
    pub device: DeviceHandle,
    /// `bEndpointAddress` with the direction in bit 7; 0 for the default pipe.
    pub endpoint: u8,
    /// Sort of transfer.
    pub kind: TransferKind,
    /// Where the bytes are.
    pub payload: Payload,
    /// Total length of the payload in bytes, 0..=16 MiB.
    pub len: u32,
    /// Bulk only: this transfer was queued behind another of the same endpoint and must not run when that one fails
    /// (`USBDEVFS_URB_BULK_CONTINUATION`). False for the first after the endpoint was (re)started.
    pub follows: bool,
}

impl UrbRequest {
    /// Whether the device sends.
    pub fn is_in(&self) -> bool {
        match &self.kind {
            TransferKind::Control { setup } => setup[0] & 0x80 != 0,
            _ => self.endpoint & 0x80 != 0,
        }
    }
}

/// How a transfer, or one isochronous packet of it, ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UrbStatus {
    /// Done; an IN transfer may have brought less than was asked for.
    Completed,
    /// The endpoint answered STALL (`EPIPE`).
    Stalled,
    /// The device sent more than it was asked for (`EOVERFLOW`).
    Babble,
    /// CRC, time-out and other trouble on the bus (`EPROTO`, `EILSEQ`, `ETIME`), and what else the kernel refuses.
    TransactionError,
    /// We cancelled it (`ENOENT`). What came before counts.
    Cancelled,
    /// The kernel cancelled it because a transfer before it failed (see [`UrbRequest::follows`]). It did not run.
    /// Of an isochronous packet: the host missed its service interval (`EXDEV`).
    NotRun,
    /// The device is gone (`ENODEV`, `ESHUTDOWN`).
    Gone,
    /// The host has no bandwidth left for it (`ENOSPC` at submit).
    NoBandwidth,
    /// The host controller could not keep up with its memory (`ECOMM`, `ENOSR`).
    DataBuffer,
    /// The payload lies outside guest memory. On OUT nothing was sent.
    GuestMemory,
}

/// What came of one isochronous packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketResult {
    /// How it ended.
    pub status: UrbStatus,
    /// Bytes moved, at most the packet's length.
    pub actual: u32,
}

/// What came of a transfer. Each [`UrbRequest`] gets exactly one, unless the controller has dropped the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UrbCompletion {
    /// Which one.
    pub id: TransferId,
    /// How it ended.
    pub status: UrbStatus,
    /// Bytes moved, at most [`UrbRequest::len`]. Also valid after an error or a cancel.
    pub actual: u32,
    /// Isochronous only: one for each packet.
    pub packets: Vec<PacketResult>,
    /// The request's payload, given back so that its memory can be used again.
    pub payload: Payload,
}

/// Something about a device that is no transfer and can wait in the kernel for seconds. A device carries out its
/// operations one after another; transfers already in flight are not disturbed beyond what the operation itself does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceOp {
    /// SET_CONFIGURATION (USB 2.0 §9.4.7): all interfaces of it are claimed afterwards.
    SetConfiguration {
        /// `bConfigurationValue`, 0 for unconfigured.
        value: u8,
    },
    /// SET_INTERFACE (USB 2.0 §9.4.10).
    SetInterface {
        /// `bInterfaceNumber`.
        interface: u8,
        /// `bAlternateSetting`.
        alternate: u8,
    },
    /// CLEAR_FEATURE(ENDPOINT_HALT) (USB 2.0 §9.4.1); also resets the host's data toggle.
    ClearHalt {
        /// `bEndpointAddress`.
        endpoint: u8,
    },
    /// A reset of the device on its real port; claims are restored. All transfers end as cancelled first.
    Reset,
    /// Streams for bulk endpoints (`USBDEVFS_ALLOC_STREAMS`).
    AllocStreams {
        /// The endpoints, all of one interface.
        endpoints: Vec<u8>,
        /// Highest stream id that will be used.
        streams: u16,
    },
    /// Takes the streams away again.
    FreeStreams {
        /// The endpoints, all of one interface.
        endpoints: Vec<u8>,
    },
    /// The guest put the port into U3. The host may suspend the device, or the transport listens to it if the guest lets it
    /// wake it; a wake-up is an input of its own. A transport that can do neither answers success.
    Suspend,
    /// The port has left U3: the host wakes the device.
    Resume,
}

/// Why a [`DeviceOp`] failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpError {
    /// The device answered STALL.
    Stalled,
    /// The device or the host did not do it, or not in time.
    Failed,
    /// The device is gone, or came back as another one.
    Gone,
    /// The host has not enough of something: bandwidth, streams.
    NoResources,
}

/// What the controller asks the daemon to do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Start a transfer.
    Submit(UrbRequest),
    /// Cancel these, newest first. Each still gets its [`UrbCompletion`]; one that had ended gets its own outcome.
    Cancel {
        /// The device they belong to.
        device: DeviceHandle,
        /// Which ones.
        ids: Vec<TransferId>,
    },
    /// Cancel these, and touch guest memory for them no more from now on: the guest has taken the buffers back. Each
    /// still gets its [`UrbCompletion`], which tells the controller that the endpoint is free again.
    Abandon {
        /// The device they belong to.
        device: DeviceHandle,
        /// Which ones.
        ids: Vec<TransferId>,
    },
    /// Carry out an operation; the outcome comes back with `id`.
    Operate {
        /// Names it in the outcome.
        id: OpId,
        /// The device.
        device: DeviceHandle,
        /// What to do.
        op: DeviceOp,
    },
    /// Signal this MSI-X vector.
    Interrupt {
        /// 0 and up.
        vector: u16,
    },
}

/// An access to guest memory did not hit memory the guest may use for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no accessible guest memory at {addr:#x}, {len} bytes")]
pub struct DmaFault {
    /// First guest physical address asked for.
    pub addr: u64,
    /// Length asked for, in bytes.
    pub len: usize,
}

/// Guest physical memory as the controller and the transport see it by DMA.
///
/// The guest may change it at any time, so callers copy once and parse the copy. An access may cross the border of two
/// adjacent mappings; nothing is read or written when any byte of it is not accessible.
pub trait GuestMem {
    /// Copies `buf.len()` bytes from guest physical `addr`.
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), DmaFault>;
    /// Copies `buf` to guest physical `addr`.
    fn write(&self, addr: u64, buf: &[u8]) -> Result<(), DmaFault>;

    /// Fills `buf` from `pieces`, one after the other. What is behind the end of `buf` is left alone; pieces that end
    /// before it are a fault.
    fn gather(&self, pieces: &[Segment], buf: &mut [u8]) -> Result<(), DmaFault> {
        let mut done = 0;
        for piece in used(pieces, 0, buf.len()) {
            let end = done + piece.len as usize;
            self.read(piece.addr, &mut buf[done..end])?;
            done = end;
        }
        whole(done, buf.len())
    }

    /// Copies `bytes` to `pieces`, one after the other, from `skip` bytes into them. Pieces that end before the bytes do
    /// are a fault, after what has room is copied.
    fn scatter(&self, pieces: &[Segment], skip: usize, bytes: &[u8]) -> Result<(), DmaFault> {
        let mut done = 0;
        for piece in used(pieces, skip, bytes.len()) {
            let end = done + piece.len as usize;
            self.write(piece.addr, &bytes[done..end])?;
            done = end;
        }
        whole(done, bytes.len())
    }
}

/// The parts of `pieces` that hold `len` bytes from `skip` bytes into them. None of them is empty.
pub fn used(pieces: &[Segment], skip: usize, len: usize) -> impl Iterator<Item = Segment> {
    let (mut skip, mut left) = (skip, len);
    pieces.iter().filter_map(move |piece| {
        let skipped = skip.min(piece.len as usize);
        skip -= skipped;
        let part = left.min(piece.len as usize - skipped);
        left -= part;
        let addr = piece.addr.wrapping_add(skipped as u64);
        (part > 0).then_some(Segment { addr, len: part as u32 })
    })
}

/// A fault when fewer bytes had a place than there are.
pub fn whole(done: usize, len: usize) -> Result<(), DmaFault> {
    if done == len { Ok(()) } else { Err(DmaFault { addr: 0, len: len - done }) }
}
