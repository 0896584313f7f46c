//! Transfer Descriptors: from TRBs on a ring to what one transfer moves (xHCI 1.2 §3.2.6–§3.2.11, §4.11). Nothing is
//! started or reported here.

use super::context::EndpointKind;
use super::ring::{Cursor, Reader};
use super::trb::{TransferType, Trb};
use super::{DmaFault, GuestMem};
use crate::urb::{PacketResult, Payload, Segment, TransferId, UrbStatus};

/// Most bytes of a TD.
pub(super) const TD_BYTES: u64 = 16 << 20;
/// Most TRBs of a TD: 16 MiB in pages, and some to spare.
pub(super) const TD_TRBS: usize = 8192;
/// Most Link TRBs that may follow each other or stand in one TD.
const TD_LINKS: usize = 32;

/// What a TRB of a TD is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Setup,
    /// Moves data: Normal, Data Stage, Isoch.
    Data,
    Status,
    EventData,
    /// Moves nothing: No-Op, and Link with IOC.
    Idle,
}

/// What we keep of a TRB until its TD has ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    pub(super) at: Cursor,
    /// Event Data: the parameter.
    pub(super) parameter: u64,
    pub(super) len: u32,
    pub(super) interrupter: u16,
    pub(super) role: Role,
    pub(super) interrupt: bool,
    pub(super) short_interrupt: bool,
    pub(super) blocks_interrupt: bool,
    /// The last TRB of its TD; an isochronous transfer has several TDs.
    pub(super) ends_td: bool,
}

impl Item {
    /// Stands for a TRB that could not be read.
    pub(super) fn unreadable(at: Cursor) -> Self {
        item(at, &Trb::default(), Role::Idle, 0)
    }
}

/// How a transfer ended, as far as its ring is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) status: Ended,
    pub(super) actual: u32,
}

/// The status of an [`Outcome`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// By the device.
    Device(UrbStatus),
    /// Before it began: the guest built something we cannot carry out (TRB Error).
    Malformed,
}

impl Outcome {
    /// Done, for what needs no device.
    pub(super) const COMPLETED: Self = Self { status: Ended::Device(UrbStatus::Completed), actual: 0 };
}

/// How far the events of a transfer have been written. The event ring may fill up in between.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Progress {
    pub(super) item: usize,
    pub(super) packet: usize,
    /// Bytes not assigned to a TRB yet.
    pub(super) left: u32,
    /// Event Data Transfer Length Accumulator (§4.11.5.2).
    pub(super) accumulated: u32,
    pub(super) short: bool,
    pub(super) reported: bool,
    pub(super) started: bool,
}

/// A transfer between its TRBs and its events.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) id: TransferId,
    pub(super) items: Vec<Item>,
    /// Where the ring goes on.
    pub(super) end: Cursor,
    /// Bytes the TRBs describe.
    pub(super) len: u32,
    /// Bytes that were moved before a stop, see [`super::slot::Resume`].
    pub(super) moved_before: u32,
    /// The device sends.
    pub(super) is_in: bool,
    /// The device has, or had, this transfer under its id; false for what is answered here or is an operation.
    pub(super) submitted: bool,
    pub(super) outcome: Option<Outcome>,
    pub(super) packets: Vec<PacketResult>,
    pub(super) progress: Progress,
}

impl Flight {
    /// First TRB.
    pub(super) fn start(&self) -> Cursor {
        self.items.first().map_or(self.end, |item| item.at)
    }

    /// Not failed, as far as is known.
    pub(super) fn is_good(&self) -> bool {
        matches!(self.outcome, None | Some(Outcome { status: Ended::Device(UrbStatus::Completed), .. }))
    }

    /// The device still has it.
    pub(super) fn is_with_device(&self) -> bool {
        self.submitted && self.outcome.is_none()
    }
}

/// A TD, or what stands in its place.
#[derive(Debug)]
pub(super) enum Parsed {
    /// The guest has not handed over a whole TD.
    Nothing,
    /// A TD that moves data, also zero bytes of it. The data is in `immediate` or in the segments.
    Transfer { immediate: Option<Payload>, len: u32, setup: [u8; 8], first: Trb, end: Cursor },
    /// TRBs that need no device.
    Idle { end: Cursor },
    /// The guest built something that is no TD; the last item is the TRB at fault.
    Malformed { end: Cursor },
}

/// Reads TDs from a ring.
pub(super) struct Parser<'m, M> {
    reader: Reader<'m, M>,
    kind: EndpointKind,
    is_in: bool,
    /// TRBs read so far, for the work budget.
    pub(super) trbs: usize,
}

/// State of one [`Parser::parse`].
#[derive(Default)]
struct Draft {
    immediate: Option<Payload>,
    len: u64,
    setup: Option<[u8; 8]>,
    first: Option<Trb>,
    links: usize,
}

/// Why a TRB cannot be part of a TD here.
struct Misfit;

impl<'m, M: GuestMem> Parser<'m, M> {
    pub(super) fn new(mem: &'m M, kind: EndpointKind, is_in: bool) -> Self {
        Self { reader: Reader::new(mem), kind, is_in, trbs: 0 }
    }

    /// Reads one TD from `at`. Its TRBs are appended to `items`, its pieces of memory to `segments`.
    pub(super) fn parse(
        &mut self,
        mut at: Cursor,
        items: &mut Vec<Item>,
        segments: &mut Vec<Segment>,
    ) -> Result<Parsed, DmaFault> {
        let start = items.len();
        let mut draft = Draft::default();
        loop {
            let Some(trb) = self.reader.fetch(at)? else {
                items.truncate(start);
                return Ok(Parsed::Nothing);
            };
            self.trbs += 1;
            let control = trb.control();
            let in_td = items.len() > start;
            if let Some(TransferType::Link) = TransferType::new(control.trb_type()) {
                let next = at.follow(&trb);
                draft.links += 1;
                if draft.links > TD_LINKS {
                    items.push(item(at, &trb, Role::Idle, 0));
                    return Ok(Parsed::Malformed { end: at });
                }
                if control.interrupt() {
                    items.push(Item { ends_td: !in_td, ..item(at, &trb, Role::Idle, 0) });
                    if !in_td {
                        return Ok(Parsed::Idle { end: next });
                    }
                }
                at = next;
                continue;
            }
            let added = self.add(at, &trb, items, segments, &mut draft);
            let fits = added.is_ok() && items.len() - start <= TD_TRBS && draft.len <= TD_BYTES;
            if !fits {
                if added.is_err() {
                    items.push(item(at, &trb, Role::Idle, 0));
                }
                return Ok(Parsed::Malformed { end: at });
            }
            at = at.next();
            if self.ends(&control, items, &draft) {
                if let Some(last) = items.last_mut() {
                    last.ends_td = true;
                }
                return Ok(finished(draft, at));
            }
        }
    }

    /// Whether the TRB just added is the last of its TD. A control transfer ends after its Status stage, with the Event
    /// Data TRB that may be chained to it (§4.11.2.2).
    fn ends(&self, control: &super::trb::Control, items: &[Item], draft: &Draft) -> bool {
        if control.chain() {
            return false;
        }
        match self.kind {
            EndpointKind::Control => {
                draft.setup.is_none() || items.iter().rev().take(2).any(|item| item.role == Role::Status)
            }
            _ => true,
        }
    }

    fn add(
        &self,
        at: Cursor,
        trb: &Trb,
        items: &mut Vec<Item>,
        segments: &mut Vec<Segment>,
        draft: &mut Draft,
    ) -> Result<(), Misfit> {
        let kind = TransferType::new(trb.control().trb_type()).ok_or(Misfit)?;
        let role = match (kind, self.kind) {
            (TransferType::NoOp, _) => Role::Idle,
            (TransferType::EventData, _) => Role::EventData,
            (_, EndpointKind::Control) => self.control_role(kind, trb, items, draft)?,
            (TransferType::Isoch, EndpointKind::Isochronous) if draft.first.is_none() => Role::Data,
            (TransferType::Normal, EndpointKind::Isochronous) if draft.first.is_some() => Role::Data,
            (TransferType::Normal, EndpointKind::Bulk | EndpointKind::Interrupt) => Role::Data,
            _ => return Err(Misfit),
        };
        let is_out = match draft.setup {
            Some(setup) => setup[0] & 0x80 == 0,
            None => !self.is_in,
        };
        let mut len = 0;
        if role == Role::Data {
            len = trb.status().length();
            if draft.immediate.is_some() {
                return Err(Misfit);
            }
            if trb.control().immediate() {
                if len > 8 || !is_out || draft.len > 0 {
                    return Err(Misfit);
                }
                draft.immediate =
                    Some(Payload::Immediate { bytes: trb.parameter().to_le_bytes(), len: len as u8 });
            } else {
                add_segment(segments, trb.parameter(), len);
            }
            draft.len += u64::from(len);
        }
        if role != Role::Idle && role != Role::EventData && draft.first.is_none() {
            draft.first = Some(*trb);
        }
        items.push(item(at, trb, role, len));
        Ok(())
    }

    /// Setup, Data and Status stage in this order (§4.11.2.2); the data stage as the setup packet has it.
    fn control_role(
        &self,
        kind: TransferType,
        trb: &Trb,
        items: &[Item],
        draft: &mut Draft,
    ) -> Result<Role, Misfit> {
        let last = items
            .iter()
            .rev()
            .map(|item| item.role)
            .find(|role| !matches!(role, Role::Idle | Role::EventData));
        let device_sends = trb.control().upper() & 1 == 1;
        match (kind, draft.setup) {
            (TransferType::Setup, None) => {
                if !trb.control().immediate() || trb.status().length() != 8 {
                    return Err(Misfit);
                }
                draft.setup = Some(trb.parameter().to_le_bytes());
                Ok(Role::Setup)
            }
            (TransferType::Data, Some(setup)) if last == Some(Role::Setup) => {
                let fits = wants_in(&setup) == device_sends && length(&setup) > 0;
                if fits { Ok(Role::Data) } else { Err(Misfit) }
            }
            (TransferType::Normal, Some(_)) if last == Some(Role::Data) => Ok(Role::Data),
            (TransferType::Status, Some(setup)) if matches!(last, Some(Role::Setup | Role::Data)) => {
                let has_data = last == Some(Role::Data);
                let expects_in = !(has_data && wants_in(&setup));
                let fits = device_sends == expects_in && draft.len <= u64::from(length(&setup));
                if fits { Ok(Role::Status) } else { Err(Misfit) }
            }
            _ => Err(Misfit),
        }
    }
}

fn finished(draft: Draft, end: Cursor) -> Parsed {
    let Some(first) = draft.first else { return Parsed::Idle { end } };
    let len = draft.len as u32;
    Parsed::Transfer { immediate: draft.immediate, len, setup: draft.setup.unwrap_or_default(), first, end }
}

fn item(at: Cursor, trb: &Trb, role: Role, len: u32) -> Item {
    let control = trb.control();
    Item {
        at,
        parameter: trb.parameter(),
        len,
        interrupter: trb.status().interrupter(),
        role,
        interrupt: control.interrupt(),
        short_interrupt: control.short_interrupt() && role == Role::Data,
        blocks_interrupt: control.flag9(),
        ends_td: false,
    }
}

/// Adds a piece, joined to the one before where they touch.
fn add_segment(payload: &mut Vec<Segment>, addr: u64, len: u32) {
    if len == 0 {
        return;
    }
    if let Some(last) = payload.last_mut()
        && last.addr.wrapping_add(u64::from(last.len)) == addr
        && addr != 0
        && let Some(sum) = last.len.checked_add(len)
    {
        last.len = sum;
        return;
    }
    payload.push(Segment { addr, len });
}

/// Takes the first `count` bytes off the payload of a transfer that goes on.
pub(super) fn skip(payload: &mut Payload, count: u32) {
    match payload {
        Payload::Guest(segments) => {
            let mut left = count;
            segments.retain_mut(|segment| {
                let part = left.min(segment.len);
                left -= part;
                segment.addr = segment.addr.wrapping_add(u64::from(part));
                segment.len -= part;
                segment.len > 0
            });
        }
        Payload::Immediate { bytes, len } => {
            let part = count.min(u32::from(*len)) as u8;
            bytes.rotate_left(usize::from(part));
            *len -= part;
        }
    }
}

/// wLength of a setup packet.
pub(super) fn length(setup: &[u8; 8]) -> u16 {
    u16::from_le_bytes([setup[6], setup[7]])
}

fn wants_in(setup: &[u8; 8]) -> bool {
    setup[0] & 0x80 != 0
}
