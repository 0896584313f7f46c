//! Moves numbered data through usbfs and checks it: the host's side of [`crate::usbip::models::counted`], to be run in
//! a guest or in the host under test.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use common::usbfs::{PacketOutcome, Reaped, UrbBuffer, UrbKind, UrbQueue, UrbToken, UsbfsFile};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;

use crate::usbip::models::counted::{PacketCheck, SINK, SOURCE, check_stream, fill_stream, packet};

/// A transfer that takes longer than this will never end.
const STUCK_AFTER: Duration = Duration::from_secs(30);

/// How a stream is moved.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Bytes of a bulk transfer, or of an isochronous packet.
    pub size: usize,
    /// Packets of an isochronous transfer.
    pub packets: usize,
    /// Transfers in flight.
    pub ahead: usize,
    /// When to stop.
    pub time: Duration,
    /// Stop also after so many transfers.
    pub transfers: u64,
    /// Length of the pieces of time of [`Report::slots`].
    pub slot: Duration,
}

/// What was moved.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Transfers that ended well.
    pub transfers: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Bytes that were not what they should be (bulk).
    pub wrong: u64,
    /// Packets as they were received (isochronous).
    pub check: PacketCheck,
    /// Packets that ended with an error.
    pub failed_packets: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Bytes in each piece of time from the start.
    pub slots: Vec<u64>,
    /// The start.
    #[serde(skip)]
    pub begun: Option<Instant>,
    /// The longest time from one end of a transfer to the next.
    pub longest_gap_ms: u64,
    /// The whole time.
    pub seconds: f64,
}

/// The node of the device with this `vendor:product` in hexadecimal.
pub fn find_node(id: &str) -> Result<PathBuf> {
    let read = |path: PathBuf| std::fs::read_to_string(path).map(|text| text.trim().to_owned());
    for entry in std::fs::read_dir("/sys/bus/usb/devices").context("read /sys/bus/usb/devices")?.flatten() {
        let at = |file: &str| read(entry.path().join(file));
        let (Ok(vendor), Ok(product)) = (at("idVendor"), at("idProduct")) else { continue };
        if format!("{vendor}:{product}") == id {
            let number = |text: String| text.parse::<u32>().context("a number in sysfs");
            return Ok(PathBuf::from(format!(
                "/dev/bus/usb/{:03}/{:03}",
                number(at("busnum")?)?,
                number(at("devnum")?)?
            )));
        }
    }
    bail!("no device {id}")
}

/// Opens a node and takes its interface 0.
pub fn open(path: &Path) -> Result<UsbfsFile> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = UsbfsFile::new(file.with_context(|| format!("open {}", path.display()))?.into())?;
    file.disconnect_and_claim(0).context("claim interface 0")?;
    Ok(file)
}

/// Bulk data from the device; each byte is checked against the numbered stream, which starts anew at SET_INTERFACE.
pub fn bulk_in(file: UsbfsFile, shape: Shape) -> Result<Report> {
    file.set_interface(0, 0).context("SET_INTERFACE 0")?;
    let mut mover = Mover::new(file, shape);
    let mut at = 0;
    let kind = UrbKind::Bulk { stream: 0, follows: false };
    mover.run(
        |queue, buffer| submit(queue, SOURCE, kind, shape.size, buffer),
        |done, _, report| {
            report.wrong += check_stream(at, &done.buffer.as_slice()[..done.actual as usize]).0;
            at += u64::from(done.actual);
        },
    )
}

/// Numbered bulk data to the device, which checks it.
pub fn bulk_out(file: UsbfsFile, shape: Shape) -> Result<Report> {
    file.set_interface(0, 0).context("SET_INTERFACE 0")?;
    let mut mover = Mover::new(file, shape);
    let mut at = 0;
    let kind = UrbKind::Bulk { stream: 0, follows: false };
    mover.run(
        |queue, mut buffer| {
            fill_stream(at, buffer.as_mut_slice());
            at += shape.size as u64;
            submit(queue, SINK, kind, shape.size, buffer)
        },
        |_, _, _| {},
    )
}

/// Numbered packets from the device.
pub fn isochronous_in(file: UsbfsFile, shape: Shape) -> Result<Report> {
    file.set_interface(0, 1).context("SET_INTERFACE 1")?;
    let lengths = vec![shape.size as u32; shape.packets];
    let mut mover = Mover::new(file, shape);
    mover.run(
        |queue, buffer| {
            let kind = UrbKind::Isochronous { packets: &lengths };
            submit(queue, SOURCE, kind, shape.size * shape.packets, buffer)
        },
        |done, packets, report| {
            for (packet, data) in packets.iter().zip(done.buffer.as_slice().chunks(shape.size)) {
                match packet.status {
                    Ok(()) => report.check.take(&data[..packet.actual as usize]),
                    Err(_) => report.failed_packets += 1,
                }
            }
        },
    )
}

/// Numbered packets to the device, which checks them.
pub fn isochronous_out(file: UsbfsFile, shape: Shape) -> Result<Report> {
    file.set_interface(0, 1).context("SET_INTERFACE 1")?;
    let lengths = vec![shape.size as u32; shape.packets];
    let mut number = 0;
    let mut mover = Mover::new(file, shape);
    mover.run(
        |queue, mut buffer| {
            for place in buffer.as_mut_slice().chunks_mut(shape.size) {
                place.copy_from_slice(&packet(number, place.len()));
                number += 1;
            }
            let kind = UrbKind::Isochronous { packets: &lengths };
            submit(queue, SINK, kind, shape.size * shape.packets, buffer)
        },
        |_, packets, report| {
            report.sent_packets += packets.len() as u64;
            report.failed_packets += packets.iter().filter(|packet| packet.status.is_err()).count() as u64;
        },
    )
}

fn submit(
    queue: &mut UrbQueue,
    endpoint: u8,
    kind: UrbKind<'_>,
    length: usize,
    buffer: UrbBuffer,
) -> Result<UrbToken> {
    queue.submit(endpoint, kind, length, buffer).context("submit a transfer")
}

/// Keeps transfers of one endpoint in flight.
struct Mover {
    queue: UrbQueue,
    shape: Shape,
    in_flight: VecDeque<UrbToken>,
    report: Report,
}

impl Mover {
    fn new(file: UsbfsFile, shape: Shape) -> Self {
        Self { queue: UrbQueue::new(file), shape, in_flight: VecDeque::new(), report: Report::default() }
    }

    fn run(
        &mut self,
        mut start: impl FnMut(&mut UrbQueue, UrbBuffer) -> Result<UrbToken>,
        mut finish: impl FnMut(&Reaped, &[PacketOutcome], &mut Report),
    ) -> Result<Report> {
        let begin = Instant::now();
        self.report.begun = Some(begin);
        let mut last = begin;
        let mut submitted = 0;
        for _ in 0..self.shape.ahead.max(1) {
            let buffer = UrbBuffer::Heap(vec![0; self.shape.size * self.shape.packets.max(1)]);
            self.in_flight.push_back(start(&mut self.queue, buffer)?);
            submitted += 1;
        }
        let mut packets = Vec::new();
        while let Some(expected) = self.in_flight.pop_front() {
            let done = wait(&mut self.queue, &mut packets, STUCK_AFTER)?;
            ensure!(done.token == expected, "transfers ended out of order");
            done.status.with_context(|| format!("transfer {}", self.report.transfers))?;
            let now = Instant::now();
            let gap = now.duration_since(last).as_millis() as u64;
            self.report.longest_gap_ms = self.report.longest_gap_ms.max(gap);
            last = now;
            self.count(now.duration_since(begin), u64::from(done.actual));
            finish(&done, &packets, &mut self.report);
            if now.duration_since(begin) < self.shape.time && submitted < self.shape.transfers {
                self.in_flight.push_back(start(&mut self.queue, done.buffer)?);
                submitted += 1;
            }
        }
        self.report.seconds = begin.elapsed().as_secs_f64();
        Ok(self.report.clone())
    }

    fn count(&mut self, since_begin: Duration, bytes: u64) {
        let slot = (since_begin.as_nanos() / self.shape.slot.as_nanos().max(1)) as usize;
        // The time is limited, so the number of slots is.
        if self.report.slots.len() <= slot {
            self.report.slots.resize(slot + 1, 0);
        }
        self.report.slots[slot] += bytes;
        self.report.transfers += 1;
        self.report.bytes += bytes;
    }
}

/// Waits for the next transfer that ends.
pub fn wait(queue: &mut UrbQueue, packets: &mut Vec<PacketOutcome>, within: Duration) -> Result<Reaped> {
    let deadline = Instant::now() + within;
    loop {
        if let Some(done) = queue.reap(packets).context("reap a transfer")? {
            return Ok(done);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "a transfer did not end within {within:?}");
        let mut waiting = [PollFd::new(queue.file().as_fd(), PollFlags::POLLOUT)];
        let limit = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        poll(&mut waiting, limit).context("wait for a transfer")?;
    }
}
