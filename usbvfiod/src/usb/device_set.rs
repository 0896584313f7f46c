//! All devices of the process: the door the event loop uses.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use common::limited;
use nix::sys::epoll::EpollFlags;
use tracing::error;

use super::device::Device;
use super::lane::{Done, Job, Lanes, Outcome, Work};
use super::link::{DeviceInfo, Handover, Refused};
use super::pool::{Budget, Limits};
use crate::urb::{
    DeviceHandle, DeviceOp, Effect, GuestMem, OpError, OpId, TransferId, UrbCompletion, UrbRequest, UrbStatus,
};

/// What the transport tells the event loop.
#[derive(Debug)]
pub enum DeviceEvent {
    /// A device is open and claimed. Watch [`DeviceSet::fd`] now.
    Attached {
        /// As given to [`DeviceSet::attach`].
        device: DeviceHandle,
        /// What it is.
        info: DeviceInfo,
    },
    /// A device was not taken; its handle is unknown again.
    Refused {
        /// As given to [`DeviceSet::attach`].
        device: DeviceHandle,
        /// Why.
        reason: Refused,
    },
    /// A transfer ended.
    Completed {
        /// Whose.
        device: DeviceHandle,
        /// How.
        completion: UrbCompletion,
    },
    /// An operation ended, or takes too long.
    Operated {
        /// On which device.
        device: DeviceHandle,
        /// Which one.
        id: OpId,
        /// How.
        result: Result<(), OpError>,
    },
    /// A device was unplugged, or came back from a reset as another one. Transfers in flight still get their
    /// outcomes. Detach it.
    Gone {
        /// Which one.
        device: DeviceHandle,
    },
    /// A device in a suspended port asks to be heard.
    Woke {
        /// Which one.
        device: DeviceHandle,
    },
    /// A detached device's file is closed.
    Detached {
        /// Which one.
        device: DeviceHandle,
    },
}

/// Totals over all devices since start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Transfers that ended, whatever the outcome.
    pub transfers: u64,
    /// Payload bytes from devices.
    pub bytes_in: u64,
    /// Payload bytes to devices.
    pub bytes_out: u64,
    /// Transfers that ended with an error.
    pub errors: u64,
    /// Times a transfer had to wait for usbfs memory of the host.
    pub waits_for_memory: u64,
}

impl Counters {
    fn add(&mut self, other: Self) {
        self.transfers += other.transfers;
        self.bytes_in += other.bytes_in;
        self.bytes_out += other.bytes_out;
        self.errors += other.errors;
        self.waits_for_memory += other.waits_for_memory;
    }
}

/// See the module. No call waits. Each may report through its `sink`, in the order in which things ended.
#[derive(Debug)]
pub struct DeviceSet {
    lanes: Lanes,
    budget: Budget,
    devices: BTreeMap<DeviceHandle, Device>,
    /// Detached; a lane has them, or will close them next.
    leaving: BTreeMap<DeviceHandle, Device>,
    /// Of devices that are no more.
    counters: Counters,
}

impl DeviceSet {
    /// What to register [`Self::fd`] for. Edge-triggered: while a lane has a device, nobody reaps it, and a level would
    /// turn the loop in circles; a device that hangs up says so once.
    pub const INTEREST: EpollFlags = EpollFlags::EPOLLOUT.union(EpollFlags::EPOLLET);

    /// No devices yet.
    pub fn new(lanes: Lanes, limits: Limits) -> Self {
        Self {
            lanes,
            budget: Budget::new(limits),
            devices: BTreeMap::new(),
            leaving: BTreeMap::new(),
            counters: Counters::default(),
        }
    }

    /// Takes a device file. [`DeviceEvent::Attached`] or [`DeviceEvent::Refused`] follows. A handle is good for one
    /// device only, ever.
    pub fn attach(&mut self, handle: DeviceHandle, fd: OwnedFd, handover: Handover) {
        if self.devices.contains_key(&handle) || self.leaving.contains_key(&handle) {
            return error!(device = handle.0, "a device handle is used twice");
        }
        self.devices.insert(handle, Device::new(handle, self.budget.clone()));
        self.lanes.send(Job { device: handle, link: None, work: Work::Open { fd, handover } });
    }

    /// Gives a device up. Take [`Self::fd`] out of the epoll set before. No more events about it but
    /// [`DeviceEvent::Detached`], when everything is cancelled and the file closed, which can take seconds.
    pub fn detach(&mut self, handle: DeviceHandle) {
        let Some(mut device) = self.devices.remove(&handle) else { return };
        device.file = None;
        device.quiesce(&mut |_| {});
        device.jobs.clear();
        let link = device.link.take();
        self.leaving.insert(handle, device);
        if link.is_some() {
            self.lanes.send(Job { device: handle, link, work: Work::Close });
        }
    }

    /// The file of a device, to be watched for [`Self::INTEREST`]. None before [`DeviceEvent::Attached`].
    pub fn fd(&self, handle: DeviceHandle) -> Option<BorrowedFd<'_>> {
        self.devices.get(&handle)?.file.as_ref().map(AsFd::as_fd)
    }

    /// Readable when [`Self::on_lane_ready`] has something to do.
    pub fn lane_fd(&self) -> BorrowedFd<'_> {
        self.lanes.fd()
    }

    /// Carries out what the controller asks for. Interrupts are not ours: the vector comes back.
    pub fn perform<M: GuestMem + ?Sized>(
        &mut self,
        effect: Effect,
        now: Instant,
        mem: &M,
        mut sink: impl FnMut(DeviceEvent),
    ) -> Option<u16> {
        match effect {
            Effect::Submit(request) => self.submit(request, now, mem, &mut sink),
            Effect::Cancel { device, ids } => self.cancel(device, &ids, false, now, &mut sink),
            Effect::Abandon { device, ids } => self.cancel(device, &ids, true, now, &mut sink),
            Effect::Operate { id, device, op } => self.operate(id, device, op, now, &mut sink),
            Effect::Interrupt { vector } => return Some(vector),
        }
        None
    }

    fn submit<M: GuestMem + ?Sized>(
        &mut self,
        request: UrbRequest,
        now: Instant,
        mem: &M,
        sink: &mut dyn FnMut(DeviceEvent),
    ) {
        let handle = request.device;
        let Some(device) = self.devices.get_mut(&handle) else {
            let UrbRequest { id, payload, .. } = request;
            let status = UrbStatus::Gone;
            let completion = UrbCompletion { id, status, actual: 0, packets: Vec::new(), payload };
            return sink(DeviceEvent::Completed { device: handle, completion });
        };
        let starved = device.is_starved();
        device.submit(request, now, mem, sink);
        if device.is_starved() && !starved {
            limited!(debug, device = handle.0, "transfers wait for usbfs memory (usbcore.usbfs_memory_mb)");
            self.devices.values_mut().for_each(Device::trim);
        }
    }

    fn cancel(
        &mut self,
        handle: DeviceHandle,
        ids: &[TransferId],
        abandon: bool,
        now: Instant,
        sink: &mut dyn FnMut(DeviceEvent),
    ) {
        if let Some(device) = self.devices.get_mut(&handle) {
            device.cancel(ids, abandon, now, sink);
            Self::send_next(&self.lanes, handle, device);
        }
    }

    fn operate(
        &mut self,
        id: OpId,
        handle: DeviceHandle,
        op: DeviceOp,
        now: Instant,
        sink: &mut dyn FnMut(DeviceEvent),
    ) {
        match self.devices.get_mut(&handle) {
            Some(device) => {
                device.operate(id, op, now, sink);
                Self::send_next(&self.lanes, handle, device);
            }
            None => sink(DeviceEvent::Operated { device: handle, id, result: Err(OpError::Gone) }),
        }
    }

    /// Reaps a device about which the epoll set said something.
    pub fn on_device_ready<M: GuestMem + ?Sized>(
        &mut self,
        handle: DeviceHandle,
        flags: EpollFlags,
        now: Instant,
        mem: &M,
        mut sink: impl FnMut(DeviceEvent),
    ) {
        let Some(device) = self.devices.get_mut(&handle) else { return };
        if flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
            device.hung_up(now, mem, &mut sink);
        } else {
            device.reap(now, mem, &mut sink);
        }
    }

    /// Takes devices back from the lanes.
    pub fn on_lane_ready<M: GuestMem + ?Sized>(
        &mut self,
        now: Instant,
        mem: &M,
        mut sink: impl FnMut(DeviceEvent),
    ) {
        for Done { device: handle, link, outcome } in self.lanes.take_done() {
            if let Some(device) = self.devices.get_mut(&handle) {
                if let Some(link) = link {
                    device.arrived(link);
                }
                match outcome {
                    Outcome::Opened(Ok(info)) => {
                        sink(DeviceEvent::Attached { device: handle, info });
                    }
                    Outcome::Opened(Err(reason)) => {
                        self.devices.remove(&handle);
                        sink(DeviceEvent::Refused { device: handle, reason });
                        continue;
                    }
                    // Outcomes of cancelled transfers come before that of what cancelled them.
                    Outcome::Operated(id, result) => {
                        device.reap(now, mem, &mut sink);
                        device.operated(id, result, &mut sink);
                        if result == Err(OpError::Gone) {
                            device.set_gone(&mut sink);
                        }
                    }
                    Outcome::Discarded | Outcome::Closed => {}
                }
                device.reap(now, mem, &mut sink);
                Self::send_next(&self.lanes, handle, device);
            } else if self.leaving.contains_key(&handle) {
                match link {
                    Some(link) => {
                        self.lanes.send(Job { device: handle, link: Some(link), work: Work::Close });
                    }
                    None => {
                        let device = self.leaving.remove(&handle);
                        self.counters.add(device.map(|device| device.counters).unwrap_or_default());
                        sink(DeviceEvent::Detached { device: handle });
                    }
                }
            }
        }
    }

    /// Gives the next job of a device to a lane, if the device is here.
    fn send_next(lanes: &Lanes, handle: DeviceHandle, device: &mut Device) {
        if device.link.is_some()
            && let Some(work) = device.jobs.pop_front()
        {
            lanes.send(Job { device: handle, link: device.link.take(), work });
        }
    }

    /// When [`Self::on_deadline`] wants to be called at the latest.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.devices.values().filter_map(Device::next_deadline).min()
    }

    /// Answers what takes too long, and tries again what waits for memory. May be called at any time.
    pub fn on_deadline<M: GuestMem + ?Sized>(
        &mut self,
        now: Instant,
        mem: &M,
        mut sink: impl FnMut(DeviceEvent),
    ) {
        for (&handle, device) in &mut self.devices {
            if device.next_deadline().is_some_and(|deadline| deadline <= now) {
                device.on_deadline(now, mem, &mut sink);
                Self::send_next(&self.lanes, handle, device);
            }
        }
    }

    /// The guest is gone or its memory changes: everything ends for the controller at once, as cancelled, and nothing
    /// that is still under way touches guest memory. Lanes cancel the rest.
    pub fn quiesce_all(&mut self, mut sink: impl FnMut(DeviceEvent)) {
        for (&handle, device) in &mut self.devices {
            device.quiesce(&mut sink);
            Self::send_next(&self.lanes, handle, device);
        }
    }

    /// Whether nothing is in flight anywhere and no lane works.
    pub fn is_quiet(&self) -> bool {
        self.leaving.is_empty() && self.devices.values().all(Device::is_quiet)
    }

    /// Totals since start.
    pub fn counters(&self) -> Counters {
        let mut sum = self.counters;
        self.devices.values().chain(self.leaving.values()).for_each(|device| sum.add(device.counters));
        sum
    }

    /// How many devices are attached or about to be.
    pub fn len(&self) -> usize {
        self.devices.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    use common::ids::BusAddress;
    use common::usbfs::NotUsbfs;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;
    use crate::urb::{DmaFault, Payload, TransferKind};

    /// A guest without memory.
    struct Nothing;

    impl GuestMem for Nothing {
        fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), DmaFault> {
            Err(DmaFault { addr, len: buf.len() })
        }

        fn write(&self, addr: u64, buf: &[u8]) -> Result<(), DmaFault> {
            Err(DmaFault { addr, len: buf.len() })
        }
    }

    const DEVICE: DeviceHandle = DeviceHandle(3);

    fn set() -> DeviceSet {
        DeviceSet::new(Lanes::start(2).unwrap(), Limits::default())
    }

    fn attach(set: &mut DeviceSet, fd: OwnedFd) {
        let address = BusAddress { bus: 1, device: 2 };
        set.attach(DEVICE, fd, Handover { address, configuration: 1 });
    }

    fn wait_for_lane(set: &mut DeviceSet) -> Vec<DeviceEvent> {
        let mut events = Vec::new();
        let mut poll_fd = [PollFd::new(set.lane_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(Duration::from_secs(10)).unwrap();
        assert_eq!(poll(&mut poll_fd, timeout), Ok(1));
        set.on_lane_ready(Instant::now(), &Nothing, |event| events.push(event));
        events
    }

    #[test]
    fn file_that_is_no_usb_device_is_refused_by_a_lane() {
        let mut set = set();
        attach(&mut set, tempfile::tempfile().unwrap().into());

        let events = wait_for_lane(&mut set);

        let [DeviceEvent::Refused { device: DEVICE, reason }] = &events[..] else { panic!("{events:?}") };
        assert_eq!(*reason, Refused::BadFile(NotUsbfs::NoCharacterDevice));
        assert!(set.is_empty() && set.is_quiet());
    }

    #[test]
    fn device_detached_while_it_is_opened_goes_without_another_word() {
        let mut set = set();
        attach(&mut set, tempfile::tempfile().unwrap().into());
        set.detach(DEVICE);

        let events = wait_for_lane(&mut set);

        assert!(matches!(events[..], [DeviceEvent::Detached { device: DEVICE }]), "{events:?}");
        assert!(set.is_quiet());
    }

    #[test]
    fn effects_for_an_unknown_device_are_answered() {
        let mut set = set();
        let mut events = Vec::new();
        let request = UrbRequest {
            id: TransferId(1),
            device: DEVICE,
            endpoint: 0x81,
            kind: TransferKind::Interrupt,
            payload: Payload::Guest(Vec::new()),
            len: 0,
            follows: false,
        };
        let effects = [
            Effect::Submit(request),
            Effect::Operate { id: OpId(2), device: DEVICE, op: DeviceOp::Reset },
            Effect::Cancel { device: DEVICE, ids: vec![TransferId(1)] },
            Effect::Interrupt { vector: 5 },
        ];

        let vectors: Vec<_> = effects
            .map(|effect| set.perform(effect, Instant::now(), &Nothing, |event| events.push(event)))
            .into();

        assert_eq!(vectors, [None, None, None, Some(5)]);
        assert!(matches!(
            &events[..],
            [DeviceEvent::Completed { completion, .. }, DeviceEvent::Operated { result: Err(OpError::Gone), .. }]
                if completion.status == UrbStatus::Gone
        ));
    }
}
