//! Device slots and their endpoints: the state behind the contexts (xHCI 1.2 §4.5, §4.8). Data and bookkeeping only;
//! commands change it in `command`, transfers in `transfer`.

use std::collections::VecDeque;
use std::time::Duration;

use zerocopy::IntoBytes;

use super::configure::INTERVAL_MAX;
use super::context::{
    CONTEXT_BYTES, Dci, EndpointContext, EndpointKind, EndpointState, SlotContext, SlotState,
};
use super::port::PortNumber;
use super::ring::Cursor;
use super::td::Flight;
use super::{DmaFault, GuestMem};
use crate::urb::{DeviceHandle, TransferId};

/// One slot that the guest has enabled.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) state: SlotState,
    /// Output Device Context, from the DCBAA when the device was addressed.
    pub(super) context_at: u64,
    /// The slot context as we last wrote it.
    pub(super) context: SlotContext,
    pub(super) port: Option<PortNumber>,
    /// The device the slot was addressed to; another one in the same port is not ours.
    pub(super) device: Option<DeviceHandle>,
    /// By [`Dci::index`]. Taken out while it is worked on.
    pub(super) endpoints: [Option<Box<Endpoint>>; 31],
}

impl Slot {
    /// A slot as Enable Slot leaves it.
    pub(super) fn new() -> Self {
        Self {
            state: SlotState::Enabled,
            context_at: 0,
            context: SlotContext::default(),
            port: None,
            device: None,
            endpoints: [const { None }; 31],
        }
    }

    /// Whether the slot has a device context in guest memory.
    pub(super) fn has_context(&self) -> bool {
        self.state != SlotState::Enabled
    }

    /// Writes the slot context out.
    pub(super) fn write_context<M: GuestMem>(&mut self, mem: &M, address: u8) -> Result<(), DmaFault> {
        self.context.set_state(self.state, address);
        mem.write(self.context_at, self.context.0.as_bytes())
    }

    /// Where the endpoint context lies.
    pub(super) fn endpoint_at(&self, dci: Dci) -> u64 {
        self.context_at.wrapping_add(u64::from(dci.get()) * CONTEXT_BYTES)
    }
}

/// Why an endpoint waits for its transfers to come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Drain {
    /// Stop Endpoint: the command completes afterwards.
    Stop,
    /// The controller was halted, or something else cancelled them: they start again afterwards.
    Pause,
}

/// A transfer that was stopped in the middle and may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Resume {
    /// First TRB of the TD.
    pub(super) start: Cursor,
    /// The TRB in progress, where the guest sees the ring stand.
    pub(super) at: Cursor,
    /// Bytes already moved.
    pub(super) moved: u32,
    /// Nothing is left to move, by count or by a short packet: only its events are missing.
    pub(super) ended: bool,
}

/// One transfer ring: of the endpoint, or of one of its streams.
#[derive(Debug)]
pub(super) struct TransferRing {
    /// Next TRB to look at.
    pub(super) cursor: Cursor,
    /// Set when `cursor` stands on a TD that was partly done.
    pub(super) resume: Option<Resume>,
    /// Started transfers, oldest first.
    pub(super) queue: VecDeque<Flight>,
    /// The doorbell was rung since the ring was last found empty.
    pub(super) rung: bool,
}

impl TransferRing {
    pub(super) fn new(cursor: Cursor) -> Self {
        Self { cursor, resume: None, queue: VecDeque::new(), rung: false }
    }

    /// TR Dequeue Pointer as the guest is told.
    pub(super) fn dequeue(&self) -> Cursor {
        self.resume.map_or(self.cursor, |resume| resume.at)
    }

    /// Whether more may be started behind what is there.
    pub(super) fn flows(&self) -> bool {
        self.queue.iter().all(Flight::is_good)
    }

    /// Payload bytes in flight.
    pub(super) fn bytes(&self) -> u64 {
        self.queue.iter().map(|flight| u64::from(flight.len)).sum()
    }
}

/// Stream Context Array of an endpoint (§6.2.4.1), primary and linear.
#[derive(Clone, Copy, Debug)]
pub(super) struct StreamArray {
    pub(super) at: u64,
    /// Entries, a power of two; stream 0 is reserved.
    pub(super) count: u16,
}

/// One endpoint of a slot that is not Disabled.
#[derive(Debug)]
pub(super) struct Endpoint {
    pub(super) dci: Dci,
    pub(super) kind: EndpointKind,
    pub(super) state: EndpointState,
    /// The context as we last wrote it.
    pub(super) context: EndpointContext,
    pub(super) streams: Option<StreamArray>,
    /// One ring; with streams one for each stream id, made when its doorbell is rung.
    pub(super) rings: Vec<Option<TransferRing>>,
    pub(super) drain: Option<Drain>,
    /// It stands on the list of endpoints to look at.
    pub(super) queued: bool,
    /// Cancels in a row that nobody asked for.
    pub(super) spurious: u8,
    /// Isochronous: transfers have been started and the ring has not run dry since.
    pub(super) streaming: bool,
    /// Isochronous: the ring has run dry and is reported then; or the first TD waits for its frame.
    pub(super) deadline: Option<Duration>,
}

impl Endpoint {
    /// An endpoint as its context describes it, Running.
    pub(super) fn new(dci: Dci, kind: EndpointKind, context: EndpointContext) -> Self {
        let streams = (context.dword0().max_streams() > 0 && kind == EndpointKind::Bulk).then(|| {
            StreamArray { at: context.dequeue() & !0xf, count: 2 << context.dword0().max_streams().min(14) }
        });
        let rings = match streams {
            Some(array) => (0..array.count).map(|_| None).collect(),
            None => vec![Some(TransferRing::new(Cursor::from_field(context.dequeue())))],
        };
        Self {
            dci,
            kind,
            state: EndpointState::Running,
            context,
            streams,
            rings,
            drain: None,
            queued: false,
            spurious: 0,
            streaming: false,
            deadline: None,
        }
    }

    /// Service interval (§6.2.3.6).
    pub(super) fn interval(&self) -> Duration {
        Duration::from_micros(125 << self.context.dword0().interval().min(INTERVAL_MAX))
    }

    pub(super) fn rings_mut(&mut self) -> impl Iterator<Item = &mut TransferRing> {
        self.rings.iter_mut().flatten()
    }

    pub(super) fn flights(&self) -> impl Iterator<Item = &Flight> {
        self.rings.iter().flatten().flat_map(|ring| &ring.queue)
    }

    pub(super) fn has_flights(&self) -> bool {
        self.flights().next().is_some()
    }

    /// Whether there is something to report: the oldest transfer of a ring has ended.
    pub(super) fn has_ended(&self) -> bool {
        let mut oldest = self.rings.iter().flatten().filter_map(|ring| ring.queue.front());
        oldest.any(|flight| flight.outcome.is_some())
    }

    /// The transfers that the device still has.
    pub(super) fn outstanding(&self) -> Vec<TransferId> {
        self.flights().filter(|flight| flight.is_with_device()).map(|flight| flight.id).collect()
    }

    /// Whether any transfer has no outcome yet.
    pub(super) fn is_waiting(&self) -> bool {
        self.flights().any(|flight| flight.outcome.is_none())
    }

    /// Writes the context out. A guest that took its memory away does not learn the state: no harm to us.
    pub(super) fn write_context<M: GuestMem>(&mut self, mem: &M, at: u64) {
        self.context.set_state(self.state);
        if let Err(fault) = mem.write(at, self.context.0.as_bytes()) {
            common::limited!(debug, %fault, "endpoint context not written");
        }
    }
}
