//! Plays the part of a `usbvfiod` towards `usbpolicyd`, without a guest: takes devices, holds their files, claims their
//! interfaces, and says on standard output what it is told. For what a well-behaved usbvfiod never does, and to see
//! `usbpolicyd` alone.
//!
//! `play-instance DIRECTORY [refuse|silent]`: listens at DIRECTORY/policy.sock; refuses each device, or never answers
//! an attach or detach.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use common::channel::{Channel, ChannelError, Listener};
use common::ids::DeviceId;
use common::usbfs::UsbfsFile;
use common::wire::{AttachedDevice, FromInstance, PROTOCOL_VERSION, RefusedCode, ToInstance};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    Good,
    Refuse,
    Silent,
}

struct Held {
    file: UsbfsFile,
    view: AttachedDevice,
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let directory = PathBuf::from(args.next().context("usage: play-instance DIRECTORY [refuse|silent]")?);
    let manner = match args.next().as_deref() {
        None => Manner::Good,
        Some("refuse") => Manner::Refuse,
        Some("silent") => Manner::Silent,
        Some(other) => bail!("no manner {other:?}"),
    };
    std::fs::create_dir_all(&directory)?;
    let listener = Listener::bind(&directory.join("policy.sock"), 0o660)?;
    let mut held: BTreeMap<DeviceId, Held> = BTreeMap::new();
    let mut link: Option<Channel> = None;
    println!("listening");
    loop {
        let listens = PollFd::new(listener.as_fd(), PollFlags::POLLIN);
        let linked = link.as_ref().map(|link| PollFd::new(link.as_fd(), PollFlags::POLLIN));
        let mut all: Vec<PollFd<'_>> = [listens].into_iter().chain(linked).collect();
        // A device that is pulled wakes us with a hang-up, whatever is asked for.
        all.extend(held.values().map(|one| PollFd::new(one.file.as_fd(), PollFlags::empty())));
        poll(&mut all, PollTimeout::NONE)?;
        let first_device = all.len() - held.len();
        let is_dead = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        let dead: Vec<bool> = all[first_device..].iter().map(is_dead).collect();
        let gone: Vec<DeviceId> =
            held.keys().zip(dead).filter(|(_, dead)| *dead).map(|(id, _)| *id).collect();
        for id in gone {
            println!("gone {id}");
            held.remove(&id);
            if let Some(link) = &link {
                let _ = link.send(&FromInstance::Gone { id, text: "unplugged".to_owned() }, None);
            }
        }
        if link.is_none() {
            link = listener.accept()?;
        }
        let Some(channel) = &mut link else { continue };
        let served = channel.receive::<ToInstance>().and_then(|received| {
            let Some((message, file)) = received else { return Ok(()) };
            answer(manner, message, file, &mut held).map_or(Ok(()), |answer| channel.send(&answer, None))
        });
        match served {
            Ok(()) => {}
            // It may have died with its question under way.
            Err(ChannelError::Closed) => {
                println!("policy daemon gone");
                link = None;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn answer(
    manner: Manner,
    message: ToInstance,
    file: Option<OwnedFd>,
    held: &mut BTreeMap<DeviceId, Held>,
) -> Option<FromInstance> {
    match message {
        ToInstance::Hello { .. } => {
            let version = PROTOCOL_VERSION;
            Some(FromInstance::Hello { version, usb2_ports: 15, usb3_ports: 15, vmm_connected: false })
        }
        ToInstance::List { .. } => {
            let devices = held.values().map(|one| one.view.clone()).collect();
            Some(FromInstance::Devices { devices, more: false })
        }
        ToInstance::Ping { nonce } => Some(FromInstance::Pong { nonce, stats: Default::default() }),
        ToInstance::Attach(attach) => {
            println!(
                "attach {} {} {} {} {} configuration {}",
                attach.id, attach.address, attach.path, attach.ids, attach.speed, attach.configuration
            );
            match manner {
                Manner::Silent => None,
                Manner::Refuse => Some(refused(attach.id, "told to refuse".to_owned())),
                Manner::Good => Some(match take(&attach, file, held) {
                    Ok(port) => FromInstance::Attached { id: attach.id, port },
                    Err(error) => refused(attach.id, format!("{error:#}")),
                }),
            }
        }
        ToInstance::Detach { id, .. } => {
            println!("detach {id}");
            if manner == Manner::Silent {
                return None;
            }
            held.remove(&id);
            Some(FromInstance::Detached { id })
        }
    }
}

fn refused(id: DeviceId, text: String) -> FromInstance {
    println!("refused {id}: {text}");
    FromInstance::Refused { id, code: RefusedCode::Unusable, text }
}

fn take(
    attach: &common::wire::Attach,
    file: Option<OwnedFd>,
    held: &mut BTreeMap<DeviceId, Held>,
) -> Result<u8> {
    let file = UsbfsFile::new(file.context("no file came along")?)?;
    let info = file.connection_info()?;
    if info.address != attach.address {
        bail!("the file is {}, the message says {}", info.address, attach.address);
    }
    // The kernel shows the device descriptor first, in the host's byte order.
    let descriptors = file.descriptors()?;
    let half = |at: usize| Some(u16::from_ne_bytes([*descriptors.get(at)?, *descriptors.get(at + 1)?]));
    if (half(8), half(10)) != (Some(attach.ids.vendor), Some(attach.ids.product)) {
        println!("WRONG DEVICE behind the file for {}", attach.ids);
        bail!("the file is another device than the message says");
    }
    file.claim_interface(0).context("claim of interface 0")?;
    let port = u8::try_from(held.len() + 1)?;
    let path = info.ports.context("no port chain")?;
    let view = AttachedDevice { id: attach.id, port, address: info.address, path };
    held.insert(attach.id, Held { file, view });
    println!("holding {}", attach.id);
    Ok(port)
}
