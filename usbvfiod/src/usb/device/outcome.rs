//! What came of a URB, told to the controller; and the URBs of our own that listen while the guest sleeps.

use common::limited;
use common::usbfs::{PacketOutcome, Reaped};
use nix::errno::Errno;

use super::super::device_set::DeviceEvent;
use super::super::payload::{copy_packets_to_guest, copy_to_guest};
use super::super::{status, uas};
use super::{Device, Owed, Sink, Transfer, submit};
use crate::urb::{GuestMem, PacketResult, TransferKind, UrbCompletion, UrbRequest, UrbStatus};

impl Device {
    pub(super) fn complete<M: GuestMem + ?Sized>(
        &mut self,
        reaped: Reaped,
        packets: &[PacketOutcome],
        mem: &M,
        sink: &mut Sink<'_>,
    ) {
        let Reaped { token, status: ended, actual, mut buffer } = reaped;
        let Some(transfer) = self.transfers.get_mut(token.slot()).and_then(Option::take) else {
            return self.pool.put(buffer);
        };
        self.in_flight -= 1;
        let Transfer { request, owed, abandoned, .. } = transfer;
        if owed == Owed::Wake {
            // Also a listener that is taken away brings what has come (`devio.c processcompl`).
            let came = if matches!(ended, Ok(()) | Err(Errno::ENOENT)) { actual as usize } else { 0 };
            if self.wake.heard(request.endpoint, &buffer.as_mut_slice()[..came]) {
                sink(DeviceEvent::Woke { device: self.handle });
            }
        }
        if matches!(owed, Owed::Nothing | Owed::Wake) {
            return self.pool.put(buffer);
        }
        // EXDEV of an isochronous transfer repeats what the packets say.
        let ended = if packets.is_empty() || ended != Err(Errno::EXDEV) { ended } else { Ok(()) };
        let mut outcome = status::of_urb(ended, owed != Owed::Outcome, self.gone);
        let mut actual = actual;
        if outcome == UrbStatus::NotRun && actual > 0 {
            // The host restarts its ring about when it hands the failed transfer back: bytes may have moved.
            limited!(
                debug,
                device = self.handle.0,
                endpoint = request.endpoint,
                actual,
                "data behind a failed transfer is lost"
            );
            actual = 0;
        }
        let setup = match request.kind {
            TransferKind::Control { setup } => Some(setup),
            _ => None,
        };
        if abandoned {
            self.pool.put(buffer);
            return self.report(request, outcome, 0, Vec::new(), sink);
        }
        if request.is_in() && actual > request.len {
            // The guest's data stage is shorter than its setup packet says.
            (outcome, actual) = (UrbStatus::Babble, request.len);
        }
        if request.is_in() {
            let data = &mut buffer.as_mut_slice()[if setup.is_some() { 8 } else { 0 }..];
            if setup.is_some_and(uas::asks_for_configuration)
                && let Some(link) = &self.link
            {
                uas::hide(&link.uas_hidden, &mut data[..actual as usize]);
            }
            let copied = if packets.is_empty() {
                copy_to_guest(mem, &request.payload, 0, &data[..actual as usize])
            } else {
                copy_packets_to_guest(mem, &request, packets, data)
            };
            if copied.is_err() && matches!(outcome, UrbStatus::Completed | UrbStatus::Cancelled) {
                outcome = UrbStatus::GuestMemory;
            }
            self.counters.bytes_in += u64::from(actual);
        } else {
            self.counters.bytes_out += u64::from(actual);
        }
        if let Some(setup) = setup.filter(|_| outcome == UrbStatus::Completed) {
            self.wake.control_done(setup);
        }
        self.pool.put(buffer);
        let packets = packets
            .iter()
            .map(|packet| PacketResult { status: status::of_packet(packet.status), actual: packet.actual })
            .collect();
        self.report(request, outcome, actual, packets, sink);
    }

    /// Tells the controller.
    pub(super) fn report(
        &mut self,
        request: UrbRequest,
        status: UrbStatus,
        actual: u32,
        packets: Vec<PacketResult>,
        sink: &mut Sink<'_>,
    ) {
        self.counters.transfers += 1;
        if !matches!(status, UrbStatus::Completed | UrbStatus::Cancelled | UrbStatus::NotRun) {
            self.counters.errors += 1;
        }
        let UrbRequest { id, payload, .. } = request;
        let completion = UrbCompletion { id, status, actual, packets, payload };
        sink(DeviceEvent::Completed { device: self.handle, completion });
    }

    /// The guest sleeps, and what it has asked for before is done: starts what can wake it.
    pub(super) fn listen(&mut self) {
        let Some(link) = self.link.as_mut().filter(|_| !self.gone && self.jobs.is_empty()) else { return };
        let mut started = Vec::new();
        for request in self.wake.take_listeners() {
            let len = request.len as usize;
            let buffer = self.pool.take(link.urbs.file(), len);
            match submit(link, &request, len, buffer) {
                Ok(token) => started.push((token, request)),
                Err((errno, buffer)) => {
                    self.pool.put(buffer);
                    limited!(debug, device = self.handle.0, %errno, "cannot listen for a wake-up");
                    if errno == Errno::ENOMEM {
                        self.wake.taken_back(&request);
                    }
                }
            }
        }
        for (token, request) in started {
            self.track(token, request, Owed::Wake);
        }
    }

    /// What the device says from now on is not for a sleeping guest.
    pub(super) fn stop_listening(&mut self) {
        for transfer in self.transfers.iter_mut().flatten().filter(|transfer| transfer.owed == Owed::Wake) {
            transfer.owed = Owed::Nothing;
        }
    }
}
