//! The messages of vfio-user: layouts, limits, and the way from bytes to a checked request and from an answer to bytes.
//!
//! Pure. It checks what a message says of itself (sizes, flag mixes); what only the device can know (whether a region
//! has that many bytes, an interrupt that many vectors) is checked in [`super::session`].
//!
//! Everything comes from the client, who may be hostile: no length in a message is believed before it is compared with
//! the bytes that are there, and nothing is allocated here but the few flags of SET_IRQS.

use nix::errno::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_TYPE_MASK,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_IRQ_SET_DATA_TYPE_MASK, VFIO_PCI_BAR5_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_PCI_ROM_REGION_INDEX, VFIO_PCI_VGA_REGION_INDEX,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Size of [`Header`].
pub const HEADER_SIZE: usize = size_of::<Header>();
/// Most bytes that one REGION_READ or REGION_WRITE may move (`max_data_xfer_size`).
pub const MAX_DATA_XFER: usize = 1 << 20;
/// The longest message that is taken: a REGION_WRITE of [`MAX_DATA_XFER`] bytes.
pub const MAX_MESSAGE: usize = HEADER_SIZE + size_of::<RegionAccess>() + MAX_DATA_XFER;
/// Most file descriptors that one message may carry (`max_msg_fds`). Cloud Hypervisor sends 16 whatever we say.
pub const MAX_FDS: usize = 16;

const FLAG_TYPE: u32 = 0xf;
const FLAG_REPLY: u32 = 1;
const FLAG_NO_REPLY: u32 = 1 << 4;
const FLAG_ERROR: u32 = 1 << 5;

/// DMA_UNMAP of everything; not in the protocol text, but QEMU and libvfio-user have it.
const UNMAP_ALL: u32 = 1 << 1;
const DMA_READABLE: u32 = 1 << 0;
const DMA_WRITABLE: u32 = 1 << 1;

/// Command numbers ("Commands" in the protocol text).
pub mod command {
    /// Agree on a version; first message.
    pub const VERSION: u16 = 1;
    /// Guest memory comes.
    pub const DMA_MAP: u16 = 2;
    /// Guest memory goes.
    pub const DMA_UNMAP: u16 = 3;
    /// How many regions and interrupts.
    pub const DEVICE_GET_INFO: u16 = 4;
    /// Size and rights of a region.
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    /// Vectors of an interrupt.
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    /// Event fds of an interrupt.
    pub const DEVICE_SET_IRQS: u16 = 8;
    /// Read from a region.
    pub const REGION_READ: u16 = 9;
    /// Write to a region.
    pub const REGION_WRITE: u16 = 10;
    /// Reset the device.
    pub const DEVICE_RESET: u16 = 13;
}

/// What each message begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// The client's number for the message; only echoed.
    pub id: u16,
    /// One of [`command`], or anything.
    pub command: u16,
    /// Length of the message with this header. The client may write any value.
    pub size: u32,
    /// Type, NO_REPLY, error.
    pub flags: u32,
    /// An errno, in error replies.
    pub error: u32,
}

impl Header {
    /// The header at the start of `bytes`, if they are enough for one.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        Self::read_from_prefix(bytes).ok().map(|(header, _)| header)
    }

    /// Whether the sender wants no answer, whatever comes of it.
    pub fn is_no_reply(&self) -> bool {
        self.flags & FLAG_NO_REPLY != 0
    }

    /// Whether this is a command at all. We send none, so nobody may reply to us.
    pub fn is_command(&self) -> bool {
        self.flags & FLAG_TYPE == 0
    }

    /// How many bytes of the stream belong to this message in memory: a size that cannot be is taken as a bare header,
    /// so that an error can be sent for it.
    pub fn frame_len(&self) -> usize {
        match usize::try_from(self.size) {
            Ok(size @ HEADER_SIZE..=MAX_MESSAGE) => size,
            _ => HEADER_SIZE,
        }
    }

    /// How many bytes follow in the stream that are not kept, because the message is too long.
    pub fn excess_len(&self) -> u64 {
        let size = u64::from(self.size);
        if size > MAX_MESSAGE as u64 { size - HEADER_SIZE as u64 } else { 0 }
    }

    /// Header of a reply that says it worked and has `payload` bytes. `payload` is at most [`MAX_MESSAGE`].
    pub fn reply(&self, payload: usize) -> Self {
        let size = u32::try_from(HEADER_SIZE.saturating_add(payload)).unwrap_or(u32::MAX);
        Self { size, flags: FLAG_REPLY, error: 0, ..*self }
    }

    /// The whole of a reply that says it did not work.
    pub fn error_reply(&self, errno: Errno) -> Self {
        Self { size: HEADER_SIZE as u32, flags: FLAG_REPLY | FLAG_ERROR, error: errno as u32, ..*self }
    }
}

/// VERSION, before the JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VersionNumbers {
    /// Incompatible changes.
    pub major: u16,
    /// Compatible ones.
    pub minor: u16,
}

/// DMA_MAP.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct DmaMapLayout {
    argsz: u32,
    flags: u32,
    offset: u64,
    address: u64,
    size: u64,
}

/// DMA_UNMAP, request and reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DmaUnmapLayout {
    argsz: u32,
    flags: u32,
    address: u64,
    size: u64,
}

/// DEVICE_GET_INFO, request and reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceInfo {
    /// Bytes of payload there could be.
    pub argsz: u32,
    /// `VFIO_DEVICE_FLAGS_*`.
    pub flags: u32,
    /// Number of regions.
    pub num_regions: u32,
    /// Number of interrupt indices.
    pub num_irqs: u32,
}

/// DEVICE_GET_REGION_INFO, request and reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegionInfo {
    /// Bytes of payload there could be.
    pub argsz: u32,
    /// `VFIO_REGION_INFO_FLAG_*`.
    pub flags: u32,
    /// Which region.
    pub index: u32,
    /// Where capabilities begin; we have none.
    pub cap_offset: u32,
    /// Bytes in the region.
    pub size: u64,
    /// For mmap; nothing here can be mapped.
    pub offset: u64,
}

/// DEVICE_GET_IRQ_INFO, request and reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IrqInfo {
    /// Bytes of payload there could be.
    pub argsz: u32,
    /// `VFIO_IRQ_INFO_*`.
    pub flags: u32,
    /// Which interrupt index.
    pub index: u32,
    /// Number of vectors.
    pub count: u32,
}

/// DEVICE_SET_IRQS, before the flags of DATA_BOOL.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct SetIrqsLayout {
    argsz: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
}

/// REGION_READ and REGION_WRITE, before the data; also the start of their replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegionAccess {
    /// First byte in the region. Any value.
    pub offset: u64,
    /// Which region. Any value.
    pub region: u32,
    /// Number of bytes, at most [`MAX_DATA_XFER`].
    pub count: u32,
}

/// A region of a PCI device, by its VFIO index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Region {
    /// A base address register, 0..=5.
    Bar(u8),
    /// The expansion ROM.
    Rom,
    /// Configuration space.
    Config,
    /// Legacy VGA.
    Vga,
}

impl Region {
    /// The region with this index; the client may name any.
    pub const fn from_index(index: u32) -> Option<Self> {
        match index {
            0..=VFIO_PCI_BAR5_REGION_INDEX => Some(Self::Bar(index as u8)),
            VFIO_PCI_ROM_REGION_INDEX => Some(Self::Rom),
            VFIO_PCI_CONFIG_REGION_INDEX => Some(Self::Config),
            VFIO_PCI_VGA_REGION_INDEX => Some(Self::Vga),
            _ => None,
        }
    }
}

/// Guest memory that the client gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaMap {
    /// First guest physical address.
    pub address: u64,
    /// Length in bytes, at least 1; `address + size - 1` does not overflow.
    pub size: u64,
    /// Where it begins in the file that comes with the message.
    pub offset: u64,
    /// The device may read it.
    pub readable: bool,
    /// The device may write it.
    pub writable: bool,
}

/// Guest memory that the client takes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaUnmap {
    /// All of it.
    All,
    /// These addresses, whatever is or is not mapped there.
    Range {
        /// First guest physical address.
        address: u64,
        /// Length in bytes; 0 is nothing. The end may lie beyond 2^64.
        size: u64,
    },
}

/// What SET_IRQS wants done with some vectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// Forget the event fds of all vectors (DATA_NONE, count 0).
    Disable,
    /// Signal these event fds from now on (DATA_EVENTFD with fds), or none if the message has none.
    SetEventfds,
    /// Act as if the device had raised them.
    Trigger,
    /// Do not signal, keep pending.
    Mask,
    /// Signal again, also what is pending.
    Unmask,
}

/// SET_IRQS, its flags checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetIrqs {
    /// Interrupt index. Any value.
    pub index: u32,
    /// First vector. Any value.
    pub start: u32,
    /// Number of vectors. Any value; 0 only with [`IrqAction::Disable`].
    pub count: u32,
    /// What to do.
    pub action: IrqAction,
}

/// A request, its own numbers checked against its own length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command<'a> {
    /// VERSION.
    Version {
        /// What the client speaks.
        numbers: VersionNumbers,
        /// What comes after the numbers; empty when there is no JSON.
        json: &'a [u8],
    },
    /// DMA_MAP.
    DmaMap(DmaMap),
    /// DMA_UNMAP, and the payload to echo.
    DmaUnmap(DmaUnmap, DmaUnmapLayout),
    /// DEVICE_GET_INFO.
    DeviceInfo,
    /// DEVICE_GET_REGION_INFO of this region. Any value.
    RegionInfo(u32),
    /// DEVICE_GET_IRQ_INFO of this interrupt index. Any value.
    IrqInfo(u32),
    /// DEVICE_SET_IRQS; `only`, if not empty, has one byte for each vector: 0 leaves that vector alone.
    SetIrqs {
        /// What is asked.
        set: SetIrqs,
        /// The flags of DATA_BOOL.
        only: &'a [u8],
    },
    /// REGION_READ.
    RegionRead(RegionAccess),
    /// REGION_WRITE; the data has `count` bytes.
    RegionWrite(RegionAccess, &'a [u8]),
    /// DEVICE_RESET.
    Reset,
}

/// Parses the payload of a command message. `payload` is what follows the header, cut to its size.
pub fn parse(number: u16, payload: &[u8]) -> Result<Command<'_>, Errno> {
    match number {
        command::VERSION => {
            let (numbers, json) = prefix::<VersionNumbers>(payload)?;
            Ok(Command::Version { numbers, json })
        }
        command::DMA_MAP => parse_dma_map(payload),
        command::DMA_UNMAP => parse_dma_unmap(payload),
        command::DEVICE_GET_INFO => {
            let (info, _) = prefix::<DeviceInfo>(payload)?;
            check_argsz::<DeviceInfo>(info.argsz)?;
            Ok(Command::DeviceInfo)
        }
        command::DEVICE_GET_REGION_INFO => {
            let (info, _) = prefix::<RegionInfo>(payload)?;
            check_argsz::<RegionInfo>(info.argsz)?;
            Ok(Command::RegionInfo(info.index))
        }
        command::DEVICE_GET_IRQ_INFO => {
            let (info, _) = prefix::<IrqInfo>(payload)?;
            check_argsz::<IrqInfo>(info.argsz)?;
            Ok(Command::IrqInfo(info.index))
        }
        command::DEVICE_SET_IRQS => parse_set_irqs(payload),
        command::REGION_READ => {
            let (access, _) = prefix::<RegionAccess>(payload)?;
            check_count(&access)?;
            Ok(Command::RegionRead(access))
        }
        command::REGION_WRITE => {
            let (access, data) = prefix::<RegionAccess>(payload)?;
            let count = check_count(&access)?;
            if data.len() != count {
                return Err(Errno::EINVAL);
            }
            Ok(Command::RegionWrite(access, data))
        }
        command::DEVICE_RESET => Ok(Command::Reset),
        // In-band DMA, migration, dirty pages, ioeventfds and several writes in one are not advertised.
        _ => Err(Errno::ENOTSUP),
    }
}

fn prefix<T: FromBytes>(payload: &[u8]) -> Result<(T, &[u8]), Errno> {
    T::read_from_prefix(payload).map_err(|_| Errno::EINVAL)
}

fn check_argsz<T>(argsz: u32) -> Result<(), Errno> {
    if (argsz as usize) < size_of::<T>() { Err(Errno::EINVAL) } else { Ok(()) }
}

fn check_count(access: &RegionAccess) -> Result<usize, Errno> {
    let count = access.count as usize;
    if count > MAX_DATA_XFER { Err(Errno::EINVAL) } else { Ok(count) }
}

fn parse_dma_map(payload: &[u8]) -> Result<Command<'_>, Errno> {
    let (map, _) = prefix::<DmaMapLayout>(payload)?;
    check_argsz::<DmaMapLayout>(map.argsz)?;
    if map.flags & !(DMA_READABLE | DMA_WRITABLE) != 0 || map.size == 0 {
        return Err(Errno::EINVAL);
    }
    if map.address.checked_add(map.size - 1).is_none() || map.offset.checked_add(map.size).is_none() {
        return Err(Errno::EINVAL);
    }
    Ok(Command::DmaMap(DmaMap {
        address: map.address,
        size: map.size,
        offset: map.offset,
        readable: map.flags & DMA_READABLE != 0,
        writable: map.flags & DMA_WRITABLE != 0,
    }))
}

fn parse_dma_unmap(payload: &[u8]) -> Result<Command<'_>, Errno> {
    let (unmap, _) = prefix::<DmaUnmapLayout>(payload)?;
    check_argsz::<DmaUnmapLayout>(unmap.argsz)?;
    let what = match unmap.flags {
        0 => DmaUnmap::Range { address: unmap.address, size: unmap.size },
        UNMAP_ALL if unmap.address == 0 && unmap.size == 0 => DmaUnmap::All,
        _ => return Err(Errno::EINVAL),
    };
    Ok(Command::DmaUnmap(what, unmap))
}

fn parse_set_irqs(payload: &[u8]) -> Result<Command<'_>, Errno> {
    let (set, data) = prefix::<SetIrqsLayout>(payload)?;
    check_argsz::<SetIrqsLayout>(set.argsz)?;
    let kind = set.flags & VFIO_IRQ_SET_DATA_TYPE_MASK;
    let verb = set.flags & VFIO_IRQ_SET_ACTION_TYPE_MASK;
    if kind | verb != set.flags {
        return Err(Errno::EINVAL);
    }
    let action = match (kind, verb) {
        (VFIO_IRQ_SET_DATA_NONE, VFIO_IRQ_SET_ACTION_TRIGGER) if set.count == 0 && set.start == 0 => {
            IrqAction::Disable
        }
        _ if set.count == 0 => return Err(Errno::EINVAL),
        (VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_ACTION_TRIGGER) => IrqAction::SetEventfds,
        (VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_ACTION_TRIGGER) => IrqAction::Trigger,
        (VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_ACTION_MASK) => IrqAction::Mask,
        (VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_ACTION_UNMASK) => IrqAction::Unmask,
        _ => return Err(Errno::EINVAL),
    };
    let only = if kind == VFIO_IRQ_SET_DATA_BOOL { data } else { &[] };
    if kind == VFIO_IRQ_SET_DATA_BOOL && data.len() != set.count as usize {
        return Err(Errno::EINVAL);
    }
    let set = SetIrqs { index: set.index, start: set.start, count: set.count, action };
    Ok(Command::SetIrqs { set, only })
}

#[cfg(test)]
mod tests;
