//! MSI-X (PCI 3.0 §6.8.2): vectors that signal event fds, and the table and pending bits behind their BAR.
//!
//! Cloud Hypervisor and QEMU keep the table to themselves: they give each vector an event fd, and neither shows us the
//! guest's mask bits. So the table here is storage that reads back what was written, and what decides is the event fd
//! of a vector and the client's MASK. A vector that is raised while it has no event fd, or while it is masked, is
//! pending and signalled as soon as it can be: the controller sends no second interrupt before the guest has seen the
//! first, so none may be lost.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::OFlags;

use super::positions;
use crate::vfio_user::session::IrqChange;

/// Table and pending bits are on pages of their own.
pub const PAGE: u32 = 4096;
/// Where the table is in its BAR.
pub const TABLE_OFFSET: u32 = 0;
/// Where the pending bits are.
pub const PENDING_OFFSET: u32 = PAGE;
/// As many as the table's page holds.
pub const MAX_VECTORS: u16 = (PAGE / ENTRY_SIZE as u32) as u16;

const ENTRY_SIZE: usize = 16;
/// What can be written in an entry: address (dword-aligned), data, and the mask bit.
const ENTRY_MASK: [u8; ENTRY_SIZE] =
    [0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01, 0, 0, 0];
const VECTOR_CONTROL: usize = 12;

#[derive(Debug, Default)]
struct Vector {
    eventfd: Option<OwnedFd>,
    masked: bool,
    pending: bool,
}

impl Vector {
    /// Signals the event fd if the vector is pending and may. A broken one is dropped, and told of once.
    fn deliver(&mut self, told: &mut bool) {
        let Some(eventfd) = self.eventfd.as_ref().filter(|_| self.pending && !self.masked) else { return };
        match rustix::io::write(eventfd, &1u64.to_ne_bytes()) {
            // A counter that is full is one that is read late: the interrupt is on its way.
            Ok(_) | Err(rustix::io::Errno::AGAIN) => self.pending = false,
            Err(errno) => {
                self.eventfd = None;
                if !std::mem::replace(told, true) {
                    common::limited!(warn, %errno, "interrupt event fd of the client is broken, dropped");
                }
            }
        }
    }
}

/// The vectors of the function. See the module's text.
#[derive(Debug)]
pub struct Msix {
    vectors: Vec<Vector>,
    table: Vec<u8>,
    /// The operator knows of a broken event fd of this client.
    told: bool,
}

impl Msix {
    /// All masked in the table, none with an event fd. `vectors` is 1..=[`MAX_VECTORS`].
    pub fn new(vectors: u16) -> Self {
        let count = usize::from(vectors.clamp(1, MAX_VECTORS));
        let mut msix = Self {
            vectors: (0..count).map(|_| Vector::default()).collect(),
            table: vec![0; count * ENTRY_SIZE],
            told: false,
        };
        msix.reset();
        msix
    }

    /// Raises a vector; one that does not exist is ignored.
    pub fn signal(&mut self, vector: u16) {
        if let Some(vector) = self.vectors.get_mut(usize::from(vector)) {
            vector.pending = true;
            vector.deliver(&mut self.told);
        }
    }

    /// Does what the client asked for with SET_IRQS. Vectors that do not exist are ignored.
    pub fn apply(&mut self, change: IrqChange) {
        match change {
            IrqChange::Disable => self.vectors.iter_mut().for_each(|vector| vector.eventfd = None),
            IrqChange::Assign { start, eventfds } => {
                for (vector, eventfd) in self.vectors.iter_mut().skip(usize::from(start)).zip(eventfds) {
                    vector.eventfd = make_nonblocking(&eventfd).is_ok().then_some(eventfd);
                    vector.deliver(&mut self.told);
                }
            }
            IrqChange::Deassign { start, count } => {
                let vectors = self.vectors.iter_mut().skip(usize::from(start)).take(usize::from(count));
                vectors.for_each(|vector| vector.eventfd = None);
            }
            IrqChange::Trigger(vectors) => vectors.into_iter().for_each(|vector| self.signal(vector)),
            IrqChange::Mask(vectors) => self.set_masked(&vectors, true),
            IrqChange::Unmask(vectors) => self.set_masked(&vectors, false),
        }
    }

    /// The client is gone: its event fds are closed, and what was pending was for its guest.
    pub fn disconnect(&mut self) {
        self.vectors.fill_with(Vector::default);
        self.told = false;
    }

    /// Reset of the function: table and pending bits as after power-on. Event fds belong to the client and stay.
    pub fn reset(&mut self) {
        self.table.fill(0);
        self.table.chunks_exact_mut(ENTRY_SIZE).for_each(|entry| entry[VECTOR_CONTROL] = 1);
        for vector in &mut self.vectors {
            vector.pending = false;
            vector.masked = false;
        }
    }

    /// Reads from the BAR, from `offset` on: table, pending bits, zero elsewhere.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(positions(offset)) {
            *byte = match at.checked_sub(PENDING_OFFSET as usize) {
                None => self.table.get(at).copied().unwrap_or(0),
                Some(index) => self.pending_byte(index),
            };
        }
    }

    /// Writes to the BAR, from `offset` on. Only the table can be written.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        for (&byte, at) in data.iter().zip(positions(offset)) {
            let Some(stored) = self.table.get_mut(at) else { return };
            let mask = ENTRY_MASK[at % ENTRY_SIZE];
            *stored = *stored & !mask | byte & mask;
        }
    }

    fn pending_byte(&self, index: usize) -> u8 {
        let vectors = self.vectors.iter().skip(index.saturating_mul(8)).take(8);
        vectors.enumerate().fold(0, |byte, (bit, vector)| byte | u8::from(vector.pending) << bit)
    }

    fn set_masked(&mut self, vectors: &[u16], masked: bool) {
        for &vector in vectors {
            if let Some(vector) = self.vectors.get_mut(usize::from(vector)) {
                vector.masked = masked;
                vector.deliver(&mut self.told);
            }
        }
    }
}

/// A full counter, or a pipe passed off as an event fd, must not hold up the loop. The flag is shared with the client;
/// both known clients set it themselves, and one that takes it back hurts only its own device.
fn make_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    if !flags.contains(OFlags::NONBLOCK) {
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
