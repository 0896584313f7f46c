//! usbpolicyd's side of the loop: what it asks for and what it is answered.

use std::io;

use common::wire::{FromInstance, PROTOCOL_VERSION, Stats};

use super::{Daemon, Source};
use crate::attached::Farewell;
use crate::policy_link::Request as PolicyRequest;

impl Daemon {
    pub(super) fn accept_policy(&mut self) -> io::Result<()> {
        if self.link.accept()
            && let Some(connection) = self.link.connection()
        {
            self.watch(connection, Source::Policy)?;
        }
        Ok(())
    }

    pub(super) fn on_policy(&mut self) {
        for request in self.link.receive() {
            match request {
                PolicyRequest::Hello => {
                    let (usb2_ports, usb3_ports) = self.ports;
                    let vmm_connected = self.client.is_some();
                    let version = PROTOCOL_VERSION;
                    self.link.send(&FromInstance::Hello { version, usb2_ports, usb3_ports, vmm_connected });
                }
                PolicyRequest::Attach(attach, file) => self.on_attach(attach, file),
                PolicyRequest::Detach(id) => match self.book.handle_of(id) {
                    Some(device) => self.leave(device, Farewell::Detached),
                    None => self.link.send(&FromInstance::Detached { id }),
                },
                PolicyRequest::List { after } => {
                    let list = self.book.list(after);
                    self.link.send(&list);
                }
                PolicyRequest::Ping { nonce } => {
                    let stats = self.stats();
                    self.link.pong(nonce, stats);
                }
            }
        }
    }

    pub(super) fn stats(&self) -> Stats {
        let counters = self.usb.counters();
        Stats {
            devices: u32::try_from(self.usb.len()).unwrap_or(u32::MAX),
            transfers: counters.transfers,
            bytes_in: counters.bytes_in,
            bytes_out: counters.bytes_out,
            errors: counters.errors,
            waits_for_memory: counters.waits_for_memory,
        }
    }
}
