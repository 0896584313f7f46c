//! PCI configuration space of the controller: 256 bytes, a write mask, and nothing behind it (PCI 3.0 §6, xHCI 1.2
//! §5.2).
//!
//! Any length at any offset works, byte for byte: QEMU's first read is all 256 bytes. Nothing that is written has an
//! effect here. The VMM moves the BARs, enables MSI-X by event fds, and does not let the guest near what it owns.
//!
//! The capability list is short, and MSI-X comes first, because Cloud Hypervisor walks it over the socket for each
//! dword that the guest reads. There is no PCI Express capability: the function sits on the root bus, and neither
//! client needs one.

use super::msix;
use super::{MSIX_BAR, MSIX_BAR_SIZE, REGISTERS_SIZE, positions};

/// Bytes of configuration space.
pub const SIZE: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const CACHE_LINE_SIZE: usize = 0x0c;
const LATENCY_TIMER: usize = 0x0d;
const BAR0: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const MSIX: usize = 0x48;
const POWER: usize = 0x40;
/// Serial Bus Release Number (xHCI 1.2 §5.2.3).
const SBRN: usize = 0x60;
/// Frame Length Adjustment (xHCI 1.2 §5.2.4).
const FLADJ: usize = 0x61;

/// Memory space, bus master, parity, SERR, interrupt disable. No I/O space.
const COMMAND_MASK: u16 = 0x0546;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Serial bus, USB, xHCI (xHCI 1.2 §5.2.1).
const CLASS_XHCI: [u8; 3] = [0x30, 0x03, 0x0c];
const BAR_64BIT: u32 = 0x4;
const CAP_POWER: u8 = 0x01;
const CAP_MSIX: u8 = 0x11;
/// Version 3 of the power management interface; no PME, so no wake-up through it.
const PMC: u16 = 3;
/// PowerState, writable; No_Soft_Reset, so D3hot keeps everything.
const PMCSR_STATE_MASK: u16 = 0x3;
const PMCSR_NO_SOFT_RESET: u16 = 1 << 3;
/// MSI-X Enable and Function Mask.
const MSIX_CONTROL_MASK: u16 = 0xc000;

/// Who the controller says it is.
///
/// The default is that of QEMU's `qemu-xhci`: Linux has no quirk for it (`xhci-pci.c`), and every guest system has been
/// run with it. It belongs to Red Hat's range of ids for virtual devices, hence configurable: whoever ships under an own
/// vendor id needs only a class driver in the guest, which all of them have. Vendors to avoid, because their ids pull
/// in quirks: Intel 8086, Fresco 1b73, AMD 1022, NEC 1033, Etron, VIA, ASMedia, Renesas, Zhaoxin, Cadence, TI, Phytium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Subsystem Vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

impl Default for Ids {
    fn default() -> Self {
        Self { vendor: 0x1b36, device: 0x000d, revision: 1, subsystem_vendor: 0x1af4, subsystem: 0x1100 }
    }
}

/// The configuration space. See the module's text.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    at_reset: [u8; SIZE],
}

impl ConfigSpace {
    /// After power-on. `msix_vectors` is 1..=[`msix::MAX_VECTORS`].
    pub fn new(ids: Ids, msix_vectors: u16) -> Self {
        let mut space = Self { bytes: [0; SIZE], writable: [0; SIZE], at_reset: [0; SIZE] };
        space.put16(0x00, ids.vendor);
        space.put16(0x02, ids.device);
        space.allow16(COMMAND, COMMAND_MASK);
        space.put16(STATUS, STATUS_CAPABILITIES);
        space.bytes[REVISION] = ids.revision;
        space.bytes[CLASS..CLASS + 3].copy_from_slice(&CLASS_XHCI);
        space.writable[CACHE_LINE_SIZE] = 0xff;
        space.writable[LATENCY_TIMER] = 0xff;
        space.put_bar64(0, REGISTERS_SIZE);
        space.put_bar32(usize::from(MSIX_BAR), MSIX_BAR_SIZE);
        space.put16(SUBSYSTEM_VENDOR, ids.subsystem_vendor);
        space.put16(SUBSYSTEM, ids.subsystem);
        space.bytes[CAPABILITIES] = MSIX as u8;
        space.writable[INTERRUPT_LINE] = 0xff;

        space.bytes[MSIX] = CAP_MSIX;
        space.bytes[MSIX + 1] = POWER as u8;
        space.put16(MSIX + 2, msix_vectors.clamp(1, msix::MAX_VECTORS) - 1);
        space.allow16(MSIX + 2, MSIX_CONTROL_MASK);
        space.put32(MSIX + 4, msix::TABLE_OFFSET | u32::from(MSIX_BAR));
        space.put32(MSIX + 8, msix::PENDING_OFFSET | u32::from(MSIX_BAR));

        space.bytes[POWER] = CAP_POWER;
        space.put16(POWER + 2, PMC);
        space.put16(POWER + 4, PMCSR_NO_SOFT_RESET);
        space.allow16(POWER + 4, PMCSR_STATE_MASK);

        space.bytes[SBRN] = 0x30;
        space.bytes[FLADJ] = 0x20;
        space.writable[FLADJ] = 0x3f;
        space.at_reset = space.bytes;
        space
    }

    /// Copies from `offset` on; ones beyond the end.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(positions(offset)) {
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// Writes the bits that are writable; nothing beyond the end.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        for (&byte, at) in data.iter().zip(positions(offset)) {
            let Some(stored) = self.bytes.get_mut(at) else { return };
            let mask = self.writable[at];
            *stored = *stored & !mask | byte & mask;
        }
    }

    /// As after power-on.
    pub fn reset(&mut self) {
        self.bytes = self.at_reset;
    }

    fn put16(&mut self, at: usize, value: u16) {
        self.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn put32(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn allow16(&mut self, at: usize, mask: u16) {
        self.writable[at..at + 2].copy_from_slice(&mask.to_le_bytes());
    }

    /// A BAR whose size is found by writing ones: the address bits below the size stay 0 (PCI 3.0 §6.2.5.1). `size` is
    /// a power of two, at least 16.
    fn put_bar32(&mut self, index: usize, size: u32) {
        let at = BAR0 + 4 * index;
        self.writable[at..at + 4].copy_from_slice(&(!(size - 1)).to_le_bytes());
    }

    fn put_bar64(&mut self, index: usize, size: u32) {
        self.put_bar32(index, size);
        let at = BAR0 + 4 * index;
        self.put32(at, BAR_64BIT);
        self.writable[at + 4..at + 8].fill(0xff);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(Ids::default(), 4)
    }

    fn read32(space: &ConfigSpace, offset: u64) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn sized(offset: u64) -> u32 {
        let mut space = space();
        space.write(offset, &[0xff; 4]);
        read32(&space, offset)
    }

    #[test]
    fn header_is_that_of_an_xhci_function() {
        let space = space();
        assert_eq!(read32(&space, 0x00), 0x000d_1b36);
        assert_eq!(read32(&space, 0x08) >> 8, 0x0c_0330);
        assert_eq!(read32(&space, 0x0c) >> 16 & 0xff, 0, "header type 0, one function");
        assert_eq!(read32(&space, 0x2c), 0x1100_1af4);
        assert_eq!(read32(&space, 0x3c) >> 8, 0, "no interrupt pin");
        assert_eq!(read32(&space, 0x60) & 0xffff, 0x2030);
    }

    #[test]
    fn ids_are_configurable() {
        let ids = Ids { vendor: 1, device: 2, revision: 3, subsystem_vendor: 4, subsystem: 5 };
        let space = ConfigSpace::new(ids, 1);
        assert_eq!(read32(&space, 0x00), 0x0002_0001);
        assert_eq!(read32(&space, 0x08) & 0xff, 3);
        assert_eq!(read32(&space, 0x2c), 0x0005_0004);
    }

    #[test]
    fn bars_tell_their_size() {
        assert_eq!(sized(0x10), 0xffff_0004, "64 KiB, 64 bits");
        assert_eq!(sized(0x14), 0xffff_ffff, "upper half of BAR 0");
        assert_eq!(sized(0x18), 0xffff_e000, "8 KiB, 32 bits");
        for absent in [0x1c, 0x20, 0x24, 0x30] {
            assert_eq!(sized(absent), 0, "{absent:#x}");
        }
    }

    #[test]
    fn capability_list_is_msix_then_power_management() {
        let space = space();
        let first = read32(&space, 0x34) as u64 & 0xff;
        assert_eq!(read32(&space, first), 0x0003_0000 | (POWER as u32) << 8 | 0x11);
        assert_eq!(read32(&space, first + 4), 0x0002);
        assert_eq!(read32(&space, first + 8), 0x1002);
        assert_eq!(read32(&space, POWER as u64) & 0xffff, 0x01, "last of the list");
        assert_ne!(read32(&space, 0x04) >> 16 & 0x10, 0, "list present");
    }

    #[test]
    fn read_of_any_length_is_bytewise() {
        let space = space();
        let mut whole = [0; 256];
        space.read(0, &mut whole);
        for len in [1, 2, 3, 4, 8, 256] {
            for offset in 0..=(256 - len) {
                let mut part = vec![0; len];
                space.read(offset as u64, &mut part);
                assert_eq!(part, whole[offset..offset + len]);
            }
        }
    }

    #[test]
    fn access_beyond_the_end_reads_ones_and_writes_nothing() {
        let mut space = space();
        let before = space.bytes;
        space.write(256, &[0xff; 4]);
        space.write(u64::MAX, &[0xff; 4]);
        assert_eq!(space.bytes, before);
        assert_eq!(read32(&space, 254) >> 16, 0xffff);
        assert_eq!(read32(&space, u64::MAX - 1), 0xffff_ffff);
    }

    #[test]
    fn only_writable_bits_change_and_reset_brings_them_back() {
        let mut space = space();
        let before = space.bytes;
        space.write(0, &[0xff; 256]);
        let mut inverse = before;
        inverse.iter_mut().zip(space.writable).for_each(|(byte, mask)| *byte |= mask);
        assert_eq!(space.bytes, inverse);
        assert_eq!(read32(&space, 0x04) & 0xffff, 0x0546);
        assert_eq!(read32(&space, MSIX as u64) >> 16, 0xc003);
        space.reset();
        assert_eq!(space.bytes, before);
    }
}
