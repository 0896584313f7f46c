//! From the outcome of a transfer to its events: which TRB, which code, which residue (xHCI 1.2 §4.10, §4.11.5.2).
//!
//! Choices where the specification leaves room: after a short packet one Transfer TRB of the TD is reported, the first
//! that asks for it (ISP or IOC); Event Data TRBs behind it are reported too.

use super::slot::Resume;
use super::td::{Ended, Flight, Item, Outcome, Progress, Role};
use super::trb::{CompletionCode, Trb};
use crate::urb::UrbStatus;

/// An event of a transfer, not yet addressed to a slot and endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Report {
    pub(super) pointer: u64,
    /// Residue of the TRB; with `event_data` the bytes moved.
    pub(super) length: u32,
    pub(super) code: CompletionCode,
    pub(super) event_data: bool,
    pub(super) interrupter: u16,
    pub(super) blocks_interrupt: bool,
}

impl Report {
    fn new(item: &Item, length: u32, code: CompletionCode) -> Self {
        Self {
            pointer: item.at.at,
            length,
            code,
            event_data: false,
            interrupter: item.interrupter,
            blocks_interrupt: item.blocks_interrupt,
        }
    }

    /// The Transfer Event.
    pub(super) fn event(&self, slot: u8, dci: u8) -> Trb {
        Trb::transfer_event(self.pointer, self.length, self.code, slot, dci, self.event_data)
    }
}

/// The completion code of a status that ends a transfer with an error (Table 6-90).
pub(super) fn error_code(status: Ended) -> CompletionCode {
    let Ended::Device(status) = status else { return CompletionCode::Trb };
    match status {
        UrbStatus::Completed => CompletionCode::Success,
        UrbStatus::Stalled => CompletionCode::Stall,
        UrbStatus::Babble => CompletionCode::Babble,
        UrbStatus::NoBandwidth => CompletionCode::Bandwidth,
        UrbStatus::DataBuffer => CompletionCode::DataBuffer,
        UrbStatus::GuestMemory => CompletionCode::Trb,
        UrbStatus::TransactionError | UrbStatus::Cancelled | UrbStatus::NotRun | UrbStatus::Gone => {
            CompletionCode::Transaction
        }
    }
}

/// The same for one interval of an isochronous endpoint, which never halts.
fn isoch_error_code(status: UrbStatus) -> CompletionCode {
    match status {
        UrbStatus::NotRun | UrbStatus::Cancelled => CompletionCode::MissedService,
        UrbStatus::NoBandwidth => CompletionCode::BandwidthOverrun,
        UrbStatus::GuestMemory => CompletionCode::DataBuffer,
        other => error_code(Ended::Device(other)),
    }
}

impl Flight {
    /// The next event of a transfer that has ended, none when there is no more. Call again after the event was written;
    /// to take a call back, restore [`Flight::progress`].
    pub(super) fn next_report(&mut self) -> Option<Report> {
        let outcome = self.outcome?;
        if self.packets.is_empty() { self.next_of_transfer(outcome) } else { self.next_of_packets() }
    }

    /// Bytes of the TD moved, all in all. A device that took an OUT transfer took all of it.
    pub(super) fn moved(&self, outcome: Outcome) -> u32 {
        if outcome.status == Ended::Device(UrbStatus::Completed) && !self.is_in {
            return self.len;
        }
        self.moved_before.saturating_add(outcome.actual).min(self.len)
    }

    fn next_of_transfer(&mut self, outcome: Outcome) -> Option<Report> {
        let completed = outcome.status == Ended::Device(UrbStatus::Completed);
        let moved = self.moved(outcome);
        let fault = if completed { None } else { Some(self.fault(outcome.status, moved)) };
        if !self.progress.started {
            self.progress = Progress { left: moved, started: true, ..Progress::default() };
            if outcome.status == Ended::Malformed {
                self.progress.item = self.items.len().saturating_sub(1);
            }
        }
        while let Some(item) = self.items.get(self.progress.item) {
            let is_fault = fault == Some(self.progress.item);
            self.progress.item += 1;
            if is_fault {
                self.progress.item = self.items.len();
                let residue = item.len - self.progress.left.min(item.len);
                return Some(Report::new(item, residue, error_code(outcome.status)));
            }
            if let Some(report) = self.progress.pass(item) {
                return Some(report);
            }
        }
        None
    }

    /// Which TRB an error or a stop is told of: the one whose data is not complete, else the status stage, else the last.
    fn fault(&self, status: Ended, moved: u32) -> usize {
        let last = self.items.len().saturating_sub(1);
        if status == Ended::Malformed {
            return last;
        }
        let mut sum = 0u32;
        for (index, item) in self.items.iter().enumerate() {
            if item.role == Role::Data {
                sum = sum.saturating_add(item.len);
                if sum > moved {
                    return index;
                }
            }
        }
        let at = |role| self.items.iter().rposition(|item| item.role == role);
        at(Role::Status).or_else(|| at(Role::Data)).unwrap_or(last)
    }

    /// How to go on with a TD of which this much was moved.
    pub(super) fn resume_after(&self, moved: u32, ended: bool) -> Resume {
        let index = self.fault(Ended::Device(UrbStatus::Cancelled), moved);
        let at = self.items.get(index).map_or(self.end, |item| item.at);
        Resume { start: self.start(), at, moved, ended }
    }

    fn next_of_packets(&mut self) -> Option<Report> {
        while let Some(item) = self.items.get(self.progress.item).copied() {
            let packet = self.packets.get(self.progress.packet).copied()?;
            if !self.progress.started {
                let all = packet.status == UrbStatus::Completed && !self.is_in;
                let left = if all { u32::MAX } else { packet.actual };
                self.progress = Progress {
                    left,
                    started: true,
                    item: self.progress.item,
                    packet: self.progress.packet,
                    ..Progress::default()
                };
            }
            self.progress.item += 1;
            let report = match packet.status {
                UrbStatus::Completed => self.progress.pass(&item),
                status => self.progress.pass_failed(&item, isoch_error_code(status)),
            };
            if item.ends_td {
                self.progress.packet += 1;
                self.progress.started = false;
            }
            if report.is_some() {
                return report;
            }
        }
        None
    }

    /// The event of a transfer that Stop Endpoint found in progress (§4.6.9).
    pub(super) fn stopped_report(&self, moved: u32, short: bool) -> Option<Report> {
        let index = self.fault(Ended::Device(UrbStatus::Cancelled), moved);
        let item = self.items.get(index)?;
        if short {
            return Some(Report::new(item, moved, CompletionCode::StoppedShortPacket));
        }
        let before: u32 = self.items[..index].iter().filter(|i| i.role == Role::Data).map(|i| i.len).sum();
        let residue = item.len.saturating_sub(moved.saturating_sub(before));
        if residue == 0
            && self.len > 0
            && let Some(next) = self.items.get(index + 1).filter(|next| next.role == Role::EventData)
        {
            return Some(Report::new(next, 0, CompletionCode::StoppedLengthInvalid));
        }
        Some(Report::new(item, residue, CompletionCode::Stopped))
    }
}

impl Progress {
    /// Goes past a TRB that was carried out.
    fn pass(&mut self, item: &Item) -> Option<Report> {
        match item.role {
            Role::Data => {
                let chunk = item.len.min(self.left);
                self.left -= chunk;
                self.accumulated = self.accumulated.saturating_add(chunk);
                self.short |= chunk < item.len;
                let wanted = item.interrupt || (self.short && item.short_interrupt);
                if !wanted || (self.short && self.reported) {
                    return None;
                }
                self.reported = self.short;
                Some(Report::new(item, item.len - chunk, self.data_code()))
            }
            Role::EventData => {
                let length = std::mem::take(&mut self.accumulated);
                item.interrupt.then(|| Report {
                    pointer: item.parameter,
                    event_data: true,
                    ..Report::new(item, length, self.data_code())
                })
            }
            Role::Setup | Role::Status | Role::Idle => {
                if item.role == Role::Status {
                    self.short = false;
                    self.accumulated = 0;
                }
                item.interrupt.then(|| Report::new(item, 0, CompletionCode::Success))
            }
        }
    }

    /// Goes past a TRB of an isochronous TD that failed: the TRB at fault is reported whether it asks or not, those
    /// after it when they ask (§4.9.1).
    fn pass_failed(&mut self, item: &Item, code: CompletionCode) -> Option<Report> {
        if item.role == Role::EventData {
            let length = std::mem::take(&mut self.accumulated);
            return item.interrupt.then(|| Report {
                pointer: item.parameter,
                event_data: true,
                ..Report::new(item, length, code)
            });
        }
        let chunk = item.len.min(self.left);
        self.left -= chunk;
        self.accumulated = self.accumulated.saturating_add(chunk);
        let at_fault = !self.reported && (chunk < item.len || item.ends_td);
        if at_fault {
            self.reported = true;
        } else if !item.interrupt {
            return None;
        }
        let code = if self.reported { code } else { CompletionCode::Success };
        Some(Report::new(item, item.len - chunk, code))
    }

    fn data_code(&self) -> CompletionCode {
        if self.short { CompletionCode::ShortPacket } else { CompletionCode::Success }
    }
}
