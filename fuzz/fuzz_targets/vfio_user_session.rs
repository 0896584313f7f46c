//! A client's stream, in pieces, against a session with a PCI function and guest memory behind it.
//!
//! A piece is a byte that says what happens besides (descriptors that come with it, replies that are not taken, requests
//! that are finished late), a byte for its length, and so many bytes of the stream.

#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use usbvfiod::guest_memory::GuestMemory;
use usbvfiod::pci;
use usbvfiod::pci::config::{ConfigSpace, Ids};
use usbvfiod::pci::msix::Msix;
use usbvfiod::urb::GuestMem;
use usbvfiod::vfio_user::message::{MAX_FDS, Region};
use usbvfiod::vfio_user::session::{Request, Session, Token};

/// What a client may pass for guest memory or an event fd.
static FILE: LazyLock<File> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("vfio-user-fuzz-{}", std::process::id()));
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).expect("file");
    std::fs::remove_file(&path).expect("removed");
    file.set_len(1 << 20).expect("length");
    file
});

const FDS: u8 = 0x1f;
const FDS_LOST: u8 = 0x20;
const KEEP_REPLIES: u8 = 0x40;
const FINISH_LATE: u8 = 0x80;
const VECTORS: u16 = 4;

struct Device {
    memory: GuestMemory,
    config: ConfigSpace,
    msix: Msix,
}

/// Hands out all there is; returns a token that is kept back.
fn handle(session: &mut Session, device: &mut Device, finish_late: bool) -> Option<Token> {
    let mut finished = None;
    loop {
        if let Some((token, result)) = finished.take() {
            session.finish(token, result);
        }
        let request = session.next_request()?;
        match request {
            Request::RegionRead { region, offset, data } => match region {
                Region::Config => device.config.read(offset, data),
                Region::Bar(pci::MSIX_BAR) => device.msix.read(offset, data),
                _ => assert!(offset + data.len() as u64 <= u64::from(pci::REGISTERS_SIZE)),
            },
            Request::RegionWrite { region, offset, data } => match region {
                Region::Config => device.config.write(offset, data),
                Region::Bar(pci::MSIX_BAR) => device.msix.write(offset, data),
                // The guest's word goes where a ring's address would go.
                _ => {
                    let address = data.iter().fold(offset, |address, &byte| address << 8 | u64::from(byte));
                    let mut record = [0; 16];
                    let _ = device.memory.read(address, &mut record);
                    let _ = device.memory.write(address, &record);
                }
            },
            Request::SetIrqs(change) => device.msix.apply(change),
            Request::DmaMap { token, map, file } => finished = Some((token, device.memory.map(&map, file))),
            Request::DmaUnmap { token, range } => {
                device.memory.unmap(range);
                if finish_late {
                    return Some(token);
                }
                finished = Some((token, Ok(())));
            }
            Request::Reset { token } => {
                device.config.reset();
                device.msix.reset();
                if finish_late {
                    return Some(token);
                }
                finished = Some((token, Ok(())));
            }
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let mut session = Session::new(pci::layout(VECTORS), 1);
    let mut device = Device {
        memory: GuestMemory::new().expect("pipe"),
        config: ConfigSpace::new(Ids::default(), VECTORS),
        msix: Msix::new(VECTORS),
    };
    let mut kept_back = None;
    let mut rest = input;
    while let [what, len, tail @ ..] = rest {
        let (what, (bytes, next)) = (*what, tail.split_at(usize::from(*len).min(tail.len())));
        rest = next;
        if session.wants_to_receive() {
            let spare = session.inbox().spare();
            let len = spare.len().min(bytes.len());
            spare[..len].copy_from_slice(&bytes[..len]);
            let count = usize::from(what & FDS).min(MAX_FDS);
            let fds: Vec<OwnedFd> = (0..count).map(|_| FILE.try_clone().expect("copy").into()).collect();
            session.inbox().received(len, fds, what & FDS_LOST != 0);
        }
        if let Some(token) = kept_back.take() {
            session.finish(token, Ok(()));
        }
        kept_back = handle(&mut session, &mut device, what & FINISH_LATE != 0);
        device.msix.signal(u16::from(what) % (VECTORS + 1));
        if what & KEEP_REPLIES == 0 {
            let outbox = session.outbox();
            while !outbox.is_empty() {
                let len = outbox.next().len();
                assert!(len >= 16);
                outbox.sent(len);
            }
        }
    }
});
