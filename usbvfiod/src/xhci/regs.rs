//! Register map and the bits of each register (xHCI 1.2 §5). Layout only: what a write does stands in `mmio`.

use bitfield_struct::bitfield;

/// Operational registers follow the capability registers (§5.3.1, CAPLENGTH).
pub(super) const OPERATIONAL: u64 = 0x40;
/// Port register sets (§5.4.8), 16 bytes for each port.
pub(super) const PORTS: u64 = OPERATIONAL + 0x400;
/// Extended capabilities (§7), on a page of their own.
pub(super) const EXTENDED: u64 = 0x2000;
/// Runtime registers (§5.5), on a page of their own.
pub(super) const RUNTIME: u64 = 0x4000;
/// First interrupter register set (§5.5.2), 32 bytes each.
pub(super) const INTERRUPTERS: u64 = RUNTIME + 0x20;
/// Doorbell array (§5.6), on a page of its own.
pub(super) const DOORBELLS: u64 = 0x8000;

/// HCIVERSION 1.1: HCCPARAMS2 exists, no newer feature is promised.
const VERSION: u32 = 0x0110;
/// Isochronous Scheduling Threshold: 4 frames (§5.3.4; bit 3: the unit is frames).
const IST: u32 = 0xc;
/// Event Ring Segment Table Max: 2^3 = 8 segments (§5.3.4).
const ERST_MAX: u32 = 3;
/// Segments an event ring may have, from `ERST_MAX`.
pub(super) const ERST_SEGMENTS: usize = 1 << ERST_MAX;
/// MaxPSASize: stream arrays of up to 2^(4+1) = 32 entries (§5.3.6).
pub(super) const MAX_PSA_SIZE: u8 = 4;

/// What the capability registers tell (§5.3).
#[derive(Clone, Copy, Debug)]
pub(super) struct Capabilities {
    pub(super) usb2_ports: u8,
    pub(super) usb3_ports: u8,
    pub(super) slots: u8,
    pub(super) interrupters: u16,
    pub(super) streams: bool,
}

impl Capabilities {
    /// The dword at `offset` of the capability registers; holes are 0.
    pub(super) fn register(&self, offset: u64) -> u32 {
        let ports = u32::from(self.usb2_ports) + u32::from(self.usb3_ports);
        match offset {
            0x00 => OPERATIONAL as u32 | VERSION << 16,
            0x04 => u32::from(self.slots) | u32::from(self.interrupters) << 8 | ports << 24,
            0x08 => IST | ERST_MAX << 4,
            0x10 => {
                let (ac64, spc, sec, nss) = (1, 1 << 9, 1 << 10, 1 << 7);
                let max_psa = if self.streams { u32::from(MAX_PSA_SIZE) << 12 } else { 0 };
                ac64 | nss | spc | sec | max_psa | ((EXTENDED / 4) as u32) << 16
            }
            0x14 => DOORBELLS as u32,
            0x18 => RUNTIME as u32,
            _ => 0,
        }
    }

    /// The dword at `offset` of the extended capabilities: one Supported Protocol for each kind of port (§7.2). USB 2
    /// ports come first; no LPM is offered. USB 3.1 with default speed ids, so that SuperSpeedPlus can be shown.
    pub(super) fn extended(&self, offset: u64) -> u32 {
        const NAME: u32 = u32::from_le_bytes(*b"USB ");
        const PROTOCOL: u32 = 2;
        let usb2 = [
            PROTOCOL | (if self.usb3_ports > 0 { 4 } else { 0 }) << 8 | 0x0200 << 16,
            NAME,
            1 | u32::from(self.usb2_ports) << 8,
            0,
        ];
        let usb3 = [
            PROTOCOL | 0x0310 << 16,
            NAME,
            (u32::from(self.usb2_ports) + 1) | u32::from(self.usb3_ports) << 8,
            0,
        ];
        let index = (offset / 4) as usize;
        let all = [usb2, usb3];
        let first = usize::from(self.usb2_ports == 0);
        let last = usize::from(self.usb3_ports > 0);
        let capability = first + index / 4;
        if capability > last { 0 } else { all[capability][index % 4] }
    }
}

/// USB Command (§5.4.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub(super) struct Usbcmd {
    /// R/S.
    pub(super) run: bool,
    /// HCRST.
    pub(super) reset: bool,
    /// INTE.
    pub(super) interrupter_enable: bool,
    /// HSEE.
    pub(super) host_system_error_enable: bool,
    #[bits(3)]
    __: u8,
    /// LHCRST; LHRC is 0, so it does nothing.
    pub(super) light_reset: bool,
    /// CSS.
    pub(super) save: bool,
    /// CRS.
    pub(super) restore: bool,
    /// EWE.
    pub(super) wrap_event_enable: bool,
    #[bits(21)]
    __: u32,
}

/// USB Status (§5.4.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub(super) struct Usbsts {
    /// HCH.
    pub(super) halted: bool,
    __: bool,
    /// HSE.
    pub(super) host_system_error: bool,
    /// EINT.
    pub(super) event_interrupt: bool,
    /// PCD.
    pub(super) port_change: bool,
    #[bits(3)]
    __: u8,
    /// SSS.
    pub(super) saving: bool,
    /// RSS.
    pub(super) restoring: bool,
    /// SRE.
    pub(super) save_restore_error: bool,
    /// CNR.
    pub(super) not_ready: bool,
    /// HCE.
    pub(super) host_controller_error: bool,
    #[bits(19)]
    __: u32,
}

/// Port Status and Control (§5.4.8).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub(super) struct Portsc {
    /// CCS.
    pub(super) connected: bool,
    /// PED; writing 1 disables.
    pub(super) enabled: bool,
    /// TM.
    pub(super) tunneled: bool,
    /// OCA.
    pub(super) over_current: bool,
    /// PR.
    pub(super) reset: bool,
    /// PLS.
    #[bits(4)]
    pub(super) link_state: u8,
    /// PP.
    pub(super) power: bool,
    /// Port Speed.
    #[bits(4)]
    pub(super) speed: u8,
    /// PIC.
    #[bits(2)]
    pub(super) indicator: u8,
    /// LWS.
    pub(super) link_write: bool,
    /// CSC to CEC, all RW1C.
    #[bits(7)]
    pub(super) changes: u8,
    /// CAS.
    pub(super) cold_attach: bool,
    /// WCE, WDE, WOE.
    #[bits(3)]
    pub(super) wake_enables: u8,
    #[bits(2)]
    __: u8,
    /// DR.
    pub(super) not_removable: bool,
    /// WPR.
    pub(super) warm_reset: bool,
}

/// Interrupter Management (§5.5.2.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub(super) struct Iman {
    /// IP.
    pub(super) pending: bool,
    /// IE.
    pub(super) enable: bool,
    #[bits(30)]
    __: u32,
}

/// Command Ring Control, low half (§5.4.5).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub(super) struct Crcr {
    /// RCS.
    pub(super) cycle: bool,
    /// CS.
    pub(super) stop: bool,
    /// CA.
    pub(super) abort: bool,
    /// CRR.
    pub(super) running: bool,
    #[bits(2)]
    __: u8,
    /// Pointer bits 31:6.
    #[bits(26)]
    pub(super) pointer: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULT: Capabilities =
        Capabilities { usb2_ports: 15, usb3_ports: 15, slots: 64, interrupters: 8, streams: true };

    #[test]
    fn port_registers_end_before_the_extended_capabilities() {
        const { assert!(PORTS + 254 * 16 <= EXTENDED) }
        assert_eq!(DEFAULT.register(4) >> 24, 30);
    }

    #[test]
    fn max_psa_is_zero_without_streams() {
        assert_eq!(DEFAULT.register(0x10) >> 12 & 0xf, 4);
        let none = Capabilities { streams: false, ..DEFAULT };
        assert_eq!(none.register(0x10) >> 12 & 0xf, 0);
    }

    #[test]
    fn both_protocols_are_linked_and_the_list_ends() {
        assert_eq!(DEFAULT.extended(0), 0x0200_0402);
        assert_eq!(DEFAULT.extended(8), 0x0f01);
        assert_eq!(DEFAULT.extended(16), 0x0310_0002);
        assert_eq!(DEFAULT.extended(24), 0x0f10);
        assert_eq!(DEFAULT.extended(32), 0);
    }

    #[test]
    fn one_protocol_alone_ends_the_list_at_once() {
        let usb3 = Capabilities { usb2_ports: 0, ..DEFAULT };
        assert_eq!(usb3.extended(0), 0x0310_0002);
        assert_eq!(usb3.extended(8), 0x0f01);
        let usb2 = Capabilities { usb3_ports: 0, ..DEFAULT };
        assert_eq!(usb2.extended(0), 0x0200_0002);
        assert_eq!(usb2.extended(16), 0);
    }
}
