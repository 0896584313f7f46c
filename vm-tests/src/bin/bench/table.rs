//! What was measured, and how it is shown: for each quantity the lowest, the median and the highest of all rounds, and
//! the median as a multiple of the peers'.

use std::collections::BTreeMap;

use vm_tests::progress;

use super::contender::{BARE, PEER, USB_HOST};

/// Something that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Quantity {
    SequentialRead,
    SequentialWrite,
    RandomRead,
    AttachedRandomRead,
    EchoLatency,
    CpuRead,
    CpuWrite,
    Resident,
    IdleWakeUps,
    Probe,
    UdevEvent,
    File,
    Handover,
    Plug,
    Pull,
    BesideHang,
    ReadBesideHang,
    WorstReadAlone,
    WorstReadBesideHang,
}

impl Quantity {
    const ALL: [Self; 19] = [
        Self::SequentialRead,
        Self::SequentialWrite,
        Self::RandomRead,
        Self::AttachedRandomRead,
        Self::EchoLatency,
        Self::CpuRead,
        Self::CpuWrite,
        Self::Resident,
        Self::IdleWakeUps,
        Self::Probe,
        Self::UdevEvent,
        Self::File,
        Self::Handover,
        Self::Plug,
        Self::Pull,
        Self::BesideHang,
        Self::ReadBesideHang,
        Self::WorstReadAlone,
        Self::WorstReadBesideHang,
    ];

    const fn title(self) -> &'static str {
        match self {
            Self::SequentialRead => "stick, bulk-only: read, 1 MiB at a time (MB/s)",
            Self::SequentialWrite => "stick, bulk-only: write, 1 MiB at a time (MB/s)",
            Self::RandomRead => "stick, bulk-only: 4 KiB at random (reads/s)",
            Self::AttachedRandomRead => "disk, UAS: 4 KiB at random, 8 at once (reads/s)",
            Self::EchoLatency => "serial adapter: one byte there and back, median of each run (µs)",
            Self::CpuRead => "processor time of the USB process while reading (s/GB)",
            Self::CpuWrite => "processor time of the USB process while writing (s/GB)",
            Self::Resident => "memory of the USB process, without guest memory (MiB)",
            Self::IdleWakeUps => "wake-ups of the USB process in 10 s, keyboard attached and idle",
            Self::Probe => "hand-over of a keyboard: the kernel's first event → its drivers are done (ms)",
            Self::UdevEvent => "hand-over of a keyboard: the kernel's event → udev's (ms)",
            Self::File => "hand-over of a keyboard: both are done → its file at the instance (ms)",
            Self::Handover => "host has the device → usbvfiod has it, by udev and usbpolicyd (ms)",
            Self::Plug => "host has the device → port change in the guest (ms)",
            Self::Pull => "host has lost the device → disconnect in the guest (ms)",
            Self::BesideHang => "throughput while another device hangs, against alone (%)",
            Self::ReadBesideHang => "time of a register read while another device hangs (%)",
            Self::WorstReadAlone => "longest register read alone (ms)",
            Self::WorstReadBesideHang => "longest register read while another device hangs (ms)",
        }
    }

    /// Whether it is a change in percent, of which a multiple says nothing.
    const fn is_change(self) -> bool {
        matches!(self, Self::BesideHang | Self::ReadBesideHang)
    }

    /// Digits behind the point.
    const fn digits(self) -> usize {
        match self {
            Self::RandomRead | Self::AttachedRandomRead | Self::EchoLatency | Self::IdleWakeUps => 0,
            Self::CpuRead | Self::CpuWrite => 2,
            _ => 1,
        }
    }
}

/// All figures of a run.
#[derive(Default)]
pub(crate) struct Table {
    /// In order of first appearance.
    rows: Vec<&'static str>,
    figures: BTreeMap<(Quantity, &'static str), Vec<f64>>,
    /// What did not work.
    failures: Vec<(Quantity, &'static str, String)>,
}

impl Table {
    pub(crate) fn add(&mut self, quantity: Quantity, row: &'static str, figure: f64) {
        self.know(row);
        // A run that is broken off has shown this much.
        progress(&format!("{row}: {quantity:?} {figure:.2}"));
        self.figures.entry((quantity, row)).or_default().push(figure);
    }

    pub(crate) fn fail(&mut self, quantity: Quantity, row: &'static str, why: String) {
        self.know(row);
        self.failures.push((quantity, row, why));
    }

    /// Whether something did not work for this one: it is not tried again.
    pub(crate) fn has_failed(&self, quantity: Quantity, row: &str) -> bool {
        self.failures.iter().any(|(of, who, _)| *of == quantity && *who == row)
    }

    fn know(&mut self, row: &'static str) {
        if !self.rows.contains(&row) {
            self.rows.push(row);
        }
    }

    fn median(&self, quantity: Quantity, row: &'static str) -> Option<f64> {
        let mut figures = self.figures.get(&(quantity, row))?.clone();
        figures.sort_by(f64::total_cmp);
        figures.get(figures.len() / 2).copied()
    }

    /// Everything, as text.
    pub(crate) fn render(&self) -> String {
        let mut text = String::new();
        for quantity in Quantity::ALL {
            let of_quantity = |row: &&&'static str| {
                self.figures.contains_key(&(quantity, **row)) || self.has_failed(quantity, row)
            };
            let rows: Vec<_> = self.rows.iter().filter(of_quantity).collect();
            if rows.is_empty() {
                continue;
            }
            text += &format!(
                "\n{:<66} {:>9} {:>9} {:>9} {:>10} {:>9} {:>6}\n",
                quantity.title(),
                "lowest",
                "median",
                "highest",
                "× usb-host",
                "× Cyberus",
                "× bare"
            );
            for row in rows {
                text += &self.line(quantity, row);
            }
        }
        for (quantity, row, why) in &self.failures {
            text += &format!("\n{row}, {}: {why}\n", quantity.title());
        }
        text
    }

    fn line(&self, quantity: Quantity, row: &'static str) -> String {
        let Some(figures) = self.figures.get(&(quantity, row)) else {
            return format!("  {row:<64} {:>9}\n", "failed");
        };
        let median = self.median(quantity, row).unwrap_or_default();
        let lowest = figures.iter().copied().fold(f64::INFINITY, f64::min);
        let highest = figures.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let against = |other: &'static str| match self.median(quantity, other) {
            Some(of) if of > 0.0 && other != row && !quantity.is_change() => format!("{:.2}", median / of),
            _ => "-".to_owned(),
        };
        let digits = quantity.digits();
        format!(
            "  {row:<64} {lowest:>9.digits$} {median:>9.digits$} {highest:>9.digits$} {:>10} {:>9} {:>6}\n",
            against(USB_HOST),
            against(PEER),
            against(BARE)
        )
    }
}
