//! USB devices that can be plugged into the host under test: QEMU's own, each with a fixed place.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// USB host controllers of the host under test, at fixed PCI addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Controller {
    /// USB 3: eight SuperSpeed and eight high-speed ports; both halves of a socket have the same port number.
    Xhci,
    /// USB 2, six ports.
    Ehci,
    /// USB 1.1, two ports.
    Uhci,
}

impl Controller {
    /// QEMU's name for its model.
    pub const fn model(self) -> &'static str {
        match self {
            Self::Xhci => "qemu-xhci",
            Self::Ehci => "usb-ehci",
            Self::Uhci => "piix3-usb-uhci",
        }
    }

    /// Name of its QEMU device and, with `.0`, of its bus.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Xhci => "xhci",
            Self::Ehci => "ehci",
            Self::Uhci => "uhci",
        }
    }

    /// Device number on PCI bus 0.
    pub const fn pci_device(self) -> u8 {
        match self {
            Self::Xhci => 0x10,
            Self::Ehci => 0x11,
            Self::Uhci => 0x12,
        }
    }

    /// PCI address as Linux writes it.
    pub fn pci_address(self) -> String {
        format!("0000:00:{:02x}.0", self.pci_device())
    }

    /// Driver of the host for it, as a directory below `/sys/bus/pci/drivers`.
    pub const fn driver(self) -> &'static str {
        match self {
            Self::Xhci => "xhci_hcd",
            Self::Ehci => "ehci-pci",
            Self::Uhci => "uhci_hcd",
        }
    }
}

/// What kind of device.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Storage { protocol: Protocol, size_bytes: u64, serial: String },
    Phone { size_bytes: u64 },
    CardReader { card: PathBuf },
    Plain { model: &'static str },
}

/// How a stick talks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    BulkOnly,
    Attached,
}

/// A device to be plugged, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsbDevice {
    name: String,
    kind: Kind,
    controller: Controller,
    port: String,
}

impl UsbDevice {
    fn new(name: &str, kind: Kind) -> Self {
        Self { name: name.to_owned(), kind, controller: Controller::Xhci, port: "1".to_owned() }
    }

    /// A bulk-only stick (46f4:0001) of 16 MiB with a pattern of its own; its serial number is its name in capitals.
    pub fn stick(name: &str) -> Self {
        let kind = Kind::Storage {
            protocol: Protocol::BulkOnly,
            size_bytes: 16 << 20,
            serial: name.to_ascii_uppercase(),
        };
        Self::new(name, kind)
    }

    /// A disk with the UAS protocol (46f4:0003).
    pub fn uas(name: &str) -> Self {
        let kind = Kind::Storage {
            protocol: Protocol::Attached,
            size_bytes: 16 << 20,
            serial: name.to_ascii_uppercase(),
        };
        Self::new(name, kind)
    }

    /// A keyboard (0627:0001, full or high speed).
    pub fn keyboard(name: &str) -> Self {
        Self::new(name, Kind::Plain { model: "usb-kbd" })
    }

    /// A tablet with absolute coordinates (0627:0001).
    pub fn tablet(name: &str) -> Self {
        Self::new(name, Kind::Plain { model: "usb-tablet" })
    }

    /// A full-speed hub with eight ports (0409:55aa).
    pub fn hub(name: &str) -> Self {
        Self::new(name, Kind::Plain { model: "usb-hub" })
    }

    /// A phone (46f4:0004, MTP) with one file of this many bytes, named after it with `.bin` behind.
    pub fn phone(name: &str, size_bytes: u64) -> Self {
        Self::new(name, Kind::Phone { size_bytes })
    }

    /// A smart-card reader (08e6:4433) with a card in it that is spoken to through this socket.
    pub fn card_reader(name: &str, card: &Path) -> Self {
        Self::new(name, Kind::CardReader { card: card.to_owned() })
    }

    /// Any other model of QEMU that needs no further parts.
    pub fn model(name: &str, model: &'static str) -> Self {
        Self::new(name, Kind::Plain { model })
    }

    /// The controller it is plugged into; the xHCI if nothing is said.
    pub fn on(mut self, controller: Controller) -> Self {
        self.controller = controller;
        self
    }

    /// The port there, `1` if nothing is said; with dots below a hub: `2.3`.
    pub fn port(mut self, port: &str) -> Self {
        port.clone_into(&mut self.port);
        self
    }

    /// Size of a stick or disk.
    pub fn size_mib(mut self, mib: u64) -> Self {
        if let Kind::Storage { size_bytes, .. } = &mut self.kind {
            *size_bytes = mib << 20;
        }
        self
    }

    /// Serial number of a stick or disk.
    pub fn serial(mut self, text: &str) -> Self {
        if let Kind::Storage { serial, .. } = &mut self.kind {
            text.clone_into(serial);
        }
        self
    }

    /// Serial number of a stick or disk; empty for others.
    pub fn serial_number(&self) -> &str {
        match &self.kind {
            Kind::Storage { serial, .. } => serial,
            Kind::Phone { .. } | Kind::CardReader { .. } | Kind::Plain { .. } => "",
        }
    }

    /// Its name in this test, which is also its QEMU id.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The controller it is plugged into.
    pub fn controller(&self) -> Controller {
        self.controller
    }

    /// The port chain it is plugged into.
    pub fn port_chain(&self) -> &str {
        &self.port
    }

    /// Makes its medium in `directory` if it has one.
    pub(crate) fn make_medium(&self, directory: &Path) -> Result<Option<Medium>> {
        match &self.kind {
            Kind::Storage { size_bytes, .. } => {
                Medium::make(directory.join(format!("{}.img", self.name)), &self.name, *size_bytes).map(Some)
            }
            Kind::Phone { size_bytes } => {
                // A directory of its own: the phone shows all that is in it.
                let directory = directory.join(&self.name);
                std::fs::create_dir_all(&directory)?;
                let path = directory.join(format!("{}.bin", self.name));
                Medium::make(path, &self.name, *size_bytes).map(Some)
            }
            Kind::CardReader { .. } | Kind::Plain { .. } => Ok(None),
        }
    }

    /// Arguments of the QMP commands that plug it: `blockdev-add` first where there is a medium, then `device_add`s.
    pub(crate) fn plug_commands(&self, medium: Option<&Medium>) -> Vec<(&'static str, Value)> {
        let place =
            json!({"id": self.name, "bus": format!("{}.0", self.controller.name()), "port": self.port});
        let with = |extra: Value| merged(place.clone(), &extra);
        let (protocol, serial, medium) = match (&self.kind, medium) {
            (Kind::Storage { protocol, serial, .. }, Some(medium)) => (protocol, serial, medium),
            (Kind::Phone { .. }, Some(medium)) => {
                let phone = json!({"driver": "usb-mtp", "rootdir": medium.path.parent()});
                return vec![("device_add", with(phone))];
            }
            (Kind::CardReader { card }, _) => return self.plug_card_reader(&place, card),
            (Kind::Plain { model }, _) => return vec![("device_add", with(json!({"driver": model})))],
            (Kind::Storage { .. } | Kind::Phone { .. }, None) => return Vec::new(),
        };
        let node = self.node();
        let add_medium = json!({
            "driver": "raw", "node-name": node,
            "file": {"driver": "file", "filename": medium.path},
        });
        let mut commands = vec![("blockdev-add", add_medium)];
        match protocol {
            Protocol::BulkOnly => {
                let stick =
                    json!({"driver": "usb-storage", "drive": node, "serial": serial, "removable": true});
                commands.push(("device_add", with(stick)));
            }
            Protocol::Attached => {
                commands.push(("device_add", with(json!({"driver": "usb-uas"}))));
                let disk = json!({
                    "driver": "scsi-hd", "id": format!("{}-disk", self.name), "bus": format!("{}.0", self.name),
                    "drive": node, "serial": serial,
                });
                commands.push(("device_add", disk));
                // QEMU leaves a hot-plugged UAS device off the bus until its disk is there.
                let path = format!("/machine/peripheral/{}", self.name);
                commands.push(("qom-set", json!({"path": path, "property": "attached", "value": true})));
            }
        }
        commands
    }

    fn plug_card_reader(&self, place: &Value, card: &Path) -> Vec<(&'static str, Value)> {
        let line = format!("{}-line", self.name);
        let address = json!({"type": "unix", "data": {"path": card}});
        let backend = json!({"type": "socket", "data": {"addr": address, "server": false}});
        let card = json!({
            "driver": "ccid-card-passthru", "id": format!("{}-card", self.name),
            "bus": format!("{}.0", self.name), "chardev": line,
        });
        vec![
            ("chardev-add", json!({"id": line, "backend": backend})),
            ("device_add", merged(place.clone(), &json!({"driver": "usb-ccid"}))),
            ("device_add", card),
        ]
    }

    /// Whether it stands on a block node.
    pub(crate) fn has_node(&self) -> bool {
        matches!(self.kind, Kind::Storage { .. })
    }

    /// Name of the block node behind it.
    pub(crate) fn node(&self) -> String {
        format!("{}-medium", self.name)
    }
}

fn merged(mut base: Value, extra: &Value) -> Value {
    if let (Some(base), Some(extra)) = (base.as_object_mut(), extra.as_object()) {
        base.extend(extra.iter().map(|(key, value)| (key.clone(), value.clone())));
    }
    base
}

/// What is stored on a stick or a phone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Medium {
    /// The file behind it, on the machine that runs the test.
    pub path: PathBuf,
    /// Its length.
    pub size_bytes: u64,
    /// SHA-256 of the pattern it was made with, in hex.
    pub sha256: String,
}

impl Medium {
    /// Fills a file with numbers that follow from its name, so that no two sticks and no two blocks are alike.
    fn make(path: PathBuf, name: &str, size_bytes: u64) -> Result<Self> {
        let mut out =
            BufWriter::new(File::create(&path).with_context(|| format!("create {}", path.display()))?);
        let mut hasher = Sha256::new();
        let mut state = name.bytes().fold(0x9e37_79b9_7f4a_7c15_u64, |seed, byte| {
            (seed ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        let mut block = Vec::with_capacity(4096);
        let mut left = size_bytes;
        while left > 0 {
            block.clear();
            for _ in 0..512 {
                // xorshift64: good enough to be different everywhere.
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                block.extend_from_slice(&state.to_le_bytes());
            }
            block.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            left -= block.len() as u64;
            hasher.update(&block);
            out.write_all(&block)?;
        }
        out.flush()?;
        Ok(Self { path, size_bytes, sha256: hex(&hasher.finalize()) })
    }

    /// SHA-256 of what is in the file now: what a guest wrote, once it has flushed.
    pub fn sha256_now(&self) -> Result<String> {
        self.sha256_repeated(1)
    }

    /// The same for what is in the file now, `rounds` times in a row.
    pub fn sha256_repeated(&self, rounds: u32) -> Result<String> {
        let mut hasher = Sha256::new();
        let mut block = vec![0; 1 << 20];
        for _ in 0..rounds {
            let mut file = File::open(&self.path)?;
            while let length @ 1.. = file.read(&mut block)? {
                hasher.update(&block[..length]);
            }
        }
        Ok(hex(&hasher.finalize()))
    }
}

/// Bytes as lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A device that is in the host under test now.
#[derive(Clone, Debug)]
pub struct Plugged {
    /// As it was described.
    pub device: UsbDevice,
    /// What it stores.
    pub medium: Option<Medium>,
}

impl Plugged {
    /// The connector it is in, as a policy names it: `pci-ADDRESS/usb3:PORT`; `usb3` because a stick on the xHCI is a
    /// SuperSpeed device, `usb2` for all that is slower.
    pub fn connector(&self) -> String {
        let device = &self.device;
        let half = match (device.controller, &device.kind) {
            (Controller::Xhci, Kind::Storage { .. }) => "usb3",
            _ => "usb2",
        };
        format!("pci-{}/{half}:{}", device.controller.pci_address(), device.port)
    }

    /// SHA-256 of its medium when it was made.
    pub fn sha256(&self) -> &str {
        self.medium.as_ref().map_or("", |medium| &medium.sha256)
    }

    /// Its length in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.medium.as_ref().map_or(0, |medium| medium.size_bytes)
    }
}
