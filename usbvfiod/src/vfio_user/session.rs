//! One connection with a vfio-user client: messages in, requests to the device and replies out. Pure.
//!
//! The daemon's loop uses it like this:
//! ```no_run
//! # use usbvfiod::vfio_user::{message::Region, session::{Layout, Request, Session}, transport::{Connection, Received}};
//! # fn on_client_ready(connection: &mut Connection, session: &mut Session) -> std::io::Result<bool> {
//! if connection.receive(session)? == Received::EndOfStream {
//!     return Ok(false); // drop both, unmap everything, forget the event fds, reset, keep the devices
//! }
//! while let Some(request) = session.next_request() {
//!     match request {
//!         Request::RegionRead { region: Region::Bar(0), offset, data } => { /* xhci.read(offset, data) */ }
//!         Request::RegionWrite { region: Region::Bar(0), offset, data } => { /* xhci.write(offset, data) */ }
//!         Request::RegionRead { .. } | Request::RegionWrite { .. } => { /* config space, MSI-X */ }
//!         Request::SetIrqs(change) => { /* msix.apply(change) */ }
//!         Request::DmaMap { token, map, file } => { let done = Ok(()) /* memory.map(map, file) */; session.finish(token, done); }
//!         Request::DmaUnmap { token, range } => { /* memory.unmap(range) */ session.finish(token, Ok(())); }
//!         Request::Reset { token } => { let _when_all_is_quiet = token; /* … session.finish(token, Ok(())) */ }
//!     }
//! }
//! connection.send(session)?; // and again when the socket is writable, while session.wants_to_send()
//! Ok(!session.is_over())
//! # }
//! ```
//! The loop serves the connection it has before it accepts. A second client is accepted and dropped, unless
//! [`Connection::has_hung_up`](super::transport::Connection::has_hung_up) says that the first is gone.
//!
//! A reply is framed before its request is handed out: reads, writes and SET_IRQS have succeeded unless they were
//! refused here. The three requests with a [`Token`] are answered by [`Session::finish`], at once or later; until then
//! later messages wait, and their bytes stay in the socket once the inbox is full.
//!
//! Cloud Hypervisor does not look at the error bit and waits for ever for the bytes it expects. So every well-formed
//! message whose reply has a payload gets a full-size success, also where the access is nonsense: reads beyond a
//! region give ones, writes there are dropped, unmapping nothing works. See `docs/protocol.md`.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_INFO_EVENTFD, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_PCI_NUM_REGIONS, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};
use zerocopy::IntoBytes;

use super::inbox::{Frame, Inbox};
use super::message::{
    self, Command, DeviceInfo, DmaMap, DmaUnmap, Header, IrqAction, IrqInfo, Region, RegionAccess,
    RegionInfo, SetIrqs,
};
use super::outbox::Outbox;
use super::version;

/// INTx, MSI and MSI-X. Not the error and the request interrupt: QEMU warns when they are there without a vector, and
/// says nothing when they are absent.
const NUM_IRQS: u32 = VFIO_PCI_MSIX_IRQ_INDEX + 1;

/// What the client may know of the device before it asks the device itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes in each region, by VFIO index; 0 is absent.
    pub region_sizes: [u64; VFIO_PCI_NUM_REGIONS as usize],
    /// Number of MSI-X vectors. INTx (Cloud Hypervisor would pay a message for each access) and MSI have none.
    pub msix_vectors: u16,
}

impl Layout {
    fn region_size(&self, index: u32) -> u64 {
        self.region_sizes.get(index as usize).copied().unwrap_or(0)
    }

    fn vectors(&self, irq_index: u32) -> u32 {
        if irq_index == VFIO_PCI_MSIX_IRQ_INDEX { u32::from(self.msix_vectors) } else { 0 }
    }
}

/// Names a request that still has to be finished. Never reused within a process that makes fewer than 2^64 of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(u64);

/// A change of the MSI-X vectors. All vector numbers are below [`Layout::msix_vectors`].
#[derive(Debug)]
pub enum IrqChange {
    /// Forget all event fds.
    Disable,
    /// From vector `start` on, one each.
    Assign {
        /// First vector.
        start: u16,
        /// At least one.
        eventfds: Vec<OwnedFd>,
    },
    /// Forget the event fds of these.
    Deassign {
        /// First vector.
        start: u16,
        /// How many.
        count: u16,
    },
    /// Signal these, as if the device had.
    Trigger(Vec<u16>),
    /// Keep these pending instead of signalling.
    Mask(Vec<u16>),
    /// Signal these again.
    Unmask(Vec<u16>),
}

/// What the client asks of the device.
#[derive(Debug)]
pub enum Request<'a> {
    /// Fill `data`, which holds ones. All of it is inside the region.
    RegionRead {
        /// Which region; it is there.
        region: Region,
        /// First byte.
        offset: u64,
        /// At least one byte, and any number up to the region's size.
        data: &'a mut [u8],
    },
    /// Take `data`. All of it is inside the region.
    RegionWrite {
        /// Which region; it is there.
        region: Region,
        /// First byte.
        offset: u64,
        /// At least one byte, and any number up to the region's size.
        data: &'a [u8],
    },
    /// Change interrupt vectors.
    SetIrqs(IrqChange),
    /// Take guest memory. [`Session::finish`] may refuse it.
    DmaMap {
        /// For [`Session::finish`].
        token: Token,
        /// Where and how.
        map: DmaMap,
        /// Without it the memory cannot be reached.
        file: Option<OwnedFd>,
    },
    /// Let go of guest memory. Finish when nothing touches it any more; this cannot be refused.
    DmaUnmap {
        /// For [`Session::finish`].
        token: Token,
        /// What to let go.
        range: DmaUnmap,
    },
    /// Reset the device. Finish when that is done; this cannot be refused.
    Reset {
        /// For [`Session::finish`].
        token: Token,
    },
}

#[derive(Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing but VERSION is allowed.
    Negotiating,
    Serving,
    /// The client broke the negotiation: send what is left and close.
    Over,
}

/// The message that waits for [`Session::finish`].
#[derive(Debug)]
struct Waiting {
    token: Token,
    header: Header,
    reply: WaitingReply,
}

#[derive(Debug)]
enum WaitingReply {
    /// Header only, or an error.
    Map,
    /// The request's payload.
    Unmap(message::DmaUnmapLayout),
    /// Header only.
    Reset,
}

/// What a message comes to; ranges instead of slices, for the borrow checker.
enum Outcome {
    /// Nothing for the device.
    Done,
    Read {
        region: Region,
        offset: u64,
        reply: std::ops::Range<usize>,
    },
    Write {
        region: Region,
        offset: u64,
        data: std::ops::Range<usize>,
    },
    Irqs(IrqChange),
    Map(Token, DmaMap, Option<OwnedFd>),
    Unmap(Token, DmaUnmap),
    Reset(Token),
}

/// The state of one connection. See the module's text.
#[derive(Debug)]
pub struct Session {
    layout: Layout,
    phase: Phase,
    inbox: Inbox,
    outbox: Outbox,
    waiting: Option<Waiting>,
    last_token: u64,
}

impl Session {
    /// A fresh connection. `serial` tells connections of a process apart, so that a token of one does not fit another.
    pub fn new(layout: Layout, serial: u32) -> Self {
        Self {
            layout,
            phase: Phase::Negotiating,
            inbox: Inbox::default(),
            outbox: Outbox::default(),
            waiting: None,
            last_token: u64::from(serial) << 32,
        }
    }

    /// Where received bytes go.
    pub fn inbox(&mut self) -> &mut Inbox {
        &mut self.inbox
    }

    /// Where the bytes to send are.
    pub fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// Whether reading from the socket makes sense now. False while enough messages wait or replies are not taken.
    pub fn wants_to_receive(&self) -> bool {
        self.phase != Phase::Over && !self.outbox.is_full() && self.inbox.wants_bytes()
    }

    /// Whether there are bytes to send.
    pub fn wants_to_send(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Whether the connection is to be closed: the client broke the negotiation and knows it.
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Over && self.outbox.is_empty()
    }

    /// Whether VERSION was agreed on.
    pub fn is_negotiated(&self) -> bool {
        self.phase == Phase::Serving
    }

    /// The next request for the device, or nothing until more bytes come, bytes are sent, or
    /// [`Self::finish`] is called. Each turn takes one message, so the work is bounded by what was received.
    pub fn next_request(&mut self) -> Option<Request<'_>> {
        let outcome = loop {
            if self.waiting.is_some() || self.phase == Phase::Over || self.outbox.is_full() {
                return None;
            }
            let frame = self.inbox.pop()?;
            match self.take(frame) {
                Outcome::Done => {}
                outcome => break outcome,
            }
        };
        match outcome {
            Outcome::Done => None,
            Outcome::Read { region, offset, reply } => {
                Some(Request::RegionRead { region, offset, data: self.outbox.bytes_mut(reply) })
            }
            Outcome::Write { region, offset, data } => {
                Some(Request::RegionWrite { region, offset, data: self.inbox.bytes(data) })
            }
            Outcome::Irqs(change) => Some(Request::SetIrqs(change)),
            Outcome::Map(token, map, file) => Some(Request::DmaMap { token, map, file }),
            Outcome::Unmap(token, range) => Some(Request::DmaUnmap { token, range }),
            Outcome::Reset(token) => Some(Request::Reset { token }),
        }
    }

    /// Answers the request that `token` names; a token of an earlier connection is ignored. Only [`Request::DmaMap`] can
    /// be refused, an error for the others is answered with success, because Cloud Hypervisor would hang.
    pub fn finish(&mut self, token: Token, result: Result<(), Errno>) {
        let Some(waiting) = self.waiting.take_if(|waiting| waiting.token == token) else { return };
        match (waiting.reply, result) {
            (WaitingReply::Map, Err(errno)) => self.refuse(&waiting.header, errno),
            (WaitingReply::Map, Ok(())) | (WaitingReply::Reset, _) => {
                self.outbox.reply(&waiting.header, &[&[]])
            }
            (WaitingReply::Unmap(echo), _) => self.outbox.reply(&waiting.header, &[echo.as_bytes()]),
        }
    }

    /// Whether a request waits for [`Self::finish`].
    pub fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    fn refuse(&mut self, header: &Header, errno: Errno) {
        common::limited!(debug, command = header.command, id = header.id, %errno, "client message refused");
        self.outbox.error(header, errno);
    }

    /// Descriptors of the frame that are not handed on are closed here, by dropping them.
    fn take(&mut self, frame: Frame) -> Outcome {
        let header = frame.header;
        let outcome = self.check(&header, &frame).and_then(|()| match self.phase {
            Phase::Negotiating => self.negotiate(frame),
            _ => self.serve(frame),
        });
        outcome.unwrap_or_else(|errno| {
            self.refuse(&header, errno);
            if self.phase == Phase::Negotiating {
                self.phase = Phase::Over;
            }
            Outcome::Done
        })
    }

    fn check(&self, header: &Header, frame: &Frame) -> Result<(), Errno> {
        let is_whole = header.frame_len() as u64 == u64::from(header.size);
        if !is_whole || frame.fds_lost || !header.is_command() { Err(Errno::EINVAL) } else { Ok(()) }
    }

    fn negotiate(&mut self, frame: Frame) -> Result<Outcome, Errno> {
        let command = message::parse(frame.header.command, self.inbox.bytes(frame.payload));
        let Ok(Command::Version { numbers, json }) = command else { return Err(Errno::EINVAL) };
        let (numbers, json) = version::negotiate(numbers, json)?;
        self.outbox.reply(&frame.header, &[numbers.as_bytes(), &json]);
        self.phase = Phase::Serving;
        Ok(Outcome::Done)
    }

    fn serve(&mut self, frame: Frame) -> Result<Outcome, Errno> {
        let Frame { header, payload, fds, .. } = frame;
        let payload_start = payload.start;
        match message::parse(header.command, self.inbox.bytes(payload))? {
            Command::Version { .. } => Err(Errno::EINVAL),
            Command::DeviceInfo => {
                let info = DeviceInfo {
                    argsz: size_of::<DeviceInfo>() as u32,
                    flags: VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET,
                    num_regions: VFIO_PCI_NUM_REGIONS,
                    num_irqs: NUM_IRQS,
                };
                self.outbox.reply(&header, &[info.as_bytes()]);
                Ok(Outcome::Done)
            }
            Command::RegionInfo(index) => self.region_info(&header, index),
            Command::IrqInfo(index) => self.irq_info(&header, index),
            Command::SetIrqs { set, only } => {
                let change = irq_change(&self.layout, &set, only, fds)?;
                self.outbox.reply(&header, &[&[]]);
                Ok(change.map_or(Outcome::Done, Outcome::Irqs))
            }
            Command::RegionRead(access) => Ok(self.region_read(&header, access)),
            Command::RegionWrite(access, _) => {
                self.outbox.reply(&header, &[access.as_bytes()]);
                let data = payload_start + size_of::<RegionAccess>();
                Ok(match self.clip(&access) {
                    Some((region, len)) => {
                        Outcome::Write { region, offset: access.offset, data: data..data + len }
                    }
                    None => Outcome::Done,
                })
            }
            Command::DmaMap(map) => {
                if fds.len() > 1 {
                    return Err(Errno::EINVAL);
                }
                let token = self.wait(header, WaitingReply::Map);
                Ok(Outcome::Map(token, map, fds.into_iter().next()))
            }
            Command::DmaUnmap(range, echo) => {
                let token = self.wait(header, WaitingReply::Unmap(echo));
                Ok(Outcome::Unmap(token, range))
            }
            Command::Reset => Ok(Outcome::Reset(self.wait(header, WaitingReply::Reset))),
        }
    }

    fn wait(&mut self, header: Header, reply: WaitingReply) -> Token {
        self.last_token = self.last_token.wrapping_add(1);
        let token = Token(self.last_token);
        self.waiting = Some(Waiting { token, header, reply });
        token
    }

    fn region_info(&mut self, header: &Header, index: u32) -> Result<Outcome, Errno> {
        let size = *self.layout.region_sizes.get(index as usize).ok_or(Errno::EINVAL)?;
        let flags = if size > 0 { VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE } else { 0 };
        let argsz = size_of::<RegionInfo>() as u32;
        let info = RegionInfo { argsz, flags, index, cap_offset: 0, size, offset: 0 };
        self.outbox.reply(header, &[info.as_bytes()]);
        Ok(Outcome::Done)
    }

    /// Vectors can be added while others are in use, so NORESIZE is not set: QEMU then assigns them one by one.
    fn irq_info(&mut self, header: &Header, index: u32) -> Result<Outcome, Errno> {
        if index >= NUM_IRQS {
            return Err(Errno::EINVAL);
        }
        let argsz = size_of::<IrqInfo>() as u32;
        let info = IrqInfo { argsz, flags: VFIO_IRQ_INFO_EVENTFD, index, count: self.layout.vectors(index) };
        self.outbox.reply(header, &[info.as_bytes()]);
        Ok(Outcome::Done)
    }

    fn region_read(&mut self, header: &Header, access: RegionAccess) -> Outcome {
        let Some(data) = self.outbox.reply_with_ones(header, access.as_bytes(), access.count as usize) else {
            return Outcome::Done;
        };
        match self.clip(&access) {
            Some((region, len)) => {
                Outcome::Read { region, offset: access.offset, reply: data.start..data.start + len }
            }
            None => Outcome::Done,
        }
    }

    /// The part of an access that is inside the region: at least one byte, from `access.offset` on.
    fn clip(&self, access: &RegionAccess) -> Option<(Region, usize)> {
        let left = self.layout.region_size(access.region).checked_sub(access.offset)?;
        let len = left.min(u64::from(access.count));
        let region = Region::from_index(access.region)?;
        (len > 0).then_some((region, len as usize))
    }
}

/// Checks SET_IRQS against the vectors there are. Nothing to do for an interrupt that has none and is disabled.
fn irq_change(
    layout: &Layout,
    set: &SetIrqs,
    only: &[u8],
    fds: Vec<OwnedFd>,
) -> Result<Option<IrqChange>, Errno> {
    let vectors = layout.vectors(set.index);
    let end = set.start.checked_add(set.count).ok_or(Errno::EINVAL)?;
    let fds_fit = fds.is_empty() || (set.action == IrqAction::SetEventfds && fds.len() == set.count as usize);
    if set.index >= NUM_IRQS || end > vectors || !fds_fit {
        return Err(Errno::EINVAL);
    }
    // In range, because the number of vectors is an u16.
    let (start, count) = (set.start as u16, set.count as u16);
    let chosen = || {
        let is_chosen = |index: usize| only.get(index).is_none_or(|&flag| flag != 0);
        (start..start + count)
            .enumerate()
            .filter(|&(index, _)| is_chosen(index))
            .map(|(_, vector)| vector)
            .collect()
    };
    Ok(match set.action {
        IrqAction::Disable if vectors == 0 => None,
        IrqAction::Disable => Some(IrqChange::Disable),
        IrqAction::SetEventfds if fds.is_empty() => Some(IrqChange::Deassign { start, count }),
        IrqAction::SetEventfds => Some(IrqChange::Assign { start, eventfds: fds }),
        IrqAction::Trigger => Some(IrqChange::Trigger(chosen())),
        IrqAction::Mask => Some(IrqChange::Mask(chosen())),
        IrqAction::Unmask => Some(IrqChange::Unmask(chosen())),
    })
}

#[cfg(test)]
mod tests;
