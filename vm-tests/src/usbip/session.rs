//! One device on one connection: transfers of an endpoint in order, each at its time. No socket and no clock: commands
//! and the time come in, bytes for the kernel come out.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::descriptors::Speed;
use super::device::Device;
use super::model::Reply;
use super::wire::{Command, Completion, IsoPacket, Submit, encode_completion, encode_unlinked};

const EPIPE: i32 = 32;
const EPROTO: i32 = 71;
const EOVERFLOW: i32 = 75;
const ECONNRESET: i32 = 104;
const EREMOTEIO: i32 = 121;

/// A host that comes later than this with its next isochronous transfer has lost the rhythm; up to it the device
/// catches up, so that the rate is right in the long run.
const CATCH_UP_MAX: Duration = Duration::from_millis(250);

/// A device as the kernel sees it through one socket.
pub struct Session {
    device: Device,
    /// By endpoint address; 0 for control in both directions.
    lanes: BTreeMap<u8, Lane>,
    /// The last transfer that has arrived.
    last_seqnum: u32,
    /// Unlink commands (their number and that of their victim) that have overtaken their victims.
    early_unlinks: Vec<(u32, u32)>,
    output: Vec<u8>,
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    transfers: u64,
    bytes_in: u64,
    bytes_out: u64,
    unlinked: u64,
    unlinked_late: u64,
    underruns: u64,
}

/// The transfers of one endpoint.
#[derive(Default)]
struct Lane {
    queue: VecDeque<Submit>,
    /// When the first of them is due and what happens then.
    due: Option<(Instant, Reply)>,
    /// Isochronous: the end of the last service interval that is spoken for.
    clock: Option<Instant>,
}

impl Session {
    /// A device without transfers.
    pub fn new(device: Device) -> Self {
        Self {
            device,
            lanes: BTreeMap::new(),
            last_seqnum: 0,
            early_unlinks: Vec::new(),
            output: Vec::new(),
            counters: Counters::default(),
        }
    }

    /// The device has been pulled: its transfers, configuration and halts are gone, what its model knows is not.
    pub fn lose_power(&mut self) {
        self.lanes.clear();
        self.last_seqnum = 0;
        self.early_unlinks.clear();
        self.output.clear();
        self.device.lose_power();
    }

    /// The device.
    pub fn device(&mut self) -> &mut Device {
        &mut self.device
    }

    /// Takes a command of the kernel.
    pub fn take(&mut self, now: Instant, command: Command) {
        match command {
            Command::Submit(submit) => {
                self.last_seqnum = submit.seqnum;
                if let Some(place) =
                    self.early_unlinks.iter().position(|(_, victim)| *victim == submit.seqnum)
                {
                    let (seqnum, _) = self.early_unlinks.swap_remove(place);
                    self.counters.unlinked += 1;
                    self.output.extend(encode_unlinked(seqnum, -ECONNRESET));
                    return;
                }
                let lane = self.lanes.entry(submit.address()).or_default();
                if !submit.packets.is_empty()
                    && lane.queue.is_empty()
                    && lane.clock.is_some_and(|end| end < now)
                {
                    self.counters.underruns += 1;
                }
                lane.queue.push_back(submit);
            }
            Command::Unlink { seqnum, victim } => self.unlink(seqnum, victim),
        }
        self.run(now);
    }

    /// Does what is due; also to be called after something outside of transfers has changed the model.
    pub fn run(&mut self, now: Instant) {
        // A transfer that ends may give another endpoint what it waits for: again until nothing moves. Each round ends
        // at least one transfer.
        while self.run_lanes(now) {}
    }

    /// When [`Self::run`] has to be called next.
    pub fn next_due(&self) -> Option<Instant> {
        self.lanes.values().filter_map(|lane| lane.due.as_ref().map(|(at, _)| *at)).min()
    }

    /// The bytes for the kernel since the last call.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Counters of the connection and the device.
    pub fn statistics(&self) -> Value {
        let Counters { transfers, bytes_in, bytes_out, unlinked, unlinked_late, underruns } = self.counters;
        let pending: usize = self.lanes.values().map(|lane| lane.queue.len()).sum();
        json!({
            "transfers": transfers, "bytes_in": bytes_in, "bytes_out": bytes_out, "pending": pending,
            "unlinked": unlinked, "unlinked_late": unlinked_late, "underruns": underruns,
            "device": self.device.statistics(),
        })
    }

    fn unlink(&mut self, seqnum: u32, victim: u32) {
        for lane in self.lanes.values_mut() {
            if let Some(place) = lane.queue.iter().position(|submit| submit.seqnum == victim) {
                lane.queue.remove(place);
                if place == 0 {
                    lane.due = None;
                }
                self.counters.unlinked += 1;
                self.output.extend(encode_unlinked(seqnum, -ECONNRESET));
                return;
            }
        }
        // The kernel numbers transfers in the order in which it sends them, but an unlink command may overtake its
        // victim (vhci_tx_loop). Answering "it had ended" now would make vhci_hcd end the transfer twice, and hang up.
        if victim.wrapping_sub(self.last_seqnum).cast_signed() > 0 {
            self.early_unlinks.push((seqnum, victim));
            return;
        }
        self.counters.unlinked_late += 1;
        self.output.extend(encode_unlinked(seqnum, 0));
    }

    fn run_lanes(&mut self, now: Instant) -> bool {
        let mut has_moved = false;
        for lane in self.lanes.values_mut() {
            while let Some(submit) = lane.queue.front() {
                let reply = match lane.due.take() {
                    Some((at, reply)) if at > now => {
                        lane.due = Some((at, reply));
                        break;
                    }
                    Some((_, reply)) => self.device.finish(submit, reply),
                    None if submit.packets.is_empty() => self.device.start(submit),
                    None => {
                        let end = service_end(submit, self.device.model().speed(), lane.clock, now);
                        lane.clock = Some(end);
                        lane.due = Some((end, Reply::Done(Vec::new())));
                        continue;
                    }
                };
                let reply = match reply {
                    Reply::Nak => break,
                    Reply::Later(time, then) => {
                        lane.due = Some((now + time, *then));
                        continue;
                    }
                    other => other,
                };
                let completion = if submit.packets.is_empty() {
                    complete(submit, reply)
                } else {
                    move_packets(submit, &mut self.device)
                };
                self.counters.transfers += 1;
                let moved =
                    if submit.is_in { &mut self.counters.bytes_in } else { &mut self.counters.bytes_out };
                *moved += u64::from(completion.actual);
                self.output.extend(encode_completion(submit, &completion));
                lane.queue.pop_front();
                has_moved = true;
            }
        }
        has_moved
    }
}

/// The end of the service intervals that an isochronous transfer takes.
fn service_end(submit: &Submit, speed: Speed, clock: Option<Instant>, now: Instant) -> Instant {
    let unit = match speed {
        Speed::Low | Speed::Full => Duration::from_millis(1),
        Speed::High | Speed::Super => Duration::from_micros(125),
    };
    // The longest interval of a descriptor is 2^15 units.
    let interval = unit * submit.interval.clamp(1, 1 << 15);
    let is_in_rhythm = |end: &Instant| now.saturating_duration_since(*end) < CATCH_UP_MAX;
    clock.filter(is_in_rhythm).unwrap_or(now) + interval * submit.packets.len() as u32
}

fn complete(submit: &Submit, reply: Reply) -> Completion {
    let failed = |status: i32| Completion { status: -status, ..Completion::default() };
    match reply {
        Reply::Done(data) if submit.is_in => {
            let room = submit.length as usize;
            let status = match data.len() {
                length if length > room => -EOVERFLOW,
                length if length < room && submit.is_short_an_error => -EREMOTEIO,
                _ => 0,
            };
            let data = data[..data.len().min(room)].to_vec();
            Completion { status, actual: data.len() as u32, data, packets: Vec::new() }
        }
        Reply::Done(_) => Completion { actual: submit.length, ..Completion::default() },
        Reply::Babble if submit.is_in => {
            let data = vec![0xbb; submit.length as usize];
            Completion { status: -EOVERFLOW, actual: submit.length, data, packets: Vec::new() }
        }
        Reply::Stall => failed(EPIPE),
        // The other three never come here: the caller has dealt with them.
        Reply::Broken | Reply::Babble | Reply::Nak | Reply::Standard | Reply::Later(..) => failed(EPROTO),
    }
}

fn move_packets(submit: &Submit, device: &mut Device) -> Completion {
    let address = submit.address();
    let is_there = device.has_endpoint(address);
    let mut completion = Completion::default();
    for packet in &submit.packets {
        let mut done = IsoPacket { actual: 0, status: 0, ..*packet };
        let start = packet.offset as usize;
        let range = start..start.saturating_add(packet.length as usize);
        if !is_there {
            done.status = -EPROTO;
        } else if submit.is_in {
            let mut data = device.model().read_packet(address, packet.length as usize);
            if data.len() > packet.length as usize {
                data.truncate(packet.length as usize);
                done.status = -EOVERFLOW;
            }
            done.actual = data.len() as u32;
            completion.data.extend(data);
        } else if let Some(data) = submit.data.get(range) {
            device.model().write_packet(address, data);
            done.actual = packet.length;
        } else {
            done.status = -EPROTO;
        }
        completion.actual += done.actual;
        completion.packets.push(done);
    }
    completion
}

#[cfg(test)]
mod tests;
