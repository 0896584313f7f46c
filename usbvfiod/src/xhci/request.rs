//! From a TD to what the device is asked to do. The standard requests that the host kernel must know of do not reach the
//! device as they are (USB 2.0 §9.4).

use super::GuestMem;
use super::context::{Dci, EndpointKind};
use super::controller::{Controller, Io, Purpose};
use super::slot::{Drain, Endpoint, Resume};
use super::td::{self, Ended, Flight, Outcome};
use crate::urb::{DeviceOp, Effect, Payload, TransferKind, UrbRequest, UrbStatus};

/// What [`Controller::request`] needs to know of a TD.
pub(super) struct Start {
    pub(super) slot: u8,
    pub(super) stream: u16,
    pub(super) setup: [u8; 8],
    pub(super) payload: Payload,
    pub(super) resume: Option<Resume>,
}

/// How a control transfer is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standard {
    /// As it is.
    Forward,
    /// SET_ADDRESS: done by Address Device, never by the guest.
    Ignore,
    /// Out of range: the device would stall.
    Stall,
    SetConfiguration(u8),
    SetInterface {
        interface: u8,
        alternate: u8,
    },
    ClearHalt(Dci),
}

impl Standard {
    /// Sorts a setup packet (USB 2.0 Table 9-3). Only requests without data are standard ones of ours.
    fn parse(setup: &[u8; 8]) -> Self {
        let value = u16::from_le_bytes([setup[2], setup[3]]);
        let index = u16::from_le_bytes([setup[4], setup[5]]);
        let request = (setup[0], setup[1]);
        if !matches!(request, (0, 5) | (0, 9) | (1, 11) | (2, 1)) {
            return Self::Forward;
        }
        if td::length(setup) != 0 {
            return Self::Stall;
        }
        match request {
            (0, 5) => Self::Ignore,
            (0, 9) => u8::try_from(value).map_or(Self::Stall, Self::SetConfiguration),
            (1, 11) => match (u8::try_from(index), u8::try_from(value)) {
                (Ok(interface), Ok(alternate)) => Self::SetInterface { interface, alternate },
                _ => Self::Stall,
            },
            _ => {
                let endpoint = u8::try_from(index).ok().and_then(Dci::from_address);
                endpoint.filter(|_| value == 0).map_or(Self::Forward, Self::ClearHalt)
            }
        }
    }
}

impl Controller {
    /// Starts a TD, or answers it at once.
    pub(super) fn request<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        endpoint: &mut Endpoint,
        flight: &mut Flight,
        start: Start,
    ) {
        let Start { slot, stream, setup, mut payload, resume } = start;
        if endpoint.kind == EndpointKind::Control {
            flight.is_in = setup[0] & 0x80 != 0;
        }
        if let Some(resume) = resume {
            flight.moved_before = resume.moved.min(flight.len);
            if resume.ended || flight.moved_before == flight.len {
                flight.outcome = Some(Outcome::COMPLETED);
                self.spare.keep_payload(payload);
                return;
            }
            td::skip(&mut payload, flight.moved_before);
        }
        let Some(device) = self.slot_device(slot) else {
            return fail(flight, UrbStatus::Gone);
        };
        let only_reads = endpoint.kind == EndpointKind::Control && setup[0] & 0xe0 == 0x80;
        device.touched |= !only_reads;
        let handle = device.handle;
        let kind = match endpoint.kind {
            EndpointKind::Control => {
                let standard = Standard::parse(&setup);
                if standard != Standard::Forward {
                    return self.carry_out(io, slot, flight, standard);
                }
                TransferKind::Control { setup }
            }
            EndpointKind::Interrupt => TransferKind::Interrupt,
            EndpointKind::Bulk | EndpointKind::Isochronous => TransferKind::Bulk { stream },
        };
        let follows =
            endpoint.kind == EndpointKind::Bulk && endpoint.flights().any(|flight| flight.submitted);
        flight.submitted = true;
        tracing::trace!(
            slot,
            dci = endpoint.dci.get(),
            stream,
            id = flight.id.0,
            len = flight.len,
            "transfer"
        );
        io.effects.push(Effect::Submit(UrbRequest {
            id: flight.id,
            device: handle,
            endpoint: endpoint.dci.address(),
            kind,
            payload,
            len: flight.len - flight.moved_before,
            follows,
        }));
    }

    /// Carries out a request that the host kernel does for us. The control transfer ends with the operation.
    fn carry_out<M: GuestMem>(
        &mut self,
        io: &mut Io<'_, M>,
        slot: u8,
        flight: &mut Flight,
        standard: Standard,
    ) {
        let op = match standard {
            Standard::Forward | Standard::Ignore => {
                flight.outcome = Some(Outcome::COMPLETED);
                return;
            }
            Standard::Stall => return fail(flight, UrbStatus::Stalled),
            Standard::SetConfiguration(value) => {
                if self.is_configured_already(slot, value) {
                    flight.outcome = Some(Outcome::COMPLETED);
                    return;
                }
                DeviceOp::SetConfiguration { value }
            }
            Standard::SetInterface { interface, alternate } => {
                DeviceOp::SetInterface { interface, alternate }
            }
            Standard::ClearHalt(dci) => {
                self.pause(io, slot, dci);
                DeviceOp::ClearHalt { endpoint: dci.address() }
            }
        };
        let Some(device) = self.slot_device(slot).map(|device| device.handle) else {
            return fail(flight, UrbStatus::Gone);
        };
        if self.operate(device, op, Purpose::Control(flight.id), io.effects).is_none() {
            fail(flight, UrbStatus::TransactionError);
        }
    }

    /// Whether the first SET_CONFIGURATION after attach names what is active. Asked once: later ones are carried out.
    fn is_configured_already(&mut self, slot: u8, value: u8) -> bool {
        let active = self.slot_device(slot).and_then(|device| device.options.configuration.take());
        active == Some(value)
    }

    /// Takes the transfers of an endpoint back for the time of an operation on it.
    fn pause<M: GuestMem>(&mut self, io: &mut Io<'_, M>, slot: u8, dci: Dci) {
        self.with_endpoint(slot, dci, |controller, endpoint| {
            if endpoint.drain.is_none() && endpoint.is_waiting() {
                controller.start_drain(endpoint, slot, Drain::Pause, io.effects);
            }
        });
    }
}

fn fail(flight: &mut Flight, status: UrbStatus) {
    flight.outcome = Some(Outcome { status: Ended::Device(status), actual: 0 });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(request_type: u8, request: u8, value: u16, index: u16, length: u16) -> Standard {
        let [v0, v1] = value.to_le_bytes();
        let [i0, i1] = index.to_le_bytes();
        let [l0, l1] = length.to_le_bytes();
        Standard::parse(&[request_type, request, v0, v1, i0, i1, l0, l1])
    }

    #[test]
    fn requests_the_kernel_must_know_of_are_found() {
        assert_eq!(parse(0, 5, 7, 0, 0), Standard::Ignore);
        assert_eq!(parse(0, 9, 1, 0, 0), Standard::SetConfiguration(1));
        assert_eq!(parse(1, 11, 2, 3, 0), Standard::SetInterface { interface: 3, alternate: 2 });
        let bulk_in = Dci::new(3).unwrap();
        assert_eq!(parse(2, 1, 0, 0x81, 0), Standard::ClearHalt(bulk_in));
    }

    #[test]
    fn values_out_of_range_stall() {
        assert_eq!(parse(0, 9, 256, 0, 0), Standard::Stall);
        assert_eq!(parse(1, 11, 256, 0, 0), Standard::Stall);
        assert_eq!(parse(1, 11, 0, 256, 0), Standard::Stall);
        assert_eq!(parse(0, 9, 1, 0, 4), Standard::Stall);
    }

    #[test]
    fn other_requests_and_recipients_go_to_the_device() {
        for (request_type, request) in [(0x80, 6), (0x21, 9), (0x41, 11), (0x03, 9), (0x60, 5), (0x1f, 1)] {
            assert_eq!(parse(request_type, request, 1, 1, 0), Standard::Forward);
        }
        assert_eq!(parse(2, 1, 0, 0, 0), Standard::Forward, "the default pipe");
        assert_eq!(parse(2, 1, 1, 0x81, 0), Standard::Forward, "no such feature");
        assert_eq!(parse(2, 1, 0, 0x181, 0), Standard::Forward);
    }
}
