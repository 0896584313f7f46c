//! Interrupts of xHCI controllers that the emulated APIC of the host has lost, asked for again.
//!
//! QEMU 7.2 on a busy machine loses one now and then: the controller has its event handler busy bit (EHB) and USBSTS.EINT
//! set, events wait in its ring, the APIC has the vector neither requested nor in service, and the driver is never called
//! again. Everything on that controller then stands still for good: it sends no second interrupt before EHB is cleared.
//! A driver that was called has cleared it long before a program runs on the one processor of the host, so what a program
//! sees set at two looks was lost. Writing EHB back clears it, and QEMU's controller interrupts once more if events wait
//! (xHCI 1.2 §4.17.2, §5.5.2.3.3).

use std::fs::OpenOptions;
use std::num::NonZero;
use std::path::Path;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap};

/// What is said of it, on the console of the host.
pub const LOST: &str = "the emulator has lost an interrupt; asking for it again";

const PCI_DEVICES: &str = "/sys/bus/pci/devices";
/// Class code of xHCI controllers (PCI Code and ID Assignment §1.13).
const CLASS: &str = "0x0c0330";
/// BAR 0 of QEMU's.
const BAR_BYTES: NonZero<usize> = NonZero::new(0x4000).unwrap();

const RTSOFF: usize = 0x18;
/// Behind the capability registers.
const USBSTS: usize = 0x04;
const USBSTS_EINT: u32 = 1 << 3;
/// Behind the runtime registers: the first interrupter's.
const ERDP: usize = 0x38;
const ERDP_EHB: u32 = 1 << 3;

/// Its registers.
struct Controller {
    name: String,
    registers: NonNull<u32>,
    usbsts: usize,
    erdp: usize,
    /// ERDP of the last look, if an interrupt was under way.
    seen: Option<u32>,
}

/// All controllers of this machine.
pub struct LostInterrupts {
    controllers: Vec<Controller>,
}

impl LostInterrupts {
    /// Finds them. None where the kernel gives their registers to no program (`iomem=relaxed` makes it).
    pub fn new() -> Self {
        let devices = std::fs::read_dir(PCI_DEVICES).into_iter().flatten().flatten();
        Self { controllers: devices.filter_map(|device| Controller::open(&device.path())).collect() }
    }

    /// Looks at each; says on the standard error stream which one was helped.
    pub fn look(&mut self) {
        for controller in &mut self.controllers {
            controller.look();
        }
    }
}

impl Default for LostInterrupts {
    fn default() -> Self {
        Self::new()
    }
}

impl Controller {
    fn open(device: &Path) -> Option<Self> {
        let class = std::fs::read_to_string(device.join("class")).ok()?;
        if class.trim_end() != CLASS {
            return None;
        }
        let bar = OpenOptions::new().read(true).write(true).open(device.join("resource0")).ok()?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        #[expect(unsafe_code, reason = "registers are memory")]
        // SAFETY: a new mapping of a file at a place that the kernel chooses.
        let registers = unsafe { mmap(None, BAR_BYTES, protection, MapFlags::MAP_SHARED, &bar, 0) }.ok()?;
        let name = device.file_name()?.to_string_lossy().into_owned();
        let mut controller = Self { name, registers: registers.cast(), usbsts: 0, erdp: 0, seen: None };
        controller.usbsts = (controller.read(0)? & 0xff) as usize + USBSTS;
        controller.erdp = (controller.read(RTSOFF)? & !0x1f) as usize + ERDP;
        Some(controller)
    }

    fn look(&mut self) {
        let (Some(status), Some(erdp)) = (self.read(self.usbsts), self.read(self.erdp)) else { return };
        let is_under_way = status != u32::MAX && status & USBSTS_EINT != 0 && erdp & ERDP_EHB != 0;
        let was = std::mem::replace(&mut self.seen, is_under_way.then_some(erdp));
        if is_under_way && was == Some(erdp) {
            eprintln!("{}: {LOST}", self.name);
            self.write(self.erdp, erdp);
            self.seen = None;
        }
    }

    /// The register at an offset in bytes; none behind the end.
    fn place(&self, at: usize) -> Option<NonNull<u32>> {
        if !at.is_multiple_of(4) || at + 4 > BAR_BYTES.get() {
            return None;
        }
        #[expect(unsafe_code, reason = "registers are memory")]
        // SAFETY: inside of the mapping, which lives as long as the process.
        Some(unsafe { self.registers.add(at / 4) })
    }

    fn read(&self, at: usize) -> Option<u32> {
        let place = self.place(at)?;
        #[expect(unsafe_code, reason = "registers are memory")]
        // SAFETY: aligned and mapped for reading; reading these registers changes nothing.
        Some(unsafe { place.read_volatile() })
    }

    fn write(&self, at: usize, value: u32) {
        if let Some(place) = self.place(at) {
            #[expect(unsafe_code, reason = "registers are memory")]
            // SAFETY: aligned and mapped for writing; what it does is the purpose.
            unsafe {
                place.write_volatile(value);
            }
        }
    }
}
