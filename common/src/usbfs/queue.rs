//! Asynchronous transfers: submit, cancel, reap.

#![expect(unsafe_code, reason = "the kernel writes to URB memory while we do not look")]

use std::ptr::NonNull;

use nix::errno::Errno;
use nix::libc::{c_int, c_uint, c_void};

use super::sys::{IsoPacket, RawUrb, UrbHead, call};
use super::{ISO_PACKETS_MAX, UrbBuffer, UsbfsFile};

/// The most URBs of one device in flight: 420 KiB of URB memory.
pub const IN_FLIGHT_MAX: usize = 256;

/// `USBDEVFS_URB_ISO_ASAP`: the host picks the frame.
const ISO_ASAP: c_uint = 0x02;
/// `USBDEVFS_URB_BULK_CONTINUATION`: dies with the URB before it.
const BULK_CONTINUATION: c_uint = 0x04;

/// What sort of URB.
#[derive(Clone, Copy, Debug)]
pub enum UrbKind<'a> {
    /// Default pipe. The buffer holds the setup packet (8 bytes), then room for wLength bytes.
    Control,
    /// Bulk.
    Bulk {
        /// Stream id, 0 without streams.
        stream: u16,
        /// Whether it dies with the URB queued before it on the same endpoint (`USBDEVFS_URB_BULK_CONTINUATION`).
        follows: bool,
    },
    /// Interrupt.
    Interrupt,
    /// As soon as possible after what is queued. One length for each packet, 1..=[`ISO_PACKETS_MAX`]; the packets lie
    /// in the buffer one after the other.
    Isochronous {
        /// Length of each packet in bytes.
        packets: &'a [u32],
    },
}

/// A URB in flight, as its [`UrbQueue`] names it. Not reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UrbToken {
    slot: u16,
    generation: u32,
}

impl UrbToken {
    /// A small number that no other URB in flight of the same queue has, below [`IN_FLIGHT_MAX`].
    pub fn slot(self) -> usize {
        self.slot.into()
    }
}

/// The kernel did not take a URB; the buffer comes back.
#[derive(Debug, thiserror::Error)]
#[error("the kernel did not take the transfer")]
pub struct SubmitError {
    /// Why. `ENOMEM` also when [`IN_FLIGHT_MAX`] are in flight.
    #[source]
    pub errno: Errno,
    /// The buffer of the call.
    pub buffer: UrbBuffer,
}

/// Nothing could be reaped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReapError {
    /// The kernel refused. `ENODEV`: the device is gone and all its URBs have been reaped.
    #[error("the kernel did not hand out a finished transfer")]
    Kernel(#[source] Errno),
    /// A URB came back that is not ours: somebody else uses a duplicate of the file.
    #[error("a transfer came back that nobody here started")]
    Unknown,
}

/// How one isochronous packet ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketOutcome {
    /// 0, or what went wrong.
    pub status: Result<(), Errno>,
    /// Bytes moved, at most the packet's length.
    pub actual: u32,
}

/// A URB that ended.
#[derive(Debug)]
pub struct Reaped {
    /// Which one.
    pub token: UrbToken,
    /// How it ended.
    pub status: Result<(), Errno>,
    /// Bytes of payload moved, without the setup packet; never more than were asked for. Also valid after an error.
    pub actual: u32,
    /// The buffer of the submit.
    pub buffer: UrbBuffer,
}

/// Memory for one URB. The kernel writes to it during a reap.
struct Slot {
    /// From `Box::into_raw`; freed by the queue. Raw, because the kernel holds the address while it is in flight.
    raw: NonNull<RawUrb>,
    generation: u32,
    /// There while in flight. Its memory must not move or go before the reap.
    buffer: Option<UrbBuffer>,
    /// Bytes of payload asked for.
    len: u32,
    packet_count: u8,
}

/// The URBs of one open device. Owns URBs and buffers from submit to reap, so nobody can touch them meanwhile.
///
/// Dropping it cancels what is in flight, which can wait for the device. It closes its file.
pub struct UrbQueue {
    file: UsbfsFile,
    slots: Vec<Slot>,
    free: Vec<u16>,
}

// SAFETY: the raw pointers are owned by the queue alone and not tied to a thread.
unsafe impl Send for UrbQueue {}

impl std::fmt::Debug for UrbQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UrbQueue").field("file", &self.file).field("in_flight", &self.in_flight()).finish()
    }
}

impl UrbQueue {
    /// A queue for an open device.
    pub const fn new(file: UsbfsFile) -> Self {
        Self { file, slots: Vec::new(), free: Vec::new() }
    }

    /// The device's file.
    pub const fn file(&self) -> &UsbfsFile {
        &self.file
    }

    /// How many URBs are in flight.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Starts a transfer of the first `len` bytes of `buffer` (for control: with the setup packet).
    pub fn submit(
        &mut self,
        endpoint: u8,
        kind: UrbKind<'_>,
        len: usize,
        mut buffer: UrbBuffer,
    ) -> Result<UrbToken, SubmitError> {
        let (payload_len, length) = match lengths(kind, len, &buffer) {
            Ok(lengths) => lengths,
            Err(errno) => return Err(SubmitError { errno, buffer }),
        };
        let Some(index) = self.free_slot() else {
            return Err(SubmitError { errno: Errno::ENOMEM, buffer });
        };
        let slot = &mut self.slots[usize::from(index)];

        let (urb_type, flags, count, packets): (u8, c_uint, c_int, &[u32]) = match kind {
            UrbKind::Isochronous { packets } => {
                (0, ISO_ASAP, c_int::try_from(packets.len()).unwrap_or(0), packets)
            }
            UrbKind::Interrupt => (1, 0, 0, &[]),
            UrbKind::Control => (2, 0, 0, &[]),
            UrbKind::Bulk { stream, follows } => {
                (3, if follows { BULK_CONTINUATION } else { 0 }, stream.into(), &[])
            }
        };
        let head = UrbHead {
            kind: urb_type,
            endpoint,
            status: 0,
            flags,
            buffer: buffer.as_mut_ptr().cast(),
            buffer_length: length,
            actual_length: 0,
            start_frame: 0,
            packet_count: count,
            error_count: 0,
            signal: 0,
            user_context: std::ptr::null_mut(),
        };
        // SAFETY: the slot is free, so nobody else uses its memory, which is a live allocation of this type.
        let raw = unsafe { slot.raw.as_mut() };
        raw.head = head;
        for (to, &length) in raw.packets.iter_mut().zip(packets) {
            *to = IsoPacket { length, actual: 0, status: 0 };
        }
        // SAFETY: the URB describes `buffer`, at least `buffer_length` bytes long (`lengths`), and as many packets as
        // there is room for. Both are kept in place until the reap: the buffer moves into the slot below, and the
        // kernel writes to them only in our own call of REAPURBNDELAY.
        let result =
            unsafe { call::submit_urb(std::os::fd::AsRawFd::as_raw_fd(&self.file.fd), slot.raw.as_ptr()) };
        if let Err(errno) = result {
            self.free.push(index);
            return Err(SubmitError { errno, buffer });
        }
        slot.generation = slot.generation.wrapping_add(1);
        slot.buffer = Some(buffer);
        slot.len = payload_len;
        slot.packet_count = u8::try_from(packets.len()).unwrap_or(0);
        Ok(UrbToken { slot: index, generation: slot.generation })
    }

    /// Cancels a URB and waits until the host controller has let go of it; reap it then. What has ended or is not
    /// known is left alone. Returns whether there was something to cancel.
    pub fn discard(&mut self, token: UrbToken) -> nix::Result<bool> {
        let Some(slot) = self.slots.get(token.slot()) else { return Ok(false) };
        if slot.buffer.is_none() || slot.generation != token.generation {
            return Ok(false);
        }
        // SAFETY: the kernel takes the address as a name and compares it with those in flight; it reads nothing there.
        match unsafe { call::discard_urb(std::os::fd::AsRawFd::as_raw_fd(&self.file.fd), slot.raw.as_ptr()) }
        {
            Ok(_) => Ok(true),
            Err(Errno::EINVAL) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    /// The next URB that has ended; none if all are still busy. Packet outcomes of an isochronous URB replace what is
    /// in `packets`.
    pub fn reap(&mut self, packets: &mut Vec<PacketOutcome>) -> Result<Option<Reaped>, ReapError> {
        packets.clear();
        if self.in_flight() == 0 {
            return Ok(None);
        }
        let mut address: *mut c_void = std::ptr::null_mut();
        // SAFETY: the kernel writes one pointer to `address`, and to the URB and the buffer it was submitted with,
        // which this queue keeps in place. URBs that a duplicate of the file submitted elsewhere belong to the queue
        // that did it, which keeps them likewise.
        let result = unsafe {
            call::reap_urb_ndelay(std::os::fd::AsRawFd::as_raw_fd(&self.file.fd), &raw mut address)
        };
        match result {
            Ok(_) => {}
            Err(Errno::EAGAIN) => return Ok(None),
            Err(errno) => return Err(ReapError::Kernel(errno)),
        }
        let found = self.slots.iter_mut().enumerate().find(|(_, slot)| slot.raw.as_ptr().cast() == address);
        let Some((index, slot)) = found else { return Err(ReapError::Unknown) };
        let Some(buffer) = slot.buffer.take() else { return Err(ReapError::Unknown) };
        // SAFETY: a live allocation of this type; the kernel is through with it.
        let raw = unsafe { slot.raw.as_ref() };
        for packet in &raw.packets[..usize::from(slot.packet_count)] {
            packets.push(PacketOutcome {
                status: status(packet.status.cast_signed()),
                actual: packet.actual.min(packet.length),
            });
        }
        let index = u16::try_from(index).unwrap_or(u16::MAX);
        self.free.push(index);
        Ok(Some(Reaped {
            token: UrbToken { slot: index, generation: slot.generation },
            status: status(raw.head.status),
            actual: u32::try_from(raw.head.actual_length).unwrap_or(0).min(slot.len),
            buffer,
        }))
    }

    /// Everything in flight, newest first is the caller's business: tokens come in no order.
    pub fn tokens(&self) -> impl Iterator<Item = UrbToken> + '_ {
        self.slots.iter().enumerate().filter(|(_, slot)| slot.buffer.is_some()).map(|(index, slot)| {
            UrbToken { slot: u16::try_from(index).unwrap_or(u16::MAX), generation: slot.generation }
        })
    }

    fn free_slot(&mut self) -> Option<u16> {
        if let Some(index) = self.free.pop() {
            return Some(index);
        }
        if self.slots.len() >= IN_FLIGHT_MAX {
            return None;
        }
        let index = u16::try_from(self.slots.len()).ok()?;
        let head = UrbHead {
            kind: 0,
            endpoint: 0,
            status: 0,
            flags: 0,
            buffer: std::ptr::null_mut(),
            buffer_length: 0,
            actual_length: 0,
            start_frame: 0,
            packet_count: 0,
            error_count: 0,
            signal: 0,
            user_context: std::ptr::null_mut(),
        };
        let raw = Box::new(RawUrb { head, packets: [IsoPacket::default(); ISO_PACKETS_MAX] });
        let raw = NonNull::from(Box::leak(raw));
        self.slots.push(Slot { raw, generation: 0, buffer: None, len: 0, packet_count: 0 });
        Some(index)
    }
}

impl Drop for UrbQueue {
    fn drop(&mut self) {
        let tokens: Vec<_> = self.tokens().collect();
        for token in tokens {
            // A device that is gone has nothing to cancel; what matters is the reap below.
            let _ = self.discard(token);
        }
        let mut packets = Vec::new();
        // Each turn takes a URB off the kernel's list, ours or somebody else's: bounded, the latter by the former.
        for _ in 0..2 * IN_FLIGHT_MAX {
            match self.reap(&mut packets) {
                Ok(Some(_)) | Err(ReapError::Unknown) => {}
                Ok(None) | Err(ReapError::Kernel(_)) => break,
            }
        }
        for slot in &mut self.slots {
            match slot.buffer.take() {
                // The kernel did not give it back, and a duplicate of the file may reap it yet: its memory stays.
                Some(buffer) => std::mem::forget(buffer),
                // SAFETY: from `Box::leak`, not in flight, and not used again: we are in Drop.
                None => drop(unsafe { Box::from_raw(slot.raw.as_ptr()) }),
            }
        }
    }
}

/// Bytes of payload, and what goes into `buffer_length`.
fn lengths(kind: UrbKind<'_>, len: usize, buffer: &UrbBuffer) -> nix::Result<(u32, c_int)> {
    if len > buffer.len() {
        return Err(Errno::EINVAL);
    }
    let length = c_int::try_from(len).map_err(|_| Errno::EINVAL)?;
    let payload = match kind {
        UrbKind::Control => len.checked_sub(8).ok_or(Errno::EINVAL)?,
        UrbKind::Isochronous { packets } => {
            let sum = packets.iter().map(|&packet| u64::from(packet)).sum::<u64>();
            if packets.is_empty() || packets.len() > ISO_PACKETS_MAX || sum > len as u64 {
                return Err(Errno::EINVAL);
            }
            len
        }
        UrbKind::Bulk { .. } | UrbKind::Interrupt => len,
    };
    Ok((u32::try_from(payload).map_err(|_| Errno::EINVAL)?, length))
}

/// A status as the kernel writes it: 0, or an error number below zero.
fn status(raw: c_int) -> Result<(), Errno> {
    match raw {
        0 => Ok(()),
        error => Err(Errno::from_raw(error.wrapping_neg())),
    }
}

#[cfg(test)]
mod tests;
