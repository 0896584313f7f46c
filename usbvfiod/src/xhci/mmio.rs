//! The register window: what a read shows and what a write does (xHCI 1.2 §5). Any offset and any length are sane: holes
//! read 0 and swallow writes, narrow writes leave the other bytes alone.

use std::time::Duration;

use super::GuestMem;
use super::context::Dci;
use super::controller::{Controller, Io};
use super::regs::{DOORBELLS, EXTENDED, INTERRUPTERS, OPERATIONAL, PORTS, RUNTIME, Usbcmd, Usbsts};
use super::slot::Drain;
use crate::urb::Effect;

/// A register and its place in an array of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Capability(u64),
    Usbcmd,
    Usbsts,
    PageSize,
    Dnctrl,
    CrcrLow,
    CrcrHigh,
    DcbaapLow,
    DcbaapHigh,
    Config,
    Portsc(usize),
    Portpmsc(usize),
    Extended(u64),
    Mfindex,
    Iman(usize),
    Imod(usize),
    Erstsz(usize),
    ErstbaLow(usize),
    ErstbaHigh(usize),
    ErdpLow(usize),
    ErdpHigh(usize),
    Doorbell(u8),
    Hole,
}

impl Controller {
    /// Reads registers. Bytes beyond the window read 0.
    pub fn read(&mut self, now: Duration, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let mut done = 0;
        while done < data.len() {
            let Some(at) = offset.checked_add(done as u64).filter(|at| *at < Self::BAR_SIZE) else { return };
            let within = (at % 4) as usize;
            let count = (4 - within).min(data.len() - done);
            let value = self.read_register(now, self.locate(at & !3)).to_le_bytes();
            data[done..done + count].copy_from_slice(&value[within..within + count]);
            done += count;
        }
    }

    /// Writes registers. Bytes beyond the window are dropped. Doorbells are heard in the next [`Self::settle`].
    pub fn write<M: GuestMem>(
        &mut self,
        now: Duration,
        mem: &M,
        offset: u64,
        data: &[u8],
        effects: &mut Vec<Effect>,
    ) {
        let io = &mut Io { now, mem, effects };
        let mut done = 0;
        while done < data.len() {
            let Some(at) = offset.checked_add(done as u64).filter(|at| *at < Self::BAR_SIZE) else { return };
            let within = (at % 4) as usize;
            let count = (4 - within).min(data.len() - done);
            let register = self.locate(at & !3);
            let mut value = if count == 4 { [0; 4] } else { self.neutral(now, register).to_le_bytes() };
            value[within..within + count].copy_from_slice(&data[done..done + count]);
            self.write_register(io, register, u32::from_le_bytes(value));
            done += count;
        }
    }

    fn locate(&self, at: u64) -> Register {
        match at {
            _ if at < OPERATIONAL => Register::Capability(at),
            _ if at < PORTS => match at - OPERATIONAL {
                0x00 => Register::Usbcmd,
                0x04 => Register::Usbsts,
                0x08 => Register::PageSize,
                0x14 => Register::Dnctrl,
                0x18 => Register::CrcrLow,
                0x1c => Register::CrcrHigh,
                0x30 => Register::DcbaapLow,
                0x34 => Register::DcbaapHigh,
                0x38 => Register::Config,
                _ => Register::Hole,
            },
            _ if at < EXTENDED => {
                let index = ((at - PORTS) / 16) as usize;
                match (at - PORTS) % 16 {
                    _ if index >= self.ports.len() => Register::Hole,
                    0 => Register::Portsc(index),
                    4 => Register::Portpmsc(index),
                    _ => Register::Hole,
                }
            }
            _ if at < RUNTIME => Register::Extended(at - EXTENDED),
            RUNTIME => Register::Mfindex,
            _ if at < INTERRUPTERS => Register::Hole,
            _ if at < DOORBELLS => {
                let index = ((at - INTERRUPTERS) / 32) as usize;
                match (at - INTERRUPTERS) % 32 {
                    _ if index >= self.interrupters.len() => Register::Hole,
                    0x00 => Register::Iman(index),
                    0x04 => Register::Imod(index),
                    0x08 => Register::Erstsz(index),
                    0x10 => Register::ErstbaLow(index),
                    0x14 => Register::ErstbaHigh(index),
                    0x18 => Register::ErdpLow(index),
                    0x1c => Register::ErdpHigh(index),
                    _ => Register::Hole,
                }
            }
            _ => match u8::try_from((at - DOORBELLS) / 4) {
                Ok(slot) => Register::Doorbell(slot),
                Err(_) => Register::Hole,
            },
        }
    }

    fn read_register(&self, now: Duration, register: Register) -> u32 {
        match register {
            Register::Capability(at) => self.capabilities.register(at),
            Register::Extended(at) => self.capabilities.extended(at),
            Register::Usbcmd => self.usbcmd.into_bits(),
            Register::Usbsts => self.usbsts.with_halted(!self.is_running()).into_bits(),
            Register::PageSize => 1,
            Register::Dnctrl => self.dnctrl,
            Register::CrcrLow => self.crcr(),
            Register::DcbaapLow => self.dcbaap as u32,
            Register::DcbaapHigh => (self.dcbaap >> 32) as u32,
            Register::Config => self.config,
            Register::Portsc(index) => self.ports[index].status(),
            Register::Portpmsc(index) => self.ports[index].power_management(),
            Register::Mfindex => self.microframe(now),
            Register::Iman(index) => self.interrupters[index].management(),
            Register::Imod(index) => self.interrupters[index].moderation(now),
            Register::Erstsz(index) => u32::from(self.interrupters[index].ring.table_size),
            Register::ErstbaLow(index) => self.interrupters[index].ring.table_base as u32,
            Register::ErstbaHigh(index) => (self.interrupters[index].ring.table_base >> 32) as u32,
            Register::ErdpLow(index) => {
                let interrupter = &self.interrupters[index];
                let ring = &interrupter.ring;
                ring.dequeue as u32 | u32::from(interrupter.busy) << 3 | u32::from(ring.dequeue_segment)
            }
            Register::ErdpHigh(index) => (self.interrupters[index].ring.dequeue >> 32) as u32,
            Register::CrcrHigh | Register::Doorbell(_) | Register::Hole => 0,
        }
    }

    /// What the bytes are that a narrow write leaves out: the register's value without the bits that do something.
    fn neutral(&self, now: Duration, register: Register) -> u32 {
        match register {
            Register::Portsc(index) => self.ports[index].neutral(),
            Register::Usbsts => 0,
            Register::Iman(index) => self.interrupters[index].management() & 2,
            Register::ErdpLow(_) => self.read_register(now, register) & !8,
            Register::CrcrLow => self.commands.cursor.field() as u32 & !0x3e,
            _ => self.read_register(now, register),
        }
    }

    fn write_register<M: GuestMem>(&mut self, io: &mut Io<'_, M>, register: Register, value: u32) {
        match register {
            Register::Usbcmd => self.write_usbcmd(io, Usbcmd::from_bits(value)),
            Register::Usbsts => self.write_usbsts(Usbsts::from_bits(value)),
            Register::Dnctrl => self.dnctrl = value & 0xffff,
            Register::CrcrLow => self.write_crcr_low(io, value),
            Register::CrcrHigh => self.write_crcr_high(value),
            Register::DcbaapLow => self.dcbaap = set_low(self.dcbaap, value & !0x3f),
            Register::DcbaapHigh => self.dcbaap = set_high(self.dcbaap, value),
            Register::Config => self.config = value & 0x3ff,
            Register::Portsc(index) => self.write_portsc(io, index, value),
            Register::Portpmsc(index) => self.ports[index].write_power_management(value),
            Register::Iman(index) => self.interrupters[index].write_management(value),
            Register::Imod(index) => self.interrupters[index].write_moderation(io.now, value),
            Register::Erstsz(index) => {
                self.interrupters[index].ring.table_size = value as u16;
                self.interrupters[index].ring.table_written();
            }
            Register::ErstbaLow(index) => {
                let ring = &mut self.interrupters[index].ring;
                ring.table_base = set_low(ring.table_base, value & !0x3f);
                ring.table_written();
            }
            Register::ErstbaHigh(index) => {
                let ring = &mut self.interrupters[index].ring;
                ring.table_base = set_high(ring.table_base, value);
                ring.table_written();
            }
            Register::ErdpLow(index) => {
                let interrupter = &mut self.interrupters[index];
                interrupter.ring.dequeue = set_low(interrupter.ring.dequeue, value & !0xf);
                interrupter.ring.dequeue_segment = (value & 7) as u8;
                if value & 8 != 0 {
                    interrupter.busy = false;
                }
                self.unblock();
            }
            Register::ErdpHigh(index) => {
                let ring = &mut self.interrupters[index].ring;
                ring.dequeue = set_high(ring.dequeue, value);
                self.unblock();
            }
            Register::Doorbell(slot) => self.write_doorbell(io, slot, value),
            Register::Capability(_)
            | Register::Extended(_)
            | Register::PageSize
            | Register::Mfindex
            | Register::Hole => {}
        }
    }

    /// A doorbell (§5.6): target and stream. Those of no slot or endpoint are not heard.
    fn write_doorbell<M: GuestMem>(&mut self, io: &mut Io<'_, M>, slot: u8, value: u32) {
        let (target, stream) = (value as u8, (value >> 16) as u16);
        match (slot, Dci::new(target)) {
            (0, _) if target == 0 => self.ring_commands(),
            (0, _) | (_, None) => {}
            (slot, Some(dci)) => self.ring_endpoint(io, slot, dci, stream),
        }
    }

    fn write_usbcmd<M: GuestMem>(&mut self, io: &mut Io<'_, M>, value: Usbcmd) {
        if value.reset() {
            return self.reset_controller(io.effects);
        }
        let has_error = self.usbsts.host_system_error() || self.usbsts.host_controller_error();
        let (was_running, run) = (self.is_running(), value.run() && !has_error);
        self.usbcmd = Usbcmd::new()
            .with_run(was_running)
            .with_interrupter_enable(value.interrupter_enable())
            .with_host_system_error_enable(value.host_system_error_enable())
            .with_wrap_event_enable(value.wrap_event_enable());
        match (was_running, run) {
            (false, true) => self.start(io),
            (true, false) => self.stop(io),
            _ => {}
        }
        self.schedule_wrap(io.now);
        if !run && value.save() {
            self.save();
        }
        if !run && value.restore() {
            self.restore();
        }
    }

    /// RW1C bits of USBSTS. HSE is RW1C, too, but the controller stays halted until HCRST.
    fn write_usbsts(&mut self, value: Usbsts) {
        let status = &mut self.usbsts;
        status.set_event_interrupt(status.event_interrupt() && !value.event_interrupt());
        status.set_port_change(status.port_change() && !value.port_change());
        status.set_save_restore_error(status.save_restore_error() && !value.save_restore_error());
    }

    /// R/S = 1.
    fn start<M: GuestMem>(&mut self, io: &mut Io<'_, M>) {
        self.usbcmd.set_run(true);
        self.frames_since = io.now;
        self.announce_ports(io);
        for slot in 1..=self.capabilities.slots {
            for dci in (1..=31).filter_map(Dci::new) {
                self.make_ready(slot, dci);
            }
        }
    }

    /// R/S = 0: halted at once. Transfers come back and go on when the controller starts again, as nothing may be written
    /// to guest memory now.
    fn stop<M: GuestMem>(&mut self, io: &mut Io<'_, M>) {
        self.usbcmd.set_run(false);
        self.commands.running = false;
        for slot in 1..=self.capabilities.slots {
            for dci in (1..=31).filter_map(Dci::new) {
                self.with_endpoint(slot, dci, |controller, endpoint| {
                    if endpoint.drain.is_none() && endpoint.is_waiting() {
                        controller.start_drain(endpoint, slot, Drain::Pause, io.effects);
                    }
                });
            }
        }
    }

    /// CSS (§4.23.2): the state is in us, only what the restored registers would overwrite is noted.
    fn save(&mut self) {
        self.usbsts.set_save_restore_error(false);
        self.saved = Some(self.interrupters.iter().map(|interrupter| interrupter.ring.position()).collect());
    }

    /// CRS: with nothing saved, or lost by a reset since, SRE tells the guest to start over.
    fn restore(&mut self) {
        let Some(saved) = &self.saved else {
            self.usbsts.set_save_restore_error(true);
            return;
        };
        for (interrupter, position) in self.interrupters.iter_mut().zip(saved) {
            interrupter.ring.restore(*position);
        }
        self.usbsts.set_save_restore_error(false);
    }
}

fn set_low(register: u64, value: u32) -> u64 {
    register & !0xffff_ffff | u64::from(value)
}

fn set_high(register: u64, value: u32) -> u64 {
    register & 0xffff_ffff | u64::from(value) << 32
}
