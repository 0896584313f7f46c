//! The event loop's half of a device: what the controller wants from it, in order, and what is under way.
//!
//! The kernel's half ([`Link`]) is here unless a lane works with it. While it is away transfers wait, and what has
//! ended is reaped when it is back.

mod outcome;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use common::limited;
use common::usbfs::{PacketOutcome, ReapError, UrbBuffer, UrbKind, UrbToken, UsbfsFile};
use nix::errno::Errno;

use super::device_set::{Counters, DeviceEvent};
use super::lane::Work;
use super::link::Link;
use super::payload::{copy_to_guest, fill, urb_len};
use super::pool::{Budget, Pool};
use super::status;
use super::wake::Wake;
use crate::urb::{
    DeviceHandle, DeviceOp, DmaFault, GuestMem, OpError, OpId, Payload, TransferId, TransferKind,
    UrbCompletion, UrbRequest, UrbStatus,
};

/// The controller gets its answer after so long, whatever the device does: a Linux guest declares a controller dead
/// whose command takes 5 s.
pub(super) const ANSWER_WITHIN: Duration = Duration::from_millis(3500);
/// First pause before a transfer is tried again for which the host had no memory.
const RETRY_FIRST: Duration = Duration::from_millis(4);
/// Longest such pause.
const RETRY_MAX: Duration = Duration::from_millis(128);
/// Operations that wait for the device's lane. A controller has one command under way; the rest is for resets.
const JOBS_MAX: usize = 64;

/// Where outcomes go.
pub(super) type Sink<'a> = dyn FnMut(DeviceEvent) + 'a;

/// What the loop still owes the controller for a URB in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owed {
    /// Its outcome.
    Outcome,
    /// Its outcome, which is a cancel, not later than this.
    CancelBy(Instant),
    /// Nothing: the controller has been told, and guest memory must not be touched.
    Nothing,
    /// Nothing: it is our own, and listens while the guest sleeps.
    Wake,
}

/// A URB in flight.
#[derive(Debug)]
struct Transfer {
    token: UrbToken,
    request: UrbRequest,
    owed: Owed,
    /// The guest has taken its memory back: nothing is copied there.
    abandoned: bool,
}

/// An operation that is queued or under way and whose outcome the controller waits for.
#[derive(Clone, Copy, Debug)]
struct Owing {
    id: OpId,
    answer_by: Instant,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Device {
    handle: DeviceHandle,
    /// Away while a lane works, and until the device is open.
    pub(super) link: Option<Box<Link>>,
    /// The file, for the epoll set. Clones share it; the lane's close is the last.
    pub(super) file: Option<UsbfsFile>,
    pool: Pool,
    /// By slot of the URB.
    transfers: Vec<Option<Transfer>>,
    in_flight: usize,
    /// Not started yet: the link is away, or the host has no memory. Order of each endpoint is kept.
    waiting: VecDeque<UrbRequest>,
    /// For the lane, in order.
    pub(super) jobs: VecDeque<Work>,
    owing: Vec<Owing>,
    /// Bulk endpoints on which a transfer failed before it reached the kernel, so that we, not the kernel, must keep
    /// back what follows. By [`endpoint_bit`].
    failed: u32,
    retry_at: Option<Instant>,
    retry_pause: Duration,
    gone: bool,
    wake: Wake,
    /// Scratch for packet outcomes.
    packets: Vec<PacketOutcome>,
    pub(super) counters: Counters,
}

/// A place for each endpoint in a word: IN endpoints in the upper half.
const fn endpoint_bit(endpoint: u8) -> u32 {
    1 << ((endpoint & 0x0f) | ((endpoint & 0x80) >> 3))
}

/// What came of an attempt to start a transfer.
enum Started {
    /// In flight, or done for with an outcome.
    Yes,
    /// The host has no memory now.
    Later(UrbRequest),
}

impl Device {
    pub(super) fn new(handle: DeviceHandle, budget: Budget) -> Self {
        Self {
            handle,
            link: None,
            file: None,
            pool: Pool::new(budget),
            transfers: Vec::new(),
            in_flight: 0,
            waiting: VecDeque::new(),
            jobs: VecDeque::new(),
            owing: Vec::new(),
            failed: 0,
            retry_at: None,
            retry_pause: RETRY_FIRST,
            gone: false,
            wake: Wake::default(),
            packets: Vec::new(),
            counters: Counters::default(),
        }
    }

    /// The link is back from a lane.
    pub(super) fn arrived(&mut self, link: Box<Link>) {
        if self.file.is_none() {
            self.file = Some(link.urbs.file().clone());
            if !link.capabilities.has_mmap() {
                self.pool.use_heap_only();
            }
        }
        self.link = Some(link);
    }

    /// Starts a transfer, or puts it behind those that wait.
    pub(super) fn submit<M: GuestMem + ?Sized>(
        &mut self,
        request: UrbRequest,
        now: Instant,
        mem: &M,
        sink: &mut Sink<'_>,
    ) {
        if self.gone {
            return self.report(request, UrbStatus::Gone, 0, Vec::new(), sink);
        }
        let must_wait =
            self.link.is_none() || self.waiting.iter().any(|other| other.endpoint == request.endpoint);
        if must_wait {
            return self.waiting.push_back(request);
        }
        if let Started::Later(request) = self.start(request, mem, sink) {
            self.waiting.push_back(request);
            self.schedule_retry(now);
        }
    }

    /// Cancels transfers: at once what waits, by a lane what is in flight. `abandon`: guest memory must not be touched
    /// for them from now on.
    pub(super) fn cancel(&mut self, ids: &[TransferId], abandon: bool, now: Instant, sink: &mut Sink<'_>) {
        let mut tokens: Vec<(TransferId, UrbToken)> = Vec::new();
        for transfer in self.transfers.iter_mut().flatten() {
            if !ids.contains(&transfer.request.id) {
                continue;
            }
            transfer.abandoned |= abandon;
            if transfer.owed == Owed::Outcome {
                if !abandon {
                    self.wake.taken_back(&transfer.request);
                }
                transfer.owed = Owed::CancelBy(now + ANSWER_WITHIN);
                tokens.push((transfer.request.id, transfer.token));
            }
        }
        let mut kept = VecDeque::with_capacity(self.waiting.len());
        let mut cancelled = Vec::new();
        for request in self.waiting.drain(..) {
            if ids.contains(&request.id) { cancelled.push(request) } else { kept.push_back(request) }
        }
        self.waiting = kept;
        // Newest first: otherwise the end of one starts the next.
        for request in cancelled.into_iter().rev() {
            if !abandon {
                self.wake.taken_back(&request);
            }
            self.report(request, UrbStatus::Cancelled, 0, Vec::new(), sink);
        }
        tokens.sort_unstable_by_key(|&(id, _)| std::cmp::Reverse(id));
        self.discard(tokens.into_iter().map(|(_, token)| token).collect());
    }

    fn discard(&mut self, tokens: Vec<UrbToken>) {
        match self.jobs.back_mut() {
            _ if tokens.is_empty() || self.gone => {}
            Some(Work::Discard(queued)) => queued.extend(tokens),
            _ => self.jobs.push_back(Work::Discard(tokens)),
        }
    }

    /// Queues an operation for the lane.
    pub(super) fn operate(&mut self, id: OpId, op: DeviceOp, now: Instant, sink: &mut Sink<'_>) {
        let is_resume = op == DeviceOp::Resume;
        // A device must not sleep on because of what is queued before; a controller sends one Resume for each Suspend.
        if self.gone || (self.jobs.len() >= JOBS_MAX && !is_resume) {
            let error = if self.gone { OpError::Gone } else { OpError::Failed };
            return sink(DeviceEvent::Operated { device: self.handle, id, result: Err(error) });
        }
        let answer_by = now + ANSWER_WITHIN;
        match op {
            DeviceOp::Suspend => self.wake.set_suspended(true),
            DeviceOp::Resume => self.wake.set_suspended(false),
            _ => {}
        }
        // A device that may wake the guest is kept awake: it is listened to.
        let op = if op == DeviceOp::Suspend && self.wake.is_allowed() { DeviceOp::Resume } else { op };
        let endpoint_in_the_way = |endpoint: u8| match &op {
            DeviceOp::Reset => true,
            DeviceOp::ClearHalt { endpoint: cleared } => endpoint == *cleared,
            _ => false,
        };
        let mut discard = Vec::new();
        for transfer in self.transfers.iter_mut().flatten() {
            if transfer.owed == Owed::Wake || endpoint_in_the_way(transfer.request.endpoint) {
                match transfer.owed {
                    Owed::Outcome => transfer.owed = Owed::CancelBy(answer_by),
                    // What it brings yet is for the guest after a resume, and after nothing else.
                    Owed::Wake if !is_resume => transfer.owed = Owed::Nothing,
                    _ => {}
                }
                discard.push((transfer.request.id, transfer.token));
            }
        }
        discard.sort_unstable_by_key(|&(id, _)| std::cmp::Reverse(id));
        match op {
            DeviceOp::Suspend | DeviceOp::Resume => {}
            DeviceOp::Reset => self.wake.forget(),
            _ => self.wake.forget_input(),
        }
        self.owing.push(Owing { id, answer_by });
        let discard = discard.into_iter().map(|(_, token)| token).collect();
        self.jobs.push_back(Work::Operate { id, op, discard });
    }

    /// Reports an operation's outcome, unless the controller has been told that it takes too long.
    pub(super) fn operated(&mut self, id: OpId, result: Result<(), OpError>, sink: &mut Sink<'_>) {
        let Some(position) = self.owing.iter().position(|owing| owing.id == id) else {
            return limited!(debug, device = self.handle.0, ?result, "an operation ended too late");
        };
        self.owing.swap_remove(position);
        sink(DeviceEvent::Operated { device: self.handle, id, result });
    }

    /// Reaps what has ended, then starts what waits. The link must be here.
    pub(super) fn reap<M: GuestMem + ?Sized>(&mut self, now: Instant, mem: &M, sink: &mut Sink<'_>) {
        let mut packets = std::mem::take(&mut self.packets);
        // One turn for each URB that can be on the kernel's list.
        for _ in 0..=common::usbfs::IN_FLIGHT_MAX {
            let Some(link) = &mut self.link else { break };
            match link.urbs.reap(&mut packets) {
                Ok(Some(reaped)) => self.complete(reaped, &packets, mem, sink),
                Ok(None) => break,
                Err(ReapError::Unknown) => {
                    limited!(warn, device = self.handle.0, "somebody else uses this device's file")
                }
                Err(ReapError::Kernel(Errno::ENODEV)) => {
                    self.set_gone(sink);
                    break;
                }
                Err(ReapError::Kernel(error)) => {
                    limited!(warn, device = self.handle.0, %error, "transfers are lost, the device is given up");
                    self.set_gone(sink);
                    break;
                }
            }
        }
        self.packets = packets;
        self.start_waiting(now, mem, sink);
        self.listen();
    }

    /// A URB is in flight.
    fn track(&mut self, token: UrbToken, request: UrbRequest, owed: Owed) {
        let slot = token.slot();
        if self.transfers.len() <= slot {
            self.transfers.resize_with(slot + 1, || None);
        }
        self.transfers[slot] = Some(Transfer { token, request, owed, abandoned: false });
        self.in_flight += 1;
    }

    /// Tries again what waits for memory or for the link.
    pub(super) fn start_waiting<M: GuestMem + ?Sized>(&mut self, now: Instant, mem: &M, sink: &mut Sink<'_>) {
        if self.link.is_none() || self.waiting.is_empty() {
            return;
        }
        self.retry_at = None;
        let mut blocked = 0;
        for _ in 0..self.waiting.len() {
            let Some(request) = self.waiting.pop_front() else { break };
            if self.gone {
                self.report(request, UrbStatus::Gone, 0, Vec::new(), sink);
            } else if blocked & endpoint_bit(request.endpoint) != 0 {
                self.waiting.push_back(request);
            } else {
                let endpoint = request.endpoint;
                if let Started::Later(request) = self.start(request, mem, sink) {
                    blocked |= endpoint_bit(endpoint);
                    self.waiting.push_back(request);
                } else {
                    self.retry_pause = RETRY_FIRST;
                }
            }
        }
        if blocked != 0 {
            self.schedule_retry(now);
        }
    }

    fn schedule_retry(&mut self, now: Instant) {
        if self.retry_at.is_none() {
            self.counters.waits_for_memory += 1;
            self.retry_at = Some(now + self.retry_pause);
            self.retry_pause = (self.retry_pause * 2).min(RETRY_MAX);
        }
    }

    /// Whether transfers wait for memory of the host.
    pub(super) const fn is_starved(&self) -> bool {
        self.retry_at.is_some()
    }

    /// Gives idle memory back to the host, for another device.
    pub(super) fn trim(&mut self) {
        self.pool.trim();
    }

    /// When [`Self::on_deadline`] wants to be called.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let cancels = self.transfers.iter().flatten().filter_map(|transfer| match transfer.owed {
            Owed::CancelBy(by) => Some(by),
            Owed::Outcome | Owed::Nothing | Owed::Wake => None,
        });
        cancels.chain(self.owing.iter().map(|owing| owing.answer_by)).chain(self.retry_at).min()
    }

    /// Answers what takes too long, tries again what waits for memory.
    pub(super) fn on_deadline<M: GuestMem + ?Sized>(&mut self, now: Instant, mem: &M, sink: &mut Sink<'_>) {
        let (late, owing) = self.owing.iter().partition(|owing| owing.answer_by <= now);
        self.owing = owing;
        let late: Vec<Owing> = late;
        for Owing { id, .. } in late {
            limited!(
                warn,
                device = self.handle.0,
                "the device takes too long, the guest is told that it failed"
            );
            // What has not begun must not begin, but a device must not sleep on.
            self.jobs.retain(|work| match work {
                Work::Operate { id: queued, op, .. } => *queued != id || *op == DeviceOp::Resume,
                _ => true,
            });
            sink(DeviceEvent::Operated { device: self.handle, id, result: Err(OpError::Failed) });
        }
        self.abandon(sink, |owed| matches!(owed, Owed::CancelBy(by) if by <= now));
        if self.retry_at.is_some_and(|at| at <= now) {
            self.start_waiting(now, mem, sink);
        }
    }

    /// Ends everything for the controller at once. Nothing of it touches guest memory any more.
    pub(super) fn quiesce(&mut self, sink: &mut Sink<'_>) {
        while let Some(request) = self.waiting.pop_back() {
            self.report(request, UrbStatus::Cancelled, 0, Vec::new(), sink);
        }
        self.retry_at = None;
        self.abandon(sink, |owed| matches!(owed, Owed::Outcome | Owed::CancelBy(_)));
        self.stop_listening();
        self.wake.forget();
        let mut tokens: Vec<_> =
            self.transfers.iter().flatten().map(|transfer| (transfer.request.id, transfer.token)).collect();
        tokens.sort_unstable_by_key(|&(id, _)| std::cmp::Reverse(id));
        self.discard(tokens.into_iter().map(|(_, token)| token).collect());
    }

    /// Whether nothing is under way.
    pub(super) fn is_quiet(&self) -> bool {
        self.link.is_some() && self.in_flight == 0 && self.waiting.is_empty() && self.jobs.is_empty()
    }

    /// Tells the controller that these are cancelled, although the kernel has not let go of them.
    fn abandon(&mut self, sink: &mut Sink<'_>, chosen: impl Fn(Owed) -> bool) {
        for transfer in self.transfers.iter_mut().flatten() {
            if chosen(transfer.owed) {
                transfer.owed = Owed::Nothing;
                let payload = std::mem::replace(&mut transfer.request.payload, Payload::Guest(Vec::new()));
                sink(DeviceEvent::Completed {
                    device: self.handle,
                    completion: UrbCompletion {
                        id: transfer.request.id,
                        status: UrbStatus::Cancelled,
                        actual: 0,
                        packets: Vec::new(),
                        payload,
                    },
                });
            }
        }
    }

    /// The device was unplugged. What is in flight comes out of the kernel bit by bit, in later events.
    pub(super) fn hung_up<M: GuestMem + ?Sized>(&mut self, now: Instant, mem: &M, sink: &mut Sink<'_>) {
        let known = std::mem::replace(&mut self.gone, true);
        self.reap(now, mem, sink);
        if !known {
            self.announce_gone(sink);
        }
    }

    /// The device is lost to us.
    pub(super) fn set_gone(&mut self, sink: &mut Sink<'_>) {
        if !std::mem::replace(&mut self.gone, true) {
            self.announce_gone(sink);
        }
    }

    fn announce_gone(&mut self, sink: &mut Sink<'_>) {
        self.retry_at = None;
        while let Some(request) = self.waiting.pop_front() {
            self.report(request, UrbStatus::Gone, 0, Vec::new(), sink);
        }
        sink(DeviceEvent::Gone { device: self.handle });
    }

    fn start<M: GuestMem + ?Sized>(&mut self, request: UrbRequest, mem: &M, sink: &mut Sink<'_>) -> Started {
        let bulk = matches!(request.kind, TransferKind::Bulk { .. });
        let bit = endpoint_bit(request.endpoint);
        if bulk && !request.follows {
            self.failed &= !bit;
        } else if bulk && self.failed & bit != 0 {
            self.report(request, UrbStatus::NotRun, 0, Vec::new(), sink);
            return Started::Yes;
        }
        self.wake.started(request.endpoint);
        if let Some(bytes) = self.wake.take(&request) {
            let copied = copy_to_guest(mem, &request.payload, 0, &bytes);
            let outcome = if copied.is_ok() { UrbStatus::Completed } else { UrbStatus::GuestMemory };
            self.counters.bytes_in += bytes.len() as u64;
            self.report(request, outcome, bytes.len() as u32, Vec::new(), sink);
            return Started::Yes;
        }
        let Some(link) = &mut self.link else { return Started::Later(request) };
        let result = match urb_len(&request) {
            Ok(len) => {
                let mut buffer = self.pool.take(link.urbs.file(), len);
                match fill(&request, mem, buffer.as_mut_slice()) {
                    Ok(()) => submit(link, &request, len, buffer).map_err(|(errno, buffer)| {
                        self.pool.put(buffer);
                        errno
                    }),
                    Err(DmaFault { .. }) => {
                        self.pool.put(buffer);
                        self.failed |= if bulk { bit } else { 0 };
                        self.report(request, UrbStatus::GuestMemory, 0, Vec::new(), sink);
                        return Started::Yes;
                    }
                }
            }
            Err(refused) => {
                self.report(request, refused, 0, Vec::new(), sink);
                return Started::Yes;
            }
        };
        match result {
            Ok(token) => self.track(token, request, Owed::Outcome),
            Err(Errno::ENOMEM) => {
                self.pool.trim();
                return Started::Later(request);
            }
            Err(errno) => {
                let outcome = status::of_submit(errno);
                limited!(debug, device = self.handle.0, endpoint = request.endpoint, %errno, "the kernel refused a transfer");
                self.failed |= if bulk { bit } else { 0 };
                self.report(request, outcome, 0, Vec::new(), sink);
                if outcome == UrbStatus::Gone {
                    self.set_gone(sink);
                }
            }
        }
        Started::Yes
    }
}

fn submit(
    link: &mut Link,
    request: &UrbRequest,
    len: usize,
    buffer: UrbBuffer,
) -> Result<UrbToken, (Errno, UrbBuffer)> {
    let kind = match &request.kind {
        TransferKind::Control { .. } => UrbKind::Control,
        TransferKind::Bulk { stream } => UrbKind::Bulk { stream: *stream, follows: request.follows },
        TransferKind::Interrupt => UrbKind::Interrupt,
        TransferKind::Isochronous { packets } => UrbKind::Isochronous { packets },
    };
    link.urbs.submit(request.endpoint, kind, len, buffer).map_err(|error| (error.errno, error.buffer))
}

#[cfg(test)]
#[path = "device/tests.rs"]
pub(super) mod tests;
