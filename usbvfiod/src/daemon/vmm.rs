//! The VMM's side of the loop: its connections, and what its vfio-user messages do to the PCI function.

use std::io;
use std::os::fd::AsFd;

use common::limited;
use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::{Client, Daemon, Source};
use crate::pci;
use crate::vfio_user::message::{DmaUnmap, Region};
use crate::vfio_user::session::{Request, Session};
use crate::vfio_user::transport::{Connection, Received};

/// Most times the socket of the VMM is read before other inputs get their turn.
const READS_PER_TURN: usize = 8;

impl Daemon {
    pub(super) fn on_vmm_listener(&mut self) -> io::Result<()> {
        // The end of the old connection may be waiting behind the new one.
        self.on_vmm()?;
        if self.client.as_ref().is_some_and(|client| client.connection.has_hung_up()) {
            self.drop_client("it closed the connection");
        }
        let Some(listener) = &self.vmm_listener else { return Ok(()) };
        match listener.accept() {
            Ok(Some(connection)) if self.client.is_none() => self.serve(connection),
            Ok(Some(_)) => {
                limited!(warn, "a second VMM connected and was turned away: one usbvfiod serves one VM");
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(error) => {
                limited!(warn, %error, "cannot accept the VMM's connection");
                Ok(())
            }
        }
    }

    pub(super) fn serve(&mut self, connection: Connection) -> io::Result<()> {
        self.clients_so_far = self.clients_so_far.wrapping_add(1);
        self.watch(connection.as_fd(), Source::Vmm)?;
        let session = Session::new(self.layout, self.clients_so_far);
        self.client = Some(Client { connection, session, interest: EpollFlags::EPOLLIN });
        limited!(info, "VMM connected");
        Ok(())
    }

    pub(super) fn on_vmm(&mut self) -> io::Result<()> {
        for _ in 0..READS_PER_TURN {
            let Some(client) = &mut self.client else { return Ok(()) };
            let received = client.connection.receive(&mut client.session);
            self.on_requests();
            let Some(client) = &mut self.client else { return Ok(()) };
            let sent = client.connection.send(&mut client.session);
            let is_over = client.session.is_over();
            match (received, sent) {
                (Ok(Received::EndOfStream), _) => {
                    self.drop_client("it closed the connection");
                    return Ok(());
                }
                (Err(error), _) | (_, Err(error)) => {
                    self.drop_client(&error.to_string());
                    return Ok(());
                }
                _ if is_over => {
                    self.drop_client("it broke the protocol while negotiating");
                    return Ok(());
                }
                (Ok(Received::Nothing | Received::Last), Ok(())) => break,
                (Ok(Received::Bytes), Ok(())) => {}
            }
        }
        self.watch_client()
    }

    /// Watches for what the session wants now.
    pub(super) fn watch_client(&mut self) -> io::Result<()> {
        let Some(client) = &mut self.client else { return Ok(()) };
        let mut interest = EpollFlags::empty();
        interest.set(EpollFlags::EPOLLIN, client.session.wants_to_receive());
        interest.set(EpollFlags::EPOLLOUT, client.session.wants_to_send());
        if interest != client.interest {
            self.epoll.modify(&client.connection, &mut EpollEvent::new(interest, Source::Vmm.encode()))?;
            client.interest = interest;
        }
        Ok(())
    }

    pub(super) fn on_requests(&mut self) {
        let now = self.now();
        let Some(client) = &mut self.client else { return };
        while let Some(request) = client.session.next_request() {
            match request {
                Request::RegionRead { region, offset, data } => match region {
                    Region::Bar(0) => self.controller.read(now, offset, data),
                    Region::Bar(pci::MSIX_BAR) => self.msix.read(offset, data),
                    Region::Config => self.config.read(offset, data),
                    Region::Bar(_) | Region::Rom | Region::Vga => {}
                },
                Request::RegionWrite { region, offset, data } => match region {
                    Region::Bar(0) => {
                        self.controller.write(now, &self.memory, offset, data, &mut self.effects);
                    }
                    Region::Bar(pci::MSIX_BAR) => self.msix.write(offset, data),
                    Region::Config => self.config.write(offset, data),
                    Region::Bar(_) | Region::Rom | Region::Vga => {}
                },
                Request::SetIrqs(change) => self.msix.apply(change),
                Request::DmaMap { token, map, file } => {
                    let result = self.memory.map(&map, file);
                    if let Err(errno) = result {
                        limited!(warn, ?map, %errno, "the VMM's memory cannot be mapped; DMA to it will fail");
                    }
                    client.session.finish(token, result);
                }
                // No quiet has to be waited for: guest memory is touched by this thread alone, in copies that are
                // over. A transfer that ends later finds the range gone.
                Request::DmaUnmap { token, range } => {
                    self.memory.unmap(range);
                    client.session.finish(token, Ok(()));
                }
                Request::Reset { token } => {
                    self.controller.reset(now, &mut self.effects);
                    self.config.reset();
                    self.msix.reset();
                    client.session.finish(token, Ok(()));
                }
            }
        }
    }

    pub(super) fn drop_client(&mut self, reason: &str) {
        let Some(client) = self.client.take() else { return };
        limited!(info, reason, "VMM gone; its devices stay and wait for the next one");
        if let Err(error) = self.epoll.delete(&client.connection) {
            limited!(debug, %error, "the connection was not watched");
        }
        // The effects are carried out by the next `settle`; by then memory is gone, and so are the transfers' buffers.
        self.controller.reset(self.started.elapsed(), &mut self.effects);
        self.config.reset();
        self.msix.disconnect();
        self.memory.unmap(DmaUnmap::All);
    }
}
