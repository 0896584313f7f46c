//! The devices' side of the loop: from an opened file to a guest port, and out again.

use std::os::fd::OwnedFd;

use common::ids::DeviceId;
use common::wire::{self, Attach, FromInstance, RefusedCode, cut_text};
use nix::sys::epoll::EpollEvent;
use tracing::{debug, info, warn};

use super::{Daemon, Source};
use crate::attached::{Farewell, State};
use crate::urb::DeviceHandle;
use crate::usb::{DeviceEvent, DeviceInfo, DeviceSet, Handover, Refused};
use crate::xhci::{AttachError, AttachOptions, PortNumber, ResetPolicy};

impl Daemon {
    pub(super) fn on_device_event(&mut self, event: DeviceEvent) {
        let now = self.now();
        match event {
            DeviceEvent::Completed { completion, .. } => {
                self.controller.complete(now, &self.memory, completion, &mut self.effects);
            }
            DeviceEvent::Operated { id, result, .. } => {
                self.controller.operation_done(now, &self.memory, id, result, &mut self.effects);
            }
            DeviceEvent::Woke { device } => {
                self.controller.wake(now, &self.memory, device, &mut self.effects);
            }
            DeviceEvent::Attached { device, info } => self.on_opened(device, &info),
            DeviceEvent::Refused { device, reason } => {
                if let Some(entry) = self.book.close(device) {
                    let (code, text) = explain(&reason);
                    self.refuse(entry.id, code, text);
                }
            }
            DeviceEvent::Gone { device } => {
                self.leave(device, Farewell::Gone("the device is gone".to_owned()))
            }
            DeviceEvent::Detached { device } => {
                let Some(entry) = self.book.close(device) else { return };
                let id = entry.id;
                match entry.state {
                    State::Leaving(Farewell::Detached) => self.link.send(&FromInstance::Detached { id }),
                    State::Leaving(Farewell::Gone(text)) => self.link.send(&FromInstance::Gone { id, text }),
                    _ => {}
                }
            }
        }
    }

    /// A lane has opened and claimed a device: give it a port.
    pub(super) fn on_opened(&mut self, device: DeviceHandle, info: &DeviceInfo) {
        let Some(entry) = self.book.get(device) else { return self.usb.detach(device) };
        let State::Opening(attach) = &entry.state else { return };
        let (id, attach) = (entry.id, attach.clone());
        let result = self.plug(device, &attach, info);
        match result {
            Ok(port) => {
                info!(device = %id, port, ids = %info.ids, path = %info.path, speed = %info.speed, "device attached");
                if let Some(entry) = self.book.get_mut(device) {
                    entry.state = State::Attached { port, address: info.address, path: info.path.clone() };
                }
                self.link.send(&FromInstance::Attached { id, port });
            }
            Err((code, text)) => {
                self.refuse(id, code, text);
                self.leave(device, Farewell::Nothing);
            }
        }
    }

    pub(super) fn plug(
        &mut self,
        device: DeviceHandle,
        attach: &Attach,
        info: &DeviceInfo,
    ) -> Result<u8, (RefusedCode, String)> {
        if info.path != attach.path || info.ids != attach.ids {
            let text = format!(
                "the file is {} at port {}, the message says {} at port {}; usbpolicyd has to look again",
                info.ids, info.path, attach.ids, attach.path
            );
            return Err((RefusedCode::WrongDevice, text));
        }
        let Some(fd) = self.usb.fd(device) else {
            return Err((RefusedCode::Unusable, "the device went while it was opened".to_owned()));
        };
        let event = EpollEvent::new(DeviceSet::INTEREST, Source::Device(device).encode());
        self.epoll
            .add(fd, event)
            .map_err(|errno| (RefusedCode::NoResources, format!("epoll_ctl: {errno}")))?;
        let reset = match attach.reset {
            wire::ResetPolicy::Never => ResetPolicy::Never,
            wire::ResetPolicy::FirstFree => ResetPolicy::FirstFree,
            wire::ResetPolicy::Always => ResetPolicy::Always,
        };
        // The transport knows by itself which configuration needs no call.
        let options = AttachOptions {
            reset,
            configuration: None,
            host_streams: info.speed.is_usb3() && !info.uas_hidden,
        };
        let port =
            self.controller.attach(self.now(), &self.memory, device, info.speed, options, &mut self.effects);
        port.map(PortNumber::get).map_err(|error: AttachError| (RefusedCode::NoPort, error.to_string()))
    }

    /// Takes a device out of everything. Its file is closed by a lane; then usbpolicyd is told.
    pub(super) fn leave(&mut self, device: DeviceHandle, farewell: Farewell) {
        let Some(entry) = self.book.get_mut(device) else { return };
        if let State::Leaving(before) = &mut entry.state {
            // It was leaving already; an answer that is waited for outranks one that is not.
            if farewell == Farewell::Detached {
                *before = farewell;
            }
            return;
        }
        info!(device = %entry.id, reason = ?farewell, "device detached");
        entry.state = State::Leaving(farewell);
        if let Some(fd) = self.usb.fd(device)
            && let Err(error) = self.epoll.delete(fd)
        {
            debug!(%error, "the device was not watched");
        }
        self.controller.detach(self.started.elapsed(), &self.memory, device, &mut self.effects);
        self.usb.detach(device);
    }
    pub(super) fn on_attach(&mut self, attach: Attach, file: OwnedFd) {
        let id = attach.id;
        // As many lanes as ports: a device more could only wait for a lane and then find no port.
        if self.book.len() >= usize::from(self.ports.0) + usize::from(self.ports.1) {
            let text =
                "all ports of this controller are taken; detach a device or start usbvfiod with more --ports";
            return self.refuse(id, RefusedCode::NoPort, text.to_owned());
        }
        let handover = Handover { address: attach.address, configuration: attach.configuration };
        match self.book.open(attach) {
            Some(device) => self.usb.attach(device, file, handover),
            None => self.refuse(id, RefusedCode::DuplicateId, format!("device {id} is here already")),
        }
    }

    pub(super) fn refuse(&mut self, id: DeviceId, code: RefusedCode, text: String) {
        warn!(device = %id, ?code, reason = text, "device refused");
        self.link.send(&FromInstance::Refused { id, code, text: cut_text(text) });
    }
}

/// Why the transport did not take a device, for programs and for people.
fn explain(reason: &Refused) -> (RefusedCode, String) {
    let code = match reason {
        Refused::BadFile(_) => RefusedCode::BadFile,
        Refused::WrongDevice { .. } => RefusedCode::WrongDevice,
        Refused::Kernel { .. } | Refused::Claim { .. } | Refused::Unusable(_) => RefusedCode::Unusable,
    };
    let text = match std::error::Error::source(reason) {
        Some(source) => format!("{reason}: {source}"),
        None => reason.to_string(),
    };
    (code, text)
}
