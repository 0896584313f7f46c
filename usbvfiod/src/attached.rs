//! Which devices the process has, by the name usbpolicyd gave them and by the handle the controller knows.
//!
//! A book, no effects: it says what may be answered when.

use std::collections::BTreeMap;

use common::ids::{BusAddress, DeviceId, PortChain};
use common::wire::{Attach, AttachedDevice, DEVICES_PER_PACKET, FromInstance};

use crate::urb::DeviceHandle;

/// What is said to usbpolicyd when a leaving device's file is closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Farewell {
    /// It asked for it.
    Detached,
    /// The device went by itself.
    Gone(String),
    /// It was refused already.
    Nothing,
}

/// How far a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// A lane opens and claims it.
    Opening(Attach),
    /// It hangs on a guest port.
    Attached {
        /// Guest root port, 1 and up.
        port: u8,
        /// As its file says.
        address: BusAddress,
        /// As its file says.
        path: PortChain,
    },
    /// Its file is being closed.
    Leaving(Farewell),
}

/// A device's page in the book.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// usbpolicyd's name for it.
    pub id: DeviceId,
    /// How far it is.
    pub state: State,
}

/// The book.
#[derive(Debug, Default)]
pub struct Book {
    entries: BTreeMap<DeviceHandle, Entry>,
    last_handle: u32,
}

impl Book {
    /// Opens a page for a device, with a handle that was never used before. None when the id is in use.
    pub fn open(&mut self, attach: Attach) -> Option<DeviceHandle> {
        if self.handle_of(attach.id).is_some() {
            return None;
        }
        // 2^32 plug-ins at ten a second are thirteen years; then no handle is left rather than one used twice.
        self.last_handle = self.last_handle.checked_add(1)?;
        let handle = DeviceHandle(self.last_handle);
        self.entries.insert(handle, Entry { id: attach.id, state: State::Opening(attach) });
        Some(handle)
    }

    /// The page of a device.
    pub fn get(&self, handle: DeviceHandle) -> Option<&Entry> {
        self.entries.get(&handle)
    }

    /// The page of a device, to write on.
    pub fn get_mut(&mut self, handle: DeviceHandle) -> Option<&mut Entry> {
        self.entries.get_mut(&handle)
    }

    /// The device that usbpolicyd calls `id`, also while it comes or goes.
    pub fn handle_of(&self, id: DeviceId) -> Option<DeviceHandle> {
        self.entries.iter().find(|(_, entry)| entry.id == id).map(|(&handle, _)| handle)
    }

    /// Closes a page.
    pub fn close(&mut self, handle: DeviceHandle) -> Option<Entry> {
        self.entries.remove(&handle)
    }

    /// How many devices are there in any state.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// A page of the list: attached devices by id, those after `after`.
    pub fn list(&self, after: Option<DeviceId>) -> FromInstance {
        let mut devices: Vec<_> = self
            .entries
            .values()
            .filter(|entry| after.is_none_or(|after| entry.id > after))
            .filter_map(|entry| match &entry.state {
                State::Attached { port, address, path } => {
                    Some(AttachedDevice { id: entry.id, port: *port, address: *address, path: path.clone() })
                }
                State::Opening(_) | State::Leaving(_) => None,
            })
            .collect();
        devices.sort_by_key(|device| device.id);
        let more = devices.len() > DEVICES_PER_PACKET;
        devices.truncate(DEVICES_PER_PACKET);
        FromInstance::Devices { devices, more }
    }
}

#[cfg(test)]
mod tests {
    use common::ids::Speed;
    use common::wire::ResetPolicy;

    use super::*;

    fn attach(id: u64) -> Attach {
        Attach {
            id: DeviceId(id),
            address: BusAddress { bus: 1, device: 2 },
            path: "1".parse().unwrap(),
            speed: Speed::High,
            ids: "1234:5678".parse().unwrap(),
            configuration: 1,
            reset: ResetPolicy::default(),
        }
    }

    fn attached(book: &mut Book, id: u64) {
        let handle = book.open(attach(id)).unwrap();
        let state = State::Attached {
            port: 1,
            address: BusAddress { bus: 1, device: 2 },
            path: "1".parse().unwrap(),
        };
        book.get_mut(handle).unwrap().state = state;
    }

    #[test]
    fn an_id_is_taken_until_its_file_is_closed() {
        let mut book = Book::default();
        let first = book.open(attach(7)).unwrap();
        assert_eq!(book.open(attach(7)), None);
        book.get_mut(first).unwrap().state = State::Leaving(Farewell::Detached);
        assert_eq!(book.open(attach(7)), None);
        book.close(first);
        assert_ne!(book.open(attach(7)), Some(first));
    }

    #[test]
    fn the_list_is_paged_by_id() {
        let mut book = Book::default();
        for id in (0..20).rev() {
            attached(&mut book, id);
        }
        let FromInstance::Devices { devices, more: true } = book.list(None) else { panic!("one page") };
        assert_eq!(devices.len(), DEVICES_PER_PACKET);
        let last = devices.last().map(|device| device.id);
        let FromInstance::Devices { devices, more: false } = book.list(last) else { panic!("too many") };
        assert_eq!(devices.len(), 20 - DEVICES_PER_PACKET);
    }

    #[test]
    fn devices_that_come_or_go_are_not_listed() {
        let mut book = Book::default();
        book.open(attach(1)).unwrap();
        assert_eq!(book.list(None), FromInstance::Devices { devices: vec![], more: false });
    }
}
