//! usbvfiod's transport alone, on a real device of the host under test: [`Rig`] stands in for the controller and the
//! event loop. Runs inside of the host; see `bin/usb-transport.rs`.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use common::ids::BusAddress;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use usbvfiod::urb::{
    DeviceHandle, DeviceOp, DmaFault, Effect, GuestMem, OpError, OpId, Payload, Segment, TransferId,
    TransferKind, UrbCompletion, UrbRequest, UrbStatus,
};
use usbvfiod::usb::{DeviceEvent, DeviceInfo, DeviceSet, Handover, Lanes, Limits, Refused};

/// Nothing here takes longer, but what is meant to.
const PATIENCE: Duration = Duration::from_secs(20);

/// A guest's memory: addresses from 0 on.
pub struct Memory(RefCell<Vec<u8>>);

impl Memory {
    /// Zeroed.
    pub fn new(len: usize) -> Self {
        Self(RefCell::new(vec![0; len]))
    }

    /// A copy of some of it.
    pub fn get(&self, addr: usize, len: usize) -> Vec<u8> {
        self.0.borrow()[addr..addr + len].to_vec()
    }

    /// Changes some of it.
    pub fn put(&self, addr: usize, bytes: &[u8]) {
        self.0.borrow_mut()[addr..addr + bytes.len()].copy_from_slice(bytes);
    }

    fn range(&self, addr: u64, len: usize) -> Result<std::ops::Range<usize>, DmaFault> {
        let start = usize::try_from(addr).map_err(|_| DmaFault { addr, len })?;
        let end = start.checked_add(len).filter(|&end| end <= self.0.borrow().len());
        end.map(|end| start..end).ok_or(DmaFault { addr, len })
    }
}

impl GuestMem for Memory {
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), DmaFault> {
        let range = self.range(addr, buf.len())?;
        buf.copy_from_slice(&self.0.borrow()[range]);
        Ok(())
    }

    fn write(&self, addr: u64, buf: &[u8]) -> Result<(), DmaFault> {
        let range = self.range(addr, buf.len())?;
        self.0.borrow_mut()[range].copy_from_slice(buf);
        Ok(())
    }
}

/// A controller's place with the devices attached to it.
pub struct Rig {
    /// The guest's memory.
    pub memory: Memory,
    /// The transport.
    pub set: DeviceSet,
    device: DeviceHandle,
    epoll: Epoll,
    next_id: u64,
    completed: BTreeMap<TransferId, UrbCompletion>,
    /// Ids in order of completion.
    pub order: Vec<TransferId>,
    operated: BTreeMap<OpId, Result<(), OpError>>,
    attached: BTreeMap<DeviceHandle, DeviceInfo>,
    refused: Option<Refused>,
    /// Whether the transport said that the device is gone.
    pub gone: bool,
    /// How often the device asked to be heard while it was suspended.
    pub woke: u32,
    detached: bool,
}

/// In the epoll set; devices are there by their handles.
const LANE_READY: u64 = u64::MAX;

/// Opens the node of a device by its name in sysfs (`2-1`).
pub fn open_node(name: &str) -> Result<(OwnedFd, Handover)> {
    let place = Path::new("/sys/bus/usb/devices").join(name);
    let number = |attribute: &str| -> Result<u32> {
        let text = std::fs::read_to_string(place.join(attribute)).with_context(|| attribute.to_owned())?;
        Ok(text.trim().parse().unwrap_or(0))
    };
    let address = BusAddress { bus: number("busnum")?, device: number("devnum")? };
    let configuration = u8::try_from(number("bConfigurationValue")?)?;
    let node = format!("/dev/bus/usb/{:03}/{:03}", address.bus, address.device);
    let file = OpenOptions::new().read(true).write(true).open(&node).with_context(|| node.clone())?;
    Ok((file.into(), Handover { address, configuration }))
}

/// The usual limits, or with as many mapped bytes for the device as `USB_RIG_MAPPED` says.
fn limits() -> Result<Limits> {
    let mut limits = Limits::default();
    if let Ok(bytes) = std::env::var("USB_RIG_MAPPED") {
        limits.mapped_per_device = bytes.parse().context("USB_RIG_MAPPED")?;
    }
    Ok(limits)
}

impl Rig {
    /// Without any device, with this much guest memory.
    pub fn new(memory_len: usize) -> Result<Self> {
        let set = DeviceSet::new(Lanes::start(2)?, limits()?);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(set.lane_fd(), EpollEvent::new(EpollFlags::EPOLLIN, LANE_READY))?;
        Ok(Self {
            memory: Memory::new(memory_len),
            set,
            device: DeviceHandle(0),
            epoll,
            next_id: 1,
            completed: BTreeMap::new(),
            order: Vec::new(),
            operated: BTreeMap::new(),
            attached: BTreeMap::new(),
            refused: None,
            gone: false,
            woke: 0,
            detached: false,
        })
    }

    /// Attaches a device of the host with this much guest memory.
    pub fn attach(name: &str, memory_len: usize) -> Result<Self> {
        let mut rig = Self::new(memory_len)?;
        rig.attach_another(name)?;
        Ok(rig)
    }

    /// Attaches one more device. What follows goes to this one; see [`Self::select`].
    pub fn attach_another(&mut self, name: &str) -> Result<DeviceHandle> {
        let (fd, handover) = open_node(name)?;
        self.attach_file(fd, handover)
    }

    /// Attaches what a file is said to be.
    pub fn attach_file(&mut self, fd: OwnedFd, handover: Handover) -> Result<DeviceHandle> {
        let device = DeviceHandle(self.device.0 + 1);
        self.set.attach(device, fd, handover);
        self.turn_until(|rig| rig.attached.contains_key(&device) || rig.refused.is_some())?;
        if let Some(reason) = self.refused.take() {
            return Err(reason.into());
        }
        let fd = self.set.fd(device).context("an attached device has a file")?;
        self.epoll.add(fd, EpollEvent::new(DeviceSet::INTEREST, device.0.into()))?;
        self.device = device;
        Ok(device)
    }

    /// Chooses the device for what follows.
    pub fn select(&mut self, device: DeviceHandle) {
        self.device = device;
    }

    /// What the transport found out about the chosen device.
    pub fn info(&self) -> Result<&DeviceInfo> {
        self.attached.get(&self.device).context("attached")
    }

    /// Hands an effect to the transport.
    pub fn perform(&mut self, effect: Effect) {
        let mut events = Vec::new();
        self.set.perform(effect, Instant::now(), &self.memory, |event| events.push(event));
        self.note(events);
    }

    /// Starts a transfer with one piece of memory.
    pub fn submit(&mut self, endpoint: u8, kind: TransferKind, addr: usize, len: u32) -> TransferId {
        self.submit_with(endpoint, kind, &[(addr as u64, len)], false)
    }

    /// Starts a transfer with pieces of memory.
    pub fn submit_with(
        &mut self,
        endpoint: u8,
        kind: TransferKind,
        pieces: &[(u64, u32)],
        follows: bool,
    ) -> TransferId {
        let id = TransferId(self.next_id);
        self.next_id += 1;
        let payload = Payload::Guest(pieces.iter().map(|&(addr, len)| Segment { addr, len }).collect());
        let len = pieces.iter().map(|&(_, len)| len).sum();
        let device = self.device;
        self.perform(Effect::Submit(UrbRequest { id, device, endpoint, kind, payload, len, follows }));
        id
    }

    /// Cancels transfers.
    pub fn cancel(&mut self, ids: &[TransferId]) {
        self.perform(Effect::Cancel { device: self.device, ids: ids.to_vec() });
    }

    /// The client is gone: everything ends.
    pub fn quiesce(&mut self) {
        let mut events = Vec::new();
        self.set.quiesce_all(|event| events.push(event));
        self.note(events);
    }

    /// Waits for a transfer's outcome.
    pub fn wait(&mut self, id: TransferId) -> Result<UrbCompletion> {
        self.turn_until(|rig| rig.completed.contains_key(&id))
            .with_context(|| format!("transfer {}", id.0))?;
        self.completed.remove(&id).context("waited for it")
    }

    /// A transfer from start to end.
    pub fn transfer(
        &mut self,
        endpoint: u8,
        kind: TransferKind,
        addr: usize,
        len: u32,
    ) -> Result<(UrbStatus, u32)> {
        let id = self.submit(endpoint, kind, addr, len);
        let completion = self.wait(id)?;
        Ok((completion.status, completion.actual))
    }

    /// Starts an operation.
    pub fn start_operation(&mut self, op: DeviceOp) -> OpId {
        let id = OpId(self.next_id);
        self.next_id += 1;
        self.perform(Effect::Operate { id, device: self.device, op });
        id
    }

    /// Forgets outcomes that nobody waits for.
    pub fn forget(&mut self) {
        self.completed.clear();
        self.order.clear();
    }

    /// Waits for an operation's outcome.
    pub fn wait_operation(&mut self, id: OpId) -> Result<Result<(), OpError>> {
        self.turn_until(|rig| rig.operated.contains_key(&id))?;
        self.operated.remove(&id).context("waited for it")
    }

    /// An operation from start to end.
    pub fn operate(&mut self, op: DeviceOp) -> Result<Result<(), OpError>> {
        let id = self.start_operation(op);
        self.wait_operation(id)
    }

    /// Detaches the device and waits until its file is closed.
    pub fn detach(mut self) -> Result<()> {
        if let Some(fd) = self.set.fd(self.device) {
            self.epoll.delete(fd)?;
        }
        self.set.detach(self.device);
        self.turn_until(|rig| rig.detached)
    }

    /// Runs the event loop until something is so.
    pub fn turn_until(&mut self, done: impl Fn(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            if Instant::now() > deadline {
                bail!("nothing happened within {PATIENCE:?}");
            }
            self.turn(Duration::from_millis(200))?;
        }
        Ok(())
    }

    /// One turn of the event loop, as the daemon's. Returns how many descriptors were ready.
    pub fn turn(&mut self, at_most: Duration) -> Result<usize> {
        let now = Instant::now();
        let wait =
            self.set.next_deadline().map_or(at_most, |at| at.saturating_duration_since(now).min(at_most));
        let mut ready = [EpollEvent::empty(); 4];
        // Rounded up: a deadline that is not yet over would only turn the loop.
        let timeout = EpollTimeout::try_from(wait + Duration::from_micros(999))?;
        let count = self.epoll.wait(&mut ready, timeout)?;
        let now = Instant::now();
        let mut events = Vec::new();
        for event in &ready[..count] {
            let sink = |event| events.push(event);
            match event.data() {
                LANE_READY => self.set.on_lane_ready(now, &self.memory, sink),
                device => {
                    let device = DeviceHandle(u32::try_from(device)?);
                    self.set.on_device_ready(device, event.events(), now, &self.memory, sink);
                }
            }
        }
        self.set.on_deadline(now, &self.memory, |event| events.push(event));
        self.note(events);
        Ok(count)
    }

    fn note(&mut self, events: Vec<DeviceEvent>) {
        for event in events {
            match event {
                DeviceEvent::Completed { completion, .. } => {
                    self.order.push(completion.id);
                    let again = self.completed.insert(completion.id, completion);
                    assert!(again.is_none(), "a transfer has one outcome");
                }
                DeviceEvent::Operated { id, result, .. } => {
                    let again = self.operated.insert(id, result);
                    assert!(again.is_none(), "an operation has one outcome");
                }
                DeviceEvent::Woke { .. } => self.woke += 1,
                DeviceEvent::Gone { .. } => self.gone = true,
                DeviceEvent::Detached { .. } => self.detached = true,
                DeviceEvent::Attached { device, info } => drop(self.attached.insert(device, info)),
                DeviceEvent::Refused { reason, .. } => self.refused = Some(reason),
            }
        }
    }
}

/// A stick that speaks Bulk-Only Transport, as far as the tests need it.
pub struct Stick {
    /// The device.
    pub rig: Rig,
    tag: u32,
}

/// Where command blocks lie in the guest's memory.
pub const CBW_AT: usize = 0;
/// Where statuses lie.
pub const CSW_AT: usize = 64;
/// Where data lies.
pub const DATA_AT: usize = 4096;
/// QEMU's stick.
pub const BULK_IN: u8 = 0x81;
/// QEMU's stick.
pub const BULK_OUT: u8 = 0x02;

/// Bulk without streams.
pub const fn bulk() -> TransferKind {
    TransferKind::Bulk { stream: 0 }
}

impl Stick {
    /// Attaches a stick.
    pub fn attach(name: &str, data_len: usize) -> Result<Self> {
        let rig = Rig::attach(name, DATA_AT + data_len)?;
        Ok(Self { rig, tag: 1 })
    }

    /// Puts a command block wrapper into memory.
    pub fn prepare(&mut self, command: &[u8], data_len: u32, is_in: bool) {
        self.tag += 1;
        let mut cbw = Vec::from(*b"USBC");
        cbw.extend(self.tag.to_le_bytes());
        cbw.extend(data_len.to_le_bytes());
        cbw.extend([if is_in { 0x80 } else { 0 }, 0, u8::try_from(command.len()).unwrap_or(16)]);
        cbw.extend(command);
        cbw.resize(31, 0);
        self.rig.memory.put(CBW_AT, &cbw);
    }

    /// Whether the status in memory says that the last command passed.
    pub fn passed(&self) -> bool {
        let csw = self.rig.memory.get(CSW_AT, 13);
        csw[..4] == *b"USBS" && csw[4..8] == self.tag.to_le_bytes() && csw[12] == 0
    }

    /// A command with data from the device, which comes in pieces of `piece` bytes, each a transfer of its own, all
    /// queued at once. Returns the bytes that came.
    pub fn read_command(&mut self, command: &[u8], len: u32, piece: u32) -> Result<u32> {
        self.prepare(command, len, true);
        let cbw = self.rig.submit(BULK_OUT, bulk(), CBW_AT, 31);
        let mut pieces = VecDeque::new();
        let mut at = 0;
        while at < len {
            let this = piece.min(len - at);
            let place = DATA_AT as u64 + u64::from(at);
            // Two segments that do not follow each other in the transfer's own order would hide a mix-up.
            let half = this / 2;
            let segments = [(place, half), (place + u64::from(half), this - half)];
            pieces.push_back(self.rig.submit_with(BULK_IN, bulk(), &segments, at > 0));
            at += this;
        }
        let sent = self.rig.wait(cbw)?;
        ensure!(sent.status == UrbStatus::Completed && sent.actual == 31, "command: {sent:?}");
        let mut total = 0;
        for id in pieces {
            let data = self.rig.wait(id)?;
            ensure!(data.status == UrbStatus::Completed, "data: {data:?}");
            total += data.actual;
        }
        // QEMU's stick can lose a status that is asked for while data is under way; drivers wait, too.
        let csw = self.rig.submit_with(BULK_IN, bulk(), &[(CSW_AT as u64, 13)], len > 0);
        let status = self.rig.wait(csw)?;
        ensure!(status.status == UrbStatus::Completed && status.actual == 13, "status: {status:?}");
        ensure!(self.passed(), "the command failed");
        Ok(total)
    }

    /// Lets the stick get rid of what it wants to tell after a reset (unit attention).
    pub fn make_ready(&mut self) -> Result<()> {
        for _ in 0..3 {
            if self.read_command(&[0; 6], 0, 512).is_ok() {
                return Ok(());
            }
        }
        bail!("the stick does not become ready")
    }

    /// INQUIRY with this allocation length.
    pub fn inquiry(&mut self, len: u8) -> Result<u32> {
        self.read_command(&[0x12, 0, 0, 0, len, 0], len.into(), len.into())
    }

    /// READ(10) of whole blocks of 512 bytes.
    pub fn read(&mut self, block: u32, blocks: u16, piece: u32) -> Result<Vec<u8>> {
        let [b0, b1, b2, b3] = block.to_be_bytes();
        let [n0, n1] = blocks.to_be_bytes();
        let len = u32::from(blocks) * 512;
        let came = self.read_command(&[0x28, 0, b0, b1, b2, b3, 0, n0, n1, 0], len, piece)?;
        ensure!(came == len, "{came} of {len} bytes");
        Ok(self.rig.memory.get(DATA_AT, len as usize))
    }
}
